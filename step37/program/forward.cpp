#include "step37/program/forward.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <span>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "step37/checkpoint_names.h"
#include "step37/program/shell_text.h"
#include "step37/published_checkpoint.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {
namespace {

constexpr int64_t kIgnoredLabel = -100;

at::ScalarType dtype_of(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "float64") return at::kDouble;
  if (name == "bfloat16") return at::kBFloat16;
  TORCH_CHECK_VALUE(false, "--dtype ", name, ": expected float32, float64 or bfloat16");
}

/// The input file's tensors, on every rank.
struct ForwardInput {
  at::Tensor input_ids;                 ///< [B, S]
  at::Tensor labels;                    ///< [B, S], or undefined
  at::Tensor images;                    ///< [N, 3, h, w], or undefined
  at::Tensor patches;                   ///< [P, 3, h, w], or undefined
  std::vector<int64_t> patches_before;  ///< of each image: how many patches come before it
};

at::Tensor read_integers(const SafetensorsFile& file, const std::string& name, int64_t dimensions) {
  const auto tensor = file.read(name);
  TORCH_CHECK_VALUE(tensor.dim() == dimensions && at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false),
                    file.path().string(), ": ", name, " is ", tensor.sizes(), " ", tensor.scalar_type(),
                    ", expected integers in ", dimensions, dimensions == 1 ? " dimension" : " dimensions");
  return tensor.to(at::kLong);
}

at::Tensor read_pixels(const SafetensorsFile& file, const std::string& name) {
  const auto tensor = file.read(name);
  TORCH_CHECK_VALUE(tensor.dim() == 4 && tensor.size(1) == 3 && tensor.is_floating_point(), file.path().string(), ": ",
                    name, " is ", tensor.sizes(), " ", tensor.scalar_type(),
                    ", expected floating point [N, 3, height, width]");
  return tensor;
}

ForwardInput read_input(const std::filesystem::path& path, const PublishedConfig& config) {
  const SafetensorsFile file(path);
  ForwardInput input;
  input.input_ids = read_integers(file, "input_ids", 2);
  TORCH_CHECK_VALUE(input.input_ids.numel() > 0, path.string(), ": input_ids ", input.input_ids.sizes(), " is empty");
  TORCH_CHECK_VALUE(input.input_ids.size(1) <= config.max_position_embeddings, path.string(), ": input_ids has ",
                    input.input_ids.size(1), " positions, the model allows ", config.max_position_embeddings);
  if (file.contains("labels")) {
    input.labels = read_integers(file, "labels", 2);
    TORCH_CHECK_VALUE(input.labels.sizes() == input.input_ids.sizes(), path.string(), ": labels are ",
                      input.labels.sizes(), ", input_ids ", input.input_ids.sizes());
  }
  if (file.contains("pixel_values")) input.images = read_pixels(file, "pixel_values");
  const int64_t num_images = input.images.defined() ? input.images.size(0) : 0;
  input.patches_before.assign(static_cast<size_t>(num_images), 0);
  if (!file.contains("pixel_values_local")) return input;
  input.patches = read_pixels(file, "pixel_values_local");
  const auto counts = read_integers(file, "num_local_patches", 1);
  const bool is_valid = counts.numel() == num_images && (num_images == 0 || counts.min().item<int64_t>() >= 0) &&
                        counts.sum().item<int64_t>() == input.patches.size(0);
  TORCH_CHECK_VALUE(is_valid, path.string(), ": num_local_patches ", counts.sizes(), " with a sum of ",
                    counts.sum().item<int64_t>(), " does not fit ", num_images, " images and ", input.patches.size(0),
                    " patches");
  const auto* count = counts.const_data_ptr<int64_t>();
  input.patches_before.assign(count, count + num_images);
  return input;
}

/// The places s of each batch row b whose id is `placeholder`, as b*S + s.
std::vector<int64_t> placeholders_in(const at::Tensor& input_ids, int64_t placeholder) {
  const auto found = input_ids.reshape({-1}).eq(placeholder).nonzero().reshape({-1});
  return {found.const_data_ptr<int64_t>(), found.const_data_ptr<int64_t>() + found.numel()};
}

