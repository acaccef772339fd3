// Runs the launchers of csrc/cuda for a sanitizer to watch: on the emulator under every schedule, or, compiled by nvcc, twice
// on a device, under compute-sanitizer. Exits with 1 where the results differ, or the dots from a sum in float64.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/device.cuh"

using namespace blur_optim;
using namespace blur_optim::cuda;

namespace {

#ifdef BLUR_OPTIM_EMULATOR
const char kSuccess[] = "the same results under every schedule";
void* allocate(size_t bytes) { return new char[bytes]; }
void release(void* p) { delete[] static_cast<char*>(p); }
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
int synchronize() {
  emulator::synchronize();
  return 0;
}
void schedule(emulator::Order order) { emulator::order = order; }
using emulator::Order;
#else
const char kSuccess[] = "the same results in every run";
enum class Order { kForward, kReverse, kShuffled };  // There is nothing to choose.
void schedule(Order) {}
void check(int error) {
  if (error) std::fprintf(stderr, "CUDA: %s\n", blur_optim_cuda_error(error)), std::exit(2);
}
void* allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes));
  return p;
}
void release(void* p) { cudaFree(p); }
void copy(void* to, const void* from, size_t bytes) { check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }
int synchronize() { return cudaDeviceSynchronize(); }
#endif

constexpr int64_t kChunk = BLUR_OPTIM_CUDA_CHUNK;
#ifdef __SANITIZE_THREAD__  // Where each CUDA thread costs a millisecond.
const std::vector<int64_t> kSizes{kChunk + 5};
const std::vector<int> kKinds{0, 3};
const std::vector<Order> kOrders{Order::kForward, Order::kShuffled};
#else
const std::vector<int64_t> kSizes{1, 7, kChunk - 1, kChunk, 2 * kChunk + 5};
const std::vector<int> kKinds{0, 1, 2, 3};
const std::vector<Order> kOrders{Order::kForward, Order::kReverse, Order::kShuffled};
#endif

double value(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
double value(T x) {
  return x;
}

// Where the kernels run. Ends where its allocation ends, so that a sanitizer sees the first element too many.
template <class T>
struct Array {
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, release};
  T* data = nullptr;
  int64_t numel = 0;

  Array() = default;
  explicit Array(const std::vector<T>& values, bool misaligned = false) : numel(int64_t(values.size())) {
    const size_t shift = misaligned ? sizeof(T) : 0;
    memory.reset(allocate(shift + numel * sizeof(T)));
    data = reinterpret_cast<T*>(static_cast<char*>(memory.get()) + shift);
    copy(data, values.data(), numel * sizeof(T));
  }
  Array(int64_t n, bool misaligned, unsigned seed, double low, double high) : Array(draw(n, seed, low, high), misaligned) {}

  static std::vector<T> draw(int64_t n, unsigned seed, double low, double high) {
    std::mt19937 random(seed);
    std::vector<T> values;
    for (int64_t i = 0; i < n; ++i) values.push_back(T(float(low + (high - low) * double(random()) / 4294967296.0)));
    return values;
  }
  std::vector<T> read() const {
    std::vector<T> values(numel);
    if (numel) copy(values.data(), data, numel * sizeof(T));
    return values;
  }
};

// A parameter's tensors: P the type of its own and its state's, G and F those of the retain and the forget gradient.
template <class P, class G, class F>
struct Item {
  Array<F> forget;
  Array<G> retain;
  Array<float> scales;
  Array<P> param, first, second, third;
  Pair pair;

  double forget_norm() const {
    const std::vector<F> values = forget.read();
    const std::vector<float> factors = scales.read();
    double norm = 0;
    for (size_t i = 0; i < values.size(); ++i)
      norm += std::pow(value(values[i]) * (factors.empty() ? 1 : factors[i / kBlockSize]), 2);
    return norm;
  }
};

// Sizes around a pack and a chunk, with each gradient absent in turn, aligned and not; two rows.
template <class P, class G, class F>
std::vector<Item<P, G, F>> make_items() {
  constexpr bool kIntegers = std::is_same_v<F, int8_t>;
  constexpr double kLargest = kIntegers ? 127 : 0.5;
  std::vector<Item<P, G, F>> items;
  unsigned seed = 0;
  for (int64_t row = 0; row < 2; ++row)
    for (int64_t n : kSizes)
      for (int kind : kKinds) {
        if (kind == 2 && !std::is_same_v<F, G>) continue;  // Never compressed and alone.
        Item<P, G, F> item;
        const bool misaligned = kind == 3;
        if (kind != 1) item.forget = Array<F>(n, misaligned, ++seed, -kLargest, kLargest);
        if (kind != 1 && kIntegers) item.scales = Array<float>((n + kBlockSize - 1) / kBlockSize, false, ++seed, 0, 0.01);
        if (kind != 2) item.retain = Array<G>(n, misaligned, ++seed, -0.5, 0.5);
        for (Array<P>* array : {&item.param, &item.first, &item.second, &item.third})
          *array = Array<P>(n, misaligned, ++seed, 0, 1);
        item.pair = {item.forget.data, item.retain.data, n, kDtype<G>, row, kDtype<F>, item.scales.data};
        items.push_back(std::move(item));
      }
  return items;
}

template <class T>
void append(std::vector<char>& bytes, const Array<T>& array) {
  const std::vector<T> values = array.read();
  bytes.insert(bytes.end(), reinterpret_cast<const char*>(values.data()),
               reinterpret_cast<const char*>(values.data() + values.size()));
}

