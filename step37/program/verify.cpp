#include "step37/program/verify.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <set>
#include <utility>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/data/packed_batch.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "parallel/runtime.h"
#include "step37/checkpoint_names.h"
#include "step37/program/forward_batch.h"
#include "step37/program/run_data.h"
#include "step37/program/shell_text.h"
#include "step37/program/start_run.h"
#include "step37/program/training_run.h"

namespace megatron_cpp::step37 {
namespace {

using Overrides = std::vector<std::string>;

/// Losses and gradients without parallelism.
struct Reference {
  double loss = 0.0;
  double norm = 0.0;
  std::vector<std::string> names;  ///< of segments, in the order of the model
  std::map<std::string, at::Tensor> gradients;
};

/// A layout's gradients beside the reference. Equal on every rank.
struct Comparison {
  std::string worst;        ///< published name of the parameter with the largest difference
  double difference = 0.0;  ///< of it, relative to its largest element
  GradientRelation relation;
};

std::vector<int64_t> divisors(int64_t number) {
  std::vector<int64_t> result;
  for (int64_t divisor = 1; divisor <= number; ++divisor) {
    if (number % divisor == 0) result.push_back(divisor);
  }
  return result;
}

/// A difference that isn't a number is infinite.
double relative(double difference, double scale) {
  if (std::isnan(difference) || std::isnan(scale)) return std::numeric_limits<double>::infinity();
  return difference == 0.0 ? 0.0 : std::abs(difference) / std::abs(scale);
}

double largest_of(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0.0;
  const double largest = tensor.abs().max().to(at::kDouble).item<double>();
  return std::isnan(largest) ? std::numeric_limits<double>::infinity() : largest;
}

double inner_product(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) * b.to(at::kDouble)).sum().item<double>();
}

GradientRelation relation_of(double product, double reference_square, double square) {
  return {.ratio = reference_square > 0.0 ? product / reference_square : 0.0,
          .cosine = reference_square > 0.0 && square > 0.0 ? product / std::sqrt(reference_square * square) : 0.0};
}

class Verification {
 public:
  Verification(parallel::Runtime& runtime, const VerifyArguments& arguments, const VerifyParts& parts, RunConfig config)
      : runtime_(runtime), arguments_(arguments), parts_(parts), config_(std::move(config)) {
    TORCH_CHECK_VALUE(arguments.dtype == "float64" || arguments.dtype == "float32", "--dtype ", arguments.dtype,
                      ": expected float64 or float32");
    dtype_ = arguments.dtype == "float64" ? at::kDouble : at::kFloat;
    tolerance_ = arguments.tolerance.value_or(dtype_ == at::kDouble ? 1e-10 : 1e-4);
    const auto layers = model_config(config_, config_.data.vocabulary_size).text.num_layers();
    TORCH_CHECK_VALUE(arguments.layers.value_or(1) >= 1 && arguments.layers.value_or(1) <= layers, "--layers ",
                      arguments.layers.value_or(1), " is not in [1, ", layers, "], the layers of the model");
  }

  int run() {
    validate(alone(config_), 1);  // what the layouts below can't mend
    make_groups_of_one();
    read_batch();
    compute_reference();
    if (!arguments_.against.empty()) compare_with_file();
    check_layouts();
    TORCH_CHECK_VALUE(num_agreed_ > 0 || !verdict_.empty(), "no layout of ", runtime_.size(), " ranks is possible");
    if (verdict_.empty()) {
      verdict_ = fmt::format("verify: {} {}", num_agreed_, num_agreed_ == 1 ? "layout agrees" : "layouts agree");
      print(verdict_);
      return 0;
    }
    print(verdict_);
    return 1;
  }

 private:
  void print(const std::string& line) const {
    if (runtime_.rank() != 0) return;
    if (parts_.print) return parts_.print(line);
    std::puts(line.c_str());
    std::fflush(stdout);
  }

