// The look-up that vocabulary- and hidden-parallel embeddings share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "parallel/shard.h"

namespace megatron_cpp::internal {

/// Which table rows go to which output rows for ids [B, S], on the table's device.
struct LookUp {
  at::Tensor output_rows;   ///< [k] int64, flat numbers s*B + b, increasing
  at::Tensor table_rows;    ///< [k] int64
  int64_t frozen_row = -1;  ///< the table row that gets no gradient; -1: none
};

/// @throws c10::ValueError unless input_ids is [B, S] int64.
void check_ids(const at::Tensor& input_ids);

/// The look-up of ids on the CPU that are in `own`, without rows_left_out ([n] int64 on the CPU, or undefined).
/// @throws c10::ValueError naming an id outside [0, vocabulary_size) and its place, or a row to leave out that isn't
///         there; or if rows_left_out has another form.
LookUp plan_look_up(const at::Tensor& input_ids, const at::Tensor& rows_left_out, int64_t vocabulary_size,
                    parallel::Range own, const at::Device& device);

/// For ids on a GPU, without copying them to the host: the look-up of all rows but rows_left_out (on the CPU, as
/// above). An id outside `own` gets some other row of this rank's table; these rows are spread over the table, since
/// adding all their zero gradients to one row would be slow. An id outside [0, vocabulary_size) trips an asynchronous
/// device assertion.
LookUp plan_look_up_on_device(const at::Tensor& input_ids, const at::Tensor& rows_left_out, int64_t vocabulary_size,
                              parallel::Range own);

/// [S, B, W] with the rows of `look_up` taken from `table` [.., W]; the others zero if `zero_others`, else undefined.
/// The gradient of the other rows is not read. With `accumulate_into_grad` the looked-up rows are added into the
/// gradient that the table already has, and autograd gets an undefined one.
at::Tensor look_up_rows(const at::Tensor& table, const LookUp& look_up, int64_t S, int64_t B, bool zero_others,
                        bool accumulate_into_grad);

}  // namespace megatron_cpp::internal
