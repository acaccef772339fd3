// The arguments of the operators, checked and turned into pointers: the same for every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "multi_tensor.h"

namespace blur_optim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline Dtype dtype_of(const Tensor& t, const char* name, size_t i) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Half: return Dtype::Float16;
    case ScalarType::Double: return Dtype::Float64;
    default:
      STD_TORCH_CHECK(false, "`", name, "[", i, "]` must be float32, bfloat16, float16 or float64.");
  }
}

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : dtype == Dtype::Int8 ? 1 : 2;
}

// The dtype in which a forget gradient is stashed beside a retain gradient of the given one.
inline Dtype stashed_dtype(const Tensor& forget, Dtype retain, const Tensors& scales, size_t i) {
  const bool quantized = forget.scalar_type() == ScalarType::Char;
  const Dtype dtype = quantized ? Dtype::Int8 : dtype_of(forget, "forget", i);
  STD_TORCH_CHECK(dtype == retain || quantized || (dtype == Dtype::BFloat16 && element_size(retain) > 2), "`forget[", i,
                  "]` must have the dtype of `retain[", i, "]`, or be compressed: int8, or bfloat16 beside a wider one.");
  const int64_t expected = quantized ? (forget.numel() + kBlockSize - 1) / kBlockSize : 0;
  STD_TORCH_CHECK(expected == 0 || (i < scales.size() && scales[i].scalar_type() == ScalarType::Float &&
                                 scales[i].numel() == expected && scales[i].is_contiguous()),
                  "`scales[", i, "]` must be a contiguous float32 tensor of ", expected, " elements, one for each block of ",
                  kBlockSize, " of `forget[", i, "]`.");
  return dtype;
}

// scales[i] belongs to forget[i] where that is int8; the list may be empty where none is.
inline std::vector<Pair> make_pairs(const Tensors& forget, const Tensors& retain, const Tensors& scales,
                                    const std::vector<int64_t>& rows, int64_t num_rows) {
  STD_TORCH_CHECK(forget.size() == retain.size() && forget.size() == rows.size(),
                  "`forget`, `retain` and `rows` must have one length, got ", forget.size(), ", ", retain.size(), " and ",
                  rows.size(), ".");
  std::vector<Pair> pairs;
  pairs.reserve(forget.size());
  for (size_t i = 0; i < forget.size(); ++i) {
    const Tensor &f = forget[i], &r = retain[i];
    const int64_t nf = f.numel(), nr = r.numel();
    STD_TORCH_CHECK(nf == nr || nf == 0 || nr == 0, "`forget[", i, "]` must have as many elements as `retain[", i,
                    "]`, or none, got ", nf, " and ", nr, ".");
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < num_rows, "`rows[", i, "]` must be in [0, ", num_rows, "), got ", rows[i],
                    ".");
    // Absent is null, also where both are empty.
    void *const pf = nf ? f.mutable_data_ptr() : nullptr, *const pr = nr ? r.mutable_data_ptr() : nullptr;
    const Dtype retain_dtype = dtype_of(r, "retain", i), forget_dtype = stashed_dtype(f, retain_dtype, scales, i);
    STD_TORCH_CHECK(pr || !pf || forget_dtype == retain_dtype, "`forget[", i,
                    "]` must not be compressed where `retain[", i, "]` is absent: it holds the update then.");
    const float* scale = pf && forget_dtype == Dtype::Int8 ? static_cast<const float*>(scales[i].mutable_data_ptr()) : nullptr;
    pairs.push_back({pf, pr, nf > nr ? nf : nr, retain_dtype, rows[i], forget_dtype, scale});
  }
  return pairs;
}

