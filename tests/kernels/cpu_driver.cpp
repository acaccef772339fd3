// Runs every CPU kernel on buffers of exactly the size it may touch, for the address and undefined-behaviour sanitizers.
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace blur_optim;
using namespace blur_optim::cpu;

static size_t element_size(Dtype d) {
  return d == Dtype::Float64 ? 8 : d == Dtype::Float32 ? 4 : d == Dtype::Int8 ? 1 : 2;
}

struct Buffer {
  std::vector<char> bytes;
  Buffer(Dtype d, int64_t n) : bytes(n * element_size(d), 0x3a) {}
  void* data() { return bytes.data(); }
};

static void run(const Kernels& k, Dtype p, Dtype g, Dtype stashed, int64_t n, bool has_f, bool has_r) {
  Buffer param(p, n), m(p, n), v(p, n), vmax(p, n), forget(stashed, n), retain(g, n);
  Buffer scales(Dtype::Float32, (n + kBlockSize - 1) / kBlockSize);
  const Pair pair{has_f ? forget.data() : nullptr, has_r ? retain.data() : nullptr,        n, g, 0, stashed,
                  stashed == Dtype::Int8 ? static_cast<const float*>(scales.data()) : nullptr};
  double out[3];
  k.dots(pair, out);
  k.blend(pair, 0.3, -1.2);
  const Metric metric{0.9, 0.1, 1.5, 0.01, 1e-8};
  double sums[kMetricDots];
  k.metric_dots(p, v.data(), nullptr, pair, metric, sums);
  k.metric_dots(p, v.data(), vmax.data(), pair, metric, sums);
  k.metric_blend(p, v.data(), pair, 0.3, -1.2, metric);
  for (int flags = 0; flags < 8; ++flags) {
    const AdamOptions adam{1e-3, 0.9, 0.99, 0.1, 1e-8, bool(flags & 1), bool(flags & 2), bool(flags & 4)};
    for (const Metric* used : {static_cast<const Metric*>(nullptr), &metric})
      k.adam(p, param.data(), m.data(), v.data(), flags & 1 ? vmax.data() : nullptr, pair, 0.3, -1.2, 2, adam, used);
    const SgdOptions sgd{1e-3, 0.9, 0.1, 0.1, bool(flags & 1), bool(flags & 2), bool(flags & 4)};
    for (void* buffer : {m.data(), static_cast<void*>(nullptr)}) {
      k.sgd(p, param.data(), buffer, nullptr, pair, 0.3, -1.2, sgd, nullptr);
      k.sgd(p, param.data(), buffer, v.data(), pair, 0.3, -1.2, sgd, &metric);
    }
  }
}

static void compress(const Kernels& k, Dtype g, int64_t n) {
  Buffer grad(g, n), integers(Dtype::Int8, n), halves(Dtype::BFloat16, n);
  Buffer scales(Dtype::Float32, (n + kBlockSize - 1) / kBlockSize);
  k.compress(g, grad.data(), n, integers.data(), static_cast<float*>(scales.data()));
  if (element_size(g) > 2) k.compress(g, grad.data(), n, halves.data(), nullptr);
}

static void run(const Kernels& k, Dtype p, Dtype g, int64_t n) {
  for (int present = 1; present < 4; ++present) run(k, p, g, g, n, present & 1, present & 2);
  run(k, p, g, Dtype::Int8, n, true, true);
  if (element_size(g) > 2) run(k, p, g, Dtype::BFloat16, n, true, true);
}

int main() {
  std::vector<const Kernels*> tables{&kGeneric};
#ifdef BEST  // Of this processor's tables.
  tables.push_back(&BEST);
#endif
  const Dtype all[] = {Dtype::Float32, Dtype::BFloat16, Dtype::Float16, Dtype::Float64};
  for (const Kernels* k : tables)
    for (int64_t n : {1, 15, 63, 64, 65, 255, 257, 1023, 1024, 1025, 2100})
      for (Dtype d : all) {
        run(*k, d, d, n);
        compress(*k, d, n);
        if (element_size(d) == 2) run(*k, Dtype::Float32, d, n);
      }
  std::printf("done\n");
}
