// The dots of two lists of gradients in the metric of the retain loss, and the blend that advances its second moments.
#include <vector>

#include "reduce.cuh"

namespace blur_optim::cuda {
namespace {

struct MetricDotsOptions {
  DotsOptions sums;
  const double* metric;
};
using MetricDotsTable = Table<5, MetricDotsOptions>;
using MetricBlendTable = Table<4, DeviceScalars>;

template <class P, class G, class F, bool kAmsgrad>
__global__ void __launch_bounds__(kBlock, sizeof(P) == 8 ? 1 : kMinBlocks)
    metric_dots_kernel(const __grid_constant__ MetricDotsTable table) {
  using C = Compute<P>;
  constexpr int N = kPack<P, G, F>;
  static_assert(std::is_same_v<C, double> || kChunk / (kBlock * N) <= kRun);
  BLUR_SHARED(double, shared, kMetricDots * kWarps);
  const Piece piece = locate(table, blockIdx.x);
  const auto& entry = table.entries[piece.entry];
  const P* const v = at<P>(entry.pointers[0], piece.offset);
  const P* const vmax = kAmsgrad ? at<P>(entry.pointers[1], piece.offset) : nullptr;
  const Gradients<G, F> g(entry, piece.offset);
  const MetricConstants<C> metric(table.options.metric, entry.tensor);
  C totals[kMetricDots] = {};
  for_each_pack<N, 2>(piece.numel, aligned<N>(v, vmax, g.forget, g.retain), [&](int i, auto access) {
    F x[N];
    G y[N];
    P vs[N];
    [[maybe_unused]] P vmaxs[N];
    access.read(x, g.forget + i);
    access.read(y, g.retain + i);
    access.read(vs, v + i);
    if constexpr (kAmsgrad) access.read(vmaxs, vmax + i);
    const auto scale = g.scale(i);
    C terms[kMetricDots][N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C f = g.has_forget ? C(g.restored(x[k], scale)) : C(0), r = C(g.retained(y[k]));
      C second = metric.moment(to_compute(vs[k]), r);
      if constexpr (kAmsgrad) {
        const C seen = to_compute(vmaxs[k]);
        second = seen < second ? second : seen;
      }
      const C corrected = second * metric.inverse_correction;
      const C inverse = C(1) / metric.denominator(corrected);
      const C pf = inverse * f;
      terms[0][k] = r * f;
      terms[1][k] = f * f;
      terms[2][k] = r * r;
      terms[3][k] = r * pf;
      terms[4][k] = f * pf;
      terms[5][k] = r * (inverse * r);
      terms[6][k] = pf * pf;
      terms[7][k] = (pf * pf) * (pf * pf);
      terms[8][k] = corrected;
    }
#pragma unroll
    for (int d = 0; d < kMetricDots; ++d) totals[d] += total(terms[d]);  // One register for each sum, and short runs.
  });
  double sums[kMetricDots];
#pragma unroll
  for (int d = 0; d < kMetricDots; ++d) sums[d] = (d % 3 || d == 6 || (g.has_forget && g.has_retain)) ? double(totals[d]) : 0;
  const double sum = block_sums(sums, shared);
  const int64_t chunk = entry.key + piece.offset / kChunk;
  const DotsOptions& out = table.options.sums;
  if (threadIdx.x < kMetricDots) out.partials[threadIdx.x * out.chunks + chunk] = sum;
}

template <class P, class G, class F>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    metric_blend_kernel(const __grid_constant__ MetricBlendTable table) {
  using C = Compute<P>;
  constexpr int N = kPack<P, G, F>;
  const Piece piece = locate(table, blockIdx.x);
  const auto& entry = table.entries[piece.entry];
  P* const v = at<P>(entry.pointers[0], piece.offset);
  const Update<G, F> u(entry, piece.offset, table.options.coefficients + 2 * entry.key, false);
  const MetricConstants<C> metric(table.options.metric, entry.tensor);
  const bool skip = is_set(table.options.found_inf);
  for_each_pack<N, 1>(piece.numel, aligned<N>(v, u.forget, u.retain), [&](int i, auto access) {
    F f[N];
    G r[N];
    P vs[N];
    access.load(f, u.forget + i);
    access.load(r, u.retain + i);
    access.load(vs, v + i);
    const auto scale = u.scale(i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!skip) round_to(vs[k], metric.moment(to_compute(vs[k]), C(u.retained(r[k]))));
      round_to(r[k], u(f[k], r[k], scale));
    }
    access.store(v + i, vs);
    access.store(u.retain + i, r);
  });
}

}  // namespace

int64_t blur_optim_cuda_metric_dots_workspace(const MetricTensors* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(tensors[i].grads.numel);
  return kMetricDots * chunks;
}

int blur_optim_cuda_metric_dots(const MetricTensors* tensors, const int64_t* order, int64_t count, int64_t num_rows,
                                const double* metric, double* workspace, double* out, void* stream) {
  const DotsOptions sums{workspace, blur_optim_cuda_metric_dots_workspace(tensors, count) / kMetricDots};
  const int error = for_each_types([&](auto param, auto retain, auto forget) {
    using P = decltype(param);
    using G = decltype(retain);
    using F = decltype(forget);
    Batch<MetricDotsTable> plain(metric_dots_kernel<P, G, F, false>, {sums, metric}, stream);
    Batch<MetricDotsTable> largest(metric_dots_kernel<P, G, F, true>, {sums, metric}, stream);
    int64_t chunk = 0;
    for (int64_t i = 0; i < count; chunk += chunks_of(tensors[i++].grads.numel)) {
      const MetricTensors& t = tensors[i];
      if (t.dtype == kDtype<P> && is_of<G, F>(t.grads))
        (t.max_exp_avg_sq ? largest : plain).add(t.grads, chunk, order[i], t.exp_avg_sq, t.max_exp_avg_sq);
    }
    const int failed = plain.flush();
    return failed ? failed : largest.flush();
  });
  std::vector<Pair> pairs;
  for (int64_t i = 0; i < count; ++i) pairs.push_back(tensors[i].grads);
  return error ? error : launch_rows<kMetricDots>(pairs.data(), count, num_rows, sums, out, stream);
}

int blur_optim_cuda_metric_blend(const MetricTensors* tensors, int64_t count, DeviceScalars scalars, void* stream) {
  return for_each_types([&](auto param, auto retain, auto forget) {
    using P = decltype(param);
    using G = decltype(retain);
    using F = decltype(forget);
    Batch<MetricBlendTable> batch(metric_blend_kernel<P, G, F>, scalars, stream);
    for (int64_t i = 0; i < count; ++i) {
      const MetricTensors& t = tensors[i];
      if (t.dtype == kDtype<P> && is_of<G, F>(t.grads)) batch.add(t.grads, t.grads.row, i, t.exp_avg_sq);
    }
    return batch.flush();
  });
}

}  // namespace blur_optim::cuda
