// The ends of the compact network (export/nets/compact.py): one level of the CDF 9/7 wavelet of y - √γ·x, whose details the network
// is given beside x, and the way back from the bands that it makes. Lifting steps: Daubechies and Sweldens 1998.

#include <algorithm>
#include <cmath>

#include "clones.hpp"
#include "layers.hpp"

namespace sr3 {
namespace {

constexpr float LIFT[4] = {-1.586134342f, -0.052980118f, 0.882911075f, 0.443506852f};  // predict, update, predict, update
constexpr float GAIN = 1.149604398f;
constexpr int ROWS = 16, MARGIN = 3;  // pairs of rows of a piece of work, and how far beyond them the lifting reads

// line += factor·(a + b)
SR3_CLONES void lift(float* __restrict__ line, const float* a, const float* b, float factor, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) line[i] += factor * (a[i] + b[i]);
}

SR3_CLONES void difference(float* __restrict__ out, const float* y, const float* x, float factor, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) out[i] = y[i] - factor * x[i];
}


// Pairs of lines, even and odd ones; beyond an end lies that end's own. `line(i)` and so on may be anything that has an address.
struct Pairs {
    float* even;
    float* odd;
    int count;            // of pairs
    std::size_t stride;   // from pair to pair
    std::size_t length;   // of a line

    float* e(int i) const { return even + std::min(i, count - 1) * stride; }
    float* o(int i) const { return odd + std::max(i, 0) * stride; }

    void lift_odd(float factor) const {
        for (int i = 0; i < count; ++i) lift(o(i), e(i), e(i + 1), factor, length);
    }
    void lift_even(float factor) const {
        for (int i = 0; i < count; ++i) lift(e(i), o(i), o(i - 1), factor, length);
    }
    void split() const {
        lift_odd(LIFT[0]), lift_even(LIFT[1]), lift_odd(LIFT[2]), lift_even(LIFT[3]);
    }
    void merge() const {
        lift_even(-LIFT[3]), lift_odd(-LIFT[2]), lift_even(-LIFT[1]), lift_odd(-LIFT[0]);
    }
};

// One line of `pairs` values each way. Along the line the neighbours' ends are the values before and after.
void lift_line(float* __restrict__ line, const float* other, int offset, float factor, int count) {
    const int last = count - 1;
    if (offset > 0) {
        if (last > 0) lift(line, other, other + 1, factor, last);
        line[last] += factor * (other[last] + other[last]);
    } else {
        line[0] += factor * (other[0] + other[0]);
        if (last > 0) lift(line + 1, other + 1, other, factor, last);
    }
}

void split_line(float* even, float* odd, int count) {
    lift_line(odd, even, 1, LIFT[0], count), lift_line(even, odd, -1, LIFT[1], count);
    lift_line(odd, even, 1, LIFT[2], count), lift_line(even, odd, -1, LIFT[3], count);
}

void merge_line(float* even, float* odd, int count) {
    lift_line(even, odd, -1, -LIFT[3], count), lift_line(odd, even, 1, -LIFT[2], count);
    lift_line(even, odd, -1, -LIFT[1], count), lift_line(odd, even, 1, -LIFT[0], count);
}

// The scales of a noise level, in float32 as far as the network was trained so.
struct Level {
    float root;          // √γ
    double noise, spread;  // variances: of the noise in y, of the noisy details

    Level(float level, float detail) : root(level) {
        const float gamma = level * level;
        noise = static_cast<double>(std::max(1.0f - gamma, 1e-7f));
        spread = static_cast<double>(gamma) * detail * detail + noise;
    }
};

class Bands : public Layer {
   protected:
    // A piece: pairs of rows [first, last) of a picture, and [begin, end) that must be there to make them.
    struct Piece {
        std::size_t picture;
        int first, last, begin, end;
    };

    template <class Work>
    static void over_pieces(const Run& run, const Work& work) {
        const int pairs = run.planar.height / 2;
        const std::size_t blocks = (pairs + ROWS - 1) / ROWS;
        run.pool.run(run.planar.count * blocks, [&](std::size_t index, unsigned thread) {
            const int first = static_cast<int>(index % blocks) * ROWS, last = std::min(first + ROWS, pairs);
            work(Piece{index / blocks, first, last, std::max(0, first - MARGIN), std::min(pairs, last + MARGIN)},
                 run.own + thread * run.own_size);
        });
    }

    static Scratch rows(int width) { return {0, static_cast<std::size_t>(2 * (ROWS + 2 * MARGIN) + 4) * width}; }

    static Pairs pairs_of(const Piece& piece, int width, float* own) {
        const std::size_t line = width;
        return {own, own + line, piece.end - piece.begin, 2 * line, line};
    }
};

class ToBands final : public Bands {
   public:
    ToBands(std::size_t padded, float detail) : padded_(padded), detail_(detail) {}

    Extent extent(const std::vector<Extent>&, int height, int width) const override {
        return height % 2 == 0 && width % 2 == 0 ? Extent{height / 2, width / 2, 0} : Extent{};
    }
    Scratch scratch(const std::vector<Extent>& registers, std::size_t) const override { return rows(2 * registers[to].width); }

    void run(const Run& run) const override {
        over_pieces(run, [&](const Piece& piece, float* own) {
            const View& out = run.views[to];
            float* pixels = out.picture(piece.picture) + static_cast<std::size_t>(piece.first) * out.width * padded_;
            std::fill_n(pixels, static_cast<std::size_t>(piece.last - piece.first) * out.width * padded_, 0.0f);
            for (std::size_t c = 0; c < run.planar.channels; ++c) channel(run, piece, c, own, pixels);
        });
    }

