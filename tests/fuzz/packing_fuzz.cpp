// The input is options and samples, as numbers: max_length, pad_to, pad token, policy, then sample after sample: its
// number of tokens and their loss mask.
#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "megatron_cpp/data/packed_batch.h"
#include "tests/fuzz/fuzz.h"

namespace megatron_cpp {
namespace {

struct Input {
  PackingOptions options;
  std::vector<Sample> samples;
};

/// Sides that no configuration has a reason for are left out: padding to 2^40 positions takes the memory it says.
PackingOptions read_options(fuzz::Numbers& numbers) {
  constexpr int64_t kLongestPadding = 4096;
  PackingOptions options;
  options.max_length = numbers.mostly_below(40);
  options.pad_to = numbers.mostly_below(40) % kLongestPadding;
  options.pad_token = numbers.mostly_below(3);
  options.oversize = numbers.below(2) == 0 ? OversizePolicy::kDrop : OversizePolicy::kExtend;
  return options;
}

Input read_input(fuzz::Numbers numbers) {
  Input input{read_options(numbers), {}};
  int64_t token = 1000;  // no two are the same
  while (!numbers.empty()) {
    const auto num_tokens = numbers.below(60);
    Sample sample;
    for (int64_t i = 0; i < num_tokens; ++i) sample.tokens.push_back(token++);
    const auto mask_bits = static_cast<uint64_t>(numbers.any());
    for (int64_t i = 0; i < num_tokens; ++i) sample.loss_mask.push_back(static_cast<uint8_t>(mask_bits >> i & 1));
    if (mask_bits >> 63 != 0) sample.loss_mask.push_back(1);
    input.samples.push_back(sample);
  }
  return input;
}

bool is_valid(const Input& input) {
  if (input.options.max_length <= 0 || input.options.pad_to <= 0) return false;
  for (const auto& sample : input.samples) {
    if (sample.tokens.size() < 2 || sample.loss_mask.size() != sample.tokens.size()) return false;
  }
  return true;
}

int64_t positions(const Sample& sample) { return static_cast<int64_t>(sample.tokens.size()) - 1; }

/// Every sample is in one batch or among the dropped, in order; only those too long are dropped.
void check_members(const Input& input, const PackedSamples& packed) {
  FUZZ_CHECK(packed.batches.size() == packed.samples.size());
  std::vector<int> times(input.samples.size());
  const auto count_in_order = [&](const std::vector<int64_t>& members, int64_t previous) {
    for (const int64_t member : members) {
      FUZZ_CHECK(member > previous, "sample ", member, " comes after ", previous);
      ++times.at(static_cast<size_t>(previous = member));
    }
    return previous;
  };
  int64_t previous = -1;
  for (const auto& members : packed.samples) previous = count_in_order(members, previous);
  count_in_order(packed.dropped, -1);
  for (const int count : times) FUZZ_CHECK(count == 1, "a sample is packed ", count, " times");
  for (const int64_t dropped : packed.dropped) {
    FUZZ_CHECK(positions(input.samples[static_cast<size_t>(dropped)]) > input.options.max_length);
    FUZZ_CHECK(input.options.oversize == OversizePolicy::kDrop);
  }
}

/// No batch is longer than allowed, and none ends before it has to.
void check_lengths(const Input& input, const PackedSamples& packed) {
  int64_t room_before = 0;
  for (const auto& members : packed.samples) {
    int64_t length = 0;
    FUZZ_CHECK(!members.empty());
    for (const int64_t member : members) length += positions(input.samples[static_cast<size_t>(member)]);
    FUZZ_CHECK(length <= input.options.max_length ||
                   (members.size() == 1 && input.options.oversize == OversizePolicy::kExtend),
               length, " positions in a sequence of ", input.options.max_length);
    FUZZ_CHECK(positions(input.samples[static_cast<size_t>(members.front())]) > room_before);
    room_before = std::max<int64_t>(0, input.options.max_length - length);
  }
}

/// One sequence, position by position.
void check_batch(const Input& input, const PackedBatch& batch, const std::vector<int64_t>& members) {
  const int64_t S = batch.tokens.size(1);
  for (const auto& row : {batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.padding_mask}) {
    FUZZ_CHECK(row.sizes() == at::IntArrayRef({1, S}) && row.scalar_type() == at::kLong && row.is_contiguous());
  }
  const auto* tokens = batch.tokens.const_data_ptr<int64_t>();
  const auto* labels = batch.labels.const_data_ptr<int64_t>();
  const auto* loss_mask = batch.loss_mask.const_data_ptr<int64_t>();
  const auto* position_ids = batch.position_ids.const_data_ptr<int64_t>();
  const auto* padding_mask = batch.padding_mask.const_data_ptr<int64_t>();
  const auto* ends = batch.cu_seqlens.const_data_ptr<int32_t>();
  std::vector<int64_t> expected_ends{0};
  int64_t s = 0;
  for (const int64_t member : members) {
    const auto& sample = input.samples[static_cast<size_t>(member)];
    for (size_t i = 0; i + 1 < sample.tokens.size(); ++i, ++s) {
      const bool counts = sample.loss_mask[i + 1] != 0;
      FUZZ_CHECK(tokens[s] == sample.tokens[i] && position_ids[s] == static_cast<int64_t>(i), "position ", s);
      FUZZ_CHECK(labels[s] == (counts ? sample.tokens[i + 1] : kIgnoreIndex), "position ", s);
      FUZZ_CHECK(loss_mask[s] == (counts ? 1 : 0) && padding_mask[s] == 0, "position ", s);
    }
    expected_ends.push_back(s);
  }
  FUZZ_CHECK(S % input.options.pad_to == 0 && S >= s && S - s < input.options.pad_to, S, " positions for ", s);
  if (S > s) expected_ends.push_back(S);
  for (int64_t i = 0; s < S; ++i, ++s) {
    FUZZ_CHECK(tokens[s] == input.options.pad_token && labels[s] == kIgnoreIndex, "position ", s);
    FUZZ_CHECK(loss_mask[s] == 0 && position_ids[s] == i && padding_mask[s] == 1, "position ", s);
  }
  FUZZ_CHECK(std::vector<int64_t>(ends, ends + batch.cu_seqlens.numel()) == expected_ends);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto input = read_input(fuzz::Numbers(data, size));
  PackedSamples packed;
  const auto reason = fuzz::refusal([&] { packed = pack(input.samples, input.options); });
  FUZZ_CHECK(reason.has_value() == !is_valid(input), reason.value_or("not refused"));
  if (reason) return 0;
  check_members(input, packed);
  check_lengths(input, packed);
  for (size_t i = 0; i < packed.batches.size(); ++i) check_batch(input, packed.batches[i], packed.samples[i]);
  return 0;
}

}  // namespace megatron_cpp
