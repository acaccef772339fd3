// Where the kernels read gradients from: as they are, compressed, or absent; alone, in pairs, or as the update of a pair.
#pragma once

#include "vectors.h"

namespace blur_optim::cpu {
namespace {

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

}  // namespace
}  // namespace blur_optim::cpu
