// Between the pictures as they are given, channel after channel, and registers; and changes of size.

#include <algorithm>
#include <cmath>

#include "layers.hpp"

namespace sr3 {
namespace {

constexpr std::size_t ROWS = 8;  // of a piece of work

template <class Work>
void over_rows(const Run& run, int height, const Work& work) {
    const std::size_t blocks = (height + ROWS - 1) / ROWS;
    run.pool.run(run.planar.count * blocks, [&](std::size_t piece, unsigned thread) {
        const int first = static_cast<int>(piece % blocks * ROWS);
        work(piece / blocks, first, std::min<int>(first + ROWS, height), thread);
    });
}

class JoinedPlanes final : public Layer {
   public:
    explicit JoinedPlanes(std::size_t padded) : padded_(padded) {}

    Extent extent(const std::vector<Extent>&, int height, int width) const override { return {height, width, 0}; }
    Scratch scratch(const std::vector<Extent>&, std::size_t) const override { return {}; }

    void run(const Run& run) const override {
        const Planar& p = run.planar;
        const View& out = run.views[to];
        over_rows(run, p.height, [&](std::size_t n, int first, int last, unsigned) {
            const std::size_t plane = static_cast<std::size_t>(p.height) * p.width, begin = static_cast<std::size_t>(first) * p.width;
            const std::size_t count = static_cast<std::size_t>(last - first) * p.width;
            float* pixels = out.picture(n) + begin * padded_;
            std::fill_n(pixels, count * padded_, 0.0f);
            for (std::size_t c = 0; c < 2 * p.channels; ++c) {
                const float* from_plane = (c < p.channels ? p.x : p.y) + (n * p.channels + c % p.channels) * plane + begin;
                for (std::size_t i = 0; i < count; ++i) pixels[i * padded_ + c] = from_plane[i];
            }
        });
    }

   private:
    std::size_t padded_;
};

class Unshuffled final : public Layer {
   public:
    Unshuffled(std::size_t padded, int by) : padded_(padded), by_(by) {}

    Extent extent(const std::vector<Extent>&, int height, int width) const override {
        return height % by_ == 0 && width % by_ == 0 ? Extent{height / by_, width / by_, 0} : Extent{};
    }
    Scratch scratch(const std::vector<Extent>&, std::size_t) const override { return {}; }

    void run(const Run& run) const override {
        const Planar& p = run.planar;
        const View& out = run.views[to];
        over_rows(run, out.height, [&](std::size_t n, int first, int last, unsigned) {
            float* pixels = out.picture(n) + static_cast<std::size_t>(first) * out.width * padded_;
            const std::size_t plane = static_cast<std::size_t>(p.height) * p.width, side = by_;
            std::fill_n(pixels, static_cast<std::size_t>(last - first) * out.width * padded_, 0.0f);
            for (std::size_t c = 0; c < p.channels; ++c)
                for (int row = first * by_; row < last * by_; ++row) {
                    const float* line = p.x + (n * p.channels + c) * plane + static_cast<std::size_t>(row) * p.width;
                    float* to_row = pixels + static_cast<std::size_t>(row / by_ - first) * out.width * padded_;
                    to_row += (c * side + row % by_) * side;
                    for (int column = 0; column < out.width; ++column)
                        for (std::size_t i = 0; i < side; ++i) to_row[column * padded_ + i] = line[column * side + i];
                }
        });
    }

   private:
    std::size_t padded_;
    int by_;
};

class Result final : public Layer {
   public:
    explicit Result(int source) { from = {source}; }

    Extent extent(const std::vector<Extent>& registers, int, int) const override { return registers[from[0]]; }
    Scratch scratch(const std::vector<Extent>&, std::size_t) const override { return {}; }

    void run(const Run& run) const override {
        const View& in = run.views[from[0]];
        const std::size_t channels = run.planar.channels;
        over_rows(run, in.height, [&](std::size_t n, int first, int last, unsigned) {
            const std::size_t begin = static_cast<std::size_t>(first) * in.width, count = static_cast<std::size_t>(last - first) * in.width;
            const float* pixels = in.picture(n) + begin * in.padded;
            for (std::size_t c = 0; c < channels; ++c) {
                float* out = run.planar.out + (n * channels + c) * in.pixels() + begin;
                for (std::size_t i = 0; i < count; ++i) out[i] = pixels[i * in.padded + c];
            }
        });
    }
};

class Resampling final : public Layer {
   public:
    Resampling(int source, Resample by) : by_(by) { from = {source}; }

    Extent extent(const std::vector<Extent>& registers, int, int) const override {
        const Extent& in = registers[from[0]];
        return by_ == Resample::up ? Extent{2 * in.height, 2 * in.width, 0} : Extent{in.height / 2, in.width / 2, 0};
    }
    Scratch scratch(const std::vector<Extent>&, std::size_t) const override { return {}; }

    void run(const Run& run) const override {
        const View &in = run.views[from[0]], &out = run.views[to];
        over_rows(run, out.height, [&](std::size_t n, int first, int last, unsigned) {
            Input input{};
            input.sources[0] = {in.picture(n), in.padded, nullptr, nullptr};
            input.count = 1;
            input.resample = by_;
            input.height = out.height, input.width = out.width, input.source_width = in.width;
            run.kernels.fill(input, first, 0, last - first, out.width, 0, in.padded,
                             out.picture(n) + static_cast<std::size_t>(first) * out.width * out.padded);
        });
    }

   private:
    Resample by_;
};

}  // namespace

std::unique_ptr<Layer> joined_planes(std::size_t padded) { return std::make_unique<JoinedPlanes>(padded); }
std::unique_ptr<Layer> unshuffled(std::size_t padded, int by) { return std::make_unique<Unshuffled>(padded, by); }
std::unique_ptr<Layer> result(int from) { return std::make_unique<Result>(from); }
std::unique_ptr<Layer> resampling(const std::vector<Register>&, int from, Resample by) { return std::make_unique<Resampling>(from, by); }

}  // namespace sr3
