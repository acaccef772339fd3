#include "kernels.h"

#ifdef BLUR_OPTIM_X86
// Headers first: they must not be compiled for an instruction set that the processor may lack.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace {
constexpr int kGroupVecs = 4, kGroupVecs16Bit = 4;
}
// The compiler's own macros follow the command line, not the pragma.
#define BLUR_OPTIM_AVX512 1
#include "kernels_impl.h"

namespace blur_optim::cpu {
const Kernels kAvx512 = make_kernels("avx512");
}
#pragma GCC pop_options
#endif
