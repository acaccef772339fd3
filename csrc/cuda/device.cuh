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
// What benchmarks/gpu/tuning.py also tries other values of; none of them changes a bit of a result.
#ifndef BLUR_OPTIM_CUDA_UNROLL
#define BLUR_OPTIM_CUDA_UNROLL 4
#endif
#ifndef BLUR_OPTIM_CUDA_MIN_BLOCKS
#define BLUR_OPTIM_CUDA_MIN_BLOCKS 0
#endif
#ifndef BLUR_OPTIM_CUDA_ARGUMENTS
#define BLUR_OPTIM_CUDA_ARGUMENTS 4096
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
// Packs of each gradient that a thread of the dots has in flight at a time.
constexpr int kDotsUnroll = BLUR_OPTIM_CUDA_UNROLL;
constexpr int kMinBlocks = BLUR_OPTIM_CUDA_MIN_BLOCKS;  // For __launch_bounds__; 0 leaves the registers to the compiler.
// What every driver takes for the arguments of one launch. (Since CUDA 12.1 a newer one takes 32764.)
constexpr size_t kArgumentBytes = BLUR_OPTIM_CUDA_ARGUMENTS;
constexpr int64_t kMaxBlocks = 0x7fffffff;

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_compute(float x) { return x; }
__device__ inline double to_compute(double x) { return x; }
__device__ inline float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(__half x) { return __half2float(x); }
__device__ inline float to_compute(int8_t x) { return x; }
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
  template <class T, int N, int kBytes = sizeof(T) * N>
  using Word = std::conditional_t<
      kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

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

// Whether the packs of all these tensors are.
template <int N, class... Ts>
__device__ bool aligned(Ts*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (sizeof(Ts) * N) == 0) && ...);  // Null is.
}

template <class T>
__device__ T* at(void* base, int64_t offset) {
  return base ? static_cast<T*>(base) + offset : nullptr;
}

// One tensor of a launch. `key` is the row of its coefficients; for the dots, its first chunk in the workspace. The last
// three pointers are those of `Gradients`.
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

// The gradients of a piece: G the type of the retain gradient, F in which the forget gradient is stashed. A lone gradient
// stands in for the absent one, which spares the loops a branch, and what comes of it is dropped. (It then is a G: a
// compressed one is never alone.)
template <class G, class F>
struct Gradients {
  using C = Compute<G>;
  bool has_forget, has_retain;
  F* forget;
  G* retain;
  const float* scales;

  template <int kPointers>
  __device__ Gradients(const Entry<kPointers>& entry, int64_t offset) {
    static_assert(kChunk % kBlockSize == 0);
    void* const* const pointers = entry.pointers + kPointers - 3;
    void *const f = pointers[0], *const r = pointers[1];
    has_forget = f;
    has_retain = r;
    forget = at<F>(f ? f : r, offset);
    retain = at<G>(r ? r : f, offset);
    scales = at<const float>(pointers[2], offset / kBlockSize);
  }

  // What the elements of the forget gradient's pack at i are multiplied with. No pack reaches into a second block.
  __device__ C scale(int i) const {
    if constexpr (std::is_same_v<F, int8_t>) return C(__ldg(scales + i / kBlockSize));
    return 1;
  }
  __device__ C restored(F f, C scale) const {
    return std::is_same_v<F, int8_t> ? C(to_compute(f)) * scale : C(to_compute(f));
  }
  __device__ C retained(G r) const { return has_retain ? to_compute(r) : C(0); }
};

// The two gradients of an element as one: u = a f + b r.
template <class G, class F>
struct Update : Gradients<G, F> {
  using C = Compute<G>;
  C a, b;

  template <class AnyEntry>
  __device__ Update(const AnyEntry& entry, int64_t offset, const double* coefficients, bool negate)
      : Gradients<G, F>(entry, offset), a(C(negate ? -coefficients[0] : coefficients[0])),
        b(C(negate ? -coefficients[1] : coefficients[1])) {}

  __device__ C operator()(F f, G r, C scale) const {
    const C af = a * this->restored(f, scale), br = b * to_compute(r);
    return this->has_forget && this->has_retain ? br + af : this->has_forget ? af : br;
  }
};

// The metric of the retain loss at one tensor, from its row of the operators' `metric`; see Metric.
template <class C>
struct MetricConstants {
  C beta2, rest2, inverse_correction, damping, eps;

  __device__ MetricConstants(const double* metric, int64_t tensor) {
    const double* const row = metric + kMetricNumbers * tensor;
    beta2 = C(row[0]), rest2 = C(row[1]), inverse_correction = C(row[2]), damping = C(row[3]), eps = C(row[4]);
  }
  __device__ C moment(C v, C r) const { return beta2 * v + rest2 * (r * r); }
  __device__ C denominator(C corrected) const { return sqrt(corrected + damping) + eps; }
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

  // `pointers` is what the update modifies beside the gradients.
  template <class... Pointers>
  void add(const Pair& pair, int64_t key, int64_t tensor, Pointers... pointers) {
    const int64_t blocks = chunks_of(pair.numel);
    if (table_.count == AnyTable::kCapacity || blocks_ + blocks > kMaxBlocks) flush();
    table_.entries[table_.count++] = {{pointers..., pair.forget, pair.retain, const_cast<float*>(pair.scales)},
                                      pair.numel, key, int32_t(tensor), uint32_t(blocks_)};
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

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, float>           ? Dtype::Float32
                         : std::is_same_v<T, __nv_bfloat16> ? Dtype::BFloat16
                         : std::is_same_v<T, __half>        ? Dtype::Float16
                         : std::is_same_v<T, double>        ? Dtype::Float64
                                                            : Dtype::Int8;

// Whether the kernels for these types are a pair's. An absent forget gradient has no type of its own.
template <class G, class F>
bool is_of(const Pair& pair) {
  return pair.numel > 0 && pair.dtype == kDtype<G> && (pair.forget ? pair.forget_dtype : pair.dtype) == kDtype<F>;
}

// Call visit(retain, forget) with a number of each type for every pair of types, until one returns an error.
template <class G, class Visitor>
int for_each_forget(G retain, const Visitor& visit) {
  int error = visit(retain, retain);
  if constexpr (sizeof(G) > 2) error = error ? error : visit(retain, __nv_bfloat16());
  return error ? error : visit(retain, int8_t());
}
template <class Visitor>
int for_each_gradients(const Visitor& visit) {
  int error = for_each_forget(float(), visit);
  error = error ? error : for_each_forget(__nv_bfloat16(), visit);
  error = error ? error : for_each_forget(__half(), visit);
  return error ? error : for_each_forget(double(), visit);
}
// Call visit(param, retain, forget) with a number of each type that are found together, until one returns an error.
template <class Visitor>
int for_each_types(const Visitor& visit) {
  int error = for_each_gradients([&](auto retain, auto forget) { return visit(retain, retain, forget); });
  const auto beside_float = [&](auto retain, auto forget) { return visit(float(), retain, forget); };
  error = error ? error : for_each_forget(__nv_bfloat16(), beside_float);
  return error ? error : for_each_forget(__half(), beside_float);
}

}  // namespace
}  // namespace blur_optim::cuda
