// Enough of the CUDA language to compile csrc/cuda with g++ and to run it on the CPU: pass it with -include.
//
// Each CUDA thread is a fiber, which runs until it waits: at __syncthreads, or at a shuffle for the rest of its warp. The
// order in which threads, warps and blocks run is the schedule, and no result may depend on it. Under -fsanitize=thread each
// CUDA thread is a thread of the sanitizer's too, and only what CUDA orders is ordered: the threads of a block by
// __syncthreads, kernels by their stream, all of them after what the host did before. A shuffle orders no memory.
//
// What it cannot show: blocks do not overlap, and there is no memory model of a GPU.
#pragma once

#include <cuda_runtime.h>  // For its types; nothing is linked.
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define EMULATOR_FRESH_FIBERS true  // Memory used by two fibers that nothing orders would be a race: their stacks, too.
#else
#define EMULATOR_FRESH_FIBERS false
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// The emulator itself: its switching would confuse the sanitizers, and its state is no kernel's business.
#define EMULATOR_QUIET __attribute__((no_sanitize("thread", "address", "undefined"), noinline))
#define EMULATOR_STRING_(x) #x
#define EMULATOR_STRING(x) EMULATOR_STRING_(x)
#define EMULATOR_SITE __FILE__ ":" EMULATOR_STRING(__LINE__)

#define BLUR_OPTIM_EMULATOR 1
#define BLUR_SHARED(type, name, count) type* const name = emulator::shared<type>(count)
#define __launch_bounds__(...)
#define __syncthreads() emulator::wait(emulator::State::kBarrier, EMULATOR_SITE)
#define __shfl_xor_sync(mask, value, distance) emulator::shuffle_xor(mask, value, distance, EMULATOR_SITE)
#define threadIdx (emulator::self->thread_index)
#define blockIdx (emulator::self->block->index)
#define gridDim (emulator::grid_size)

namespace emulator {

enum class Order { kForward, kReverse, kShuffled };
enum class State { kReady, kBarrier, kShuffle, kDone };

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMaxShared = 4;

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = true;
  std::unique_ptr<char[]> stack;
  void* tsan = nullptr;
  void* asan = nullptr;
};

struct Block;

struct Thread : Fiber {
  Block* block;
  uint3 thread_index;
  State state;
  const char* site;   // Where it waits.
  uint64_t slots[2];  // What it shows to its warp. Two in turn: a lane may be one shuffle ahead, never two.
  int turn, barriers, shared;
};

struct Block {
  uint3 index;
  std::vector<Thread> threads;
  char* shared[kMaxShared];  // Each with a heap block of its own, so that the address sanitizer sees its end.
  int num_shared;
  char barrier[2];  // Used in turn: a thread that arrives at the next must not order those that still leave this one.
  char *before, *after;
};

// Settings of the tests.
inline Order order = Order::kForward;
inline std::mt19937 random;
inline int64_t edge_blocks = 0;  // Of a large grid run only so many from each end; 0 runs all.

inline Thread* self = nullptr;  // The running CUDA thread.
inline Fiber host;
inline const void* host_stack = nullptr;
inline size_t host_bytes = 0;
inline void (*body)(const void*) = nullptr;
inline dim3 grid_size;  // Of the launch that runs: they run one after the other.
inline const void* arguments = nullptr;
inline std::map<void*, char*> last_launch;  // Of each stream.
inline std::vector<void*> retired;          // Memory that the kernels of unfinished launches may refer to.
inline std::vector<std::unique_ptr<Block>> blocks;

[[noreturn]] inline void fail(const char* what, const char* site, int waiting, size_t of) {
  std::fprintf(stderr, "emulator: divergent %s: %d of %zu threads wait at %s\n", what, waiting, of, site);
  std::abort();
}

EMULATOR_QUIET inline void switch_fiber(Fiber* from, Fiber* to) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
  swapcontext(&from->context, &to->context);
#elif defined(__SANITIZE_ADDRESS__)
  const bool to_host = to == &host;
  __sanitizer_start_switch_fiber(&from->asan, to_host ? host_stack : to->stack.get(), to_host ? host_bytes : kStackBytes);
  swapcontext(&from->context, &to->context);
  __sanitizer_finish_switch_fiber(from->asan, nullptr, nullptr);
#else  // swapcontext makes two system calls; a jump makes none, and is ten times as fast.
  if (_setjmp(from->jump)) return;
  if (std::exchange(to->started, true)) _longjmp(to->jump, 1);
  setcontext(&to->context);
#endif
}

// Stop the running thread until the scheduler finds that it may go on.
EMULATOR_QUIET inline void wait(State state, const char* site) {
  Thread* t = self;
  char* token = &t->block->barrier[t->barriers & 1];
  t->state = state;
  t->site = site;
  if (state == State::kBarrier) __tsan_release(token);
  switch_fiber(t, &host);
  if (state == State::kBarrier) {
    __tsan_acquire(token);
    ++t->barriers;
  }
}

template <class T>
EMULATOR_QUIET T shuffle_xor(unsigned mask, T value, int distance, const char* site) {
  static_assert(sizeof(T) <= 8);
  Thread* t = self;
  if (mask != 0xffffffffu) fail("shuffle mask", site, __builtin_popcount(mask), 32);
  const int turn = t->turn++ & 1;
  std::memcpy(&t->slots[turn], &value, sizeof value);
  wait(State::kShuffle, site);
  std::memcpy(&value, &t->block->threads[t->thread_index.x ^ unsigned(distance)].slots[turn], sizeof value);
  return value;
}

