// A tensor- and sequence-parallel MLP, equal to the dense one.
//
//   cmake -S examples/tensor_parallel_mlp -B build_mlp -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build_mlp
//   mpirun -np 2 --bind-to none build_mlp/tensor_parallel_mlp
//
// prints: 2 ranks, each with 4 of 8 positions and 128 of 256 hidden units: outputs and gradients equal the dense MLP's
#include <ATen/ATen.h>

#include <cstdio>

#include "megatron_cpp/parallel/agree.h"
#include "megatron_cpp/parallel/collectives.h"
#include "megatron_cpp/parallel/process_groups.h"
#include "megatron_cpp/parallel/runtime.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"

namespace parallel = megatron_cpp::parallel;

namespace {

constexpr int64_t S = 8, B = 2, H = 64, F = 256;

int run(parallel::Runtime& runtime) {
  const int t = runtime.size();
  const auto tp = parallel::make_process_groups(runtime, {.tp = t}).tp;
  const auto own = [&](const at::Tensor& whole, int64_t dim) { return whole.chunk(t, dim)[runtime.rank()]; };

  // up splits its output and down its input into F/t units per rank; outside the MLP each rank has S/t positions.
  megatron_cpp::ColumnParallelLinear up(megatron_cpp::ColumnParallelLinearOptions(H, F).sequence_parallel(true), tp);
  megatron_cpp::RowParallelLinear down(megatron_cpp::RowParallelLinearOptions(F, H).sequence_parallel(true), tp);
  megatron_cpp::initialize_parameters(up->own_parameters(), /*seed=*/1);
  megatron_cpp::initialize_parameters(down->own_parameters(), /*seed=*/2);

  at::manual_seed(3);  // the same on every rank
  const auto whole_input = at::randn({S, B, H}).set_requires_grad(true);
  const auto input = own(whole_input.detach(), 0).clone().set_requires_grad(true);
  const auto output = down->forward(at::gelu(up->forward(input)));
  output.square().sum().backward();

  const auto up_weight = parallel::all_gather(up->weight.detach(), tp).clone().set_requires_grad(true);
  const auto down_weight = parallel::all_gather_last_dim(down->weight.detach(), tp).clone().set_requires_grad(true);
  const auto dense = at::linear(at::gelu(at::linear(whole_input, up_weight)), down_weight);
  dense.square().sum().backward();

  const auto equal = [](const at::Tensor& a, const at::Tensor& b) { return at::allclose(a, b, 1e-4, 1e-6); };
  parallel::agree(equal(output, own(dense, 0)), "the output differs from the dense MLP's", tp);
  parallel::agree(equal(input.grad(), own(whole_input.grad(), 0)), "the input's gradient differs", tp);
  parallel::agree(equal(up->weight.grad(), own(up_weight.grad(), 0)), "the first weight's gradient differs", tp);
  parallel::agree(equal(down->weight.grad(), own(down_weight.grad(), 1)), "the second weight's gradient differs", tp);
  if (runtime.rank() == 0) {
    std::printf("%d ranks, each with %ld of %ld positions and %ld of %ld hidden units: ", t, S / t, S, F / t, F);
    std::printf("outputs and gradients equal the dense MLP's\n");
  }
  return 0;
}

}  // namespace

int main() { return parallel::Runtime::run(run); }
