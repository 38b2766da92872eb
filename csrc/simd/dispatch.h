// Which compiled version of a kernel this processor runs.
//
// A file named *.simd.cpp is compiled once for each level (setup.py): for any processor, for AVX2
// with FMA, and for AVX-512. SIMD_LEVEL names the level, and all that the file defines lies in the
// namespace lemma_fast::SIMD_LEVEL. It uses no inline function of a library: the linker keeps one
// copy of those, which might hold instructions that an older processor lacks.

#pragma once

namespace lemma_fast {

enum class Level { kBaseline, kAvx2, kAvx512 };

// The highest level that this processor has and LEMMA_FAST_CPU (baseline, avx2 or avx512) allows.
// Asked anew at each call. Throws for another value of LEMMA_FAST_CPU.
Level cpu_level();

// Its name, or null for another value of LEMMA_FAST_CPU.
const char* cpu_level_name();

template <class Table>
const Table& choose(const Table& baseline, const Table& avx2, const Table& avx512) {
  const Level level = cpu_level();
  return level == Level::kAvx512 ? avx512 : level == Level::kAvx2 ? avx2 : baseline;
}

}  // namespace lemma_fast

// SIMD_DECLARE, in namespace lemma_fast, declares a table of functions that a *.simd.cpp defines as
// `extern const Table name`; SIMD_CHOOSE is the one to call.
#define SIMD_DECLARE(Table, name) \
  namespace baseline {            \
  extern const Table name;        \
  }                               \
  namespace avx2 {                \
  extern const Table name;        \
  }                               \
  namespace avx512 {              \
  extern const Table name;        \
  }
#if defined(__x86_64__)
#define SIMD_CHOOSE(name)                                                      \
  ::lemma_fast::choose(::lemma_fast::baseline::name, ::lemma_fast::avx2::name, \
                       ::lemma_fast::avx512::name)
#else
#define SIMD_CHOOSE(name)                                                          \
  ::lemma_fast::choose(::lemma_fast::baseline::name, ::lemma_fast::baseline::name, \
                       ::lemma_fast::baseline::name)
#endif
