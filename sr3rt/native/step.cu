// One refinement step on a GPU, for slots that run at their own place in tables of their own. What a step does is decided by device
// memory alone, so that one captured graph (levels, network, step, next) serves every step of every sampler and request:
//
//     levels<<<1, slots>>>        the noise level of each slot's row, for the network
//     ...                         the network: x, y, level -> net
//     step<<<(blocks, slots)>>>   x0 = clip(p y + q net), y <- a y + b x0 + c x0_previous + s z
//     next<<<1, slots>>>          each slot goes to its next row
//
// Arrays are float32 (slots, channels, pixels), C-contiguous; the arithmetic is step.hpp's, and so are the bits. An idle slot, which has
// no rows left, keeps what it holds.

#include "step.hpp"

namespace sr3 {

// A slot, as it lies in device memory.
struct Slot {
    std::uint64_t seed;
    const Row* table;      // null where there are no rows
    std::uint32_t rows;    // of the table
    std::uint32_t row;     // the next to do, from 0
    std::uint32_t broken;  // step, from 1, in which a value first was NaN or infinite; 0: none
    std::uint32_t top, left;  // the place of the slot's corner in its picture
    std::uint32_t unused;
};

constexpr float IDLE_LEVEL = 1.0f;  // finite in every network

SR3_FN bool busy(const Slot& slot) { return slot.row < slot.rows; }

// net (slots): what the network is told.
extern "C" __global__ void sr3_levels(float* level, const Slot* slots, std::uint32_t count) {
    const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) level[i] = busy(slots[i]) ? slots[i].table[slots[i].row].level : IDLE_LEVEL;
}

// y_T of slot `which`, when a picture joins.
extern "C" __global__ void sr3_start(float* y, const Slot* slots, std::uint32_t which, std::uint32_t channels, std::uint32_t height,
                                     std::uint32_t width) {
    const std::uint32_t plane = height * width;
    const std::uint32_t pixel = blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel >= plane) return;
    const Slot slot = slots[which];
    const Key key = key_of(slot.seed);
    float* const out = y + std::size_t{which} * channels * plane + pixel;
    for (std::uint32_t channel = 0; channel < channels; channel += 4) {
        const Normals z = normals_at(slot.left + pixel % width, slot.top + pixel / width, 0xFFFFFFFFu, channel / 4, key);
        const float four[4] = {z.z0, z.z1, z.z2, z.z3};
        for (std::uint32_t k = 0; k < 4 && channel + k < channels; ++k) out[std::size_t{channel + k} * plane] = four[k];
    }
}

// A thread does all channels of a pixel, whose normals come by fours.
extern "C" __global__ void sr3_step(float* y, const float* net, float* x0, Slot* slots, std::uint32_t channels, std::uint32_t height,
                                    std::uint32_t width) {
    const std::uint32_t plane = height * width;
    const std::uint32_t pixel = blockIdx.x * blockDim.x + threadIdx.x;
    const Slot slot = slots[blockIdx.y];
    if (pixel >= plane || !busy(slot)) return;
    const Row row = slot.table[slot.row];
    const Key key = key_of(slot.seed);
    const std::size_t corner = std::size_t{blockIdx.y} * channels * plane + pixel;
    std::uint32_t seen = 0;
    for (std::uint32_t channel = 0; channel < channels; channel += 4) {
        Normals z{};
        if (row.s != 0.0f) z = normals_at(slot.left + pixel % width, slot.top + pixel / width, slot.row, channel / 4, key);
        const float four[4] = {z.z0, z.z1, z.z2, z.z3};
        for (std::uint32_t k = 0; k < 4 && channel + k < channels; ++k) {
            const std::size_t at = corner + std::size_t{channel + k} * plane;
            const float prediction = predicted(row, y[at], net[at]);
            const float x0_new = clipped(prediction);
            float next = carried(row, y[at], x0_new);
            if (row.c != 0.0f) next = add_product(next, row.c, x0[at]);
            if (row.s != 0.0f) next = add_product(next, row.s, four[k]);
            seen |= not_finite(prediction) | not_finite(next);
            y[at] = next;
            x0[at] = x0_new;
        }
    }
    if ((seen & 1u << 31) != 0) atomicCAS(&slots[blockIdx.y].broken, 0u, slot.row + 1);  // the first stays
}

// After sr3_step, which every thread must have done with the row.
extern "C" __global__ void sr3_next(Slot* slots, std::uint32_t count) {
    const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && busy(slots[i])) ++slots[i].row;
}

}  // namespace sr3
