// Whether the copies of each parameter are still the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

/// A hash of the bits of a tensor: the sum, modulo 2^64, of its elements' bit patterns, each times an odd number that
/// depends on its place. One element that differs always changes it.
/// @param tensor  contiguous, of any dtype, on any device.
/// @return        a scalar, int64, on that device, without waiting for it. Not collective.
at::Tensor hash_of_bits(const at::Tensor& tensor);

/// Compares hash_of_bits of each parameter, trained or not, over the ranks that hold copies of it: the same part, or
/// the whole of a replicated one (GradientDomain::replicated_over). In exact arithmetic nothing makes them differ;
/// memory that loses a bit does, and so does a program whose ranks don't sum the same gradients.
/// @param parameters  the model's, complete (Trainer::finish_gather), in the same order on every rank.
/// @param when        for the message: "after step 7".
/// Comm: per group of copies 1 all-gather of 8 bytes a parameter, on the CPU, and what agree() sends, over the world.
/// Collective over the world. Waits for the device.
/// @throws AgreedError on every rank, naming the first parameter that differs anywhere and the world ranks that differ.
void check_replicas(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                    const std::string& when);

}  // namespace megatron_cpp
