// The operators on CUDA tensors: checks, workspaces and the stream here, everything else in the launchers.
//
// Host code: compiled by the C++ compiler against torch's stable ABI, also against a torch that has no CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "../arguments.h"
#include "kernels.h"

#ifndef BLUR_OPTIM_EMULATOR
// Weak: a torch without CUDA does not have it, and this library has to load there for its CPU half.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace blur_optim {
namespace {

#ifndef BLUR_OPTIM_EMULATOR  // The tests have their own.
// Makes the device of a tensor the current one for as long as it lives, and knows the current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "This torch has no CUDA.");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_) == 0,
                    "The current CUDA stream is not known.");
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

void check_launch(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, "`", name, "` could not be launched: ", cuda::blur_optim_cuda_error(error), ".");
}

// A host pointer, or one of another device, would fault in the kernel and take the whole process's CUDA context with it.
void check_device(const Tensors& tensors, const Tensor& like, const char* name) {
  const torch::stable::Device device = like.device();
  for (size_t i = 0; i < tensors.size(); ++i)
    STD_TORCH_CHECK(tensors[i].device() == device, "`", name, "[", i, "]` must be on the device of the other tensors.");
}

// The gradients, checked.
std::vector<Pair> pairs_on_device(const Tensors& forget, const Tensors& retain, const Tensors& scales,
                                  const std::vector<int64_t>& rows, int64_t num_rows, const Tensor& like) {
  check_device(forget, like, "forget");
  check_device(retain, like, "retain");
  std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, num_rows);
  for (size_t i = 0; i < pairs.size(); ++i)  // What stands beside other gradients is never read.
    STD_TORCH_CHECK(!pairs[i].scales || scales[i].device() == like.device(), "`scales[", i,
                    "]` must be on the device of the other tensors.");
  return pairs;
}

// The state tensor i, or null where the optimizer keeps none.
void* state_at(const std::vector<void*>& state, size_t i) { return i < state.size() ? state[i] : nullptr; }

std::vector<cuda::MetricTensors> metric_tensors(const std::vector<Pair>& pairs, const Tensors& exp_avg_sqs,
                                                const Tensors& max_exp_avg_sqs, const Tensor& like) {
  check_device(exp_avg_sqs, like, "exp_avg_sqs");
  check_device(max_exp_avg_sqs, like, "max_exp_avg_sqs");
  check_like(exp_avg_sqs, pairs, "exp_avg_sqs");
  if (!max_exp_avg_sqs.empty()) check_like(max_exp_avg_sqs, pairs, "max_exp_avg_sqs");
  check_state(max_exp_avg_sqs, exp_avg_sqs, "max_exp_avg_sqs", "exp_avg_sqs");
  const std::vector<Dtype> dtypes = param_dtypes(exp_avg_sqs, pairs, "exp_avg_sqs");
  const auto v = pointers(exp_avg_sqs), vmax = pointers(max_exp_avg_sqs);
  std::vector<cuda::MetricTensors> tensors;
  for (size_t i = 0; i < pairs.size(); ++i) tensors.push_back({pairs[i], dtypes[i], v[i], state_at(vmax, i)});
  return tensors;
}

Tensor new_float64(const Tensor& like, int64_t numel) {
  return torch::stable::new_empty(like, {std::max<int64_t>(numel, 1)}, ScalarType::Double);
}

}  // namespace

Tensor multi_tensor_dots_cuda(Tensors forget, Tensors retain, std::vector<int64_t> rows, int64_t num_rows,
                              Tensors scales) {
  STD_TORCH_CHECK(!forget.empty(), "`forget` must not be empty.");
  const OnDevice device(forget[0]);
  std::vector<Pair> pairs = pairs_on_device(forget, retain, scales, rows, num_rows, forget[0]);
  // Rows ascend already, unless somebody calls the operator by hand.
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& x, const Pair& y) { return x.row < y.row; });
  const int64_t count = int64_t(pairs.size());
  Tensor workspace = new_float64(forget[0], cuda::blur_optim_cuda_dots_workspace(pairs.data(), count));
  Tensor out = torch::stable::new_empty(forget[0], {num_rows, 3}, ScalarType::Double);
  check_launch(cuda::blur_optim_cuda_dots(pairs.data(), count, num_rows, static_cast<double*>(workspace.mutable_data_ptr()),
                                          static_cast<double*>(out.mutable_data_ptr()), device.stream()),
               "multi_tensor_dots");
  return out;
}

