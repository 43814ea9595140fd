// The functions of kernels.hpp for one instruction set. CMake compiles this file once for each: SR3_LANES floats a vector, SR3_WORD
// numbers a word of what products are made of, SR3_ROWS rows of their register block, SR3_KERNELS the table's name.

#include "kernels.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "doubled.hpp"
#include "simd.hpp"
#include "winograd.hpp"

namespace sr3 {
namespace {

constexpr int AHEAD = 1536;  // floats of a row of pixels: what comes from the last cache or beyond has so long to come

// The input before resampling.
struct Activation {
    const Input& input;

    // Pixels [column, column+columns) of source row `row`, channels [first, last), activated, `step` pixels apart in out.
    void run(int row, int column, int columns, std::size_t first, std::size_t last, float* out, std::size_t pixel) const {
        std::size_t begin = 0;
        for (int s = 0; s < input.count; ++s) {
            const Source& source = input.sources[s];
            const std::size_t from = std::max(first, begin), to = std::min(last, begin + source.channels);
            for (int x = 0; x < columns && from < to; ++x) {
                const std::size_t at = static_cast<std::size_t>(row) * input.source_width + column + x;
                const float* in = source.data + at * source.channels + (from - begin);
                activate(source, in, from - begin, to - from, out + x * pixel + (from - first));
            }
            begin += source.channels;
        }
    }

    void activate(const Source& source, const float* in, std::size_t channel, std::size_t count, float* out) const {
        if (source.scale == nullptr && !input.silu) {
            std::memcpy(out, in, count * sizeof(float));
            return;
        }
        for (std::size_t i = 0; i < count; i += LANES) {
            __builtin_prefetch(in + i + AHEAD);
            Vec v = load(in + i);
            if (source.scale != nullptr) v = v * load(source.scale + channel + i) + load(source.shift + channel + i);
            store(out + i, input.silu ? silu(v) : v);
        }
    }
};

// One pixel row of `fill` inside the picture: columns [begin, end) of it, `out` at column begin.
void fill_row(const Input& input, int row, int begin, int end, std::size_t first, std::size_t last, float* out) {
    const std::size_t pixel = last - first;
    const Activation source{input};
    if (input.resample == Resample::none) {
        source.run(row, begin, end - begin, first, last, out, pixel);
        return;
    }
    if (input.resample == Resample::up) {
        for (int x = begin; x < end; ++x) {
            float* to = out + (x - begin) * pixel;
            if (x > begin && x % 2 != 0) {
                std::memcpy(to, to - pixel, pixel * sizeof(float));
            } else {
                source.run(row / 2, x / 2, 1, first, last, to, pixel);
            }
        }
        return;
    }
    float four[4 * LANES];
    for (int x = begin; x < end; ++x)
        for (std::size_t channel = first; channel < last; channel += LANES) {
            source.run(2 * row, 2 * x, 2, channel, channel + LANES, four, LANES);
            source.run(2 * row + 1, 2 * x, 2, channel, channel + LANES, four + 2 * LANES, LANES);
            const Vec mean = 0.25f * ((load(four) + load(four + LANES)) + (load(four + 2 * LANES) + load(four + 3 * LANES)));
            store(out + (x - begin) * pixel + (channel - first), mean);
        }
}

void fill(const Input& input, int row, int column, int rows, int columns, std::size_t first, std::size_t last, float* out) {
    const std::size_t pixel = last - first;
    const int begin = std::clamp(-column, 0, columns), end = std::clamp(input.width - column, begin, columns);
    for (int y = 0; y < rows; ++y) {
        float* to = out + static_cast<std::size_t>(y) * columns * pixel;
        if (row + y < 0 || row + y >= input.height) {
            std::memset(to, 0, columns * pixel * sizeof(float));
            continue;
        }
        std::memset(to, 0, begin * pixel * sizeof(float));
        std::memset(to + end * pixel, 0, (columns - end) * pixel * sizeof(float));
        const bool doubled = input.resample == Resample::up && y > 0 && (row + y) % 2 != 0 && row + y - 1 >= 0;
        if (doubled) {
            std::memcpy(to + begin * pixel, to + begin * pixel - columns * pixel, (end - begin) * pixel * sizeof(float));
        } else {
            fill_row(input, row + y, column + begin, column + end, first, last, to + begin * pixel);
        }
    }
}

void pack(const float* rows, std::size_t channels, std::size_t size, float* words) {
    for (std::size_t channel = 0; channel < channels; channel += WORD)
        for (std::size_t i = 0; i < size; i += LANES) {
            const float* from = rows + channel * size + i;
            store(words + channel / WORD * size + i, word_of(load(from), load(from + (WORD - 1) * size)));
        }
}

void round(const float* values, std::size_t count, float* words) {
    for (std::size_t i = 0; i < count; i += LANES) store_operands(words, i, load(values + i));
}

// What a product is made of: floats, or words where these are something else.
struct OfFloats {
    static Vec splat(const float* from) { return sr3::splat(*from); }
    static Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};
struct OfPairs {
    static Vec splat(const float* from) { return splat_word(from); }
    static Vec add(Vec sum, Vec a, Vec b) { return dot(sum, a, b); }
};
using OfWords = std::conditional_t<WORD == 1, OfFloats, OfPairs>;

// The register block: `rows` rows by one panel, summed in order, SHORT of the depth at a time: sums of short sums round less than one long
// sum. Those so far stay in registers where they fit, and else in m.
template <class Of, int rows>
void multiply_block(std::size_t depth, const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, const float* next,
                    float* m, std::size_t m_stride, bool accumulate) {
    constexpr bool held = 4 * SR3_ROWS + 2 <= REGISTERS;  // of the highest block: no sum's order depends on how rows are cut
    Vec totals[rows][2];
    const auto keep = [&](const auto& sums, bool add) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) {
                float* to = m + r * m_stride + half * LANES;
                store(to, add ? load(to) + sums[r][half] : sums[r][half]);
            }
    };
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
        for (int half = 0; half < 2; ++half) totals[r][half] = Vec{};
    for (std::size_t first = 0; first < depth; first += SHORT) {
        Vec sums[rows][2];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) sums[r][half] = Vec{};
        const std::size_t last = std::min(depth, first + SHORT);
#pragma GCC unroll 4
        for (std::size_t k = first; k < last; ++k) {
            const Vec left = load(b), right = load(b + LANES);
            __builtin_prefetch(next, 0, 2);
            b += b_stride, next += PANEL / 4;
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                const Vec one = Of::splat(a + r * a_stride + k);
                sums[r][0] = Of::add(sums[r][0], one, left);
                sums[r][1] = Of::add(sums[r][1], one, right);
            }
        }
        if (!held) {
            keep(sums, accumulate || first > 0);
            continue;
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) totals[r][half] += sums[r][half];
    }
    if (held) keep(totals, accumulate);
}

