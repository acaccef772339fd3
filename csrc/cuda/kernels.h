// The CUDA launchers: raw pointers on the device, a stream, no torch header, so that nvcc compiles them alone.
//
// Nothing here waits for the device. Every function returns a cudaError_t, 0 where all launches went well.
#pragma once

#include "../multi_tensor.h"

namespace blur_optim::cuda {

// A parameter with its state, which the fused updates modify. Null where the optimizer keeps no such state.
struct AdamTensors {
  Pair grads;
  Dtype dtype;
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
};

struct SgdTensors {
  Pair grads;
  Dtype dtype;
  void* param;
  void* momentum_buffer;
  void* exp_avg_sq;  // With a metric.
};

// What the dots in the metric read beside the gradients, and the blend writes. max_exp_avg_sq is null without amsgrad.
struct MetricTensors {
  Pair grads;
  Dtype dtype;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
};

// What stays on the device, so that the host never waits for it: [rows, 2] and scalars. found_inf may be null.
struct DeviceScalars {
  const double* coefficients;
  const double* lr;  // In place of the `lr` of AdamOptions and SgdOptions.
  const float* found_inf;
  const double* metric;  // [tensors, kMetricNumbers], or null.
};

extern "C" {

// How many float64 numbers blur_optim_cuda_dots needs as workspace.
int64_t blur_optim_cuda_dots_workspace(const Pair* pairs, int64_t count);

// out = [num_rows, 3]: <r, f>, |f|^2, |r|^2 of each row. The rows of the pairs must ascend.
int blur_optim_cuda_dots(const Pair* pairs, int64_t count, int64_t num_rows, double* workspace, double* out, void* stream);

// r <- a f + b r; into f where r is absent.
int blur_optim_cuda_blend(const Pair* pairs, int64_t count, const double* coefficients, void* stream);

// Compress the retain gradient of each pair into its forget gradient: Int8 with scales, which are written, or BFloat16.
int blur_optim_cuda_compress(const Pair* pairs, int64_t count, void* stream);

int64_t blur_optim_cuda_metric_dots_workspace(const MetricTensors* tensors, int64_t count);

// out = [num_rows, kMetricDots]. The rows of the pairs must ascend; `order` is each one's row of the metric.
int blur_optim_cuda_metric_dots(const MetricTensors* tensors, const int64_t* order, int64_t count, int64_t num_rows,
                                const double* metric, double* workspace, double* out, void* stream);

// As the blend, and exp_avg_sq advances unless found_inf is set.
int blur_optim_cuda_metric_blend(const MetricTensors* tensors, int64_t count, DeviceScalars scalars, void* stream);

// steps is [count] float32 on the device, the workspace 2 * count.
int blur_optim_cuda_adam(const AdamTensors* tensors, int64_t count, const AdamOptions* options, DeviceScalars scalars,
                         const float* steps, double* workspace, void* stream);

int blur_optim_cuda_sgd(const SgdTensors* tensors, int64_t count, const SgdOptions* options, DeviceScalars scalars,
                        void* stream);

const char* blur_optim_cuda_error(int code);

}  // extern "C"
}  // namespace blur_optim::cuda
