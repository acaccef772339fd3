// The dots of two lists of gradients, their blend, and their compression. An argument table holds pairs of the same dtypes; long lists and
// mixed dtypes take several launches.
#include "reduce.cuh"

namespace blur_optim::cuda {
namespace {

using DotsTable = Table<3, DotsOptions>;

struct BlendOptions {
  const double* coefficients;
};
using BlendTable = Table<3, BlendOptions>;

template <class G, class F>
__global__ void __launch_bounds__(kBlock, kMinBlocks) dots_kernel(const __grid_constant__ DotsTable table) {
  using C = Compute<G>;
  constexpr int N = kPack<G, F>;
  static_assert(std::is_same_v<C, double> || kChunk / (kBlock * N) <= kRun);
  BLUR_SHARED(double, shared, 3 * kWarps);
  const Piece piece = locate(table, blockIdx.x);
  const auto& entry = table.entries[piece.entry];
  const Gradients<G, F> g(entry, piece.offset);
  C rf[N] = {}, ff[N] = {}, rr[N] = {};
  for_each_pack<N, kDotsUnroll>(piece.numel, aligned<N>(g.forget, g.retain), [&](int i, auto access) {
    F x[N];
    G y[N];
    access.read(x, g.forget + i);
    access.read(y, g.retain + i);
    const C scale = g.scale(i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C xk = g.restored(x[k], scale), yk = to_compute(y[k]);
      rf[k] = fma(xk, yk, rf[k]);  // Where written, a fused multiply-add is the same everywhere.
      ff[k] = fma(xk, xk, ff[k]);
      rr[k] = fma(yk, yk, rr[k]);
    }
  });
  double sums[3] = {g.has_forget && g.has_retain ? double(total(rf)) : 0, g.has_forget ? double(total(ff)) : 0,
                    g.has_retain ? double(total(rr)) : 0};
  const double sum = block_sums(sums, shared);
  const int64_t chunk = entry.key + piece.offset / kChunk;
  if (threadIdx.x < 3) table.options.partials[threadIdx.x * table.options.chunks + chunk] = sum;
}

template <class G, class F>
__global__ void __launch_bounds__(kBlock, kMinBlocks) blend_kernel(const __grid_constant__ BlendTable table) {
  constexpr int N = kPack<G, F>;
  const Piece piece = locate(table, blockIdx.x);
  const auto& entry = table.entries[piece.entry];
  const Update<G, F> u(entry, piece.offset, table.options.coefficients + 2 * entry.key, false);
  // Not __ldg: one of the two is written.
  for_each_pack<N, 1>(piece.numel, aligned<N>(u.forget, u.retain), [&](int i, auto access) {
    F f[N];
    G r[N];
    access.load(f, u.forget + i);
    access.load(r, u.retain + i);
    const auto scale = u.scale(i);
#pragma unroll
    for (int k = 0; k < N; ++k) round_to(r[k], u(f[k], r[k], scale));
    access.store(u.retain + i, r);
  });
}

struct NoOptions {};
using CompressTable = Table<3, NoOptions>;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(double x) { return float(x); }

// As quantize_block of the CPU kernels, to the bit. A warp has a block: lane k its elements k, k + 32, ...
template <class G>
__device__ void quantize_block(const G* x, int count, int8_t* values, float* scale) {
  constexpr int kEach = kBlockSize / 32;
  constexpr float kRounder = 12582912.0f;
  const int lane = int(threadIdx.x) % 32;
  float mine[kEach];
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = 32 * k + lane;
    mine[k] = i < count ? to_float(to_compute(x[i])) : 0.0f;
    uint32_t magnitude;
    memcpy(&magnitude, &mine[k], sizeof magnitude);
    magnitude &= 0x7fffffffu;
    largest = largest < magnitude ? magnitude : largest;
  }
  for (int distance = 16; distance; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, distance);
    largest = largest < other ? other : largest;
  }
  float divisor;
  memcpy(&divisor, &largest, sizeof divisor);
  divisor = divisor / 127.0f;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = 32 * k + lane;
    const float quotient = mine[k] / divisor;
    float rounded = (quotient + kRounder) - kRounder;
    rounded = quotient - quotient == 0.0f ? rounded : 0.0f;
    rounded = rounded > 127.0f ? 127.0f : rounded;
    rounded = rounded < -127.0f ? -127.0f : rounded;
    if (i < count) values[i] = int8_t(int32_t(rounded));
  }
  if (lane == 0) *scale = divisor;
}

