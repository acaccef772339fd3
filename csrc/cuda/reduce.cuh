// Sums over the chunks of many tensors in two stages: a block sums its chunk, then a block the chunks of a row.
#pragma once

#include "device.cuh"

namespace blur_optim::cuda {
namespace {

struct DotsOptions {
  double* partials;  // [sums, chunks]
  int64_t chunks;
};

inline int64_t all_chunks(const Pair* pairs, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(pairs[i].numel);
  return chunks;
}

struct RowsTable {
  static constexpr int kCapacity = int((kArgumentBytes - 48) / sizeof(int64_t)) - 1;
  const double* partials;
  double* out;
  int64_t chunks;
  int64_t sums;                  // Of each chunk.
  int64_t row;                   // The first row of this launch;
  int64_t first[kCapacity + 1];  // the first chunk of each, and the end.
};
static_assert(sizeof(RowsTable) <= kArgumentBytes);

// Pairwise, so that the order is fixed.
template <class C, int N>
__device__ C total(C (&values)[N]) {
#pragma unroll
  for (int width = N / 2; width; width /= 2)
    for (int k = 0; k < width; ++k) values[k] += values[k + width];
  return values[0];
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

// Block (row, k) adds the chunks of a row for the kth dot.
__global__ void __launch_bounds__(kBlock) rows_kernel(const __grid_constant__ RowsTable table) {
  BLUR_SHARED(double, shared, kWarps);
  const double* partials = table.partials + blockIdx.y * table.chunks;
  double sums[1] = {};
  // A few blocks a row are all there is to hide the latency behind: of 7B parameters each thread adds 1600 chunks.
#pragma unroll 16
  for (int64_t c = table.first[blockIdx.x] + threadIdx.x; c < table.first[blockIdx.x + 1]; c += kBlock)
    sums[0] += partials[c];
  const double sum = block_sums(sums, shared);
  if (threadIdx.x == 0) table.out[table.sums * (table.row + blockIdx.x) + blockIdx.y] = sum;
}

template <int kSums>
int launch_rows(const Pair* pairs, int64_t count, int64_t num_rows, DotsOptions options, double* out, void* stream) {
  RowsTable table{options.partials, out, options.chunks, kSums, 0, {0}};
  int64_t pair = 0, chunk = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    while (pair < count && pairs[pair].row == row) chunk += chunks_of(pairs[pair++].numel);
    table.first[row + 1 - table.row] = chunk;
    if (row + 1 < num_rows && row + 1 - table.row < RowsTable::kCapacity) continue;
    const dim3 grid(unsigned(row + 1 - table.row), kSums);
    if (const int error = launch(rows_kernel, grid, stream, table)) return error;
    table.row = row + 1;
    table.first[0] = chunk;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace blur_optim::cuda
