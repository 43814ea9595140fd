// F(4×4, 3×3): four by four outputs of a 3×3 convolution from 36 products in place of 144 (Winograd 1980; Lavin and Gray,
// arXiv 1509.09308): Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, matrices that follow from five points at which polynomials are evaluated, and ∞.
// Customary are 0, ±1, ±2. With 0, ±5/8, ±3/2 the largest factors are an eighth as large: on 64 channels the result's relative error
// is 0.8e-6 and not 1.6e-6, where direct summation has 0.4e-6.

#pragma once

#include <type_traits>

#include "kernels.hpp"
#include "simd.hpp"

namespace sr3 {
namespace {

constexpr float NEAR = 0.625f, FAR = 1.5f;  // the points, each with its negative
constexpr float NEAR2 = NEAR * NEAR, FAR2 = FAR * FAR;

// A row of Bᵀ applied to six vectors, and two rows of it at once: those of the points ±p, of which the other pair is ±q. Half of their
// operations are sums, which processors add beside what they multiply.
inline Vec input_zero(Vec d0, Vec d2, Vec d4) { return (1 / (NEAR2 * FAR2)) * (d4 - (NEAR2 + FAR2) * d2) + d0; }
inline Vec input_infinity(Vec d1, Vec d3, Vec d5) { return (NEAR2 * FAR2) * d1 + (d5 - (NEAR2 + FAR2) * d3); }
struct Two {
    Vec plus, minus;
};
inline Two input_two(float p, float q2, Vec d1, Vec d2, Vec d3, Vec d4) {
    const Vec even = d4 - q2 * d2, odd = p * d3 - (p * q2) * d1;
    return {even + odd, even - odd};
}

// Bᵀ applied to six vectors; store(i, what row i gives).
template <class Store>
[[gnu::always_inline]] inline void input_line(const Vec* d, const Store& store) {
    const Two near = input_two(NEAR, FAR2, d[1], d[2], d[3], d[4]), far = input_two(FAR, NEAR2, d[1], d[2], d[3], d[4]);
    store(0, input_zero(d[0], d[2], d[4]));
    store(1, near.plus), store(2, near.minus);
    store(3, far.plus), store(4, far.minus);
    store(5, input_infinity(d[1], d[3], d[5]));
}

// G applied to three vectors; the factors of its rows are in Bᵀ and Aᵀ, where they cost nothing.
inline void weight_line(const Vec* g, int from, Vec* t, int to) {
    const Vec g0 = g[0], g1 = g[from], g2 = g[2 * from];
    const Vec near = g0 + NEAR2 * g2, far = g0 + FAR2 * g2;
    t[0] = g0;
    t[to] = near + NEAR * g1;
    t[2 * to] = near - NEAR * g1;
    t[3 * to] = far + FAR * g1;
    t[4 * to] = far - FAR * g1;
    t[5 * to] = g2;
}

// Rows 0 and 2 of Aᵀ applied to six vectors, and rows 1 and 3: of the sums of what belongs to a point and its negative, and of the differences.
constexpr float OF_NEAR = 1 / (2 * NEAR2 * (NEAR2 - FAR2)), OF_FAR = 1 / (2 * FAR2 * (FAR2 - NEAR2));
inline void output_even(Vec zero, Vec near, Vec far, Vec& t0, Vec& t2) {
    t0 = OF_NEAR * near + (OF_FAR * far + zero);
    t2 = (OF_NEAR * NEAR2) * near + (OF_FAR * FAR2) * far;
}
inline void output_odd(Vec near, Vec far, Vec infinity, Vec& t1, Vec& t3) {
    t1 = (OF_NEAR * NEAR) * near + (OF_FAR * FAR) * far;
    t3 = (OF_NEAR * NEAR2 * NEAR) * near + ((OF_FAR * FAR2 * FAR) * far + infinity);
}

// Aᵀ applied to six vectors, into four.
[[gnu::always_inline]] inline void output_line(const Vec* m, Vec* t) {
    output_even(m[0], m[1] + m[2], m[3] + m[4], t[0], t[2]);
    output_odd(m[1] - m[2], m[3] - m[4], m[5], t[1], t[3]);
}

// A tile's outputs of LANES channels, given to line(y, four pixels). Two lines at a time, which stay in registers.
struct Output {
    template <class Line>
    [[gnu::always_inline]] static void run(const float* from, std::size_t plane, const Line& line) {
        const auto point = [&](int y, int x) { return load(from + (6 * y + x) * plane); };
        Vec one[6], other[6];
        const auto finish = [&](int y, const Vec* points) __attribute__((always_inline)) {
            Vec out[TILE];
            output_line(points, out);
            line(y, out);
        };
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) output_even(point(0, x), point(1, x) + point(2, x), point(3, x) + point(4, x), one[x], other[x]);
        finish(0, one), finish(2, other);
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) output_odd(point(1, x) - point(2, x), point(3, x) - point(4, x), point(5, x), one[x], other[x]);
        finish(1, one), finish(3, other);
    }
};

