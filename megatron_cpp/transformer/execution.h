// How a model runs, and over which ranks.
#pragma once

#include <cstdint>
#include <utility>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

/// Parts of a decoder whose intermediate results are not kept for the backward pass but computed again (recompute()).
struct RecomputedParts {
  bool layers = false;          ///< each layer as a whole, those of multi-token prediction too: only its input is kept
  bool core_attention = false;  ///< the softmax over keys and what it weighs, between the two linear maps
  bool mlp = false;             ///< each dense feed-forward and each shared expert: only its input is kept
  bool experts = false;         ///< what experts are sent, compute and send back; each token's choice of them is kept
  bool norms = false;           ///< the outputs of each layer's two norms of hidden states: only their inputs are kept

  bool operator==(const RecomputedParts&) const = default;  ///< every part alike
};

/// How a decoder runs. Results differ in rounding only. The same on every rank.
struct TransformerExecution {
  bool sequence_parallel = false;     ///< between tensor-parallel layers a rank holds only its rows of the sequence
  bool accumulate_into_grad = false;  ///< backward adds into existing gradients, see the layers' options
  EmbeddingSharding embedding_sharding = EmbeddingSharding::kVocab;  ///< of the word embedding, not of the output layer
  RecomputedParts recomputed =
      {};                  ///< parts within a recomputed layer are recomputed once more: choose one or the other
  int64_t loss_chunk = 0;  ///< positions of which a loss makes the logits at a time; 0: all (linear_cross_entropy)

  /// The options of a layer (ColumnParallelLinearOptions, ParallelEmbeddingOptions, ...) with the first two of these.
  template <class Options>
  Options apply_to(Options options) const {
    return options.sequence_parallel(sequence_parallel).accumulate_into_grad(accumulate_into_grad);
  }
};

/// The groups that the parts of a model are split over. Composites (block, model) take this struct and give each layer
/// the one group that it needs.
struct ModelGroups {
  /// Tensor (and sequence) parallelism alone.
  ModelGroups(parallel::GroupPtr tensor_parallel)
      : tp(tensor_parallel), etp(std::move(tensor_parallel)) {}  // NOLINT(google-explicit-constructor)
  /// The groups of a program; the model is split over its tp, its experts over ep and etp.
  ModelGroups(const parallel::ProcessGroups& groups)
      : tp(groups.tp), ep(groups.ep), etp(groups.etp), etp_ep(groups.etp_ep) {}  // NOLINT(google-explicit-constructor)

  parallel::GroupPtr tp;      ///< tensor and sequence parallel
  parallel::GroupPtr ep;      ///< expert parallel; null: every rank has all experts, or its share of each
  parallel::GroupPtr etp;     ///< tensor parallel within each expert
  parallel::GroupPtr etp_ep;  ///< both together; null if ep is

  int ep_size() const { return ep ? ep->getSize() : 1; }  ///< ranks that share the experts out
  int ep_rank() const { return ep ? ep->getRank() : 0; }  ///< this rank among them
};

}  // namespace megatron_cpp
