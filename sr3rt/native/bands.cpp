// The ends of the compact network (export/nets/compact.py): one level of a wavelet of y less √γ times a mean, whose details the
// network is given beside that mean, and the way back from the details that it makes. Lifting steps: Daubechies and Sweldens 1998.

#include <algorithm>
#include <cmath>

#include "clones.hpp"
#include "layers.hpp"

namespace sr3 {
namespace {

// The steps of docs/program.md: predict, update, predict; taps from the nearest pair of neighbours outwards.
constexpr int STEPS = 3, TAPS = 4;
constexpr float LIFT[STEPS][TAPS] = {{-0.25449f, 0.07703f, -0.05229f, 0.02829f},
                                     {0.4592f, -0.14136f, 0.09f, -0.05147f},
                                     {-0.270539f, 0.08357f, -0.05346f, 0.03101f}};
constexpr float GAIN = 0.98704f;
constexpr int ROWS = 16, MARGIN = STEPS * TAPS;  // pairs of rows of a piece of work, and how far beyond them the lifting reads

// The lines that a step reads, the nearest pair first.
using Neighbours = const float* [2 * TAPS];

// line += sign·Σ taps[k]·(neighbours[2k] + neighbours[2k + 1])
SR3_CLONES void lift(float* __restrict__ line, const Neighbours& from, const float* taps, float sign, std::size_t count) {
    static_assert(TAPS == 4);
    const float a = sign * taps[0], b = sign * taps[1], c = sign * taps[2], d = sign * taps[3];
    for (std::size_t i = 0; i < count; ++i)
        line[i] += a * (from[0][i] + from[1][i]) + b * (from[2][i] + from[3][i]) + c * (from[4][i] + from[5][i]) +
                   d * (from[6][i] + from[7][i]);
}

SR3_CLONES void difference(float* __restrict__ out, const float* y, const float* x, float factor, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) out[i] = y[i] - factor * x[i];
}

// Runs the steps, or undoes them, with `step(index, sign)`.
template <class Step>
void split(const Step& step) {
    for (int i = 0; i < STEPS; ++i) step(i, 1.0f);
}
template <class Step>
void merge(const Step& step) {
    for (int i = STEPS - 1; i >= 0; --i) step(i, -1.0f);
}

// Pairs of lines, even and odd ones; beyond an end lies that end's own.
struct Pairs {
    float* even;
    float* odd;
    int count;            // of pairs
    std::size_t stride;   // from pair to pair
    std::size_t length;   // of a line

    float* e(int i) const { return even + std::clamp(i, 0, count - 1) * stride; }
    float* o(int i) const { return odd + std::clamp(i, 0, count - 1) * stride; }

    // Odd lines lie between even ones i and i + 1, even ones between odd ones i - 1 and i.
    void operator()(int step, float sign) const {
        const bool predicts = step % 2 == 0;
        for (int i = 0; i < count; ++i) {
            Neighbours from;
            for (int k = 0; k < TAPS; ++k) {
                from[2 * k] = predicts ? e(i - k) : o(i - 1 - k);
                from[2 * k + 1] = predicts ? e(i + 1 + k) : o(i + k);
            }
            lift(predicts ? o(i) : e(i), from, LIFT[step], sign, length);
        }
    }
};

// The same along one line, whose even and odd places lie apart. wide: room for count + 2·TAPS values.
struct Line {
    float* even;
    float* odd;
    int count;
    float* wide;

    void operator()(int step, float sign) const {
        const bool predicts = step % 2 == 0;
        const float* read = predicts ? even : odd;
        std::fill_n(wide, TAPS, read[0]);
        std::copy_n(read, count, wide + TAPS);
        std::fill_n(wide + TAPS + count, TAPS, read[count - 1]);
        const float* middle = wide + TAPS - (predicts ? 0 : 1);  // of a place's first neighbour
        Neighbours from;
        for (int k = 0; k < TAPS; ++k) from[2 * k] = middle - k, from[2 * k + 1] = middle + 1 + k;
        lift(predicts ? odd : even, from, LIFT[step], sign, count);
    }
};

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
    Bands(int mean, int side, float detail) : mean_(mean), side_(side), detail_(detail) {}

