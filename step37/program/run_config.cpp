#include "step37/program/run_config.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <string_view>
#include <type_traits>
#include <utility>

#include "megatron_cpp/tensor_parallel/linear_cross_entropy.h"
#include "parallel/shard.h"
#include "step37/data/utf8.h"
#include "step37/program/config_values.h"
#include "step37/program/shell_text.h"
#include "step37/program/training_run.h"
#include "step37/program/yaml_file.h"

namespace megatron_cpp::step37 {
namespace {

/// Requirements on the value of a key besides its type.
struct Rule {
  bool required = false;  ///< the file or an override has to give it, unless it is of a shape that model.config gives
  bool shape = false;     ///< what model.config gives
  int64_t least = std::numeric_limits<int64_t>::min();
  int64_t most = std::numeric_limits<int32_t>::max();  ///< so that no arithmetic overflows
};

// A macro, so that each key is named once: as text and as a member.
#define KEY(section, name) \
  std::pair<const char*, decltype((config.section.name))>(#section "." #name, config.section.name)

/// The one list of keys: calls visit("section.key", member, Rule) for each, section by section.
template <class Config, class Visit>
void visit_keys(Config& config, const Visit& visit) {
  const auto each = [&](const Rule& rule, auto... keys) { (visit(keys.first, keys.second, rule), ...); };
  constexpr Rule kAny;
  constexpr Rule kShape{.shape = true};
  constexpr Rule kRequiredShape{.required = true, .shape = true};
  constexpr Rule kAtLeast0{.least = 0};
  constexpr Rule kAtLeast1{.least = 1};
  constexpr int64_t kMaxLayers = 10000;  // more than any model has: a typing error mustn't use up all memory
  each(kAny, KEY(run, directory), KEY(run, fresh), KEY(run, device), KEY(run, share_gpus), KEY(run, master_address),
       KEY(run, checked), KEY(run, profile));
  each(kAtLeast1, KEY(run, timeout_seconds));
  each(kAtLeast0, KEY(parallel, tp), KEY(parallel, dp));
  each(kAtLeast1, KEY(parallel, cp), KEY(parallel, pp), KEY(parallel, ep));
  each(kAtLeast0, KEY(parallel, etp));
  each(kAny, KEY(parallel, sequence_parallel), KEY(parallel, embedding_sharding), KEY(parallel, projector_sharding),
       KEY(parallel, exchange), KEY(parallel, mm_encoder_tp_mode));
  each(kAny, KEY(data, directory), KEY(data, sets), KEY(data, tokenizer), KEY(data, oversize), KEY(data, balance));
  each(kAny, KEY(data, held_out), KEY(data, max_unreadable), KEY(data, crops), KEY(data, crop_side),
       KEY(data, features));
  each(kAtLeast1, KEY(data, max_side), KEY(data, vocabulary_size), KEY(data, decoding_threads));
  each(kAny, KEY(model, config), KEY(model, from), KEY(model, train_padding_row));
  each(kRequiredShape, KEY(model, hidden_size), KEY(model, head_dim), KEY(model, num_attention_heads),
       KEY(model, num_sliding_attention_heads), KEY(model, num_query_groups), KEY(model, ffn_hidden_size));
  each({.required = true, .shape = true, .least = 1, .most = kMaxLayers}, KEY(model, num_layers));
  each({.required = true, .shape = true, .least = 1}, KEY(model, sliding_window));
  each({.shape = true, .least = 1}, KEY(model, full_attention_interval), KEY(model, moe_router_topk));
  each(kShape, KEY(model, rope_theta), KEY(model, partial_rotary_factor), KEY(model, sliding_rope_theta),
       KEY(model, rms_norm_eps), KEY(model, projector_bias), KEY(model, moe_router_topk_scaling_factor),
       KEY(model, moe_router_in_float32));
  each({.shape = true, .least = 0}, KEY(model, num_moe_experts), KEY(model, moe_first_layer),
       KEY(model, moe_ffn_hidden_size), KEY(model, moe_shared_expert_intermediate_size));
  each({.shape = true, .least = 0, .most = kMaxLayers}, KEY(model, mtp_num_layers));
  each(kAny, KEY(model, mtp_loss_scaling_factor), KEY(model, mtp_chain_after_norm));
  each(kAny, KEY(model, moe_aux_loss_coeff), KEY(model, moe_group_balance_loss_coeff), KEY(model, moe_z_loss_coeff),
       KEY(model, moe_router_bias_update_rate));
  each(kAtLeast1, KEY(model, moe_group_balance_groups));
  each(kAny, KEY(model, init_std), KEY(model, freeze_language_model), KEY(model, freeze_projector),
       KEY(model, freeze_router));
  each(kRequiredShape, KEY(vision, image_size), KEY(vision, width), KEY(vision, layers), KEY(vision, heads),
       KEY(vision, mlp_width));
  each(kShape, KEY(vision, patch_size));
  each(kAny, KEY(vision, freeze));
  each({.required = true, .least = 1}, KEY(training, steps));
  each({.least = 0, .most = std::numeric_limits<int64_t>::max()}, KEY(training, seed));  // a pattern of bits
  each(kAtLeast1, KEY(training, global_batch_size), KEY(training, micro_batch_size), KEY(training, sequence_length));
  each(kAtLeast0, KEY(training, warmup_steps), KEY(training, decay_steps));
  each(kAny, KEY(training, learning_rate), KEY(training, min_learning_rate), KEY(training, learning_rate_decay),
       KEY(training, learning_rate_scales), KEY(training, weight_decay), KEY(training, weight_decay_scales),
       KEY(training, beta1), KEY(training, beta2), KEY(training, eps), KEY(training, clip_grad_norm),
       KEY(training, precision), KEY(training, main_gradients), KEY(training, exp_avg), KEY(training, exp_avg_sq),
       KEY(training, distributed_optimizer), KEY(training, overlap_gradient_reduction),
       KEY(training, overlap_parameter_gather), KEY(training, recompute), KEY(training, not_finite),
       KEY(training, loss_spike));
  each(kAtLeast1, KEY(training, bucket_elements));
  each(kAtLeast0, KEY(training, check_replicas), KEY(training, max_skipped_steps), KEY(training, loss_chunk));
  each(kAtLeast0, KEY(validation, interval));
  each(kAtLeast1, KEY(validation, packs));
  each(kAtLeast0, KEY(checkpoint, interval));
  each(kAtLeast1, KEY(checkpoint, keep));
  each(kAny, KEY(checkpoint, asynchronous), KEY(checkpoint, on_error), KEY(checkpoint, pass_over_damaged));
  // The key's name is a keyword of C++.
  each(kAny, std::pair<const char*, decltype((config.checkpoint.export_to))>("checkpoint.export",
                                                                             config.checkpoint.export_to));
  each(kAtLeast0, KEY(report, pictures));
  each(kAny, KEY(report, tensorboard));
  each(kAtLeast1, KEY(report, max_new_tokens));
}
#undef KEY

/// The current name of a key: files, command lines and checkpoints may use an old one.
std::string todays_name(const std::string& key) {
  static const std::map<std::string, std::string> names{{"parallel.tensor", "parallel.tp"},
                                                        {"parallel.data", "parallel.dp"},
                                                        {"training.global_batch", "training.global_batch_size"}};
  const auto found = names.find(key);
  return found == names.end() ? key : found->second;
}

/// Short forms of the command line: "tp" is "parallel.tp".
std::string long_name(const std::string& key) {
  static const std::set<std::string> names{"tp", "cp", "ep", "etp", "dp", "pp"};
  return names.contains(key) ? "parallel." + key : key;
}

std::vector<std::string> key_names() {
  std::vector<std::string> names;
  const RunConfig config;
  visit_keys(config, [&](const char* key, const auto&, const Rule&) { names.emplace_back(key); });
  return names;
}

std::vector<std::string> section_names() {
  auto names = key_names();
  for (auto& name : names) name.resize(name.find('.'));
  names.erase(std::unique(names.begin(), names.end()), names.end());
  return names;
}

// Suggestions for misspelt names.

/// Levenshtein distance: the number of insertions, deletions and replacements that turn `a` into `b`.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

/// The most similar of `names`. If `wrong` has no section, it is also compared with keys without their sections.
std::string nearest(const std::string& wrong, const std::vector<std::string>& names) {
  return *std::ranges::min_element(names, {}, [&](const std::string& name) {
    const auto whole = edit_distance(wrong, name);
    if (wrong.find('.') != std::string::npos) return whole;
    return std::min(whole, edit_distance(wrong, std::string_view(name).substr(name.find('.') + 1)));
  });
}

void check_known(const char* kind, const std::string& name, const std::vector<std::string>& names,
                 const std::string& where) {
  const bool known = std::find(names.begin(), names.end(), name) != names.end();
  TORCH_CHECK_VALUE(known, "unknown ", kind, " ", name, " in ", where, "; did you mean ", nearest(name, names), "?");
}

// Values from a file or from overrides, by key.

struct Given {
  std::string key;        ///< as written, so maybe an old name
  std::string text;       ///< of a value, or of a map (ParameterScales, DataSetSections)
  std::string where;      ///< file:line or the override
  std::string form = {};  ///< the kind of YAML node, if it isn't a single value
};
using GivenValues = std::map<std::string, Given>;

/// The name on the left of a colon.
std::string name_of(const YAML::Node& key, const std::filesystem::path& path) {
  // Error messages would end at a NUL.
  TORCH_CHECK_VALUE(key.IsScalar() && key.Scalar().find('\0') == std::string::npos, location(path, key.Mark()),
                    ": a name that isn't plain text");
  return key.Scalar();
}

Given given_value(const std::string& key, const YAML::Node& value, const std::string& where) {
  if (value.IsScalar()) return {key, value.Scalar(), where};
  if (!value.IsMap()) return {key, "", where, value.IsNull() ? "no value" : "a list"};
  std::string text;
  bool is_flat = true;
  for (const auto& entry : value) {
    text += entry.first.Scalar() + ": " + entry.second.Scalar() + ",";
    is_flat = is_flat && entry.second.IsScalar();
  }
  if (!is_flat) {
    auto in_one_line = YAML::Clone(value);
    in_one_line.SetStyle(YAML::EmitterStyle::Flow);
    text = YAML::Dump(in_one_line);
  }
  return {key, text, where, "a section"};
}

/// Adds a value under the current name of its key.
void add_value(GivenValues& values, const Given& given, bool may_replace) {
  const auto name = todays_name(given.key);
  check_known("key", name, key_names(), given.where);
  const auto [earlier, is_new] = values.emplace(name, given);
  if (is_new) return;
  auto& before = earlier->second;
  TORCH_CHECK_VALUE(before.key == given.key, before.key, " in ", before.where, " and ", given.key, " in ", given.where,
                    " are two names of one key: give ", name, " alone");
  TORCH_CHECK_VALUE(may_replace, given.key, " in ", given.where, " is already in ", before.where);
  before = given;
}

GivenValues values_of_file(const std::filesystem::path& path) {
  const auto root = parse_yaml_file(path);
  TORCH_CHECK_VALUE(root.IsMap() || root.IsNull(), location(path, root.Mark()),
                    ": not a configuration: expected sections with keys, as training: and steps: 100 below it");
  GivenValues values;
  std::map<std::string, std::string> sections;  // with their locations
  for (const auto& section : root) {
    const auto section_name = name_of(section.first, path);
    const auto where = location(path, section.first.Mark());
    check_known("section", section_name, section_names(), where);
    const auto [earlier, is_new] = sections.emplace(section_name, where);
    TORCH_CHECK_VALUE(is_new, "section ", section_name, " in ", where, " is already in ", earlier->second);
    TORCH_CHECK_VALUE(section.second.IsMap() || section.second.IsNull(), "section ", section_name, " in ", where,
                      " must hold keys, as ", section_name, ": and a line ", "key: value below it");
    for (const auto& entry : section.second) {
      const auto key = section_name + "." + name_of(entry.first, path);
      add_value(values, given_value(key, entry.second, location(path, entry.first.Mark())), /*may_replace=*/false);
    }
  }
  return values;
}

GivenValues values_of_overrides(const std::vector<std::string>& overrides) {
  GivenValues values;
  for (const auto& text : overrides) {
    const auto equals = text.find('=');
    TORCH_CHECK_VALUE(equals != std::string::npos, "the override ", text, " has no '=': expected section.key=value");
    const Given given{long_name(text.substr(0, equals)), text.substr(equals + 1), "the override " + text};
    add_value(values, given, /*may_replace=*/true);
  }
  return values;
}

void set_values(const GivenValues& values, RunConfig& config) {
  visit_keys(config, [&](const char* key, auto& member, const Rule&) {
    const auto found = values.find(key);
    if (found == values.end()) return;
    const auto& given = found->second;
    if (given.key != key) {
      config.warnings.push_back(fmt::format("{} in {} is now called {}", given.key, given.where, key));
    }
    auto value = member;
    const bool is_right_map = given.form == "a section" && (std::is_same_v<decltype(value), ParameterScales> ||
                                                            std::is_same_v<decltype(value), DataSetSections>);
    // "\xff" isn't UTF-8, so no type accepts it.
    const auto must_be = read_value(given.form.empty() || is_right_map ? given.text : "\xff", value);
    const std::string shown = !given.form.empty() ? given.form : given.text.empty() ? "nothing" : given.text;
    TORCH_CHECK_VALUE(must_be.empty(), key, " in ", given.where, " must be ", must_be, ", got ", shown);
    member = std::move(value);
  });
}

/// The key that gives the shape in place of the shape keys: model.from or model.config; null if neither does.
const Given* shape_source(const GivenValues& values, const RunConfig& config) {
  const bool from = !config.model.from.empty();
  TORCH_CHECK_VALUE(!from || config.model.config.empty(),
                    "model.from and model.config both give the shape: leave one of them out");
  if (!from && config.model.config.empty()) return nullptr;
  return &values.at(from ? "model.from" : "model.config");
}

void refuse_shape_keys(const GivenValues& values, const Given& source) {
  const RunConfig any;
  visit_keys(any, [&](const char* key, const auto&, const Rule& rule) {
    const auto given = values.find(key);
    TORCH_CHECK_VALUE(!rule.shape || given == values.end(), key, " in ", given->second.where,
                      " is a part of the shape, which ", source.key, " in ", source.where,
                      " gives: leave one of them out");
  });
}

/// What the run in `directory` was started from, if it can be resumed: its own copy, since it may be gone by now.
std::optional<PublishedForm> form_of_run(const std::filesystem::path& directory) {
  const RunFiles files{directory};
  std::error_code unknown;
  if (!std::filesystem::is_directory(files.checkpoints(), unknown)) return std::nullopt;
  for (const auto& entry : std::filesystem::directory_iterator(files.checkpoints(), unknown)) {
    if (entry.path().filename().string().starts_with("step-") && exists(files.published(), unknown)) {
      return PublishedForm::from_text(bytes_of_file(files.published()), files.published());
    }
  }
  return std::nullopt;
}

PublishedForm form_of_source(const RunConfig& config) {
  if (config.model.from.empty()) return {.config = hub_form(std::filesystem::path(config.model.config))};
  return PublishedCheckpoint(config.model.from).form();
}

void set_published(const PublishedForm& form, const std::string& where, const GivenValues& values, RunConfig& config) {
  config.published_form = form;
  config.published = form.model(where);
  static_cast<VisionConfig&>(config.vision) = config.published->vision;
  if (!values.contains("model.init_std")) config.model.init_std = config.published->text.init_std;
  if (!values.contains("model.train_padding_row")) config.model.train_padding_row = config.model.from.empty();
}

/// Takes the shape from model.from or model.config, if `values` give one of them.
void read_shape(const GivenValues& values, RunConfig& config) {
  const auto* source = shape_source(values, config);
  if (source == nullptr) return;
  refuse_shape_keys(values, *source);
  const auto what = fmt::format("{} in {}", source->key, source->where);
  for (auto* path : {&config.model.from, &config.model.config}) {
    if (path->empty()) continue;
    check_no_tilde(what, *path);
    *path = std::filesystem::absolute(*path).lexically_normal().string();
  }
  try {
    const auto resumed = config.run.fresh ? std::nullopt : form_of_run(config.run.directory);
    set_published(resumed ? *resumed : form_of_source(config), what, values, config);
  } catch (const c10::ValueError& error) {
    TORCH_CHECK_VALUE(false, what, ": ", error.what_without_backtrace());
  }
}

}  // namespace

RunConfig load_run_config(const std::filesystem::path& path, const std::vector<std::string>& overrides) {
  const auto from_file = values_of_file(path);
  auto values = values_of_overrides(overrides);
  RunConfig config;
  set_values(from_file, config);
  for (auto* shape : {&config.model.from, &config.model.config}) {
    if (!shape->empty() && shape->front() != '~') *shape = (path.parent_path() / *shape).string();
  }
  set_values(values, config);
  values.insert(from_file.begin(), from_file.end());
  if (config.run.directory.empty()) {
    config.run.directory = "runs/" + path.stem().string();
    TORCH_CHECK_VALUE(is_utf8(config.run.directory), "run.directory must be text in UTF-8, which the name of ",
                      path.string(), " is not");
  }
  read_shape(values, config);
  visit_keys(config, [&](const char* key, const auto&, const Rule& rule) {
    const bool may_lack = !rule.required || (rule.shape && config.published);
    TORCH_CHECK_VALUE(may_lack || values.contains(key), path.string(), " lacks ", key, ", which has no default");
  });
  return config;
}

RunConfig run_config_from_settings(const std::vector<std::string>& key_values,
                                   const std::optional<PublishedForm>& form) {
  RunConfig config;
  const auto values = values_of_overrides(key_values);
  set_values(values, config);
  if (form) {
    set_published(*form, "the published form", values, config);
  } else {
    const auto* source = shape_source(values, config);
    TORCH_CHECK_VALUE(source == nullptr, source->key, " gives the shape, and there is no published form beside it");
  }
  return config;
}

std::vector<std::pair<std::string, std::string>> settings(const RunConfig& config) {
  std::vector<std::pair<std::string, std::string>> result;
  visit_keys(config, [&](const char* key, const auto& member, const Rule& rule) {
    if (!rule.shape || !config.published) result.emplace_back(key, write_value(member));
  });
  return result;
}

namespace {

const std::optional<int64_t>& number_of(const std::optional<int64_t>& value) { return value; }
const std::optional<int64_t>& number_of(const LossChunk& value) { return value.positions; }
std::optional<int64_t> number_of(int64_t value) { return value; }
/// Of any other type: there are no bounds.
template <class Value>
std::optional<int64_t> number_of(const Value& /*value*/) {
  return std::nullopt;
}

void check_bounds(const RunConfig& config) {
  visit_keys(config, [&](const char* key, const auto& member, const Rule& rule) {
    if (rule.shape && config.published) return;
    if (const auto number = number_of(member)) {
      const int64_t value = *number;
      TORCH_CHECK_VALUE(value >= rule.least, key, " ", value, " is below ", rule.least);
      TORCH_CHECK_VALUE(value <= rule.most, key, " ", value, " is above ", rule.most);
    }
  });
}

bool has_experts(const RunConfig& config) {
  return config.published ? config.published->text.moe.has_value() : config.model.num_moe_experts > 0;
}

/// The keys of the section model that train experts evenly, each 0 where it is off.
std::vector<std::pair<const char*, double>> numbers_of_expert_training(const ModelSection& model) {
  return {{"model.moe_aux_loss_coeff", model.moe_aux_loss_coeff},
          {"model.moe_group_balance_loss_coeff", model.moe_group_balance_loss_coeff},
          {"model.moe_z_loss_coeff", model.moe_z_loss_coeff},
          {"model.moe_router_bias_update_rate", model.moe_router_bias_update_rate}};
}

/// The decoder that the keys of the section model give.
TransformerConfig decoder_config(const ModelSection& model, int64_t vocabulary_size) {
  TransformerConfig text{.vocabulary_size = vocabulary_size,
                         .hidden_size = model.hidden_size,
                         .head_dim = model.head_dim,
                         .num_query_groups = model.num_query_groups,
                         .ffn_hidden_size = model.ffn_hidden_size,
                         .rms_norm_eps = model.rms_norm_eps,
                         .layers = {}};
  const LayerConfig full{.num_attention_heads = model.num_attention_heads,
                         .rope_theta = model.rope_theta,
                         .partial_rotary_factor = model.partial_rotary_factor};
  const LayerConfig sliding{.num_attention_heads = model.num_sliding_attention_heads,
                            .sliding_window = model.sliding_window,
                            .rope_theta = model.sliding_rope_theta};
  for (int64_t number = 0; number < model.num_layers; ++number) {
    text.layers.push_back(number % model.full_attention_interval == 0 ? full : sliding);
    text.layers.back().has_experts = model.num_moe_experts > 0 && number >= model.moe_first_layer;
  }
  text.mtp_layers.assign(static_cast<size_t>(model.mtp_num_layers), sliding);
  if (model.num_moe_experts > 0) {
    text.moe = MoEConfig{.num_experts = model.num_moe_experts,
                         .router_topk = model.moe_router_topk,
                         .ffn_hidden_size = model.moe_ffn_hidden_size,
                         .shared_expert_ffn_hidden_size = model.moe_shared_expert_intermediate_size,
                         .router_scaling_factor = model.moe_router_topk_scaling_factor,
                         .router_in_float32 = model.moe_router_in_float32};
  }
  return text;
}

}  // namespace

void validate(const RunConfig& config, int num_ranks) {
  const auto grid = rank_grid(config, num_ranks);
  const auto& device = config.run.device;
  TORCH_CHECK_VALUE(device == "auto" || device == "cpu" || device == "cuda", "run.device ", device,
                    " is not one of auto, cpu, cuda");
  check_no_tilde("run.directory", config.run.directory);
  TORCH_CHECK_VALUE(config.run.profile.last <= config.training.steps, "run.profile ", write_value(config.run.profile),
                    ": the run has ", config.training.steps, " steps (training.steps)");
  const auto& data = config.data;
  TORCH_CHECK_VALUE(data.directory.empty() != data.sets.empty(), "data.directory and data.sets are ",
                    data.directory.empty() ? "both empty" : "both given", ": a run needs one of them");
  check_no_tilde("data.directory", data.directory);
  check_no_tilde("data.features", data.features);
  TORCH_CHECK_VALUE(data.features.empty() || config.vision.freeze, "data.features ", data.features,
                    " has features of a frozen vision tower, and vision.freeze is false");
  double weights = 0.0;
  for (const auto& [name, section] : data.sets) {
    check_no_tilde(fmt::format("the path of the data set {}", name), section.path);
    weights += section.weight;
  }
  TORCH_CHECK_VALUE(data.sets.empty() || weights > 0.0, "the weights of data.sets are all 0");
  TORCH_CHECK_VALUE(data.held_out >= 0.0 && data.held_out < 1.0, "data.held_out ", data.held_out, " is not in [0, 1)");
  TORCH_CHECK_VALUE(data.max_unreadable >= 0.0 && data.max_unreadable <= 1.0, "data.max_unreadable ",
                    data.max_unreadable, " is not in [0, 1]");
  const auto& model = config.model;
  // A checkpoint's tokenizer is checked when it is read.
  TORCH_CHECK_VALUE(model.config.empty() || data.vocabulary_size <= config.published->text.vocabulary_size,
                    "data.vocabulary_size ", data.vocabulary_size, " is above the vocabulary of ", model.config);
  TORCH_CHECK_VALUE(config.published || model.num_moe_experts == 0 || model.moe_first_layer < model.num_layers,
                    "model.moe_first_layer ", model.moe_first_layer, " is not below model.num_layers ",
                    model.num_layers);
  for (const auto& [key, value] : numbers_of_expert_training(model)) {
    TORCH_CHECK_VALUE(value == 0.0 || has_experts(config), key, " ", value, ": the model has no experts");
  }
  TORCH_CHECK_VALUE(model.moe_router_bias_update_rate == 0.0 || !model.freeze_language_model,
                    "model.moe_router_bias_update_rate ", model.moe_router_bias_update_rate,
                    " would change the frozen language model (model.freeze_language_model)");
  const auto step37 = model_config(config, data.vocabulary_size);
  step37.validate(grid.tp);
  if (step37.text.moe) step37.text.moe->validate(grid.tp, grid.ep, grid.expert_tp());
  crop_options(config).validate();
  const auto& training = config.training;
  training.AdamWOptions::validate();
  learning_rate_schedule(config).validate();
  TORCH_CHECK_VALUE(training.clip_grad_norm >= 0.0, "training.clip_grad_norm ", training.clip_grad_norm,
                    " is negative");
  TORCH_CHECK_VALUE(training.loss_spike >= 0.0, "training.loss_spike ", training.loss_spike, " is negative");
  TORCH_CHECK_VALUE(training.global_batch_size % (training.micro_batch_size * grid.dp) == 0,
                    "training.global_batch_size ", training.global_batch_size,
                    " is not divisible by training.micro_batch_size ", training.micro_batch_size,
                    " x data-parallel size ", grid.dp);
  TORCH_CHECK_VALUE(training.precision == at::kBFloat16 || training.main_gradients == at::kFloat,
                    "training.main_gradients bfloat16 goes with training.precision bfloat16: gradients of float32 "
                    "parameters are float32");
  const auto& recompute = training.recompute;
  TORCH_CHECK_VALUE(!recompute.experts || has_experts(config), "training.recompute experts: the model has no experts");
  TORCH_CHECK_VALUE(!recompute.tower || !config.vision.freeze,
                    "training.recompute tower: the vision tower is frozen (vision.freeze) and keeps nothing");
  const int64_t S = training.sequence_length;
  if (config.parallel.sequence_parallel) parallel::even_shard_size(S, grid.tp, "training.sequence_length");
  // Begin token, <im_start>, the picture's rows, <im_end>, and a caption of at least one token.
  const int64_t picture_tokens = crop_options(config).global_tokens() + 3;
  TORCH_CHECK_VALUE(S > picture_tokens, "training.sequence_length ", S, " has no room for a caption: a picture of ",
                    config.vision.image_size, " pixels takes ", picture_tokens, " positions");
}

parallel::RankGrid rank_grid(const RunConfig& config, int num_ranks) {
  check_bounds(config);
  const auto& sizes = config.parallel;
  TORCH_CHECK_VALUE(sizes.cp == 1, "parallel.cp ", sizes.cp, ": context parallelism is not there yet");
  TORCH_CHECK_VALUE(sizes.pp == 1, "parallel.pp ", sizes.pp, ": pipeline parallelism is not there yet");
  int64_t tp = sizes.tp;
  int64_t dp = sizes.dp;
  if (dp == 0) dp = tp == 0 ? 1 : std::max<int64_t>(num_ranks / tp, 1);
  if (tp == 0) tp = std::max<int64_t>(num_ranks / dp, 1);
  // Bounds first, so that the product can't overflow.
  TORCH_CHECK_VALUE(tp <= num_ranks && dp <= num_ranks && tp * dp == num_ranks, num_ranks,
                    num_ranks == 1 ? " rank is" : " ranks are", " not parallel.tp ", tp, " x parallel.dp ", dp,
                    ": start as many, or set parallel.tp=", std::gcd(tp, num_ranks), " and leave parallel.dp out");
  parallel::RankGrid grid{.tp = static_cast<int>(tp), .dp = static_cast<int>(dp)};
  const int64_t ep = sizes.ep;
  if (!has_experts(config)) {
    TORCH_CHECK_VALUE(ep == 1, "parallel.ep ", ep, ": the model has no experts to split over ranks");
    return grid;
  }
  const int64_t default_etp = tp % ep == 0 ? tp / ep : 1;
  const int64_t etp = sizes.etp == 0 ? default_etp : sizes.etp;
  TORCH_CHECK_VALUE(num_ranks % (ep * etp) == 0, "parallel.ep ", ep, " x parallel.etp ", etp, " does not divide ",
                    num_ranks, num_ranks == 1 ? " rank" : " ranks");
  grid.ep = static_cast<int>(ep);
  grid.etp = static_cast<int>(etp);
  grid.validate(num_ranks);
  return grid;
}

Step37Config model_config(const RunConfig& config, int64_t vocabulary_size) {
  check_bounds(config);  // `config` may come from a checkpoint
  const auto& model = config.model;
  Step37Config result;
  result.text = config.published ? config.published->text : decoder_config(model, vocabulary_size);
  result.text.init_std = model.init_std;
  result.text.mtp_chain_after_norm = model.mtp_chain_after_norm;
  result.mtp_loss_scaling_factor = model.mtp_loss_scaling_factor;
  // What a config.json alone announces would stay as it is drawn.
  if (config.published_form && !config.published_form->has_weights && !result.trains_mtp()) {
    result.text.mtp_layers.clear();
  }
  if (!model.train_padding_row) {
    constexpr int64_t kPadId = 3;  // of Tokenizer::train
    result.text.embedding_padding_idx = config.published ? config.published->pad_token_id : kPadId;
  }
  if (result.text.moe) {
    auto& moe = *result.text.moe;
    moe.freeze_router = model.freeze_router;
    moe.aux_loss_coeff = model.moe_aux_loss_coeff;
    moe.group_balance_loss_coeff = model.moe_group_balance_loss_coeff;
    moe.group_balance_groups = model.moe_group_balance_groups;
    moe.z_loss_coeff = model.moe_z_loss_coeff;
    moe.router_bias_update_rate = model.moe_router_bias_update_rate;
  }
  const auto& training = config.training;
  const int64_t columns = result.text.vocabulary_size / std::max<int64_t>(config.parallel.tp, 1);
  const auto& recompute = training.recompute;
  result.execution = {.sequence_parallel = config.parallel.sequence_parallel,
                      .accumulate_into_grad = true,
                      .embedding_sharding = config.parallel.embedding_sharding,
                      .recomputed = {.layers = recompute.full,
                                     .core_attention = recompute.core_attention,
                                     .mlp = recompute.mlp,
                                     .experts = recompute.experts,
                                     .norms = recompute.norms},
                      .loss_chunk = training.loss_chunk.positions.value_or(
                          default_loss_chunk(training.sequence_length * training.micro_batch_size, columns))};
  result.recompute_tower = recompute.full || recompute.tower;
  result.vision = config.vision;
  result.projector_bias = config.published ? config.published->projector_bias : model.projector_bias;
  result.projector_sharding = config.parallel.projector_sharding;
  result.exchange = config.parallel.exchange;
  result.mm_encoder_tp_mode = config.parallel.mm_encoder_tp_mode;
  result.checked = config.run.checked;
  result.freeze_vision_model = config.vision.freeze;
  result.freeze_projector = model.freeze_projector;
  result.freeze_language_model = model.freeze_language_model;
  return result;
}

GradientBufferOptions gradient_buffer_options(const TrainingSection& training) {
  return {.low_precision_gradients = training.main_gradients,
          .distributed_optimizer = training.distributed_optimizer,
          .bucket_elements = training.bucket_elements,
          .overlap_reduction = training.overlap_gradient_reduction,
          .overlap_gather = training.overlap_parameter_gather};
}

std::string loss_text(int64_t loss_chunk) {
  return loss_chunk == 0 ? "" : fmt::format(", the loss in chunks of {} positions", loss_chunk);
}

LearningRateSchedule learning_rate_schedule(const RunConfig& config) {
  const auto& training = config.training;
  return {.peak = training.learning_rate,
          .floor = training.min_learning_rate,
          .warmup_steps = training.warmup_steps,
          .total_steps = training.steps,
          .decay = training.learning_rate_decay,
          .decay_steps = training.decay_steps};
}

CropOptions crop_options(const RunConfig& config) {
  return {.global_side = config.vision.image_size,
          .crop_side = config.data.crops ? config.data.crop_side : config.vision.image_size,
          .max_side = config.data.max_side,
          .vision_patch_size = config.vision.patch_size,
          .with_crops = config.data.crops};
}

}  // namespace megatron_cpp::step37
