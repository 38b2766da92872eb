// AdaFM on the CPU, compiled for any processor: see vector_cpu.h.

#define LEMMA_FAST_LEVEL baseline
#include "adafm_cpu_level.h"
