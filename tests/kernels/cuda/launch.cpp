// Launches the dots of two numbers on whatever CUDA device there is, and prints what came of it.
#include <cstdio>

#include "cuda/kernels.h"

extern "C" int cudaMallocManaged(void**, size_t, unsigned);
extern "C" int cudaDeviceSynchronize();

using namespace blur_optim;
using namespace blur_optim::cuda;

int main() {
  static double host[8];
  double* memory = host;
  cudaMallocManaged(reinterpret_cast<void**>(&memory), sizeof host, 1);
  memory[0] = 2;
  memory[1] = 3;
  const Pair pair{memory, memory + 1, 1, Dtype::Float64, 0, Dtype::Float64, nullptr};
  int error = blur_optim_cuda_dots(&pair, 1, 1, memory + 2, memory + 5, nullptr);
  if (!error) error = cudaDeviceSynchronize();
  std::printf("%d (%s): %g %g %g\n", error, blur_optim_cuda_error(error), memory[5], memory[6], memory[7]);
}
