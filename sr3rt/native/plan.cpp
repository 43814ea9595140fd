// Where everything lies in a run of a network, and in which order pictures go through its layers.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "network.hpp"

namespace sr3 {
namespace {

[[noreturn]] void misfit(int height, int width) {
    throw std::invalid_argument("the network's registers do not fit one another at " + std::to_string(height) + "×" +
                                std::to_string(width) + ": its stride does not divide that");
}

}  // namespace

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

// Of every register.
std::vector<Extent> Network::extents(int height, int width) const {
    std::vector<Extent> extents(registers_.size());
    const auto same = [&](int a, int b) { return extents[a].height == extents[b].height && extents[a].width == extents[b].width; };
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        const Layer& layer = *layers_[i];
        for (const int source : layer.from)
            if (!same(source, layer.from[0])) misfit(height, width);
        if (layer.to < 0) continue;
        const Extent& extent = extents[layer.to] = layer.extent(extents, height, width);
        if (extent.height < 1 || extent.width < 1) misfit(height, width);
        const bool adds = reads_[i].size() > layer.from.size();
        if (adds && !same(reads_[i].back(), layer.to)) misfit(height, width);
        if (registers_[layer.to].normed && extent.units == 0) throw std::invalid_argument("a norm reads what no convolution wrote");
    }
    return extents;
}

// From the first layer that makes several pictures faster together to the last.
Network::Span Network::shared_span(const std::vector<Extent>& extents) const {
    Span span{layers_.size(), layers_.size()};
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        const Layer& layer = *layers_[i];
        if (layer.to < 0 || still(layer.to) || !layer.shares(extents, pool_.threads())) continue;
        span = {std::min(span.begin, i), i + 1};
    }
    return span;
}

Network::Plan Network::plan(std::size_t count, int height, int width) const {
    Plan plan{};
    plan.extents = extents(height, width);
    const Extent made = layers_.empty() ? Extent{} : layers_.back()->extent(plan.extents, height, width);
    plan.result = channels_ * static_cast<std::size_t>(made.height) * made.width;
    plan.together = count == 1 ? Span{0, layers_.size()} : shared_span(plan.extents);
    plan.registers = places(plan.extents, plan.together);
    Scratch most;
    std::size_t registers = 0;
    for (const bool first : {true, false}) {  // what depends on x alone comes before the rest, and leaves nothing in the arena
        Arena arena;
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            arena.release(i);
            for (std::size_t index = 0; index < registers_.size(); ++index)
                if (plan.registers[index].from == i && still(index) == first) put(plan, index, count, arena);
            const bool alone = is_still(*layers_[i]) || i < plan.together.begin || i >= plan.together.end;
            const Scratch need = layers_[i]->scratch(plan.extents, alone ? 1 : count);
            most.shared = std::max(most.shared, need.shared);
            most.own = std::max(most.own, need.own);
        }
        registers = std::max(registers, arena.size());
    }
    if (!plan.kept.empty()) keep(plan, channels_ * static_cast<std::size_t>(height) * width);  // x, the last
    plan.own_size = plane_of(most.own);
    plan.shared = registers;
    plan.own = plan.shared + rounded_up(most.shared, 16);
    plan.size = plan.own + plan.own_size * pool_.threads() + SLACK;
    return plan;
}

// Of every register, whether the one layer that reads it makes what it needs of it, where that depends on the same.
std::vector<bool> Network::absorbed(const std::vector<Extent>& extents) const {
    std::vector<bool> absorbed(registers_.size());
    std::vector<int> readers(registers_.size());
    for (const std::vector<int>& reads : reads_)
        for (const int read : reads) ++readers[read];
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        if (!layers_[i]->absorbs(extents)) continue;
        const int added = reads_[i].back();
        absorbed[added] = readers[added] == 1 && still(added) == is_still(*layers_[i]);
    }
    return absorbed;
}

// Which layers need each register, and whether they do so picture by picture.
std::vector<Network::Place> Network::places(const std::vector<Extent>& extents, Span together) const {
    std::vector<Place> places(registers_.size());
    const std::vector<bool> absorbed = this->absorbed(extents);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        const int to = layers_[i]->to;
        if (to >= 0) places[to].from = places[to].until = i, places[to].absorbed = absorbed[to];
        const auto need = [&](int read) {
            places[read].until = i;
            if (!is_still(*layers_[i])) places[read].kept = still(read);
        };
        for (const int read : reads_[i]) {
            need(read);
            if (absorbed[read]) std::ranges::for_each(writer(read)->from, need);
        }
    }
    for (std::size_t index = 0; index < places.size(); ++index) {
        Place& place = places[index];
        place.lone = !place.kept && (still(index) || place.until < together.begin || place.from >= together.end);
        if (place.lone || still(index)) continue;
        if (place.from < together.begin) place.from = 0;  // a picture writes it while another's others are still to be made
        if (place.until >= together.end) place.until = layers_.size();
    }
    return places;
}

// Finds room for a register and for its sums.
void Network::put(Plan& plan, std::size_t index, std::size_t count, Arena& arena) const {
    Place& place = plan.registers[index];
    if (place.absorbed) return;
    const Extent& extent = plan.extents[index];
    const Register& one = registers_[index];
    const std::size_t size = static_cast<std::size_t>(extent.height) * extent.width * one.padded, sums = extent.units * 4 * one.padded;
    if (place.kept) {
        place.offset = keep(plan, size);
        if (one.normed) place.sums = keep(plan, sums);
        return;
    }
    const std::size_t pictures = place.lone ? 1 : count;
    place.offset = arena.take(rounded_up(pictures * size + SLACK, 16), place.until);
    if (one.normed) place.sums = arena.take(rounded_up(pictures * sums, 16), place.until);
}

// So many floats more in each slot of Kept. Returns those before them.
std::size_t Network::keep(Plan& plan, std::size_t size) {
    plan.kept.push_back({plan.kept_size, size});
    plan.kept_size += size;
    return plan.kept.back().offset;
}

Extent Network::result_extent(int height, int width) const {
    return layers_.empty() || layers_.back()->to >= 0 ? Extent{} : layers_.back()->extent(extents(height, width), height, width);
}

std::size_t Network::memory_of(std::size_t count, int height, int width) const {
    const Plan plan = this->plan(together(count, height, width), height, width);
    const std::size_t arena = arena_size_, kept = kept_size_, keeps = count * plan.kept_size;
    const std::size_t moved = count > 1 ? plan.kept_size : 0;  // one picture's, put aside where they change places; or a copy of all to grow
    return ((plan.size > arena ? plan.size - arena : 0) + (keeps > kept ? keeps : moved)) * sizeof(float);
}

}  // namespace sr3