// What the compress operation takes, as pairs: `forget` what is written, `retain` the gradient.
inline std::vector<Pair> make_compressed(const Tensors& values, const Tensors& scales, const Tensors& grads) {
  STD_TORCH_CHECK(values.size() == grads.size(), "`values` must have ", grads.size(), " tensors like `grads`, got ",
                  values.size(), ".");
  std::vector<Pair> pairs;
  pairs.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor &v = values[i], &g = grads[i];
    const int64_t n = g.numel();
    const Dtype from = dtype_of(g, "grads", i);
    const bool quantized = v.scalar_type() == ScalarType::Char;
    STD_TORCH_CHECK(quantized || (v.scalar_type() == ScalarType::BFloat16 && element_size(from) > 2), "`values[", i,
                    "]` must be int8, or bfloat16 for a gradient of more bytes.");
    STD_TORCH_CHECK(v.numel() == n, "`values[", i, "]` must have as many elements as `grads[", i, "]`, ", n, ", got ",
                    v.numel(), ".");
    const int64_t blocks = (n + kBlockSize - 1) / kBlockSize;
    STD_TORCH_CHECK(!quantized || (i < scales.size() && scales[i].scalar_type() == ScalarType::Float &&
                                   scales[i].numel() == blocks && scales[i].is_contiguous()),
                    "`scales[", i, "]` must be a contiguous float32 tensor of ", blocks, " elements, one for each block of ",
                    kBlockSize, " of `grads[", i, "]`.");
    pairs.push_back({n ? v.mutable_data_ptr() : nullptr, n ? g.mutable_data_ptr() : nullptr, n, from, 0,
                     quantized ? Dtype::Int8 : Dtype::BFloat16,
                     quantized ? static_cast<const float*>(scales[i].mutable_data_ptr()) : nullptr});
  }
  return pairs;
}

inline const double* coefficients_pointer(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.dim() == 2 && t.size(1) == 2,
                  "`coefficients` must be a contiguous float64 tensor of shape [rows, 2].");
  return static_cast<const double*>(t.mutable_data_ptr());
}

inline void check_scalars(const Tensor& t, const Tensor& like, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == numel && t.is_contiguous() && t.device() == like.device(), "`",
                  name, "` must have ", numel, dtype == ScalarType::Double ? " float64" : " float32",
                  " elements on the device of the other tensors.");
}

inline const float* found_inf_pointer(const std::optional<Tensor>& found_inf, const Tensor& like) {
  if (!found_inf) return nullptr;
  check_scalars(*found_inf, like, ScalarType::Float, 1, "found_inf");
  return static_cast<const float*>(found_inf->mutable_data_ptr());
}

inline void check_like(const Tensors& tensors, const std::vector<Pair>& pairs, const char* name) {
  STD_TORCH_CHECK(tensors.size() == pairs.size(), "`", name, "` must have ", pairs.size(), " tensors like `retain`, got ",
                  tensors.size(), ".");
  for (size_t i = 0; i < tensors.size(); ++i)
    STD_TORCH_CHECK(tensors[i].numel() == pairs[i].numel, "`", name, "[", i, "]` must have ", pairs[i].numel,
                    " elements like its gradient, got ", tensors[i].numel(), ".");
}

// The dtype of a parameter, or of its state, checked against the gradients'.
inline Dtype param_dtype(const Tensor& param, Dtype grad, size_t i, const char* name = "params") {
  const Dtype dtype = dtype_of(param, name, i);
  STD_TORCH_CHECK(dtype == grad || (dtype == Dtype::Float32 && element_size(grad) == 2), "`", name, "[", i,
                  "]` must have its gradients' dtype, or be float32 beside 16-bit gradients.");
  return dtype;
}

inline std::vector<Dtype> param_dtypes(const Tensors& params, const std::vector<Pair>& pairs, const char* name = "params") {
  std::vector<Dtype> dtypes;
  dtypes.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) dtypes.push_back(param_dtype(params[i], pairs[i].dtype, i, name));
  return dtypes;
}

inline void check_state(const Tensors& state, const Tensors& params, const char* name, const char* like = "params") {
  for (size_t i = 0; i < state.size() && i < params.size(); ++i)
    STD_TORCH_CHECK(state[i].scalar_type() == params[i].scalar_type(), "`", name, "[", i,
                    "]` must have the dtype of `", like, "[", i, "]`.");
}

// One row for each pair; see Metric.
inline const double* metric_pointer(const Tensor& metric, const std::vector<Pair>& pairs, const Tensor& like) {
  STD_TORCH_CHECK(metric.scalar_type() == ScalarType::Double && metric.is_contiguous() && metric.dim() == 2 &&
                      metric.size(0) == int64_t(pairs.size()) && metric.size(1) == kMetricNumbers &&
                      metric.device() == like.device(),
                  "`metric` must be a contiguous float64 tensor of shape [", pairs.size(), ", ", kMetricNumbers,
                  "] on the device of the other tensors.");
  return static_cast<const double*>(metric.mutable_data_ptr());
}

inline std::vector<void*> pointers(const Tensors& tensors) {
  std::vector<void*> result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(t.mutable_data_ptr());
  return result;
}

}  // namespace blur_optim
