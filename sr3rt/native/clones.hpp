// For loops that a wider instruction set makes faster and no other: compiled for AVX2 too, chosen when the module is loaded; where
// the loader cannot (musl, macOS) the baseline serves.

#pragma once

#if defined(__x86_64__) && defined(__GLIBC__)
#define SR3_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define SR3_CLONES
#endif
