// The whole of AdaFM for one set of instructions, LEMMA_FAST_LEVEL, and its table of functions.

#include "adafm_cpu.h"
#include "vector_cpu.h"
// These read on from one another, in this order.
#include "adafm_cpu_common.h"
#include "adafm_cpu_forward.h"
#include "adafm_cpu_backward.h"
#include "adafm_cpu_gradients.h"

namespace lemma_fast {
namespace LEMMA_FAST_LEVEL {

extern const Functions<float> floats{fold<float>, inference<float>, forward<float>,
                                     backward<float>};
extern const Functions<double> doubles{fold<double>, inference<double>, forward<double>,
                                       backward<double>};

}  // namespace LEMMA_FAST_LEVEL
}  // namespace lemma_fast