void multi_tensor_blend_cuda(Tensors retain, Tensors forget, Tensor coefficients, std::vector<int64_t> rows,
                             Tensors scales) {
  const OnDevice device(coefficients);
  const double* weights = coefficients_pointer(coefficients);
  const std::vector<Pair> pairs = pairs_on_device(forget, retain, scales, rows, coefficients.size(0), coefficients);
  check_launch(cuda::blur_optim_cuda_blend(pairs.data(), int64_t(pairs.size()), weights, device.stream()),
               "multi_tensor_blend_");
}

Tensor multi_tensor_metric_dots_cuda(Tensors forget, Tensors retain, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                                     std::vector<int64_t> rows, int64_t num_rows, Tensor metric, Tensors scales) {
  STD_TORCH_CHECK(!forget.empty(), "`forget` must not be empty.");
  const OnDevice device(forget[0]);
  const std::vector<Pair> pairs = pairs_on_device(forget, retain, scales, rows, num_rows, forget[0]);
  const double* const numbers = metric_pointer(metric, pairs, forget[0]);
  const std::vector<cuda::MetricTensors> tensors = metric_tensors(pairs, exp_avg_sqs, max_exp_avg_sqs, forget[0]);
  std::vector<int64_t> order(pairs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return pairs[x].row < pairs[y].row; });
  std::vector<cuda::MetricTensors> sorted;
  for (int64_t i : order) sorted.push_back(tensors[i]);
  const int64_t count = int64_t(pairs.size());
  Tensor workspace = new_float64(forget[0], cuda::blur_optim_cuda_metric_dots_workspace(sorted.data(), count));
  Tensor out = torch::stable::new_empty(forget[0], {num_rows, kMetricDots}, ScalarType::Double);
  check_launch(cuda::blur_optim_cuda_metric_dots(sorted.data(), order.data(), count, num_rows, numbers,
                                                 static_cast<double*>(workspace.mutable_data_ptr()),
                                                 static_cast<double*>(out.mutable_data_ptr()), device.stream()),
               "multi_tensor_metric_dots");
  return out;
}

void multi_tensor_metric_blend_cuda(Tensors retain, Tensors forget, Tensors exp_avg_sqs, Tensor coefficients,
                                    std::vector<int64_t> rows, Tensor metric, std::optional<Tensor> found_inf,
                                    Tensors scales) {
  const OnDevice device(coefficients);
  const double* weights = coefficients_pointer(coefficients);
  const std::vector<Pair> pairs = pairs_on_device(forget, retain, scales, rows, coefficients.size(0), coefficients);
  const std::vector<cuda::MetricTensors> tensors = metric_tensors(pairs, exp_avg_sqs, {}, coefficients);
  const cuda::DeviceScalars scalars{weights, nullptr, found_inf_pointer(found_inf, coefficients),
                                    metric_pointer(metric, pairs, coefficients)};
  check_launch(cuda::blur_optim_cuda_metric_blend(tensors.data(), int64_t(tensors.size()), scalars, device.stream()),
               "multi_tensor_metric_blend_");
}

