// Operator schemas, and the CPU implementations: tensors in, raw pointers and chunks to the kernels.
//
// Only torch's stable ABI is used, so that one binary loads in every torch from 2.10 on.
#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"

namespace blur_optim {
namespace {

void* at(void* base, Dtype dtype, int64_t offset) {
  return base ? static_cast<char*>(base) + offset * element_size(dtype) : nullptr;
}

Pair at(Pair pair, const Chunk& chunk) {
  static_assert(kChunkSize % kBlockSize == 0);
  pair.forget = at(pair.forget, pair.forget_dtype, chunk.offset);
  pair.retain = at(pair.retain, pair.dtype, chunk.offset);
  if (pair.scales) pair.scales += chunk.offset / kBlockSize;
  pair.numel = chunk.numel;
  return pair;
}

std::vector<Chunk> make_chunks(const std::vector<Pair>& pairs) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < pairs.size(); ++i)
    for (int64_t offset = 0; offset < pairs[i].numel; offset += kChunkSize)
      chunks.push_back({int64_t(i), offset, std::min(kChunkSize, pairs[i].numel - offset)});
  return chunks;
}

template <class Body>
void for_each_chunk(const std::vector<Pair>& pairs, const std::vector<Chunk>& chunks, const Body& body) {
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) body(c, chunks[c], at(pairs[chunks[c].tensor], chunks[c]));
  });
}

struct Coefficients {
  const double* data;
  explicit Coefficients(const Tensor& t) : data(coefficients_pointer(t)) {}
  double a(int64_t row) const { return data[2 * row]; }
  double b(int64_t row) const { return data[2 * row + 1]; }
};

// Whether the step is to be skipped. All scalars are checked before anything is read or written.
bool is_set(const std::optional<Tensor>& found_inf, const Tensor& like) {
  const float* flag = found_inf_pointer(found_inf, like);
  return flag && *flag != 0;
}

double learning_rate(const Tensor& lr, const Tensor& like) {
  check_scalars(lr, like, ScalarType::Double, 1, "lr");
  return *static_cast<const double*>(lr.mutable_data_ptr());
}

Metric metric_of(const double* row) { return {row[0], row[1], row[2], row[3], row[4]}; }

// The sums of each row from those of the chunks. In order, on one thread: the same bits on any number of threads.
template <size_t kSums>
Tensor sum_rows(const Tensor& like, const std::vector<Pair>& pairs, const std::vector<Chunk>& chunks,
                const std::vector<std::array<double, kSums>>& partials, int64_t num_rows) {
  Tensor out = torch::stable::new_zeros(like, {num_rows, int64_t(kSums)}, ScalarType::Double);
  double* sums = static_cast<double*>(out.mutable_data_ptr());
  for (size_t c = 0; c < chunks.size(); ++c)
    for (size_t d = 0; d < kSums; ++d) sums[kSums * pairs[chunks[c].tensor].row + d] += partials[c][d];
  return out;
}

}  // namespace

Tensor multi_tensor_dots_cpu(Tensors forget, Tensors retain, std::vector<int64_t> rows, int64_t num_rows, Tensors scales) {
  STD_TORCH_CHECK(!forget.empty(), "`forget` must not be empty.");
  const std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, num_rows);
  const std::vector<Chunk> chunks = make_chunks(pairs);
  std::vector<std::array<double, 3>> partials(chunks.size());
  const cpu::Kernels& k = cpu::kernels();
  for_each_chunk(pairs, chunks, [&](int64_t c, const Chunk&, const Pair& pair) { k.dots(pair, partials[c].data()); });
  return sum_rows(forget[0], pairs, chunks, partials, num_rows);
}

