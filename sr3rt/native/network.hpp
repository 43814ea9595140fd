// A network as a list of layers over registers: built once, then run on any number of pictures of any size.

#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "layers.hpp"

namespace sr3 {

constexpr std::size_t SLACK = 64;  // floats that may be read, not used, beyond a register's end

class Arena;  // plan.cpp

// One linear layer, its weights turned so that an input's are side by side.
struct Linear {
    std::size_t inputs, outputs;
    std::vector<float> weight, bias;  // weight[input][output]

    Linear(const float* weight, const float* bias, std::size_t outputs, std::size_t inputs);
    void operator()(const Kernels&, const float* in, float* out) const;
};

// What the noise level becomes: v = scale·level, or ½·ln((1-γ)/γ); sines and cosines of v·frequencies; linear layers with SiLU between.
struct LevelEncoding {
    bool log_sigma = false, silu = false;
    float scale = 1;
    std::vector<float> frequencies;
    std::vector<Linear> layers;

    std::size_t outputs() const { return layers.empty() ? 2 * frequencies.size() : layers.back().outputs; }
    std::vector<float> operator()(const Kernels&, float level) const;
};

class Network {
   public:
    Network(const Kernels&, unsigned threads, std::size_t channels, LevelEncoding);

    // Each adds a layer and returns the register that it writes. Raise std::invalid_argument when they do not fit.
    int joined_planes();  // x and y
    int unshuffled(int by);  // x
    int to_bands(int mean, float detail);  // mean: a register of a square times the channels, what is added to x
    // like: what an earlier convolution of the same weight wrote, or -1.
    int convolution(ConvolutionOptions, const float* weight, std::size_t outputs, std::size_t inputs, int side, std::vector<float> bias,
                    const Linear* level, int like = -1);
    int attention(int from);
    int resampling(int from, Resample by);
    void result(int from);
    void from_bands(int bands, int mean, int fine, float detail);

    // To be called first in a process that was forked: it has neither the network's threads nor the one that may have been in `run`.
    void forked();

    // Safe to call from several threads: one runs at a time, with all of the network's threads. What depends on x alone is kept of each
    // picture until the next run, which computes it only of those whose x was not there, wherever in the batch.
    void run(const Planar&);

    std::size_t channels() const { return channels_; }
    const Kernels& kernels() const { return kernels_; }
    Extent result_extent(int height, int width) const;  // 0×0 where there is no result
    std::size_t memory_of(std::size_t count, int height, int width) const;  // bytes that such a run takes beyond what is held already

   private:
    struct Projection {
        Linear linear;
        std::vector<float> bias;  // of the convolution, padded
        std::size_t outputs;
        bool scaled;
    };
    // Layers [begin, end).
    struct Span {
        std::size_t begin, end;
    };
    // Where a register lies, and its sums: offsets in floats, into the arena or, kept, into a slot of Kept. Layers [from, until] need it.
    struct Place {
        std::size_t from, until, offset, sums;
        bool absorbed;    // it lies nowhere: the layer that reads it makes what it needs of it
        bool kept, lone;  // lone: with room for one picture, as only layers use it that are run picture by picture
    };
    // So many floats of each slot of Kept, and how many are before them.
    struct Part {
        std::size_t offset, size;
    };
    struct Plan {
        std::vector<Extent> extents;
        std::vector<Place> registers;
        Span together;  // layers that are run with all pictures at once
        std::vector<Part> kept;
        std::size_t shared, own, own_size, size, kept_size, result;  // result: floats of a picture's
    };
    // What depends on x alone: slot n has it of the n-th picture. A part of all slots lies together, as a run's views have pictures.
    struct Kept {
        std::size_t slots = 0;
        int height = 0, width = 0;
        Floats memory;
        std::vector<bool> valid;  // of each slot

        float* at(Part, std::size_t slot) const;
    };
    // `count` pictures from `first` on, which begin at the `place`-th of those that the arena has room for.
    struct Some {
        std::size_t first, place, count;
    };

    int add(std::unique_ptr<Layer>, std::size_t channels, bool still = false);
    bool still(std::size_t index) const { return registers_[index].still; }
    bool is_still(const Layer& layer) const { return layer.to >= 0 && still(layer.to); }
    void add_last(std::unique_ptr<Layer>);
    const Register& checked(int index) const;
    const Layer* writer(int index) const;
    int side_of(int mean) const;  // of the squares that its channels hold
    std::size_t lanes() const { return static_cast<std::size_t>(kernels_.lanes); }
    std::vector<Extent> extents(int height, int width) const;
    Span shared_span(const std::vector<Extent>&) const;
    void put(Plan&, std::size_t index, std::size_t count, Arena&) const;
    std::size_t together(std::size_t count, int height, int width) const;  // pictures that are run at a time
    std::vector<Place> places(const std::vector<Extent>&, Span together) const;
    std::vector<bool> absorbed(const std::vector<Extent>&) const;
    static std::size_t keep(Plan&, std::size_t size);
    void make_room(const Plan&, const Planar&);
    void refresh(const Planar&, const Plan&);
    void move(const Plan&, const std::vector<std::size_t>& sources);
    void check_open() const;  // whether layers may still be added
    std::vector<View> views(const Plan&, const Some&) const;
    void run_layers(const Planar& all, const Plan&, const std::vector<std::vector<float>>& levels, const Some&, Span, bool still_ones);
    Plan plan(std::size_t count, int height, int width) const;
    std::vector<std::vector<float>> levels(const Planar&);

    const Kernels& kernels_;
    Pool pool_;
    std::size_t channels_;
    LevelEncoding encoding_;
    std::vector<Register> registers_;
    std::vector<std::unique_ptr<Layer>> layers_;
    std::vector<std::vector<int>> reads_;  // of each layer, the register added included
    std::vector<Projection> projections_;
    std::mutex mutex_;  // guards the rest, and the pool
    Floats arena_;
    Kept kept_;
    std::atomic<std::size_t> arena_size_{0}, kept_size_{0};
};

}  // namespace sr3
