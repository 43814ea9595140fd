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
namespace {

constexpr std::size_t SLACK = 64;  // floats that may be read, not used, beyond a register's end

// The first gap between the taken parts of the arena that `size` fits into.
class Arena {
   public:
    std::size_t take(std::size_t size, std::size_t until) {
        std::size_t at = 0;
        for (const Part& part : parts_) {
            if (part.begin >= at + size) break;
            at = std::max(at, part.end);
        }
        const Part made{at, at + size, until};
        parts_.insert(std::upper_bound(parts_.begin(), parts_.end(), made, [](const Part& a, const Part& b) { return a.begin < b.begin; }),
                      made);
        size_ = std::max(size_, made.end);
        return at;
    }

    // Frees what is not needed from layer `now` on.
    void release(std::size_t now) {
        std::erase_if(parts_, [&](const Part& part) { return part.until < now; });
    }

    std::size_t size() const { return size_; }

   private:
    struct Part {
        std::size_t begin, end, until;
    };
    std::vector<Part> parts_;  // by begin
    std::size_t size_ = 0;
};

[[noreturn]] void misfit(int height, int width) {
    throw std::invalid_argument("the network's registers do not fit one another at " + std::to_string(height) + "×" +
                                std::to_string(width) + ": its stride does not divide that");
}

}  // namespace

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
    layer->to = static_cast<int>(registers_.size());
    registers_.push_back({channels, rounded_up(channels, lanes()), false, still});
    const int to = layer->to;
    reads_.push_back(layer->from);
    layers_.push_back(std::move(layer));
    return to;
}

void Network::add_last(std::unique_ptr<Layer> layer) {
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
    const auto wrote = [like](const auto& layer) { return like >= 0 && layer->to == like; };
    if (const auto found = std::find_if(layers_.begin(), layers_.end(), wrote); found != layers_.end()) options.like = found->get();
    auto layer = sr3::convolution(kernels_, registers_, std::move(options), weight, outputs, side, std::move(bias));
    const int to = add(std::move(layer), outputs, stays);
    if (added >= 0) reads_.back().push_back(added);  // last, after the sources
    return to;
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

std::size_t Network::register_size(std::size_t index, const Extent& extent, std::size_t count) const {
    const Register& one = registers_[index];
    return rounded_up(count * static_cast<std::size_t>(extent.height) * extent.width * one.padded + SLACK, 16);
}

Network::Plan Network::plan(std::size_t count, int height, int width) const {
    Plan plan{};
    std::vector<std::size_t> last(registers_.size(), 0);
    plan.kept.resize(registers_.size());
    for (std::size_t i = 0; i < layers_.size(); ++i)
        for (const int read : reads_[i]) {
            last[read] = i;
            if (layers_[i]->to < 0 || !still(layers_[i]->to)) plan.kept[read] = still(read);
        }
    const auto place = [&](std::size_t index, std::size_t size, Arena& arena) {
        if (!plan.kept[index]) return arena.take(size, last[index]);
        plan.kept_size += size;
        return plan.kept_size - size;
    };
    Arena arena;
    Scratch most;
    plan.offsets.resize(registers_.size()), plan.sums.resize(registers_.size()), plan.extents.resize(registers_.size());
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        const Layer& layer = *layers_[i];
        arena.release(i);
        const auto same = [&](int a, const Extent& b) { return plan.extents[a].height == b.height && plan.extents[a].width == b.width; };
        for (const int source : layer.from)
            if (!same(source, plan.extents[layer.from[0]])) misfit(height, width);
        if (layer.to >= 0) {
            const std::size_t to = static_cast<std::size_t>(layer.to);
            const Extent extent = plan.extents[to] = layer.extent(plan.extents, height, width);
            if (extent.height < 1 || extent.width < 1) misfit(height, width);
            const bool adds = reads_[i].size() > layer.from.size();
            if (adds && !same(reads_[i].back(), extent)) misfit(height, width);
            plan.offsets[to] = place(to, register_size(to, extent, count), arena);
            if (registers_[to].normed) {
                if (extent.units == 0) throw std::invalid_argument("a norm reads what no convolution wrote");
                plan.sums[to] = place(to, rounded_up(count * extent.units * 4 * registers_[to].padded, 16), arena);
            }
        }
        const Scratch need = layer.scratch(plan.extents, count);
        most.shared = std::max(most.shared, need.shared);
        most.own = std::max(most.own, need.own);
    }
    plan.own_size = plane_of(most.own);
    plan.shared = arena.size();
    plan.own = plan.shared + rounded_up(most.shared, 16);
    plan.size = plan.own + plan.own_size * pool_.threads() + SLACK;
    return plan;
}

Extent Network::result_extent(int height, int width) const {
    const Plan made = plan(1, height, width);
    return layers_.empty() || layers_.back()->to >= 0 ? Extent{} : layers_.back()->extent(made.extents, height, width);
}

// Floats of so many pictures.
std::size_t Network::planes(std::size_t count, int height, int width) const {
    return rounded_up(count * channels_ * static_cast<std::size_t>(height) * width, 16);
}

