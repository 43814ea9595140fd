// Random small networks against the same in float64, written as plainly as can be: `fuzz CASES SEED [KERNELS]`, kernels as in kernels.hpp or
// wide, wide_bf16 or wide_amx. Prints a line for every network that differs by more than rounding, then how many there were; the exit status is theirs.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "network.hpp"
#include "tiles.hpp"

namespace sr3 {
extern const Kernels wide, wide_bf16;  // the code of AVX-512's vectors, compiled for AVX2
extern const Tiles plain_tiles;        // the code of AMX's tiles, compiled for any processor
}

namespace {

std::mt19937_64 generator;

int random(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }
bool chance(double probability) { return std::uniform_real_distribution<>()(generator) < probability; }

std::vector<float> normals(std::size_t count, double deviation) {
    std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
    std::vector<float> made(count);
    for (float& value : made) value = normal(generator);
    return made;
}

// Pictures in float64, channel after channel.
struct Maps {
    int count = 0, channels = 0, height = 0, width = 0;
    std::vector<double> values;

    Maps(int n, int c, int h, int w) : count(n), channels(c), height(h), width(w), values(std::size_t(n) * c * h * w) {}
    double& at(int n, int c, int y, int x) { return values[((std::size_t(n) * channels + c) * height + y) * width + x]; }
    double at(int n, int c, int y, int x) const { return values[((std::size_t(n) * channels + c) * height + y) * width + x]; }
};

template <class Value>
Maps made(int n, int c, int h, int w, const Value& value) {
    Maps maps(n, c, h, w);
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < c; ++j)
            for (int y = 0; y < h; ++y)
                for (int x = 0; x < w; ++x) maps.at(i, j, y, x) = value(i, j, y, x);
    return maps;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

Maps joined(const std::vector<const Maps*>& sources) {
    int channels = 0;
    for (const Maps* one : sources) channels += one->channels;
    const Maps& first = *sources[0];
    return made(first.count, channels, first.height, first.width, [&](int n, int c, int y, int x) {
        std::size_t s = 0;
        while (c >= sources[s]->channels) c -= sources[s++]->channels;
        return sources[s]->at(n, c, y, x);
    });
}

Maps normed(const Maps& in, const sr3::Norm& norm) {
    Maps out = in;
    const int size = in.channels / norm.groups;
    for (int n = 0; n < in.count; ++n)
        for (int group = 0; group < norm.groups; ++group) {
            double sum = 0, squares = 0;
            const double values = double(size) * in.height * in.width;
            const auto over = [&](const auto& body) {
                for (int c = group * size; c < (group + 1) * size; ++c)
                    for (int y = 0; y < in.height; ++y)
                        for (int x = 0; x < in.width; ++x) body(c, y, x);
            };
            over([&](int c, int y, int x) { sum += in.at(n, c, y, x); });
            over([&](int c, int y, int x) { squares += std::pow(in.at(n, c, y, x) - sum / values, 2); });
            const double factor = 1 / std::sqrt(squares / values + norm.eps);
            over([&](int c, int y, int x) {
                out.at(n, c, y, x) = (in.at(n, c, y, x) - sum / values) * factor * norm.weight[c] + norm.bias[c];
            });
        }
    return out;
}

Maps resampled(const Maps& in, sr3::Resample by) {
    if (by == sr3::Resample::up)
        return made(in.count, in.channels, in.height * 2, in.width * 2, [&](int n, int c, int y, int x) { return in.at(n, c, y / 2, x / 2); });
    if (by == sr3::Resample::down)
        return made(in.count, in.channels, in.height / 2, in.width / 2, [&](int n, int c, int y, int x) {
            return (in.at(n, c, 2 * y, 2 * x) + in.at(n, c, 2 * y, 2 * x + 1) + in.at(n, c, 2 * y + 1, 2 * x) +
                    in.at(n, c, 2 * y + 1, 2 * x + 1)) / 4;
        });
    return in;
}

Maps convolved(const Maps& in, const std::vector<float>& weight, int outputs, int side, int stride) {
    const int edge = side / 2, height = (in.height - 1) / stride + 1, width = (in.width - 1) / stride + 1;
    return made(in.count, outputs, height, width, [&](int n, int k, int y, int x) {
        double sum = 0;
        for (int c = 0; c < in.channels; ++c)
            for (int i = 0; i < side; ++i)
                for (int j = 0; j < side; ++j) {
                    const int row = y * stride + i - edge, column = x * stride + j - edge;
                    if (row >= 0 && row < in.height && column >= 0 && column < in.width)
                        sum += double(weight[((std::size_t(k) * in.channels + c) * side + i) * side + j]) * in.at(n, c, row, column);
                }
        return sum;
    });
}

Maps attended(const Maps& in) {
    const int channels = in.channels / 3, places = in.height * in.width;
    const auto value = [&](int n, int c, int place) { return in.at(n, c, place / in.width, place % in.width); };
    Maps out(in.count, channels, in.height, in.width);
    std::vector<double> scores(places);
    for (int n = 0; n < in.count; ++n)
        for (int query = 0; query < places; ++query) {
            double most = -1e300, sum = 0;
            for (int key = 0; key < places; ++key) {
                scores[key] = 0;
                for (int c = 0; c < channels; ++c) scores[key] += value(n, c, query) * value(n, channels + c, key);
                most = std::max(most, scores[key] /= std::sqrt(double(channels)));
            }
            for (double& score : scores) sum += score = std::exp(score - most);
            for (int c = 0; c < channels; ++c) {
                double mixed = 0;
                for (int key = 0; key < places; ++key) mixed += scores[key] * value(n, 2 * channels + c, key);
                out.at(n, c, query / in.width, query % in.width) = mixed / sum;
            }
        }
    return out;
}

// Of a convolution. plain: of what registers hold, as it lies. sums: 1×1, a bias and no more. up: 3×3, of a doubled map. add: 3×3, what it
// adds, and does not read else.
struct Wish {
    bool plain = false, sums = false, up = false;
    int add = -1;
};

// A network, register by register with its reference.
class Case {
   public:
    Case(const sr3::Kernels& kernels, int number)
        : channels_(chance(0.3) ? 1 : 3), count_(random(1, 5)), features_(random(1, 9)),
          network_(kernels, static_cast<unsigned>(random(1, 3)), channels_, encoding()) {
        const bool large = number % 16 == 0;
        height_ = large ? random(1, 257) : random(1, 40), width_ = large ? random(1, 131) : random(1, 40);
        const std::size_t size = std::size_t(count_) * channels_ * height_ * width_;
        x_ = normals(size, 1), y_ = normals(size, 1);
        for (int n = 0; n < count_; ++n) levels_.push_back(std::uniform_real_distribution<float>(0.01f, 0.99f)(generator));
        register_ = network_.joined_planes();
        const Maps planes = made(count_, 2 * channels_, height_, width_, [&](int n, int c, int y, int x) {
            const std::vector<float>& from = c < channels_ ? x_ : y_;
            return double(from[((std::size_t(n) * channels_ + c % channels_) * height_ + y) * width_ + x]);
        });
        maps_.push_back(planes);
        normable_.push_back(false);
        if (chance(0.4)) unshuffle();
        for (int i = random(1, 3); i > 0; --i) chance(0.2) ? attend() : chance(0.3) ? add_projected() : convolve(width());
        if (chance(0.15)) add_doubled();
        convolve(channels_);
        network_.result(register_);
    }

