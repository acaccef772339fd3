// The fused updates: a step of AdamW, Adam or SGD on u = a f + b r, which never leaves the registers.
#include "device.cuh"

namespace blur_optim::cuda {
namespace {

struct AdamArguments {
  DeviceScalars scalars;
  const double* corrections;  // [tensors, 2]: step size, square root of the second bias correction.
  AdamOptions options;
};
using AdamTable = Table<7, AdamArguments>;

struct SgdArguments {
  DeviceScalars scalars;
  SgdOptions options;
};
using SgdTable = Table<6, SgdArguments>;

struct CorrectionsTable {
  const float* steps;
  const double* lr;
  double* out;
  int64_t count;
  double beta1, beta2;
};

// Once per tensor: a float64 power in each block would cost it microseconds.
__global__ void __launch_bounds__(kBlock) corrections_kernel(const __grid_constant__ CorrectionsTable table) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= table.count) return;
  const double step = double(table.steps[i]);
  table.out[2 * i] = *table.lr / (1 - pow(table.beta1, step));
  table.out[2 * i + 1] = sqrt(1 - pow(table.beta2, step));
}

struct NoMetric {};
template <class C, bool kMetric>
__device__ auto metric_of(const DeviceScalars& scalars, int64_t tensor) {
  if constexpr (kMetric)
    return MetricConstants<C>(scalars.metric, tensor);
  else
    return NoMetric();
}

// For float64 the compiler would rather spill registers than run fewer blocks at a time, unless one is enough.
template <class P, class G, class F, bool kAmsgrad, bool kMetric>
__global__ void __launch_bounds__(kBlock, sizeof(P) == 8 ? 1 : kMinBlocks)
    adam_kernel(const __grid_constant__ AdamTable table) {
  using C = Compute<P>;
  constexpr int N = kPack<P, G, F>;
  const AdamOptions& o = table.options.options;
  const DeviceScalars& scalars = table.options.scalars;
  if (is_set(scalars.found_inf)) return;
  const Piece piece = locate(table, blockIdx.x);
  const auto& entry = table.entries[piece.entry];
  P* const p = at<P>(entry.pointers[0], piece.offset);
  P* const m = at<P>(entry.pointers[1], piece.offset);
  P* const v = at<P>(entry.pointers[2], piece.offset);
  P* const vmax = kAmsgrad ? at<P>(entry.pointers[3], piece.offset) : nullptr;
  const Update<G, F> u(entry, piece.offset, scalars.coefficients + 2 * entry.key, o.maximize);
  const bool decoupled = o.decoupled;
  const C decay = C(decoupled ? 1 - *scalars.lr * o.weight_decay : o.weight_decay);
  const C beta1 = C(o.beta1), beta2 = C(o.beta2), rest1 = C(1 - o.beta1), rest2 = C(1 - o.beta2), eps = C(o.eps);
  const C step_size = C(table.options.corrections[2 * entry.tensor]);
  const C correction2_sqrt = C(table.options.corrections[2 * entry.tensor + 1]);
  [[maybe_unused]] const auto metric = metric_of<C, kMetric>(scalars, entry.tensor);
  for_each_pack<N, 1>(piece.numel, aligned<N>(p, m, v, vmax, u.forget, u.retain), [&](int i, auto access) {
    F f[N];
    G r[N];
    P ps[N], ms[N], vs[N];
    [[maybe_unused]] P vmaxs[N];
    access.read(f, u.forget + i);
    access.read(r, u.retain + i);
    const auto scale = u.scale(i);
    access.load(ps, p + i);
    access.load(ms, m + i);
    access.load(vs, v + i);
    if constexpr (kAmsgrad) access.load(vmaxs, vmax + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      C param = to_compute(ps[k]);
      C grad = C(u(f[k], r[k], scale));
      if (decoupled)
        param *= decay;
      else
        grad += decay * param;
      const C m_new = beta1 * to_compute(ms[k]) + rest1 * grad;
      C v_new;
      if constexpr (kMetric)
        v_new = metric.moment(to_compute(vs[k]), C(u.retained(r[k])));
      else
        v_new = beta2 * to_compute(vs[k]) + rest2 * grad * grad;
      round_to(ms[k], m_new);
      round_to(vs[k], v_new);
      C second = v_new;
      if constexpr (kAmsgrad) {
        const C seen = to_compute(vmaxs[k]);
        second = seen < v_new ? v_new : seen;
        round_to(vmaxs[k], second);
      }
      C denominator;
      if constexpr (kMetric)
        denominator = metric.denominator(second * metric.inverse_correction);
      else
        denominator = sqrt(second) / correction2_sqrt + eps;
      round_to(ps[k], param - step_size * m_new / denominator);
    }
    access.store(p + i, ps);
    access.store(m + i, ms);
    access.store(v + i, vs);
    if constexpr (kAmsgrad) access.store(vmax + i, vmaxs);
  });
}

