// The interface of a word embedding into which an insert can write rows before its one collective.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"
#include "parallel/sequence_layout.h"

namespace megatron_cpp {

/// What rank r of t holds of rows [.., H] of an embedding.
enum class Part {
  kSummand,  ///< [.., H]: the row is the sum over the ranks. Rows left out are zero, so that an insert may write to
             ///< them: different columns on each rank, or all on one rank.
  kColumns,  ///< [.., H/t]: columns [r·H/t, (r+1)·H/t) of the row. Rows left out are undefined.
  kWhole,    ///< [.., H]: the whole row, on one rank. For inserted rows only; a word embedding's partial is never this.
};
/// The name until 0.1.
using PartialLayout = Part;

/// How the table [V, H] of one of this library's word embeddings is split over the ranks.
enum class EmbeddingSharding {
  kVocab,   ///< VocabParallelEmbedding
  kHidden,  ///< HiddenParallelEmbedding
};

/// Sizes of the whole table, and what ranks do with the result.
struct ParallelEmbeddingOptions {
  /// A table [vocabulary_size, hidden_size].
  ParallelEmbeddingOptions(int64_t vocabulary_size, int64_t hidden_size)
      : vocabulary_size_(vocabulary_size), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, vocabulary_size);  ///< V
  TORCH_ARG(int64_t, hidden_size);      ///< H
  /// The result is this rank's rows of the sequence.
  TORCH_ARG(bool, sequence_parallel) = false;
  /// Backward adds into the weight's existing gradient, touching the looked-up rows only, and gives autograd none. A
  /// matter of speed, which an embedding of your own may ignore.
  TORCH_ARG(bool, accumulate_into_grad) = false;
  TORCH_ARG(double, init_std) = 0.02;  ///< standard deviation of the initial weights
  /// The row of this id gets no gradient, as in torch.nn.Embedding; -1: none.
  TORCH_ARG(int64_t, padding_idx) = -1;
};

/// A word embedding whose table is split over a tensor-parallel group, and whose look-up has two steps: partial() looks
/// up this rank's part of the table, and reduce() combines the partials of all ranks by one collective. An insert
/// (image features) writes its rows into the partial, or runs its own collective on the partial.
///
/// To put an embedding of your own under an insert, derive from this class, set `weight` and give it to
/// LanguageModelEmbedding. check_parallel_embedding (megatron_cpp/testing/) checks that it does what is written here.
class ParallelEmbedding : public ParallelModule {
 public:
  /// Stores both; a derived class checks that it can shard these sizes over `tp`, and makes `weight`.
  ParallelEmbedding(ParallelEmbeddingOptions options, parallel::GroupPtr tp);

  /// The first step, without communication.
  /// @param input_ids      [B, S] int64, equal on every rank. On the CPU they are checked; on a GPU an id outside
  ///                       [0, V) trips an asynchronous device assertion.
  /// @param rows_left_out  [k] int64 on the CPU, flat numbers s*B + b of rows that the caller fills; they get no
  ///                       gradient. Undefined: none.
  /// @return               [S, B, W] as layout() says, contiguous, a new tensor that the caller may write to. It
  ///                       requires a gradient whenever the weight does, also on a rank that holds none of the ids:
  ///                       otherwise that rank would miss the backward collective, and the others would hang. Its
  ///                       backward adds to an existing gradient of the weight in place (it may be a view of a
  ///                       GradientBuffer). The gradient that it receives is finite everywhere. In rows left out, and
  ///                       in rows that holders() assigns to another rank, it can be nonzero (reduce() gives every rank
  ///                       all rows), and must not count; multiplying by a mask is enough.
  /// @throws c10::ValueError, on every rank alike, naming an id outside [0, V) and its place, or a row to leave out
  ///         that isn't there.
  virtual at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {}) = 0;

  /// What a partial [S, B, W] is of the whole [S, B, H]: kSummand (W = H) or kColumns (W = H/t); the same on every
  /// rank; it never changes.
  virtual Part layout() const = 0;

  /// For each row s*B + b of a kSummand partial, the rank that holds the table row of its id: [S*B], for ids [B, S] on
  /// the CPU; equal on every rank. If only the words are trained, the gradient of a row is sent to that rank only.
  /// Empty, the default: every rank gets the gradient of every text row. Not collective.
  virtual std::vector<int64_t> holders(const at::Tensor& input_ids) const;

  /// The second step: partials to [S, B, H], or with sequence_parallel() this rank's rows of it, [S/t, B, H].
  /// Collective over tp, forward and backward. Throws c10::ValueError if S % t != 0 with sequence_parallel().
  ///
  /// Comm of kSummand: 1 all-reduce of S·B·H elements, backward none; sequence_parallel: 1 reduce-scatter, backward
  /// 1 all-gather. Of kColumns: 1 all-gather, backward none; sequence_parallel: 1 all-to-all of S·B·H/t elements a
  /// rank, and backward the same.
  at::Tensor reduce(const at::Tensor& partial) const;

  /// Which positions of the sequence each rank has in the result of reduce(); without sequence_parallel() a layout of
  /// one rank, since every rank has all. Not collective.
  /// @throws c10::ValueError if S % t != 0 with sequence_parallel().
  parallel::SequenceLayout sequence_layout(int64_t sequence_length) const;

  /// As given to the constructor.
  const ParallelEmbeddingOptions& options() const { return options_; }
  /// The group that the table is split over.
  const parallel::GroupPtr& tp() const { return tp_; }
  /// Whether reduce() gives a rank its rows of the sequence only.
  bool sequence_parallel() const { return options_.sequence_parallel(); }
  int64_t hidden_size() const { return options_.hidden_size(); }  ///< H

  /// reduce(partial(input_ids)).
  at::Tensor forward(const at::Tensor& input_ids) {
    use_parameters();
    return reduce(partial(input_ids));
  }

  /// This rank's part of the table [V, H], a parameter of this module or of one below it. own_parameters() has it, with
  /// GradientDomain::kSharded and segments of the global tensor "weight".
  at::Tensor weight;

 private:
  ParallelEmbeddingOptions options_;
  parallel::GroupPtr tp_;
};

}  // namespace megatron_cpp