    // The largest difference over the largest value, NaN counting as one.
    double error() {
        const Maps& expected = maps_.back();
        std::vector<float> out(expected.values.size(), NAN), other(y_.rbegin(), y_.rend());
        // What depends on x alone is kept from here on, of pictures in another order.
        std::vector<float> turned(x_);
        std::rotate(turned.begin(), turned.begin() + static_cast<std::ptrdiff_t>(x_.size() / count_), turned.end());
        network_.run({turned.data(), other.data(), levels_.data(), out.data(), std::size_t(channels_), std::size_t(count_), height_, width_});
        std::fill(out.begin(), out.end(), NAN);
        network_.run({x_.data(), y_.data(), levels_.data(), out.data(), std::size_t(channels_), std::size_t(count_), height_, width_});
        double most = 1e-3, worst = 0;
        for (const double value : expected.values) most = std::max(most, std::fabs(value));
        for (std::size_t i = 0; i < out.size(); ++i) {
            if (!std::isfinite(out[i])) return 1;
            worst = std::max(worst, std::fabs(out[i] - expected.values[i]));
        }
        return worst / most;
    }

    std::string text() const {
        return std::to_string(count_) + "×" + std::to_string(channels_) + "×" + std::to_string(height_) + "×" + std::to_string(width_) + text_;
    }

   private:
    static int width() { return chance(0.1) ? random(65, 300) : random(1, 64); }