// Calls transform(nine taps of LANES outputs, where their points begin, half of a word) for all of `words` inputs.
template <class Transform>
[[gnu::always_inline]] inline void over_taps(const float* packed, std::size_t words, float* points, const Transform& transform) {
    constexpr int SIZE = 9 * PANEL, AHEAD = 24 * SIZE;  // floats: read from main memory, as a rule
    for (std::size_t word = 0; word < words; ++word) {
        const float* taps = packed + word * SIZE;
        for (int i = 0; i < SIZE; i += LINE) __builtin_prefetch(taps + AHEAD + i, 0, 2);
        for (int first = 0; first < PANEL; first += LANES)
            for (int half = 0; half < WORD; ++half) {
                Vec g[9];
                for (int i = 0; i < 9; ++i) g[i] = operands(taps + i * PANEL + first, half);
                transform(g, points + word * PANEL + first, half);
            }
    }
}

template <class Plane>
[[gnu::always_inline]] inline void transform_weights(const float* packed, std::size_t words, float* points, Plane plane) {
    over_taps(packed, words, points, [&](const Vec* g, float* to, int half) __attribute__((always_inline)) {
        Vec rows[18];
        for (int i = 0; i < 3; ++i) weight_line(g + i, 3, rows + i, 3);
        for (int y = 0; y < 6; ++y) {
            Vec t[6];
            weight_line(rows + 3 * y, 1, t, 1);
            for (int x = 0; x < 6; ++x) store_operands(to + (6 * y + x) * plane, half * LANES, t[x]);
        }
    });
}

void transform_weights(const float* packed, std::size_t words, float* points, std::size_t plane) {
    constexpr std::integral_constant<std::size_t, plane_of(DEPTH * PANEL)> usual;
    if (plane == usual) return transform_weights(packed, words, points, usual);  // known distances need no registers
    transform_weights<std::size_t>(packed, words, points, plane);
}

// One tile of LANES channels. Not inlined into the loop over these, which would keep an address of every pixel.
[[gnu::noinline]] void input_tile(const float* corner, std::size_t row_stride, std::size_t pixel_stride, float* to, std::size_t plane) {
    const auto pixel = [&](int y, int x) { return load(corner + y * row_stride + x * pixel_stride); };
    const auto finish = [&](int y, const Vec* d) __attribute__((always_inline)) {
        input_line(d, [&](int x, Vec v) { store_operands(to + (6 * y + x) * plane, 0, v); });
    };
    // One or two lines at a time: six would not fit into the registers, and reading pixels again costs less than storing lines.
    Vec d[6], e[6];
    for (int x = 0; x < 6; ++x) d[x] = input_zero(pixel(0, x), pixel(2, x), pixel(4, x));
    finish(0, d);
    const auto two = [&](int y, float p, float q2) __attribute__((always_inline)) {  // called, it would be told of every address
        for (int x = 0; x < 6; ++x) {
            const Two made = input_two(p, q2, pixel(1, x), pixel(2, x), pixel(3, x), pixel(4, x));
            d[x] = made.plus, e[x] = made.minus;
        }
        finish(y, d), finish(y + 1, e);
    };
    two(1, NEAR, FAR2);
    two(3, FAR, NEAR2);
    for (int x = 0; x < 6; ++x) d[x] = input_infinity(pixel(1, x), pixel(3, x), pixel(5, x));
    finish(5, d);
}

template <auto tile>
void transform_input(const float* in, std::size_t row_stride, std::size_t pixel_stride, int tile_rows, int tile_columns, std::size_t channels,
                     float* points, std::size_t plane, std::size_t tile_stride) {
    for (int row = 0; row < tile_rows; ++row)
        for (int column = 0; column < tile_columns; ++column) {
            const float* corner = in + TILE * (row * row_stride + column * pixel_stride);
            float* to = points + (static_cast<std::size_t>(row) * tile_columns + column) * tile_stride;
            for (std::size_t channel = 0; channel < channels; channel += LANES)
                tile(corner + channel, row_stride, pixel_stride, to + channel / WORD, plane);
        }
}

}  // namespace
}  // namespace sr3