   private:
    void channel(const Run& run, const Piece& piece, std::size_t c, float* own, float* pixels) const {
        const Planar& p = run.planar;
        const Level level(p.level[piece.picture], detail_);
        const std::size_t width = p.width, plane = (piece.picture * p.channels + c) * p.height * width;
        const Pairs pairs = pairs_of(piece, p.width, own);
        for (int i = 0; i < 2 * pairs.count; ++i) {
            const std::size_t at = plane + (2 * piece.begin + i) * width;
            difference(own + i * width, p.y + at, p.x + at, level.root, width);
        }
        pairs.split();
        float* lines = own + 2 * pairs.count * width;  // low even, low odd, high even, high odd
        const float factor = static_cast<float>(1 / std::sqrt(level.spread));
        const int half = p.width / 2;
        for (int i = piece.first; i < piece.last; ++i) {
            const float* rows[2] = {pairs.e(i - piece.begin), pairs.o(i - piece.begin)};
            for (int row = 0; row < 2; ++row)
                for (int x = 0; x < half; ++x) {
                    lines[(2 * row) * half + x] = rows[row][2 * x];
                    lines[(2 * row + 1) * half + x] = rows[row][2 * x + 1];
                }
            for (int row = 0; row < 2; ++row) split_line(lines + 2 * row * half, lines + (2 * row + 1) * half, half);
            const float* x = p.x + plane + 2 * i * width;
            float* to_pixel = pixels + static_cast<std::size_t>(i - piece.first) * half * padded_;
            for (int j = 0; j < half; ++j, to_pixel += padded_) {
                to_pixel[4 * c] = x[2 * j], to_pixel[4 * c + 1] = x[2 * j + 1];
                to_pixel[4 * c + 2] = x[width + 2 * j], to_pixel[4 * c + 3] = x[width + 2 * j + 1];
                float* details = to_pixel + 4 * p.channels + c;
                details[0] = lines[half + j] * factor;                                  // low rows (× gain), odd columns (÷ gain)
                details[p.channels] = lines[2 * half + j] * factor;                     // high rows, even columns
                details[2 * p.channels] = lines[3 * half + j] * (factor / (GAIN * GAIN));  // high rows, odd columns
            }
        }
    }

    std::size_t padded_;
    float detail_;
};

class FromBands final : public Bands {
   public:
    FromBands(int bands, int source, float detail, float coarse) : detail_(detail), coarse_(coarse) { from = {bands, source}; }

    Extent extent(const std::vector<Extent>&, int height, int width) const override { return {height, width, 0}; }
    Scratch scratch(const std::vector<Extent>& registers, std::size_t) const override { return rows(2 * registers[from[0]].width); }

    void run(const Run& run) const override {
        over_pieces(run, [&](const Piece& piece, float* own) {
            for (std::size_t c = 0; c < run.planar.channels; ++c) channel(run, piece, c, own);
        });
    }

   private:
    void channel(const Run& run, const Piece& piece, std::size_t c, float* own) const {
        const Planar& p = run.planar;
        const Level level(p.level[piece.picture], detail_);
        const float seen = static_cast<float>(level.root * detail_ * detail_ / std::sqrt(level.spread));  // of the details given
        const float made = static_cast<float>(std::sqrt(level.noise / level.spread) * detail_);           // of those predicted
        const std::size_t width = p.width, channels = p.channels;
        const int half = p.width / 2;
        const View &bands = run.views[from[0]], &in = run.views[from[1]];
        const Pairs pairs = pairs_of(piece, p.width, own);
        float* lines = own + 2 * pairs.count * width;
        for (int i = 0; i < pairs.count; ++i) {
            const std::size_t row = static_cast<std::size_t>(piece.begin + i) * half;
            const float* details = bands.picture(piece.picture) + row * bands.padded + 4 * channels + c;
            const float* predicted = in.picture(piece.picture) + row * in.padded + c;
            for (int j = 0; j < half; ++j, details += bands.padded, predicted += in.padded) {
                lines[j] = predicted[0] * (coarse_ / (GAIN * GAIN));
                lines[half + j] = details[0] * seen + predicted[channels] * made;
                lines[2 * half + j] = details[channels] * seen + predicted[2 * channels] * made;
                lines[3 * half + j] = (details[2 * channels] * seen + predicted[3 * channels] * made) * (GAIN * GAIN);
            }
            float* rows[2] = {pairs.e(i), pairs.o(i)};
            for (int one = 0; one < 2; ++one) {
                merge_line(lines + 2 * one * half, lines + (2 * one + 1) * half, half);
                for (int j = 0; j < half; ++j) {
                    rows[one][2 * j] = lines[2 * one * half + j];
                    rows[one][2 * j + 1] = lines[(2 * one + 1) * half + j];
                }
            }
        }
        pairs.merge();
        const std::size_t plane = (piece.picture * channels + c) * p.height * width;
        for (int i = 2 * piece.first; i < 2 * piece.last; ++i) {
            const std::size_t at = plane + i * width;
            difference(p.out + at, p.x + at, own + (i - 2 * piece.begin) * width, -1.0f, width);
        }
    }

    float detail_, coarse_;
};

}  // namespace

std::unique_ptr<Layer> to_bands(std::size_t padded, float detail) { return std::make_unique<ToBands>(padded, detail); }
std::unique_ptr<Layer> from_bands(int bands, int from, float detail, float coarse) {
    return std::make_unique<FromBands>(bands, from, detail, coarse);
}

}  // namespace sr3
