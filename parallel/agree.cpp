#include "parallel/agree.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cstring>

#include "parallel/collectives.h"

namespace megatron_cpp::parallel {

void agree(bool ok, const std::string& message, const GroupPtr& group, int exit_status) {
  const int t = group->getSize();
  const auto verdicts = all_gather(at::full({1}, ok ? 0 : exit_status, at::kInt), group);
  const auto* status = verdicts.const_data_ptr<int>();
  int first_failed = -1;
  int num_failed = 0;
  for (int rank = 0; rank < t; ++rank) {
    if (status[rank] == 0) continue;
    if (first_failed < 0) first_failed = rank;
    ++num_failed;
  }
  if (num_failed == 0) return;
  auto text = broadcast_text(message, first_failed, group);
  if (num_failed < t) {
    const auto more = num_failed > 1 ? fmt::format(", and {} more", num_failed - 1) : "";
    text += fmt::format(" (rank {} of {}{})", first_failed, t, more);
  }
  throw AgreedError(text, status[first_failed]);
}

void check_equal(const std::vector<NamedValue>& values, const GroupPtr& group) {
  const auto num_values = static_cast<int64_t>(values.size());
  auto own = at::empty({1, num_values}, at::kLong);
  for (int64_t i = 0; i < num_values; ++i) {
    own.mutable_data_ptr<int64_t>()[i] = values[static_cast<size_t>(i)].value;
  }
  const auto all = all_gather(own, group);
  const auto* value = all.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < num_values; ++i) {
    for (int64_t rank = 1; rank < all.size(0); ++rank) {
      const int64_t other = value[rank * num_values + i];
      if (other == value[i]) continue;
      throw AgreedError(fmt::format("ranks disagree: {} is {} on rank 0 and {} on rank {} of {}",
                                    values[static_cast<size_t>(i)].name, value[i], other, rank, all.size(0)));
    }
  }
}

void check_equal_texts(const std::vector<NamedText>& texts, const GroupPtr& group) {
  std::string own;
  for (const auto& named : texts) own.append(named.text).append(1, '\0');
  const auto of_rank_0 = broadcast_text(own, 0, group);
  std::string message;
  size_t begin = 0;
  for (const auto& [name, text] : texts) {
    const std::string expected = begin < of_rank_0.size() ? of_rank_0.c_str() + begin : "";
    if (text != expected) {
      message = fmt::format("ranks disagree: {} is '{}' on rank 0 and '{}' elsewhere", name, expected, text);
      break;
    }
    begin += text.size() + 1;
  }
  agree(message.empty(), message, group);
}

std::string broadcast_text(const std::string& text, int root, const GroupPtr& group) {
  auto length = at::full({1}, static_cast<int64_t>(text.size()), at::kLong);
  length = broadcast(length, root, group);
  if (length.item<int64_t>() == 0) return {};
  auto letters = at::empty({length.item<int64_t>()}, at::kByte);
  if (group->getRank() == root) std::memcpy(letters.mutable_data_ptr(), text.data(), text.size());
  letters = broadcast(letters, root, group);
  return {static_cast<const char*>(letters.const_data_ptr()), static_cast<size_t>(letters.numel())};
}

std::vector<std::string> gather_texts(const std::string& text, const GroupPtr& group) {
  const auto lengths = all_gather(at::full({1}, static_cast<int64_t>(text.size()), at::kLong), group);
  const auto longest = lengths.max().item<int64_t>();
  if (longest == 0) return std::vector<std::string>(static_cast<size_t>(lengths.numel()));
  auto letters = at::zeros({1, longest}, at::kByte);
  std::memcpy(letters.mutable_data_ptr(), text.data(), text.size());
  letters = all_gather(letters, group);
  std::vector<std::string> texts;
  for (int64_t rank = 0; rank < lengths.numel(); ++rank) {
    const auto* begin = static_cast<const char*>(letters.const_data_ptr()) + rank * longest;
    texts.emplace_back(begin, static_cast<size_t>(lengths[rank].item<int64_t>()));
  }
  return texts;
}

}  // namespace megatron_cpp::parallel
