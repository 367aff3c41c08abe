// Boxes against sets of elements, element by element.
#include "megatron_cpp/parameters/box.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

namespace megatron_cpp {
namespace {

using Shape = std::vector<int64_t>;

/// Each element's number in its tensor, row-major.
at::Tensor numbered(const Shape& shape) { return at::arange(at::zeros(shape).numel()).view(shape); }

/// The elements that a box holds, by their number in the tensor, in the box's own order.
std::vector<int64_t> elements(const Shape& shape, const Box& box) {
  const auto flat = view_of(numbered(shape), Box::whole(shape), box).contiguous().view({-1});
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

int64_t in_range(int64_t begin, int64_t end) { return *rc::gen::inRange<int64_t>(begin, end); }

Shape any_shape() {
  return *rc::gen::container<Shape>(*rc::gen::inRange<size_t>(0, 4), rc::gen::inRange<int64_t>(1, 6));
}

Box any_box(const Shape& shape) {
  Box box = Box::whole(shape);
  for (size_t d = 0; d < shape.size(); ++d) {
    box.begin[d] = in_range(0, shape[d]);
    box.length[d] = in_range(1, shape[d] - box.begin[d] + 1);
  }
  return box;
}

/// Cuts a box into pieces, again and again.
std::vector<Box> any_cover(const Shape& shape) {
  std::vector<Box> boxes = {Box::whole(shape)};
  for (int64_t cuts = shape.empty() ? 0 : in_range(0, 6); cuts > 0; --cuts) {
    auto& box = boxes[static_cast<size_t>(in_range(0, static_cast<int64_t>(boxes.size())))];
    const auto d = static_cast<size_t>(in_range(0, static_cast<int64_t>(shape.size())));
    if (box.length[d] < 2) continue;
    const int64_t cut = in_range(1, box.length[d]);
    Box rest = box;
    rest.begin[d] += cut;
    rest.length[d] -= cut;
    box.length[d] = cut;
    boxes.push_back(rest);
  }
  return boxes;
}

}  // namespace

RC_GTEST_PROP(Box, IntersectionHoldsWhatBothHold, ()) {
  const auto shape = any_shape();
  const auto a = any_box(shape);
  const auto b = any_box(shape);
  std::map<int64_t, int> count;
  for (const auto& box : {a, b}) {
    for (const int64_t element : elements(shape, box)) ++count[element];
  }
  std::vector<int64_t> both;
  for (const auto& [element, times] : count) {
    if (times == 2) both.push_back(element);
  }
  const auto shared = intersection(a, b);
  RC_ASSERT(shared.has_value() == !both.empty());
  if (shared) RC_ASSERT(elements(shape, *shared) == both);
}

RC_GTEST_PROP(Box, RangesOfABoxAreFewBoxesInOrder, ()) {
  const auto shape = any_shape();
  const auto box = any_box(shape);
  const auto all = elements(shape, box);
  const int64_t begin = in_range(0, box.numel() + 1);
  const int64_t end = in_range(begin, box.numel() + 1);
  std::vector<int64_t> found;
  const auto parts = boxes_of_range(box, {begin, end});
  for (const auto& part : parts) {
    const auto more = elements(shape, part);
    found.insert(found.end(), more.begin(), more.end());
  }
  RC_ASSERT(found == (std::vector<int64_t>{all.begin() + begin, all.begin() + end}));
  RC_ASSERT(parts.size() <= std::max<size_t>(1, 2 * shape.size() - (shape.empty() ? 0 : 1)));
}

RC_GTEST_PROP(Box, CoverIsWhatHoldsEveryElementOnce, ()) {
  const auto shape = any_shape();
  auto boxes = any_cover(shape);
  RC_ASSERT(!find_cover_fault(shape, boxes).has_value());
  // Spoilt: one left out, given twice, or another one in its place.
  const auto chosen = static_cast<size_t>(in_range(0, static_cast<int64_t>(boxes.size())));
  switch (in_range(0, 3)) {
    case 0:
      boxes.erase(boxes.begin() + static_cast<std::ptrdiff_t>(chosen));
      break;
    case 1:
      boxes.push_back(boxes[chosen]);
      break;
    default:
      boxes[chosen] = any_box(shape);
  }
  std::map<int64_t, int> times;
  for (const auto& box : boxes) {
    for (const int64_t element : elements(shape, box)) ++times[element];
  }
  const auto numbers = numbered(shape);
  const auto number_of = [&](const Shape& element) {
    auto view = numbers;
    for (const int64_t index : element) view = view[index];
    return view.item<int64_t>();
  };
  const auto fault = find_cover_fault(shape, boxes);
  bool is_cover = static_cast<int64_t>(times.size()) == numbers.numel();
  for (const auto& [element, count] : times) is_cover = is_cover && count == 1;
  RC_ASSERT(fault.has_value() == !is_cover);
  if (!fault) return;
  const int64_t element = number_of(fault->element);
  if (fault->kind == CoverFault::Kind::kTwice) {
    const auto in_first = elements(shape, boxes[fault->first]);
    const auto in_second = elements(shape, boxes[fault->second]);
    RC_ASSERT(fault->first != fault->second);
    RC_ASSERT(std::count(in_first.begin(), in_first.end(), element) == 1);
    RC_ASSERT(std::count(in_second.begin(), in_second.end(), element) == 1);
  } else {
    RC_ASSERT(fault->kind == CoverFault::Kind::kMissing);
    for (int64_t before = 0; before < element; ++before) RC_ASSERT(times.count(before) == 1U);
    RC_ASSERT(times.count(element) == 0U);
  }
}

TEST(Box, IsOutsideWhateverAFileSays) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const std::vector<Box> bad = {{{0}, {0}},     {{-1}, {1}},    {{0}, {5}},         {{4}, {1}},
                                {{kMost}, {1}}, {{1}, {kMost}}, {{kMost}, {kMost}}, {{0, 0}, {4, 1}},
                                {{}, {}},       {{0}, {}},      {{0}, {-4}}};
  for (const auto& box : bad) {
    const auto fault = find_cover_fault({4}, {{{0}, {4}}, box});
    ASSERT_TRUE(fault.has_value());
    EXPECT_EQ(fault->kind, CoverFault::Kind::kOutside);
    EXPECT_EQ(fault->first, 1U);
    EXPECT_TRUE(box.text().starts_with("["));  // whatever it is made of
  }
}

TEST(Box, OfTensorsWithoutElementsAndWithoutDimensions) {
  EXPECT_FALSE(find_cover_fault({0, 3}, {}).has_value());
  EXPECT_FALSE(find_cover_fault({}, {Box{}}).has_value());
  EXPECT_EQ(find_cover_fault({}, {})->kind, CoverFault::Kind::kMissing);
  EXPECT_EQ(find_cover_fault({}, {Box{}, Box{}})->kind, CoverFault::Kind::kTwice);
  EXPECT_EQ(Box{}.numel(), 1);
  EXPECT_EQ(Box::rows({4, 6}, 1, {2, 5}), (Box{{0, 2}, {4, 3}}));
  EXPECT_EQ(Box::rows({4, 6}, 1, {2, 5}).text(), "[0:4, 2:5]");
}

}  // namespace megatron_cpp
