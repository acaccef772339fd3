// The CPU kernels: one table of functions per instruction set, all with the same bits.
#pragma once

#include "../multi_tensor.h"

namespace blur_optim::cpu {

// Everything works on one chunk: the pair has its first elements and their number.
struct Kernels {
  const char* name;
  // out = <r, f>, |f|^2, |r|^2.
  void (*dots)(const Pair&, double out[3]);
  // r <- a f + b r; into f where r is absent.
  void (*blend)(const Pair&, double a, double b);
  // The dots in the metric. param is the dtype of the second moments; vmax is null without amsgrad.
  void (*metric_dots)(Dtype param, const void* v, const void* vmax, const Pair&, const Metric&, double out[kMetricDots]);
  // As blend, and v advances.
  void (*metric_blend)(Dtype param, void* v, const Pair&, double a, double b, const Metric&);
  // AdamW on u = a f + b r, which never leaves the registers. vmax is null without amsgrad. With a metric, v is that of r
  // and P takes the place of Adam's denominator.
  void (*adam)(Dtype param, void* p, void* m, void* v, void* vmax, const Pair&, double a, double b, double step,
               const AdamOptions&, const Metric*);
  // SGD on u = a f + b r. momentum_buffer is null without momentum. With a metric, the step is P times SGD's; v is null
  // without.
  void (*sgd)(Dtype param, void* p, void* momentum_buffer, void* v, const Pair&, double a, double b, const SgdOptions&,
              const Metric*);
  // Compress a gradient: to Int8 with a scale for each block, or to BFloat16 where scales is null.
  void (*compress)(Dtype, const void* grad, int64_t numel, void* values, float* scales);
};

extern const Kernels kGeneric;
#if defined(__x86_64__) && defined(__GNUC__)
#define BLUR_OPTIM_X86 1
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The best table this processor runs, or the one that BLUR_OPTIM_CPU_CAPABILITY (generic, avx2, avx512) names.
const Kernels& kernels();

}  // namespace blur_optim::cpu
