// The metric of the retain loss: the dots in it, and the blend that advances its second moments.
#pragma once

#include "dots.h"

namespace blur_optim::cpu {
namespace {

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
    if constexpr (kAmsgrad) __builtin_prefetch(vmax + i);
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
// roots and quotients. Those are as IEEE has them, one of each for an element: sharing a quotient between two elements
// (1 / x and 1 / y from 1 / (x y)) was slower, in the cache and out of it (Zen 4).
constexpr int kMetricLanes = 16;
// Elements to fetch ahead: eight lines of float32. Faster out of the cache and as fast in it; 512 elements are slower (Zen 4).
constexpr int kMetricAhead = 128;

// Add up to kRun * kMetricLanes elements to the totals.
template <class F, class R, class M, class C>
inline void metric_run(const F f, const R r, const M moments, int rounds, const MetricConstants<C>& metric,
                       Lanes<C, kMetricLanes> totals[kMetricDots]) {
  using Vec = typename VectorOf<C>::type;
  MetricSums<Vec> sums;
  for (int i = 0; i < rounds; ++i) {
    const int ahead = i * kMetricLanes + kMetricAhead;
    f.prefetch(ahead), r.prefetch(ahead), moments.prefetch(ahead);
    const MetricTerms<Vec> terms(f, r, moments, i * kMetricLanes, metric);
    sums.add(terms, C(1) / terms.root);
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

}  // namespace
}  // namespace blur_optim::cpu
