// A vector of SR3_LANES floats, by the compiler's own extension; kernels.cpp is compiled with the flags of one instruction set, and
// with contraction, so that a·b + c is one fused operation. What products read are words of SR3_WORD numbers (kernels.hpp).

#pragma once

#include <immintrin.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

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

// The same bits.
template <class To, class From>
inline To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

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

// 2^(i/LANES), as bits less what `exponential` adds for i.
constexpr int FRACTION = LANES == 16 ? 4 : 3, EXPONENT = 23 - FRACTION;
constexpr auto POWERS = [] {
    constexpr float sixteenths[] = {1.0f, 1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f,
                                    1.2968396f, 1.3542556f, 1.4142135f, 1.4768262f, 1.5422108f,
                                    1.6104903f, 1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
    std::array<std::int32_t, LANES> bits{};
    for (int i = 0; i < LANES; ++i) bits[i] = std::bit_cast<std::int32_t>(sixteenths[i * 16 / LANES]) - (i << EXPONENT);
    return bits;
}();

// In each lane the one of POWERS that the lowest bits of `index` name.
inline Ints power(Ints index) {
#if defined(__AVX512F__) && SR3_LANES == 16
    return as<Ints>(_mm512_maskz_permutexvar_epi32(0xFFFF, as<__m512i>(index), _mm512_loadu_si512(POWERS.data())));
#elif defined(__AVX2__) && SR3_LANES == 8
    return as<Ints>(_mm256_permutevar8x32_epi32(as<__m256i>(as<Ints>(POWERS)), as<__m256i>(index)));
#else
    Ints found;
    for (int lane = 0; lane < LANES; ++lane) found[lane] = POWERS[static_cast<std::size_t>(index[lane]) % LANES];
    return found;
#endif
}

// x, but no further from zero than `most`. NaN stays NaN.
inline Vec within(float most, Vec x) {
#if defined(__AVX512F__) && SR3_LANES == 16  // of the comparisons below GCC makes two instructions each
    const __m512 bound = as<__m512>(splat(most));
    const __m512 below = _mm512_maskz_min_ps(0xFFFF, bound, as<__m512>(x));
    return as<Vec>(_mm512_maskz_max_ps(0xFFFF, as<__m512>(splat(-most)), below));
#else
    x = x > most ? splat(most) : x;
    return x < -most ? splat(-most) : x;
#endif
}

// e^x = 2^(n/LANES)·e^r, n whole, |r| ≤ ln 2/2·LANES: the first factor from the table and the exponent's bits, the second a polynomial, whose
// relative error is 3e-08 at most. x is held within ±87, so that the result is no infinity and no denormal number. NaN stays NaN.
inline Vec exponential(Vec x) {
    constexpr float ROUND = 12582912.0f;  // adding 1.5·2^23 rounds to a whole number
    constexpr float NATURAL = 0.69314718055994531f / LANES;
    x = within(87.0f, x);
    const Vec whole = x * (1 / NATURAL) + ROUND;
    const Vec r = x - (whole - ROUND) * NATURAL;
    const Ints n = as<Ints>(whole);
    const Vec e = ((0.16664298f * r + 0.5000648f) * r + 1.f) * r + 1.0f;
    return e * as<Vec>(power(n) + (n << EXPONENT));
}

inline Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }

using Doubles = double __attribute__((vector_size(4 * LANES)));

inline Doubles doubles(Vec v, int half) {
    using Half = float __attribute__((vector_size(2 * LANES)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return __builtin_convertvector(halves[half], Doubles);
}

// Up to 16 values of each lane, for their sum and the sum of their squares in float64. A variance is the small difference of two large
// numbers, so the squares that are summed in float32 are of distances from the first of the values, which it holds well.
class Sums {
   public:
    static constexpr int MOST = 16;

    [[gnu::always_inline]] void add(Vec v) {  // called, all that is summed would lie in memory
        if (count_ == 0) pivot_ = v;
        const Vec d = v - pivot_;
        const int turn = count_++ % 4;
        sum_[turn] += v, squares_[turn] += d * d;
    }

    // Adds to the sums and the squares of LANES channels, and begins again.
    [[gnu::always_inline]] void add_to(double* sums, double* squares) {
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
