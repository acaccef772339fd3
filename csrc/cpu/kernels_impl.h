// The kernels as templates over dtypes. Each kernels_*.cpp includes this file under another instruction set, after it has
// defined kGroupVecs and kGroupVecs16Bit: how many vectors of 16 lanes the registers hold three sums for, the latter beside
// the conversions from 16 bits. It gets its own copy in an unnamed namespace. Compiled without contraction into fused multiply-adds, and with explicit lanes where order matters,
// so that all copies give the same bits.
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

// 64 running sums per dot, whatever the vector width: 4 registers of AVX-512, 8 of AVX2.
constexpr int kLanes = 64;
constexpr int kVecs = kLanes / 16;
// Additions into one running sum before it is added to the lane's total. A long float32 run over bfloat16 values is biased:
// they are so coarse that half of the roundings are ties (1e-6 of the norm over 512 additions, 3e-8 over 16).
constexpr int kRun = 16;

// Where a kernel reads a gradient from: its elements one by one, and 16 at a time.
template <class T>
struct Plain {
  using Element = T;
  T* __restrict x;

  Plain from(int64_t i) const { return {x + i}; }
  Compute<T> load(int64_t i) const { return cpu::load(x[i]); }
  template <class V>
  void load16(V& out, int64_t i) const {
    if constexpr (std::is_same_v<V, typename VectorOf<Compute<T>>::type>)
      cpu::load16(out, x + i);
    else  // bfloat16 beside float64.
      for (int k = 0; k < 16; ++k) out[k] = cpu::load(x[i + k]);
  }
  void prefetch(int64_t i) const { __builtin_prefetch(x + i); }
  void store(int64_t i, Compute<T> value) const { cpu::store(x[i], value); }
};

// Integers with a scale for each block, where the block of an element is not known beforehand.
template <class C>
struct Blocks {
  using Element = int8_t;
  const int8_t* __restrict x;
  const float* __restrict scales;

  static_assert(kRun * kLanes % kBlockSize == 0);
  Blocks from(int64_t i) const { return {x + i, scales + i / kBlockSize}; }  // i is where a block begins.
  C load(int64_t i) const { return C(x[i]) * C(scales[i / kBlockSize]); }
  template <class V>
  void load16(V& out, int64_t i) const {
    static_assert(kBlockSize % 16 == 0);
    const C scale = C(scales[i / kBlockSize]);
    if constexpr (std::is_same_v<V, Floats>)
      out = cpu::load16(x + i) * scale;
    else
      out = __builtin_convertvector(cpu::load16(x + i), V) * scale;
  }
  void prefetch(int64_t i) const { __builtin_prefetch(x + i); }
};

// An absent gradient.
template <class T>
struct Zeros {
  using Element = T;

  Zeros from(int64_t) const { return {}; }
  Compute<T> load(int64_t) const { return 0; }
  template <class V>
  void load16(V& out, int64_t) const {
    out = V{};
  }
  void prefetch(int64_t) const {}
};

// The elements of one block.
template <class C>
struct Block {
  const int8_t* __restrict x;
  C scale;
  C load(int64_t i) const { return C(x[i]) * scale; }
};

// Call body(first, count, source) for the longest stretches in which the source is a simple loop's.
template <class T, class Body>
inline void for_each_stretch(Plain<T> source, int64_t n, const Body& body) {
  body(int64_t(0), n, source);
}
template <class C, class Body>
inline void for_each_stretch(Blocks<C> source, int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += kBlockSize)
    body(i, n - i < kBlockSize ? n - i : int64_t(kBlockSize), Block<C>{source.x + i, C(source.scales[i / kBlockSize])});
}

template <class C, int kCount = kLanes>
struct Lanes {
  C sum[kCount] = {};

  void add(const void* run) {
    C values[kCount];
    std::memcpy(values, run, sizeof values);
    for (int i = 0; i < kCount; ++i) sum[i] += values[i];
  }

  // Pairwise, so that the order is fixed.
  double total() const {
    double level[kCount];
    for (int i = 0; i < kCount; ++i) level[i] = double(sum[i]);
    for (int width = kCount / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) level[i] += level[i + width];
    return level[0];
  }
};

