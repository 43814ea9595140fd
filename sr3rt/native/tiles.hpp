// Matrix products by tiles (Intel's AMX, SDM volume 1, chapter 18): one instruction adds 16 × 32 by 32 × 16 operands in bfloat16 to 16 × 16
// sums in float32.

#pragma once

#include <cstddef>

namespace sr3 {

constexpr std::size_t TILE_ROWS = 16;     // pixels
constexpr std::size_t TILE_DEPTH = 32;    // inputs
constexpr std::size_t TILE_PANEL = 32;    // outputs: of two tiles side by side
constexpr std::size_t TILE_LINE = 64;     // bytes of a row: a pixel's TILE_DEPTH operands
constexpr std::size_t TILE_MATRIX = 2 * TILE_ROWS * TILE_LINE;  // bytes of TILE_DEPTH × TILE_PANEL weights

// A panel's part of rows × columns pixels, to be written and, where `add` is not null, read soon. Strides in floats.
struct Ahead {
    const float* out;
    const float* add;
    std::size_t rows, columns, row_stride, pixel_stride;
};

// Sums over taps and inputs, of tiles of pixels that lie in a strip: [chunk of TILE_DEPTH inputs][pixel] of TILE_LINE bytes each.
struct TileProduct {
    const std::byte* strip;
    std::size_t plane;         // bytes from a chunk to the next
    const std::size_t* tiles;  // the first pixel of each tile
    std::size_t count;
    std::size_t step;          // from a tile's pixel to its next
    const std::size_t* taps;   // how many pixels further each tap reads
    std::size_t tap_count, chunks;
    const std::byte* weights;  // [chunk][tap] of TILE_MATRIX bytes each
    int halves;                // of the panel that are needed: 1 or 2
    float* sums;               // [tile][TILE_ROWS][TILE_PANEL]
    Ahead ahead;               // comes near meanwhile
};

struct Tiles {
    // `pixels` of `channels` floats each, whole vectors of 16 -> lines of operands, zeros where there is no channel: a chunk's one after the
    // other, `plane` bytes from chunk to chunk.
    void (*round_pixels)(const float* values, std::size_t pixels, std::size_t channels, std::byte* lines, std::size_t plane);

    // `count` matrices of TILE_DEPTH rows of TILE_PANEL floats -> as many of TILE_MATRIX bytes.
    void (*round_weights)(const float* matrices, std::size_t count, std::byte* weights);

    void (*multiply)(const TileProduct&);
};

}  // namespace sr3