    // A line of the mean: x, and what its register holds for each side×side.
    void mean_line(const Run& run, std::size_t picture, std::size_t c, int row, float* __restrict__ out) const {
        const Planar& p = run.planar;
        const View& mean = run.views[mean_];
        const float* x = p.x + ((picture * p.channels + c) * p.height + row) * p.width;
        const float* places = mean.picture(picture) + static_cast<std::size_t>(row / side_) * mean.width * mean.padded;
        places += (c * side_ + row % side_) * side_;
        if (side_ == 4)
            line_of<4>(x, places, mean, out, 4);
        else
            line_of<0>(x, places, mean, out, side_);
    }

    bool fits(const std::vector<Extent>& registers, int height, int width) const {
        const Extent& mean = registers[mean_];
        return mean.height * side_ == height && mean.width * side_ == width && height % 2 == 0 && width % 2 == 0;
    }

    float detail() const { return detail_; }

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

    // Pairs of rows, two lines, then four half lines and what a step along one reads.
    static Scratch rows(int width) { return {0, static_cast<std::size_t>(2 * (ROWS + 2 * MARGIN) + 5) * width + 2 * TAPS}; }

    static Pairs pairs_of(const Piece& piece, int width, float* own) {
        const std::size_t line = width;
        return {own, own + line, piece.end - piece.begin, 2 * line, line};
    }

   private:
    template <int SIDE>
    static void line_of(const float* x, const float* places, const View& mean, float* __restrict__ out, int any) {
        const int side = SIDE == 0 ? any : SIDE;
        for (int j = 0; j < mean.width; ++j, x += side, out += side, places += mean.padded)
            for (int i = 0; i < side; ++i) out[i] = x[i] + places[i];
    }

    int mean_, side_;
    float detail_;
};

class ToBands final : public Bands {
   public:
    ToBands(std::size_t padded, int mean, int side, float detail) : Bands(mean, side, detail), padded_(padded) { from = {mean}; }

    Extent extent(const std::vector<Extent>& registers, int height, int width) const override {
        return fits(registers, height, width) ? Extent{height / 2, width / 2, 0} : Extent{};
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
        const Level level(p.level[piece.picture], detail());
        const std::size_t width = p.width, plane = (piece.picture * p.channels + c) * p.height * width;
        const Pairs pairs = pairs_of(piece, p.width, own);
        float* mean = own + 2 * pairs.count * width;
        for (int i = 0; i < 2 * pairs.count; ++i) {
            const int row = 2 * piece.begin + i;
            mean_line(run, piece.picture, c, row, mean);
            difference(own + i * width, p.y + plane + row * width, mean, level.root, width);
        }
        split(pairs);
        float* lines = mean + 2 * width;  // low even, low odd, high even, high odd
        const float factor = static_cast<float>(1 / std::sqrt(level.spread));
        const int half = p.width / 2;
        for (int i = piece.first; i < piece.last; ++i) {
            const float* rows[2] = {pairs.e(i - piece.begin), pairs.o(i - piece.begin)};
            for (int row = 0; row < 2; ++row)
                for (int x = 0; x < half; ++x) {
                    lines[(2 * row) * half + x] = rows[row][2 * x];
                    lines[(2 * row + 1) * half + x] = rows[row][2 * x + 1];
                }
            for (int row = 0; row < 2; ++row) split(Line{lines + 2 * row * half, lines + (2 * row + 1) * half, half, lines + 4 * half});
            for (int row = 0; row < 2; ++row) mean_line(run, piece.picture, c, 2 * i + row, mean + row * width);
            float* to_pixel = pixels + static_cast<std::size_t>(i - piece.first) * half * padded_;
            for (int j = 0; j < half; ++j, to_pixel += padded_) {
                to_pixel[4 * c] = mean[2 * j], to_pixel[4 * c + 1] = mean[2 * j + 1];
                to_pixel[4 * c + 2] = mean[width + 2 * j], to_pixel[4 * c + 3] = mean[width + 2 * j + 1];
                float* details = to_pixel + 4 * p.channels + c;
                details[0] = lines[half + j] * factor;                                  // low rows (× gain), odd columns (÷ gain)
                details[p.channels] = lines[2 * half + j] * factor;                     // high rows, even columns
                details[2 * p.channels] = lines[3 * half + j] * (factor / (GAIN * GAIN));  // high rows, odd columns
            }
        }
    }

