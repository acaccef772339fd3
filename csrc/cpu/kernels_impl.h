// The kernels as templates over dtypes. Each kernels_*.cpp includes this file under another instruction set, after it has
// defined kGroupVecs and kGroupVecs16Bit: how many vectors of 16 lanes the registers hold three sums for, the latter beside
// the conversions from 16 bits. It gets its own copy in an unnamed namespace. Compiled without contraction into fused
// multiply-adds, and with explicit lanes where order matters, so that all copies give the same bits.
#include "compress.h"
#include "updates.h"

namespace blur_optim::cpu {
namespace {

template <class Visitor>
void with_dtype(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::Float32: return visit(float());
    case Dtype::BFloat16: return visit(BFloat16());
    case Dtype::Float16: return visit(Float16());
    case Dtype::Float64: return visit(double());
    case Dtype::Int8: return;  // Never of a parameter or a retain gradient.
  }
}

// Gradients have the parameters' dtype, or a 16-bit one beside float32 parameters.
template <class Visitor>
void with_dtypes(Dtype param, Dtype grad, const Visitor& visit) {
  if (param == grad)
    with_dtype(param, [&](auto t) { visit(t, t); });
  else if (grad == Dtype::BFloat16)
    visit(float(), BFloat16());
  else
    visit(float(), Float16());
}

constexpr Kernels make_kernels(const char* name) {
  return {
      name,
      [](const Pair& pair, double out[3]) { with_dtype(pair.dtype, [&](auto t) { dots<decltype(t)>(pair, out); }); },
      [](const Pair& pair, double a, double b) { with_dtype(pair.dtype, [&](auto t) { blend<decltype(t)>(pair, a, b); }); },
      [](Dtype param, const void* v, const void* vmax, const Pair& pair, const Metric& metric, double out[kMetricDots]) {
        with_dtypes(param, pair.dtype,
                    [&](auto pt, auto gt) { metric_dots<decltype(pt), decltype(gt)>(v, vmax, pair, metric, out); });
      },
      [](Dtype param, void* v, const Pair& pair, double a, double b, const Metric& metric) {
        with_dtypes(param, pair.dtype,
                    [&](auto pt, auto gt) { metric_blend<decltype(pt), decltype(gt)>(v, pair, a, b, metric); });
      },
      [](Dtype param, void* p, void* m, void* v, void* vmax, const Pair& pair, double a, double b, double step,
         const AdamOptions& o, const Metric* metric) {
        with_dtypes(param, pair.dtype, [&](auto pt, auto gt) {
          adam<decltype(pt), decltype(gt)>(p, m, v, vmax, pair, a, b, step, o, metric);
        });
      },
      [](Dtype param, void* p, void* buffer, void* v, const Pair& pair, double a, double b, const SgdOptions& o,
         const Metric* metric) {
        with_dtypes(param, pair.dtype, [&](auto pt, auto gt) {
          sgd<decltype(pt), decltype(gt)>(p, buffer, v, pair, a, b, o, metric);
        });
      },
      [](Dtype dtype, const void* grad, int64_t numel, void* values, float* scales) {
        with_dtype(dtype, [&](auto t) { compress<decltype(t)>(grad, numel, values, scales); });
      },
  };
}

}  // namespace
}  // namespace blur_optim::cpu