  /// `config` without parallelism.
  static RunConfig alone(RunConfig config) {
    config.parallel.tp = config.parallel.ep = config.parallel.etp = 1;
    config.parallel.dp = 0;
    return config;
  }

  /// Those of the reference: every rank is a replica of its own.
  void make_groups_of_one() {
    world_ = make_run_groups(runtime_, alone(config_));
    const auto& one = world_.tp;
    one_ = {{}, one, one, one, one, one, one, one, one};
    check_equal_settings(config_, world_.world);
  }

  /// On every rank the whole batch: that of the file with the gradients, or the first global batch of training.
  void read_batch() {
    bool is_in_file = false;
    parallel::agree_on(
        [&] {
          if (arguments_.against.empty()) return;
          file_.emplace(arguments_.against);
          is_in_file = file_->contains("input_ids");
          if (!is_in_file) return;
          TORCH_CHECK_VALUE(config_.published.has_value(), arguments_.against.string(),
                            " has input_ids: model.from must give the model that they are for");
          given_ = read_forward_batch(arguments_.against, *config_.published, {.multiple_of = runtime_.size()},
                                      runtime_.device());
          TORCH_CHECK_VALUE(given_->num_loss_tokens > 0, arguments_.against.string(), " has no labels");
          num_loss_tokens_ = given_->num_loss_tokens;
        },
        world_.world);
    if (!is_in_file) read_captions();
  }

  void read_captions() {
    const RunFiles files{config_.run.directory};
    auto data = open_data(runtime_, world_, config_);
    parallel::agree_on(
        [&] {
          const bool is_there = !config_.run.fresh && std::filesystem::exists(files.tokenizer());
          tokenizer_.emplace(is_there ? Tokenizer::load(files.tokenizer()) : first_tokenizer(config_, data));
          vocabulary_size_ = tokenizer_->vocab_size();
          loader_options_ = loader_options(config_, *tokenizer_, runtime_.size());
        },
        world_.world);
    auto groups = one_;
    groups.world = world_.world;  // whose rank 0 alone warns about pictures
    auto step = BatchLoader(loader_options_, std::move(data.training), groups, {}, faults_).next().packs;
    packs_ = std::move(step.micro_batches);
    num_loss_tokens_ = step.num_loss_tokens;
    int64_t ids = 0;
    for (const auto& pack : packs_) ids += pack.packed.tokens.sum().item<int64_t>();
    parallel::check_equal({{"the size of the vocabulary", vocabulary_size_},
                           {"the number of loss tokens", num_loss_tokens_},
                           {"the sum of the token ids", ids}},
                          world_.world);
  }

  size_t num_micro_batches() const { return given_ ? 1 : packs_.size(); }

  Step37Batch micro_batch(size_t number, const Step37Model& model, const parallel::GroupPtr& tp) {
    if (given_) return given_->batch;
    const auto& pack = packs_[number];
    auto images = load_pictures(pack.pictures, loader_options_.format, model->config().mm_encoder_tp_mode, tp, faults_);
    return to_model_batch(pack.packed, std::move(images), runtime_.device());
  }

  Step37Config shape_of(const RunConfig& config) const {
    auto shape = model_config(config, vocabulary_size_);
    if (arguments_.layers) {
      shape.text.layers.resize(static_cast<size_t>(*arguments_.layers));
      shape.text.mtp_layers.clear();
      shape.mtp_loss_scaling_factor = 0.0;
    }
    return shape;
  }

  bool has_experts() const { return shape_of(config_).text.moe.has_value(); }

  Step37Model make_model(const RunConfig& config, const parallel::ProcessGroups& groups) const {
    Step37Model model(shape_of(config), groups);
    model->to(runtime_.device(), dtype_);
    const auto parameters = parameter_shards(*model);
    initialize_parameters(parameters, static_cast<uint64_t>(config.training.seed));
    parallel::agree_on(
        [&] {
          if (const auto published = published_weights(config)) published->load(parameters);
        },
        world_.world);
    return model;
  }

