// The dots, and the lanes that sums are taken in.
#pragma once

#include "sources.h"

namespace blur_optim::cpu {
namespace {

// 64 running sums per dot, whatever the vector width: 4 registers of AVX-512, 8 of AVX2.
constexpr int kLanes = 64;
constexpr int kVecs = kLanes / 16;
// Additions into one running sum before it is added to the lane's total. A long float32 run over bfloat16 values is biased:
// they are so coarse that half of the roundings are ties (1e-6 of the norm over 512 additions, 3e-8 over 16).
constexpr int kRun = 16;

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

static_assert(kRun * kLanes % kBlockSize == 0);  // A run begins where a block of int8 does.

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
void dots(const Pair& pair, double out[3]) {
  if (pair.forget && pair.retain)
    return with_sources<T>(pair, [&](auto f, auto r) { dots(f, r, pair.numel, out); });
  // A lone gradient is paired with itself, for the same bits as beside zeros, and the sums that do not exist are dropped.
  const Plain<T> alone = plain<T>(pair.forget ? pair.forget : pair.retain);
  dots(alone, alone, pair.numel, out);
  out[0] = 0;
  out[pair.forget ? 2 : 1] = 0;
}

}  // namespace
}  // namespace blur_optim::cpu
