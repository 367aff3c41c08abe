#include "step37/program/embed.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/safetensors.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/process_groups.h"
#include "parallel/recording_backend.h"
#include "parallel/runtime.h"
#include "parallel/shard.h"
#include "step37/insert/image_insert_embedding.h"
#include "step37/program/full_buffer_watch.h"
#include "step37/program/shell_text.h"

namespace megatron_cpp::step37 {
namespace {

constexpr char kWordEmbeddings[] = "word_embeddings.weight";
constexpr char kProjectorWeight[] = "align_projector.weight";
constexpr char kProjectorBias[] = "align_projector.bias";

/// The value that the text of a command-line option names.
template <class Value>
Value choose(const std::string& option, const std::string& given, const std::map<std::string, Value>& known) {
  const auto found = known.find(given);
  if (found != known.end()) return found->second;
  std::string names;
  for (const auto& [name, value] : known) names += (names.empty() ? "" : ", ") + name;
  TORCH_CHECK_VALUE(false, option, " ", given, ": expected one of ", names);
}

/// The tensors of a case, on every rank. Each rank reads its part of the word embedding later.
struct Case {
  at::Tensor input_ids;         // [B, S]
  at::Tensor grad_output;       // [S, B, H]
  at::Tensor projector_weight;  // [H, C]
  at::Tensor projector_bias;    // [H] or undefined
  int64_t V = 0;
  int64_t H = 0;
  std::vector<ImageForInsert> images;
  /// Feature tensors with their names in the file, in order.
  std::vector<std::pair<std::string, at::Tensor>> features;
};

at::Tensor read_shaped(const SafetensorsFile& file, const std::string& name, int64_t dimensions) {
  auto tensor = file.read(name);
  TORCH_CHECK_VALUE(tensor.dim() == dimensions, file.path().string(), ": ", name, " has shape ", tensor.sizes(),
                    ", expected ", dimensions, " dimensions");
  return tensor;
}

void check_floating(const std::filesystem::path& path, const std::string& name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(at::isFloatingType(dtype), path.string(), ": ", name, " has dtype ", dtype,
                    ", expected a floating-point one");
}

at::Tensor read_values(const SafetensorsFile& file, const std::string& name, int64_t dimensions, at::ScalarType dtype) {
  const auto tensor = read_shaped(file, name, dimensions);
  check_floating(file.path(), name, tensor.scalar_type());
  return tensor.to(dtype);
}

/// The names of a group's feature tensors, in order: one tensor, a numbered list, or none (an empty list).
std::vector<std::string> feature_names(const SafetensorsFile& file, const std::string& group) {
  const auto whole = group + ".image_features";
  if (file.contains(whole)) return {whole};
  std::vector<std::string> names;
  const auto next = [&] { return fmt::format("{}.{}", whole, names.size()); };
  while (file.contains(next())) names.push_back(next());
  return names;
}

/// Refuses tensors with unknown names, since a misspelt name would be ignored silently. Names expected.* are for tests.
/// A tensor of a dtype that can't be read gives only a warning, if `warns`: it can't belong to a case.
void check_names(const SafetensorsFile& file, const std::set<std::string>& known, bool warns) {
  for (const auto& [name, entry] : file.entries()) {
    if (known.count(name) > 0 || name.starts_with("expected.")) continue;
    TORCH_CHECK_VALUE(entry.dtype == at::ScalarType::Undefined, file.path().string(), ": a case has no tensor ", name);
    if (warns) {
      TORCH_WARN(file.path().string(), ": tensor ", name, " of dtype ", entry.dtype_name, " is left out");
    }
  }
}

Case read_case(const std::filesystem::path& path, at::ScalarType dtype, bool frozen_features, bool warns) {
  const SafetensorsFile file(path);
  std::set<std::string> known = {"input_ids", "grad_output", kWordEmbeddings, kProjectorWeight, kProjectorBias};
  Case result;
  result.input_ids = read_shaped(file, "input_ids", 2);
  TORCH_CHECK_VALUE(result.input_ids.scalar_type() == at::kLong, path.string(), ": input_ids must be int64, is ",
                    result.input_ids.scalar_type());
  result.grad_output = read_values(file, "grad_output", 3, dtype);
  result.projector_weight = read_values(file, kProjectorWeight, 2, dtype);
  if (file.contains(kProjectorBias)) result.projector_bias = read_values(file, kProjectorBias, 1, dtype);
  TORCH_CHECK_VALUE(file.contains(kWordEmbeddings), path.string(), ": no tensor ", kWordEmbeddings);
  const auto& embedding_shape = file.entries().at(kWordEmbeddings).shape;
  const auto embedding_dtype = file.entries().at(kWordEmbeddings).dtype;
  TORCH_CHECK_VALUE(embedding_dtype != at::ScalarType::Undefined, path.string(), ": ", kWordEmbeddings, " has dtype ",
                    file.entries().at(kWordEmbeddings).dtype_name, ", which is not supported");
  check_floating(path, kWordEmbeddings, embedding_dtype);
  TORCH_CHECK_VALUE(embedding_shape.size() == 2, path.string(), ": ", kWordEmbeddings, " has shape ",
                    at::IntArrayRef(embedding_shape), ", expected [V, H]");
  result.V = embedding_shape[0];
  result.H = embedding_shape[1];
  const int64_t B = result.input_ids.size(0);
  const int64_t S = result.input_ids.size(1);
  TORCH_CHECK_VALUE((result.grad_output.sizes() == std::vector<int64_t>{S, B, result.H}), path.string(),
                    ": grad_output has shape ", result.grad_output.sizes(), ", expected [S, B, H] = [", S, ", ", B,
                    ", ", result.H, "]");
  TORCH_CHECK_VALUE(result.projector_weight.size(0) == result.H, path.string(), ": ", kProjectorWeight, " has shape ",
                    result.projector_weight.sizes(), ", expected [H, C] with H = ", result.H);
  TORCH_CHECK_VALUE(!result.projector_bias.defined() || result.projector_bias.size(0) == result.H, path.string(), ": ",
                    kProjectorBias, " has shape ", result.projector_bias.sizes(), ", expected [", result.H, "]");
  for (int g = 0;; ++g) {
    const auto name = fmt::format("group{}", g);
    const auto names = feature_names(file, name);
    if (!file.contains(name + ".insert_start_token")) {
      TORCH_CHECK_VALUE(names.empty(), path.string(), ": ", names.front(), " without ", name, ".insert_start_token");
      break;
    }
    known.insert(name + ".insert_start_token");
    known.insert(names.begin(), names.end());
    const auto token = file.read(name + ".insert_start_token");
    TORCH_CHECK_VALUE(token.numel() == 1 && token.scalar_type() == at::kLong, path.string(), ": ", name,
                      ".insert_start_token must be [1] int64");
    ImageForInsert group;
    group.insert_start_token = token.item<int64_t>();
    std::vector<at::Tensor> features;
    for (const auto& feature_name : names) {
      auto tensor = file.read(feature_name);
      check_floating(path, feature_name, tensor.scalar_type());
      tensor = tensor.to(dtype).set_requires_grad(!frozen_features);
      features.push_back(tensor);
      result.features.emplace_back(feature_name, tensor);
    }
    const bool whole = names.size() == 1 && names.front() == name + ".image_features";
    group.image_features = whole ? FeatureList(features.front()) : FeatureList(features);
    result.images.push_back(std::move(group));
  }
  check_names(file, known, warns);
  return result;
}

nlohmann::ordered_json to_json(const parallel::CommunicationCount& count) {
  auto collectives = nlohmann::ordered_json::object();
  for (int kind = 0; kind < parallel::kNumCollectiveKinds; ++kind) {
    const auto collective = static_cast<parallel::CollectiveKind>(kind);
    if (count.of(collective) > 0) collectives[std::string(collective_name(collective))] = count.of(collective);
  }
  return {{"collectives", std::move(collectives)}, {"bytes_per_rank", count.bytes_sent}};
}

int64_t largest_over_ranks(int64_t value, const parallel::GroupPtr& group) {
  return parallel::all_reduce(at::full({1}, value, at::kLong), group, parallel::Reduction::kMax).item<int64_t>();
}

/// The steps of a run, in the order in which embed() calls them.
class EmbedRun {
 public:
  EmbedRun(const EmbedArguments& arguments, parallel::GroupPtr plain_tp, at::Device device)
      : arguments_(arguments), plain_tp_(std::move(plain_tp)), recorded_(parallel::record(plain_tp_)), device_(device) {
    dtype_ = choose<at::ScalarType>("--dtype", arguments.dtype, {{"float32", at::kFloat}, {"bfloat16", at::kBFloat16}});
    projector_sharding_ = choose<ProjectorSharding>("--projector-sharding", arguments.projector_sharding,
                                                    {{"column", ProjectorSharding::kColumn},
                                                     {"row", ProjectorSharding::kRow},
                                                     {"replicated", ProjectorSharding::kReplicated}});
    exchange_ = choose<InsertExchange>("--exchange", arguments.exchange,
                                       {{"fused", InsertExchange::kFused}, {"all-gather", InsertExchange::kAllGather}});
    on_mismatch_ = choose<MismatchPolicy>("--on-mismatch", arguments.on_mismatch,
                                          {{"error", MismatchPolicy::kError}, {"truncate", MismatchPolicy::kTruncate}});
    embedding_sharding_ =
        choose<EmbeddingSharding>("--embedding-sharding", arguments.embedding_sharding,
                                  {{"vocab", EmbeddingSharding::kVocab}, {"hidden", EmbeddingSharding::kHidden}});
  }

