#include "megatron_cpp/checkpoint/save_points.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>

namespace megatron_cpp::internal {
namespace {

constexpr const char* kVariable = "MCPP_KILL_AT_SAVE_POINT";

/// Where the process is to be killed.
struct KillPoint {
  std::string name;  ///< empty: nowhere
  int64_t time = 1;
};

KillPoint kill_point_in_environment() {
  const char* text = std::getenv(kVariable);
  if (text == nullptr) return {};
  KillPoint point{text};
  bool is_known = true;
  if (const auto colon = point.name.find(':'); colon != std::string::npos) {
    const auto* end = text + point.name.size();
    const auto [stopped, error] = std::from_chars(text + colon + 1, end, point.time);
    is_known = error == std::errc() && stopped == end && point.time > 0;
    point.name.resize(colon);
  }
  is_known = is_known && std::ranges::find(kSavePoints, point.name) != kSavePoints.end();
  TORCH_CHECK_VALUE(is_known, kVariable, "=", text, " is not name or name:n, with a name of ",
                    fmt::format("{}", fmt::join(kSavePoints, ", ")));
  return point;
}

std::function<void(std::string_view)>& hook() {
  static std::function<void(std::string_view)> instance;
  return instance;
}

}  // namespace

void save_point(std::string_view name) {
  if (hook()) hook()(name);
  static const KillPoint point = kill_point_in_environment();
  static std::atomic<int64_t> times{0};
  if (name == point.name && ++times == point.time) std::raise(SIGKILL);
}

void set_save_point_hook(std::function<void(std::string_view)> new_hook) { hook() = std::move(new_hook); }

}  // namespace megatron_cpp::internal
