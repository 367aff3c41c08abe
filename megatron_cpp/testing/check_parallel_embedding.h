// Checks that a user's own word embedding does what ParallelEmbedding promises.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// Makes the embedding to be checked, of the sizes in `options`, over `tp`, on the device it is meant for. Called five
/// times on every rank, in the same order. `tp` counts the collectives: the embedding must use this group.
using MakeEmbedding = std::function<std::shared_ptr<ParallelEmbedding>(const ParallelEmbeddingOptions& options,
                                                                       const parallel::GroupPtr& tp)>;

/// Compares embeddings made by `make` with a plain look-up in the whole table [V, H], V = 3t + 1, H = 2t, bit for bit:
/// in float32 with each of sequence_parallel and accumulate_into_grad on and off, and in bfloat16 with both on; ids
/// [2, 3t] and [1, 3t] on the CPU, none, some and all rows left out; two backward passes, with a gradient in all rows.
/// @return  one sentence for each promise of parallel_embedding.h that is broken, the same list on every rank: sizes
/// and
///          options of the first case, what the lowest rank at fault got and what was expected, how many ranks are at
///          fault (all, if it names none). What `make` or the embedding throws on some rank is a fault, too; ranks
///          agree after each step, so that none waits for another that threw.
/// Comm: some hundred collectives of a few hundred bytes; for start-up checks and tests. Collective over tp.
std::vector<std::string> check_parallel_embedding(const MakeEmbedding& make, const parallel::GroupPtr& tp);

}  // namespace megatron_cpp