/// Where features go: patches are the images 0 .. P-1 of the plan, images the others.
class Placement {
 public:
  Placement(const ForwardInput& input, const PublishedConfig& config)
      : ids_(input.input_ids.contiguous()), placeholder_(config.image_token_id) {
    const auto add = [&](const at::Tensor& pixels, std::vector<int64_t>& rows) {
      if (!pixels.defined()) return;
      rows.assign(static_cast<size_t>(pixels.size(0)), config.vision.feature_rows(pixels.size(2), pixels.size(3)));
    };
    add(input.patches, patch_rows_);
    add(input.images, image_rows_);
    places_ = placeholders_in(ids_, placeholder_);
    int64_t num_rows = 0;
    for (const auto* rows : {&patch_rows_, &image_rows_}) {
      for (const int64_t count : *rows) num_rows += count;
    }
    TORCH_CHECK_VALUE(static_cast<int64_t>(places_.size()) == num_rows, "input_ids has ", places_.size(),
                      " placeholders (id ", placeholder_, "), the pictures have ", num_rows, " rows of features");
  }

  /// b*S + s of each placeholder, in order.
  const std::vector<int64_t>& places() const { return places_; }

  /// Each picture after its start token.
  InsertPlan after_start_tokens(int64_t patch_start, int64_t image_start) const {
    const std::vector<InsertGroup> groups{{patch_start, patch_rows_}, {image_start, image_rows_}};
    auto plan = InsertPlan::build({ids_.const_data_ptr<int64_t>(), static_cast<size_t>(ids_.numel())}, B(), S(), groups,
                                  MismatchPolicy::kError);
    std::vector<int64_t> overwritten;
    for (const int64_t row : plan.embedding_rows()) overwritten.push_back(row % B() * S() + row / B());
    std::sort(overwritten.begin(), overwritten.end());
    const auto [wrong, place] = std::mismatch(overwritten.begin(), overwritten.end(), places_.begin(), places_.end());
    if (wrong == overwritten.end()) return plan;
    const bool is_other_token = place == places_.end() || *wrong < *place;
    const int64_t at = is_other_token ? *wrong : *place;
    TORCH_CHECK_VALUE(false, "input_ids: batch row ", at / S(), ", position ", at % S(), " has id ",
                      ids_.const_data_ptr<int64_t>()[at], ": ",
                      is_other_token ? "expected a placeholder there, in the rows that follow a start token"
                                     : "a placeholder that follows no start token");
  }

  /// The k-th placeholder takes the k-th row, each image's patches before the image.
  InsertPlan by_placeholders(const std::vector<int64_t>& patches_before) const {
    std::vector<int64_t> order;  // numbers of pictures in the plan
    int64_t patch = 0;
    const auto num_patches = static_cast<int64_t>(patch_rows_.size());
    for (size_t image = 0; image < image_rows_.size(); ++image) {
      for (int64_t i = 0; i < patches_before[image]; ++i) order.push_back(patch++);
      order.push_back(num_patches + static_cast<int64_t>(image));
    }
    auto rows = patch_rows_;
    rows.insert(rows.end(), image_rows_.begin(), image_rows_.end());
    std::vector<int64_t> begins{0};
    for (const int64_t count : rows) begins.push_back(begins.back() + count);
    std::vector<InsertRun> runs;
    auto place = places_.begin();
    for (const int64_t picture : order) {
      for (int64_t row = begins[static_cast<size_t>(picture)]; row < begins[static_cast<size_t>(picture) + 1]; ++row) {
        runs.push_back({picture, row, *place / S(), *place % S(), 1});
        ++place;
      }
    }
    return InsertPlan::from_runs(std::move(runs), B(), S(), rows);
  }

 private:
  int64_t B() const { return ids_.size(0); }
  int64_t S() const { return ids_.size(1); }

  at::Tensor ids_;
  int64_t placeholder_;
  std::vector<int64_t> patch_rows_;
  std::vector<int64_t> image_rows_;
  std::vector<int64_t> places_;
};

/// The steps of a run, in the order in which forward() calls them.
class ForwardRun {
 public:
  ForwardRun(const ForwardArguments& arguments, const parallel::ProcessGroups& groups, at::Device device)
      : arguments_(arguments), groups_(groups), device_(device), dtype_(dtype_of(arguments.dtype)) {
    TORCH_CHECK_VALUE(arguments.dump.empty() || arguments.dump == "layers", "--dump ", arguments.dump,
                      ": expected layers");
  }

  void read() {
    checkpoint_.emplace(arguments_.model);
    TORCH_CHECK_VALUE(checkpoint_->has_weights(), arguments_.model.string(),
                      " has neither model.safetensors nor model.safetensors.index.json");
    input_ = read_input(arguments_.input, checkpoint_->config());
    TORCH_CHECK_VALUE(!arguments_.gradients || input_.labels.defined(), arguments_.input.string(),
                      ": --gradients needs labels");
    make_batch();
  }