    sr3::LevelEncoding encoding() {
        sr3::LevelEncoding made;
        made.silu = chance(0.5);
        made.scale = 3;
        made.frequencies = normals(features_, 1);
        encoding_ = made;
        return made;
    }

    double feature(int n, int i) const {
        const int half = features_;
        const double phase = 3.0 * levels_[n] * encoding_.frequencies[i % half];
        return i < half ? std::sin(phase) : std::cos(phase);
    }

    // x, and a convolution or two that may not see y.
    void unshuffle() {
        const int by = height_ % 2 == 0 && width_ % 2 == 0 ? random(1, 2) : 1;
        register_ = network_.unshuffled(by);
        maps_.push_back(made(count_, by * by * channels_, height_ / by, width_ / by, [&](int n, int c, int y, int x) {
            const int place = c % (by * by), row = y * by + place / by, column = x * by + place % by;
            return double(x_[((std::size_t(n) * channels_ + c / (by * by)) * height_ + row) * width_ + column]);
        }));
        normable_.push_back(false);
        text_ += " unshuffled by " + std::to_string(by);
        for (int i = random(1, 2); i > 0; --i) convolve(width());
    }

    void attend() {
        const int channels = random(1, 40);
        convolve(3 * channels, {.plain = true});
        const Maps& in = maps_.back();
        if (in.height * in.width > 1500) return;
        register_ = network_.attention(register_);
        maps_.push_back(attended(in));
        normable_.push_back(false);
        text_ += " attention";
    }

    // A residual block's end: a 3×3 convolution adds what a 1×1 makes of the same registers, or others.
    void add_projected() {
        const int outputs = width();
        convolve(outputs, {.plain = true, .sums = true});
        convolve(outputs, {.add = register_});
    }

    // A doubled map that is added to another, of so many channels at times that their weights are transformed at each run.
    void add_doubled() {
        const int pixels = count_ * maps_.back().height * maps_.back().width;
        if (pixels > 4000) return;
        const int outputs = pixels < 700 && chance(0.5) ? random(150, 250) : width();
        if (outputs >= 150) convolve(random(200, 300));
        convolve(outputs, {.up = true});
        convolve(outputs, {.up = true, .add = register_});
    }

    void convolve(int outputs, const Wish& wish = {}) {
        sr3::ConvolutionOptions options;
        const bool plain = wish.plain, adds = wish.add >= 0, side_3 = adds || wish.up;
        const int newest = adds ? wish.add - 1 : static_cast<int>(maps_.size()) - 1;
        const Maps& last = maps_[newest];
        std::vector<const Maps*> sources;
        bool normable = true;
        for (int i = newest; i >= 0 && sources.size() < sr3::SOURCES; --i) {
            const bool fits = maps_[i].height == last.height && maps_[i].width == last.width;
            if (i != newest && (!fits || chance(0.6))) continue;
            options.from.push_back(i);
            sources.push_back(&maps_[i]);
            normable = normable && normable_[i];
        }
        Maps in = joined(sources);
        const int inputs = in.channels, side = side_3 ? 3 : wish.sums ? 1 : chance(0.7) ? 3 : 1;
        if (normable && !plain && chance(0.7)) {
            std::vector<int> divisors;
            for (int i = 1; i <= inputs; ++i)
                if (inputs % i == 0) divisors.push_back(i);
            options.norm = {divisors[random(0, static_cast<int>(divisors.size()) - 1)], 1e-5, normals(inputs, 1), normals(inputs, 1)};
            in = normed(in, options.norm);
        }
        options.silu = !plain && chance(0.5);
        if (options.silu)
            for (double& value : in.values) value = silu(value);
        if (wish.up || (!plain && !adds && chance(0.25) && std::size_t(in.height) * in.width < 4000)) options.resample = sr3::Resample::up;
        if (!plain && !side_3 && chance(0.25) && in.height > 1 && in.width > 1) options.resample = sr3::Resample::down;
        in = resampled(in, options.resample);
        options.stride = !plain && !side_3 && chance(0.2) ? 2 : 1;
        const std::vector<float> weight = normals(std::size_t(outputs) * inputs * side * side, 1 / std::sqrt(double(inputs) * side * side));
        const std::vector<float> bias = chance(0.8) ? normals(outputs, 1) : std::vector<float>{};
        Maps out = convolved(in, weight, outputs, side, options.stride);
        if (!bias.empty()) out = made(out.count, outputs, out.height, out.width, [&](int n, int c, int y, int x) { return out.at(n, c, y, x) + bias[c]; });
        sr3::Linear level = wish.sums ? sr3::Linear{nullptr, nullptr, 0, 0} : projected(options, out);
        options.after = !wish.sums && chance(0.3);
        if (options.after)
            for (double& value : out.values) value = silu(value);
        options.add = wish.add;
        for (std::size_t i = 0; i < maps_.size() && options.add < 0 && !wish.sums; ++i) {
            const Maps& other = maps_[i];
            if (other.channels == outputs && other.height == out.height && other.width == out.width && chance(0.7)) options.add = static_cast<int>(i);
        }
        if (options.add >= 0)
            for (std::size_t j = 0; j < out.values.size(); ++j) out.values[j] += maps_[options.add].values[j];
        options.gain = wish.sums || chance(0.7) ? 1.0f : 0.75f;
        for (double& value : out.values) value *= options.gain;
        text_ += " | " + std::to_string(sources.size()) + " of " + std::to_string(inputs) + " -> " + std::to_string(outputs) + ", side " +
                 std::to_string(side) + " stride " + std::to_string(options.stride) + " groups " + std::to_string(options.norm.groups) +
                 " resample " + std::to_string(static_cast<int>(options.resample)) + (options.silu ? " silu" : "") +
                 (options.add >= 0 ? " add" : "") + (options.after ? " after" : "");
        const bool leveled = level.outputs != 0;
        register_ = network_.convolution(options, weight.data(), outputs, inputs, side, bias, leveled ? &level : nullptr);
        maps_.push_back(std::move(out));
        normable_.push_back(true);
    }

