// AdaFM on the CPU, compiled for AVX2 and FMA: see vector_cpu.h.

#if defined(__AVX2__)
#define LEMMA_FAST_LEVEL avx2
#include "adafm_cpu_level.h"
#endif
