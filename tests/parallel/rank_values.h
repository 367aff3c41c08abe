// What each rank gives to a collective under test, of every dtype, and what a reduction makes of it.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <vector>

#include "parallel/collectives.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::rank_values {

inline constexpr std::array kDtypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf,
                                       at::kLong,  at::kInt,    at::kByte,     at::kBool};

/// Small whole numbers that differ by world rank and by element: sums over a few ranks are exact in every dtype.
inline at::Tensor values(at::IntArrayRef shape, int world_rank, at::ScalarType dtype) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  const auto index = at::arange(elements, at::kLong);
  auto numbers = (index * 7 + index.floor_divide(31) * 3 + world_rank * 13 + 1).remainder(31);
  if (dtype == at::kBool) numbers = numbers.remainder(3).eq(0);
  return numbers.to(dtype).view(shape);
}

/// The world ranks of this rank's tensor-parallel group of size t.
inline std::vector<int> peers(int t) {
  return test_support::groups(t).grid.group_of(test_support::world_tp()->getRank(), "tp");
}

/// What each rank of the group has, in the order of the ranks.
inline std::vector<at::Tensor> of_all(int t, at::IntArrayRef shape, at::ScalarType dtype) {
  std::vector<at::Tensor> all;
  for (const int peer : peers(t)) all.push_back(values(shape, peer, dtype));
  return all;
}

inline at::Tensor own(int t, at::IntArrayRef shape, at::ScalarType dtype) {
  return of_all(t, shape, dtype)[static_cast<size_t>(test_support::groups(t).tp->getRank())];
}

inline at::Tensor reduced(const std::vector<at::Tensor>& all, parallel::Reduction reduction) {
  const auto dtype = all.front().scalar_type();
  const auto stacked = at::stack(all).to(at::kDouble);
  switch (reduction) {
    case parallel::Reduction::kSum:
      return stacked.sum(0).to(dtype);
    case parallel::Reduction::kMax:
      return stacked.amax(0).to(dtype);
    case parallel::Reduction::kMin:
      return stacked.amin(0).to(dtype);
  }
  return {};
}

/// The same values in memory of another order: transposed twice.
inline at::Tensor transposed_storage(const at::Tensor& tensor) {
  return tensor.transpose(0, -1).contiguous().transpose(0, -1);
}

}  // namespace megatron_cpp::rank_values
