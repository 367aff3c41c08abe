// An embedding that is being checked: set up, and given the values of a table that is known whole.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "megatron_cpp/conformance/embedding_conformance.h"
#include "megatron_cpp/conformance/findings.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"
#include "parallel/recording_backend.h"

namespace megatron::internal {

/// An embedding under examination, and the truth about it.
struct Candidate {
  std::string setting;  ///< for messages
  std::shared_ptr<ParallelEmbedding> embedding;
  std::shared_ptr<const parallel::CommunicationCount> sent;
  PartialLayout layout = PartialLayout::kSummand;
  int64_t rank = 0;
  int64_t t = 1;
  ParameterShard shard;  ///< of its weight
  at::Tensor owners;     ///< [V], the rank that holds the beginning of each id's row
  at::Tensor table;      ///< [V, H], on the CPU
  at::Tensor own_table;  ///< [V, H], zero where the table isn't this rank's

  int64_t V() const { return 3 * t + 1; }  ///< no multiple of t > 1
  int64_t H() const { return 2 * t; }
  int64_t S() const { return 4 * t; }  ///< room for every id
  int64_t W() const { return layout == PartialLayout::kSummand ? H() : H() / t; }

  /// The rank's columns of [.., H], where partials are columns.
  at::Tensor own_columns(const at::Tensor& whole) const;
  /// Of a whole [V, H] what is this rank's, laid out as the weight; zero where the weight is padding.
  at::Tensor part_of(const at::Tensor& whole) const;
};

/// What `make` makes, converted to `dtype`, with the table's values, after everything about it was checked that can be
/// without a look-up: options, group, weight, layout, own_parameters. None if something is wrong with it on any rank;
/// `findings` has that. Collective over tp.
std::optional<Candidate> make_candidate(const MakeEmbedding& make, bool sequence_parallel, bool accumulate_into_grad,
                                        at::ScalarType dtype, const parallel::GroupPtr& tp, Findings& findings);

}  // namespace megatron::internal
