// Each function of kernels.hpp alone: `kernels check KERNELS` compares it with float64, `kernels time KERNELS` with what the processor can do.
// KERNELS: as in kernels.hpp, or wide or wide_bf16. A line of JSON for each; the exit status is the number of functions that are wrong.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <immintrin.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.hpp"

namespace sr3 {
extern const Kernels wide, wide_bf16;  // the code of AVX-512's vectors, compiled for AVX2
}

namespace {

using namespace sr3;
using Values = std::vector<double>;

// Zeroed floats at an aligned address; many of them in large pages, as the network's own are.
struct Floats {
    std::size_t count;
    float* data;
    explicit Floats(std::size_t n) : count(n) {
        const std::size_t page = n < (1 << 16) ? ALIGNMENT : 1 << 21, bytes = rounded_up(sizeof(float) * n, page);
        data = static_cast<float*>(std::aligned_alloc(page, bytes));
#ifdef __linux__
        if (page > ALIGNMENT) madvise(data, bytes, MADV_HUGEPAGE);
#endif
        std::fill(data, data + n, 0.0f);
    }
    Floats(std::size_t n, std::mt19937& generator) : Floats(n) {
        std::normal_distribution<float> normal;
        for (std::size_t i = 0; i < n; ++i) data[i] = normal(generator);
    }
    Floats(Floats&& other) : count(other.count), data(std::exchange(other.data, nullptr)) {}
    ~Floats() { std::free(data); }
    float& operator[](std::size_t i) { return data[i]; }
    float operator[](std::size_t i) const { return data[i]; }
};

double silu(double x) { return x / (1 + std::exp(-x)); }

// Largest difference, as a share of the largest value expected.
double difference(const float* found, const Values& expected) {
    double most = 1e-30, off = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        most = std::max(most, std::abs(expected[i]));
        off = std::isfinite(found[i]) ? std::max(off, std::abs(found[i] - expected[i])) : INFINITY;
    }
    return off / most;
}

// ---- against float64

