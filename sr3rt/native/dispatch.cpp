// Which instruction set this processor has.

#include <cstring>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sr3 {

#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx2_bf16, avx512_bf16;
#ifdef SR3_AMX
extern const Tiles amx_tiles;

namespace {

// Whether the processor has AMX's tiles and the system lets this process use them, which on Linux it has to ask for.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22, OSXSAVE = 1u << 27;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & OSXSAVE) == 0) return false;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & TILE) == 0 || (d & BF16) == 0) return false;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

Kernels with_tiles(const Kernels& kernels, const Tiles& tiles, const char* name) {
    Kernels made = kernels;
    made.name = name, made.tiles = &tiles;
    return made;
}

}  // namespace
#endif

const Kernels* kernels(const char* name) {
    const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
    const bool best = is("auto"), bf16 = is("bf16") || is("quick_bf16");
#ifdef SR3_AMX
    if (has_bf16 && (bf16 || is("amx_bf16"))) {
        static const bool has_tiles = may_use_tiles();
        static const Kernels amx_bf16 = with_tiles(avx512, amx_tiles, "amx_bf16");
        if (has_tiles) return &amx_bf16;
    }
#endif
    const bool slow = is("quick_bf16") && __builtin_cpu_is("intel");  // which has one such product for four multiply-adds
    if (has_bf16 && !slow && (bf16 || is("avx512_bf16"))) return &avx512_bf16;
    if (has_avx2 && is("avx2_bf16")) return &avx2_bf16;
    if (has_avx512 && (best || is("avx512"))) return &avx512;
    if (has_avx2 && (best || is("avx2"))) return &avx2;
    return nullptr;
}
#else
const Kernels* kernels(const char*) { return nullptr; }
#endif

}  // namespace sr3