  void read() {
    case_ = read_case(arguments_.input, dtype_, arguments_.frozen_features, /*warns=*/plain_tp_->getRank() == 0);
  }

  void build() {
    embedding_ = LanguageModelEmbedding(
        ParallelEmbeddingOptions(case_.V, case_.H).sequence_parallel(arguments_.sequence_parallel), recorded_.group,
        embedding_sharding_);
    insert_ = ImageInsertEmbedding(embedding_, ImageInsertEmbeddingOptions(case_.projector_weight.size(1), case_.H)
                                                   .projector_bias(case_.projector_bias.defined())
                                                   .projector_sharding(projector_sharding_)
                                                   .exchange(exchange_)
                                                   .checked(arguments_.checked)
                                                   .on_mismatch(on_mismatch_));
    embedding_->to(device_, dtype_);
    insert_->to(device_, dtype_);
    distribute_features();
  }

  void load_parameters() {
    const at::NoGradGuard no_grad;
    const SafetensorsFile file(arguments_.input);
    for (auto& shard : parameters()) {
      const auto& segment = shard.segments.front();
      if (segment.box.numel() > 0) {
        segment.in_local(shard.parameter).copy_(file.read(segment.name, segment.box));
      }
      const bool frozen = shard.name == kWordEmbeddings ? arguments_.frozen_embedding : arguments_.frozen_projector;
      shard.parameter.set_requires_grad(!frozen);
    }
  }

