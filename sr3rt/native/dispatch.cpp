// Which instruction set this processor has.

#include <cstring>

#include "kernels.hpp"

namespace sr3 {

#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx2_bf16, avx512_bf16;

const Kernels* kernels(const char* name) {
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
    const bool best = std::strcmp(name, "auto") == 0;
    if (has_bf16 && std::strcmp(name, "avx512_bf16") == 0) return &avx512_bf16;
    if (has_avx2 && std::strcmp(name, "avx2_bf16") == 0) return &avx2_bf16;
    if (has_avx512 && (best || std::strcmp(name, "avx512") == 0)) return &avx512;
    if (has_avx2 && (best || std::strcmp(name, "avx2") == 0)) return &avx2;
    return nullptr;
}
#else
const Kernels* kernels(const char*) { return nullptr; }
#endif

}  // namespace sr3