  /// Forward and backward of this data-parallel rank's micro-batches. Returns its summand of the loss. All ranks run as
  /// many, which shared experts need: if there are too few, some run one without labels.
  double run_micro_batches(Step37Model& model, const parallel::ProcessGroups& groups, const VerifyParts& parts) {
    const auto replicas = static_cast<size_t>(groups.dp->getSize());
    double loss = 0.0;
    for (size_t first = 0; first < num_micro_batches(); first += replicas) {
      const auto number = first + static_cast<size_t>(groups.dp->getRank());
      const bool is_spare = number >= num_micro_batches();
      auto batch = micro_batch(is_spare ? 0 : number, model, groups.tp);
      if (is_spare) batch.labels = at::full_like(batch.labels, kIgnoreIndex);
      parts.change_batch(batch);
      const auto sums = parts.loss_sum(model, batch, 1.0 / static_cast<double>(num_loss_tokens_));
      auto total = sums.tokens;
      for (const auto& auxiliary : sums.auxiliary) total = total + auxiliary;
      total = total / static_cast<double>(num_loss_tokens_);
      total.backward();
      loss += total.item<double>();
    }
    return loss;
  }

  void compute_reference() {
    auto model = make_model(alone(config_), one_);
    reference_.loss = run_micro_batches(model, one_, {});
    double square = 0.0;
    for (const auto& shard : parameter_shards(*model)) {
      if (!shard.parameter.requires_grad()) continue;
      const auto gradient = shard.parameter.grad().defined() ? shard.parameter.grad() : at::zeros_like(shard.parameter);
      for (const auto& segment : shard.segments) {  // several may be boxes of one tensor
        auto& whole = reference_.gradients[segment.name];
        if (!whole.defined()) {
          whole = at::zeros(segment.global_shape, gradient.options());
          reference_.names.push_back(segment.name);
        }
        const auto own = segment.in_local(gradient);
        segment.in_global(whole).copy_(own);
        square += inner_product(own, own);
      }
    }
    TORCH_CHECK_VALUE(!reference_.names.empty(), "no parameter is trained: there is nothing to compare");
    reference_.norm = std::sqrt(square);
    print(fmt::format("reference (tp=1, each rank for itself): loss {:.10g}, gradient norm {:.10g}", reference_.loss,
                      reference_.norm));
  }

  /// What a difference in a parameter's gradient is measured by. A gradient that is nothing but rounding is no measure.
  double scale_of(const at::Tensor& gradient) const {
    const double rounding = dtype_ == at::kDouble ? 1e-14 : 1e-7;
    return largest_of(gradient) + rounding * reference_.norm;
  }

  void compare_with_file() {
    const auto file_name = arguments_.against.string();
    int64_t num_compared = 0;
    int64_t num_missing = 0;
    Comparison worst;
    for (const auto& name : reference_.names) {
      const auto published = published_name(name);
      const auto in_file = file_->contains("grad." + published) ? "grad." + published : published;
      if (!file_->contains(in_file)) {
        ++num_missing;
        continue;
      }
      const auto& expected = reference_.gradients.at(name);
      const auto given = file_->read(in_file);
      TORCH_CHECK_VALUE(given.sizes() == expected.sizes() && given.is_floating_point(), file_name, ": ", in_file,
                        " is ", given.sizes(), " ", given.scalar_type(), ", expected floating point ",
                        expected.sizes());
      ++num_compared;
      const auto theirs = given.to(expected.device(), at::kDouble);
      const double difference = relative(largest_of(theirs - expected.to(at::kDouble)), scale_of(expected));
      if (num_compared == 1 || difference > worst.difference) worst = {published, difference, {}};
      if (difference <= tolerance_against(given.scalar_type()) || !verdict_.empty()) continue;
      const auto relation = relation_of(inner_product(theirs, expected), inner_product(expected, expected),
                                        inner_product(theirs, theirs));
      const auto grid = rank_grid_or_alone();
      print(fmt::format("{}: {} differs by {:.3g}: {}", file_name, in_file, difference,
                        relation.likely_cause(grid.tp, grid.dp)));
      verdict_ = fmt::format("verify: {} differs: {} by {:.3g}", file_name, in_file, difference);
    }
    TORCH_CHECK_VALUE(num_compared > 0, file_name,
                      " has no gradient of this model: names are as in published "
                      "checkpoints, such as ",
                      published_name(reference_.names.front()));
    print(fmt::format("{}: {} gradients compared, {} of the model's not in it; largest difference {:.3g} ({})",
                      file_name, num_compared, num_missing, worst.difference, worst.worst));
  }

