#include "step37/insert/delivery.h"

#include <c10/util/Exception.h>

namespace megatron_cpp::step37::internal {
namespace {

struct Way {
  InsertExchange exchange;
  Part text;
  Part projected;
  Deliver deliver;
  const char* why_not;  ///< if `deliver` is null
};

constexpr auto kFused = InsertExchange::kFused;
constexpr auto kAllGather = InsertExchange::kAllGather;
constexpr auto kColumns = Part::kColumns;
constexpr auto kSummand = Part::kSummand;
constexpr auto kWhole = Part::kWhole;

constexpr char kNeedsASum[] =
    "a hidden-parallel embedding takes a column-sharded or a replicated projector: the summands of a row-sharded one "
    "would need a sum of their own";
constexpr char kFusedOnly[] = "a hidden-parallel embedding goes with the fused exchange only";

constexpr Way kWays[] = {
    {kFused, kSummand, kColumns, deliver_by_sum, nullptr},
    {kFused, kSummand, kSummand, deliver_by_sum, nullptr},
    {kFused, kSummand, kWhole, deliver_by_sum, nullptr},
    {kFused, kColumns, kColumns, deliver_by_columns, nullptr},
    {kFused, kColumns, kSummand, nullptr, kNeedsASum},
    {kFused, kColumns, kWhole, deliver_by_route, nullptr},
    {kAllGather, kSummand, kColumns, deliver_by_gather, nullptr},
    {kAllGather, kSummand, kSummand, deliver_by_gather, nullptr},
    {kAllGather, kSummand, kWhole, deliver_by_gather, nullptr},
    {kAllGather, kColumns, kColumns, nullptr, kFusedOnly},
    {kAllGather, kColumns, kSummand, nullptr, kNeedsASum},
    {kAllGather, kColumns, kWhole, nullptr, kFusedOnly},
};

}  // namespace

Deliver choose_delivery(InsertExchange exchange, Part text, Part projected) {
  for (const auto& way : kWays) {
    if (way.exchange != exchange || way.text != text || way.projected != projected) continue;
    TORCH_CHECK_VALUE(way.deliver != nullptr, way.why_not);
    return way.deliver;
  }
  TORCH_CHECK_VALUE(false, "a word embedding's layout() must be kSummand or kColumns");
}

}  // namespace megatron_cpp::step37::internal
