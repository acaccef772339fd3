// What the CUDA kernels share: storage types, wide accesses, and the table of tensors that travels in a launch's arguments.
//
// tests/kernels/cuda/emulator.h stands in for the CUDA language where g++ compiles the same source for the CPU.
// Compiled without contraction into fused multiply-adds, as the CPU kernels are: each result then follows from the source,
// not from what a compiler did for one architecture. (But for pow in fused.cu, which is the device's own.)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#ifndef BLUR_OPTIM_EMULATOR
#define BLUR_SHARED(type, name, count) __shared__ type name[count]
#endif
#ifndef BLUR_OPTIM_CUDA_BLOCK  // The thread sanitizer needs them smaller.
#define BLUR_OPTIM_CUDA_BLOCK 256
#define BLUR_OPTIM_CUDA_CHUNK 16384
#endif

namespace blur_optim::cuda {
namespace {

constexpr int kBlock = BLUR_OPTIM_CUDA_BLOCK;
constexpr int kWarps = kBlock / 32;
// What one block works on: a piece of one tensor. Half of the CPU's, since a GPU needs many blocks in flight and a last wave
// of large ones leaves most of it idle (reasoned, not measured). Part of the definition of the result, as the block is: the
// order of every addition follows from the two, never from the number of multiprocessors.
constexpr int kChunk = BLUR_OPTIM_CUDA_CHUNK;
// The most float32 products added one by one. See kRun of the CPU kernels: long runs of coarse values are biased.
constexpr int kRun = 16;
constexpr size_t kArgumentBytes = 4096;  // What every driver takes for the arguments of one launch.
constexpr int64_t kMaxBlocks = 0x7fffffff;

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_compute(float x) { return x; }
__device__ inline double to_compute(double x) { return x; }
__device__ inline float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(__half x) { return __half2float(x); }
__device__ inline void round_to(float& out, float x) { out = x; }
__device__ inline void round_to(double& out, double x) { out = x; }
__device__ inline void round_to(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }
__device__ inline void round_to(__half& out, float x) { out = __float2half_rn(x); }

// Neighbouring elements that a thread handles together: 16 bytes of the widest type, so that the accesses of a warp to every
// tensor are contiguous.
template <class... Ts>
constexpr int kPack = 16 / int(std::max({sizeof(Ts)...}));

// How a thread touches the pack at p: whole and aligned, in one access,
struct Whole {
  template <class T, int N>
  using Word = std::conditional_t<sizeof(T) * N == 16, uint4, uint2>;

  // What the kernel never writes. Pointers from a table are not known to be read-only unless told so.
  template <class T, int N>
  __device__ void read(T (&x)[N], const T* p) const {
    static_assert(sizeof(T) * N == sizeof(Word<T, N>));
    const Word<T, N> word = __ldg(reinterpret_cast<const Word<T, N>*>(p));
    memcpy(static_cast<void*>(x), &word, sizeof word);
  }
  template <class T, int N>
  __device__ void load(T (&x)[N], const T* p) const {
    static_assert(sizeof(T) * N == sizeof(Word<T, N>));
    const Word<T, N> word = *reinterpret_cast<const Word<T, N>*>(p);
    memcpy(static_cast<void*>(x), &word, sizeof word);
  }
  template <class T, int N>
  __device__ void store(T* p, const T (&x)[N]) const {
    Word<T, N> word;
    memcpy(&word, static_cast<const void*>(x), sizeof word);
    *reinterpret_cast<Word<T, N>*>(p) = word;
  }
};

// or misaligned or at the end of the tensor, one by one; what is not there reads as zero.
struct Part {
  int count;

