// Softmax attention of one head over all places of a picture, a block of queries at a time, so that the scores of a large picture
// are never all there at once.

#include <algorithm>
#include <cmath>

#include "layers.hpp"

namespace sr3 {
namespace {

constexpr std::size_t QUERIES = 24;

class Attention final : public Layer {
   public:
    Attention(const Kernels& kernels, const std::vector<Register>& registers, int source)
        : channels_(registers[source].channels / 3), panel_(2 * kernels.lanes) {
        from = {source};
    }

    Extent extent(const std::vector<Extent>& registers, int, int) const override {
        return {registers[from[0]].height, registers[from[0]].width, 0};
    }

    Scratch scratch(const std::vector<Extent>& registers, std::size_t count) const override {
        const std::size_t places = padded_places(static_cast<std::size_t>(registers[from[0]].height) * registers[from[0]].width);
        return {count * places * channels_, QUERIES * (places + panel_)};
    }

    void run(const Run& run) const override {
        const View& in = run.views[from[0]];
        const std::size_t places = in.pixels(), panels = padded_places(places) / panel_, blocks = (places + QUERIES - 1) / QUERIES;
        run.pool.run(run.planar.count * panels, [&](std::size_t piece, unsigned) { pack_keys(run, piece / panels, piece % panels); });
        run.pool.run(run.planar.count * blocks, [&](std::size_t piece, unsigned thread) {
            attend(run, piece / blocks, piece % blocks * QUERIES, run.own + thread * run.own_size);
        });
    }

   private:
    std::size_t padded_places(std::size_t places) const { return rounded_up(places, panel_); }
    float* keys(const Run& run, std::size_t picture, std::size_t panel) const {
        return run.shared + (picture * padded_places(run.views[from[0]].pixels()) + panel * panel_) * channels_;
    }

    // A panel of places: [channel][place], scaled by 1/√channels.
    void pack_keys(const Run& run, std::size_t picture, std::size_t panel) const {
        const View& in = run.views[from[0]];
        const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(channels_)));
        float* out = keys(run, picture, panel);
        for (std::size_t lane = 0; lane < panel_; ++lane) {
            const std::size_t place = panel * panel_ + lane;
            const float* key = in.picture(picture) + place * in.padded + channels_;
            for (std::size_t c = 0; c < channels_; ++c) out[c * panel_ + lane] = place < in.pixels() ? key[c] * scale : 0.0f;
        }
    }

    void attend(const Run& run, std::size_t picture, std::size_t first, float* own) const {
        const View &in = run.views[from[0]], &out = run.views[to];
        const std::size_t places = in.pixels(), stride = padded_places(places), count = std::min(QUERIES, places - first);
        const float* queries = in.picture(picture) + first * in.padded;
        float *scores = own, *mixed = own + QUERIES * stride;
        for (std::size_t panel = 0; panel < stride / panel_; ++panel)
            run.kernels.multiply_floats(count, channels_, queries, in.padded, keys(run, picture, panel), panel_,
                                 keys(run, picture, panel + 1), scores + panel * panel_, stride, false);
        run.kernels.softmax(scores, stride, count, places);
        float* to_pixel = out.picture(picture) + first * out.padded;
        for (std::size_t c = 0; c < out.padded; c += panel_) {
            if (c < channels_)
                run.kernels.multiply_floats(count, places, scores, stride, in.picture(picture) + 2 * channels_ + c, in.padded,
                                     in.picture(picture) + 2 * channels_ + c + panel_, mixed, panel_, false);
            for (std::size_t row = 0; row < count; ++row)
                for (std::size_t lane = 0; lane < std::min(panel_, out.padded - c); ++lane)
                    to_pixel[row * out.padded + c + lane] = c + lane < channels_ ? mixed[row * panel_ + lane] : 0.0f;
        }
    }

    std::size_t channels_, panel_;
};

}  // namespace

std::unique_ptr<Layer> attention(const Kernels& kernels, const std::vector<Register>& registers, int from) {
    return std::make_unique<Attention>(kernels, registers, from);
}

}  // namespace sr3