std::size_t Network::memory_of(std::size_t count, int height, int width) const {
    const std::size_t some = together(count, height, width), arena = arena_size_, kept = kept_size_;
    const Plan plan = this->plan(some, height, width);
    const std::size_t keeps = plan.kept_size == 0 ? 0 : count / some * (planes(some, height, width) + plan.kept_size);
    return ((plan.size > arena ? plan.size - arena : 0) + (keeps > kept ? keeps - kept : 0)) * sizeof(float);
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
    for (Kept::Group& group : kept_.groups) group.valid = false;  // the other process may have been writing it
    pool_.forked();
}

// All, or one, which stays nearer: in a batch every layer would read what has left the caches since it was written.
std::size_t Network::together(std::size_t count, int height, int width) const {
    const Plan one = plan(1, height, width);
    const auto shares = [&](const auto& layer) { return layer->to >= 0 && layer->shares(one.extents, pool_.threads()); };
    return std::any_of(layers_.begin(), layers_.end(), shares) ? count : 1;
}

void Network::run(const Planar& planar) {
    const std::lock_guard guard(mutex_);
    const std::size_t some = together(planar.count, planar.height, planar.width);
    const Plan plan = this->plan(some, planar.height, planar.width);
    const Extent made = layers_.back()->extent(plan.extents, planar.height, planar.width);
    const auto size_of = [&](int height, int width) { return planar.channels * static_cast<std::size_t>(height) * width; };
    const std::size_t size = size_of(planar.height, planar.width), out_size = size_of(made.height, made.width);
    make_room(plan, planar, some);
    std::vector<Planar> parts;
    for (std::size_t first = 0; first < planar.count; first += some) {  // `some` divides the count
        Planar part = planar;
        part.x += first * size, part.y += first * size, part.out += first * out_size, part.level += first, part.count = some;
        parts.push_back(part);
    }
    if (plan.kept_size != 0) return run_kept(parts, plan);
    for (const Planar& part : parts) run_some(part, plan, nullptr, false);
}

std::size_t Network::Kept::find(const float* x, std::size_t bytes) const {
    const auto same = [&](const Group& group) { return group.valid && std::memcmp(group.memory.get(), x, bytes) == 0; };
    return static_cast<std::size_t>(std::find_if(groups.begin(), groups.end(), same) - groups.begin());
}

void Network::run_kept(const std::vector<Planar>& parts, const Plan& plan) {
    std::vector<Kept::Group>& groups = kept_.groups;
    const std::size_t bytes = parts[0].count * channels_ * static_cast<std::size_t>(kept_.height) * kept_.width * sizeof(float);
    const std::size_t registers = planes(kept_.pictures, kept_.height, kept_.width);
    std::vector<std::size_t> found;
    std::vector<bool> needed(groups.size() + 1, false);
    for (const Planar& part : parts) {
        found.push_back(kept_.find(part.x, bytes));
        needed[found.back()] = true;
    }
    for (std::size_t i = 0; i < parts.size(); ++i) {
        Planar part = parts[i];
        std::size_t index = found[i] < groups.size() ? found[i] : kept_.find(part.x, bytes);  // one before it may have had the same x
        const bool again = index < groups.size();
        if (!again) index = static_cast<std::size_t>(std::find(needed.begin(), needed.end(), false) - needed.begin());
        needed[index] = true;
        Kept::Group& group = groups[index];
        group.valid = again;  // not while it is being made
        if (!again) std::memcpy(group.memory.get(), part.x, bytes);
        part.x = group.memory.get();  // the caller's may change meanwhile
        run_some(part, plan, group.memory.get() + registers, again);
        group.valid = true;
    }
}

void Network::make_room(const Plan& plan, const Planar& planar, std::size_t some) {
    if (plan.size > arena_size_) {
        arena_.reset(), arena_size_ = 0;
        arena_ = floats(plan.size);
        arena_size_ = plan.size;
    }
    if (plan.kept_size == 0) return;
    Kept& kept = kept_;
    if (kept.pictures != some || kept.height != planar.height || kept.width != planar.width) {
        kept.groups.clear(), kept_size_ = 0;
        kept.pictures = some, kept.height = planar.height, kept.width = planar.width;
    }
    const std::size_t size = planes(some, planar.height, planar.width) + plan.kept_size;
    for (; kept.groups.size() < planar.count / some; kept_size_ += size) kept.groups.push_back({floats(size)});
}

void Network::run_some(const Planar& planar, const Plan& plan, float* kept, bool again) {
    std::vector<View> views(registers_.size());
    for (std::size_t i = 0; i < views.size(); ++i) {
        const Extent& extent = plan.extents[i];
        float* from = plan.kept[i] ? kept : arena_.get();
        double* sums = registers_[i].normed ? reinterpret_cast<double*>(from + plan.sums[i]) : nullptr;
        views[i] = {from + plan.offsets[i], extent.height, extent.width, registers_[i].padded, sums, extent.units};
    }
    const std::vector<std::vector<float>> made = levels(planar);
    const Run run{kernels_, pool_, planar, views, made, arena_.get() + plan.shared, arena_.get() + plan.own, plan.own_size};
    for (const auto& layer : layers_) {
        if (again && layer->to >= 0 && still(layer->to)) continue;
        if (layer->to >= 0 && views[layer->to].sums != nullptr) {
            const View& view = views[layer->to];
            std::memset(view.sums, 0, planar.count * view.units * 2 * view.padded * sizeof(double));
        }
        layer->run(run);
    }
}

}  // namespace sr3