Tensor multi_tensor_metric_dots_cpu(Tensors forget, Tensors retain, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                                    std::vector<int64_t> rows, int64_t num_rows, Tensor metric, Tensors scales) {
  STD_TORCH_CHECK(!forget.empty(), "`forget` must not be empty.");
  const std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, num_rows);
  check_like(exp_avg_sqs, pairs, "exp_avg_sqs");
  const bool amsgrad = !max_exp_avg_sqs.empty();
  if (amsgrad) check_like(max_exp_avg_sqs, pairs, "max_exp_avg_sqs");
  const std::vector<Dtype> dtypes = param_dtypes(exp_avg_sqs, pairs, "exp_avg_sqs");
  check_state(max_exp_avg_sqs, exp_avg_sqs, "max_exp_avg_sqs", "exp_avg_sqs");
  const double* const numbers = metric_pointer(metric, pairs, forget[0]);
  const auto v = pointers(exp_avg_sqs), vmax = pointers(max_exp_avg_sqs);
  const std::vector<Chunk> chunks = make_chunks(pairs);
  std::vector<std::array<double, kMetricDots>> partials(chunks.size());
  const cpu::Kernels& k = cpu::kernels();
  for_each_chunk(pairs, chunks, [&](int64_t c, const Chunk& chunk, const Pair& pair) {
    const int64_t i = chunk.tensor, o = chunk.offset;
    const Dtype d = dtypes[i];
    k.metric_dots(d, at(v[i], d, o), amsgrad ? at(vmax[i], d, o) : nullptr, pair, metric_of(numbers + kMetricNumbers * i),
                  partials[c].data());
  });
  return sum_rows(forget[0], pairs, chunks, partials, num_rows);
}

void multi_tensor_blend_cpu(Tensors retain, Tensors forget, Tensor coefficients, std::vector<int64_t> rows, Tensors scales) {
  const Coefficients weights(coefficients);
  const std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, coefficients.size(0));
  const cpu::Kernels& k = cpu::kernels();
  for_each_chunk(pairs, make_chunks(pairs), [&](int64_t, const Chunk&, const Pair& pair) {
    k.blend(pair, weights.a(pair.row), weights.b(pair.row));
  });
}

void multi_tensor_metric_blend_cpu(Tensors retain, Tensors forget, Tensors exp_avg_sqs, Tensor coefficients,
                                   std::vector<int64_t> rows, Tensor metric, std::optional<Tensor> found_inf,
                                   Tensors scales) {
  const Coefficients weights(coefficients);
  const std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, coefficients.size(0));
  check_like(exp_avg_sqs, pairs, "exp_avg_sqs");
  const std::vector<Dtype> dtypes = param_dtypes(exp_avg_sqs, pairs, "exp_avg_sqs");
  const double* const numbers = metric_pointer(metric, pairs, coefficients);
  const bool skip = is_set(found_inf, coefficients);
  const auto v = pointers(exp_avg_sqs);
  const cpu::Kernels& k = cpu::kernels();
  for_each_chunk(pairs, make_chunks(pairs), [&](int64_t, const Chunk& chunk, const Pair& pair) {
    const int64_t i = chunk.tensor;
    const double a = weights.a(pair.row), b = weights.b(pair.row);
    if (skip)  // The update shows what was found; v stays.
      k.blend(pair, a, b);
    else
      k.metric_blend(dtypes[i], at(v[i], dtypes[i], chunk.offset), pair, a, b, metric_of(numbers + kMetricNumbers * i));
  });
}