  void run() {
    const int64_t S = case_.input_ids.size(1);
    const int64_t B = case_.input_ids.size(0);
    parallel::Range rows{0, S};
    if (arguments_.sequence_parallel) {
      rows = parallel::even_shard(S, plain_tp_->getSize(), plain_tp_->getRank(), "sequence length");
    }
    const auto gradient = case_.grad_output.narrow(0, rows.begin, rows.length()).to(device_);
    FullBufferWatch watch(S, B, case_.H, dtype_);
    watch.ignore(gradient);
    const auto start = *recorded_.count;
    output_ = insert_->forward(case_.input_ids, case_.images);
    const auto after_forward = *recorded_.count;
    if (output_.requires_grad()) torch::autograd::backward({output_}, {gradient});
    const auto after_backward = *recorded_.count;
    reduce_partial_gradients();
    const auto after_reduction = *recorded_.count;
    output_ = output_.detach();
    peak_bytes_ = watch.peak_bytes();
    forward_ = after_forward - start;
    backward_ = after_backward - after_forward;
    gradient_reduction_ = after_reduction - after_backward;
  }

  /// Gathers all results to full size. Collective; not included in the counts.
  std::vector<NamedTensor> gather() {
    std::vector<NamedTensor> results;
    results.push_back({"output", arguments_.sequence_parallel ? parallel::all_gather(output_, plain_tp_) : output_});
    if (!arguments_.frozen_embedding) gather_gradients(*embedding_, results);
    if (!arguments_.frozen_projector) gather_gradients(*insert_, results);
    if (!arguments_.frozen_features) {
      for (const auto& [name, tensor] : case_.features) {
        auto gradient = tensor.grad().defined() ? tensor.grad() : at::zeros_like(tensor);
        // In the replicated sharding the gradient of an image is on the rank that projected it.
        if (projector_sharding_ == ProjectorSharding::kReplicated) gradient = parallel::all_reduce(gradient, plain_tp_);
        if (projector_sharding_ == ProjectorSharding::kRow)
          gradient = parallel::all_gather_last_dim(gradient, plain_tp_);
        results.push_back({"grad." + name, gradient});
      }
    }
    return results;
  }

  nlohmann::ordered_json stats() const {
    auto part = [&](parallel::CommunicationCount count) {
      count.bytes_sent = largest_over_ranks(count.bytes_sent, plain_tp_);
      return to_json(count);
    };
    return {{"forward", part(forward_)},
            {"backward", part(backward_)},
            {"gradient_reduction", part(gradient_reduction_)},
            {"peak_full_buffer_bytes", largest_over_ranks(peak_bytes_, plain_tp_)}};
  }

