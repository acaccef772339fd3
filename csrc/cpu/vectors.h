// Storage types, and 16 elements at a time in the dtype of the computation.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace blur_optim::cpu {
namespace {

template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// Storage types. Conversions are written in integer arithmetic, which every instruction set vectorises the same way.
struct BFloat16 {
  uint16_t x;
};
struct Float16 {
  uint16_t x;
};

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) { return bits<float>(uint32_t(value.x) << 16); }
inline float load(Float16 value) {
  // Rebias the exponent by a multiplication, which also normalises denormals; infinity and NaN keep their exponent.
  const uint32_t magnitude = uint32_t(value.x & 0x7fff) << 13;
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t sign = uint32_t(value.x & 0x8000) << 16;
  return bits<float>((magnitude >= 0x0f800000u ? special : finite) | sign);
}

inline void store(float& out, float value) { out = value; }
inline void store(double& out, double value) { out = value; }
inline void store(BFloat16& out, float value) {
  const uint32_t x = bits<uint32_t>(value);
  const uint32_t rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;  // To nearest, ties to even.
  out.x = uint16_t(value != value ? 0x7fc0u : rounded);
}
inline void store(Float16& out, float value) {
  const uint32_t x = bits<uint32_t>(value);
  const uint32_t sign = (x >> 16) & 0x8000u;
  const uint32_t magnitude = x & 0x7fffffffu;
  // Below 2^-14 adding 0.5 aligns the bits as a denormal has them, and rounds; above, round at bit 13 and rebias.
  const uint32_t small = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out.x = uint16_t(result | sign);
}

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// 16 elements in the compute dtype. Written as vectors because compilers do not find them in the element-wise form.
typedef uint16_t Words __attribute__((vector_size(32)));
typedef uint32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(128)));

template <class V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void load16(Floats& out, const float* x) { out = load_as<Floats>(x); }
inline void load16(Doubles& out, const double* x) { out = load_as<Doubles>(x); }
inline void load16(Floats& out, const BFloat16* x) {
  out = (Floats)(__builtin_convertvector(load_as<Words>(x), Ints) << 16);
}
inline void load16(Floats& out, const Float16* x) {  // As load(Float16).
  const Ints words = __builtin_convertvector(load_as<Words>(x), Ints);
  const Ints magnitude = (words & 0x7fff) << 13, sign = (words & 0x8000) << 16;
  const Ints finite = (Ints)((Floats)magnitude * 0x1p112f), special = magnitude | 0x7f800000u;
  const Ints is_special = (Ints)(magnitude >= 0x0f800000u);
  out = (Floats)((is_special & special) | (~is_special & finite) | sign);
}
// Exact, so every instruction set may do it in its own way. GCC finds none of them, and goes through single elements.
inline Floats load16(const int8_t* x) {
#if defined(BLUR_OPTIM_AVX512)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#elif defined(BLUR_OPTIM_AVX2)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  const __m256 halves[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  return load_as<Floats>(halves);
#else
  Floats out;
  for (int k = 0; k < 16; ++k) out[k] = x[k];
  return out;
#endif
}
// Rounded as IEEE says, so it has the same bits everywhere.
inline void take_root(float& x) { x = std::sqrt(x); }
inline void take_root(double& x) { x = std::sqrt(x); }
inline void take_root(Floats& x) {
#if defined(BLUR_OPTIM_AVX512)
  x = (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(BLUR_OPTIM_AVX2)
  __m256 parts[2];
  std::memcpy(parts, &x, sizeof x);
  for (__m256& part : parts) part = _mm256_sqrt_ps(part);
  std::memcpy(&x, parts, sizeof x);
#else
  for (int k = 0; k < 16; ++k) x[k] = std::sqrt(x[k]);
#endif
}
inline void take_root(Doubles& x) {
#if defined(BLUR_OPTIM_AVX512)
  __m512d parts[2];
  std::memcpy(parts, &x, sizeof x);
  for (__m512d& part : parts) part = _mm512_sqrt_pd(part);
  std::memcpy(&x, parts, sizeof x);
#elif defined(BLUR_OPTIM_AVX2)
  __m256d parts[4];
  std::memcpy(parts, &x, sizeof x);
  for (__m256d& part : parts) part = _mm256_sqrt_pd(part);
  std::memcpy(&x, parts, sizeof x);
#else
  for (int k = 0; k < 16; ++k) x[k] = std::sqrt(x[k]);
#endif
}
template <class C>
struct VectorOf {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
};

}  // namespace
}  // namespace blur_optim::cpu
