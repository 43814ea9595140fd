// The functions of tiles.hpp. CMake compiles this file for AMX and, for the tests, for any processor: there tiles are arrays.

#include "tiles.hpp"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

namespace sr3 {
namespace {

constexpr std::size_t LANES = 16;

#ifdef __AMX_BF16__
struct alignas(64) Configuration {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {TILE_LINE, TILE_LINE, TILE_LINE, TILE_LINE, TILE_LINE, TILE_LINE, TILE_LINE, TILE_LINE};
    std::uint8_t rows[16] = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS};
};
constexpr Configuration CONFIGURATION;

// The thread's tiles, while it uses them. GCC's intrinsics do not say that they read memory.
struct Configured {
    Configured() {
        asm volatile("" ::: "memory");
        _tile_loadconfig(&CONFIGURATION);
    }
    ~Configured() { _tile_release(); }
};
#define SR3_ZERO(tile) _tile_zero(tile)
#define SR3_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define SR3_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define SR3_MULTIPLY(sum, a, b) _tile_dpbf16ps(sum, a, b)
#else
struct Configured {
    Configured() {}
};
thread_local float numbers[8][TILE_ROWS][LANES];

inline float high(float word) { return std::bit_cast<float>(std::bit_cast<std::uint32_t>(word) & 0xFFFF0000u); }
inline float low(float word) { return std::bit_cast<float>(std::bit_cast<std::uint32_t>(word) << 16); }

void load_tile(float (*tile)[LANES], const std::byte* from, std::size_t stride) {
    for (std::size_t row = 0; row < TILE_ROWS; ++row) std::memcpy(tile[row], from + row * stride, TILE_LINE);
}
void store_tile(const float (*tile)[LANES], std::byte* to, std::size_t stride) {
    for (std::size_t row = 0; row < TILE_ROWS; ++row) std::memcpy(to + row * stride, tile[row], TILE_LINE);
}
// In the order of the instruction: neighbouring inputs are summed apart.
void multiply_tiles(float (*sum)[LANES], const float (*a)[LANES], const float (*b)[LANES]) {
    for (std::size_t row = 0; row < TILE_ROWS; ++row) {
        float lows[LANES] = {}, highs[LANES] = {};
        for (std::size_t k = 0; k < LANES; ++k)
            for (std::size_t lane = 0; lane < LANES; ++lane) {
                lows[lane] += low(a[row][k]) * low(b[k][lane]);
                highs[lane] += high(a[row][k]) * high(b[k][lane]);
            }
        for (std::size_t lane = 0; lane < LANES; ++lane) sum[row][lane] += lows[lane] + highs[lane];
    }
}
#define SR3_ZERO(tile) std::memset(numbers[tile], 0, sizeof numbers[tile])
#define SR3_LOAD(tile, from, stride) load_tile(numbers[tile], reinterpret_cast<const std::byte*>(from), stride)
#define SR3_STORE(tile, to, stride) store_tile(numbers[tile], reinterpret_cast<std::byte*>(to), stride)
#define SR3_MULTIPLY(sum, a, b) multiply_tiles(numbers[sum], numbers[a], numbers[b])
#endif

// Two vectors of floats -> operands in bfloat16, the nearest, ties to even: one vector's after the other's, or in turns.
#ifdef __AVX512BF16__
inline __m512i rounded(const float* first, const float* second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(second), _mm512_loadu_ps(first)));
}

inline void store_rounded(std::byte* to, const float* first, const float* second) { _mm512_store_si512(to, rounded(first, second)); }

