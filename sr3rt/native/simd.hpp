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

inline double total(const double* values, int count) {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += values[i];
    return sum;
}

}  // namespace
}  // namespace sr3