  void build() {
    auto config = step37_config(checkpoint_->config(), /*train_padding_row=*/false);
    config.text.mtp_layers.clear();
    config.execution.sequence_parallel = arguments_.sequence_parallel;
    model_ = Step37Model(config, groups_);
    model_->to(device_, dtype_);
    parameters_ = parameter_shards(*model_);
  }

  void load() { checkpoint_->load(parameters_); }

  /// One line about what the configuration announces and is not run.
  std::string note() const {
    const auto announced = checkpoint_->announced_mtp_layers();
    if (announced == 0) return {};
    const bool are_there = !checkpoint_->config().text.mtp_layers.empty();
    return fmt::format("{}: {} multi-token-prediction {} left out: {}\n", arguments_.model.string(), announced,
                       announced == 1 ? "layer is" : "layers are",
                       are_there ? "the logits don't depend on them" : "the files lack them");
  }

  void run() {
    const at::AutoGradMode mode(arguments_.gradients);
    std::optional<GradientBuffer> gradients;
    if (arguments_.gradients) gradients.emplace(parameters_, groups_);
    embeddings_ = model_->embed(batch_);
    auto& decoder = model_->language_model->decoder;
    const auto attention = decoder->attention_batch(embeddings_, batch_.attention);
    auto hidden = embeddings_;
    for (auto& layer : decoder->layers) {
      hidden = layer->forward(hidden, attention);
      if (arguments_.dump.empty()) continue;
      if (arguments_.gradients) hidden.retain_grad();
      layer_outputs_.push_back(hidden);
    }
    logits_ = model_->language_model->output_layer->forward(decoder->final_layernorm->forward(hidden));
    if (!batch_.labels.defined()) return;
    const CrossEntropyOptions options{.vocabulary_size = model_->config().text.vocabulary_size};
    const auto losses = vocab_parallel_cross_entropy(logits_, batch_.labels.t().contiguous(), options, groups_.tp);
    loss_ = losses.sum() / static_cast<double>(num_counted_);
    if (!gradients) return;
    loss_.backward();
    gradients->reduce();
  }

  /// Gathers all results to full size. Collective.
  std::vector<NamedTensor> gather() {
    const at::NoGradGuard no_grad;
    std::vector<NamedTensor> results;
    const int64_t V = model_->config().text.vocabulary_size;
    results.push_back({"logits", batch_first(parallel::all_gather_last_dim(logits_, groups_.tp).narrow(2, 0, V))});
    if (loss_.defined()) results.push_back({"loss", loss_.detach()});
    const auto embeddings = batch_first(whole_sequence(embeddings_));
    results.push_back({"inputs_embeds", embeddings});
    if (!places_.empty()) {
      const auto rows = at::tensor(at::ArrayRef<int64_t>(places_), at::kLong).to(embeddings.device());
      results.push_back({"image_features", embeddings.reshape({-1, embeddings.size(2)}).index_select(0, rows)});
    }
    for (size_t number = 0; number < layer_outputs_.size(); ++number) {
      const auto& output = layer_outputs_[number];
      const auto name = fmt::format("layers.{}.output", number);
      results.push_back({name, batch_first(whole_sequence(output.detach()))});
      if (arguments_.gradients) results.push_back({"grad." + name, batch_first(whole_sequence(output.grad()))});
    }
    if (arguments_.gradients) gather_gradients(results);
    return results;
  }

 private:
  int64_t B() const { return input_.input_ids.size(0); }
  int64_t S() const { return input_.input_ids.size(1); }

