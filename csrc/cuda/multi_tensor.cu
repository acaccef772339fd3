// The dots of two lists of gradients, and their blend. An argument table holds pairs of the same dtypes; long lists and
// mixed dtypes take several launches.
#include "device.cuh"

namespace blur_optim::cuda {
namespace {

struct DotsOptions {
  double* partials;  // [3, chunks]
  int64_t chunks;
};
using DotsTable = Table<3, DotsOptions>;

struct BlendOptions {
  const double* coefficients;
};
using BlendTable = Table<3, BlendOptions>;

struct RowsTable {
  static constexpr int kCapacity = int((kArgumentBytes - 48) / sizeof(int64_t)) - 1;
  const double* partials;
  double* out;
  int64_t chunks;
  int64_t row;                   // The first of this launch;
  int64_t first[kCapacity + 1];  // the first chunk of each, and the end.
};
static_assert(sizeof(RowsTable) <= kArgumentBytes);

// Pairwise, so that the order is fixed.
template <class C, int N>
__device__ double total(C (&values)[N]) {
#pragma unroll
  for (int width = N / 2; width; width /= 2)
    for (int k = 0; k < width; ++k) values[k] += values[k + width];
  return double(values[0]);
}

// The sums of K values over the block, in an order that the size of the block alone decides. Thread k gets the kth.
template <int K>
__device__ double block_sums(double (&values)[K], double* shared) {
#pragma unroll
  for (int k = 0; k < K; ++k)
    for (int distance = 16; distance; distance /= 2) values[k] += __shfl_xor_sync(0xffffffffu, values[k], distance);
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int k = 0; k < K; ++k) shared[k * kWarps + threadIdx.x / 32] = values[k];
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < K)
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[threadIdx.x * kWarps + warp];
  return sum;
}

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
  double sums[3] = {g.has_forget && g.has_retain ? total(rf) : 0, g.has_forget ? total(ff) : 0,
                    g.has_retain ? total(rr) : 0};
  const double sum = block_sums(sums, shared);
  const int64_t chunk = entry.key + piece.offset / kChunk;
  if (threadIdx.x < 3) table.options.partials[threadIdx.x * table.options.chunks + chunk] = sum;
}

// Block (row, k) adds the chunks of a row for the kth dot.
__global__ void __launch_bounds__(kBlock) rows_kernel(const __grid_constant__ RowsTable table) {
  BLUR_SHARED(double, shared, kWarps);
  const double* partials = table.partials + blockIdx.y * table.chunks;
  double sums[1] = {};
  // Three blocks a row are all there is to hide the latency behind: of 7B parameters each thread adds 1600 chunks.
#pragma unroll 16
  for (int64_t c = table.first[blockIdx.x] + threadIdx.x; c < table.first[blockIdx.x + 1]; c += kBlock)
    sums[0] += partials[c];
  const double sum = block_sums(sums, shared);
  if (threadIdx.x == 0) table.out[3 * (table.row + blockIdx.x) + blockIdx.y] = sum;
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

template <class G, class F>
int launch_dots(const Pair* pairs, int64_t count, DotsOptions options, void* stream) {
  Batch<DotsTable> batch(dots_kernel<G, F>, options, stream);
  int64_t chunk = 0;
  for (int64_t i = 0; i < count; chunk += chunks_of(pairs[i++].numel))
    if (is_of<G, F>(pairs[i])) batch.add(pairs[i], chunk, i);
  return batch.flush();
}

int launch_rows(const Pair* pairs, int64_t count, int64_t num_rows, DotsOptions options, double* out, void* stream) {
  RowsTable table{options.partials, out, options.chunks, 0, {0}};
  int64_t pair = 0, chunk = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    while (pair < count && pairs[pair].row == row) chunk += chunks_of(pairs[pair++].numel);
    table.first[row + 1 - table.row] = chunk;
    if (row + 1 < num_rows && row + 1 - table.row < RowsTable::kCapacity) continue;
    const dim3 grid(unsigned(row + 1 - table.row), 3);
    if (const int error = launch(rows_kernel, grid, stream, table)) return error;
    table.row = row + 1;
    table.first[0] = chunk;
  }
  return cudaSuccess;
}

}  // namespace

int64_t blur_optim_cuda_dots_workspace(const Pair* pairs, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(pairs[i].numel);
  return 3 * chunks;
}

int blur_optim_cuda_dots(const Pair* pairs, int64_t count, int64_t num_rows, double* workspace, double* out, void* stream) {
  const DotsOptions options{workspace, blur_optim_cuda_dots_workspace(pairs, count) / 3};
  const int error = for_each_gradients([&](auto retain, auto forget) {
    return launch_dots<decltype(retain), decltype(forget)>(pairs, count, options, stream);
  });
  // On the same stream, so that it begins when all chunks are written.
  return error ? error : launch_rows(pairs, count, num_rows, options, out, stream);
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