using Block = void (*)(std::size_t, const float*, std::size_t, const float*, std::size_t, const float*, float*, std::size_t, bool);

template <class Of, std::size_t... rows>
constexpr auto blocks_of(std::index_sequence<rows...>) {
    return std::array<Block, sizeof...(rows)>{&multiply_block<Of, rows + 1>...};
}

template <class Of>
void multiply(std::size_t rows, std::size_t depth, const float* a, std::size_t a_stride, const float* b, std::size_t b_stride,
              Coming coming, float* m, std::size_t m_stride, bool accumulate) {
    static constexpr auto blocks = blocks_of<Of>(std::make_index_sequence<SR3_ROWS>{});
    const std::size_t parts = (rows + SR3_ROWS - 1) / SR3_ROWS;  // of nearly one height: a low block leaves units idle
    const std::size_t height = rows / parts, higher = rows % parts, step = depth * PANEL / 4;
    for (std::size_t part = 0, row = 0; part < parts; ++part) {
        const std::size_t end = row + height + (part < higher);
        const float* next = part == 0 || coming.then == nullptr ? coming.next + part * step : coming.then + (part - 1) * step;
        blocks[end - row - 1](depth, a + row * a_stride, a_stride, b, b_stride, next, m + row * m_stride, m_stride, accumulate);
        row = end;
    }
}

// The epilogue's parts that cost something, chosen once for a panel and not for every pixel.
template <bool scaled, bool activated, bool added>
struct Finish {
    const Epilogue end;  // a copy: what is stored through `out` cannot change it
    Vec scale[2], shift[2];

    explicit Finish(const Epilogue& epilogue) : end(epilogue) {
        for (int half = 0; half < end.vectors; ++half) {
            scale[half] = scaled ? load(end.scale + half * LANES) : Vec{};
            shift[half] = load(end.shift + half * LANES);
        }
    }

