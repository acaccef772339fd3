// What the kernels of all devices share: dtypes, the chunk, hyperparameters.
// No torch header here: kernels see raw pointers, registration.cpp sees tensors.
#pragma once

#include <cstdint>

namespace blur_optim {

// Int8 is for stashed forget gradients alone: integers beside one float32 scale for every kBlockSize of them.
enum class Dtype : int32_t { Float32, BFloat16, Float16, Float64, Int8 };

constexpr int kBlockSize = 256;  // blur_optim/kernels/blocks.py has it too. Divides the chunks of every device.

// Elements whose sum is taken in the compute dtype before float64 takes over, on the CPU; a GPU has its own. Part of the definition of the result: the order of
// every addition follows from it, never from the number of threads or the instruction set.
constexpr int64_t kChunkSize = 32768;

// The gradients of a parameter, or of a chunk of it. An absent one is a null pointer and counts as zeros.
struct Pair {
  void* forget;
  void* retain;
  int64_t numel;
  Dtype dtype;  // Of the retain gradient; of the forget gradient where there is no other.
  int64_t row;
  Dtype forget_dtype;  // As dtype, or compressed: BFloat16 beside Float32 and Float64, Int8 beside any.
  const float* scales;  // One for each block of an Int8 forget gradient, else null.
};

// A piece of one tensor pair.
struct Chunk {
  int64_t tensor;
  int64_t offset;
  int64_t numel;
};

// The metric of the retain loss at one tensor: P = 1 / (sqrt(s * inverse_correction + damping) + eps), where s is the second
// moment of the retain gradient r that this step makes, v <- beta2 v + rest2 r^2, or with amsgrad the largest one seen.
// The rows of the operators' `metric` tensor have these numbers in this order.
struct Metric {
  double beta2, rest2, inverse_correction, damping, eps;
};
constexpr int kMetricNumbers = 5;

// What the dots in the metric are, in this order: <r, f>, |f|^2, |r|^2, <r, P f>, <f, P f>, <r, P r>, |P f|^2, the sum of
// (P f)^4, and the sum of s * inverse_correction.
constexpr int kMetricDots = 9;

struct AdamOptions {
  double lr, beta1, beta2, weight_decay, eps;
  bool amsgrad, maximize, decoupled;
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, first_step;
};

}  // namespace blur_optim
