// A 3×3 convolution of a map doubled by nearest neighbour, on that map itself: eight by eight outputs from 81 products in place of 144.
// Along an axis the outputs 2i and 2i + 1 have the taps (w0, w1 + w2, 0) and (0, w0 + w1, w2) on pixels i - 1, i, i + 1: two F(4, 3) of the
// same pixels (winograd.hpp). Of the first's transformed taps the one at ∞ is zero, of the second's the one at 0, and at the point 1 both
// are w0 + w1 + w2, so that nine products are left of twelve. With 1 among the points, those below have the least error, that of F(4×4, 3×3).

#pragma once

#include <array>
#include <type_traits>

#include "kernels.hpp"
#include "simd.hpp"
#include "winograd.hpp"

namespace sr3 {
namespace {

constexpr double BETWEEN[] = {-0.5, -1.25, 2.25};                                     // what both have, each in a product of its own
constexpr double DOUBLED_POINTS[] = {0, BETWEEN[0], BETWEEN[1], BETWEEN[2], 1};  // and ∞: in this order in Bᵀ

// Bᵀ: the coefficients of the polynomials that are one at their point and zero at the others, and of that which is zero at all.
constexpr auto DOUBLED_INPUT = [] {
    std::array<std::array<float, 6>, 6> made{};
    for (int i = 0; i < 6; ++i) {
        double product[6] = {1}, value = 1;
        for (int j = 0; j < 5; ++j) {
            if (j == i) continue;
            for (int k = 5; k >= 0; --k) product[k] = (k > 0 ? product[k - 1] : 0) - DOUBLED_POINTS[j] * product[k];
            if (i < 5) value *= DOUBLED_POINTS[i] - DOUBLED_POINTS[j];
        }
        for (int k = 0; k < 6; ++k) made[i][k] = static_cast<float>(product[k] / value);
    }
    return made;
}();

// G: of the even outputs at 0 and what lies between, of both at 1, of the odd ones, divided by the point, and at ∞.
constexpr auto DOUBLED_WEIGHTS = [] {
    std::array<std::array<float, 3>, 9> made{};
    made[0] = {1, 0, 0}, made[4] = {1, 1, 1}, made[8] = {0, 0, 1};
    for (int i = 0; i < 3; ++i) {
        const float p = static_cast<float>(BETWEEN[i]);
        made[1 + i] = {1, p, p}, made[5 + i] = {1, 1, p};
    }
    return made;
}();

// Aᵀ of the even outputs' five products, and of the odd ones'.
constexpr auto DOUBLED_OUTPUT = [] {
    std::array<std::array<std::array<float, 5>, TILE>, 2> made{};
    for (int y = 0; y < TILE; ++y) made[0][y][4] = made[1][y][0] = 1;
    made[0][0][0] = made[1][TILE - 1][4] = 1;
    for (int i = 0; i < 3; ++i) {
        double power = 1;
        for (int y = 0; y < TILE; ++y) {
            made[0][y][1 + i] = static_cast<float>(power);
            made[1][y][1 + i] = static_cast<float>(power *= BETWEEN[i]);
        }
    }
    return made;
}();

// The sum of factor·value(i); factors known to the compiler, of which those that are zero cost nothing.
template <std::size_t size, class Value>
[[gnu::always_inline]] inline Vec weighed(const std::array<float, size>& factors, const Value& value) {
    Vec sum{};
#pragma GCC unroll 6
    for (std::size_t i = 0; i < size; ++i)
        if (factors[i] != 0) sum += factors[i] * value(static_cast<int>(i));
    return sum;
}

constexpr int DOUBLED_ROWS = DOUBLED_PART / 9;

template <int first, class Plane>
[[gnu::always_inline]] inline void doubled_taps(const float* packed, std::size_t words, float* points, Plane plane) {
    over_taps(packed, words, points, [&](const Vec* g, float* to, int half) __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int y = 0; y < DOUBLED_ROWS; ++y) {
            Vec line[3];
#pragma GCC unroll 3
            for (int x = 0; x < 3; ++x) line[x] = weighed(DOUBLED_WEIGHTS[first + y], [&](int i) { return g[3 * i + x]; });
#pragma GCC unroll 9
            for (int x = 0; x < 9; ++x)
                store_operands(to + (9 * y + x) * plane, half * LANES, weighed(DOUBLED_WEIGHTS[x], [&](int i) { return line[i]; }));
        }
    });
}

template <int first>
void doubled_taps(const float* packed, std::size_t words, float* points, std::size_t plane) {
    constexpr std::integral_constant<std::size_t, plane_of(DEPTH * PANEL)> usual;
    if (plane == usual) return doubled_taps<first>(packed, words, points, usual);  // known distances need no registers
    doubled_taps<first, std::size_t>(packed, words, points, plane);
}

void doubled_weights(const float* packed, std::size_t words, int part, float* points, std::size_t plane) {
    static_assert(DOUBLED_ROWS == 3);
    if (part == 0) return doubled_taps<0>(packed, words, points, plane);
    if (part == 1) return doubled_taps<3>(packed, words, points, plane);
    doubled_taps<6>(packed, words, points, plane);
}

// One tile of LANES channels, a line at a time: six would not fit into the registers.
[[gnu::noinline]] void doubled_input_tile(const float* corner, std::size_t row_stride, std::size_t pixel_stride, float* to, std::size_t plane) {
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y) {
        Vec d[6];
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x)
            d[x] = weighed(DOUBLED_INPUT[y], [&](int i) { return load(corner + i * row_stride + x * pixel_stride); });
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) store_operands(to + (6 * y + x) * plane, 0, weighed(DOUBLED_INPUT[x], [&](int i) { return d[i]; }));
    }
}

// A tile's outputs in even (0) or odd (1) rows and columns, given to line(y, four pixels).
template <int down, int across>
struct DoubledOutput {
    template <class Line>
    [[gnu::always_inline]] static void run(const float* from, std::size_t plane, const Line& line) {
        const float* first = from + 4 * (9 * down + across) * plane;
#pragma GCC unroll 4
        for (int y = 0; y < TILE; ++y) {
            Vec sums[5], out[TILE];
#pragma GCC unroll 5
            for (int x = 0; x < 5; ++x) sums[x] = weighed(DOUBLED_OUTPUT[down][y], [&](int i) { return load(first + (9 * i + x) * plane); });
#pragma GCC unroll 4
            for (int x = 0; x < TILE; ++x) out[x] = weighed(DOUBLED_OUTPUT[across][x], [&](int i) { return sums[i]; });
            line(y, out);
        }
    }
};

}  // namespace
}  // namespace sr3