    // The sums of the pixel (row, column).
    [[gnu::always_inline]] Vec operator()(Vec sum, std::size_t row, std::size_t column, int half) const {
        Vec v = scaled ? sum * scale[half] + shift[half] : sum + shift[half];
        if (activated) v = silu(v);
        if (added) v = v + load(end.add + row * end.add_row_stride + column * end.add_pixel_stride + half * LANES);
        v = v * end.gain;
        store(end.out + row * end.row_stride + column * end.pixel_stride + half * LANES, v);
        return v;
    }
};

// Calls body(finish) with the `Finish` that the epilogue needs.
template <class Body>
void finishing(const Epilogue& end, const Body& body) {
    const auto added = [&]<bool scaled, bool activated>() {
        end.add != nullptr ? body(Finish<scaled, activated, true>(end)) : body(Finish<scaled, activated, false>(end));
    };
    const auto activated = [&]<bool scaled>() {
        end.silu ? added.template operator()<scaled, true>() : added.template operator()<scaled, false>();
    };
    end.scale != nullptr ? activated.template operator()<true>() : activated.template operator()<false>();
}

// One tile's products -> height × width pixels, those of a whole tile known to the compiler, from (top, left) on.
template <class Output, class Finish, class Size>
[[gnu::noinline]] void finish_tile(const Finish& finish, const float* from, std::size_t plane, int half, std::size_t top, std::size_t left,
                                   Size height, Size width, double* unit) {
    const Epilogue& end = finish.end;
    Sums sums;
    Output::run(from + half * LANES, plane, [&](int y, const Vec* out) __attribute__((always_inline)) {
        if (y >= height) return;
#pragma GCC unroll 4
        for (int x = 0; x < TILE; ++x)
            if (x < width) sums.add(finish(out[x], top + y, left + x, half));
    });
    if (unit != nullptr) sums.add_to(unit + half * LANES, unit + half * LANES + end.sums_stride);
}

// Brings near what a row of a tile is written to, and what is added to it.
inline void approach(const Epilogue& end, std::size_t row, std::size_t column) {
#pragma GCC unroll 4
    for (int x = 0; x < TILE; ++x) {
        const float* out = end.out + row * end.row_stride + (column + x) * end.pixel_stride;
        for (int i = 0; i < PANEL; i += LINE) __builtin_prefetch(out + i, 1, 3);
        if (end.add == nullptr) continue;
        const float* add = end.add + row * end.add_row_stride + (column + x) * end.add_pixel_stride;
        for (int i = 0; i < PANEL; i += LINE) __builtin_prefetch(add + i, 0, 3);
    }
}

template <class Output, class Finish>
void finish_tiles(const Finish& finish, const float* points, std::size_t plane, std::size_t tile_row_stride, int rows, int columns) {
    constexpr std::integral_constant<int, TILE> whole;
    const Epilogue& end = finish.end;
    for (int top = 0; top < rows; top += TILE)
        for (int left = 0; left < columns; left += TILE) {
            const float* from = points + (top / TILE * tile_row_stride + left / TILE) * PANEL;
            const int height = std::min(TILE, rows - top), width = std::min(TILE, columns - left);
            double* unit = end.sums == nullptr ? nullptr : end.sums + top / TILE * end.unit_stride;
            // The tile after the next: more is under way than the processor itself looks ahead. Pixels further apart fall into too few sets.
            int row = top, column = left + 2 * TILE;
            if (column >= columns) row += TILE, column -= rounded_up(columns, TILE);
            if (end.pixel_stride < 256 && column >= 0 && column < columns)
                for (int y = 0; y < TILE && row + y < rows; ++y) approach(end, row + y, column);
            for (int half = 0; half < end.vectors; ++half) {
                if (height == TILE && width == TILE) {
                    finish_tile<Output>(finish, from, plane, half, top, left, whole, whole, unit);
                } else {
                    finish_tile<Output>(finish, from, plane, half, top, left, height, width, unit);
                }
            }
        }
}

void transform_output(const float* points, std::size_t plane, std::size_t tile_row_stride, int rows, int columns, const Epilogue& end) {
    finishing(end, [&](const auto& finish) { finish_tiles<Output>(finish, points, plane, tile_row_stride, rows, columns); });
}

