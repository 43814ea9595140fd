// A vector of SR3_LANES floats, by the compiler's own extension; kernels.cpp is compiled with the flags of one instruction set, and
// with contraction, so that a·b + c is one fused operation. What products read are words of SR3_WORD numbers (kernels.hpp).

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "kernels.hpp"

namespace sr3 {
namespace {

constexpr int LANES = SR3_LANES;
constexpr int PANEL = 2 * LANES;
constexpr int REGISTERS = LANES == 16 ? 32 : 16;  // of a vector each
constexpr int LINE = ALIGNMENT / sizeof(float);  // floats of a cache line

using Vec = float __attribute__((vector_size(4 * LANES)));
using Ints = std::int32_t __attribute__((vector_size(4 * LANES)));
using Words = std::uint32_t __attribute__((vector_size(4 * LANES)));
constexpr int WORD = SR3_WORD;
constexpr std::size_t SHORT = WORD == 1 ? 32 : 256;  // most words of one sum; the operands of bfloat16 are rounded far more

// Loads and stores at any address: most are aligned, and those cost nothing more.
inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec splat(float value) { return value - Vec{}; }

// Words: what products are made of. Operands lie one after the other, WORD of them in a lane; a vector of words has WORD halves of
// LANES operands each.
#if SR3_WORD == 1
inline Vec operands(const float* words, int) { return load(words); }
inline void store_operands(float* words, std::size_t at, Vec v) { store(words + at, v); }
inline Vec word_of(Vec only, Vec) { return only; }
inline Vec splat_word(const float* word) { return splat(*word); }
inline Vec dot(Vec sum, Vec a, Vec b) { return sum + a * b; }
#else
template <class To, class From>
inline To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

using Halves = std::uint16_t __attribute__((vector_size(2 * LANES)));
constexpr std::uint32_t HIGH = 0xFFFF0000u;

inline Vec operands(const float* words, int half) {
    Halves bits;
    std::memcpy(&bits, words + half * LANES / 2, sizeof bits);
    return as<Vec>(__builtin_convertvector(bits, Words) << 16);
}

// To bfloat16, the nearest, ties to even; in the upper half.
inline Words rounded(Vec v) {
    const Words bits = as<Words>(v);
    return (bits + (0x7FFFu + ((bits >> 16) & 1u))) & HIGH;
}

inline Vec word_of(Vec first, Vec second) { return as<Vec>(rounded(second) | (rounded(first) >> 16)); }

// The word of every lane, by its bits.
inline Vec splat_word(const float* word) {
    std::uint32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return as<Vec>(bits - Words{});
}

#ifdef __AVX512BF16__
inline void store_operands(float* words, std::size_t at, Vec v) {
    const __m256bh half = _mm512_cvtneps_pbh(as<__m512>(v));
    std::memcpy(reinterpret_cast<std::uint16_t*>(words) + at, &half, sizeof half);
}

inline Vec dot(Vec sum, Vec a, Vec b) { return as<Vec>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(a), as<__m512bh>(b))); }
#else  // the same on any processor
inline void store_operands(float* words, std::size_t at, Vec v) {
    const Halves half = __builtin_convertvector(rounded(v) >> 16, Halves);
    std::memcpy(reinterpret_cast<std::uint16_t*>(words) + at, &half, sizeof half);
}

inline Vec dot(Vec sum, Vec a, Vec b) {
    const Words left = as<Words>(a), right = as<Words>(b);
    return (sum + as<Vec>(left & HIGH) * as<Vec>(right & HIGH)) + as<Vec>(left << 16) * as<Vec>(right << 16);
}
#endif
#endif

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

// Up to 16 values of each lane, for their sum and the sum of their squares in float64. A variance is the small difference of two large
// numbers, so the squares that are summed in float32 are of distances from the first of the values, which it holds well.
class Sums {
   public:
    static constexpr int MOST = 16;

    void add(Vec v) {
        if (count_ == 0) pivot_ = v;
        const Vec d = v - pivot_;
        const int turn = count_++ % 4;
        sum_[turn] += v, squares_[turn] += d * d;
    }
    int count() const { return count_; }

    // Adds to the sums and the squares of LANES channels, and begins again.
    void add_to(double* sums, double* squares) {
        const double n = count_;
        const Vec sum = (sum_[0] + sum_[1]) + (sum_[2] + sum_[3]), square = (squares_[0] + squares_[1]) + (squares_[2] + squares_[3]);
        for (int half = 0; half < 2; ++half, sums += LANES / 2, squares += LANES / 2) {
            const Doubles p = doubles(pivot_, half), s = doubles(sum, half), q = doubles(square, half);
            store(sums, load_doubles(sums) + s);
            store(squares, load_doubles(squares) + (q + p * (2.0 * s - n * p)));
        }
        *this = Sums{};
    }

   private:
    using Doubles = double __attribute__((vector_size(4 * LANES)));

    static Doubles doubles(Vec v, int half) {
        using Half = float __attribute__((vector_size(2 * LANES)));
        Half halves[2];
        std::memcpy(halves, &v, sizeof v);
        return __builtin_convertvector(halves[half], Doubles);
    }
    static Doubles load_doubles(const double* from) {
        Doubles v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(double* to, Doubles v) { std::memcpy(to, &v, sizeof v); }

    Vec pivot_{}, sum_[4]{}, squares_[4]{};
    int count_ = 0;
};

}  // namespace
}  // namespace sr3