template <class T>
EMULATOR_QUIET T* shared(size_t count) {
  Thread* t = self;
  Block* b = t->block;
  const int i = t->shared++;
  if (i == b->num_shared) {
    b->shared[b->num_shared++] = static_cast<char*>(std::malloc(count * sizeof(T)));
    // Numbers that were never written are NaN. (To the sanitizer it would be a write that nothing orders.)
    if (!EMULATOR_FRESH_FIBERS) std::memset(b->shared[i], 0xff, count * sizeof(T));
    __tsan_release(&b->shared[i]);
  }
  __tsan_acquire(&b->shared[i]);
  return reinterpret_cast<T*>(b->shared[i]);
}

EMULATOR_QUIET inline void enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_bytes);
#endif
  __tsan_acquire(self->block->before);
  body(arguments);
  __tsan_release(self->block->after);
  wait(State::kDone, "the end of the kernel");
}

inline std::vector<int> scheduled(int n) {
  std::vector<int> result(n);
  std::iota(result.begin(), result.end(), 0);
  if (order == Order::kReverse) std::reverse(result.begin(), result.end());
  if (order == Order::kShuffled) std::shuffle(result.begin(), result.end(), random);
  return result;
}

EMULATOR_QUIET inline void start(Block& block, size_t i) {
  Thread& t = block.threads[i];
  if (!t.stack) t.stack.reset(new char[kStackBytes]);
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack.get();
  t.context.uc_stack.ss_size = kStackBytes;
  makecontext(&t.context, enter, 0);
#ifdef __SANITIZE_THREAD__
  t.tsan = __tsan_create_fiber(0);
#endif
  t.started = false;
  t.block = &block;
  t.thread_index = {unsigned(i), 0, 0};
  t.state = State::kReady;
  t.turn = t.barriers = t.shared = 0;
}

// Run the ready lanes of a warp. True where they then pass a shuffle.
EMULATOR_QUIET inline bool run_warp(Thread* lanes) {
  for (int lane : scheduled(32))
    if (lanes[lane].state == State::kReady) {
      self = &lanes[lane];
      switch_fiber(&host, self);
    }
  int waiting = 0;
  const char* site = nullptr;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes[lane].state == State::kShuffle) site = lanes[lane].site;
  for (int lane = 0; lane < 32; ++lane) waiting += lanes[lane].state == State::kShuffle && lanes[lane].site == site;
  if (site && waiting != 32) fail("__shfl_xor_sync", site, waiting, 32);
  for (int lane = 0; site && lane < 32; ++lane) lanes[lane].state = State::kReady;
  return site;
}

// Let the threads pass a barrier that all of them have reached. False where they are done.
EMULATOR_QUIET inline bool pass_barrier(std::vector<Thread>& threads) {
  int waiting = 0;
  const char* site = nullptr;
  for (Thread& t : threads)
    if (t.state == State::kBarrier) site = t.site;
  for (Thread& t : threads) waiting += t.state == State::kBarrier && t.site == site;
  if (site && waiting != int(threads.size())) fail("__syncthreads", site, waiting, threads.size());
  for (Thread& t : threads) t.state = site ? State::kReady : State::kDone;
  return site;
}

EMULATOR_QUIET inline void run_block(uint3 index, size_t num_threads, char* before, char* after) {
  if (EMULATOR_FRESH_FIBERS || blocks.empty()) blocks.push_back(std::make_unique<Block>());
  Block& block = *blocks.back();
  block.index = index;
  block.threads.resize(num_threads);
  block.num_shared = 0;
  block.before = before;
  block.after = after;
  for (size_t i = 0; i < num_threads; ++i) start(block, i);
  do {
    for (int warp : scheduled(int(num_threads / 32)))
      while (run_warp(&block.threads[warp * 32])) {
      }
  } while (pass_barrier(block.threads));
  retired.insert(retired.end(), block.shared, block.shared + block.num_shared);
}

// As <<<grid, block, 0, stream>>>.
template <class Table>
int launch(void (*kernel)(Table), dim3 grid, dim3 block, void* stream, const Table& table) {
  struct Arguments {
    void (*kernel)(Table);
    Table table;
  };
  Arguments* const copy = new (std::malloc(sizeof(Arguments))) Arguments{kernel, table};
  retired.push_back(copy);
  body = [](const void* p) { static_cast<const Arguments*>(p)->kernel(static_cast<const Arguments*>(p)->table); };
  arguments = copy;
  grid_size = grid;
  char* const tokens = static_cast<char*>(std::malloc(2));
  retired.push_back(tokens);
  char* const after = tokens + 1;
  char* const before = std::exchange(last_launch[stream], after) ?: tokens;
#ifdef __SANITIZE_THREAD__
  host.tsan = __tsan_get_current_fiber();
#endif
  const int64_t count = int64_t(grid.x) * grid.y;
  const int64_t edge = edge_blocks > 0 && 2 * edge_blocks < count ? edge_blocks : (count + 1) / 2;
  for (int i : scheduled(int(std::min(2 * edge, count)))) {
    const int64_t b = i < edge ? i : count - std::min(2 * edge, count) + i;
    run_block({unsigned(b % grid.x), unsigned(b / grid.x), 0}, block.x, before, after);
  }
  return 0;
}

// As cudaDeviceSynchronize: after it the host may look at, and free, what kernels wrote.
inline void synchronize() {
  for (auto& [stream, token] : last_launch) __tsan_acquire(token);
  last_launch.clear();
#ifdef __SANITIZE_THREAD__
  for (auto& block : blocks)
    for (Thread& t : block->threads) __tsan_destroy_fiber(t.tsan);
  blocks.clear();
#endif
  for (void* memory : retired) std::free(memory);
  retired.clear();
}

}  // namespace emulator

// The parts of the CUDA runtime and its device functions that the kernels use.
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
