// A pair of gradients as the kernels see it. No torch header here: the CUDA launchers take it too.
#pragma once

#include "multi_tensor.h"

namespace blur_optim {

struct Pair {
  void* forget;  // Null where absent, as is retain.
  void* retain;
  int64_t numel;
  Dtype dtype;
  int64_t row;
};

}  // namespace blur_optim
