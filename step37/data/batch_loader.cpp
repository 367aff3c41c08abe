#include "step37/data/batch_loader.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <system_error>
#include <utility>

#include "parallel/activity.h"
#include "parallel/agree.h"
#include "parallel/hash.h"
#include "parallel/shard.h"

namespace megatron_cpp::step37 {
namespace {

using Json = nlohmann::json;

template <class Value>
std::vector<Value> values_of(const at::Tensor& tensor) {
  const auto* data = tensor.const_data_ptr<Value>();
  return {data, data + tensor.numel()};
}

template <class Value>
at::Tensor tensor_of(const Json& json, at::IntArrayRef shape, at::ScalarType dtype) {
  const auto values = json.get<std::vector<Value>>();
  return at::from_blob(const_cast<Value*>(values.data()), shape, dtype).clone();
}

Json to_json(const PicturePack& pack) {
  return {{"tokens", values_of<int64_t>(pack.packed.tokens)},
          {"labels", values_of<int64_t>(pack.packed.labels)},
          {"loss_mask", values_of<int64_t>(pack.packed.loss_mask)},
          {"position_ids", values_of<int64_t>(pack.packed.position_ids)},
          {"cu_seqlens", values_of<int32_t>(pack.packed.cu_seqlens)},
          {"padding_mask", values_of<int64_t>(pack.packed.padding_mask)},
          {"pictures", pack.pictures},
          {"samples", pack.samples}};
}

PicturePack pack_from_json(const Json& json) {
  PicturePack pack;
  const auto S = static_cast<int64_t>(json.at("tokens").size());
  pack.packed.tokens = tensor_of<int64_t>(json.at("tokens"), {1, S}, at::kLong);
  pack.packed.labels = tensor_of<int64_t>(json.at("labels"), {1, S}, at::kLong);
  pack.packed.loss_mask = tensor_of<int64_t>(json.at("loss_mask"), {1, S}, at::kLong);
  pack.packed.position_ids = tensor_of<int64_t>(json.at("position_ids"), {1, S}, at::kLong);
  const auto ends = static_cast<int64_t>(json.at("cu_seqlens").size());
  pack.packed.cu_seqlens = tensor_of<int32_t>(json.at("cu_seqlens"), {ends}, at::kInt);
  pack.packed.padding_mask = tensor_of<int64_t>(json.at("padding_mask"), {1, S}, at::kLong);
  pack.pictures = json.at("pictures").get<std::vector<PictureReference>>();
  pack.samples = json.at("samples").get<std::vector<std::string>>();
  return pack;
}

/// Sends `step` of tensor-parallel rank 0 to every rank of the group.
StepPacks broadcast_step(const StepPacks& step, const parallel::GroupPtr& tp) {
  if (tp->getSize() == 1) return step;
  std::string bytes;
  if (tp->getRank() == 0) {
    auto packs = Json::array();
    for (const auto& pack : step.micro_batches) packs.push_back(to_json(pack));
    auto next = Json::object();
    for (const auto& [name, state] : step.next) {
      next[name] = {state.sampler.epoch, state.sampler.position, state.sampler.num_samples, state.credit};
    }
    const Json json{{"packs", std::move(packs)},
                    {"counts",
                     {step.num_loss_tokens, step.num_tokens, step.num_positions, step.num_samples, step.num_pictures,
                      step.cost, step.largest_cost}},
                    {"next", std::move(next)}};
    Json::to_cbor(json, bytes);
  }
  bytes = parallel::broadcast_text(bytes, 0, tp);
  const auto json = Json::from_cbor(bytes);
  StepPacks result;
  for (const auto& pack : json.at("packs")) result.micro_batches.push_back(pack_from_json(pack));
  const auto& counts = json.at("counts");
  result.num_loss_tokens = counts[0];
  result.num_tokens = counts[1];
  result.num_positions = counts[2];
  result.num_samples = counts[3];
  result.num_pictures = counts[4];
  result.cost = counts[5];
  result.largest_cost = counts[6];
  for (const auto& [name, state] : json.at("next").items()) {
    result.next[name] = {{state[0], state[1], state[2]}, state[3]};
  }
  return result;
}

/// Adds a pack to the counts of a step.
void count_pack(const PicturePack& pack, StepPacks& step) {
  step.num_loss_tokens += pack.packed.loss_mask.sum().item<int64_t>();
  // The padding is a sub-sequence of its own, the last one; without padding there is none.
  const auto ends = values_of<int32_t>(pack.packed.cu_seqlens);
  step.num_tokens += ends[pack.samples.size()];
  step.num_positions += ends.back();
  step.num_samples += static_cast<int64_t>(pack.samples.size());
  step.num_pictures += static_cast<int64_t>(pack.pictures.size());
}

/// Whether some copy of the experts is on ranks of several data-parallel replicas.
bool experts_span_replicas(const parallel::ProcessGroups& groups) {
  return groups.etp_ep && groups.tp->getSize() % groups.etp_ep->getSize() != 0;
}

/// Joins several packs into one.
PicturePack joined(std::vector<PicturePack> packs) {
  if (packs.size() == 1) return std::move(packs.front());
  std::vector<PackedBatch> sequences;
  PicturePack whole;
  for (auto& pack : packs) {
    sequences.push_back(pack.packed);
    std::ranges::move(pack.pictures, std::back_inserter(whole.pictures));
    std::ranges::move(pack.samples, std::back_inserter(whole.samples));
  }
  whole.packed = concatenate(sequences);
  return whole;
}

/// The seed of a data set: equal for the data sets of one name, so that a checkpoint's state goes on.
uint64_t seed_of(uint64_t seed, const std::string& name) { return parallel::stable_hash(name) ^ seed; }

}  // namespace

PictureSample broadcast_sample(const PictureSample& sample, const parallel::GroupPtr& tp) {
  if (tp->getSize() == 1) return sample;
  std::string bytes;
  if (tp->getRank() == 0) Json::to_cbor({sample.tokens, sample.loss_mask, sample.pictures}, bytes);
  const auto json = Json::from_cbor(parallel::broadcast_text(bytes, 0, tp));
  PictureSample result;
  result.tokens = json[0].get<std::vector<int64_t>>();
  result.loss_mask = json[1].get<std::vector<uint8_t>>();
  result.pictures = json[2].get<std::vector<PictureReference>>();
  return result;
}

std::vector<std::vector<size_t>> balanced_packs(const std::vector<int64_t>& costs, int num_replicas) {
  const auto each = parallel::even_shard_size(static_cast<int64_t>(costs.size()), num_replicas,
                                              "the number of packs of a step", "data-parallel");
  const auto ranks = parallel::balanced_assignment(costs, num_replicas, each);
  std::vector<std::vector<size_t>> packs(static_cast<size_t>(num_replicas));
  for (size_t i = 0; i < ranks.size(); ++i) packs[static_cast<size_t>(ranks[i])].push_back(i);
  for (auto& of_rank : packs) {
    std::ranges::stable_sort(of_rank, [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  }
  return packs;
}

BatchLoader::BatchLoader(Options options, std::vector<WeightedDataSet> mix, const parallel::ProcessGroups& groups,
                         const MixState& start, PictureFaults& faults)
    : options_(std::move(options)), mix_(std::move(mix)), groups_(groups), packer_(options_.packing), faults_(faults) {
  const int64_t packs = parallel::even_shard_size(options_.global_batch_size, groups_.dp->getSize(),
                                                  "global batch size", "data-parallel");
  TORCH_CHECK_VALUE(options_.micro_batch_size >= 1 && packs % options_.micro_batch_size == 0, "a data-parallel rank's ",
                    packs, " packs a step are not divisible by micro-batch size ", options_.micro_batch_size);
  parallel::agree_on(
      [&] {
        if (groups_.tp->getRank() != 0) return;
        std::vector<Sampler> samplers;
        std::vector<double> weights;
        std::vector<MixedSampler::State> states;
        for (const auto& [name, samples, weight, order] : mix_) {
          TORCH_CHECK_VALUE(samples->num_samples() > 0, "data set ", name, " has no sample to train on");
          samplers.emplace_back(samples->num_samples(), order, seed_of(options_.seed, name));
          weights.push_back(weight);
          const auto found = start.find(name);
          states.push_back(found == start.end() ? MixedSampler::State{} : found->second);
        }
        sampler_.emplace(std::move(samplers), std::move(weights));
        sampler_->restore(states);
        packed_ = std::async(std::launch::async, [this] { return make_step(); });
      },
      groups_.tp);
  load_ahead();
}

StepPacks BatchLoader::make_step() {
  const parallel::Phase phase("packing samples");
  std::vector<PicturePack> packs;
  StepPacks step;
  int64_t passed_over = 0;  // one behind the other
  int64_t num_samples = 0;
  for (const auto& data_set : mix_) num_samples += data_set.samples->num_samples();
  while (static_cast<int64_t>(packs.size()) < options_.global_batch_size) {
    const auto before = sampler_->state();
    const auto draw = sampler_->next();
    const auto& samples = *mix_[static_cast<size_t>(draw.data_set)].samples;
    const auto result = packer_.add(samples.sample(draw.sample, options_.format), samples.name(draw.sample));
    if (result == SamplePacker::Result::kAdded) {
      passed_over = 0;
    } else if (result == SamplePacker::Result::kFull) {
      packs.push_back(packer_.finish());
      count_pack(packs.back(), step);
      sampler_->restore(before);  // the sample goes into the next pack, which may be in the next step
    } else {
      ++passed_over;
      TORCH_CHECK_VALUE(passed_over <= num_samples, "no sample fits a pack of ", options_.packing.max_length,
                        " positions");
    }
  }
  std::vector<PicturePack> micro_batch;
  std::vector<int64_t> costs(packs.size(), 0);
  if (options_.pack_cost) std::ranges::transform(packs, costs.begin(), options_.pack_cost);
  const auto shares = share_out(costs);
  for (const auto& share : shares) {
    int64_t cost = 0;
    for (const size_t i : share) cost += costs[i];
    step.cost += cost;
    step.largest_cost = std::max(step.largest_cost, cost);
  }
  for (const size_t i : shares[static_cast<size_t>(groups_.dp->getRank())]) {
    micro_batch.push_back(std::move(packs[i]));
    if (static_cast<int64_t>(micro_batch.size()) < options_.micro_batch_size) continue;
    step.micro_batches.push_back(joined(std::exchange(micro_batch, {})));
  }
  const auto states = sampler_->state();
  for (size_t i = 0; i < mix_.size(); ++i) step.next[mix_[i].name] = states[i];
  return step;
}

/// The packs of each data-parallel rank, by index.
std::vector<std::vector<size_t>> BatchLoader::share_out(const std::vector<int64_t>& costs) const {
  const int replicas = groups_.dp->getSize();
  if (options_.pack_cost && options_.balance && replicas > 1) return balanced_packs(costs, replicas);
  std::vector<std::vector<size_t>> packs(static_cast<size_t>(replicas));
  for (int rank = 0; rank < replicas; ++rank) {
    const auto range =
        parallel::even_shard(options_.global_batch_size, replicas, rank, "global batch size", "data-parallel");
    auto& own = packs[static_cast<size_t>(rank)];
    own.resize(static_cast<size_t>(range.length()));
    std::iota(own.begin(), own.end(), static_cast<size_t>(range.begin));
  }
  return packs;
}

void BatchLoader::load_ahead() {
  StepPacks step;
  parallel::agree_on(
      [&] {
        if (groups_.tp->getRank() != 0) return;
        step = parallel::in_phase("waiting for samples", [&] { return packed_.get(); });
        packed_ = std::async(std::launch::async, [this] { return make_step(); });
      },
      groups_.tp);
  step = broadcast_step(step, groups_.tp);
  loaded_ = std::async(std::launch::async, [step = std::move(step), this]() mutable {
    const parallel::Phase phase("decoding pictures");
    LoadedStep loaded;
    for (const auto& pack : step.micro_batches) {
      auto images = load_pictures(pack.pictures, options_.format, options_.mm_encoder_tp_mode, groups_.tp, faults_,
                                  options_.num_decoding_threads);
      if (options_.device.is_cuda()) {
        for_each_tensor(images, [](at::Tensor& tensor) { tensor = tensor.pin_memory(); });
      }
      loaded.images.push_back(std::move(images));
    }
    loaded.packs = std::move(step);
    return loaded;
  });
}

BatchLoader::LoadedStep BatchLoader::next() {
  auto loaded = parallel::in_phase("waiting for pictures", [&] { return loaded_.get(); });
  faults_.share(groups_.world);
  if (faults_.any_changed() && groups_.world->getRank() == 0) {
    std::error_code ignored;
    for (const auto& index : options_.indices) std::filesystem::remove(index, ignored);
  }
  TORCH_CHECK_VALUE(faults_.num_unreadable() <= options_.max_unreadable, faults_.num_unreadable(),
                    " more pictures can't be read, which is more than data.max_unreadable allows (first: ",
                    faults_.first_unreadable(), ")");
  load_ahead();
  return loaded;
}

StepPacks pack_once(const std::vector<WeightedDataSet>& sets, const std::optional<int64_t>& max_packs,
                    const BatchLoaderOptions& options, const parallel::ProcessGroups& groups) {
  StepPacks step;
  if (groups.tp->getRank() == 0) {
    std::vector<PicturePack> packs;
    const auto most = static_cast<size_t>(max_packs.value_or(std::numeric_limits<int64_t>::max()));
    PicturePacker packer(options.packing);
    for (const auto& data_set : sets) {
      for (int64_t i = 0; i < data_set.samples->num_samples() && packs.size() < most; ++i) {
        const auto sample = data_set.samples->sample(i, options.format);
        const auto name = data_set.samples->name(i);
        if (packer.add(sample, name) != SamplePacker::Result::kFull) continue;
        packs.push_back(packer.finish());
        packer.add(sample, name);
      }
    }
    if (!packer.empty() && packs.size() < most) packs.push_back(packer.finish());
    const auto replicas = static_cast<size_t>(groups.dp->getSize());
    for (size_t i = 0; i < packs.size(); ++i) {
      count_pack(packs[i], step);
      if (i % replicas == static_cast<size_t>(groups.dp->getRank())) step.micro_batches.push_back(packs[i]);
    }
    // Ranks that share out experts with other replicas run every micro-batch together with them.
    const auto rounds = (packs.size() + replicas - 1) / replicas;
    if (experts_span_replicas(groups) && step.micro_batches.size() < rounds) {
      auto idle = packs.front();
      idle.packed.labels = at::full_like(idle.packed.labels, kIgnoreIndex);
      step.micro_batches.push_back(std::move(idle));
    }
  }
  return broadcast_step(step, groups.tp);
}

}  // namespace megatron_cpp::step37
