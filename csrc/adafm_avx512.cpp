// AdaFM on the CPU, compiled for AVX-512: see vector_cpu.h.

#if defined(__AVX512F__)
#define LEMMA_FAST_LEVEL avx512
#include "adafm_cpu_level.h"
#endif
