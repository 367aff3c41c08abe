#include "megatron_cpp/parameters/box.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace megatron_cpp {
namespace {

int64_t product(const std::vector<int64_t>& sizes, size_t first = 0) {
  return std::accumulate(sizes.begin() + static_cast<std::ptrdiff_t>(first), sizes.end(), int64_t{1},
                         std::multiplies<>());
}

bool holds(const Box& box, const std::vector<int64_t>& element) {
  for (size_t d = 0; d < element.size(); ++d) {
    if (element[d] < box.begin[d] || element[d] - box.begin[d] >= box.length[d]) return false;
  }
  return true;
}

/// The first element in row-major order that no box holds; there must be one. Each of its indices is 0 or an end of a
/// box: otherwise the element before it in that dimension would be missing, too.
std::vector<int64_t> first_missing(const std::vector<int64_t>& shape, const std::vector<Box>& boxes) {
  std::vector<int64_t> element(shape.size());
  const auto next = [&](size_t d) {  // the next candidate in dimension d, or the size
    int64_t smallest = shape[d];
    for (const auto& box : boxes) {
      const int64_t end = box.begin[d] + box.length[d];
      if (end > element[d]) smallest = std::min(smallest, end);
    }
    return smallest;
  };
  while (std::any_of(boxes.begin(), boxes.end(), [&](const Box& box) { return holds(box, element); })) {
    size_t d = shape.size();
    for (; d > 0; --d) {
      element[d - 1] = next(d - 1);
      if (element[d - 1] < shape[d - 1]) break;
      element[d - 1] = 0;
    }
    TORCH_INTERNAL_ASSERT(d > 0);
  }
  return element;
}

}  // namespace

Box Box::whole(std::vector<int64_t> shape) {
  std::vector<int64_t> begin(shape.size(), 0);
  return {std::move(begin), std::move(shape)};
}

Box Box::rows(std::vector<int64_t> shape, int64_t dim, parallel::Range rows) {
  auto box = whole(std::move(shape));
  box.begin.at(static_cast<size_t>(dim)) = rows.begin;
  box.length[static_cast<size_t>(dim)] = rows.length();
  return box;
}

int64_t Box::numel() const { return product(length); }

bool Box::is_in(const std::vector<int64_t>& shape) const {
  if (begin.size() != shape.size() || length.size() != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    // Written so that no sum overflows.
    if (begin[d] < 0 || begin[d] > shape[d] || length[d] < 0 || length[d] > shape[d] - begin[d]) return false;
  }
  return true;
}

std::string Box::text() const {
  std::string result = "[";
  for (size_t d = 0; d < std::min(begin.size(), length.size()); ++d) {
    int64_t end = 0;
    if (__builtin_add_overflow(begin[d], length[d], &end)) end = std::numeric_limits<int64_t>::max();
    result += fmt::format("{}{}:{}", d == 0 ? "" : ", ", begin[d], end);
  }
  return result + "]";
}

std::optional<Box> intersection(const Box& a, const Box& b) {
  TORCH_INTERNAL_ASSERT(a.begin.size() == b.begin.size());
  Box shared = a;
  for (size_t d = 0; d < a.begin.size(); ++d) {
    shared.begin[d] = std::max(a.begin[d], b.begin[d]);
    shared.length[d] = std::min(a.begin[d] + a.length[d], b.begin[d] + b.length[d]) - shared.begin[d];
    if (shared.length[d] <= 0) return std::nullopt;
  }
  return shared;
}

at::Tensor view_of(const at::Tensor& tensor, const Box& box, const Box& part) {
  auto view = tensor;
  for (size_t d = 0; d < box.begin.size(); ++d) {
    if (part.begin[d] == box.begin[d] && part.length[d] == box.length[d]) continue;
    view = view.narrow(static_cast<int64_t>(d), part.begin[d] - box.begin[d], part.length[d]);
  }
  return view;
}

std::vector<Box> boxes_of_range(const Box& box, parallel::Range range) {
  TORCH_INTERNAL_ASSERT(range.begin >= 0 && range.begin <= range.end && range.end <= box.numel());
  std::vector<Box> result;
  int64_t position = range.begin;
  while (position < range.end) {
    // The largest block that begins here: whole rows of dimension d, as many as are left in it.
    Box block = box;
    int64_t rest = position;
    size_t d = 0;
    for (; d < box.length.size(); ++d) {
      const int64_t inner = product(box.length, d + 1);
      const int64_t index = rest / inner;
      rest %= inner;
      block.begin[d] += index;
      const int64_t whole_rows = std::min(box.length[d] - index, (range.end - position) / inner);
      if (rest == 0 && whole_rows > 0) {
        block.length[d] = whole_rows;
        break;
      }
      block.length[d] = 1;
    }
    position += block.numel();
    result.push_back(std::move(block));
  }
  return result;
}

std::vector<int64_t> TensorPart::shape() const {
  return elements ? std::vector<int64_t>{elements->length()} : box.length;
}

int64_t TensorPart::numel() const { return elements ? elements->length() : box.numel(); }

bool TensorPart::is_in(const std::vector<int64_t>& shape) const {
  if (!box.is_in(shape)) return false;
  return !elements || (elements->begin >= 0 && elements->begin <= elements->end && elements->end <= box.numel());
}

std::vector<Box> TensorPart::boxes() const {
  if (numel() == 0) return {};
  return elements ? boxes_of_range(box, *elements) : std::vector<Box>{box};
}

std::string TensorPart::text() const {
  return elements ? fmt::format("{} elements {}:{}", box.text(), elements->begin, elements->end) : box.text();
}

std::optional<CoverFault> find_cover_fault(const std::vector<int64_t>& shape, const std::vector<Box>& boxes) {
  using Kind = CoverFault::Kind;
  for (size_t i = 0; i < boxes.size(); ++i) {
    if (!boxes[i].is_in(shape) || boxes[i].numel() == 0) {
      return CoverFault{.kind = Kind::kOutside, .first = i, .element = {}};
    }
  }
  std::vector<size_t> order(boxes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return boxes[a].begin < boxes[b].begin; });
  std::vector<size_t> open;  // boxes that may share a row of dimension 0 with later boxes
  int64_t held = 0;
  for (const size_t i : order) {
    if (!shape.empty()) {
      std::erase_if(open, [&](size_t j) { return boxes[j].begin[0] + boxes[j].length[0] <= boxes[i].begin[0]; });
    }
    for (const size_t j : open) {
      if (const auto shared = intersection(boxes[j], boxes[i])) {
        return CoverFault{.kind = Kind::kTwice, .first = j, .second = i, .element = shared->begin};
      }
    }
    open.push_back(i);
    held += boxes[i].numel();
  }
  if (held == product(shape)) return std::nullopt;
  return CoverFault{.kind = Kind::kMissing, .element = first_missing(shape, boxes)};
}

}  // namespace megatron_cpp
