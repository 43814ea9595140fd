// What both kinds of convolution share: how a picture's input is described, normed and finished.

#pragma once

#include "layers.hpp"

namespace sr3 {

class Convolution : public Layer {
   public:
    // Pixels of a picture.
    struct Area {
        int row, column, rows, columns;
    };

    Extent extent(const std::vector<Extent>&, int height, int width) const override;

    // Whether it is 1×1 and of what registers hold, as it lies; and whether its results are the sums of products, a bias added, and no more.
    bool pointwise() const;
    bool only_sums() const;
    // Of such a layer the sums of an area and a panel, [pixel][lane], without the bias. words: what `gather` makes, `line` is of its own: inputs of
    // the area's pixels and of a row of them. Null where a word is a float: then they are read in place.
    void gather(const Run&, std::size_t picture, const Area&, float* words, float* line) const;
    void sums_of(const Run&, std::size_t picture, const Area&, std::size_t panel, const float* words, float* sums) const;
    const float* bias(std::size_t panel) const { return bias_.data() + panel * 2 * lanes_; }
    std::size_t inputs() const { return inputs_; }

   protected:
    Convolution(const Kernels&, const std::vector<Register>&, ConvolutionOptions, std::size_t outputs, int side,
                std::vector<float> bias);

    // The weights as the kernels read them: those of `options.like`, or what `pack()` makes.
    template <class Pack>
    void hold(const Pack& pack) {
        const auto* like = dynamic_cast<const Convolution*>(options_.like);
        const bool same = like != nullptr && like->channels_ == channels_ && like->outputs_ == outputs_ && like->side_ == side_ &&
                          like->options_.stride == options_.stride &&
                          (like->options_.resample == Resample::up) == (options_.resample == Resample::up);
        weights_ = same ? like->weights_ : std::shared_ptr<const float[]>(pack());
    }

    // packed: [panel][input, padded][tap][lane], as floats.
    Floats packed(const Kernels&, const std::vector<Register>&, const float* weight) const;
    // Rows of `size` floats, one for each input of each of `count` blocks, as words.
    Floats in_words(const Kernels&, Floats rows, std::size_t count, std::size_t size) const;
    std::size_t words(std::size_t inputs) const { return inputs / word_; }

    // The sums' units that a picture of these extents has.
    virtual std::size_t units(int height, int width) const = 0;

    // Scales and shifts of every picture's joined channels, from the sums of its registers.
    void find_norms(const Run&, float* norms) const;
    std::size_t norms_size(std::size_t count) const { return options_.norm.groups == 0 ? 0 : 2 * count * inputs_; }

    Input input(const Run&, std::size_t picture, const float* norms) const;
    // For the panel's channels from the picture's first pixel on.
    Epilogue epilogue(const Run&, std::size_t picture, std::size_t panel) const;

    std::size_t panels() const { return rounded_up(outputs_, lanes_ * 2) / (lanes_ * 2); }

    ConvolutionOptions options_;
    std::size_t inputs_, outputs_, padded_;  // inputs, and outputs once more, padded
    std::size_t lanes_, word_;                // of the kernels
    int side_;
    std::vector<float> bias_;                 // padded to whole panels
    std::shared_ptr<const float[]> weights_;  // laid out by the kind of convolution

   private:
    std::vector<std::size_t> channels_;  // of each source
};

}  // namespace sr3
