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

// What a thread does: neighbouring pixels, so that what any pixel costs is paid once for all of them, and memory is moved by 16 bytes.
// Where planes are no multiples of as many, they are done one after another.
constexpr std::uint32_t TOGETHER = 4;

template <std::uint32_t N>
struct alignas(N * sizeof(float)) Values {
    float at[N];
};

template <std::uint32_t N>
SR3_FN Values<N>& values(float* first) {
    return *reinterpret_cast<Values<N>*>(first);
}

template <std::uint32_t N>
SR3_FN const Values<N>& values(const float* first) {
    return *reinterpret_cast<const Values<N>*>(first);
}

// z[k] are the normals of channel 4 group + k, for N pixels from `first` on.
template <std::uint32_t N>
SR3_FN void normals(Values<N> (&z)[4], const Slot& slot, std::uint32_t first, std::uint32_t width, std::uint32_t step, std::uint32_t group) {
    std::uint32_t row = first / width, column = first % width;
    for (std::uint32_t j = 0; j < N; ++j) {
        const Normals one = normals_at(slot.left + column, slot.top + row, step, group, key_of(slot.seed));
        z[0].at[j] = one.z0, z[1].at[j] = one.z1, z[2].at[j] = one.z2, z[3].at[j] = one.z3;
        if (++column == width) column = 0, ++row;
    }
}

// Arrays from here on begin at the first pixel of the first channel.
template <std::uint32_t N>
SR3_FN void started(float* y, const Slot& slot, std::uint32_t first, std::uint32_t channels, std::uint32_t plane, std::uint32_t width) {
    for (std::uint32_t channel = 0; channel < channels; channel += 4) {
        Values<N> z[4];
        normals(z, slot, first, width, 0xFFFFFFFFu, channel / 4);
        for (std::uint32_t k = 0; k < 4 && channel + k < channels; ++k) values<N>(y + std::size_t{channel + k} * plane) = z[k];
    }
}

// Returns what `not_finite` says of all values.
template <std::uint32_t N>
SR3_FN std::uint32_t stepped(float* y, const float* net, float* x0, const Slot& slot, const Row& row, std::uint32_t first,
                             std::uint32_t channels, std::uint32_t plane, std::uint32_t width) {
    std::uint32_t seen = 0;
    for (std::uint32_t channel = 0; channel < channels; channel += 4) {
        Values<N> z[4]{};
        if (row.s != 0.0f) normals(z, slot, first, width, slot.row, channel / 4);
        for (std::uint32_t k = 0; k < 4 && channel + k < channels; ++k) {
            const std::size_t at = std::size_t{channel + k} * plane;
            const Values<N> seen_y = values<N>(y + at), seen_net = values<N>(net + at);
            Values<N> before{}, next, x0_new;
            if (row.c != 0.0f) before = values<N>(x0 + at);
            for (std::uint32_t j = 0; j < N; ++j) {
                const float prediction = predicted(row, seen_y.at[j], seen_net.at[j]);
                x0_new.at[j] = clipped(prediction);
                next.at[j] = carried(row, seen_y.at[j], x0_new.at[j]);
                if (row.c != 0.0f) next.at[j] = add_product(next.at[j], row.c, before.at[j]);
                if (row.s != 0.0f) next.at[j] = add_product(next.at[j], row.s, z[k].at[j]);
                seen |= not_finite(prediction) | not_finite(next.at[j]);
            }
            values<N>(y + at) = next;
            values<N>(x0 + at) = x0_new;
        }
    }
    return seen;
}

// y_T of slot `which`, when a picture joins.
extern "C" __global__ void sr3_start(float* y, const Slot* slots, std::uint32_t which, std::uint32_t channels, std::uint32_t height,
                                     std::uint32_t width) {
    const std::uint32_t plane = height * width;
    const std::uint32_t first = TOGETHER * (blockIdx.x * blockDim.x + threadIdx.x);
    if (first >= plane) return;
    const Slot slot = slots[which];
    float* const begin = y + std::size_t{which} * channels * plane;
    if (plane % TOGETHER == 0) {
        started<TOGETHER>(begin + first, slot, first, channels, plane, width);
    } else {
        for (std::uint32_t i = first; i < plane && i < first + TOGETHER; ++i) started<1>(begin + i, slot, i, channels, plane, width);
    }
}

extern "C" __global__ void sr3_step(float* y, const float* net, float* x0, Slot* slots, std::uint32_t channels, std::uint32_t height,
                                    std::uint32_t width) {
    const std::uint32_t plane = height * width;
    const std::uint32_t first = TOGETHER * (blockIdx.x * blockDim.x + threadIdx.x);
    const Slot slot = slots[blockIdx.y];
    if (first >= plane || !busy(slot)) return;
    const Row row = slot.table[slot.row];
    const std::size_t begin = std::size_t{blockIdx.y} * channels * plane;
    std::uint32_t seen = 0;
    if (plane % TOGETHER == 0) {
        const std::size_t at = begin + first;
        seen = stepped<TOGETHER>(y + at, net + at, x0 + at, slot, row, first, channels, plane, width);
    } else {
        for (std::uint32_t i = first; i < plane && i < first + TOGETHER; ++i) {
            const std::size_t at = begin + i;
            seen |= stepped<1>(y + at, net + at, x0 + at, slot, row, i, channels, plane, width);
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