namespace {

// Shared by the operators with and without a metric, which is then null.
void adam(const Tensors& params, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs,
          const std::vector<Pair>& pairs, const Tensor& coefficients, const Tensor& steps, const Tensor& lr, double beta1,
          double beta2, double weight_decay, double eps, bool amsgrad, bool maximize, bool decoupled,
          const std::optional<Tensor>& found_inf, const double* metric) {
  const Coefficients weights(coefficients);
  check_like(params, pairs, "params");
  check_like(exp_avgs, pairs, "exp_avgs");
  check_like(exp_avg_sqs, pairs, "exp_avg_sqs");
  if (amsgrad) check_like(max_exp_avg_sqs, pairs, "max_exp_avg_sqs");
  const std::vector<Dtype> dtypes = param_dtypes(params, pairs);
  check_state(exp_avgs, params, "exp_avgs");
  check_state(exp_avg_sqs, params, "exp_avg_sqs");
  check_state(max_exp_avg_sqs, params, "max_exp_avg_sqs");
  check_scalars(steps, coefficients, ScalarType::Float, int64_t(pairs.size()), "steps");
  const AdamOptions options{learning_rate(lr, coefficients), beta1, beta2, weight_decay, eps, amsgrad, maximize, decoupled};
  if (is_set(found_inf, coefficients)) return;
  const float* step = static_cast<const float*>(steps.mutable_data_ptr());
  const auto p = pointers(params), m = pointers(exp_avgs), v = pointers(exp_avg_sqs), vmax = pointers(max_exp_avg_sqs);
  const cpu::Kernels& k = cpu::kernels();
  for_each_chunk(pairs, make_chunks(pairs), [&](int64_t, const Chunk& chunk, const Pair& pair) {
    const int64_t i = chunk.tensor, o = chunk.offset;
    const Dtype d = dtypes[i];
    const Metric of_tensor = metric ? metric_of(metric + kMetricNumbers * i) : Metric{};
    k.adam(d, at(p[i], d, o), at(m[i], d, o), at(v[i], d, o), amsgrad ? at(vmax[i], d, o) : nullptr, pair,
           weights.a(pair.row), weights.b(pair.row), step[i], options, metric ? &of_tensor : nullptr);
  });
}

void sgd(const Tensors& params, const Tensors& momentum_buffers, const Tensors& exp_avg_sqs, const std::vector<Pair>& pairs,
         const Tensor& coefficients, const Tensor& lr, double momentum, double dampening, double weight_decay, bool nesterov,
         bool maximize, bool first_step, const std::optional<Tensor>& found_inf, const double* metric) {
  const Coefficients weights(coefficients);
  check_like(params, pairs, "params");
  if (momentum != 0) check_like(momentum_buffers, pairs, "momentum_buffers");
  if (metric) check_like(exp_avg_sqs, pairs, "exp_avg_sqs");
  const std::vector<Dtype> dtypes = param_dtypes(params, pairs);
  check_state(momentum_buffers, params, "momentum_buffers");
  check_state(exp_avg_sqs, params, "exp_avg_sqs");
  const SgdOptions options{learning_rate(lr, coefficients), momentum, dampening, weight_decay, nesterov, maximize,
                           first_step};
  if (is_set(found_inf, coefficients)) return;
  const auto p = pointers(params), buffers = pointers(momentum_buffers), v = pointers(exp_avg_sqs);
  const cpu::Kernels& k = cpu::kernels();
  for_each_chunk(pairs, make_chunks(pairs), [&](int64_t, const Chunk& chunk, const Pair& pair) {
    const int64_t i = chunk.tensor, o = chunk.offset;
    const Dtype d = dtypes[i];
    const Metric of_tensor = metric ? metric_of(metric + kMetricNumbers * i) : Metric{};
    k.sgd(d, at(p[i], d, o), momentum != 0 ? at(buffers[i], d, o) : nullptr, metric ? at(v[i], d, o) : nullptr, pair,
          weights.a(pair.row), weights.b(pair.row), options, metric ? &of_tensor : nullptr);
  });
}

}  // namespace

void multi_tensor_compress_cpu(Tensors values, Tensors scales, Tensors grads) {
  const std::vector<Pair> pairs = make_compressed(values, scales, grads);
  const cpu::Kernels& k = cpu::kernels();
  for_each_chunk(pairs, make_chunks(pairs), [&](int64_t, const Chunk&, const Pair& pair) {
    k.compress(pair.dtype, pair.retain, pair.numel, pair.forget, const_cast<float*>(pair.scales));
  });
}

void fused_adamw_cpu(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors forget,
                     Tensors retain, std::vector<int64_t> rows, Tensor coefficients, Tensor steps, Tensor lr, double beta1,
                     double beta2, double weight_decay, double eps, bool amsgrad, bool maximize, bool decoupled,
                     std::optional<Tensor> found_inf, Tensors scales) {
  const std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, coefficients.size(0));
  adam(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, pairs, coefficients, steps, lr, beta1, beta2, weight_decay, eps,
       amsgrad, maximize, decoupled, found_inf, nullptr);
}

void metric_adamw_cpu(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors forget,
                      Tensors retain, std::vector<int64_t> rows, Tensor coefficients, Tensor steps, Tensor lr,
                      Tensor metric, double beta1, double weight_decay, bool amsgrad, bool maximize, bool decoupled,
                      std::optional<Tensor> found_inf, Tensors scales) {
  const std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, coefficients.size(0));
  adam(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, pairs, coefficients, steps, lr, beta1, 0, weight_decay, 0, amsgrad,
       maximize, decoupled, found_inf, metric_pointer(metric, pairs, coefficients));
}

