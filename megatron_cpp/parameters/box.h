// Rectangular parts of tensors: what a rank holds of a tensor, what a file holds of it, what both share. Pure
// arithmetic.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "parallel/shard.h"

namespace megatron_cpp {

/// A part of a tensor: in each dimension d the indices [begin[d], begin[d] + length[d]). A part without elements has a
/// length of 0 in some dimension. A tensor without dimensions has one part, which has no dimensions and one element.
struct Box {
  std::vector<int64_t> begin;   ///< index of the first element in the whole tensor
  std::vector<int64_t> length;  ///< shape of the part

  /// All of a tensor of this shape.
  static Box whole(std::vector<int64_t> shape);
  /// Rows [rows.begin, rows.end) of dimension `dim`, and all there is in the others.
  static Box rows(std::vector<int64_t> shape, int64_t dim, parallel::Range rows);

  int64_t numel() const;  ///< elements
  /// Whether it lies in a tensor of this shape; it may have no elements. Any numbers may be given: nothing overflows.
  bool is_in(const std::vector<int64_t>& shape) const;
  /// "[0:4, 8:16]", for messages: begin and end of each dimension; an end beyond 63 bits is the largest that fits.
  std::string text() const;
  bool operator==(const Box&) const = default;
};

/// What both boxes hold; nothing if they share no element. Both are of the same tensor.
std::optional<Box> intersection(const Box& a, const Box& b);

/// A view of the elements of `part` in `tensor`, which holds `box`; `part` lies in `box`.
at::Tensor view_of(const at::Tensor& tensor, const Box& box, const Box& part);

/// The elements `range` of a box, numbered row-major in it, as disjoint boxes in the order of the elements. They are at
/// most 2d - 1 boxes in d dimensions.
/// @param range  lies in [0, box.numel()).
std::vector<Box> boxes_of_range(const Box& box, parallel::Range range);

/// A box of a tensor, or a range of its elements.
struct TensorPart {
  Box box;  ///< where the elements lie in the whole tensor
  /// Which elements of the box, numbered row-major in it; all unless given. A tensor that holds the part then has one
  /// dimension.
  std::optional<parallel::Range> elements = std::nullopt;

  /// Shape of a tensor that holds the part.
  std::vector<int64_t> shape() const;
  int64_t numel() const;  ///< elements
  /// Whether it lies in a tensor of this shape. Any numbers may be given: nothing overflows.
  bool is_in(const std::vector<int64_t>& shape) const;
  /// The same elements as boxes, in their order in a tensor that holds the part.
  std::vector<Box> boxes() const;
  /// "[0:4, 8:16]", or "[0:4, 8:16] elements 3:9".
  std::string text() const;
  bool operator==(const TensorPart&) const = default;
};

/// What is wrong with boxes that should hold every element of a tensor once.
struct CoverFault {
  /// The ways to be wrong.
  enum class Kind {
    kOutside,  ///< box `first` isn't inside the tensor, or has no elements
    kTwice,    ///< boxes `first` and `second` both hold `element`
    kMissing,  ///< no box holds `element`
  };
  Kind kind;                     ///< which of them
  size_t first = 0;              ///< number of a box
  size_t second = 0;             ///< number of another
  std::vector<int64_t> element;  ///< index of the first such element
};

/// The first fault found, or nothing if each element of a tensor of this shape is in exactly one of the boxes.
/// @param shape  sizes of at least 0 whose product fits into 63 bits.
std::optional<CoverFault> find_cover_fault(const std::vector<int64_t>& shape, const std::vector<Box>& boxes);

}  // namespace megatron_cpp
