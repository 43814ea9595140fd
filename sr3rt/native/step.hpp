// One refinement step and its noise: the arithmetic, once, for the host and for CUDA.
//
//     x0 = clip(p y + q net)        y <- a y + b x0 + c x0_previous + s z
//
// Every operation is a correctly rounded float32 addition, multiplication or square root, or an integer operation; nothing is
// fused and no library function is called. So the host (built with -ffp-contract=off), CUDA and the NumPy oracle (sr3rt/noise.py,
// the same formulas in the same order) agree in every bit.

#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no standard library
namespace std {
using int32_t = int;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using size_t = decltype(sizeof 0);
}  // namespace std
#else
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define SR3_FN __host__ __device__ __forceinline__
#else
#define SR3_FN inline __attribute__((always_inline))
#endif

namespace sr3 {

// ------------------------------------------------------------------------------------------------- rounded once, never fused

SR3_FN float add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

SR3_FN float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

SR3_FN float sqrt(float a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

SR3_FN std::uint32_t bits(float a) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(a);
#else
    return std::bit_cast<std::uint32_t>(a);
#endif
}

SR3_FN float from_bits(std::uint32_t a) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(a);
#else
    return std::bit_cast<float>(a);
#endif
}

// c + a b in two roundings.
SR3_FN float add_product(float c, float a, float b) { return add(c, mul(a, b)); }

// ------------------------------------------------------------------------------------------------------------------- random

struct Words {
    std::uint32_t w0, w1, w2, w3;
};

struct Key {
    std::uint32_t low, high;
};

SR3_FN Key key_of(std::uint64_t seed) { return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}; }

// a b. A compiler for GPUs that sees where a and b come from makes longer sums of it than its one instruction.
SR3_FN std::uint64_t wide_product(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
    std::uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
#else
    return std::uint64_t{a} * b;
#endif
}

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3 and table 2.
SR3_FN Words philox(Words x, Key key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t even = wide_product(0xD2511F53u, x.w0);
        const std::uint64_t odd = wide_product(0xCD9E8D57u, x.w2);
        x = {static_cast<std::uint32_t>(odd >> 32) ^ x.w1 ^ key.low, static_cast<std::uint32_t>(odd),
             static_cast<std::uint32_t>(even >> 32) ^ x.w3 ^ key.high, static_cast<std::uint32_t>(even)};
        key = {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u};  // the golden ratio and sqrt(3) - 1
    }
    return x;
}

// ln u for u = (k + 1/2) / 2^23, 0 <= k < 2^23. u = 2^e m with m in [2/3, 4/3); ln m = f - f^2/2 + f^3 R(f), f = m - 1 (exact).
// Error over all 2^23 arguments: at most 0.87 ulp, 0.26 on average.
SR3_FN float ln(float u) {
    const std::uint32_t shifted = bits(u) - 0x3F2AAAABu;  // the bits of 2/3
    const float e = static_cast<float>(static_cast<std::int32_t>(shifted) >> 23);
    const float f = add(from_bits((shifted & 0x007FFFFFu) + 0x3F2AAAABu), -1.0f);
    float r = -0.131921247f;
    r = add_product(0.139617473f, f, r);
    r = add_product(-0.121150166f, f, r);
    r = add_product(0.140110761f, f, r);
    r = add_product(-0.166854739f, f, r);
    r = add_product(0.200100332f, f, r);
    r = add_product(-0.249996886f, f, r);
    r = add_product(0.333332241f, f, r);
    const float square = mul(f, f);
    const float tail = add(mul(e, -2.12194440e-4f), mul(square, add_product(-0.5f, f, r)));
    return add_product(add(f, tail), e, 0.693359375f);  // ln 2 = 0.693359375 (exact times e) - 2.12194440e-4
}

struct Pair {
    float x, y;
};