// Add up to kRun * kLanes elements to the totals. Lanes are independent, so how many of them advance together (kGroup
// vectors, as the registers allow) does not change a bit.
template <int kGroup, class F, class R, class C>
inline void dots_run(const F f, const R r, int rounds, Lanes<C> totals[3]) {
  using Vec = typename VectorOf<C>::type;
  Vec rf[kVecs] = {}, ff[kVecs] = {}, rr[kVecs] = {};
#pragma GCC unroll 4
  for (int first = 0; first < kVecs; first += kGroup) {
    for (int i = 0; i < rounds; ++i) {
      if (kGroup < kVecs && first == 0)
        // Passes over every fourth line defeat the hardware's prefetcher: fetch the next run whole, in the first of them.
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          f.prefetch((kRun + i) * kLanes + v * 16);
          r.prefetch((kRun + i) * kLanes + v * 16);
        }
#pragma GCC unroll 4
      for (int v = first; v < first + kGroup; ++v) {
        Vec x, y;
        f.load16(x, i * kLanes + v * 16);
        r.load16(y, i * kLanes + v * 16);
        rf[v] += x * y;
        ff[v] += x * x;
        rr[v] += y * y;
      }
    }
  }
  totals[0].add(rf);
  totals[1].add(ff);
  totals[2].add(rr);
}

template <class F, class R>
void dots(F f, R r, int64_t n, double out[3]) {
  using C = Compute<typename R::Element>;
  constexpr bool kConverts = sizeof(typename F::Element) < 4 || sizeof(typename R::Element) < 4;
  constexpr int kGroup = kConverts ? kGroupVecs16Bit : kGroupVecs;
  Lanes<C> totals[3];
  int64_t i = 0;
  for (; i + kRun * kLanes <= n; i += kRun * kLanes) dots_run<kGroup>(f.from(i), r.from(i), kRun, totals);
  const int rounds = int((n - i) / kLanes);
  if (rounds) dots_run<kGroup>(f.from(i), r.from(i), rounds, totals);
  i += rounds * kLanes;
  for (int j = 0; i < n; ++i, ++j) {
    const C x = C(f.load(i)), y = r.load(i);
    totals[0].sum[j] += x * y;
    totals[1].sum[j] += x * x;
    totals[2].sum[j] += y * y;
  }
  for (int k = 0; k < 3; ++k) out[k] = totals[k].total();
}

template <class T>
Plain<T> plain(void* x) {
  return {static_cast<T*>(x)};
}

// Call visit(forget, retain) with the two sources of a pair, both present.
template <class T, class Visitor>
void with_sources(const Pair& pair, const Visitor& visit) {
  const Plain<T> retain = plain<T>(pair.retain);
  if (pair.forget_dtype == Dtype::Int8) return visit(Blocks<Compute<T>>{static_cast<int8_t*>(pair.forget), pair.scales}, retain);
  if constexpr (sizeof(T) > 2)
    if (pair.forget_dtype == Dtype::BFloat16) return visit(plain<BFloat16>(pair.forget), retain);
  visit(plain<T>(pair.forget), retain);
}

template <class T>
void dots(const Pair& pair, double out[3]) {
  if (pair.forget && pair.retain)
    return with_sources<T>(pair, [&](auto f, auto r) { dots(f, r, pair.numel, out); });
  // A lone gradient is paired with itself, for the same bits as beside zeros, and the sums that do not exist are dropped.
  const Plain<T> alone = plain<T>(pair.forget ? pair.forget : pair.retain);
  dots(alone, alone, pair.numel, out);
  out[0] = 0;
  out[pair.forget ? 2 : 1] = 0;
}

// The metric at one tensor, in the compute dtype.
template <class C>
struct MetricConstants {
  C beta2, rest2, inverse_correction, damping, eps;

  explicit MetricConstants(const Metric& m)
      : beta2(C(m.beta2)), rest2(C(m.rest2)), inverse_correction(C(m.inverse_correction)), damping(C(m.damping)),
        eps(C(m.eps)) {}

  C moment(C v, C r) const { return beta2 * v + rest2 * (r * r); }
  C denominator(C corrected) const { return std::sqrt(corrected + damping) + eps; }
};

template <class P, bool kAmsgrad>
struct Moments {
  const P* v;
  const P* vmax;