    std::size_t padded_;
};

class FromBands final : public Bands {
   public:
    FromBands(int bands, int mean, int side, int fine, float detail) : Bands(mean, side, detail) { from = {bands, fine}; }

    Extent extent(const std::vector<Extent>& registers, int height, int width) const override {
        const Extent& bands = registers[from[0]];
        const bool halved = 2 * bands.height == height && 2 * bands.width == width;
        return halved && fits(registers, height, width) ? Extent{height, width, 0} : Extent{};
    }
    Scratch scratch(const std::vector<Extent>& registers, std::size_t) const override { return rows(2 * registers[from[0]].width); }

    void run(const Run& run) const override {
        over_pieces(run, [&](const Piece& piece, float* own) {
            for (std::size_t c = 0; c < run.planar.channels; ++c) channel(run, piece, c, own);
        });
    }

   private:
    void channel(const Run& run, const Piece& piece, std::size_t c, float* own) const {
        const Planar& p = run.planar;
        const Level level(p.level[piece.picture], detail());
        const float seen = static_cast<float>(level.root * detail() * detail() / std::sqrt(level.spread));  // of the details given
        const float made = static_cast<float>(std::sqrt(level.noise / level.spread) * detail());            // of those predicted
        const std::size_t width = p.width, channels = p.channels;
        const int half = p.width / 2;
        const View &bands = run.views[from[0]], &fine = run.views[from[1]];
        const Pairs pairs = pairs_of(piece, p.width, own);
        float* mean = own + 2 * pairs.count * width;
        float* lines = mean + 2 * width;
        for (int i = 0; i < pairs.count; ++i) {
            const std::size_t row = static_cast<std::size_t>(piece.begin + i) * half;
            const float* details = bands.picture(piece.picture) + row * bands.padded + 4 * channels + c;
            const float* predicted = fine.picture(piece.picture) + row * fine.padded + c;
            for (int j = 0; j < half; ++j, details += bands.padded, predicted += fine.padded) {
                lines[j] = 0.0f;
                lines[half + j] = details[0] * seen + predicted[0] * made;
                lines[2 * half + j] = details[channels] * seen + predicted[channels] * made;
                lines[3 * half + j] = (details[2 * channels] * seen + predicted[2 * channels] * made) * (GAIN * GAIN);
            }
            float* rows[2] = {pairs.e(i), pairs.o(i)};
            for (int one = 0; one < 2; ++one) {
                merge(Line{lines + 2 * one * half, lines + (2 * one + 1) * half, half, lines + 4 * half});
                for (int j = 0; j < half; ++j) {
                    rows[one][2 * j] = lines[2 * one * half + j];
                    rows[one][2 * j + 1] = lines[(2 * one + 1) * half + j];
                }
            }
        }
        merge(pairs);
        const std::size_t plane = (piece.picture * channels + c) * p.height * width;
        for (int i = 2 * piece.first; i < 2 * piece.last; ++i) {
            mean_line(run, piece.picture, c, i, mean);
            difference(p.out + plane + i * width, mean, own + (i - 2 * piece.begin) * width, -1.0f, width);
        }
    }
};

}  // namespace

std::unique_ptr<Layer> to_bands(std::size_t padded, int mean, int side, float detail) {
    return std::make_unique<ToBands>(padded, mean, side, detail);
}
std::unique_ptr<Layer> from_bands(int bands, int mean, int side, int fine, float detail) {
    return std::make_unique<FromBands>(bands, mean, side, fine, detail);
}

}  // namespace sr3