 private:
  std::vector<ParameterShard> parameters() const {
    auto all = parameter_shards(*embedding_);
    for (auto& shard : parameter_shards(*insert_)) all.push_back(std::move(shard));
    return all;
  }

  /// Every rank has read all features; for a row-sharded projector, keeps this rank's channels.
  void distribute_features() {
    if (projector_sharding_ != ProjectorSharding::kRow) return;
    const int64_t C = case_.projector_weight.size(1);
    const auto channels = parallel::even_shard(C, plain_tp_->getSize(), plain_tp_->getRank(), "encoder_output_dim");
    const auto own = [&](const at::Tensor& tensor) {
      if (tensor.size(-1) != C) return tensor;  // the insert refuses it with a better message
      return tensor.detach()
          .narrow(-1, channels.begin, channels.length())
          .contiguous()
          .set_requires_grad(!arguments_.frozen_features);
    };
    auto next = case_.features.begin();
    for (auto& group : case_.images) {
      if (auto* tensor = std::get_if<at::Tensor>(&*group.image_features)) {
        *tensor = next->second = own(*tensor);
        ++next;
        continue;
      }
      for (auto& tensor : std::get<std::vector<at::Tensor>>(*group.image_features)) {
        tensor = next->second = own(tensor);
        ++next;
      }
    }
  }

  void reduce_partial_gradients() {
    for (const auto& shard : parameters()) {
      if (shard.domain != GradientDomain::kReplicatedPartial || !shard.parameter.requires_grad()) continue;
      auto& gradient = shard.parameter.mutable_grad();
      if (!gradient.defined()) gradient = at::zeros_like(shard.parameter);
      parallel::all_reduce_in_place(gradient, recorded_.group);
    }
  }

  void gather_gradients(const torch::nn::Module& module, std::vector<NamedTensor>& results) const {
    for (const auto& shard : parameter_shards(module)) {
      const auto& segment = shard.segments.front();
      auto gradient = shard.parameter.grad().defined() ? shard.parameter.grad() : at::zeros_like(shard.parameter);
      if (shard.domain == GradientDomain::kSharded) {
        gradient = segment.box.length.back() == segment.global_shape.back()
                       ? parallel::all_gather(gradient, plain_tp_).narrow(0, 0, segment.global_shape.front())
                       : parallel::all_gather_last_dim(gradient, plain_tp_);
      }
      results.push_back({"grad." + segment.name, gradient});
    }
  }

  EmbedArguments arguments_;
  parallel::GroupPtr plain_tp_;
  parallel::RecordedGroup recorded_;
  at::Device device_;
  at::ScalarType dtype_ = at::kFloat;
  EmbeddingSharding embedding_sharding_ = EmbeddingSharding::kVocab;
  ProjectorSharding projector_sharding_ = ProjectorSharding::kColumn;
  InsertExchange exchange_ = InsertExchange::kFused;
  MismatchPolicy on_mismatch_ = MismatchPolicy::kError;
  Case case_;
  LanguageModelEmbedding embedding_{nullptr};
  ImageInsertEmbedding insert_{nullptr};
  at::Tensor output_;
  parallel::CommunicationCount forward_;
  parallel::CommunicationCount backward_;
  parallel::CommunicationCount gradient_reduction_;
  int64_t peak_bytes_ = 0;
};

}  // namespace

int embed(parallel::Runtime& runtime, const EmbedArguments& arguments) {
  check_no_tilde("--input", arguments.input);
  check_no_tilde("--output", arguments.output);
  check_no_tilde("--stats", arguments.stats);
  const auto groups = parallel::make_process_groups(runtime, {.tp = runtime.size()});
  EmbedRun run(arguments, groups.tp, runtime.device());
  // The file may be broken on one host only: then all ranks throw.
  parallel::agree_on([&] { run.read(); }, groups.world);
  run.build();
  parallel::agree_on([&] { run.load_parameters(); }, groups.world);
  run.run();
  const auto results = run.gather();
  const auto stats = run.stats();
  parallel::agree_on(
      [&] {
        if (runtime.rank() != 0) return;
        write_safetensors(arguments.output, results);
        if (!arguments.stats.empty()) write_file(arguments.stats, stats.dump(2) + "\n");
      },
      groups.world);
  parallel::destroy_process_groups(runtime, groups);
  return 0;
}

}  // namespace megatron_cpp::step37