  Moments from(int64_t i) const { return {v + i, kAmsgrad ? vmax + i : nullptr}; }
  void prefetch(int64_t i) const {
    __builtin_prefetch(v + i);
    if (kAmsgrad) __builtin_prefetch(vmax + i);
  }
  // What the metric is made of where the square of the retain gradient is rr, over its bias correction.
  template <class C>
  C load(int64_t i, C rr, const MetricConstants<C>& metric) const {
    const C moment = metric.beta2 * cpu::load(v[i]) + metric.rest2 * rr;
    if constexpr (!kAmsgrad) return moment * metric.inverse_correction;
    const C seen = cpu::load(vmax[i]);
    return (seen < moment ? moment : seen) * metric.inverse_correction;
  }
  template <class V, class C>
  void load16(V& out, int64_t i, const V& rr, const MetricConstants<C>& metric) const {
    cpu::load16(out, v + i);
    out = metric.beta2 * out + metric.rest2 * rr;
    if constexpr (kAmsgrad) {
      V seen;
      cpu::load16(seen, vmax + i);
      out = seen < out ? out : seen;
    }
    out = out * metric.inverse_correction;
  }
};

// What 16 elements, or one, add to the sums.
template <class X>
struct MetricTerms {
  X rf, ff, rr, corrected, root;  // The second moment over its bias correction, and the denominator of P.

  template <class F, class R, class M, class C>
  MetricTerms(const F& forget, const R& retain, const M& moments, int64_t at, const MetricConstants<C>& metric) {
    X f, r;
    forget.load16(f, at);
    retain.load16(r, at);
    rf = r * f;
    ff = f * f;
    rr = r * r;
    moments.load16(corrected, at, rr, metric);
    root = corrected + metric.damping;
    take_root(root);
    root = root + metric.eps;
  }
};

// Members and not an array, whose elements GCC would keep in memory.
template <class X>
struct MetricSums {
  X rf{}, ff{}, rr{}, rpf{}, fpf{}, rpr{}, pf2{}, pf4{}, corrected{};

  void add(const X& rf_, const X& ff_, const X& rr_, const X& corrected_, const X& p) {
    const X fpf_ = p * ff_, pf2_ = p * fpf_;
    rf += rf_;
    ff += ff_;
    rr += rr_;
    rpf += p * rf_;
    fpf += fpf_;
    rpr += p * rr_;
    pf2 += pf2_;
    pf4 += pf2_ * pf2_;
    corrected += corrected_;
  }
  void add(const MetricTerms<X>& terms, const X& p) { add(terms.rf, terms.ff, terms.rr, terms.corrected, p); }
  template <class Take>
  void give(const Take& take) const {
    take(0, rf), take(1, ff), take(2, rr), take(3, rpf), take(4, fpf), take(5, rpr), take(6, pf2), take(7, pf4);
    take(8, corrected);
  }
};

// The metric's sums have 16 lanes: 64 of each of nine would not fit the registers, and their latency is hidden behind the
// roots and quotients. What is divided by is multiplied in pairs, since the divider takes longest: 1 / x and 1 / y from
// 1 / (x y).
constexpr int kMetricLanes = 16;
// Elements between those that are worked on and those that are fetched. The arithmetic fills the processor's window, so that
// loads do not run ahead by themselves: 6 % faster than without on Zen 4, and slower than that further ahead.
constexpr int kMetricAhead = 128;

// Add up to kRun * kMetricLanes elements to the totals.
template <class F, class R, class M, class C>
inline void metric_run(const F f, const R r, const M moments, int rounds, const MetricConstants<C>& metric,
                       Lanes<C, kMetricLanes> totals[kMetricDots]) {
  using Vec = typename VectorOf<C>::type;
  using Terms = MetricTerms<Vec>;
  MetricSums<Vec> sums;
  int i = 0;
  for (; i + 2 <= rounds; i += 2) {
    const Terms x(f, r, moments, i * kMetricLanes, metric), y(f, r, moments, (i + 1) * kMetricLanes, metric);
    for (int ahead = kMetricAhead; ahead < kMetricAhead + 2 * kMetricLanes; ahead += kMetricLanes) {
      f.prefetch(i * kMetricLanes + ahead);
      r.prefetch(i * kMetricLanes + ahead);
      moments.prefetch(i * kMetricLanes + ahead);
    }
    const Vec inverse = C(1) / (x.root * y.root);
    sums.add(x, inverse * y.root);
    sums.add(y, inverse * x.root);
  }
  if (i < rounds) {
    const Terms x(f, r, moments, i * kMetricLanes, metric);
    sums.add(x, C(1) / x.root);
  }
  sums.give([&](int k, const Vec& value) { totals[k].add(&value); });
}