    // A level's projection, applied to `out`; of no outputs where there is none.
    sr3::Linear projected(sr3::ConvolutionOptions& options, Maps& out) {
        if (chance(0.5)) return {nullptr, nullptr, 0, 0};
        options.scaled = chance(0.5);
        const int outputs = options.scaled ? 2 * out.channels : out.channels, inputs = 2 * features_;
        const std::vector<float> weight = normals(std::size_t(outputs) * inputs, 0.3), bias = normals(outputs, 1);
        for (int n = 0; n < out.count; ++n)
            for (int c = 0; c < out.channels; ++c) {
                const auto projection = [&](int k) {
                    double sum = bias[k];
                    for (int i = 0; i < inputs; ++i) sum += double(weight[std::size_t(k) * inputs + i]) * feature(n, i);
                    return sum;
                };
                const double scale = options.scaled ? 1 + projection(c) : 1, shift = projection(options.scaled ? out.channels + c : c);
                for (int y = 0; y < out.height; ++y)
                    for (int x = 0; x < out.width; ++x) out.at(n, c, y, x) = out.at(n, c, y, x) * scale + shift;
            }
        return {weight.data(), bias.data(), std::size_t(outputs), std::size_t(inputs)};
    }

    int channels_, count_, features_, height_ = 0, width_ = 0, register_ = 0;
    sr3::LevelEncoding encoding_;
    sr3::Network network_;
    std::vector<float> x_, y_, levels_;
    std::vector<Maps> maps_;
    std::vector<bool> normable_;
    std::string text_;
};

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return std::fprintf(stderr, "usage: fuzz CASES SEED KERNELS\n"), 2;
    const std::string name = argc > 3 ? argv[3] : "auto";
    sr3::Kernels wide_amx = sr3::wide;
    wide_amx.name = "wide_amx", wide_amx.tiles = &sr3::plain_tiles;
    const sr3::Kernels* kernels = name == "wide"        ? &sr3::wide
                                  : name == "wide_bf16" ? &sr3::wide_bf16
                                  : name == "wide_amx"  ? &wide_amx
                                                        : sr3::kernels(name.c_str());
    if (kernels == nullptr) return std::fprintf(stderr, "this processor has not what was asked for\n"), 2;
    const int cases = std::atoi(argv[1]), seed = std::atoi(argv[2]);
    int wrong = 0;
    double worst = 0;
    const double limit = kernels->word == 1 && kernels->tiles == nullptr ? 1e-4 : 0.1;  // what is in the wrong place is wrong by its whole size
    for (int i = 0; i < cases; ++i) {
        generator.seed(std::uint64_t(seed) << 32 | unsigned(i));
        Case one(*kernels, i);
        const double error = one.error();
        worst = std::max(worst, error);
        if (error < limit) continue;
        ++wrong;
        std::printf("case %d differs by %.2g: %s\n", i, error, one.text().c_str());
    }
    std::printf("%s: %d of %d networks wrong, worst error %.2g\n", kernels->name, wrong, cases, worst);
    return std::min(wrong, 1);
}
