// The operators on CUDA tensors: checks, workspaces and the stream here, everything else in the launchers.
//
// Host code: compiled by the C++ compiler against torch's stable ABI, also against a torch that has no CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>

#include <algorithm>
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

void fused_adamw_cuda(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors forget,
                      Tensors retain, std::vector<int64_t> rows, Tensor coefficients, Tensor steps, Tensor lr, double beta1,
                      double beta2, double weight_decay, double eps, bool amsgrad, bool maximize, bool decoupled,
                      std::optional<Tensor> found_inf, Tensors scales) {
  const OnDevice device(coefficients);
  const double* weights = coefficients_pointer(coefficients);
  const std::vector<Pair> pairs = pairs_on_device(forget, retain, scales, rows, coefficients.size(0), coefficients);
  const int64_t count = int64_t(pairs.size());
  if (!amsgrad) max_exp_avg_sqs.clear();
  check_like(params, pairs, "params");
  check_like(exp_avgs, pairs, "exp_avgs");
  check_like(exp_avg_sqs, pairs, "exp_avg_sqs");
  if (amsgrad) check_like(max_exp_avg_sqs, pairs, "max_exp_avg_sqs");
  check_state(exp_avgs, params, "exp_avgs");
  check_state(exp_avg_sqs, params, "exp_avg_sqs");
  check_state(max_exp_avg_sqs, params, "max_exp_avg_sqs");
  for (const auto& [tensors, name] : {std::pair(&params, "params"), std::pair(&exp_avgs, "exp_avgs"),
                                      std::pair(&exp_avg_sqs, "exp_avg_sqs"), std::pair(&max_exp_avg_sqs, "max_exp_avg_sqs")})
    check_device(*tensors, coefficients, name);
  check_scalars(steps, coefficients, ScalarType::Float, count, "steps");
  check_scalars(lr, coefficients, ScalarType::Double, 1, "lr");
  const auto p = pointers(params), m = pointers(exp_avgs), v = pointers(exp_avg_sqs), vmax = pointers(max_exp_avg_sqs);
  std::vector<cuda::AdamTensors> tensors;
  for (size_t i = 0; i < pairs.size(); ++i)
    tensors.push_back({pairs[i], param_dtype(params[i], pairs[i].dtype, i), p[i], m[i], v[i], state_at(vmax, i)});
  const AdamOptions options{0, beta1, beta2, weight_decay, eps, amsgrad, maximize, decoupled};
  const cuda::DeviceScalars scalars{weights, static_cast<const double*>(lr.mutable_data_ptr()),
                                    found_inf_pointer(found_inf, coefficients)};
  Tensor workspace = new_float64(coefficients, 2 * count);
  check_launch(cuda::blur_optim_cuda_adam(tensors.data(), count, &options, scalars,
                                          static_cast<const float*>(steps.mutable_data_ptr()),
                                          static_cast<double*>(workspace.mutable_data_ptr()), device.stream()),
               "fused_adamw_");
}

void fused_sgd_cuda(Tensors params, Tensors momentum_buffers, Tensors forget, Tensors retain, std::vector<int64_t> rows,
                    Tensor coefficients, Tensor lr, double momentum, double dampening, double weight_decay, bool nesterov,
                    bool maximize, bool first_step, std::optional<Tensor> found_inf, Tensors scales) {
  const OnDevice device(coefficients);
  const double* weights = coefficients_pointer(coefficients);
  const std::vector<Pair> pairs = pairs_on_device(forget, retain, scales, rows, coefficients.size(0), coefficients);
  if (momentum == 0) momentum_buffers.clear();
  check_like(params, pairs, "params");
  if (momentum != 0) check_like(momentum_buffers, pairs, "momentum_buffers");
  check_state(momentum_buffers, params, "momentum_buffers");
  for (const auto& [tensors, name] : {std::pair(&params, "params"), std::pair(&momentum_buffers, "momentum_buffers")})
    check_device(*tensors, coefficients, name);
  check_scalars(lr, coefficients, ScalarType::Double, 1, "lr");
  const auto p = pointers(params), buffers = pointers(momentum_buffers);
  std::vector<cuda::SgdTensors> tensors;
  for (size_t i = 0; i < pairs.size(); ++i)
    tensors.push_back({pairs[i], param_dtype(params[i], pairs[i].dtype, i), p[i], state_at(buffers, i)});
  const SgdOptions options{0, momentum, dampening, weight_decay, nesterov, maximize, first_step};
  const cuda::DeviceScalars scalars{weights, static_cast<const double*>(lr.mutable_data_ptr()),
                                    found_inf_pointer(found_inf, coefficients)};
  check_launch(cuda::blur_optim_cuda_sgd(tensors.data(), int64_t(tensors.size()), &options, scalars, device.stream()),
               "fused_sgd_");
}

}  // namespace blur_optim

#ifndef BLUR_OPTIM_EMULATOR
STABLE_TORCH_LIBRARY_IMPL(blur_optim, CUDA, m) {
  m.impl("multi_tensor_dots", TORCH_BOX(&blur_optim::multi_tensor_dots_cuda));
  m.impl("multi_tensor_blend_", TORCH_BOX(&blur_optim::multi_tensor_blend_cuda));
  m.impl("fused_adamw_", TORCH_BOX(&blur_optim::fused_adamw_cuda));
  m.impl("fused_sgd_", TORCH_BOX(&blur_optim::fused_sgd_cuda));
}
#endif
