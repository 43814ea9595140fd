// sr3rt/native/step.cu on the host: every thread of every launch, one after another. For test_kernels.py.

#include <cstdint>

#define __global__

namespace {
struct Index {
    unsigned x = 0, y = 0, z = 0;
} blockIdx, blockDim, threadIdx;

unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value) {
    const unsigned found = *address;
    if (found == expected) *address = value;
    return found;
}

template <class Kernel>
void launch(unsigned blocks, unsigned rows, unsigned threads, const Kernel& kernel) {
    blockDim.x = threads;
    for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
}
}  // namespace

#include "step.cu"

extern "C" {
void levels(float* level, const sr3::Row* table, const sr3::Slot* slots, unsigned count) {
    launch(1, 1, 32, [=] { sr3::sr3_levels(level, table, slots, count); });
}
void start(float* y, const sr3::Slot* slots, unsigned which, unsigned channels, unsigned height, unsigned width) {
    launch((height * width + 63) / 64, 1, 64, [=] { sr3::sr3_start(y, slots, which, channels, height, width); });
}
void step(float* y, const float* net, float* x0, const sr3::Row* table, sr3::Slot* slots, unsigned count, unsigned channels,
          unsigned height, unsigned width) {
    launch((height * width + 63) / 64, count, 64, [=] { sr3::sr3_step(y, net, x0, table, slots, channels, height, width); });
}
void next(sr3::Slot* slots, unsigned count) {
    launch(1, 1, 32, [=] { sr3::sr3_next(slots, count); });
}
}
