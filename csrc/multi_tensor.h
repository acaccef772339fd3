// What the kernels of all devices share: dtypes, the chunk, hyperparameters.
// No torch header here: kernels see raw pointers, registration.cpp sees tensors.
#pragma once

#include <cstdint>

namespace blur_optim {

enum class Dtype : int32_t { Float32, BFloat16, Float16, Float64 };

// Elements whose sum is taken in the compute dtype before float64 takes over, on the CPU; a GPU has its own. Part of the definition of the result: the order of
// every addition follows from it, never from the number of threads or the instruction set.
constexpr int64_t kChunkSize = 32768;

// A piece of one tensor pair. An absent gradient is a null pointer and counts as zeros.
struct Chunk {
  int64_t tensor;
  int64_t offset;
  int64_t numel;
};

struct AdamOptions {
  double lr, beta1, beta2, weight_decay, eps;
  bool amsgrad, maximize, decoupled;
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, first_step;
};

}  // namespace blur_optim
