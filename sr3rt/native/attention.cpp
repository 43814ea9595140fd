// Softmax attention of one head over all places of a picture, a block of queries at a time, so that the scores of a large picture
// are never all there at once.

#include <algorithm>
#include <cmath>

#include "layers.hpp"

namespace sr3 {
namespace {

constexpr std::size_t QUERIES = 24;
constexpr std::size_t TOGETHER = 16;  // of a key's channels: what is written stays in the first-level cache

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
        return {count * (places * channels_ + value_panels() * places * panel_), QUERIES * (places + panel_)};
    }

    void run(const Run& run) const override {
        const View& in = run.views[from[0]];
        const std::size_t places = in.pixels(), panels = padded_places(places) / panel_, blocks = (places + QUERIES - 1) / QUERIES;
        const std::size_t both = panels + value_panels();
        run.pool.run(run.planar.count * both, [&](std::size_t piece, unsigned) {
            const std::size_t picture = piece / both, panel = piece % both;
            panel < panels ? pack_keys(run, picture, panel) : pack_values(run, picture, panel - panels);
        });
        run.pool.run(run.planar.count * blocks, [&](std::size_t piece, unsigned thread) {
            attend(run, piece / blocks, piece % blocks * QUERIES, run.own + thread * run.own_size);
        });
    }

   private:
    std::size_t padded_places(std::size_t places) const { return rounded_up(places, panel_); }
    std::size_t value_panels() const { return rounded_up(channels_, panel_) / panel_; }
    float* keys(const Run& run, std::size_t picture, std::size_t panel) const {
        return run.shared + (picture * padded_places(run.views[from[0]].pixels()) + panel * panel_) * channels_;
    }
    float* values(const Run& run, std::size_t picture, std::size_t panel) const {
        const std::size_t places = padded_places(run.views[from[0]].pixels());
        return run.shared + run.planar.count * places * channels_ + (picture * value_panels() + panel) * places * panel_;
    }

    // A panel of places: [channel][place], scaled by 1/√channels.
    void pack_keys(const Run& run, std::size_t picture, std::size_t panel) const {
        const View& in = run.views[from[0]];
        const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(channels_)));
        float* out = keys(run, picture, panel);
        const std::size_t first = panel * panel_, there = std::min(panel_, in.pixels() - first);
        if (there < panel_) std::fill_n(out, panel_ * channels_, 0.0f);
        for (std::size_t some = 0; some < channels_; some += TOGETHER)
            for (std::size_t lane = 0; lane < there; ++lane) {
                const float* key = in.picture(picture) + (first + lane) * in.padded + channels_;
                for (std::size_t c = some; c < std::min(channels_, some + TOGETHER); ++c) out[c * panel_ + lane] = key[c] * scale;
            }
    }

    // A panel of channels: [place][channel]. Where they lie, places are a power of two apart, and few of them fit into a cache at a time.
    void pack_values(const Run& run, std::size_t picture, std::size_t panel) const {
        const View& in = run.views[from[0]];
        const float* value = in.picture(picture) + 2 * channels_ + panel * panel_;
        const std::size_t there = std::min(panel_, channels_ - panel * panel_);
        float* out = values(run, picture, panel);
        for (std::size_t place = 0; place < in.pixels(); ++place, value += in.padded, out += panel_) {
            std::copy_n(value, there, out);
            std::fill(out + there, out + panel_, 0.0f);
        }
    }

    void attend(const Run& run, std::size_t picture, std::size_t first, float* own) const {
        const View &in = run.views[from[0]], &out = run.views[to];
        const std::size_t places = in.pixels(), stride = padded_places(places), count = std::min(QUERIES, places - first);
        const float* queries = in.picture(picture) + first * in.padded;
        float *scores = own, *mixed = own + QUERIES * stride;
        for (std::size_t panel = 0; panel < stride / panel_; ++panel)
            run.kernels.multiply_floats(count, channels_, queries, in.padded, keys(run, picture, panel), panel_,
                                        {keys(run, picture, panel + 1)}, scores + panel * panel_, stride, false);
        run.kernels.softmax(scores, stride, count, places);
        float* to_pixel = out.picture(picture) + first * out.padded;
        for (std::size_t c = 0; c < out.padded; c += panel_) {
            const float* panel = values(run, picture, c / panel_);
            run.kernels.multiply_floats(count, places, scores, stride, panel, panel_, {panel + places * panel_}, mixed, panel_, false);
            for (std::size_t row = 0; row < count; ++row)
                std::copy_n(mixed + row * panel_, std::min(panel_, out.padded - c), to_pixel + row * out.padded + c);
        }
    }

    std::size_t channels_, panel_;
};

}  // namespace

std::unique_ptr<Layer> attention(const Kernels& kernels, const std::vector<Register>& registers, int from) {
    return std::make_unique<Attention>(kernels, registers, from);
}

}  // namespace sr3
