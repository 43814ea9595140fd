// What the network's layers are made of, one set of functions for each instruction set (kernels.cpp is compiled once for each).
//
// Activations are float32, rows of pixels, a pixel's channels side by side and padded with zeros to whole vectors. Weights are packed
// in panels of two vectors of output channels. What products of convolutions are made of, weights and inputs, lies in words of four
// bytes: one float32, or two bfloat16 of neighbouring input channels (Intel's SDM, VDPBF16PS), the first in the lower half. Sums are float32.
// No function allocates, and none depends on how the work around it is cut: every sum is taken over the input channels in their order.

#pragma once

#include <cstddef>

namespace sr3 {

constexpr int TILE = 4;                // outputs of a Winograd tile, each way: F(4×4, 3×3)
constexpr int POINTS = 36;             // products in place of those 16 outputs · 9 taps
constexpr int DOUBLED = 81;            // products of such a tile on a map that is doubled (doubled.hpp), in place of four times as many
constexpr int DOUBLED_PART = 27;       // whose weights are transformed at a time
constexpr int SOURCES = 4;             // most registers that are joined
constexpr std::size_t ALIGNMENT = 64;  // bytes
constexpr std::size_t DEPTH = 64;      // words of input channels whose weights are transformed at a time

constexpr std::size_t rounded_up(std::size_t value, std::size_t to) { return (value + to - 1) / to * to; }

// A plane's size in floats, at least `count`: an odd number of cache lines, so that equal places of many planes do not all fall
// into the same few sets of the cache.
constexpr std::size_t plane_of(std::size_t count) {
    const std::size_t lines = rounded_up(count, 16) / 16;
    return 16 * (lines | 1);
}

enum class Resample { none, up, down };

// Which of the 36 points a product of a doubled map's tile reads. Along an axis they are nine: four of the even outputs, one of all, four of the odd.
constexpr int doubled_point(int product) {
    constexpr int along[] = {0, 1, 2, 3, 4, 1, 2, 3, 5};
    return 6 * along[product / 9] + along[product % 9];
}

// One of the registers that a layer reads, of one picture: `channels` floats a pixel (padded), and what a norm makes of them.
struct Source {
    const float* data;
    std::size_t channels;
    const float* scale;  // null: none. Of each channel; the activation reads data·scale + shift
    const float* shift;
};

// A layer's input: the sources, joined, normed, through SiLU where `silu`, resampled to height × width.
struct Input {
    Source sources[SOURCES];
    int count;
    bool silu;
    Resample resample;
    int height, width;
    int source_width;  // of the sources, before resampling
};

// What is done to a layer's sums: (act(sum·scale + shift) + add)·gain. Pointers are to the first channel and pixel written.
struct Epilogue {
    const float* scale;  // null: none
    const float* shift;
    bool silu;
    const float* add;  // null: none
    float gain;
    float* out;
    std::size_t row_stride, pixel_stride;          // of out, in floats
    std::size_t add_row_stride, add_pixel_stride;  // of add
    int vectors;                           // of a panel that are written: 1 or 2
    double* sums;                          // null: none; of each channel, added to: sums of the values, then `sums_stride` on, of squares
    std::size_t sums_stride;               // between a unit's sums and its sums of squares
    std::size_t unit_stride;               // between the units of two rows of tiles
};

struct Tiles;

// What a product brings into the second-level cache while it runs, any addresses: depth·panel/4 floats from `next` on with its first block of
// rows, and as many from `then` on, or null, further from `next` on, with each of the others.
struct Coming {
    const float* next;
    const float* then = nullptr;
};

struct Kernels {
    const char* name;
    int lanes;  // floats in a vector; a panel is two of them
    int word;   // input channels in a word: 1 of float32, or 2 of bfloat16

    // Rows [row, row+rows) and columns [column, column+columns) of the input's channels [first, last), zeros outside the picture.
    void (*fill)(const Input&, int row, int column, int rows, int columns, std::size_t first, std::size_t last, float* out);

    // Rows of `size` floats, one for each input channel, -> rows of words, in place or elsewhere. `channels` is a multiple of `word`.
    void (*pack)(const float* rows, std::size_t channels, std::size_t size, float* words);

    // `count` floats, those of whole pixels one after the other, -> words, in place or elsewhere.
    void (*round)(const float* values, std::size_t count, float* words);

    // packed: [words][9][panel] -> points: [36] planes of [words][panel], `plane` words apart.
    void (*transform_weights)(const float* packed, std::size_t words, float* points, std::size_t plane);

    // Tiles of 6×6 pixels, 4 apart, -> [36] planes of [tile][word]: `plane` and `tile_stride` words apart.
    void (*transform_input)(const float* in, std::size_t row_stride, std::size_t pixel_stride, int tile_rows, int tile_columns,
                            std::size_t channels, float* points, std::size_t plane, std::size_t tile_stride);

    // [36] planes of [tile][panel], tiles' rows `tile_row_stride` tiles apart, -> rows × columns pixels.
    void (*transform_output)(const float* points, std::size_t plane, std::size_t tile_row_stride, int rows, int columns,
                             const Epilogue&);

    // The same for a map that is doubled: weights of the products [part·27, part·27 + 27), and outputs from [81] planes: 2·rows × 2·columns pixels.
    void (*doubled_weights)(const float* packed, std::size_t words, int part, float* points, std::size_t plane);
    void (*doubled_input)(const float* in, std::size_t row_stride, std::size_t pixel_stride, int tile_rows, int tile_columns,
                          std::size_t channels, float* points, std::size_t plane, std::size_t tile_stride);
    void (*doubled_output)(const float* points, std::size_t plane, std::size_t tile_row_stride, int rows, int columns, const Epilogue&);

    // m[row][panel] (+)= a[row][depth] · b[depth][panel], a and b in words. Strides in words.
    void (*multiply)(std::size_t rows, std::size_t depth, const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, Coming,
                     float* m, std::size_t m_stride, bool accumulate);

    // The same of float32.
    void (*multiply_floats)(std::size_t rows, std::size_t depth, const float* a, std::size_t a_stride, const float* b,
                            std::size_t b_stride, Coming, float* m, std::size_t m_stride, bool accumulate);

    // `pixels` sums of [panel] -> one row of pixels.
    void (*finish_row)(const float* sums, int pixels, const Epilogue&);

    // Each of `rows` rows of `count` scores -> softmax.
    void (*softmax)(float* scores, std::size_t stride, std::size_t rows, std::size_t count);

    // x -> y = y + factor·x, `count` floats.
    void (*add_scaled)(float* y, const float* x, float factor, std::size_t count);

    void (*silu)(float* values, std::size_t count);

    const Tiles* tiles = nullptr;  // what convolutions multiply with (tiles.hpp), in bfloat16; null: with the above
};

// Of the instruction set asked for; null where this processor has it not. "auto": the best of float32, "avx512" or "avx2". "bf16": the best
// of bfloat16, "amx_bf16" or "avx512_bf16"; "quick_bf16": that, where it is faster than float32. "avx2_bf16" has the numbers of the latter without instructions for them, slowly, to see what they
// will be elsewhere.
const Kernels* kernels(const char* name);

}  // namespace sr3
