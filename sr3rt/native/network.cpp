#include "network.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sr3 {

Floats floats(std::size_t count) {
    constexpr std::size_t PAGE = std::size_t{2} << 20;
    const std::size_t bytes = rounded_up(count * sizeof(float), ALIGNMENT);
    void* memory = nullptr;
    if (posix_memalign(&memory, bytes < PAGE ? ALIGNMENT : PAGE, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= PAGE) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: what comes of it does not matter
#endif
    return Floats(static_cast<float*>(memory));
}

Linear::Linear(const float* by_output, const float* offsets, std::size_t outs, std::size_t ins)
    : inputs(ins), outputs(outs), weight(ins * outs), bias(offsets, offsets + outs) {
    for (std::size_t o = 0; o < outputs; ++o)
        for (std::size_t i = 0; i < inputs; ++i) weight[i * outputs + o] = by_output[o * inputs + i];
}

void Linear::operator()(const Kernels& kernels, const float* in, float* out) const {
    std::copy(bias.begin(), bias.end(), out);
    for (std::size_t i = 0; i < inputs; ++i) kernels.add_scaled(out, weight.data() + i * outputs, in[i], outputs);
}

std::vector<float> LevelEncoding::operator()(const Kernels& kernels, float level) const {
    const float gamma = level * level;  // in float32, as it was trained
    const float value = log_sigma ? std::log(std::max(1.0f - gamma, 1e-7f) / gamma) / 2 : level * scale;
    std::vector<float> features;
    for (const float frequency : frequencies) features.push_back(static_cast<float>(std::sin(static_cast<double>(value * frequency))));
    for (const float frequency : frequencies) features.push_back(static_cast<float>(std::cos(static_cast<double>(value * frequency))));
    for (std::size_t i = 0; i < layers.size(); ++i) {
        std::vector<float> next(layers[i].outputs);
        layers[i](kernels, features.data(), next.data());
        if (silu || i + 1 < layers.size()) kernels.silu(next.data(), next.size());
        features = std::move(next);
    }
    return features;
}

Network::Network(const Kernels& kernels, unsigned threads, std::size_t channels, LevelEncoding encoding)
    : kernels_(kernels), pool_(threads), channels_(channels), encoding_(std::move(encoding)) {}

const Register& Network::checked(int index) const {
    if (index < 0 || static_cast<std::size_t>(index) >= registers_.size())
        throw std::invalid_argument("there is no register " + std::to_string(index));
    return registers_[static_cast<std::size_t>(index)];
}

int Network::add(std::unique_ptr<Layer> layer, std::size_t channels, bool still) {
    check_open();
    layer->to = static_cast<int>(registers_.size());
    registers_.push_back({channels, rounded_up(channels, lanes()), false, still});
    const int to = layer->to;
    reads_.push_back(layer->from);
    layers_.push_back(std::move(layer));
    return to;
}

void Network::check_open() const {
    if (!layers_.empty() && layers_.back()->to < 0) throw std::invalid_argument("nothing follows the result");
}

void Network::add_last(std::unique_ptr<Layer> layer) {
    check_open();
    reads_.push_back(layer->from);
    layers_.push_back(std::move(layer));
}

int Network::joined_planes() { return add(sr3::joined_planes(rounded_up(2 * channels_, lanes())), 2 * channels_); }

int Network::unshuffled(int by) {
    if (by < 1 || by > 16) throw std::invalid_argument("unshuffled by " + std::to_string(by) + ", expected 1 to 16");
    const std::size_t channels = static_cast<std::size_t>(by) * by * channels_;
    return add(sr3::unshuffled(rounded_up(channels, lanes()), by), channels, true);
}

int Network::side_of(int mean) const {
    for (int side = 1; side <= 16; ++side)
        if (checked(mean).channels == static_cast<std::size_t>(side) * side * channels_) return side;
    throw std::invalid_argument("a mean of " + std::to_string(checked(mean).channels) + " channels, expected a square times the picture's");
}

int Network::to_bands(int mean, float detail) {
    return add(sr3::to_bands(rounded_up(7 * channels_, lanes()), mean, side_of(mean), detail), 7 * channels_);
}

int Network::convolution(ConvolutionOptions options, const float* weight, std::size_t outputs, std::size_t inputs, int side,
                         std::vector<float> bias, const Linear* level, int like) {
    std::size_t joined = 0;
    for (const int source : options.from) joined += checked(source).channels;
    if (options.from.empty() || options.from.size() > SOURCES)
        throw std::invalid_argument("a convolution reads 1 to " + std::to_string(SOURCES) + " registers");
    if (outputs == 0 || inputs == 0) throw std::invalid_argument("a weight without channels");
    if (joined != inputs)
        throw std::invalid_argument("a weight for " + std::to_string(inputs) + " channels, of registers with " + std::to_string(joined));
    if ((side != 1 && side != 3) || (options.stride != 1 && options.stride != 2) || (!bias.empty() && bias.size() != outputs))
        throw std::invalid_argument("convolutions are 1×1 or 3×3, of stride 1 or 2, with a bias for every output");
    if (options.add >= 0 && checked(options.add).channels != outputs)
        throw std::invalid_argument("a register with " + std::to_string(checked(options.add).channels) + " channels, added to " +
                                    std::to_string(outputs));
    const Norm& norm = options.norm;
    if (norm.groups != 0 && (norm.groups < 0 || joined % static_cast<std::size_t>(norm.groups) != 0 || norm.weight.size() != joined ||
                             norm.bias.size() != joined))
        throw std::invalid_argument("a norm of " + std::to_string(norm.groups) + " groups for " + std::to_string(joined) + " channels");
    if (norm.groups != 0)
        for (const int source : options.from) registers_[static_cast<std::size_t>(source)].normed = true;
    if (level != nullptr) {
        const std::size_t expected = options.scaled ? 2 * outputs : outputs;
        if (level->outputs != expected || level->inputs != encoding_.outputs())
            throw std::invalid_argument("a level of " + std::to_string(level->inputs) + " inputs and " + std::to_string(level->outputs) +
                                        " outputs, expected " + std::to_string(encoding_.outputs()) + " and " + std::to_string(expected));
        options.level = static_cast<int>(projections_.size());
        std::vector<float> padded = bias;
        padded.resize(rounded_up(outputs, 2 * lanes()), 0.0f);
        projections_.push_back({*level, std::move(padded), outputs, options.scaled});
    }
    const int added = options.add;
    const bool still_ones = std::all_of(options.from.begin(), options.from.end(), [this](int source) { return still(source); });
    const bool stays = level == nullptr && still_ones && (added < 0 || still(added));
    options.like = writer(like), options.added = writer(added);
    auto layer = sr3::convolution(kernels_, registers_, std::move(options), weight, outputs, side, std::move(bias));
    const int to = add(std::move(layer), outputs, stays);
    if (added >= 0) reads_.back().push_back(added);  // last, after the sources
    return to;
}

// The layer that wrote the register; null for none.
const Layer* Network::writer(int index) const {
    const auto wrote = [index](const auto& layer) { return index >= 0 && layer->to == index; };
    const auto found = std::find_if(layers_.begin(), layers_.end(), wrote);
    return found == layers_.end() ? nullptr : found->get();
}

int Network::attention(int from) {
    if (checked(from).channels % 3 != 0) throw std::invalid_argument("attention reads queries, keys and values of one width");
    const std::size_t channels = checked(from).channels / 3;
    return add(sr3::attention(kernels_, registers_, from), channels, still(from));
}

int Network::resampling(int from, Resample by) {
    const std::size_t channels = checked(from).channels;
    return add(sr3::resampling(registers_, from, by), channels, still(from));
}

void Network::result(int from) {
    if (checked(from).channels != channels_) throw std::invalid_argument("the result has not the picture's channels");
    add_last(sr3::result(from));
}

void Network::from_bands(int bands, int mean, int fine, float detail) {
    if (checked(bands).channels != 7 * channels_ || checked(fine).channels != 3 * channels_)
        throw std::invalid_argument("bands have 7 times the picture's channels, the details 3 times");
    add_last(sr3::from_bands(bands, mean, side_of(mean), fine, detail));
    reads_.back().push_back(mean);
}

// Scale and shift of each projection: for every picture first the scales of all channels, then the shifts.
std::vector<std::vector<float>> Network::levels(const Planar& planar) {
    std::vector<std::vector<float>> encoded(planar.count), levels(projections_.size());
    for (std::size_t n = 0; n < planar.count; ++n) {
        const bool again = n > 0 && planar.level[n] == planar.level[n - 1];
        encoded[n] = again ? encoded[n - 1] : encoding_(kernels_, planar.level[n]);
    }
    pool_.run(projections_.size(), [&](std::size_t i, unsigned) {
        const Projection& one = projections_[i];
        const std::size_t padded = one.bias.size();
        std::vector<float> made(one.linear.outputs);
        levels[i].assign(planar.count * 2 * padded, 0.0f);
        for (std::size_t n = 0; n < planar.count; ++n) {
            float *scale = levels[i].data() + 2 * n * padded, *shift = scale + padded;
            one.linear(kernels_, encoded[n].data(), made.data());
            for (std::size_t c = 0; c < one.outputs; ++c) {
                scale[c] = one.scaled ? 1 + made[c] : 1;
                shift[c] = one.scaled ? one.bias[c] * scale[c] + made[one.outputs + c] : one.bias[c] + made[c];
            }
        }
    });
    return levels;
}

void Network::forked() {
    new (&mutex_) std::mutex;
    kept_.valid.assign(kept_.slots, false);  // the other process may have been writing there
    pool_.forked();
}

// All, or one, which stays nearer: in a batch every layer would read what has left the caches since it was written.
std::size_t Network::together(std::size_t count, int height, int width) const {
    const auto [begin, end] = shared_span(extents(height, width));
    return begin < end ? count : 1;
}

// Large layers before those that are faster together, and after them, are run picture by picture too.
void Network::run(const Planar& planar) {
    const std::lock_guard guard(mutex_);
    const std::size_t some = together(planar.count, planar.height, planar.width);
    const Plan plan = this->plan(some, planar.height, planar.width);
    make_room(plan, planar);
    Planar all = planar;
    if (!plan.kept.empty()) {
        refresh(planar, plan);
        all.x = kept_.at(plan.kept.back(), 0);  // the caller's may change meanwhile
    }
    const std::vector<std::vector<float>> levels = this->levels(all);
    const auto [begin, end] = plan.together;
    for (std::size_t first = 0; first < all.count; first += some) {  // `some` divides the count
        const auto one_by_one = [&](Span layers) {
            for (std::size_t n = 0; n < some && layers.begin < layers.end; ++n) run_layers(all, plan, levels, {first + n, n, 1}, layers, false);
        };
        one_by_one({0, begin});
        run_layers(all, plan, levels, {first, 0, some}, plan.together, false);
        one_by_one({end, layers_.size()});
    }
}

float* Network::Kept::at(Part part, std::size_t slot) const { return memory.get() + slots * part.offset + slot * part.size; }

// Makes every slot that of its picture: moves what is there of the same x, and computes the rest.
void Network::refresh(const Planar& planar, const Plan& plan) {
    const Part x = plan.kept.back();
    const auto holds = [&](std::size_t slot, std::size_t n) {
        return kept_.valid[slot] && std::memcmp(kept_.at(x, slot), planar.x + n * x.size, x.size * sizeof(float)) == 0;
    };
    const auto find = [&](std::size_t n) {
        std::size_t slot = 0;
        while (slot < kept_.slots && !holds(slot, n)) ++slot;
        return slot;
    };
    std::vector<std::size_t> sources(planar.count);  // the slot that each picture's lies in, the number of slots for none
    for (std::size_t n = 0; n < planar.count; ++n) sources[n] = holds(n, n) ? n : find(n);
    move(plan, sources);
    Planar all = planar;
    all.x = kept_.at(x, 0);
    for (std::size_t n = 0; n < planar.count; ++n) {
        if (sources[n] < kept_.slots) continue;
        kept_.valid[n] = false;  // until it is done
        if (const std::size_t slot = find(n); slot < kept_.slots) {  // one before it had the same x
            for (const Part part : plan.kept) std::copy_n(kept_.at(part, slot), part.size, kept_.at(part, n));
        } else {
            std::copy_n(planar.x + n * x.size, x.size, kept_.at(x, n));
            run_layers(all, plan, {}, {n, 0, 1}, {0, layers_.size()}, true);
        }
        kept_.valid[n] = true;
    }
}

// Fills slot n from slot sources[n], where there is one. What no other slot needs is written over first; what is left then are rings of
// slots, each of which one slot's contents are put aside for.
void Network::move(const Plan& plan, const std::vector<std::size_t>& sources) {
    const std::size_t none = kept_.slots, aside = none + 1;
    std::vector<std::size_t> from = sources;
    Floats memory;
    while (true) {
        std::size_t ring = none;
        bool moved = false;
        for (std::size_t n = 0; n < from.size(); ++n) {
            if (from[n] == n || from[n] == none) continue;
            if (std::ranges::count(from, n) > 0) {
                ring = n;
                continue;
            }
            for (const Part part : plan.kept)
                std::copy_n(from[n] == aside ? memory.get() + part.offset : kept_.at(part, from[n]), part.size, kept_.at(part, n));
            from[n] = n, kept_.valid[n] = moved = true;
        }
        if (moved) continue;
        if (ring == none) return;
        if (!memory) memory = floats(plan.kept_size);
        for (const Part part : plan.kept) std::copy_n(kept_.at(part, ring), part.size, memory.get() + part.offset);
        std::ranges::replace(from, ring, aside);
    }
}

void Network::make_room(const Plan& plan, const Planar& planar) {
    if (plan.size > arena_size_) {
        arena_size_ = 0, arena_.reset();  // in this order: a process may be forked in between
        arena_ = floats(plan.size);
        arena_size_ = plan.size;
    }
    const bool same = kept_.height == planar.height && kept_.width == planar.width;
    if (plan.kept.empty() || (same && kept_.slots >= planar.count)) return;
    if (!same) kept_ = {}, kept_size_ = 0;
    Kept more{planar.count, planar.height, planar.width, floats(planar.count * plan.kept_size + SLACK), kept_.valid};
    more.valid.resize(more.slots, false);
    for (const Part part : plan.kept)
        if (kept_.slots > 0) std::copy_n(kept_.at(part, 0), kept_.slots * part.size, more.at(part, 0));
    kept_ = std::move(more);
    kept_size_ = kept_.slots * plan.kept_size;
}

std::vector<View> Network::views(const Plan& plan, const Some& some) const {
    std::vector<View> views(registers_.size());
    for (std::size_t i = 0; i < views.size(); ++i) {
        const Extent& extent = plan.extents[i];
        const Place& place = plan.registers[i];
        float* from = place.kept ? kept_.memory.get() : arena_.get();
        const std::size_t slots = place.kept ? kept_.slots : 1;
        double* sums = registers_[i].normed ? reinterpret_cast<double*>(from + slots * place.sums) : nullptr;
        View& view = views[i] = {from + slots * place.offset, extent.height, extent.width, registers_[i].padded, sums, extent.units};
        const std::size_t picture = place.kept ? some.first : place.lone ? 0 : some.place;
        view.data = place.absorbed ? nullptr : view.picture(picture);
        if (sums != nullptr) view.sums = view.picture_sums(picture);
    }
    return views;
}

// Of the layers those that depend on x alone, or the others.
void Network::run_layers(const Planar& all, const Plan& plan, const std::vector<std::vector<float>>& levels, const Some& some, Span layers,
                         bool still_ones) {
    const Planar planar = all.pictures(some.first, some.count, plan.result);
    const std::vector<View> views = this->views(plan, some);
    const Run run{kernels_, pool_, planar, views, levels, some.first, arena_.get() + plan.shared, arena_.get() + plan.own, plan.own_size};
    for (std::size_t i = layers.begin; i < layers.end; ++i) {
        const Layer& layer = *layers_[i];
        if (is_still(layer) != still_ones || (layer.to >= 0 && plan.registers[layer.to].absorbed)) continue;
        if (layer.to >= 0 && views[layer.to].sums != nullptr) {
            const View& view = views[layer.to];
            std::memset(view.sums, 0, planar.count * view.units * 2 * view.padded * sizeof(double));
        }
        layer.run(run);
    }
}

}  // namespace sr3
