// Which of the compiled versions of AdaFM this processor runs.

#include "adafm_cpu.h"

#include <cstdlib>
#include <cstring>

namespace lemma_fast {

namespace baseline {
extern const adafm::Functions<float> floats;
extern const adafm::Functions<double> doubles;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const adafm::Functions<float> floats;
extern const adafm::Functions<double> doubles;
}  // namespace avx2
namespace avx512 {
extern const adafm::Functions<float> floats;
extern const adafm::Functions<double> doubles;
}  // namespace avx512
#endif

namespace adafm {
namespace {

struct Level {
  const char* name;
  const Functions<float>* floats;
  const Functions<double>* doubles;
};

// Asked anew at each call, so that tests can go through the levels in one process.
Level level() {
#if defined(__x86_64__)
  const char* wish = std::getenv("LEMMA_FAST_CPU");
  const auto allowed = [wish](const char* names) {
    return wish == nullptr || std::strstr(names, wish) != nullptr;
  };
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      allowed("avx512")) {
    return {"avx512", &avx512::floats, &avx512::doubles};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("avx2, avx512")) {
    return {"avx2", &avx2::floats, &avx2::doubles};
  }
#endif
  return {"baseline", &baseline::floats, &baseline::doubles};
}

}  // namespace

template <>
const Functions<float>& functions<float>() {
  return *level().floats;
}

template <>
const Functions<double>& functions<double>() {
  return *level().doubles;
}

const char* cpu_level() { return level().name; }

}  // namespace adafm
}  // namespace lemma_fast
