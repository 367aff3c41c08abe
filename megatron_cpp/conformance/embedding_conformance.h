// A check of word embeddings that users bring themselves: does one keep what ParallelEmbedding promises?
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"

namespace megatron {

/// Makes the embedding to be checked, of the sizes in `options`, over `tp`, on the device it is meant for. Called once
/// a setting on every rank, in the same order. `tp` counts what is sent through it: the embedding must keep this group.
using MakeEmbedding = std::function<std::shared_ptr<ParallelEmbedding>(const ParallelEmbeddingOptions& options,
                                                                       const parallel::GroupPtr& tp)>;

/// Compares embeddings made by `make` with a plain look-up in the whole table [V, H], V = 3t + 1, H = 2t, both filled
/// by initialize_parameters with the same seed; bit for bit, in float32 and bfloat16, with and without
/// sequence_parallel and accumulate_into_grad, for [1, 4t] and [2, 4t] ids on the CPU (all there are; repeated ones;
/// one rank's alone), none, some and all rows left out:
///
///   - options(), tp(), layout() (equal on every rank), `weight` a trainable parameter of the module or of one below it
///   - own_parameters(): over the ranks, the segments of "weight" cover every element of [V, H] exactly once
///   - partial(): shape [S, B, H] or [S, B, H/t] as layout() says, dtype and device of the weight, contiguous, memory
///     of its own; the rank's part of the truth, and for kSummand zero elsewhere and in rows left out; a gradient
///     function even where no row was found, so that no rank misses a collective of backward, and none if the weight is
///     frozen
///   - reduce(partial()): the truth, [S, B, H] or the rank's [S/t, B, H]
///   - finders(): empty, or S*B ranks in [0, t), equal on every rank; for kSummand the rank whose partial has the row
///   - the backward pass of partial(): the truth's gradient in the rank's segments and zero in padding, whatever stands
///     in rows of the gradient that were left out or (kSummand) that others find; a second pass adds to it, in place.
///     That is asked of every embedding, whether or not it has a use for accumulate_into_grad.
///   - an id V or -1, or a row S*B to leave out: c10::ValueError on every rank, with the number in its text
///   - nothing is sent but by reduce()
///
/// @return  one sentence a violation, the same list on every rank; empty if there is none. A violation that shows in
///          several cases is named once: the sizes and options of the first of them, the lowest rank at fault, what it
///          got and what was expected, and of how many ranks and cases it is true.
/// What `make` or the embedding throws on some rank is a violation, too; ranks agree on each before they go on, so that
/// none waits for another. (Only an embedding that communicates by itself, and not on every rank, can hang it.)
///
/// Comm: some thousand collectives of a few hundred bytes; for start-up checks and tests. Collective over tp.
std::vector<std::string> check_parallel_embedding(const MakeEmbedding& make, const parallel::GroupPtr& tp);

}  // namespace megatron
