// F(4×4, 3×3): four by four outputs of a 3×3 convolution from 36 products in place of 144 (Winograd 1980; Lavin and Gray,
// arXiv 1509.09308, section 4.3, whose matrices these are, with the points 0, ±1, ±2, ∞). Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A.

#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace sr3 {
namespace {

// Bᵀ applied to six vectors `from` apart, into six vectors `to` apart.
inline void input_line(const Vec* d, int from, Vec* t, int to) {
    const Vec d0 = d[0], d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from], d5 = d[5 * from];
    const Vec a = d4 - 4.0f * d2, b = d3 - 4.0f * d1, c = d4 - d2, e = 2.0f * (d3 - d1);
    t[0] = 4.0f * d0 + (d4 - 5.0f * d2);
    t[to] = a + b;
    t[2 * to] = a - b;
    t[3 * to] = c + e;
    t[4 * to] = c - e;
    t[5 * to] = 4.0f * d1 + (d5 - 5.0f * d3);
}

// G applied to three vectors.
inline void weight_line(const Vec* g, int from, Vec* t, int to) {
    const Vec g0 = g[0], g1 = g[from], g2 = g[2 * from];
    const Vec outer = (g0 + g2) * (-1.0f / 6), far = g0 * (1.0f / 24) + g2 * (1.0f / 6);
    t[0] = 0.25f * g0;
    t[to] = outer - g1 * (1.0f / 6);
    t[2 * to] = outer + g1 * (1.0f / 6);
    t[3 * to] = far + g1 * (1.0f / 12);
    t[4 * to] = far - g1 * (1.0f / 12);
    t[5 * to] = g2;
}

// Aᵀ applied to six vectors, into four.
inline void output_line(const Vec* m, int from, Vec* t, int to) {
    const Vec s1 = m[from] + m[2 * from], d1 = m[from] - m[2 * from];
    const Vec s2 = m[3 * from] + m[4 * from], d2 = m[3 * from] - m[4 * from];
    t[0] = m[0] + s1 + s2;
    t[to] = d1 + 2.0f * d2;
    t[2 * to] = s1 + 4.0f * s2;
    t[3 * to] = d1 + (8.0f * d2 + m[5 * from]);
}

inline void transform_weights(const float* packed, std::size_t channels, float* points, std::size_t plane) {
    for (std::size_t channel = 0; channel < channels; ++channel)
        for (int half = 0; half < PANEL; half += LANES) {
            Vec g[9], rows[18], t[POINTS];
            for (int i = 0; i < 9; ++i) g[i] = load(packed + (channel * 9 + i) * PANEL + half);
            for (int i = 0; i < 3; ++i) weight_line(g + i, 3, rows + i, 3);
            for (int i = 0; i < 6; ++i) weight_line(rows + 3 * i, 1, t + 6 * i, 1);
            for (int i = 0; i < POINTS; ++i) store(points + i * plane + channel * PANEL + half, t[i]);
        }
}

inline void transform_input(const float* in, std::size_t row_stride, std::size_t pixel_stride, int tile_rows, int tile_columns,
                            std::size_t channels, float* points, std::size_t plane, std::size_t tile_stride) {
    for (int row = 0; row < tile_rows; ++row)
        for (int column = 0; column < tile_columns; ++column) {
            const float* corner = in + TILE * (row * row_stride + column * pixel_stride);
            float* to = points + (static_cast<std::size_t>(row) * tile_columns + column) * tile_stride;
            for (std::size_t channel = 0; channel < channels; channel += LANES) {
                Vec rows[POINTS];
                for (int x = 0; x < 6; ++x) {
                    Vec d[6];
                    for (int y = 0; y < 6; ++y) d[y] = load(corner + y * row_stride + x * pixel_stride + channel);
                    input_line(d, 1, rows + x, 6);
                }
                for (int y = 0; y < 6; ++y) {
                    Vec t[6];
                    input_line(rows + 6 * y, 1, t, 1);
                    for (int x = 0; x < 6; ++x) store(to + (6 * y + x) * plane + channel, t[x]);
                }
            }
        }
}

}  // namespace
}  // namespace sr3