  double tolerance_against(at::ScalarType dtype) const {
    if (arguments_.tolerance) return tolerance_;
    return std::max(tolerance_, dtype == at::kDouble ? 1e-10 : dtype == at::kFloat ? 1e-4 : 2e-2);
  }

  parallel::RankGrid rank_grid_or_alone() const {
    return is_possible(config_) ? rank_grid(config_, runtime_.size()) : parallel::RankGrid{};
  }

  /// Empty, or why the ranks at hand can't run it.
  std::string refusal(const RunConfig& config) const {
    try {
      validate(config, runtime_.size());
    } catch (const c10::Error& error) {
      return parallel::error_text(error);
    }
    return {};
  }
  bool is_possible(const RunConfig& config) const { return refusal(config).empty(); }

  RunConfig changed(const Overrides& change) const {
    auto overrides = arguments_.overrides;
    overrides.insert(overrides.end(), change.begin(), change.end());
    return load_run_config(arguments_.config, overrides);
  }

  /// One change at a time from the configuration; the first is none.
  std::vector<Overrides> changes() const {
    std::vector<Overrides> all{{}};
    Overrides wide;  // with tp 1 the last changes would change nothing
    int widest = rank_grid_or_alone().tp;
    for (const int64_t tp : divisors(runtime_.size())) {
      all.push_back({fmt::format("tp={}", tp), "dp=0"});
      if (rank_grid_or_alone().tp > 1 || tp <= widest || !is_possible(changed(all.back()))) continue;
      widest = static_cast<int>(tp);
      wide = all.back();
    }
    if (has_experts()) {
      for (const int64_t ep : divisors(runtime_.size())) all.push_back({fmt::format("ep={}", ep)});
      for (const int64_t etp : divisors(runtime_.size())) all.push_back({fmt::format("etp={}", etp)});
    }
    if (widest == 1) return all;
    for (const auto* change : {"sequence_parallel=true", "sequence_parallel=false", "projector_sharding=replicated",
                               "projector_sharding=column", "projector_sharding=row", "embedding_sharding=vocab",
                               "embedding_sharding=hidden", "mm_encoder_tp_mode=data", "mm_encoder_tp_mode=weights"}) {
      auto with_change = wide;
      with_change.push_back(fmt::format("parallel.{}", change));
      if (settings(changed(with_change)) != settings(changed(wide))) all.push_back(std::move(with_change));
    }
    return all;
  }

  void check_layouts() {
    std::set<std::string> seen;
    for (const auto& change : changes()) {
      const auto config = changed(change);
      const auto refused = refusal(config);
      if (!refused.empty()) {
        print(fmt::format("{}: not possible: {}",
                          change.empty() ? "as configured" : fmt::format("{}", fmt::join(change, " ")), refused));
        continue;
      }
      const auto name = name_of(config, change);
      if (seen.insert(name).second) check_layout(name, config);
    }
  }