template <class F, class R, class M, class C>
void metric_dots(F f, R r, M moments, int64_t n, const MetricConstants<C>& metric, double out[kMetricDots]) {
  Lanes<C, kMetricLanes> totals[kMetricDots];
  constexpr int kRunSize = kRun * kMetricLanes;
  static_assert(kRunSize % kBlockSize == 0);
  int64_t i = 0;
  for (; i + kRunSize <= n; i += kRunSize) metric_run(f.from(i), r.from(i), moments.from(i), kRun, metric, totals);
  const int rounds = int((n - i) / kMetricLanes);
  if (rounds) metric_run(f.from(i), r.from(i), moments.from(i), rounds, metric, totals);
  i += rounds * kMetricLanes;
  for (int j = 0; i < n; ++i, ++j) {
    const C x = C(f.load(i)), y = C(r.load(i)), rr = y * y, corrected = moments.load(i, rr, metric);
    MetricSums<C> one;
    one.add(y * x, x * x, rr, corrected, C(1) / metric.denominator(corrected));
    one.give([&](int k, C value) { totals[k].sum[j] += value; });
  }
  for (int k = 0; k < kMetricDots; ++k) out[k] = totals[k].total();
}

template <class P, class G>
void metric_dots(const void* v, const void* vmax, const Pair& pair, const Metric& metric, double out[kMetricDots]) {
  const MetricConstants<Compute<P>> constants(metric);
  const auto sum = [&](auto f, auto r) {
    const P *const vs = static_cast<const P*>(v), *const vmaxs = static_cast<const P*>(vmax);
    vmax ? metric_dots(f, r, Moments<P, true>{vs, vmaxs}, pair.numel, constants, out)
         : metric_dots(f, r, Moments<P, false>{vs, nullptr}, pair.numel, constants, out);
  };
  if (pair.forget && pair.retain) return with_sources<G>(pair, sum);
  if (pair.forget)
    sum(plain<G>(pair.forget), Zeros<G>());
  else
    sum(Zeros<G>(), plain<G>(pair.retain));
  out[0] = out[3] = 0;  // Where what is there is not finite.
}

// The two gradients of an element as one.
template <class F, class R, class C>
struct Both {
  F forget;
  R retain;
  C a, b;
  C operator()(int64_t i) const { return b * retain.load(i) + a * C(forget.load(i)); }
  C retain_at(int64_t i) const { return retain.load(i); }
};
template <class G, class C, bool kIsRetain>
struct Lone {
  G grad;
  C weight;
  C operator()(int64_t i) const { return weight * grad.load(i); }
  C retain_at(int64_t i) const { return kIsRetain ? grad.load(i) : C(0); }
};

// Call body(first, count, u) for the stretches of a pair, u(i) being the update of element first + i. It is a type of its own
// for what is there, so that the loops have no branch.
template <class T, class Body>
void with_update(const Pair& pair, double a64, double b64, const Body& body) {
  using C = Compute<T>;
  const C a = C(a64), b = C(b64);
  if (!pair.forget) return body(int64_t(0), pair.numel, Lone<Plain<T>, C, true>{plain<T>(pair.retain), b});
  if (!pair.retain) return body(int64_t(0), pair.numel, Lone<Plain<T>, C, false>{plain<T>(pair.forget), a});
  with_sources<T>(pair, [&](auto forget, Plain<T> retain) {
    for_each_stretch(forget, pair.numel, [&](int64_t first, int64_t count, auto f) {
      body(first, count, Both<decltype(f), Plain<T>, C>{f, {retain.x + first}, a, b});
    });
  });
}

template <class T>
void blend(const Pair& pair, double a, double b) {
  const Plain<T> out = plain<T>(pair.retain ? pair.retain : pair.forget);
  with_update<T>(pair, a, b, [&](int64_t first, int64_t count, auto u) {
    // Element by element what it reads: a loop without this promise would check for overlap, or not be vectorised.
    T* const to = out.x + first;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) store(to[i], u(i));
  });
}

