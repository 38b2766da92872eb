// The scheduler of emulator.h: one block after another, its threads as fibers.
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace lemma_fast {
namespace emulator {
namespace {

constexpr int kMaxThreads = 256;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kBlockMemory = 48 * 1024;

struct Copy {
  void* to;
  const void* from;
};

// A fiber starts by ucontext, which costs system calls; after that, setjmp and longjmp change
// between the stacks.
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* sanitizer = nullptr;
  void* brought = nullptr;
  Combine combine = nullptr;
  std::vector<Copy> copies;
};

struct Block {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  // A bit for each thread that can run.
  uint64_t ready[kMaxThreads / 64] = {};
  int threads = 0, current = 0, at_barrier = 0, done = 0;
  int with_warp[kMaxThreads / 32] = {};
  jmp_buf scheduler;
  void* sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  const char* error = nullptr;
  bool highest_first = false;
  alignas(16) unsigned char memory[kBlockMemory];
} block;

void set_ready(int thread) { block.ready[thread / 64] |= uint64_t{1} << thread % 64; }
void reset_ready(int thread) { block.ready[thread / 64] &= ~(uint64_t{1} << thread % 64); }

void leave(bool for_good) {
  Fiber& self = block.fibers[block.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self.sanitizer, block.scheduler_stack,
                                 block.scheduler_stack_size);
#else
  (void)for_good;
#endif
  if (_setjmp(self.place) == 0) _longjmp(block.scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.sanitizer, nullptr, nullptr);
#endif
}

// Stops the block: `why` is what its launch returns.
void fail(const char* why) {
  block.error = why;
  for (uint64_t& word : block.ready) word = 0;
  leave(false);
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
  block.body(block.argument);
  ++block.done;
  reset_ready(block.current);
  leave(true);
}

// Neither is inlined: what a caller keeps in registers would not survive a longjmp.
__attribute__((noinline)) void prepare(Fiber& fiber) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  fiber.started = false;
  fiber.copies.clear();
}

__attribute__((noinline)) void resume(int thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.sanitizer, fiber.stack.get(), kStack);
#endif
  if (_setjmp(block.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.sanitizer, nullptr, nullptr);
#endif
}

// kMaxThreads where none can run.
int next_thread() {
  constexpr int kWords = kMaxThreads / 64;
  for (int i = 0; i < kWords; ++i) {
    const int word = block.highest_first ? kWords - 1 - i : i;
    const uint64_t ready = block.ready[word];
    if (ready == 0) continue;
    return 64 * word + (block.highest_first ? 63 - __builtin_clzll(ready) : __builtin_ctzll(ready));
  }
  return kMaxThreads;
}

const char* run_block() {
  std::memset(block.memory, 0xff, kBlockMemory);
  block.at_barrier = block.done = 0;
  block.error = nullptr;
  for (int& count : block.with_warp) count = 0;
  for (int thread = 0; thread < block.threads; ++thread) {
    prepare(block.fibers[thread]);
    set_ready(thread);
  }
  for (int thread = next_thread(); thread < kMaxThreads; thread = next_thread()) resume(thread);
  if (block.error != nullptr) return block.error;
  for (int thread = 0; thread < block.threads; ++thread) {
    if (!block.fibers[thread].copies.empty()) return "a thread ended before its copies landed";
  }
  return block.done == block.threads ? nullptr : "threads wait for others that will never come";
}

}  // namespace

const char* run(dim3 blocks, int threads, void (*body)(void*), void* context) {
  if (threads > kMaxThreads || threads % 32 != 0) return "a block has whole warps, at most 8";
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return "an empty grid";
  gridDim = blocks;
  blockDim = dim3(static_cast<unsigned>(threads));
  block.threads = threads;
  block.body = body;
  block.argument = context;
  for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
        if (const char* error = run_block()) return error;
      }
    }
  }
  return nullptr;
}

void with_warp(void* mine, Combine combine) {
  Fiber& self = block.fibers[block.current];
  const int warp = block.current / 32;
  self.brought = mine;
  self.combine = combine;
  if (++block.with_warp[warp] < 32) {
    reset_ready(block.current);
    leave(false);
    return;
  }
  void* lanes[32];
  for (int lane = 0; lane < 32; ++lane) {
    Fiber& fiber = block.fibers[warp * 32 + lane];
    if (fiber.combine != combine) fail("a warp's lanes disagree on what to do");
    lanes[lane] = fiber.brought;
    set_ready(warp * 32 + lane);
  }
  block.with_warp[warp] = 0;
  combine(lanes);
}

void barrier() {
  if (++block.at_barrier < block.threads) {
    reset_ready(block.current);
    leave(false);
    return;
  }
  block.at_barrier = 0;
  for (int thread = 0; thread < block.threads; ++thread) set_ready(thread);
  // So that the order is kept: the last to come need not be the first to go.
  leave(false);
}

void* block_memory(size_t bytes) {
  if (bytes > kBlockMemory) fail("more shared memory than a block may declare");
  return block.memory;
}

void copy_later(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("an asynchronous copy that is not aligned");
  }
  block.fibers[block.current].copies.push_back({to, from});
}

void land_copies() {
  auto& copies = block.fibers[block.current].copies;
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, 16);
  copies.clear();
}

void run_highest_first(bool highest) { block.highest_first = highest; }

}  // namespace emulator
}  // namespace lemma_fast