  /// The sizes, and what else `change` sets: as overrides they give the layout.
  std::string name_of(const RunConfig& config, const Overrides& change) const {
    const auto grid = rank_grid(config, runtime_.size());
    auto name = fmt::format("tp={} dp={}", grid.tp, grid.dp);
    if (has_experts()) name += fmt::format(" ep={} etp={}", grid.ep, grid.expert_tp());
    for (const auto& text : change) {
      if (text.starts_with("parallel.")) name += " " + text;
    }
    return name;
  }

  void check_layout(const std::string& name, const RunConfig& config) {
    const auto made = make_run_groups(runtime_, config);
    {
      int64_t bytes_sent = 0;
      const auto groups =
          parallel::observe(parts_.groups(made), [&](parallel::CollectiveKind, int64_t bytes) { bytes_sent += bytes; });
      auto model = make_model(config, groups);
      const auto parameters = parts_.parameters(model);
      GradientBuffer gradients(parameters, groups);
      gradients.zero();
      const auto own_loss = at::full({1}, run_micro_batches(model, groups, parts_), at::kDouble);
      gradients.reduce();
      const double norm = gradients.norm();
      const double loss = parallel::all_reduce(own_loss, made.dp).item<double>();
      const auto most = at::full({1}, bytes_sent, at::kLong);
      const auto worst = compare(gradients.parameters(), made);
      auto line = fmt::format("{}: loss {:.10g}, gradient norm {:.10g}, largest difference {:.3g} ({}), {} bytes sent",
                              name, loss, norm, worst.difference, worst.worst,
                              parallel::all_reduce(most, world_.world, parallel::Reduction::kMax).item<int64_t>());
      std::string what;
      double by = 0.0;
      const auto look = [&](const std::string& quantity, double difference) {
        if (difference <= tolerance_ || !what.empty()) return;
        what = quantity;
        by = difference;
      };
      look(worst.worst, worst.difference);
      look("loss", relative(loss - reference_.loss, reference_.loss));
      look("gradient norm", relative(norm - reference_.norm, reference_.norm));
      if (what.empty()) {
        ++num_agreed_;
      } else {
        line += ", differs";
        if (what == worst.worst) line += ": " + worst.relation.likely_cause(made.grid.tp, made.grid.dp);
        if (verdict_.empty()) verdict_ = fmt::format("verify: {} differs: {} by {:.3g}", name, what, by);
      }
      print(line);
    }
    parallel::destroy_process_groups(runtime_, made);
  }

  /// Every element of every gradient, on each rank that has it, with the reference.
  Comparison compare(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups) const {
    const auto n = static_cast<int64_t>(reference_.names.size());
    std::map<std::string, int64_t> numbers;
    for (const auto& name : reference_.names) numbers.emplace(name, static_cast<int64_t>(numbers.size()));
    auto differences = at::zeros({n}, at::kDouble);
    auto sums = at::zeros({n, 3}, at::kDouble);  // <g, r>, <g, g>, and the number of elements compared
    for (const auto& shard : parameters) {
      const bool counts = groups.of(shard.domain.replicated_over())->getRank() == 0;
      for (const auto& segment : shard.segments) {
        const auto& whole = reference_.gradients.at(segment.name);
        const auto own = segment.in_local(shard.parameter.grad());
        const auto expected = segment.in_global(whole);
        const int64_t number = numbers.at(segment.name);
        const double difference = relative(largest_of(own - expected), scale_of(whole));
        differences[number] = std::max(differences[number].item<double>(), difference);
        if (!counts) continue;
        sums[number][0] += inner_product(own, expected);
        sums[number][1] += inner_product(own, own);
        sums[number][2] += static_cast<double>(segment.box.numel());
      }
    }
    differences = parallel::all_reduce(differences, world_.world, parallel::Reduction::kMax);
    sums = parallel::all_reduce(sums, world_.world);
    Comparison worst;
    for (int64_t i = 0; i < n; ++i) {
      const auto& name = reference_.names[static_cast<size_t>(i)];
      const auto& whole = reference_.gradients.at(name);
      const bool is_covered = sums[i][2].item<double>() == static_cast<double>(whole.numel());
      const double difference = is_covered ? differences[i].item<double>() : std::numeric_limits<double>::infinity();
      if (i > 0 && difference <= worst.difference) continue;
      worst = {published_name(name), difference,
               relation_of(sums[i][0].item<double>(), inner_product(whole, whole), sums[i][1].item<double>())};
    }
    return worst;
  }

