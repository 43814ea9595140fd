#include "convolution.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace sr3 {

Convolution::Convolution(const Kernels& kernels, const std::vector<Register>& registers, ConvolutionOptions options,
                         std::size_t outputs, int side, std::vector<float> bias)
    : options_(std::move(options)), inputs_(0), outputs_(outputs), lanes_(kernels.lanes), word_(kernels.word), side_(side), bias_(std::move(bias)) {
    from = options_.from;
    for (const int source : from) {
        inputs_ += registers[source].padded;
        channels_.push_back(registers[source].channels);
    }
    padded_ = rounded_up(outputs, lanes_);
    bias_.resize(panels() * 2 * lanes_, 0.0f);
}

Floats Convolution::packed(const Kernels& kernels, const std::vector<Register>& registers, const float* weight) const {
    const std::size_t taps = static_cast<std::size_t>(side_) * side_, panel = 2 * kernels.lanes;
    std::size_t joined = 0;
    for (const int source : from) joined += registers[source].channels;
    Floats out = floats(panels() * inputs_ * taps * panel);
    float* to_lane = out.get();
    for (std::size_t first = 0; first < panels() * panel; first += panel) {
        std::size_t before = 0;  // channels of the sources before
        for (const int source : from) {
            const std::size_t channels = registers[source].channels;
            for (std::size_t c = 0; c < registers[source].padded; ++c)
                for (std::size_t tap = 0; tap < taps; ++tap)
                    for (std::size_t k = first; k < first + panel; ++k)
                        *to_lane++ = c < channels && k < outputs_ ? weight[(k * joined + before + c) * taps + tap] : 0.0f;
            before += channels;
        }
    }
    return out;
}

Floats Convolution::in_words(const Kernels& kernels, Floats rows, std::size_t count, std::size_t size) const {
    if (word_ == 1) return rows;
    Floats out = floats(count * words(inputs_) * size);
    for (std::size_t i = 0; i < count; ++i) kernels.pack(rows.get() + i * inputs_ * size, inputs_, size, out.get() + i * words(inputs_) * size);
    return out;
}

Extent Convolution::extent(const std::vector<Extent>& registers, int, int) const {
    const Extent& in = registers[from[0]];
    int height = in.height, width = in.width;
    if (options_.resample == Resample::up) height *= 2, width *= 2;
    if (options_.resample == Resample::down) height /= 2, width /= 2;
    if (height < 1 || width < 1) return {};
    height = (height - 1) / options_.stride + 1;
    width = (width - 1) / options_.stride + 1;
    return {height, width, units(height, width)};
}

void Convolution::find_norms(const Run& run, float* norms) const {
    const Norm& norm = options_.norm;
    if (norm.groups == 0) return;
    std::vector<double> sums, squares;
    const std::size_t joined = norm.weight.size(), size = joined / norm.groups;
    for (std::size_t n = 0; n < run.planar.count; ++n) {
        sums.assign(joined, 0), squares.assign(joined, 0);
        std::size_t first = 0;
        for (std::size_t s = 0; s < from.size(); first += channels_[s++]) {
            const View& view = run.views[from[s]];
            const double* unit = view.picture_sums(n);
            for (std::size_t u = 0; u < view.units; ++u, unit += 2 * view.padded)
                for (std::size_t c = 0; c < channels_[s]; ++c) {
                    sums[first + c] += unit[c];
                    squares[first + c] += unit[view.padded + c];
                }
        }
        float* scale = norms + 2 * n * inputs_;
        std::fill_n(scale, 2 * inputs_, 0.0f);
        const double values = static_cast<double>(size) * static_cast<double>(run.views[from[0]].pixels());
        std::size_t channel = 0;
        for (std::size_t s = 0, padded = 0; s < from.size(); padded += run.views[from[s++]].padded)
            for (std::size_t c = 0; c < channels_[s]; ++c, ++channel) {
                const std::size_t begin = channel / size * size;
                double mean = 0, square = 0;
                for (std::size_t i = begin; i < begin + size; ++i) mean += sums[i], square += squares[i];
                mean /= values;
                const double variance = std::max(0.0, square / values - mean * mean);
                const double factor = static_cast<double>(norm.weight[channel]) / std::sqrt(variance + norm.eps);
                scale[padded + c] = static_cast<float>(factor);
                scale[inputs_ + padded + c] = static_cast<float>(static_cast<double>(norm.bias[channel]) - mean * factor);
            }
    }
}

