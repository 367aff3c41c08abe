#include "step37/data/picture_faults.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

#include "parallel/agree.h"
#include "parallel/collectives.h"

namespace megatron_cpp::step37 {

void PictureFaults::note(const std::string& path, Kind kind, const std::string& text) {
  const std::scoped_lock lock(mutex_);
  if (known_.emplace(path, kind).second) news_.push_back({path, kind, text});
}

/// As CBOR: its strings may contain any byte.
std::string PictureFaults::take_news() {
  std::vector<Fault> news;
  {
    const std::scoped_lock lock(mutex_);
    news = std::exchange(news_, {});
  }
  std::string bytes;
  if (news.empty()) return bytes;
  auto list = nlohmann::json::array();
  for (const auto& [path, kind, text] : news) list.push_back({path, static_cast<int>(kind), text});
  nlohmann::json::to_cbor(list, bytes);
  return bytes;
}

void PictureFaults::learn(const std::string& news, bool print) {
  for (const auto& entry : nlohmann::json::from_cbor(news)) {
    const auto path = entry.at(0).get<std::string>();
    const auto kind = static_cast<Kind>(entry.at(1).get<int>());
    const auto text = entry.at(2).get<std::string>();
    {
      const std::scoped_lock lock(mutex_);
      known_.emplace(path, kind);
    }
    if (!told_.emplace(path, kind).second) continue;
    if (kind == Kind::kUnreadable && num_unreadable_++ == 0) first_unreadable_ = text;
    const bool repeated = kind == Kind::kChanged && std::exchange(any_changed_, true);
    if (print && !repeated) std::fputs(fmt::format("warning: {}\n", text).c_str(), stderr);
  }
}

void PictureFaults::share(const parallel::GroupPtr& group) {
  const auto news = take_news();
  const auto sizes = parallel::all_gather(at::full({1}, static_cast<int64_t>(news.size()), at::kLong), group);
  const auto* size = sizes.const_data_ptr<int64_t>();
  for (int rank = 0; rank < group->getSize(); ++rank) {
    if (size[rank] == 0) continue;
    learn(parallel::broadcast_text(news, rank, group), group->getRank() == 0);
  }
}

}  // namespace megatron_cpp::step37