  parallel::Runtime& runtime_;
  VerifyArguments arguments_;
  VerifyParts parts_;
  RunConfig config_;
  at::ScalarType dtype_ = at::kDouble;
  double tolerance_ = 0.0;
  parallel::ProcessGroups world_;  ///< tp 1, dp the rest
  parallel::ProcessGroups one_;    ///< every group is this rank alone
  PictureFaults faults_;
  std::optional<Tokenizer> tokenizer_;
  BatchLoaderOptions loader_options_;
  std::vector<PicturePack> packs_;
  std::optional<SafetensorsFile> file_;  ///< of the gradients from elsewhere
  std::optional<ForwardBatch> given_;    ///< its batch, in place of packs_
  int64_t num_loss_tokens_ = 0;
  int64_t vocabulary_size_ = 0;
  Reference reference_;
  std::string verdict_;  ///< about what differs first
  int64_t num_agreed_ = 0;
};

bool is_about(double value, double other, double by) { return std::abs(value - other) <= by * std::abs(other); }

}  // namespace

std::string GradientRelation::likely_cause(int tp, int dp) const {
  if (cosine == 0.0 && ratio == 0.0) return "it is 0: nothing was computed, or nothing summed";
  struct Group {
    const char* name;
    int size;
  };
  std::vector<Group> groups;
  if (tp > 1) groups.push_back({"tp", tp});
  if (dp > 1 && dp != tp) groups.push_back({"dp", dp});
  if (dp > 1 && dp == tp) groups.front().name = "tp or dp";
  if (tp > 1 && dp > 1) groups.push_back({"tp x dp", tp * dp});
  const bool is_multiple = std::abs(cosine) > 1.0 - 1e-6;
  for (const auto& [name, size] : groups) {
    if (is_multiple && is_about(ratio, size, 1e-3)) {
      return fmt::format(
          "{} times the reference, the size of {}: summed over ranks that had the whole of it, or not "
          "divided by their number",
          size, name);
    }
    if (is_multiple && is_about(ratio, 1.0 / size, 1e-3)) {
      return fmt::format("1/{} of the reference, the size of {}: averaged where a sum belongs, or divided twice", size,
                         name);
    }
  }
  if (is_multiple) {
    return ratio < 0.0 && is_about(ratio, -1.0, 1e-3) ? "the reference with the other sign"
                                                      : fmt::format("{:.4g} times the reference: another scale", ratio);
  }
  for (const auto& [name, size] : groups) {
    if (is_about(ratio, 1.0 / size, 0.25) && size > 1) {
      return fmt::format("about 1/{} of the reference, but not everywhere: the summand of one rank of {} alone", size,
                         name);
    }
    if (size > 2 && is_about(ratio, (size - 1.0) / size, 0.5 / size)) {
      return fmt::format("about {}/{} of the reference, but not everywhere: the summand of one rank of {} is missing",
                         size - 1, size, name);
    }
  }
  return fmt::format("{:.4g} times the reference at most: other values, as of swapped shards or positions", ratio);
}

int verify(parallel::Runtime& runtime, const VerifyArguments& arguments, const VerifyParts& parts) {
  check_no_tilde("--against", arguments.against);
  auto config = read_run_config(arguments.config, arguments.overrides, /*warns=*/runtime.rank() == 0);
  runtime.choose_device({.device = config.run.device, .share_devices = config.run.share_gpus});
  return Verification(runtime, arguments, parts, std::move(config)).run();
}

}  // namespace megatron_cpp::step37