// The value at `operand` of words laid side by side, and of words laid in rows of `size`, each with the operands of one place.
double operand_of(const Kernels& kernels, const float* words, std::size_t operand) {
    if (kernels.word == 1) return words[operand];
    std::uint16_t half;
    std::memcpy(&half, reinterpret_cast<const std::uint16_t*>(words) + operand, sizeof half);
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
double operand_of(const Kernels& kernels, const float* rows, std::size_t size, std::size_t operand, std::size_t place) {
    return operand_of(kernels, rows + operand / kernels.word * size + place, operand % kernels.word);
}

struct Checks {
    const Kernels& kernels;
    std::mt19937 generator{1};
    int wrong = 0;
    std::size_t lanes = static_cast<std::size_t>(kernels.lanes), panel = 2 * lanes, word = static_cast<std::size_t>(kernels.word);
    double rounding = kernels.word == 1 ? 0 : 1.0 / 256;  // of an operand, relative: half a unit of bfloat16's last place

    // Normal values that operands hold without rounding.
    Floats operands(std::size_t count) {
        Floats made(count, generator);
        for (std::size_t i = 0; word == 2 && i < count; ++i) made[i] = std::round(made[i] * 16) / 16;
        return made;
    }

    void say(const char* name, double off, double limit = 2e-6) {
        std::printf("{\"kernel\": \"%s\", \"difference\": %.2e, \"limit\": %.0e}\n", name, off, limit);
        if (!(off <= limit)) ++wrong;
    }

    // Two sources, the first of them normed, a window that reaches over every border.
    void fill(Resample resample, const char* name) {
        const int height = 6, width = 10, rows = height + 3, columns = width + 4;
        const int scale = resample == Resample::down ? 2 : 1, share = resample == Resample::up ? 2 : 1;
        const int in_height = height * scale / share, in_width = width * scale / share;
        const std::size_t pixels = static_cast<std::size_t>(in_height) * in_width, channels = 3 * lanes;
        const Floats first(pixels * lanes, generator), second(pixels * 2 * lanes, generator), factor(lanes, generator), shift(lanes, generator);
        const Input input{{{first.data, lanes, factor.data, shift.data}, {second.data, 2 * lanes, nullptr, nullptr}},
                          2, true, resample, height, width, in_width};
        Floats found(static_cast<std::size_t>(rows) * columns * 2 * lanes);
        kernels.fill(input, -1, -2, rows, columns, 0, 2 * lanes, found.data);
        const auto source = [&](int y, int x, std::size_t c) {
            const std::size_t at = static_cast<std::size_t>(y) * in_width + x;
            return c < lanes ? silu(double(first[at * lanes + c]) * factor[c] + shift[c]) : silu(second[at * 2 * lanes + c - lanes]);
        };
        Values expected;
        for (int y = -1; y < rows - 1; ++y)
            for (int x = -2; x < columns - 2; ++x)
                for (std::size_t c = 0; c < 2 * lanes && c < channels; ++c) {
                    if (y < 0 || y >= height || x < 0 || x >= width) expected.push_back(0);
                    else if (resample == Resample::none) expected.push_back(source(y, x, c));
                    else if (resample == Resample::up) expected.push_back(source(y / 2, x / 2, c));
                    else expected.push_back((source(2 * y, 2 * x, c) + source(2 * y, 2 * x + 1, c) + source(2 * y + 1, 2 * x, c) +
                                             source(2 * y + 1, 2 * x + 1, c)) / 4);
                }
        say(name, difference(found.data, expected));
    }

    void pack() {
        const std::size_t channels = 6 * word, size = 3 * panel;
        const Floats rows(channels * size, generator);
        Floats packed(channels / word * size), rounded(rows.count / word);
        kernels.pack(rows.data, channels, size, packed.data);
        kernels.round(rows.data, rows.count, rounded.data);
        double off = 0;
        for (std::size_t c = 0; c < channels; ++c)
            for (std::size_t i = 0; i < size; ++i) {
                const double exact = rows[c * size + i], allowed = rounding * std::abs(exact);
                off = std::max(off, std::abs(operand_of(kernels, packed.data, size, c, i) - exact) - allowed);
                off = std::max(off, std::abs(operand_of(kernels, rounded.data, c * size + i) - exact) - allowed);
            }
        say("pack, round", off, 0);
    }

    using Multiply = decltype(Kernels::multiply);

    // Of operands that are not rounded, `in_word` to a word.
    void multiply(Multiply product, std::size_t in_word, const char* name) {
        double worst = 0;
        for (const std::size_t rows : {1, 2, 5, 6, 7, 13, 14, 15, 29})
            for (const bool accumulate : {false, true}) {
                const std::size_t words = 37, depth = words * in_word;
                const Floats left = operands(rows * depth + lanes), right = operands(depth * panel);
                Floats a(left.count), b(right.count), m(rows * panel, generator);
                if (in_word == 1) {
                    std::copy(left.data, left.data + left.count, a.data), std::copy(right.data, right.data + right.count, b.data);
                } else {
                    kernels.round(left.data, rounded_up(rows * depth, lanes), a.data), kernels.pack(right.data, depth, panel, b.data);
                }
                Values expected(rows * panel);
                for (std::size_t r = 0; r < rows; ++r)
                    for (std::size_t c = 0; c < panel; ++c) {
                        double& sum = expected[r * panel + c] = accumulate ? m[r * panel + c] : 0.0;
                        for (std::size_t k = 0; k < depth; ++k) sum += double(left[r * depth + k]) * right[k * panel + c];
                    }
                product(rows, words, a.data, words, b.data, panel, {b.data}, m.data, panel, accumulate);
                worst = std::max(worst, difference(m.data, expected));
            }
        say(name, worst);
    }

    // The three transforms of F(4×4, 3×3) around a product in float64: 7×6 outputs, or those of a doubled map; every part of the epilogue.
    void winograd(bool doubled) {
        const int rows = 7, columns = 6, share = doubled ? 2 : 1, products = doubled ? DOUBLED : POINTS;
        const std::size_t depth = 2 * lanes, tiles = 4, in_rows = 10, in_columns = 10, high = rows * share, wide = columns * share;
        const Floats in(in_rows * in_columns * depth, generator), weights = operands(depth * 9 * panel);
        const std::size_t add_row = (wide + 3) * panel;  // what is added lies otherwise than the output
        const Floats add(high * add_row, generator);
        const Floats scale(panel, generator), shift(panel, generator);
        const std::size_t words = depth / word;
        Floats packed(weights.count), a(POINTS * tiles * words), b(products * words * panel), m(products * tiles * panel), out(high * wide * panel);
        kernels.pack(weights.data, depth, 9 * panel, packed.data);
        if (!doubled) kernels.transform_weights(packed.data, words, b.data, words * panel);
        for (int p = 0; doubled && p < DOUBLED; p += DOUBLED_PART)
            kernels.doubled_weights(packed.data, words, p / DOUBLED_PART, b.data + p * words * panel, words * panel);
        (doubled ? kernels.doubled_input : kernels.transform_input)(in.data, in_columns * depth, depth, 2, 2, depth, a.data, tiles * words, words);
        for (int p = 0; p < products; ++p)
            for (std::size_t t = 0; t < tiles; ++t)
                for (std::size_t c = 0; c < panel; ++c) {
                    double sum = 0;
                    const float* tile = a.data + ((doubled ? doubled_point(p) : p) * tiles + t) * words;
                    for (std::size_t k = 0; k < depth; ++k) sum += operand_of(kernels, tile, k) * operand_of(kernels, b.data + p * words * panel, panel, k, c);
                    m[(p * tiles + t) * panel + c] = static_cast<float>(sum);
                }
        Values expected, sums(4 * panel), totals(4 * panel);
        const Epilogue end{scale.data, shift.data, true, add.data, 0.75f, out.data, wide * panel, panel, add_row, panel, 2, sums.data(), panel, 2 * panel};
        (doubled ? kernels.doubled_output : kernels.transform_output)(m.data, tiles * panel, 2, rows, columns, end);
        const auto place = [&](std::size_t y, std::size_t tap) { return doubled ? (y + tap + 1) / 2 : y + tap; };
        for (std::size_t y = 0; y < high; ++y)
            for (std::size_t x = 0; x < wide; ++x)
                for (std::size_t c = 0; c < panel; ++c) {
                    double sum = 0;
                    for (std::size_t i = 0; i < 9; ++i)
                        for (std::size_t k = 0; k < depth; ++k)
                            sum += double(in[(place(y, i / 3) * in_columns + place(x, i % 3)) * depth + k]) * weights[(k * 9 + i) * panel + c];
                    expected.push_back((silu(sum * scale[c] + shift[c]) + add[y * add_row + x * panel + c]) * 0.75);
                    const double value = out[(y * wide + x) * panel + c];
                    totals[y / share / TILE * 2 * panel + c] += value, totals[(y / share / TILE * 2 + 1) * panel + c] += value * value;
                }
        say(doubled ? "doubled_weights, doubled_input, doubled_output" : "transform_weights, transform_input, transform_output",
            difference(out.data, expected), word == 1 ? 1e-5 : doubled ? 3e-2 : 2e-2);
        double off = 0;
        for (std::size_t i = 0; i < totals.size(); ++i) off = std::max(off, std::abs(sums[i] - totals[i]) / (1 + std::abs(totals[i])));
        say(doubled ? "doubled_output, sums" : "transform_output, sums", off);
    }

    void finish_row() {
        const int pixels = 133;
        const Floats from(pixels * panel, generator), shift(panel, generator);
        Floats out(pixels * panel);
        std::vector<double> sums(2 * panel);
        kernels.finish_row(from.data, pixels, {nullptr, shift.data, false, nullptr, 1, out.data, 0, panel, 0, 0, 2, sums.data(), panel, 0});
        Values expected, totals(2 * panel);
        for (std::size_t i = 0; i < from.count; ++i) {
            expected.push_back(double(from[i]) + shift[i % panel]);
            totals[i % panel] += out[i];
            totals[panel + i % panel] += double(out[i]) * out[i];
        }
        say("finish_row", difference(out.data, expected));
        double off = 0;
        for (std::size_t i = 0; i < totals.size(); ++i) off = std::max(off, std::abs(sums[i] - totals[i]) / (1 + std::abs(totals[i])));
        say("finish_row, sums", off);
    }

    void softmax() {
        const std::size_t rows = 5, count = 37, stride = rounded_up(count, lanes);
        Floats scores(rows * stride, generator);
        Values expected;
        for (std::size_t r = 0; r < rows; ++r) {
            for (std::size_t i = 0; i < count; ++i) scores[r * stride + i] *= 20;
            double sum = 0;
            for (std::size_t i = 0; i < count; ++i) sum += std::exp(double(scores[r * stride + i]));
            for (std::size_t i = 0; i < count; ++i) expected.push_back(std::exp(double(scores[r * stride + i])) / sum);
        }
        kernels.softmax(scores.data, stride, rows, count);
        std::vector<float> found;
        for (std::size_t r = 0; r < rows; ++r) found.insert(found.end(), scores.data + r * stride, scores.data + r * stride + count);
        say("softmax", difference(found.data(), expected));
    }

    void elementwise() {
        const Floats x(101, generator);
        Floats y(101, generator), values(101);
        Values sums, activated;
        for (std::size_t i = 0; i < x.count; ++i) {
            values[i] = 30 * x[i];
            sums.push_back(double(y[i]) + 0.3f * double(x[i]));
            activated.push_back(silu(values[i]));
        }
        kernels.add_scaled(y.data, x.data, 0.3f, x.count);
        kernels.silu(values.data, values.count);
        say("add_scaled", difference(y.data, sums));
        say("silu", difference(values.data, activated));
    }
};

// ---- against the processor

using Clock = std::chrono::steady_clock;

// Fused multiply-adds in registers: nothing computes faster.
template <int lanes, int chains>
[[gnu::always_inline]] inline float chained(std::size_t times) {
    typedef float Vec __attribute__((vector_size(4 * lanes)));
    Vec sums[chains], factor = Vec{} + 0.999f;
    for (int i = 0; i < chains; ++i) sums[i] = Vec{} + static_cast<float>(i);
    for (std::size_t t = 0; t < times; ++t)
#pragma GCC unroll 24
        for (int i = 0; i < chains; ++i) sums[i] = sums[i] * factor + factor;
    float total = 0;
    for (int i = 0; i < chains; ++i) total += sums[i][0];
    return total;
}

struct Peak {
    double operations;  // a turn
    float (*run)(std::size_t turns);
};
[[gnu::target("avx2,fma")]] float of_avx2(std::size_t turns) { return chained<8, 12>(turns); }
[[gnu::target("avx512f")]] float of_avx512(std::size_t turns) { return chained<16, 24>(turns); }
[[gnu::target("avx512f,avx512bf16")]] float of_bf16(std::size_t turns) {
    __m512 sums[24];
    const __m512bh factor{};
    for (int i = 0; i < 24; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
    for (std::size_t t = 0; t < turns; ++t)
#pragma GCC unroll 24
        for (int i = 0; i < 24; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
    float total = 0;
    for (int i = 0; i < 24; ++i) total += sums[i][0];
    return total;
}

struct Timed {
    std::string name;
    std::function<void()> run;
    double operations, bytes;
    std::vector<double> seconds;
};

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

// Shuffled rounds, as long as they are given; the yardsticks are two of the contenders. Sizes are those of a 128-channel layer, in strips
// that stay in the second-level cache.
void time(const Kernels& kernels, double budget) {
    std::mt19937 generator(1);
    const std::size_t lanes = kernels.lanes, panel = 2 * lanes, channels = 128, tiles = 32, pixels = 16 * tiles, depth = DEPTH;
    const std::size_t plane = plane_of(depth * panel);
    const std::size_t inputs = depth * kernels.word;  // of so many words
    const Floats in(18 * 34 * channels, generator), factor(channels, generator), packed(depth * 9 * panel);  // zeros: any bits would do
    Floats filled(18 * 34 * channels), a(POINTS * plane_of(tiles * depth)), b(POINTS * plane), m(POINTS * plane_of(tiles * panel));
    Floats out(pixels * channels), row(pixels * panel, generator), scores(256 * 256, generator), copied(in.count);
    std::vector<double> sums(channels * 16);
    const Input input{{{in.data, channels, factor.data, factor.data}}, 1, true, Resample::none, 16, 32, 32};
    const Epilogue end{factor.data, factor.data, false, out.data, 0.5f, out.data, 32 * panel, panel, 32 * panel, panel,
                       2, sums.data(), channels, 2 * channels};
    volatile float kept = 0;
    const std::size_t turns = 20000;
    const std::string name = kernels.name;
    const Peak peak_of = name == "avx512_bf16" ? Peak{4.0 * 16 * 24, &of_bf16} :
                         name == "avx512" ? Peak{2.0 * 16 * 24, &of_avx512} : Peak{2.0 * 8 * 12, &of_avx2};
    const double single = sizeof(float);
    std::vector<Timed> all = {
        {"peak", [&] { kept = peak_of.run(turns); }, peak_of.operations * turns, 0, {}},
        {"copy", [&] { std::memcpy(copied.data, in.data, in.count * sizeof(float)); }, 0, 2 * single * in.count, {}},
        {"fill", [&] { kernels.fill(input, -1, -1, 18, 34, 0, channels, filled.data); }, 0, 2 * single * 16 * 32 * channels, {}},
        {"transform_weights", [&] { kernels.transform_weights(packed.data, depth, b.data, plane); }, 0, single * (9 + 36) * depth * panel, {}},
        {"transform_input",
         [&] { kernels.transform_input(in.data, 34 * channels, channels, 4, 8, inputs, a.data, plane_of(tiles * depth), depth); }, 0,
         single * (16 * kernels.word + 36) * tiles * depth, {}},
        {"multiply",
         [&] {
             for (std::size_t p = 0; p < POINTS; ++p)
                 kernels.multiply(tiles, depth, a.data + p * plane_of(tiles * depth), depth, b.data + p * plane, panel,
                                  {b.data + (p + 1) % POINTS * plane}, m.data + p * plane_of(tiles * panel), panel, false);
         },
         2.0 * POINTS * tiles * inputs * panel, 0, {}},
        {"transform_output", [&] { kernels.transform_output(m.data, plane_of(tiles * panel), 8, 16, 32, end); }, 0,
         single * (36 + 2 * 16) * tiles * panel, {}},
        {"finish_row", [&] { kernels.finish_row(row.data, pixels, end); }, 0, 3 * single * pixels * panel, {}},
        {"softmax", [&] { kernels.softmax(scores.data, 256, 256, 256); }, 0, 2 * single * 256 * 256, {}},
        {"add_scaled", [&] { kernels.add_scaled(out.data, in.data, 0.0f, out.count); }, 0, 3 * single * out.count, {}},
        {"silu", [&] { kernels.silu(filled.data, filled.count); }, 0, 2 * single * filled.count, {}},
    };
    for (Timed& one : all) one.run();
    const auto stop = Clock::now() + std::chrono::duration<double>(budget);
    for (int round = 0; round < 5 || Clock::now() < stop; ++round) {
        std::vector<Timed*> order;
        for (Timed& one : all) order.push_back(&one);
        std::shuffle(order.begin(), order.end(), generator);
        for (Timed* one : order) {
            one->run();  // brings its data near
            const auto begin = Clock::now();
            one->run();
            one->seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
        }
    }
    const double peak = all[0].operations / median(all[0].seconds), copy = all[1].bytes / median(all[1].seconds);
    for (const Timed& one : all) {
        const double seconds = median(one.seconds);
        std::printf("{\"kernel\": \"%s\", \"seconds\": %.3e, \"flops\": %.4e, \"bytes\": %.4e, \"share\": %.3f}\n", one.name.c_str(), seconds,
                    one.operations / seconds, one.bytes / seconds,
                    one.operations > 0 ? one.operations / seconds / peak : one.bytes / seconds / copy);
    }
}

}  // namespace

int main(int count, char** arguments) {
    const std::string what = count > 1 ? arguments[1] : "", name = count > 2 ? arguments[2] : "auto";
    if (what != "check" && what != "time") return std::fprintf(stderr, "usage: kernels check|time [KERNELS] [SECONDS]\n"), 64;
    const Kernels* kernels = name == "wide" ? &wide : name == "wide_bf16" ? &wide_bf16 : sr3::kernels(name.c_str());
    if (kernels == nullptr) return std::fprintf(stderr, "this processor does not have %s\n", name.c_str()), 65;
    if (what == "time") return time(*kernels, count > 3 ? std::atof(arguments[3]) : 5.0), 0;
    Checks checks{*kernels};
    checks.fill(Resample::none, "fill");
    checks.fill(Resample::up, "fill, up");
    checks.fill(Resample::down, "fill, down");
    checks.pack();
    checks.multiply(kernels->multiply, kernels->word, "multiply");
    checks.multiply(kernels->multiply_floats, 1, "multiply_floats");
    for (const bool doubled : {false, true}) checks.winograd(doubled);
    checks.finish_row();
    checks.softmax();
    checks.elementwise();
    return checks.wrong;
}