// Even and odd rows and columns one after the other, as if each were the whole output.
void doubled_output(const float* points, std::size_t plane, std::size_t tile_row_stride, int rows, int columns, const Epilogue& end) {
    const auto some = [&]<int down, int across>() {
        Epilogue part = end;
        part.out += down * end.row_stride + across * end.pixel_stride;
        if (end.add != nullptr) part.add += down * end.add_row_stride + across * end.add_pixel_stride;
        for (std::size_t* stride : {&part.row_stride, &part.pixel_stride, &part.add_row_stride, &part.add_pixel_stride}) *stride *= 2;
        finishing(part, [&](const auto& finish) {
            finish_tiles<DoubledOutput<down, across>>(finish, points, plane, tile_row_stride, rows, columns);
        });
    };
    some.template operator()<0, 0>(), some.template operator()<0, 1>();
    some.template operator()<1, 0>(), some.template operator()<1, 1>();
}

// Up to Sums::MOST pixels of a row from `first` on, that many known to the compiler as a rule.
template <class Finish, class Size>
[[gnu::noinline]] void finish_pixels(const Finish& finish, const float* from, int first, Size count, int half) {
    const Epilogue& end = finish.end;
    Sums sums;
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i)
        sums.add(finish(load(from + (first + i) * PANEL + half * LANES), 0, first + i, half));
    if (end.sums != nullptr) sums.add_to(end.sums + half * LANES, end.sums + half * LANES + end.sums_stride);
}

void finish_row(const float* from, int pixels, const Epilogue& end) {
    finishing(end, [&](const auto& finish) {
        constexpr std::integral_constant<int, Sums::MOST> whole;
        for (int half = 0; half < end.vectors; ++half)
            for (int first = 0; first < pixels; first += Sums::MOST) {
                const int some = std::min(Sums::MOST, pixels - first);
                some == Sums::MOST ? finish_pixels(finish, from, first, whole, half) : finish_pixels(finish, from, first, some, half);
            }
    });
}

void softmax(float* scores, std::size_t stride, std::size_t rows, std::size_t count) {
    const std::size_t whole = count / LANES * LANES;
    for (std::size_t row = 0; row < rows; ++row) {
        float* line = scores + row * stride;
        Vec mosts = splat(line[0]);
        for (std::size_t i = 0; i < whole; i += LANES) {
            const Vec v = load(line + i);
            mosts = v > mosts ? v : mosts;
        }
        float most = line[0];
        for (int lane = 0; lane < LANES; ++lane) most = std::max(most, mosts[lane]);
        for (std::size_t i = whole; i < count; ++i) most = std::max(most, line[i]);
        Doubles sums[2] = {};
        for (std::size_t i = 0; i < whole; i += LANES) {
            const Vec v = exponential(load(line + i) - most);
            store(line + i, v);
            for (int half = 0; half < 2; ++half) sums[half] += doubles(v, half);
        }
        if (whole < count) store(line + whole, exponential(load(line + whole) - most));  // into the padding too
        sums[0] += sums[1];
        double sum = 0;
        for (int lane = 0; lane < LANES / 2; ++lane) sum += sums[0][lane];
        for (std::size_t i = whole; i < count; ++i) sum += static_cast<double>(line[i]);
        const float factor = static_cast<float>(1 / sum);
        for (std::size_t i = 0; i < count; i += LANES) store(line + i, load(line + i) * factor);
    }
}

void add_scaled(float* y, const float* x, float factor, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

void silu_of(float* values, std::size_t count) {
    std::size_t i = 0;
    for (; i + LANES <= count; i += LANES) store(values + i, silu(load(values + i)));
    if (i == count) return;
    float last[LANES] = {};
    std::copy(values + i, values + count, last);
    store(last, silu(load(last)));
    std::copy(last, last + (count - i), values + i);
}

}  // namespace

extern const Kernels SR3_KERNELS;
const Kernels SR3_KERNELS{
    .name = SR3_NAME,
    .lanes = LANES,
    .word = WORD,
    .fill = &fill,
    .pack = &pack,
    .round = &round,
    .transform_weights = &transform_weights,
    .transform_input = &transform_input<&input_tile>,
    .transform_output = &transform_output,
    .doubled_weights = &doubled_weights,
    .doubled_input = &transform_input<&doubled_input_tile>,
    .doubled_output = &doubled_output,
    .multiply = &multiply<OfWords>,
    .multiply_floats = &multiply<OfFloats>,
    .finish_row = &finish_row,
    .softmax = &softmax,
    .add_scaled = &add_scaled,
    .silu = &silu_of,
};

}  // namespace sr3