namespace {

// Shared by the operators with and without a metric, which then is no tensor.
void adam(const char* name, const Tensors& params, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
          Tensors max_exp_avg_sqs, const Tensors& forget, const Tensors& retain, const std::vector<int64_t>& rows,
          const Tensor& coefficients, const Tensor& steps, const Tensor& lr, const AdamOptions& options,
          const std::optional<Tensor>& found_inf, const Tensors& scales, const std::optional<Tensor>& metric) {
  const OnDevice device(coefficients);
  const double* weights = coefficients_pointer(coefficients);
  const std::vector<Pair> pairs = pairs_on_device(forget, retain, scales, rows, coefficients.size(0), coefficients);
  const int64_t count = int64_t(pairs.size());
  if (!options.amsgrad) max_exp_avg_sqs.clear();
  check_like(params, pairs, "params");
  check_like(exp_avgs, pairs, "exp_avgs");
  check_like(exp_avg_sqs, pairs, "exp_avg_sqs");
  if (options.amsgrad) check_like(max_exp_avg_sqs, pairs, "max_exp_avg_sqs");
  check_state(exp_avgs, params, "exp_avgs");
  check_state(exp_avg_sqs, params, "exp_avg_sqs");
  check_state(max_exp_avg_sqs, params, "max_exp_avg_sqs");
  check_device(params, coefficients, "params");
  check_device(exp_avgs, coefficients, "exp_avgs");
  check_device(exp_avg_sqs, coefficients, "exp_avg_sqs");
  check_device(max_exp_avg_sqs, coefficients, "max_exp_avg_sqs");
  check_scalars(steps, coefficients, ScalarType::Float, count, "steps");
  check_scalars(lr, coefficients, ScalarType::Double, 1, "lr");
  const auto p = pointers(params), m = pointers(exp_avgs), v = pointers(exp_avg_sqs), vmax = pointers(max_exp_avg_sqs);
  const std::vector<Dtype> dtypes = param_dtypes(params, pairs);
  std::vector<cuda::AdamTensors> tensors;
  for (size_t i = 0; i < pairs.size(); ++i) tensors.push_back({pairs[i], dtypes[i], p[i], m[i], v[i], state_at(vmax, i)});
  const cuda::DeviceScalars scalars{weights, static_cast<const double*>(lr.mutable_data_ptr()),
                                    found_inf_pointer(found_inf, coefficients),
                                    metric ? metric_pointer(*metric, pairs, coefficients) : nullptr};
  Tensor workspace = new_float64(coefficients, 2 * count);
  check_launch(cuda::blur_optim_cuda_adam(tensors.data(), count, &options, scalars,
                                          static_cast<const float*>(steps.mutable_data_ptr()),
                                          static_cast<double*>(workspace.mutable_data_ptr()), device.stream()),
               name);
}

void sgd(const char* name, const Tensors& params, Tensors momentum_buffers, const Tensors& exp_avg_sqs,
         const Tensors& forget, const Tensors& retain, const std::vector<int64_t>& rows, const Tensor& coefficients,
         const Tensor& lr, const SgdOptions& options, const std::optional<Tensor>& found_inf, const Tensors& scales,
         const std::optional<Tensor>& metric) {
  const OnDevice device(coefficients);
  const double* weights = coefficients_pointer(coefficients);
  const std::vector<Pair> pairs = pairs_on_device(forget, retain, scales, rows, coefficients.size(0), coefficients);
  if (options.momentum == 0) momentum_buffers.clear();
  check_like(params, pairs, "params");
  if (options.momentum != 0) check_like(momentum_buffers, pairs, "momentum_buffers");
  if (metric) check_like(exp_avg_sqs, pairs, "exp_avg_sqs");
  check_state(momentum_buffers, params, "momentum_buffers");
  check_state(exp_avg_sqs, params, "exp_avg_sqs");
  check_device(params, coefficients, "params");
  check_device(momentum_buffers, coefficients, "momentum_buffers");
  check_device(exp_avg_sqs, coefficients, "exp_avg_sqs");
  check_scalars(lr, coefficients, ScalarType::Double, 1, "lr");
  const auto p = pointers(params), buffers = pointers(momentum_buffers), v = pointers(exp_avg_sqs);
  const std::vector<Dtype> dtypes = param_dtypes(params, pairs);
  std::vector<cuda::SgdTensors> tensors;
  for (size_t i = 0; i < pairs.size(); ++i)
    tensors.push_back({pairs[i], dtypes[i], p[i], state_at(buffers, i), state_at(v, i)});
  const cuda::DeviceScalars scalars{weights, static_cast<const double*>(lr.mutable_data_ptr()),
                                    found_inf_pointer(found_inf, coefficients),
                                    metric ? metric_pointer(*metric, pairs, coefficients) : nullptr};
  check_launch(cuda::blur_optim_cuda_sgd(tensors.data(), int64_t(tensors.size()), &options, scalars, device.stream()), name);
}

}  // namespace

