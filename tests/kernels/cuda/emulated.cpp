// csrc/cuda on the emulator behind its own binding: the operators of `blur_optim_emulated`, which take CPU tensors.
#include "arguments.h"
#include "cuda/device.cuh"

namespace blur_optim {
namespace {

// Stands in for the device and its stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  ~OnDevice() { emulator::synchronize(); }
  void* stream() const { return nullptr; }
};

}  // namespace
}  // namespace blur_optim

#include "cuda/binding.cpp"

STABLE_TORCH_LIBRARY_IMPL(blur_optim_emulated, CPU, m) {
  m.impl("multi_tensor_dots", TORCH_BOX(&blur_optim::multi_tensor_dots_cuda));
  m.impl("multi_tensor_blend_", TORCH_BOX(&blur_optim::multi_tensor_blend_cuda));
  m.impl("multi_tensor_compress_", TORCH_BOX(&blur_optim::multi_tensor_compress_cuda));
  m.impl("fused_adamw_", TORCH_BOX(&blur_optim::fused_adamw_cuda));
  m.impl("fused_sgd_", TORCH_BOX(&blur_optim::fused_sgd_cuda));
  m.impl("multi_tensor_metric_dots", TORCH_BOX(&blur_optim::multi_tensor_metric_dots_cuda));
  m.impl("multi_tensor_metric_blend_", TORCH_BOX(&blur_optim::multi_tensor_metric_blend_cuda));
  m.impl("metric_adamw_", TORCH_BOX(&blur_optim::metric_adamw_cuda));
  m.impl("metric_sgd_", TORCH_BOX(&blur_optim::metric_sgd_cuda));
}

extern "C" {

void emulator_schedule(int order, unsigned seed, int64_t edge_blocks) {
  emulator::order = emulator::Order(order);
  emulator::random.seed(seed);
  emulator::edge_blocks = edge_blocks;
}

// The piece of block `block`, where a launch has tensors of these sizes.
void emulator_locate(const int64_t* numels, int count, uint32_t block, int64_t piece[3]) {
  blur_optim::cuda::Table<1, int64_t> table{};
  int64_t blocks = 0;
  for (table.count = 0; table.count < count; ++table.count) {
    auto& entry = table.entries[table.count];
    entry.numel = numels[table.count];
    entry.first_block = uint32_t(blocks);
    blocks += blur_optim::cuda::chunks_of(entry.numel);
  }
  const auto found = blur_optim::cuda::locate(table, block);
  piece[0] = found.entry;
  piece[1] = found.offset;
  piece[2] = found.numel;
}

}  // extern "C"
