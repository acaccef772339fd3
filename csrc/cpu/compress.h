// Gradients compressed: to int8 in blocks, or to bfloat16.
#pragma once

#include "vectors.h"

namespace blur_optim::cpu {
namespace {

// Twice 2^23 and half of it: what a float of up to 2^22 loses beside it is its fraction, to nearest, ties to even.
constexpr float kRounder = 12582912.0f;

// round(x / scale) with scale = max |x| / 127. In integers the largest magnitude is that of a NaN, then that of an infinity;
// the scale is either then, every quotient NaN or 0, and the block reads as NaN.
template <class T>
void quantize_block(const T* __restrict x, int count, int8_t* __restrict values, float* scale) {
  float block[kBlockSize];
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    block[i] = float(load(x[i]));
    const uint32_t magnitude = bits<uint32_t>(block[i]) & 0x7fffffffu;
    largest = largest < magnitude ? magnitude : largest;
  }
  *scale = bits<float>(largest) / 127.0f;
  for (int i = 0; i < count; ++i) {
    const float quotient = block[i] / *scale;
    float rounded = (quotient + kRounder) - kRounder;
    rounded = quotient - quotient == 0.0f ? rounded : 0.0f;  // Of zeros, 0 / 0.
    // A scale that is a denormal number may be too small by a third.
    rounded = rounded > 127.0f ? 127.0f : rounded;
    rounded = rounded < -127.0f ? -127.0f : rounded;
    values[i] = int8_t(int32_t(rounded));
  }
}

template <class T>
void compress(const void* grad, int64_t numel, void* values, float* scales) {
  const T* __restrict const x = static_cast<const T*>(grad);
  if (!scales) {
    BFloat16* __restrict const out = static_cast<BFloat16*>(values);
    for (int64_t i = 0; i < numel; ++i) store(out[i], float(load(x[i])));
    return;
  }
  int8_t* const out = static_cast<int8_t*>(values);
  int64_t i = 0;
  for (; i + kBlockSize <= numel; i += kBlockSize) quantize_block(x + i, kBlockSize, out + i, scales + i / kBlockSize);
  if (i < numel) quantize_block(x + i, int(numel - i), out + i, scales + i / kBlockSize);
}

}  // namespace
}  // namespace blur_optim::cpu
