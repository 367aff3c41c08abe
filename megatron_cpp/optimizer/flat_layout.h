// Where parameters lie in a flat buffer, and which part of it each rank of a group owns. Pure arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "parallel/shard.h"

namespace megatron_cpp {

/// Parameters one after the other in a flat buffer, and the buffer in equal slices, one for each rank of the group that
/// its gradients are summed over. A parameter may lie in several slices; the last slices may hold few elements or none.
struct FlatLayout {
  /// Parameters begin at multiples of so many elements. What a slice holds of one then begins at a multiple of a vector
  /// register in it, too: the optimizer's kernel on CPUs rounds the elements behind the last whole register in another
  /// way, and these are the same ones as without slices. On a GPU it loads 16 bytes at a time if all begins at
  /// multiples of 16 bytes, and element by element otherwise.
  static constexpr int64_t kParameterMultiple = 16;
  /// The length of a slice is a multiple of so many elements: 128 bytes even in bfloat16, as NCCL likes it.
  static constexpr int64_t kSliceMultiple = 64;

  std::vector<parallel::Range> parameters;  ///< elements of the buffer that each parameter takes
  int64_t numel = 0;                        ///< elements up to the last parameter's end, with the padding between them
  int64_t slice_numel = 0;                  ///< elements of a slice
  int num_slices = 1;                       ///< ranks of the group

  /// @param numels  elements of each parameter, in the order in which they lie; 0 is allowed.
  FlatLayout(const std::vector<int64_t>& numels, int ranks);

  /// Elements of the buffer that rank `rank` owns; the last may end behind `numel`.
  parallel::Range slice(int rank) const { return {rank * slice_numel, (rank + 1) * slice_numel}; }
  /// The elements of a parameter, numbered row-major in it, that lie in the slice of `rank`. Without elements if none
  /// do.
  parallel::Range elements_of(size_t parameter, int rank) const;
  /// Elements of all slices: at least `numel`.
  int64_t numel_of_slices() const { return num_slices * slice_numel; }

  /// Elements that a parameter takes in a buffer, with the padding behind it.
  static int64_t padded_numel(int64_t numel);
  /// Elements of a slice of a buffer of `numel` elements for `ranks` ranks.
  static int64_t slice_numel_of(int64_t numel, int64_t ranks);
};

}  // namespace megatron_cpp