  void make_batch() {
    const auto& config = checkpoint_->config();
    const auto image_start = arguments_.image_start_token ? arguments_.image_start_token : config.image_start_token_id;
    const auto patch_start = arguments_.patch_start_token ? arguments_.patch_start_token : config.patch_start_token_id;
    const Placement placement(input_, config);
    places_ = placement.places();
    const bool has_patches = input_.patches.defined() && input_.patches.size(0) > 0;
    // In a text without pictures the ids of start tokens mean nothing.
    const bool has_start_tokens = image_start && (patch_start || !has_patches) && !places_.empty();
    auto plan = has_start_tokens ? placement.after_start_tokens(patch_start.value_or(-1), *image_start)
                                 : placement.by_placeholders(input_.patches_before);
    // Sequence parallelism needs a multiple of t; causal attention doesn't look at what is appended.
    const int64_t t = arguments_.sequence_parallel ? groups_.tp->getSize() : 1;
    const int64_t padding = (t - S() % t) % t;
    const int64_t pad_id = std::clamp<int64_t>(config.pad_token_id, 0, config.text.vocabulary_size - 1);
    batch_.input_ids = at::constant_pad_nd(input_.input_ids, {0, padding}, pad_id);
    batch_.attention.position_ids = at::arange(S() + padding, at::kLong).unsqueeze(0);
    if (input_.labels.defined()) {
      batch_.labels = at::constant_pad_nd(input_.labels.narrow(1, 1, S() - 1), {0, 1 + padding}, kIgnoredLabel);
      num_counted_ = batch_.labels.ne(kIgnoredLabel).sum().item<int64_t>();
      TORCH_CHECK_VALUE(num_counted_ > 0, arguments_.input.string(), ": no label counts for the loss");
    }
    for (const auto& pixels : {input_.patches, input_.images}) {
      if (!pixels.defined()) continue;
      batch_.images.push_back({.insert_start_token = -1, .images = pixels.to(device_)});
    }
    if (batch_.images.empty()) return;
    batch_.plan = InsertPlan::from_runs(plan.runs(), B(), S() + padding, plan.image_rows());
  }

  at::Tensor whole_sequence(const at::Tensor& tensor) const {
    return arguments_.sequence_parallel ? parallel::all_gather(tensor, groups_.tp) : tensor;
  }

  /// [S + padding, B, ..] -> [B, S, ..].
  at::Tensor batch_first(const at::Tensor& tensor) const { return tensor.narrow(0, 0, S()).transpose(0, 1); }

  void gather_gradients(std::vector<NamedTensor>& results) const {
    for (const auto& shard : parameters_) {
      if (!shard.parameter.requires_grad()) continue;
      const bool counts = groups_.of(shard.domain.replicated_over())->getRank() == 0;
      for (const auto& segment : shard.segments) {
        auto whole = at::zeros(segment.global_shape, shard.parameter.options().requires_grad(false));
        if (counts) segment.in_global(whole).copy_(segment.in_local(shard.parameter.grad()));
        parallel::all_reduce_in_place(whole, groups_.world);
        results.push_back({"grad." + published_name(segment.name), whole});
      }
    }
  }

  ForwardArguments arguments_;
  parallel::ProcessGroups groups_;
  at::Device device_;
  at::ScalarType dtype_;
  std::optional<PublishedCheckpoint> checkpoint_;
  ForwardInput input_;
  Step37Batch batch_;
  std::vector<int64_t> places_;  ///< b*S + s of each placeholder
  int64_t num_counted_ = 0;      ///< labels that are in the loss
  Step37Model model_{nullptr};
  std::vector<ParameterShard> parameters_;
  at::Tensor embeddings_;
  std::vector<at::Tensor> layer_outputs_;
  at::Tensor logits_;
  at::Tensor loss_;
};

}  // namespace

int forward(parallel::Runtime& runtime, const ForwardArguments& arguments) {
  check_no_tilde("--model", arguments.model);
  check_no_tilde("--input", arguments.input);
  check_no_tilde("--output", arguments.output);
  const int size = runtime.size();
  TORCH_CHECK_VALUE(arguments.expert_parallel > 0 && size % arguments.expert_parallel == 0, "--expert-parallel ",
                    arguments.expert_parallel, " does not divide the ", size, size == 1 ? " rank" : " ranks");
  const auto groups = parallel::make_process_groups(
      runtime, {.tp = size,
                .ep = arguments.expert_parallel,
                .etp = arguments.expert_tensor_parallel.value_or(size / arguments.expert_parallel)});
  ForwardRun run(arguments, groups, runtime.device());
  // Files may be broken on one host only: then all ranks throw.
  parallel::agree_on([&] { run.read(); }, groups.world);
  run.build();
  parallel::agree_on([&] { run.load(); }, groups.world);
  if (runtime.rank() == 0) std::fputs(run.note().c_str(), stdout);
  run.run();
  const auto results = run.gather();
  parallel::agree_on(
      [&] {
        if (runtime.rank() == 0) write_safetensors(arguments.output, results);
      },
      groups.world);
  parallel::destroy_process_groups(runtime, groups);
  return 0;
}

}  // namespace megatron_cpp::step37