template <class P, class G, class F, bool kMomentum, bool kMetric>
__global__ void __launch_bounds__(kBlock, kMinBlocks) sgd_kernel(const __grid_constant__ SgdTable table) {
  using C = Compute<P>;
  constexpr int N = kPack<P, G, F>;
  const SgdOptions& o = table.options.options;
  const DeviceScalars& scalars = table.options.scalars;
  if (is_set(scalars.found_inf)) return;
  const Piece piece = locate(table, blockIdx.x);
  const auto& entry = table.entries[piece.entry];
  P* const p = at<P>(entry.pointers[0], piece.offset);
  P* const buffer = kMomentum ? at<P>(entry.pointers[1], piece.offset) : nullptr;
  P* const v = kMetric ? at<P>(entry.pointers[2], piece.offset) : nullptr;
  const Update<G, F> u(entry, piece.offset, scalars.coefficients + 2 * entry.key, o.maximize);
  const C lr = C(*scalars.lr), decay = C(o.weight_decay), momentum = C(o.momentum);
  const bool first_step = o.first_step, nesterov = o.nesterov;
  // The first step starts the buffer with the gradient itself, undamped.
  const C keep = C(first_step ? 0 : o.momentum), take = C(first_step ? 1 : 1 - o.dampening);
  [[maybe_unused]] const auto metric = metric_of<C, kMetric>(scalars, entry.tensor);
  for_each_pack<N, 1>(piece.numel, aligned<N>(p, buffer, v, u.forget, u.retain), [&](int i, auto access) {
    F f[N];
    G r[N];
    P ps[N];
    [[maybe_unused]] P buffers[N], vs[N];
    access.read(f, u.forget + i);
    access.read(r, u.retain + i);
    const auto scale = u.scale(i);
    access.load(ps, p + i);
    if constexpr (kMomentum) access.load(buffers, buffer + i);
    if constexpr (kMetric) access.load(vs, v + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C param = to_compute(ps[k]);
      C grad = C(u(f[k], r[k], scale)) + decay * param;
      if constexpr (kMomentum) {
        const C moved = keep * (first_step ? C(0) : to_compute(buffers[k])) + take * grad;  // It may hold anything before.
        round_to(buffers[k], moved);
        grad = nesterov ? grad + momentum * moved : moved;
      }
      if constexpr (kMetric) {
        const C v_new = metric.moment(to_compute(vs[k]), C(u.retained(r[k])));
        round_to(vs[k], v_new);
        grad = grad / metric.denominator(v_new * metric.inverse_correction);
      }
      round_to(ps[k], param - lr * grad);
    }
    access.store(p + i, ps);
    if constexpr (kMomentum) access.store(buffer + i, buffers);
    if constexpr (kMetric) access.store(v + i, vs);
  });
}

}  // namespace

int blur_optim_cuda_adam(const AdamTensors* tensors, int64_t count, const AdamOptions* options, DeviceScalars scalars,
                         const float* steps, double* workspace, void* stream) {
  if (count == 0) return cudaSuccess;
  const CorrectionsTable corrections{steps, scalars.lr, workspace, count, options->beta1, options->beta2};
  const dim3 grid(unsigned((count + kBlock - 1) / kBlock));
  if (const int error = launch(corrections_kernel, grid, stream, corrections)) return error;
  return for_each_types([&](auto param, auto retain, auto forget) {
    using P = decltype(param);
    using G = decltype(retain);
    using F = decltype(forget);
    const auto kernel = scalars.metric
                            ? options->amsgrad ? adam_kernel<P, G, F, true, true> : adam_kernel<P, G, F, false, true>
                            : options->amsgrad ? adam_kernel<P, G, F, true, false> : adam_kernel<P, G, F, false, false>;
    Batch<AdamTable> batch(kernel, {scalars, workspace, *options}, stream);
    for (int64_t i = 0; i < count; ++i) {
      const AdamTensors& t = tensors[i];
      if (t.dtype == kDtype<P> && is_of<G, F>(t.grads))
        batch.add(t.grads, t.grads.row, i, t.param, t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq);
    }
    return batch.flush();
  });
}

int blur_optim_cuda_sgd(const SgdTensors* tensors, int64_t count, const SgdOptions* options, DeviceScalars scalars,
                        void* stream) {
  return for_each_types([&](auto param, auto retain, auto forget) {
    using P = decltype(param);
    using G = decltype(retain);
    using F = decltype(forget);
    const bool momentum = options->momentum != 0;
    const auto kernel = scalars.metric ? momentum ? sgd_kernel<P, G, F, true, true> : sgd_kernel<P, G, F, false, true>
                                       : momentum ? sgd_kernel<P, G, F, true, false> : sgd_kernel<P, G, F, false, false>;
    Batch<SgdTable> batch(kernel, {scalars, *options}, stream);
    for (int64_t i = 0; i < count; ++i) {
      const SgdTensors& t = tensors[i];
      if (t.dtype == kDtype<P> && is_of<G, F>(t.grads))
        batch.add(t.grads, t.grads.row, i, t.param, t.momentum_buffer, t.exp_avg_sq);
    }
    return batch.flush();
  });
}

}  // namespace blur_optim::cuda
