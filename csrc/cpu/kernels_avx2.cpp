#include "kernels.h"

#ifdef BLUR_OPTIM_X86
// Headers first: they must not be compiled for an instruction set that the processor may lack.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace {
constexpr int kGroupVecs = 2, kGroupVecs16Bit = 1;
}
// The compiler's own macros follow the command line, not the pragma.
#define BLUR_OPTIM_AVX2 1
#include "kernels_impl.h"

namespace blur_optim::cpu {
const Kernels kAvx2 = make_kernels("avx2");
}
#pragma GCC pop_options
#endif
