// What others need of a word embedding to put rows of their own into it before its one collective.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parameter_shard.h"
#include "parallel/group.h"

namespace megatron {

/// What a rank's partial embedding [S, B, W] is of the whole [S, B, H], on rank r of t.
enum class PartialLayout {
  kSummand,  ///< W = H: the whole is the sum of the ranks' partials. Rows left out are zero, so that a rank may add to
             ///< them by writing: any columns, or on one rank only.
  kColumns,  ///< W = H/t: columns [r·H/t, (r+1)·H/t) of the whole. Rows left out hold nothing in particular.
};

/// A word embedding whose table is split over a tensor-parallel group, and whose look-up has two steps: what a rank
/// finds in its part of the table, and the one collective that makes of the ranks' findings what each of them owns.
/// Whoever inserts rows (image features) writes them into the partial, or makes an exchange of its own of it.
///
/// To put an embedding of your own under an insert, derive from this class and give it to LanguageModelEmbedding.
class ParallelEmbedding : public ParallelModule {
 public:
  /// The first step, without communication.
  /// @param input_ids      [B, S] int64, equal on every rank. On the CPU they are checked; on a GPU an id outside
  ///                       [0, V) trips an asynchronous device assertion.
  /// @param rows_left_out  [k] int64 on the CPU, flat numbers s*B + b of rows that somebody else fills, which get no
  ///                       gradient; undefined: none.
  /// @return               [S, B, W] as layout() says, contiguous, a tensor of its own that the caller may write to.
  ///                       Its backward reads no row of the gradient that was left out, nor one whose id is another
  ///                       rank's.
  /// @throws c10::ValueError, on every rank alike, naming an id outside [0, V) and its place, or a row to leave out
  ///         that isn't there.
  virtual at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {}) = 0;

  /// The second step: partials to [S, B, H], or with sequence_parallel() this rank's rows of it, [S/t, B, H].
  /// Collective over tp, forward and backward. Throws c10::ValueError if S % t != 0 with sequence_parallel().
  virtual at::Tensor reduce(const at::Tensor& partial) = 0;

  virtual PartialLayout layout() const = 0;

  /// The rank that finds each flat row s*B + b, [S*B], for ids [B, S] on the CPU: who needs the row's gradient. Empty
  /// where every rank has a part of every row (kColumns). Not collective.
  virtual std::vector<int64_t> finders(const at::Tensor& input_ids) const = 0;

  virtual const parallel::GroupPtr& tp() const = 0;
  virtual bool sequence_parallel() const = 0;
  virtual int64_t hidden_size() const = 0;  ///< H

  /// reduce(partial(input_ids)).
  at::Tensor forward(const at::Tensor& input_ids) { return reduce(partial(input_ids)); }

  at::Tensor weight;  ///< this rank's part of the table [V, H]
};

}  // namespace megatron