// The bytes of everything that one call of every launcher writes.
template <class P, class G, class F>
std::vector<char> run(bool amsgrad) {
  std::vector<Item<P, G, F>> items = make_items<P, G, F>();
  std::vector<Pair> pairs;
  std::vector<AdamTensors> adam;
  std::vector<SgdTensors> sgd;
  std::vector<MetricTensors> in_metric;
  std::vector<int64_t> order;
  std::vector<double> metric;
  for (auto& x : items) {
    in_metric.push_back({x.pair, kDtype<P>, x.second.data, amsgrad ? x.third.data : nullptr});
    order.push_back(int64_t(order.size()));
    metric.insert(metric.end(), {0.9, 0.1, 1.5, 0.01, 1e-8});
    pairs.push_back(x.pair);
    adam.push_back({x.pair, kDtype<P>, x.param.data, x.first.data, x.second.data, amsgrad ? x.third.data : nullptr});
    sgd.push_back({x.pair, kDtype<P>, x.param.data, x.first.data, x.second.data});
  }
  const int64_t count = int64_t(pairs.size());
  const size_t room = size_t(blur_optim_cuda_metric_dots_workspace(in_metric.data(), count));
  const Array<double> workspace{std::vector<double>(room)}, numbers{metric}, metric_dots{std::vector<double>(2 * kMetricDots)},
      corrections{std::vector<double>(2 * count)},
      dots{std::vector<double>(6)}, lr{std::vector<double>{0.1}}, coefficients{std::vector<double>{-1.3, 0.7, 0.5, 2.0}};
  const Array<float> steps{std::vector<float>(count, 3)}, found_inf{std::vector<float>{0}};
  const DeviceScalars scalars{coefficients.data, lr.data, found_inf.data, nullptr};
  const DeviceScalars with_metric{coefficients.data, lr.data, found_inf.data, numbers.data};
  const AdamOptions adam_options{0, 0.9, 0.99, 0.1, 1e-8, amsgrad, false, !amsgrad};
  const SgdOptions sgd_options{0, 0.9, 0.1, 0.1, amsgrad, true, false};
  // One after the other: the thread sanitizer knows at most 8128 threads.
  int error = blur_optim_cuda_dots(pairs.data(), count, 2, workspace.data, dots.data, nullptr);
  error |= synchronize();
  error |= blur_optim_cuda_metric_dots(in_metric.data(), order.data(), count, 2, numbers.data, workspace.data,
                                       metric_dots.data, nullptr);
  error |= synchronize();
  for (const DeviceScalars& used : {scalars, with_metric}) {
    error |= blur_optim_cuda_adam(adam.data(), count, &adam_options, used, steps.data, corrections.data, nullptr);
    error |= synchronize();
    error |= blur_optim_cuda_sgd(sgd.data(), count, &sgd_options, used, nullptr);
    error |= synchronize();
  }
  error |= blur_optim_cuda_blend(pairs.data(), count, coefficients.data, nullptr);
  error |= synchronize();
  error |= blur_optim_cuda_metric_blend(in_metric.data(), count, with_metric, nullptr);
  error |= synchronize();
  if constexpr (std::is_same_v<F, int8_t> || (std::is_same_v<F, __nv_bfloat16> && sizeof(G) > 2)) {
    std::vector<Pair> compressed;  // At last: the forget gradients are written anew.
    for (auto& x : items)
      if (x.pair.forget && x.pair.retain) compressed.push_back(x.pair);
    error |= blur_optim_cuda_compress(compressed.data(), int64_t(compressed.size()), nullptr);
    error |= synchronize();
  }
  const std::vector<double> sums = dots.read(), metric_sums = metric_dots.read();
  for (int64_t row = 0; row < 2; ++row) {
    double norm = 0;
    for (auto& x : make_items<P, G, F>())
      if (x.pair.row == row) norm += x.forget_norm();
    for (double sum : {sums[3 * row + 1], metric_sums[kMetricDots * row + 1]})
      if (!(std::fabs(sum / norm - 1) < 1e-6)) error = 1;
  }
  if (error) std::fprintf(stderr, "a launch failed, or the dots are wrong\n"), std::exit(1);
  std::vector<char> bytes;
  append(bytes, dots);
  append(bytes, metric_dots);
  for (auto& x : items) {
    append(bytes, x.forget);
    append(bytes, x.scales);
    append(bytes, x.retain);
    for (Array<P>* array : {&x.param, &x.first, &x.second, &x.third}) append(bytes, *array);
  }
  return bytes;
}

template <class P, class G, class F>
void run_schedules(bool amsgrad) {
  std::vector<char> expected;
  for (Order order : kOrders) {
    schedule(order);
    const std::vector<char> bytes = run<P, G, F>(amsgrad);
    if (expected.empty()) expected = bytes;
    if (bytes != expected) std::fprintf(stderr, "the results differ\n"), std::exit(1);
  }
}

}  // namespace

int main() {
  run_schedules<float, float, float>(false);
  run_schedules<float, __nv_bfloat16, __nv_bfloat16>(true);
  run_schedules<float, float, int8_t>(true);
  run_schedules<float, float, __nv_bfloat16>(false);
#ifndef __SANITIZE_THREAD__
  run_schedules<float, __nv_bfloat16, int8_t>(false);
  run_schedules<double, double, int8_t>(true);
#endif
  std::printf("%s\n", kSuccess);
}
