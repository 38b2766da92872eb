// What was compiled, as JSON; setup.py fills it in. Read with ctypes, so that it needs no torch.

#ifndef LEMMA_FAST_BUILD_INFO
#define LEMMA_FAST_BUILD_INFO "{}"
#endif

extern "C" __attribute__((visibility("default"))) const char* lemma_fast_build_info() {
  return LEMMA_FAST_BUILD_INFO;
}
