// sr3rt/native/step.cu, and the tests' network, on the host: every thread of every launch, one after another. For cuda_on_host.py.

#include <cstdint>
#include <string_view>
#include <utility>

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

}  // namespace

#include "arithmetic.cu"
#include "step.cu"

namespace {
template <class... Arguments, std::size_t... I>
void call(void (*kernel)(Arguments...), void** parameters, std::index_sequence<I...>) {
    kernel(*static_cast<Arguments*>(parameters[I])...);
}

template <class... Arguments>
bool call(void (*kernel)(Arguments...), void** parameters) {
    call(kernel, parameters, std::index_sequence_for<Arguments...>{});
    return true;
}
}  // namespace

// As cuLaunchKernel: `parameters` points to each argument. Returns whether there is a kernel of that name.
extern "C" bool launch(const char* name, unsigned columns, unsigned rows, unsigned threads, void** parameters) {
    const std::string_view wanted = name;
    blockDim.x = threads;
    bool found = true;
    for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < columns; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
                found = (wanted == "sr3_levels" && call(sr3::sr3_levels, parameters)) ||
                        (wanted == "sr3_start" && call(sr3::sr3_start, parameters)) ||
                        (wanted == "sr3_step" && call(sr3::sr3_step, parameters)) ||
                        (wanted == "sr3_next" && call(sr3::sr3_next, parameters)) ||
                        (wanted == "arithmetic" && call(arithmetic, parameters)) || (wanted == "known" && call(known, parameters)) ||
                        (wanted == "rest" && call(rest, parameters));
    return found;
}
