#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace blur_optim::cpu {

static const Kernels& choose() {
  const char* wanted = std::getenv("BLUR_OPTIM_CPU_CAPABILITY");
  if (wanted && !std::strcmp(wanted, "generic")) return kGeneric;
#ifdef BLUR_OPTIM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !(wanted && !std::strcmp(wanted, "avx2"))) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kGeneric;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace blur_optim::cpu