// (cos, sin) of 2 pi (k + 1/2) / 2^23, 0 <= k < 2^23: quarter turns from the integer, polynomials on an eighth of a turn either
// side. Error over all 2^23 arguments: at most 2.02 ulp (9.1e-8), 0.36 on average.
SR3_FN Pair turn(std::uint32_t k) {
    const std::uint32_t quarter = (k + 0x00100000u) >> 21;
    const float t = mul(add(static_cast<float>(static_cast<std::int32_t>(k - (quarter << 21))), 0.5f), 0x1p-23f);  // exact
    const float square = mul(t, t);
    float s = -75.465744f;
    s = add_product(81.5942307f, square, s);
    s = add_product(-41.3416748f, square, s);
    s = add_product(mul(t, 6.28318548f), mul(t, square), s);
    float c = 58.5612144f;
    c = add_product(-85.4231186f, square, c);
    c = add_product(64.9391403f, square, c);
    c = add_product(-19.7392082f, square, c);
    c = add_product(1.0f, square, c);
    const bool swap = (quarter & 1u) != 0;
    const std::uint32_t cos_sign = ((quarter + 1u) & 2u) << 30;
    const std::uint32_t sin_sign = (quarter & 2u) << 30;
    return {from_bits(bits(swap ? s : c) ^ cos_sign), from_bits(bits(swap ? c : s) ^ sin_sign)};
}

// Two normals from two words (Box and Muller, 1958). The top 23 bits of each are used: (k + 1/2) / 2^23 is exact in float32 and
// never 0 or 1. The largest |z| is 5.77.
SR3_FN Pair box_muller(std::uint32_t first, std::uint32_t second) {
    const float u = mul(add(static_cast<float>(static_cast<std::int32_t>(first >> 9)), 0.5f), 0x1p-23f);
    const float radius = sqrt(mul(-2.0f, ln(u)));
    const Pair direction = turn(second >> 9);
    return {mul(radius, direction.x), mul(radius, direction.y)};
}

struct Normals {
    float z0, z1, z2, z3;
};

// The normals of channels 4 group .. 4 group + 3 at a place of the picture and a step of the run (0xFFFFFFFF: the starting y_T).
SR3_FN Normals normals_at(std::uint32_t column, std::uint32_t row, std::uint32_t step, std::uint32_t group, Key key) {
    const Words words = philox({column, row, step, group}, key);
    const Pair first = box_muller(words.w0, words.w1);
    const Pair second = box_muller(words.w2, words.w3);
    return {first.x, first.y, second.x, second.y};
}

// ------------------------------------------------------------------------------------------------------------------- update

// One row of a sampler's table, as it lies in memory (float32 x 7).
struct Row {
    float level, p, q, a, b, c, s;
};

SR3_FN float predicted(const Row& row, float y, float net) { return add_product(mul(row.p, y), row.q, net); }

SR3_FN float clipped(float x) { return x < -1.0f ? -1.0f : (x > 1.0f ? 1.0f : x); }  // NaN stays NaN

// The terms in c and s follow with add_product, in this order, where c and s are not zero.
SR3_FN float carried(const Row& row, float y, float x0) { return add_product(mul(row.a, y), row.b, x0); }

// OR-ed over many values, the top bit tells whether any of them was NaN or infinite.
SR3_FN std::uint32_t not_finite(float x) { return (bits(x) & 0x7FFFFFFFu) + 0x00800000u; }

#if !defined(__CUDACC_RTC__)
// ------------------------------------------------------------------------------------------------- loops on the host (step.cpp)

// N pictures, C channels, H rows, W columns: C-contiguous float32.
struct Shape {
    std::size_t n, c, h, w;
};

// The noise of each picture of an array: its seed, its step, and the place (row, column) of the array's corner in it; corners may
// be null, which is (0, 0) for all.
struct Noise {
    const std::uint64_t* seeds;
    const std::uint32_t* steps;
    const std::uint32_t* corners;
};

void normals(float* out, const Shape& shape, const Noise& noise, unsigned threads);

// x0_new = clip(p y + q net). False if a value (before clipping) is not finite.
bool predict(const float* y, const float* net, float* x0_new, const Row* rows, const Shape& shape, bool clip, unsigned threads);

// y <- a y + b x0_new + c x0 + s z, x0 <- x0_new. x0 is not read where c = 0, nor z made or read where s = 0. Noise is `z` if not
// null. False if a new y is not finite.
bool advance(float* y, const float* x0_new, float* x0, const Row* rows, const Shape& shape, const Noise& noise, const float* z,
             unsigned threads);

// predict, then advance, in one pass over memory.
bool step(float* y, const float* net, float* x0, const Row* rows, const Shape& shape, const Noise& noise, bool clip,
          unsigned threads);

#endif

}  // namespace sr3
