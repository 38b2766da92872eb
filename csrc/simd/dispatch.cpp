#include "simd/dispatch.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string_view>

namespace lemma_fast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Level highest_level() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Level::kAvx512;
  }
  if (avx2) return Level::kAvx2;
#endif
  return Level::kBaseline;
}

const char* wish() {
  const char* name = std::getenv("LEMMA_FAST_CPU");
  return name == nullptr || *name == '\0' ? "avx512" : name;
}

std::optional<Level> find_level() {
  for (const Level level : {Level::kBaseline, Level::kAvx2, Level::kAvx512}) {
    if (std::string_view(wish()) == kNames[static_cast<int>(level)]) {
      return std::min(level, highest_level());
    }
  }
  return std::nullopt;
}

}  // namespace

Level cpu_level() {
  const std::optional<Level> level = find_level();
  STD_TORCH_CHECK(level.has_value(), "LEMMA_FAST_CPU is '", wish(),
                  "': it can be baseline, avx2 or avx512");
  return *level;
}

const char* cpu_level_name() {
  const std::optional<Level> level = find_level();
  return level ? kNames[static_cast<int>(*level)] : nullptr;
}

}  // namespace lemma_fast