void fused_sgd_cpu(Tensors params, Tensors momentum_buffers, Tensors forget, Tensors retain, std::vector<int64_t> rows,
                   Tensor coefficients, Tensor lr, double momentum, double dampening, double weight_decay, bool nesterov,
                   bool maximize, bool first_step, std::optional<Tensor> found_inf, Tensors scales) {
  const std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, coefficients.size(0));
  sgd(params, momentum_buffers, {}, pairs, coefficients, lr, momentum, dampening, weight_decay, nesterov, maximize,
      first_step, found_inf, nullptr);
}

void metric_sgd_cpu(Tensors params, Tensors momentum_buffers, Tensors exp_avg_sqs, Tensors forget, Tensors retain,
                    std::vector<int64_t> rows, Tensor coefficients, Tensor lr, Tensor metric, double momentum,
                    double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step,
                    std::optional<Tensor> found_inf, Tensors scales) {
  const std::vector<Pair> pairs = make_pairs(forget, retain, scales, rows, coefficients.size(0));
  sgd(params, momentum_buffers, exp_avg_sqs, pairs, coefficients, lr, momentum, dampening, weight_decay, nesterov, maximize,
      first_step, found_inf, metric_pointer(metric, pairs, coefficients));
}

}  // namespace blur_optim

STABLE_TORCH_LIBRARY(blur_optim, m) {
  m.def("multi_tensor_dots(Tensor[] forget, Tensor[] retain, int[] rows, int num_rows, Tensor[] scales) -> Tensor");
  m.def("multi_tensor_blend_(Tensor(a!)[] retain, Tensor(b!)[] forget, Tensor coefficients, int[] rows, "
      "Tensor[] scales) -> ()");
  m.def(
      "fused_adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
      "Tensor[] forget, Tensor[] retain, int[] rows, Tensor coefficients, Tensor steps, Tensor lr, float beta1, "
      "float beta2, float weight_decay, float eps, bool amsgrad, bool maximize, bool decoupled, Tensor? found_inf, "
      "Tensor[] scales) -> ()");
  m.def(
      "fused_sgd_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor[] forget, Tensor[] retain, int[] rows, "
      "Tensor coefficients, Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
      "bool first_step, Tensor? found_inf, Tensor[] scales) -> ()");
  m.def("multi_tensor_compress_(Tensor(a!)[] values, Tensor(b!)[] scales, Tensor[] grads) -> ()");
  m.def(
      "multi_tensor_metric_dots(Tensor[] forget, Tensor[] retain, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs, "
      "int[] rows, int num_rows, Tensor metric, Tensor[] scales) -> Tensor");
  m.def(
      "multi_tensor_metric_blend_(Tensor(a!)[] retain, Tensor(b!)[] forget, Tensor(c!)[] exp_avg_sqs, "
      "Tensor coefficients, int[] rows, Tensor metric, Tensor? found_inf, Tensor[] scales) -> ()");
  m.def(
      "metric_adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
      "Tensor[] forget, Tensor[] retain, int[] rows, Tensor coefficients, Tensor steps, Tensor lr, Tensor metric, "
      "float beta1, float weight_decay, bool amsgrad, bool maximize, bool decoupled, Tensor? found_inf, "
      "Tensor[] scales) -> ()");
  m.def(
      "metric_sgd_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor(c!)[] exp_avg_sqs, Tensor[] forget, "
      "Tensor[] retain, int[] rows, Tensor coefficients, Tensor lr, Tensor metric, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool maximize, bool first_step, Tensor? found_inf, Tensor[] scales) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(blur_optim, CPU, m) {
  m.impl("multi_tensor_dots", TORCH_BOX(&blur_optim::multi_tensor_dots_cpu));
  m.impl("multi_tensor_blend_", TORCH_BOX(&blur_optim::multi_tensor_blend_cpu));
  m.impl("fused_adamw_", TORCH_BOX(&blur_optim::fused_adamw_cpu));
  m.impl("fused_sgd_", TORCH_BOX(&blur_optim::fused_sgd_cpu));
  m.impl("multi_tensor_compress_", TORCH_BOX(&blur_optim::multi_tensor_compress_cpu));
  m.impl("multi_tensor_metric_dots", TORCH_BOX(&blur_optim::multi_tensor_metric_dots_cpu));
  m.impl("multi_tensor_metric_blend_", TORCH_BOX(&blur_optim::multi_tensor_metric_blend_cpu));
  m.impl("metric_adamw_", TORCH_BOX(&blur_optim::metric_adamw_cpu));
  m.impl("metric_sgd_", TORCH_BOX(&blur_optim::metric_sgd_cpu));
}