Input Convolution::input(const Run& run, std::size_t picture, const float* norms) const {
    Input input{};
    input.count = static_cast<int>(from.size());
    input.silu = options_.silu;
    input.resample = options_.resample;
    const View& first = run.views[from[0]];
    const bool up = options_.resample == Resample::up, down = options_.resample == Resample::down;
    input.height = up ? first.height * 2 : down ? first.height / 2 : first.height;
    input.width = up ? first.width * 2 : down ? first.width / 2 : first.width;
    input.source_width = first.width;
    const float* scale = options_.norm.groups == 0 ? nullptr : norms + 2 * picture * inputs_;
    for (int s = 0; s < input.count; ++s) {
        const View& view = run.views[from[s]];
        input.sources[s] = {view.picture(picture), view.padded, scale, scale == nullptr ? nullptr : scale + inputs_};
        if (scale != nullptr) scale += view.padded;
    }
    return input;
}

bool Convolution::pointwise() const {
    return side_ == 1 && options_.stride == 1 && options_.norm.groups == 0 && !options_.silu && options_.resample == Resample::none;
}

bool Convolution::only_sums() const {
    return pointwise() && options_.level < 0 && !options_.after && options_.add < 0 && options_.gain == 1;
}

void Convolution::gather(const Run& run, std::size_t picture, const Area& area, float* words, float* line) const {
    const Input in = input(run, picture, nullptr);
    const std::size_t size = area.columns * inputs_;
    for (int y = 0; y < area.rows; ++y) {
        run.kernels.fill(in, area.row + y, area.column, 1, area.columns, 0, inputs_, line);
        run.kernels.round(line, size, words + y * size / word_);
    }
}

void Convolution::sums_of(const Run& run, std::size_t picture, const Area& area, std::size_t panel, const float* words, float* sums) const {
    const std::size_t wide = 2 * lanes_, columns = area.columns;
    const float* weights = weights_.get() + panel * inputs_ / word_ * wide;
    if (words != nullptr) {
        run.kernels.multiply(area.rows * columns, inputs_ / word_, words, inputs_ / word_, weights, wide, {weights}, sums, wide, false);
        return;
    }
    for (std::size_t s = 0; s < from.size(); ++s) {
        const View& view = run.views[from[s]];
        for (int y = 0; y < area.rows; ++y) {
            const float* pixels = view.picture(picture) + (static_cast<std::size_t>(area.row + y) * view.width + area.column) * view.padded;
            run.kernels.multiply(columns, view.padded, pixels, view.padded, weights, wide, {pixels + view.width * view.padded},
                                 sums + y * columns * wide, wide, s > 0);
        }
        weights += view.padded * wide;
    }
}

Epilogue Convolution::epilogue(const Run& run, std::size_t picture, std::size_t panel) const {
    const View& to_view = run.views[to];
    const std::size_t channel = panel * 2 * lanes_;
    Epilogue end{};
    if (options_.level >= 0) {
        const float* level = run.levels[options_.level].data() + 2 * (run.first + picture) * bias_.size();
        end.scale = options_.scaled ? level + channel : nullptr;
        end.shift = level + bias_.size() + channel;
    } else {
        end.shift = bias_.data() + channel;
    }
    end.silu = options_.after;
    end.gain = options_.gain;
    end.out = to_view.picture(picture) + channel;
    const bool adds = options_.add >= 0 && run.views[options_.add].data != nullptr;
    end.add = adds ? run.views[options_.add].picture(picture) + channel : nullptr;
    end.pixel_stride = to_view.padded;
    end.row_stride = to_view.padded * to_view.width;
    end.add_pixel_stride = end.pixel_stride, end.add_row_stride = end.row_stride;
    end.vectors = static_cast<int>(std::min<std::size_t>(2, (padded_ - channel) / lanes_));
    end.sums = to_view.sums == nullptr ? nullptr : to_view.picture_sums(picture) + channel;
    end.sums_stride = to_view.padded;
    return end;
}

}  // namespace sr3
