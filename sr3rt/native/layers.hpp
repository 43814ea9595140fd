// The layers of a network. A layer is built once, with its weights packed, and then only read; what a run needs lies in the `Run`.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace sr3 {

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

// Uninitialised; what is large lies in large pages, if there are any to be had. Raises std::bad_alloc.
Floats floats(std::size_t count);

// What a register holds of every picture: `channels` of them, padded to whole vectors.
struct Register {
    std::size_t channels, padded;
    bool normed;  // a later layer needs the sums of its channels
    bool still;   // it depends on x alone
};

// A register in a run. Sums: for each picture and unit (a part of the picture) the channels' sums, then their sums of squares.
struct View {
    float* data;  // null: its reader makes what it needs of it
    int height, width;
    std::size_t padded;
    double* sums;
    std::size_t units;

    std::size_t pixels() const { return static_cast<std::size_t>(height) * width; }
    float* picture(std::size_t n) const { return data + n * pixels() * padded; }
    double* picture_sums(std::size_t n) const { return sums + n * units * 2 * padded; }
};

// The planar arrays that a run is given: pictures of `channels` × height × width, and the levels.
struct Planar {
    const float* x;
    const float* y;
    const float* level;
    float* out;
    std::size_t channels, count;
    int height, width;

    // `some` from picture `first` on, whose results have so many floats each.
    Planar pictures(std::size_t first, std::size_t some, std::size_t result) const {
        const std::size_t before = first * channels * static_cast<std::size_t>(height) * width;
        return {x + before, y + before, level + first, out + first * result, channels, some, height, width};
    }
};

// One run of a network: its registers, and memory that layers may use while they run.
struct Run {
    const Kernels& kernels;
    Pool& pool;
    const Planar& planar;
    const std::vector<View>& views;
    const std::vector<std::vector<float>>& levels;  // of each layer with a level: scale and shift of every picture, channel after channel
    std::size_t first;  // of those pictures: the first of this run
    float* shared;
    float* own;  // of each thread, `own_size` floats
    std::size_t own_size;
};

// Height and width of a register, and the units of its sums.
struct Extent {
    int height, width;
    std::size_t units;
};

// Floats that a layer needs while it runs: in common, and of each thread.
struct Scratch {
    std::size_t shared = 0, own = 0;
};

class Layer {
   public:
    std::vector<int> from;
    int to = -1;

    virtual ~Layer() = default;
    virtual Extent extent(const std::vector<Extent>& registers, int height, int width) const = 0;
    virtual Scratch scratch(const std::vector<Extent>& registers, std::size_t count) const = 0;
    // Whether so many threads make pictures faster together than one by one.
    virtual bool shares(const std::vector<Extent>&, std::size_t) const { return false; }
    // Whether it makes what it adds itself, so that the layer which would write that register need not run: then its view has no data.
    virtual bool absorbs(const std::vector<Extent>&) const { return false; }
    virtual void run(const Run&) const = 0;
};

struct Norm {
    int groups = 0;
    double eps = 0;
    std::vector<float> weight, bias;  // of the joined channels, unpadded
};

// What a convolution is, but for its weights and sources.
struct ConvolutionOptions {
    std::vector<int> from;
    int add = -1;  // register, or none
    int stride = 1;
    bool silu = false, after = false;
    Resample resample = Resample::none;
    float gain = 1;
    Norm norm;
    int level = -1;       // index into Run::levels, or none
    bool scaled = false;  // the level scales too
    const Layer* added = nullptr;  // what writes `add`
    const Layer* like = nullptr;  // a convolution of the same weight, or none: if it reads as many channels, it and this one have it in common
};

// weight: (outputs, joined inputs, side, side), side 1 or 3. bias: `outputs` long, or empty.
std::unique_ptr<Layer> convolution(const Kernels&, const std::vector<Register>&, ConvolutionOptions, const float* weight,
                                   std::size_t outputs, int side, std::vector<float> bias);

std::unique_ptr<Layer> attention(const Kernels&, const std::vector<Register>&, int from);
std::unique_ptr<Layer> resampling(const std::vector<Register>&, int from, Resample);

// x and y as one register of their channels.
std::unique_ptr<Layer> joined_planes(std::size_t padded);
// The register as the run's result.
std::unique_ptr<Layer> result(int from);

// x with every `by`×`by` of a channel put into channels, as pixel_unshuffle does.
std::unique_ptr<Layer> unshuffled(std::size_t padded, int by);
// The bands of nets/compact.py: the register that the network sees, and the result from what it makes.
// mean: of side² times the picture's channels, what is added to x.
std::unique_ptr<Layer> to_bands(std::size_t padded, int mean, int side, float detail);
std::unique_ptr<Layer> from_bands(int bands, int mean, int side, int fine, float detail);

}  // namespace sr3
