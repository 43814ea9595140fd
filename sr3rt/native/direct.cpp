// 1×1 convolutions, and 3×3 of stride 2: a matrix product for each tap, over the input's pixels as they lie or, in words, in a strip.

#include <algorithm>
#include <utility>

#include "convolution.hpp"

namespace sr3 {
namespace {

constexpr int PIXELS = 96;             // of a piece of work, about
constexpr std::size_t FEW_PANELS = 4;  // of a piece, where nothing has to be made of the input first

class Direct final : public Convolution {
   public:
    Direct(const Kernels& kernels, const std::vector<Register>& registers, ConvolutionOptions options, const float* weight,
           std::size_t outputs, int side, std::vector<float> bias)
        : Convolution(kernels, registers, std::move(options), outputs, side, std::move(bias)), panel_(2 * kernels.lanes) {
        hold([&] {
            const std::size_t taps = static_cast<std::size_t>(side_) * side_;
            const Floats by_input = packed(kernels, registers, weight);
            Floats by_tap = floats(panels() * taps * inputs_ * panel_);  // [panel][tap][input][lane]
            for (std::size_t p = 0; p < panels(); ++p)
                for (std::size_t c = 0; c < inputs_; ++c)
                    for (std::size_t tap = 0; tap < taps; ++tap)
                        std::copy_n(by_input.get() + ((p * inputs_ + c) * taps + tap) * panel_, panel_,
                                    by_tap.get() + ((p * taps + tap) * inputs_ + c) * panel_);
            return in_words(kernels, std::move(by_tap), panels() * taps, panel_);  // [panel][tap][word][lane]
        });
    }

    Scratch scratch(const std::vector<Extent>& registers, std::size_t count) const override {
        const auto [height, width, units] = extent(registers, 0, 0);
        const Cut cut = cut_of(height, width);
        const std::size_t strip = reads_in_place() ? 0 : static_cast<std::size_t>(high(cut.rows)) * high(cut.columns) * inputs_;
        return {rounded_up(norms_size(count), 16), rounded_up(strip, 16) + static_cast<std::size_t>(cut.rows) * cut.columns * panel_};
    }

    void run(const Run& run) const override {
        find_norms(run, run.shared);
        const View& out = run.views[to];
        const Cut cut = cut_of(out.height, out.width);
        const std::size_t down = (out.height + cut.rows - 1) / cut.rows, across = (out.width + cut.columns - 1) / cut.columns;
        const std::size_t few = reads_in_place() ? FEW_PANELS : panels(), groups = (panels() + few - 1) / few;
        run.pool.run(run.planar.count * down * across * groups, [&](std::size_t piece, unsigned thread) {
            const std::size_t group = piece % groups, place = piece / groups;
            const int column = static_cast<int>(place % across) * cut.columns, row = static_cast<int>(place / across % down) * cut.rows;
            const Part part{place / across / down, row, column, std::min(cut.rows, out.height - row),
                            std::min(cut.columns, out.width - column)};
            float* own = run.own + thread * run.own_size;
            do_part(run, part, group * few, std::min(panels(), group * few + few), own);
        });
    }

   protected:
    std::size_t units(int height, int width) const override {
        const Cut cut = cut_of(height, width);
        return static_cast<std::size_t>(height) * ((width + cut.columns - 1) / cut.columns);
    }

   private:
    struct Cut {
        int rows, columns;
    };
    struct Part {
        std::size_t picture;
        int row, column, rows, columns;
    };

    bool reads_in_place() const { return word_ == 1 && pointwise(); }

    // Whole rows, or a part of one. Of low pictures few rows, so that there is something to share out.
    static Cut cut_of(int height, int width) {
        if (width >= PIXELS) return {1, PIXELS};
        return {std::clamp(PIXELS / width, 1, (height + 3) / 4), width};
    }

    int high(int outputs) const { return (outputs - 1) * options_.stride + side_; }  // inputs that so many outputs in a line read