  template <class T, int N>
  __device__ void read(T (&x)[N], const T* p) const {
    for (int k = 0; k < N; ++k) x[k] = k < count ? p[k] : T(0.0f);
  }
  template <class T, int N>
  __device__ void load(T (&x)[N], const T* p) const {
    read(x, p);
  }
  template <class T, int N>
  __device__ void store(T* p, const T (&x)[N]) const {
    for (int k = 0; k < N; ++k)
      if (k < count) p[k] = x[k];
  }
};

// Call body(offset, access) for each pack of this thread's, in order. Which elements a thread has does not depend on the
// alignment, so neither does a bit of the result. Loops that write gain nothing by kUnroll: no load moves over a store.
template <int N, int kUnroll, class Body>
__device__ void for_each_pack(int numel, bool aligned, const Body& body) {
  int i = int(threadIdx.x) * N;
  const int whole = aligned ? numel / N * N : 0;
#pragma unroll kUnroll
  for (; i < whole; i += kBlock * N) body(i, Whole());
#pragma unroll 1
  for (; i < numel; i += kBlock * N) body(i, Part{numel - i});
}

template <class... Pointers>
__device__ bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;  // Null is.
}

template <class T>
__device__ T* at(void* base, int64_t offset) {
  return base ? static_cast<T*>(base) + offset : nullptr;
}

// One tensor of a launch. `key` is the row of its coefficients; for the dots, its first chunk in the workspace.
template <int kPointers>
struct Entry {
  void* pointers[kPointers];
  int64_t numel;
  int64_t key;
  int32_t tensor;
  uint32_t first_block;
};

// The arguments of a launch, by value: no copy of a table to the device, and nothing that has to outlive the launch.
template <int kPointers, class Options>
struct Table {
  static constexpr int kCapacity = int((kArgumentBytes - sizeof(Options) - 16) / sizeof(Entry<kPointers>));
  Options options;
  int32_t count;
  Entry<kPointers> entries[kCapacity];
};

// Which elements of which entry a block works on.
struct Piece {
  int entry;
  int numel;
  int64_t offset;
};

__host__ __device__ constexpr int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

template <class AnyTable>
__host__ __device__ inline Piece locate(const AnyTable& table, uint32_t block) {
  int low = 0, high = table.count;  // The last entry that does not begin after the block.
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entries[middle].first_block <= block ? low : high) = middle;
  }
  const int64_t offset = int64_t(block - table.entries[low].first_block) * kChunk;
  const int64_t rest = table.entries[low].numel - offset;
  return {low, int(rest < kChunk ? rest : kChunk), offset};
}

__device__ inline bool is_set(const float* flag) { return flag && *flag != 0; }

// The two gradients of an element as one: u = a f + b r. A lone gradient stands in for the absent one, which spares the
// loop a branch, and its product is dropped.
template <class G>
struct Update {
  using C = Compute<G>;
  bool has_forget, has_retain;
  G *forget, *retain;
  C a, b;

  __device__ Update(void* f, void* r, int64_t offset, const double* coefficients, bool negate)
      : has_forget(f), has_retain(r), forget(at<G>(f ? f : r, offset)), retain(at<G>(r ? r : f, offset)),
        a(C(negate ? -coefficients[0] : coefficients[0])), b(C(negate ? -coefficients[1] : coefficients[1])) {}

  __device__ C operator()(G f, G r) const {
    const C af = a * to_compute(f), br = b * to_compute(r);
    return has_forget && has_retain ? br + af : has_forget ? af : br;
  }
};

template <class AnyTable>
int launch(void (*kernel)(AnyTable), dim3 grid, void* stream, const AnyTable& table) {
#ifdef BLUR_OPTIM_EMULATOR
  return emulator::launch(kernel, grid, dim3(kBlock), stream, table);
#else
  void* arguments[] = {const_cast<AnyTable*>(&table)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kBlock), arguments, 0,
                          static_cast<cudaStream_t>(stream));
#endif
}

// Collects tensors and launches a kernel whenever the table is full.
template <class AnyTable>
class Batch {
 public:
  Batch(void (*kernel)(AnyTable), decltype(AnyTable::options) options, void* stream) : kernel_(kernel), stream_(stream) {
    static_assert(sizeof(AnyTable) <= kArgumentBytes);
    table_.options = options;
    table_.count = 0;
  }

  template <class... Pointers>
  void add(int64_t numel, int64_t key, int64_t tensor, Pointers... pointers) {
    const int64_t blocks = chunks_of(numel);
    if (table_.count == AnyTable::kCapacity || blocks_ + blocks > kMaxBlocks) flush();
    table_.entries[table_.count++] = {{pointers...}, numel, key, int32_t(tensor), uint32_t(blocks_)};
    blocks_ += blocks;
  }

  // The first error of all launches.
  int flush() {
    if (blocks_ > 0 && error_ == 0) error_ = launch(kernel_, dim3(unsigned(blocks_)), stream_, table_);
    table_.count = 0;
    blocks_ = 0;
    return error_;
  }

 private:
  void (*kernel_)(AnyTable);
  void* stream_;
  AnyTable table_;
  int64_t blocks_ = 0;
  int error_ = 0;
};

template <class Visitor>
int with_dtype(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::Float32: return visit(float());
    case Dtype::BFloat16: return visit(__nv_bfloat16());
    case Dtype::Float16: return visit(__half());
    case Dtype::Float64: return visit(double());
  }
  return cudaErrorInvalidValue;
}

constexpr Dtype kDtypes[] = {Dtype::Float32, Dtype::BFloat16, Dtype::Float16, Dtype::Float64};

}  // namespace
}  // namespace blur_optim::cuda
