// The parameters of a model and what a rank holds of them, without making any.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "parallel/rank_grid.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// Tensors of one shape that are distributed alike.
struct TensorGroup {
  std::string_view part;         ///< of the model: one of kModelParts
  int64_t count = 1;             ///< how many there are on a rank
  int64_t whole = 0;             ///< elements of each in the whole model, padding of the vocabulary included
  int64_t local = 0;             ///< elements of each on a rank
  std::string_view summed_over;  ///< kind of the group that the gradient is summed over: dp, tp_dp or edp
  bool trained = true;
};

/// The parts that plan's table tells apart, in its order.
inline constexpr std::string_view kModelParts[] = {"embedding",    "attention",      "dense feed-forward", "experts",
                                                   "router",       "shared experts", "output layer",       "projector",
                                                   "vision tower", "MTP layers"};

/// Every parameter of Step37Model(config) on one rank of `grid`, norms with the part that they precede. The router's
/// correction bias is a buffer.
/// @param config  valid for the grid.
std::vector<TensorGroup> tensors_of(const Step37Config& config, const parallel::RankGrid& grid);

/// Elements of all tensors in the whole model.
int64_t whole_elements(const std::vector<TensorGroup>& tensors);
/// Elements of all tensors on a rank.
int64_t local_elements(const std::vector<TensorGroup>& tensors);

}  // namespace megatron_cpp::step37