template <class P, class G>
void metric_blend(void* v, const Pair& pair, double a, double b, const Metric& metric) {
  const Plain<G> out = plain<G>(pair.retain ? pair.retain : pair.forget);
  const MetricConstants<Compute<P>> constants(metric);
  with_update<G>(pair, a, b, [&](int64_t first, int64_t count, auto u) {
    G* const to = out.x + first;
    P* const moments = static_cast<P*>(v) + first;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      store(moments[i], constants.moment(load(moments[i]), Compute<P>(u.retain_at(i))));
      store(to[i], u(i));
    }
  });
}

template <class C>
struct AdamConstants {
  C shrink, decay, beta1, beta2, rest1, rest2, eps, step_size, correction2_sqrt;

  AdamConstants(double step, const AdamOptions& o)
      : shrink(C(o.decoupled ? 1 - o.lr * o.weight_decay : 1)), decay(C(o.decoupled ? 0 : o.weight_decay)),
        beta1(C(o.beta1)), beta2(C(o.beta2)),
        rest1(C(1 - o.beta1)), rest2(C(1 - o.beta2)), eps(C(o.eps)), step_size(C(o.lr / (1 - std::pow(o.beta1, step)))),
        correction2_sqrt(C(std::sqrt(1 - std::pow(o.beta2, step)))) {}
};

template <class P, bool kAmsgrad, bool kMetric, class U>
void adam_loop(P* __restrict p, P* __restrict m, P* __restrict v, P* __restrict vmax, U u, int64_t n,
               const AdamConstants<Compute<P>> o, const MetricConstants<Compute<P>> metric) {
  using C = Compute<P>;
  for (int64_t i = 0; i < n; ++i) {
    const C param = o.shrink * load(p[i]);  // Multiplied with 1, or 0 added below, as the weight decay is the other one.
    const C grad = C(u(i)) + o.decay * param;
    const C m_new = o.beta1 * load(m[i]) + o.rest1 * grad;
    const C v_new = kMetric ? metric.moment(C(load(v[i])), C(u.retain_at(i)))
                            : C(o.beta2 * load(v[i]) + o.rest2 * grad * grad);
    store(m[i], m_new);
    store(v[i], v_new);
    C second = v_new;
    if constexpr (kAmsgrad) {
      const C seen = load(vmax[i]);
      second = seen < v_new ? v_new : seen;
      store(vmax[i], second);
    }
    const C denominator = kMetric ? metric.denominator(C(second * metric.inverse_correction))
                                  : C(std::sqrt(second) / o.correction2_sqrt + o.eps);
    store(p[i], param - o.step_size * m_new / denominator);
  }
}

// Call visit with the flags as types, so that they can be template arguments.
template <class Visitor>
void with_flags(const Visitor& visit) {
  visit();
}
template <class Visitor, class... Flags>
void with_flags(const Visitor& visit, bool flag, Flags... flags) {
  with_flags([&](auto... rest) { flag ? visit(std::true_type(), rest...) : visit(std::false_type(), rest...); }, flags...);
}

template <class T>
T* at(void* base, int64_t offset) {
  return base ? static_cast<T*>(base) + offset : nullptr;
}

template <class P, class G>
void adam(void* p, void* m, void* v, void* vmax, const Pair& pair, double a, double b, double step, const AdamOptions& o,
          const Metric* metric) {
  const AdamConstants<Compute<P>> constants(step, o);
  const MetricConstants<Compute<P>> in_metric(metric ? *metric : Metric{});
  const double sign = o.maximize ? -1 : 1;
  with_update<G>(pair, sign * a, sign * b, [&](int64_t first, int64_t count, auto u) {
    const auto run = [&](auto loop) {
      loop(at<P>(p, first), at<P>(m, first), at<P>(v, first), at<P>(vmax, first), u, count, constants, in_metric);
    };
    using U = decltype(u);
    with_flags([&](auto amsgrad, auto has_metric) { run(adam_loop<P, amsgrad, has_metric, U>); }, o.amsgrad,
               metric != nullptr);
  });
}

