#include <cmath>
#include <cstring>

namespace {
constexpr int kGroupVecs = 1, kGroupVecs16Bit = 1;
}
#include "kernels_impl.h"

namespace blur_optim::cpu {
const Kernels kGeneric = make_kernels("generic");
}