void multi_tensor_compress_cuda(Tensors values, Tensors scales, Tensors grads) {
  if (grads.empty()) return;
  const OnDevice device(grads[0]);
  for (const auto& [tensors, name] : {std::pair(&values, "values"), std::pair(&scales, "scales"), std::pair(&grads, "grads")})
    check_device(*tensors, grads[0], name);
  const std::vector<Pair> pairs = make_compressed(values, scales, grads);
  check_launch(cuda::blur_optim_cuda_compress(pairs.data(), int64_t(pairs.size()), device.stream()),
               "multi_tensor_compress_");
}

void fused_adamw_cuda(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors forget,
                      Tensors retain, std::vector<int64_t> rows, Tensor coefficients, Tensor steps, Tensor lr, double beta1,
                      double beta2, double weight_decay, double eps, bool amsgrad, bool maximize, bool decoupled,
                      std::optional<Tensor> found_inf, Tensors scales) {
  adam("fused_adamw_", params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, forget, retain, rows, coefficients, steps, lr,
       {0, beta1, beta2, weight_decay, eps, amsgrad, maximize, decoupled}, found_inf, scales, std::nullopt);
}

void metric_adamw_cuda(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors forget,
                       Tensors retain, std::vector<int64_t> rows, Tensor coefficients, Tensor steps, Tensor lr,
                       Tensor metric, double beta1, double weight_decay, bool amsgrad, bool maximize, bool decoupled,
                       std::optional<Tensor> found_inf, Tensors scales) {
  adam("metric_adamw_", params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, forget, retain, rows, coefficients, steps, lr,
       {0, beta1, 0, weight_decay, 0, amsgrad, maximize, decoupled}, found_inf, scales, metric);
}

void fused_sgd_cuda(Tensors params, Tensors momentum_buffers, Tensors forget, Tensors retain, std::vector<int64_t> rows,
                    Tensor coefficients, Tensor lr, double momentum, double dampening, double weight_decay, bool nesterov,
                    bool maximize, bool first_step, std::optional<Tensor> found_inf, Tensors scales) {
  sgd("fused_sgd_", params, momentum_buffers, {}, forget, retain, rows, coefficients, lr,
      {0, momentum, dampening, weight_decay, nesterov, maximize, first_step}, found_inf, scales, std::nullopt);
}

void metric_sgd_cuda(Tensors params, Tensors momentum_buffers, Tensors exp_avg_sqs, Tensors forget, Tensors retain,
                     std::vector<int64_t> rows, Tensor coefficients, Tensor lr, Tensor metric, double momentum,
                     double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step,
                     std::optional<Tensor> found_inf, Tensors scales) {
  sgd("metric_sgd_", params, momentum_buffers, exp_avg_sqs, forget, retain, rows, coefficients, lr,
      {0, momentum, dampening, weight_decay, nesterov, maximize, first_step}, found_inf, scales, metric);
}

}  // namespace blur_optim

#ifndef BLUR_OPTIM_EMULATOR
STABLE_TORCH_LIBRARY_IMPL(blur_optim, CUDA, m) {
  m.impl("multi_tensor_dots", TORCH_BOX(&blur_optim::multi_tensor_dots_cuda));
  m.impl("multi_tensor_blend_", TORCH_BOX(&blur_optim::multi_tensor_blend_cuda));
  m.impl("multi_tensor_compress_", TORCH_BOX(&blur_optim::multi_tensor_compress_cuda));
  m.impl("fused_adamw_", TORCH_BOX(&blur_optim::fused_adamw_cuda));
  m.impl("fused_sgd_", TORCH_BOX(&blur_optim::fused_sgd_cuda));
  m.impl("multi_tensor_metric_dots", TORCH_BOX(&blur_optim::multi_tensor_metric_dots_cuda));
  m.impl("multi_tensor_metric_blend_", TORCH_BOX(&blur_optim::multi_tensor_metric_blend_cuda));
  m.impl("metric_adamw_", TORCH_BOX(&blur_optim::metric_adamw_cuda));
  m.impl("metric_sgd_", TORCH_BOX(&blur_optim::metric_sgd_cuda));
}
#endif
