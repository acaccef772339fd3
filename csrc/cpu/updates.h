// What is made of the update u = a f + b r: the blend, and the steps of AdamW, Adam and SGD, in the metric or not.
#pragma once

#include "metric.h"

namespace blur_optim::cpu {
namespace {

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

}  // namespace
}  // namespace blur_optim::cpu