// F is what is written.
template <class G, class F>
__global__ void __launch_bounds__(kBlock) compress_kernel(const __grid_constant__ CompressTable table) {
  const Piece piece = locate(table, blockIdx.x);
  const auto& entry = table.entries[piece.entry];
  const Gradients<G, F> g(entry, piece.offset);
  if constexpr (std::is_same_v<F, int8_t>) {
    float* const scales = const_cast<float*>(g.scales);
    for (int first = int(threadIdx.x) / 32 * kBlockSize; first < piece.numel; first += kWarps * kBlockSize) {
      const int rest = piece.numel - first;
      quantize_block(g.retain + first, rest < kBlockSize ? rest : kBlockSize, g.forget + first, scales + first / kBlockSize);
    }
  } else {
    constexpr int N = kPack<G, F>;
    for_each_pack<N, 1>(piece.numel, aligned<N>(g.forget, g.retain), [&](int i, auto access) {
      F f[N];
      G r[N];
      access.load(r, g.retain + i);
#pragma unroll
      for (int k = 0; k < N; ++k) round_to(f[k], to_float(to_compute(r[k])));
      access.store(g.forget + i, f);
    });
  }
}

template <class G, class F>
int launch_dots(const Pair* pairs, int64_t count, DotsOptions options, void* stream) {
  Batch<DotsTable> batch(dots_kernel<G, F>, options, stream);
  int64_t chunk = 0;
  for (int64_t i = 0; i < count; chunk += chunks_of(pairs[i++].numel))
    if (is_of<G, F>(pairs[i])) batch.add(pairs[i], chunk, i);
  return batch.flush();
}

}  // namespace

int64_t blur_optim_cuda_dots_workspace(const Pair* pairs, int64_t count) { return 3 * all_chunks(pairs, count); }

int blur_optim_cuda_dots(const Pair* pairs, int64_t count, int64_t num_rows, double* workspace, double* out, void* stream) {
  const DotsOptions options{workspace, all_chunks(pairs, count)};
  const int error = for_each_gradients([&](auto retain, auto forget) {
    return launch_dots<decltype(retain), decltype(forget)>(pairs, count, options, stream);
  });
  // On the same stream, so that it begins when all chunks are written.
  return error ? error : launch_rows<3>(pairs, count, num_rows, options, out, stream);
}

int blur_optim_cuda_compress(const Pair* pairs, int64_t count, void* stream) {
  return for_each_gradients([&](auto grad, auto compressed) {
    using G = decltype(grad);
    using F = decltype(compressed);
    if constexpr (std::is_same_v<F, int8_t> || (std::is_same_v<F, __nv_bfloat16> && sizeof(G) > 2)) {
      Batch<CompressTable> batch(compress_kernel<G, F>, {}, stream);
      for (int64_t i = 0; i < count; ++i)
        if (is_of<G, F>(pairs[i])) batch.add(pairs[i], 0, i);
      return batch.flush();
    }
    return int(cudaSuccess);
  });
}

int blur_optim_cuda_blend(const Pair* pairs, int64_t count, const double* coefficients, void* stream) {
  return for_each_gradients([&](auto retain, auto forget) {
    using G = decltype(retain);
    using F = decltype(forget);
    Batch<BlendTable> batch(blend_kernel<G, F>, {coefficients}, stream);
    for (int64_t i = 0; i < count; ++i)
      if (is_of<G, F>(pairs[i])) batch.add(pairs[i], pairs[i].row, i);
    return batch.flush();
  });
}

const char* blur_optim_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace blur_optim::cuda