template <class P, bool kMomentum, bool kNesterov, bool kMetric, class U>
void sgd_loop(P* __restrict p, P* __restrict buffer, P* __restrict v, U u, int64_t n, const SgdOptions& o,
              const MetricConstants<Compute<P>> metric) {
  using C = Compute<P>;
  const C lr = C(o.lr), decay = C(o.weight_decay), momentum = C(o.momentum);
  // The first step starts the buffer with the gradient itself, undamped.
  const C keep = C(o.first_step ? 0 : o.momentum), take = C(o.first_step ? 1 : 1 - o.dampening);
  for (int64_t i = 0; i < n; ++i) {
    const C param = load(p[i]);
    C grad = C(u(i)) + decay * param;
    if constexpr (kMomentum) {
      const C moved = keep * (o.first_step ? C(0) : load(buffer[i])) + take * grad;
      store(buffer[i], moved);
      grad = kNesterov ? grad + momentum * moved : moved;
    }
    if constexpr (kMetric) {
      const C v_new = metric.moment(C(load(v[i])), C(u.retain_at(i)));
      store(v[i], v_new);
      grad = grad / metric.denominator(C(v_new * metric.inverse_correction));
    }
    store(p[i], param - lr * grad);
  }
}

template <class P, class G>
void sgd(void* p, void* buffer, void* v, const Pair& pair, double a, double b, const SgdOptions& o, const Metric* metric) {
  const MetricConstants<Compute<P>> in_metric(metric ? *metric : Metric{});
  const double sign = o.maximize ? -1 : 1;
  with_update<G>(pair, sign * a, sign * b, [&](int64_t first, int64_t count, auto u) {
    const auto run = [&](auto loop) {
      loop(at<P>(p, first), at<P>(buffer, first), at<P>(v, first), u, count, o, in_metric);
    };
    using U = decltype(u);
    with_flags([&](auto has_buffer, auto nesterov, auto has_metric) {
      run(sgd_loop<P, has_buffer, has_buffer && nesterov, has_metric, U>);
    }, buffer != nullptr, o.nesterov, metric != nullptr);
  });
}

template <class Visitor>
void with_dtype(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::Float32: return visit(float());
    case Dtype::BFloat16: return visit(BFloat16());
    case Dtype::Float16: return visit(Float16());
    case Dtype::Float64: return visit(double());
    case Dtype::Int8: return;  // Never of a parameter or a retain gradient.
  }
}

// Gradients have the parameters' dtype, or a 16-bit one beside float32 parameters.
template <class Visitor>
void with_dtypes(Dtype param, Dtype grad, const Visitor& visit) {
  if (param == grad)
    with_dtype(param, [&](auto t) { visit(t, t); });
  else if (grad == Dtype::BFloat16)
    visit(float(), BFloat16());
  else
    visit(float(), Float16());
}

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

constexpr Kernels make_kernels(const char* name) {
  return {
      name,
      [](const Pair& pair, double out[3]) { with_dtype(pair.dtype, [&](auto t) { dots<decltype(t)>(pair, out); }); },
      [](const Pair& pair, double a, double b) { with_dtype(pair.dtype, [&](auto t) { blend<decltype(t)>(pair, a, b); }); },
      [](Dtype param, const void* v, const void* vmax, const Pair& pair, const Metric& metric, double out[kMetricDots]) {
        with_dtypes(param, pair.dtype,
                    [&](auto pt, auto gt) { metric_dots<decltype(pt), decltype(gt)>(v, vmax, pair, metric, out); });
      },
      [](Dtype param, void* v, const Pair& pair, double a, double b, const Metric& metric) {
        with_dtypes(param, pair.dtype,
                    [&](auto pt, auto gt) { metric_blend<decltype(pt), decltype(gt)>(v, pair, a, b, metric); });
      },
      [](Dtype param, void* p, void* m, void* v, void* vmax, const Pair& pair, double a, double b, double step,
         const AdamOptions& o, const Metric* metric) {
        with_dtypes(param, pair.dtype, [&](auto pt, auto gt) {
          adam<decltype(pt), decltype(gt)>(p, m, v, vmax, pair, a, b, step, o, metric);
        });
      },
      [](Dtype param, void* p, void* buffer, void* v, const Pair& pair, double a, double b, const SgdOptions& o,
         const Metric* metric) {
        with_dtypes(param, pair.dtype, [&](auto pt, auto gt) {
          sgd<decltype(pt), decltype(gt)>(p, buffer, v, pair, a, b, o, metric);
        });
      },
      [](Dtype dtype, const void* grad, int64_t numel, void* values, float* scales) {
        with_dtype(dtype, [&](auto t) { compress<decltype(t)>(grad, numel, values, scales); });
      },
  };
}

}  // namespace
}  // namespace blur_optim::cpu