inline void store_in_turns(std::byte* to, const float* first, const float* second) {
    alignas(64) static constexpr auto TURNS = [] {
        std::array<std::uint16_t, 2 * LANES> turns{};
        for (std::size_t i = 0; i < 2 * LANES; ++i) turns[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * LANES);
        return turns;
    }();
    _mm512_store_si512(to, _mm512_maskz_permutexvar_epi16(~__mmask32{}, _mm512_load_si512(TURNS.data()), rounded(first, second)));
}
#else
inline std::uint16_t rounded(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline void store_rounded(std::byte* to, const float* first, const float* second) {
    std::uint16_t operands[2 * LANES];
    for (std::size_t i = 0; i < LANES; ++i) operands[i] = rounded(first[i]), operands[LANES + i] = rounded(second[i]);
    std::memcpy(to, operands, sizeof operands);
}

inline void store_in_turns(std::byte* to, const float* first, const float* second) {
    std::uint16_t operands[2 * LANES];
    for (std::size_t i = 0; i < LANES; ++i) operands[2 * i] = rounded(first[i]), operands[2 * i + 1] = rounded(second[i]);
    std::memcpy(to, operands, sizeof operands);
}
#endif

void round_pixels(const float* values, std::size_t pixels, std::size_t channels, std::byte* lines, std::size_t plane) {
    alignas(64) static constexpr float none[LANES] = {};
    for (std::size_t i = 0; i < pixels; ++i, values += channels, lines += TILE_LINE)
        for (std::size_t channel = 0; channel < channels; channel += TILE_DEPTH) {
            const float* second = channel + LANES < channels ? values + channel + LANES : none;
            store_rounded(lines + channel / TILE_DEPTH * plane, values + channel, second);
        }
}

void round_weights(const float* matrices, std::size_t count, std::byte* weights) {
    for (std::size_t matrix = 0; matrix < count; ++matrix, matrices += TILE_DEPTH * TILE_PANEL)
        for (std::size_t half = 0; half < 2; ++half)
            for (std::size_t row = 0; row < TILE_ROWS; ++row, weights += TILE_LINE) {
                const float* first = matrices + 2 * row * TILE_PANEL + half * LANES;
                store_in_turns(weights, first, first + TILE_PANEL);
            }
}

// One or two tiles of pixels by one or two halves of a panel: sums in tiles 0 to 3, pixels in 4 and 5, weights in 6 and 7.
template <bool two, bool both>
struct Block {
    static void zero() {
        SR3_ZERO(0);
        if constexpr (both) SR3_ZERO(1);
        if constexpr (two) SR3_ZERO(2);
        if constexpr (two && both) SR3_ZERO(3);
    }
    static void store(float* sums) {
        SR3_STORE(0, sums, TILE_PANEL * sizeof(float));
        if constexpr (both) SR3_STORE(1, sums + LANES, TILE_PANEL * sizeof(float));
        if constexpr (two) SR3_STORE(2, sums + TILE_ROWS * TILE_PANEL, TILE_PANEL * sizeof(float));
        if constexpr (two && both) SR3_STORE(3, sums + TILE_ROWS * TILE_PANEL + LANES, TILE_PANEL * sizeof(float));
    }
    static void pixels(const std::byte* first, const std::byte* second, std::size_t step) {
        SR3_LOAD(4, first, step);
        if constexpr (two) SR3_LOAD(5, second, step);
    }
    static void weights(const std::byte* from) {
        SR3_LOAD(6, from, TILE_LINE);
        if constexpr (both) SR3_LOAD(7, from + TILE_MATRIX / 2, TILE_LINE);
    }
    static void multiply() {
        SR3_MULTIPLY(0, 4, 6);
        if constexpr (both) SR3_MULTIPLY(1, 4, 7);
        if constexpr (two) SR3_MULTIPLY(2, 5, 6);
        if constexpr (two && both) SR3_MULTIPLY(3, 5, 7);
    }
};

// Fetches what is ahead, a few pixels at each of `steps`: memory has time while tiles multiply, and none when sums are finished.
class Fetch {
   public:
    Fetch(const Ahead& ahead, std::size_t steps) : ahead_(ahead), pixels_((ahead.rows * ahead.columns + steps - 1) / steps) {}

    void step() {
        for (std::size_t i = 0; i < pixels_ && row_ < ahead_.rows; ++i) {
            const std::size_t at = row_ * ahead_.row_stride + column_ * ahead_.pixel_stride;
            __builtin_prefetch(ahead_.out + at, 1, 2), __builtin_prefetch(ahead_.out + at + LANES, 1, 2);
            if (ahead_.add != nullptr) __builtin_prefetch(ahead_.add + at, 0, 2), __builtin_prefetch(ahead_.add + at + LANES, 0, 2);
            if (++column_ == ahead_.columns) column_ = 0, ++row_;
        }
    }

   private:
    const Ahead ahead_;
    std::size_t pixels_, row_ = 0, column_ = 0;
};

template <bool two, bool both>
void multiply_block(const TileProduct& p, std::size_t at, Fetch& fetch) {
    using Block = Block<two, both>;
    const std::byte *first = p.strip + p.tiles[at] * TILE_LINE, *second = p.strip + p.tiles[two ? at + 1 : at] * TILE_LINE;
    const std::byte* weights = p.weights;
    Block::zero();
    for (std::size_t chunk = 0; chunk < p.chunks; ++chunk, first += p.plane, second += p.plane)
        for (std::size_t tap = 0; tap < p.tap_count; ++tap, weights += TILE_MATRIX) {
            const std::size_t further = p.taps[tap] * TILE_LINE;
            Block::pixels(first + further, second + further, p.step * TILE_LINE);
            Block::weights(weights);
            Block::multiply();
            fetch.step();
        }
    Block::store(p.sums + at * TILE_ROWS * TILE_PANEL);
}

template <bool both>
void multiply_all(const TileProduct& p) {
    Fetch fetch(p.ahead, (p.count + 1) / 2 * p.chunks * p.tap_count);
    std::size_t at = 0;
    for (; at + 1 < p.count; at += 2) multiply_block<true, both>(p, at, fetch);
    if (at < p.count) multiply_block<false, both>(p, at, fetch);
}

void multiply(const TileProduct& p) {
    const Configured configured;
    p.halves == 2 ? multiply_all<true>(p) : multiply_all<false>(p);
}

}  // namespace

extern const Tiles SR3_TILES;
const Tiles SR3_TILES{.round_pixels = &round_pixels, .round_weights = &round_weights, .multiply = &multiply};

}  // namespace sr3
