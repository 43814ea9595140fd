// The functions of tiles.hpp alone: `tiles check amx|plain` compares them with float64, `tiles time amx` with what the processor can do. plain:
// the same code for any processor. A line of JSON for each; the exit status is the number of functions that are wrong.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <immintrin.h>

#include "kernels.hpp"
#include "tiles.hpp"

namespace sr3 {
extern const Tiles plain_tiles;
}

namespace {

using namespace sr3;

// Bytes at an aligned address, in large pages where there are many, as the network's own are.
struct Bytes {
    std::unique_ptr<std::byte[], decltype(&std::free)> data;
    explicit Bytes(std::size_t count)
        : data(static_cast<std::byte*>(std::aligned_alloc(count < (1 << 18) ? 64 : 1 << 21, rounded_up(count, count < (1 << 18) ? 64 : 1 << 21))),
               &std::free) {
        std::fill_n(data.get(), count, std::byte{});
    }
    float operand(std::size_t index) const {
        std::uint32_t bits = 0;
        std::memcpy(reinterpret_cast<std::byte*>(&bits) + 2, data.get() + 2 * index, 2);
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

std::vector<float> normals(std::size_t count, bool exact) {
    static std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    std::vector<float> made(count);
    for (float& value : made) value = exact ? std::round(normal(generator) * 16) / 16 : normal(generator);  // exact: operands hold it
    return made;
}

int wrong = 0;

void say(const char* name, double off, double limit) {
    std::printf("{\"kernel\": \"%s\", \"difference\": %.2e, \"limit\": %.0e}\n", name, off, limit);
    if (!(off <= limit)) ++wrong;
}

void check_rounding(const Tiles& tiles) {
    double off = 0;
    const auto compare = [&](float exact, float found) { off = std::max(off, double(std::abs(found - exact)) - std::abs(exact) / 256.0); };
    for (const std::size_t channels : {16, 32, 48}) {
        const std::size_t pixels = 7, padded = rounded_up(channels, TILE_DEPTH);
        const std::vector<float> values = normals(pixels * channels, false);
        Bytes lines(pixels * padded * 2);
        tiles.round_pixels(values.data(), pixels, channels, lines.data.get(), pixels * TILE_LINE);
        for (std::size_t i = 0; i < pixels; ++i)
            for (std::size_t c = 0; c < padded; ++c)
                compare(c < channels ? values[i * channels + c] : 0, lines.operand((c / TILE_DEPTH * pixels + i) * TILE_DEPTH + c % TILE_DEPTH));
    }
    say("round_pixels", off, 0);
    const std::size_t count = 2;
    const std::vector<float> matrices = normals(count * TILE_DEPTH * TILE_PANEL, false);
    Bytes weights(count * TILE_MATRIX);
    off = 0;
    tiles.round_weights(matrices.data(), count, weights.data.get());
    for (std::size_t m = 0; m < count; ++m)
        for (std::size_t k = 0; k < TILE_DEPTH; ++k)
            for (std::size_t c = 0; c < TILE_PANEL; ++c)  // halves of pairs of inputs' rows
                compare(matrices[(m * TILE_DEPTH + k) * TILE_PANEL + c],
                        weights.operand(m * TILE_MATRIX / 2 + c / 16 * TILE_MATRIX / 4 + k / 2 * 32 + c % 16 * 2 + k % 2));
    say("round_weights", off, 0);
}

// `count` tiles, one after the other and overlapping, in a strip `wide` pixels wide.
double product_error(const Tiles& tiles, std::size_t count, int halves, std::size_t side, std::size_t step, std::size_t chunks) {
    const std::size_t wide = 19, pixels = step * (count * 5 + TILE_ROWS) + 2 * wide + 3, plane = pixels * TILE_LINE, tap_count = side * side;
    std::vector<std::size_t> first, taps;
    for (std::size_t i = 0; i < count; ++i) first.push_back(i * 5 * step);
    for (std::size_t tap = 0; tap < tap_count; ++tap) taps.push_back(tap / side * wide + tap % side);
    Bytes strip(chunks * plane), weights(chunks * tap_count * TILE_MATRIX);
    const std::vector<float> inputs = normals(chunks * pixels * TILE_DEPTH, true);
    const std::vector<float> matrices = normals(chunks * tap_count * TILE_DEPTH * TILE_PANEL, true);
    tiles.round_pixels(inputs.data(), chunks * pixels, TILE_DEPTH, strip.data.get(), 0);
    tiles.round_weights(matrices.data(), chunks * tap_count, weights.data.get());
    Bytes memory(count * TILE_ROWS * TILE_PANEL * sizeof(float));
    float* sums = reinterpret_cast<float*>(memory.data.get());
    tiles.multiply({strip.data.get(), plane, first.data(), count, step, taps.data(), tap_count, chunks, weights.data.get(), halves, sums,
                    {sums, sums, 2, 8, 16, 32}});  // any place will do
    double most = 0, off = 0;
    for (std::size_t row = 0; row < count * TILE_ROWS; ++row)
        for (std::size_t c = 0; c < 16u * halves; ++c) {
            double sum = 0;
            for (std::size_t chunk = 0; chunk < chunks; ++chunk)
                for (std::size_t tap = 0; tap < tap_count; ++tap) {
                    const float* pixel = &inputs[(chunk * pixels + first[row / TILE_ROWS] + row % TILE_ROWS * step + taps[tap]) * TILE_DEPTH];
                    const float* matrix = &matrices[(chunk * tap_count + tap) * TILE_DEPTH * TILE_PANEL + c];
                    for (std::size_t k = 0; k < TILE_DEPTH; ++k) sum += double(pixel[k]) * matrix[k * TILE_PANEL];
                }
            most = std::max(most, std::abs(sum));
            off = std::max(off, std::abs(sums[row * TILE_PANEL + c] - sum));
        }
    return off / most;
}

void check_products(const Tiles& tiles) {
    double worst = 0;
    for (const std::size_t count : {1, 2, 5})
        for (const int halves : {1, 2})
            for (const std::size_t side : {1, 3})
                for (const std::size_t step : {1, 2})
                    for (const std::size_t chunks : {1, 3}) worst = std::max(worst, product_error(tiles, count, halves, side, step, chunks));
    say("multiply", worst, 1e-6);
}

using Clock = std::chrono::steady_clock;

// Products of tiles that are there: nothing computes faster.
[[gnu::target("amx-tile,amx-bf16")]] void peak(int turns) {
    struct alignas(64) {
        std::uint8_t palette = 1, start = 0, reserved[14] = {};
        std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } static const configuration;
    _tile_loadconfig(&configuration);
    for (int i = 0; i < turns; ++i) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
}

// A block of 16 × 32 pixels of a layer with 128 inputs, a panel of its outputs.
void time(const Tiles& tiles, double budget) {
    const std::size_t chunks = 4, wide = 34, pixels = 18 * wide, plane = (pixels + 33) * TILE_LINE, count = 32;
    Bytes strip(chunks * plane), weights(chunks * 9 * TILE_MATRIX), memory(count * TILE_ROWS * TILE_PANEL * sizeof(float));
    const std::vector<float> inputs = normals(chunks * plane / 2, true), matrices = normals(chunks * 9 * TILE_DEPTH * TILE_PANEL, true);
    tiles.round_pixels(inputs.data(), chunks * plane / TILE_LINE, TILE_DEPTH, strip.data.get(), 0);
    tiles.round_weights(matrices.data(), chunks * 9, weights.data.get());
    std::vector<std::size_t> first, taps;
    for (std::size_t i = 0; i < count; ++i) first.push_back(i / 2 * wide + i % 2 * TILE_ROWS);
    for (std::size_t tap = 0; tap < 9; ++tap) taps.push_back(tap / 3 * wide + tap % 3);
    const TileProduct product{strip.data.get(), plane, first.data(), count, 1, taps.data(), 9, chunks, weights.data.get(), 2,
                              reinterpret_cast<float*>(memory.data.get()), {}};
    std::vector<double> seconds[3];
    const auto stop = Clock::now() + std::chrono::duration<double>(budget);
    const auto timed = [&](int which, const auto& body) {
        const auto begin = Clock::now();
        body();
        seconds[which].push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    };
    while (Clock::now() < stop || seconds[0].size() < 5) {
        timed(0, [&] { peak(500); });
        timed(1, [&] { tiles.multiply(product); });
        timed(2, [&] { tiles.round_pixels(inputs.data(), pixels * chunks, TILE_DEPTH, strip.data.get(), 0); });
    }
    const auto median = [](std::vector<double>& values) {
        std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
        return values[values.size() / 2];
    };
    const double most = 500 * 4 * 2.0 * 16 * 16 * 32 / median(seconds[0]);
    const double reached = 2.0 * count * TILE_ROWS * TILE_PANEL * TILE_DEPTH * 9 * chunks / median(seconds[1]);
    std::printf("{\"kernel\": \"peak\", \"flops\": %.4e}\n{\"kernel\": \"multiply\", \"seconds\": %.3e, \"flops\": %.4e, \"share\": %.3f}\n", most,
                median(seconds[1]), reached, reached / most);
    std::printf("{\"kernel\": \"round_pixels\", \"seconds\": %.3e, \"bytes\": %.4e}\n", median(seconds[2]),
                6.0 * pixels * chunks * TILE_DEPTH / median(seconds[2]));
}

}  // namespace

int main(int count, char** arguments) {
    const std::string what = count > 1 ? arguments[1] : "", name = count > 2 ? arguments[2] : "amx";
    if ((what != "check" && what != "time") || (name != "amx" && name != "plain"))
        return std::fprintf(stderr, "usage: tiles check amx|plain, or tiles time amx [SECONDS]\n"), 64;
    const Kernels* amx = kernels("amx_bf16");
    if (amx == nullptr && (name == "amx" || what == "time")) return std::fprintf(stderr, "this processor does not have AMX\n"), 65;
    if (what == "time") return time(*amx->tiles, count > 3 ? std::atof(arguments[3]) : 3.0), 0;
    const Tiles& tiles = name == "amx" ? *amx->tiles : plain_tiles;
    check_rounding(tiles);
    check_products(tiles);
    return wrong;
}
