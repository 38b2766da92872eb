#include "adafm/cpu/passes.h"

#include "adafm/cpu/backward.h"
#include "adafm/cpu/fold.h"
#include "adafm/cpu/forward.h"
#include "adafm/cpu/inference.h"

namespace lemma_fast::SIMD_LEVEL {

extern const Passes<float> adafm_fp32{fold<float>, inference<float>, forward<float>,
                                      backward<float>};
extern const Passes<double> adafm_fp64{fold<double>, inference<double>, forward<double>,
                                       backward<double>};

}  // namespace lemma_fast::SIMD_LEVEL
