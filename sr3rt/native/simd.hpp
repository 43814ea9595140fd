// A vector of SR3_LANES floats, by the compiler's own extension; kernels.cpp is compiled with the flags of one instruction set, and
// with contraction, so that a·b + c is one fused operation.

#pragma once

#include <cstdint>
#include <cstring>

namespace sr3 {
namespace {

constexpr int LANES = SR3_LANES;
constexpr int PANEL = 2 * LANES;

using Vec = float __attribute__((vector_size(4 * LANES)));
using Ints = std::int32_t __attribute__((vector_size(4 * LANES)));

// Loads and stores at any address: most are aligned, and those cost nothing more.
inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec splat(float value) { return value - Vec{}; }

// e^x as in Cephes' expf: x = n·ln 2 + r, a polynomial of r, times 2^n. NaN stays NaN.
inline Vec exponential(Vec x) {
    constexpr float MOST = 88.0f, ROUND = 12582912.0f;  // adding 1.5·2^23 rounds to a whole number
    x = x > MOST ? splat(MOST) : x;
    x = x < -MOST ? splat(-MOST) : x;
    const Vec n = (x * 1.44269504088896341f + ROUND) - ROUND;
    const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

inline Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }

// Up to 16 values of each lane, for their sum and the sum of their squares in float64. A variance is the small difference of two
// large numbers, so squares are taken of the distances from the mean of the 16, which float32 holds well, and its own is added.
struct Sums {
    static constexpr int MOST = 16;
    Vec values[MOST];
    int count = 0;

    void add(Vec v) { values[count++] = v; }

    void add_to(double* sums, double* squares) {
        Vec sum{}, spread{};
        for (int i = 0; i < count; ++i) sum += values[i];
        const Vec mean = sum * (1.0f / static_cast<float>(count));
        for (int i = 0; i < count; ++i) spread += (values[i] - mean) * (values[i] - mean);
        for (int lane = 0; lane < LANES; ++lane) {
            const double one = static_cast<double>(sum[lane]);
            sums[lane] += one;
            squares[lane] += static_cast<double>(spread[lane]) + one * one / count;
        }
        count = 0;
    }
};

}  // namespace
}  // namespace sr3