    void do_part(const Run& run, const Part& part, std::size_t first, std::size_t last, float* own) const {
        const View& out = run.views[to];
        const Input in = input(run, part.picture, run.shared);
        const int wide = high(part.columns);
        float* sums = own;
        if (!reads_in_place()) {
            const Cut cut = cut_of(out.height, out.width);
            sums += rounded_up(static_cast<std::size_t>(high(cut.rows)) * high(cut.columns) * inputs_, 16);
            const int edge = side_ / 2;
            run.kernels.fill(in, part.row * options_.stride - edge, part.column * options_.stride - edge, high(part.rows), wide, 0, inputs_,
                             own);
            if (word_ != 1) run.kernels.round(own, static_cast<std::size_t>(high(part.rows)) * wide * inputs_, own);
        }
        for (std::size_t panel = first; panel < last; ++panel) {
            if (reads_in_place()) {
                multiply_in_place(run, in, part, panel, sums);
            } else {
                multiply_strip(run, part, panel, own, wide, sums);
            }
            write(run, part, panel, sums);
        }
    }

    void multiply_in_place(const Run& run, const Input& in, const Part& part, std::size_t panel, float* sums) const {
        const float* weights = weights_.get() + panel * inputs_ * panel_;
        for (int s = 0; s < in.count; ++s) {
            const Source& source = in.sources[s];
            const std::size_t at = static_cast<std::size_t>(part.row) * in.width + part.column;
            run.kernels.multiply(static_cast<std::size_t>(part.rows) * part.columns, source.channels, source.data + at * source.channels,
                                 source.channels, weights, panel_, {weights + source.channels * panel_}, sums, panel_, s > 0);
            weights += source.channels * panel_;
        }
    }

    void multiply_strip(const Run& run, const Part& part, std::size_t panel, const float* strip, int wide, float* sums) const {
        const int taps = side_ * side_;
        const std::size_t depth = words(inputs_);
        const bool whole = taps == 1 && options_.stride == 1;  // rows follow one another, as one long one
        const int rows = whole ? 1 : part.rows, columns = whole ? part.rows * part.columns : part.columns;
        for (int y = 0; y < rows; ++y)
            for (int tap = 0; tap < taps; ++tap) {
                const std::size_t at = static_cast<std::size_t>(y * options_.stride + tap / side_) * wide + tap % side_;
                const float* weights = weights_.get() + (panel * taps + tap) * depth * panel_;
                run.kernels.multiply(columns, depth, strip + at * depth, options_.stride * depth, weights, panel_,
                                     {weights + depth * panel_},
                                     sums + static_cast<std::size_t>(y) * columns * panel_, panel_, tap > 0);
            }
    }

    void write(const Run& run, const Part& part, std::size_t panel, const float* sums) const {
        const View& out = run.views[to];
        const int columns = cut_of(out.height, out.width).columns, across = (out.width + columns - 1) / columns;
        const Epilogue whole = epilogue(run, part.picture, panel);
        for (int y = 0; y < part.rows; ++y) {
            Epilogue end = whole;
            const std::size_t at = (part.row + y) * end.row_stride + part.column * end.pixel_stride;
            end.out += at;
            if (end.add != nullptr) end.add += at;
            if (end.sums != nullptr) end.sums += (static_cast<std::size_t>(part.row + y) * across + part.column / columns) * 2 * out.padded;
            run.kernels.finish_row(sums + static_cast<std::size_t>(y) * part.columns * panel_, part.columns, end);
        }
    }

    std::size_t panel_;
};

}  // namespace

std::unique_ptr<Layer> winograd(const Kernels&, const std::vector<Register>&, ConvolutionOptions, const float* weight,
                                std::size_t outputs, std::vector<float> bias);

std::unique_ptr<Layer> tiled(const Kernels&, const std::vector<Register>&, ConvolutionOptions, const float* weight, std::size_t outputs,
                             int side, std::vector<float> bias);

std::unique_ptr<Layer> convolution(const Kernels& kernels, const std::vector<Register>& registers, ConvolutionOptions options,
                                   const float* weight, std::size_t outputs, int side, std::vector<float> bias) {
    if (kernels.tiles != nullptr) return tiled(kernels, registers, std::move(options), weight, outputs, side, std::move(bias));
    if (side == 3 && options.stride == 1) return winograd(kernels, registers, std::move(options), weight, outputs, std::move(bias));
    return std::make_unique<Direct>(kernels, registers, std::move(options), weight, outputs, side, std::move(bias));
}

}  // namespace sr3
