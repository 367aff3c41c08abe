#include "step37/published_config.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <utility>

#include "megatron_cpp/checkpoint/json_object.h"

namespace megatron_cpp::step37 {
namespace {

using megatron_cpp::internal::JsonObject;

constexpr const char* kFullAttention = "full_attention";
constexpr const char* kSlidingAttention = "sliding_attention";

/// The two forms have different names for one thing.
using KeyNames = std::initializer_list<const char*>;

/// The first of these names that has a value.
std::optional<std::string> name_in(const JsonObject& object, const KeyNames& names) {
  const auto* found =
      std::find_if(names.begin(), names.end(), [&](const char* name) { return object.has_value(name); });
  return found == names.end() ? std::nullopt : std::optional<std::string>(*found);
}

/// A size, or a default.
int64_t size_of(const JsonObject& object, const KeyNames& names, int64_t absent) {
  const auto name = name_in(object, names);
  if (!name) return absent;
  const int64_t size = object.integer(*name);
  TORCH_CHECK_VALUE(size > 0 && size <= std::numeric_limits<int32_t>::max(), object.where(*name), " is ", size,
                    ", expected a positive 32-bit number");
  return size;
}

double number_of(const JsonObject& object, const KeyNames& names, double absent) {
  const auto name = name_in(object, names);
  return name ? object.number(*name) : absent;
}

/// Refuses another value than the one that this library computes with.
void require(const JsonObject& object, const char* name, bool value) {
  TORCH_CHECK_VALUE(!object.has_value(name) || object.boolean(name) == value, object.where(name), " is ",
                    value ? "false" : "true", ", only ", value ? "true" : "false", " is supported");
}
void require(const JsonObject& object, const char* name, const char* value) {
  if (!object.has_value(name)) return;
  TORCH_CHECK_VALUE(object.text(name) == value, object.where(name), " is ", object.text(name), ", only ", value,
                    " is supported");
}
void require(const JsonObject& object, const char* name, int64_t value) {
  if (!object.has_value(name)) return;
  TORCH_CHECK_VALUE(object.number(name) == static_cast<double>(value), object.where(name), " is ", object.number(name),
                    ", only ", value, " is supported");
}

/// Reads the keys of text_config that have an entry per layer.
class LayerLists {
 public:
  explicit LayerLists(const JsonObject& text)
      : text_(text),
        decoder_layers_(size_of(text, {"num_hidden_layers"}, 45)),
        mtp_layers_(text.has_value("num_nextn_predict_layers") ? text.integer("num_nextn_predict_layers") : 0) {
    constexpr int64_t kMaxLayers = 10000;
    TORCH_CHECK_VALUE(decoder_layers_ <= kMaxLayers, text.where("num_hidden_layers"), " is ", decoder_layers_);
    TORCH_CHECK_VALUE(mtp_layers_ >= 0 && mtp_layers_ <= kMaxLayers, text.where("num_nextn_predict_layers"), " is ",
                      mtp_layers_);
  }

  /// The decoder's layers, then those of multi-token prediction.
  std::pair<std::vector<LayerConfig>, std::vector<LayerConfig>> read() const {
    const auto types = layer_types();
    const auto heads = num_attention_heads(types);
    const auto dense_limits = limits("swiglu_limits_shared");
    const auto expert_limits = limits("swiglu_limits");
    const auto expert_layers = layers_with_experts();
    std::vector<LayerConfig> layers(types.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      auto& layer = layers[i];
      layer.num_attention_heads = heads[i];
      layer.sliding_window = types[i] == kSlidingAttention ? sliding_window() : 0;
      layer.swiglu_limit = dense_limits[i];
      layer.has_experts = expert_layers.contains(static_cast<int64_t>(i));
      layer.expert_swiglu_limit = expert_limits[i];
    }
    set_rotary(types, layers);
    const auto end = layers.begin() + decoder_layers_;
    return {{layers.begin(), end}, {end, layers.end()}};
  }

 private:
  int64_t all_layers() const { return decoder_layers_ + mtp_layers_; }

  /// Whether a list of this size has entries for the layers of multi-token prediction, too.
  bool has_tail(const char* name, size_t size) const {
    const auto entries = static_cast<int64_t>(size);
    TORCH_CHECK_VALUE(entries == decoder_layers_ || entries == all_layers(), text_.where(name), " has ", entries,
                      " entries for ", decoder_layers_, " layers and ", mtp_layers_, " of multi-token prediction");
    return entries == all_layers();
  }

  /// The list, with the entries of the MTP layers at its end: those that it has, or those of `tail_name`.
  std::vector<std::string> with_tail(const char* name, const char* tail_name) const {
    auto entries = text_.texts(name);
    if (has_tail(name, entries.size())) return entries;
    TORCH_CHECK_VALUE(text_.has_value(tail_name), text_.where(name), " has no entries for the ", mtp_layers_,
                      " layers of multi-token prediction, and there is no key ", tail_name);
    const auto tail = text_.texts(tail_name);
    TORCH_CHECK_VALUE(static_cast<int64_t>(tail.size()) == mtp_layers_, text_.where(tail_name), " has ", tail.size(),
                      " entries for ", mtp_layers_, " layers");
    entries.insert(entries.end(), tail.begin(), tail.end());
    return entries;
  }

  std::vector<std::string> layer_types() const {
    if (!text_.has_value("layer_types"))
      return std::vector(static_cast<size_t>(all_layers()), std::string(kFullAttention));
    auto types = with_tail("layer_types", "mtp_layer_types");
    for (const auto& type : types) {
      TORCH_CHECK_VALUE(type == kFullAttention || type == kSlidingAttention, text_.where("layer_types"), " has ", type,
                        ", expected full_attention or sliding_attention");
    }
    return types;
  }

  int64_t sliding_window() const {
    TORCH_CHECK_VALUE(text_.has_value("sliding_window"), text_.where("sliding_window"),
                      " is missing, and there are layers of sliding_attention");
    return size_of(text_, {"sliding_window"}, 0);
  }

  /// Query heads of a sliding-attention layer.
  int64_t sliding_heads(int64_t heads) const {
    if (text_.has_value("num_sliding_attention_heads") || !text_.has_value("attention_other_setting")) {
      return size_of(text_, {"num_sliding_attention_heads"}, heads);
    }
    const auto other = text_.object("attention_other_setting");
    require(other, "attention_type", kSlidingAttention);
    require(other, "num_attention_groups", size_of(text_, {"num_attention_groups", "num_key_value_heads"}, 8));
    require(other, "head_dim", size_of(text_, {"head_dim"}, 128));
    require(other, "true_head_dim", size_of(text_, {"head_dim"}, 128));
    return size_of(other, {"num_attention_heads"}, heads);
  }

  std::vector<int64_t> num_attention_heads(const std::vector<std::string>& types) const {
    const int64_t heads = size_of(text_, {"num_attention_heads"}, 64);
    const int64_t sliding = sliding_heads(heads);
    std::vector<int64_t> result;
    for (const auto& type : types) result.push_back(type == kSlidingAttention ? sliding : heads);
    if (!text_.has_value("per_layer_config")) return result;
    // transformers writes the decoder's exceptions here, and reads nothing else once they are there.
    std::fill_n(result.begin(), decoder_layers_, heads);
    const auto exceptions = text_.object("per_layer_config");
    for (const auto& name : exceptions.names()) {
      int64_t layer = -1;
      const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
      TORCH_CHECK_VALUE(
          error == std::errc() && end == name.data() + name.size() && layer >= 0 && layer < decoder_layers_,
          exceptions.where(name), ": there are layers 0 to ", decoder_layers_ - 1);
      const auto exception = exceptions.object(name);
      for (const auto& key : exception.names()) {
        TORCH_CHECK_VALUE(key == "num_attention_heads", exception.where(key),
                          ": layers may differ in num_attention_heads only");
      }
      result[static_cast<size_t>(layer)] = size_of(exception, {"num_attention_heads"}, heads);
    }
    return result;
  }

  /// 0 where a layer has no limit.
  std::vector<double> limits(const char* name) const {
    std::vector<double> values(static_cast<size_t>(all_layers()), 0.0);
    if (!text_.has_value(name)) return values;
    const auto given = text_.numbers(name);
    has_tail(name, given.size());
    std::copy(given.begin(), given.end(), values.begin());
    return values;
  }

  std::set<int64_t> layers_with_experts() const {
    std::set<int64_t> layers;
    const char* key = "moe_layers_enum";
    if (text_.has_value("mlp_layer_types")) {
      key = "mlp_layer_types";
      const auto types = text_.texts(key);
      has_tail(key, types.size());
      for (size_t i = 0; i < types.size(); ++i) {
        TORCH_CHECK_VALUE(types[i] == "dense" || types[i] == "sparse", text_.where(key), " has ", types[i],
                          ", expected dense or sparse");
        if (types[i] == "sparse") layers.insert(static_cast<int64_t>(i));
      }
    } else {
      TORCH_CHECK_VALUE(text_.has_value(key), text_.where(key),
                        " is missing: readers disagree about which layers then have experts");
      for (const int64_t layer : enumerated_layers(key)) layers.insert(layer);
    }
    for (const int64_t layer : layers) {
      TORCH_CHECK_VALUE(layer >= 0 && layer < decoder_layers_, text_.where(key), " gives layer ", layer,
                        " experts: only layers 0 to ", decoder_layers_ - 1, " may have them");
    }
    return layers;
  }

  /// "3,4,5" or [3, 4, 5].
  std::vector<int64_t> enumerated_layers(const char* key) const {
    if (!text_.is_text(key)) return text_.integers(key);
    std::vector<int64_t> layers;
    const auto list = text_.text(key);
    const std::string_view rest = list;
    for (size_t begin = 0; begin < rest.size();) {
      const auto end = std::min(rest.find(',', begin), rest.size());
      auto item = rest.substr(begin, end - begin);
      begin = end + 1;
      const auto first = item.find_first_not_of(' ');
      if (first == std::string_view::npos) continue;
      item = item.substr(first, item.find_last_not_of(' ') - first + 1);
      const auto [last, error] = std::from_chars(item.data(), item.data() + item.size(), layers.emplace_back());
      TORCH_CHECK_VALUE(error == std::errc() && last == item.data() + item.size(), text_.where(key), " has \"", item,
                        "\", expected numbers of layers");
    }
    return layers;
  }

  std::optional<Llama3RopeScaling> scaling_in(const JsonObject& object) const {
    const auto type = name_in(object, {"rope_type", "type"});
    if (!type || object.text(*type) == "default") return std::nullopt;
    TORCH_CHECK_VALUE(object.text(*type) == "llama3", object.where(*type), " is ", object.text(*type),
                      ", only llama3 and default are supported");
    const Llama3RopeScaling scaling{object.number("factor"), object.number("low_freq_factor"),
                                    object.number("high_freq_factor"),
                                    object.integer("original_max_position_embeddings")};
    TORCH_CHECK_VALUE(scaling.factor > 0.0 && scaling.low_freq_factor > 0.0 &&
                          scaling.high_freq_factor > scaling.low_freq_factor &&
                          scaling.original_max_position_embeddings > 0,
                      object.where("factor"), " and its neighbours are no llama3 scaling: factor ", scaling.factor,
                      ", low_freq_factor ", scaling.low_freq_factor, ", high_freq_factor ", scaling.high_freq_factor,
                      ", original_max_position_embeddings ", scaling.original_max_position_embeddings);
    return scaling;
  }

  void set_rotary(const std::vector<std::string>& types, std::vector<LayerConfig>& layers) const {
    if (text_.has_value("rope_parameters")) {
      const auto by_type = text_.object("rope_parameters");
      for (size_t i = 0; i < layers.size(); ++i) {
        const auto parameters = by_type.object(types[i]);
        layers[i].rope_theta = number_of(parameters, {"rope_theta"}, 10000.0);
        layers[i].partial_rotary_factor = number_of(parameters, {"partial_rotary_factor"}, 1.0);
        layers[i].rope_scaling = scaling_in(parameters);
      }
      return;
    }
    const auto thetas = rotary_numbers("rope_theta", 10000.0, types);
    const auto factors = rotary_numbers("partial_rotary_factors", 1.0, types);
    std::optional<Llama3RopeScaling> scaling;
    if (text_.has_value("rope_scaling")) scaling = scaling_in(text_.object("rope_scaling"));
    if (scaling && text_.has_value("yarn_only_types")) {
      TORCH_CHECK_VALUE(text_.texts("yarn_only_types") == std::vector{std::string(kFullAttention)},
                        text_.where("yarn_only_types"), " isn't [\"full_attention\"]: readers disagree about others");
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      layers[i].rope_theta = thetas[i];
      layers[i].partial_rotary_factor = factors[i];
      if (types[i] == kFullAttention) layers[i].rope_scaling = scaling;
    }
  }

  /// A number for each layer from a list, one number, or a default. MTP layers without an entry take the one of the
  /// decoder's layers of their type.
  std::vector<double> rotary_numbers(const char* name, double absent, const std::vector<std::string>& types) const {
    std::vector<double> values(types.size(), absent);
    if (!text_.has_value(name)) return values;
    if (!text_.is_array(name)) return std::vector(types.size(), text_.number(name));
    const auto given = text_.numbers(name);
    const bool with_mtp = has_tail(name, given.size());
    for (size_t i = 0; i < types.size(); ++i) {
      const auto first_of_type = static_cast<size_t>(std::find(types.begin(), types.end(), types[i]) - types.begin());
      const bool in_decoder = static_cast<int64_t>(i) < decoder_layers_;
      TORCH_CHECK_VALUE(!in_decoder || given[i] == given[first_of_type], text_.where(name), " has ", given[i],
                        " for layer ", i, " and ", given[first_of_type], " for layer ", first_of_type, ", both of ",
                        types[i], ": readers disagree about such a list");
      TORCH_CHECK_VALUE(with_mtp || first_of_type < given.size(), text_.where(name), " has no entry for layer ", i,
                        ", and none of the same layer type");
      values[i] = with_mtp ? given[i] : given[first_of_type];
    }
    return values;
  }

  const JsonObject& text_;
  int64_t decoder_layers_;
  int64_t mtp_layers_;
};

void refuse_what_is_not_computed(const JsonObject& root, const JsonObject& text) {
  require(root, "model_type", "step3p7");
  require(root, "tie_word_embeddings", false);
  require(text, "tie_word_embeddings", false);
  require(text, "hidden_act", "silu");
  require(text, "attention_bias", false);
  require(text, "mlp_bias", false);
  require(text, "zero_centered", true);
  require(text, "use_head_wise_attn_gate", true);
  require(text, "norm_expert_weight", true);
  require(text, "use_moe_router_bias", true);
  require(text, "moe_router_activation", "sigmoid");
  require(text, "sink", false);
  require(text, "att_impl_type", "GQA");
  if (text.has_value("use_rope_layers")) {
    TORCH_CHECK_VALUE(text.integers("use_rope_layers").empty(), text.where("use_rope_layers"), " isn't empty");
  }
  for (const auto* object : {&root, &text}) {
    for (const char* name : {"quantization_config", "compression_config"}) {
      TORCH_CHECK_VALUE(!object->has_value(name), object->where(name),
                        ": the weights are quantised (as in the FP8 and NVFP4 releases); only unquantised float32, "
                        "float16 and bfloat16 weights can be read");
    }
  }
}

TransformerConfig read_text(const JsonObject& text, std::vector<LayerConfig> layers) {
  TransformerConfig config;
  config.vocabulary_size = size_of(text, {"vocab_size"}, 128815);
  config.hidden_size = size_of(text, {"hidden_size"}, 4096);
  config.head_dim = size_of(text, {"head_dim"}, 128);
  config.num_query_groups = size_of(text, {"num_attention_groups", "num_key_value_heads"}, 8);
  config.ffn_hidden_size = size_of(text, {"intermediate_size"}, 11264);
  config.rms_norm_eps = number_of(text, {"rms_norm_eps"}, 1e-5);
  config.init_std = number_of(text, {"initializer_range"}, 0.02);
  config.layers = std::move(layers);
  require(text, "query_pre_attn_scalar", config.head_dim);
  const auto has_experts = [](const LayerConfig& layer) { return layer.has_experts; };
  if (std::none_of(config.layers.begin(), config.layers.end(), has_experts)) return config;
  MoEConfig moe;
  moe.num_experts = size_of(text, {"moe_num_experts", "n_routed_experts", "num_local_experts"}, 288);
  moe.router_topk = size_of(text, {"moe_top_k", "num_experts_per_tok"}, 8);
  moe.ffn_hidden_size = size_of(text, {"moe_intermediate_size"}, 1280);
  moe.shared_expert_ffn_hidden_size = size_of(text, {"share_expert_dim", "share_expert_dims"}, 1280);
  TORCH_CHECK_VALUE(text.has_value("moe_router_scaling_factor"), text.where("moe_router_scaling_factor"),
                    " is missing: readers disagree about its default");
  moe.router_scaling_factor = text.number("moe_router_scaling_factor");
  if (text.has_value("need_fp32_gate")) moe.router_in_float32 = text.boolean("need_fp32_gate");
  config.moe = moe;
  return config;
}

VisionConfig read_vision(const JsonObject& vision) {
  require(vision, "hidden_act", "quick_gelu");
  require(vision, "num_channels", int64_t{3});
  require(vision, "use_cls_token", false);
  require(vision, "use_ln_pre", true);
  require(vision, "use_ln_post", false);
  require(vision, "use_abs_posemb", true);
  require(vision, "use_rope2d", true);
  VisionConfig config;
  config.image_size = size_of(vision, {"image_size"}, 728);
  config.patch_size = size_of(vision, {"patch_size"}, 14);
  config.width = size_of(vision, {"width", "hidden_size"}, 1536);
  config.layers = size_of(vision, {"layers", "num_hidden_layers"}, 47);
  config.heads = size_of(vision, {"heads", "num_attention_heads"}, 16);
  const double mlp_width = static_cast<double>(config.width) * number_of(vision, {"mlp_ratio"}, 8960.0 / 1536.0);
  TORCH_CHECK_VALUE(mlp_width >= 1.0 && mlp_width <= std::numeric_limits<int32_t>::max(), vision.where("mlp_ratio"),
                    " times the width ", config.width, " is ", mlp_width, ": not a number of channels");
  config.mlp_width = static_cast<int64_t>(mlp_width);
  require(vision, "intermediate_size", config.mlp_width);
  config.layer_scale_init = number_of(vision, {"ls_init_value", "layer_scale_init_value"}, 0.1);
  config.layer_norm_eps = number_of(vision, {"layer_norm_eps"}, 1e-5);
  if (vision.has_value("rope_parameters")) {
    config.rope_theta = number_of(vision.object("rope_parameters"), {"rope_theta"}, 10000.0);
  }
  return config;
}

std::vector<int64_t> read_ids(const JsonObject& object, const char* name) {
  if (!object.has_value(name)) return {};
  return object.is_array(name) ? object.integers(name) : std::vector<int64_t>{object.integer(name)};
}

std::optional<int64_t> read_id(const JsonObject& object, const char* name) {
  return object.has_value(name) ? std::optional<int64_t>(object.integer(name)) : std::nullopt;
}

std::string read_dtype(const JsonObject& root, const JsonObject& text) {
  for (const auto* object : {&root, &text}) {
    const auto name = name_in(*object, {"dtype", "torch_dtype"});
    if (!name) continue;
    const auto dtype = object->text(*name);
    TORCH_CHECK_VALUE(dtype == "float32" || dtype == "float16" || dtype == "bfloat16", object->where(*name), " is ",
                      dtype, ", expected float32, float16 or bfloat16");
    return dtype;
  }
  return "bfloat16";
}

}  // namespace

namespace {

PublishedConfig config_from_json(const nlohmann::ordered_json& json, const std::filesystem::path& file) {
  const JsonObject root(json, file);
  const auto text = root.object("text_config");
  const auto vision = root.object("vision_config");
  refuse_what_is_not_computed(root, text);
  auto [layers, mtp_layers] = LayerLists(text).read();
  PublishedConfig config;
  config.text = read_text(text, std::move(layers));
  config.text.mtp_layers = std::move(mtp_layers);
  config.vision = read_vision(vision);
  if (root.has_value("projector_bias")) config.projector_bias = root.boolean("projector_bias");
  config.image_token_id = read_id(root, "image_token_id").value_or(config.image_token_id);
  config.image_start_token_id = read_id(root, "image_start_token_id");
  config.patch_start_token_id = read_id(root, "patch_start_token_id");
  config.pad_token_id = read_id(text, "pad_token_id").value_or(config.pad_token_id);
  config.eos_token_ids = read_ids(text, "eos_token_id");
  if (config.eos_token_ids.empty()) config.eos_token_ids = read_ids(root, "eos_token_id");
  config.max_position_embeddings = size_of(text, {"max_position_embeddings", "max_seq_len"}, 128000);
  config.dtype = read_dtype(root, text);
  try {
    config.text.validate(1);
    if (config.text.moe) config.text.moe->validate(1, 1, 1);
    config.vision.validate();
  } catch (const c10::ValueError& error) {
    TORCH_CHECK_VALUE(false, file.string(), ": ", error.what_without_backtrace());
  }
  return config;
}

/// transformers' own form has these keys in place of the hub form's.
bool is_hub_form(const nlohmann::ordered_json& json) {
  const auto& text = json.at("text_config");
  return !text.contains("mlp_layer_types") && !text.contains("rope_parameters") && !text.contains("per_layer_config");
}

/// The value that `value_of` has for all layers of a type; nothing if there is none.
template <class ValueOf>
auto of_all(const TransformerConfig& text, bool sliding, const char* what, const ValueOf& value_of) {
  std::optional<decltype(value_of(text.layers.front()))> result;
  for (const auto* list : {&text.layers, &text.mtp_layers}) {
    for (const auto& layer : *list) {
      if ((layer.sliding_window > 0) != sliding) continue;
      if (!result) result = value_of(layer);
      TORCH_CHECK_VALUE(*result == value_of(layer),
                        "the hub form of config.json can't say that layers of one type "
                        "differ in their ",
                        what);
    }
  }
  return result;
}

nlohmann::ordered_json hub_text_config(const PublishedConfig& config) {
  const auto& text = config.text;
  const auto heads = [](const LayerConfig& layer) { return layer.num_attention_heads; };
  const auto full_heads = of_all(text, false, "num_attention_heads", heads);
  const auto sliding_heads = of_all(text, true, "num_attention_heads", heads);
  const auto window =
      of_all(text, true, "sliding_window", [](const LayerConfig& layer) { return layer.sliding_window; });
  const auto scaling_of = [](const LayerConfig& layer) { return layer.rope_scaling; };
  const auto scaling = of_all(text, false, "rope_scaling", scaling_of).value_or(std::nullopt);
  TORCH_CHECK_VALUE(!of_all(text, true, "rope_scaling", scaling_of).value_or(std::nullopt),
                    "the hub form of config.json can't scale the frequencies of sliding-attention layers");
  nlohmann::ordered_json json = {{"model_type", "step3p5"},
                                 {"vocab_size", text.vocabulary_size},
                                 {"hidden_size", text.hidden_size},
                                 {"intermediate_size", text.ffn_hidden_size},
                                 {"num_hidden_layers", text.num_layers()},
                                 {"num_attention_heads", full_heads.value_or(sliding_heads.value_or(0))},
                                 {"num_attention_groups", text.num_query_groups},
                                 {"head_dim", text.head_dim},
                                 {"max_position_embeddings", config.max_position_embeddings}};
  if (sliding_heads) {
    json["attention_other_setting"] = {{"attention_type", kSlidingAttention},
                                       {"num_attention_heads", *sliding_heads},
                                       {"num_attention_groups", text.num_query_groups},
                                       {"head_dim", text.head_dim}};
    json["sliding_window"] = *window;
  }
  std::string experts;
  for (const auto* list : {&text.layers, &text.mtp_layers}) {
    for (const auto& layer : *list) {
      json["layer_types"].push_back(layer.sliding_window > 0 ? kSlidingAttention : kFullAttention);
      json["rope_theta"].push_back(layer.rope_theta);
      json["partial_rotary_factors"].push_back(layer.partial_rotary_factor);
      json["swiglu_limits"].push_back(layer.expert_swiglu_limit);
      json["swiglu_limits_shared"].push_back(layer.swiglu_limit);
    }
  }
  for (size_t i = 0; i < text.layers.size(); ++i) {
    if (text.layers[i].has_experts) experts += fmt::format("{}{}", experts.empty() ? "" : ",", i);
  }
  const auto moe = text.moe.value_or(MoEConfig{});
  json["moe_layers_enum"] = experts;
  if (text.moe) {
    json["moe_num_experts"] = moe.num_experts;
    json["moe_top_k"] = moe.router_topk;
    json["moe_intermediate_size"] = moe.ffn_hidden_size;
    json["share_expert_dim"] = moe.shared_expert_ffn_hidden_size;
  }
  json.update({{"moe_router_scaling_factor", moe.router_scaling_factor},
               {"moe_router_activation", "sigmoid"},
               {"use_moe_router_bias", true},
               {"norm_expert_weight", true},
               {"need_fp32_gate", moe.router_in_float32},
               {"use_head_wise_attn_gate", true},
               {"rms_norm_eps", text.rms_norm_eps},
               {"initializer_range", text.init_std},
               {"zero_centered", true},
               {"use_qk_norm", text.qk_layernorm},
               {"num_nextn_predict_layers", text.mtp_layers.size()},
               {"tie_word_embeddings", false},
               {"pad_token_id", config.pad_token_id}});
  if (!config.eos_token_ids.empty()) json["eos_token_id"] = config.eos_token_ids;
  if (scaling) {
    json["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", scaling->factor},
                            {"low_freq_factor", scaling->low_freq_factor},
                            {"high_freq_factor", scaling->high_freq_factor},
                            {"original_max_position_embeddings", scaling->original_max_position_embeddings}};
    json["yarn_only_types"] = {kFullAttention};
  }
  return json;
}

nlohmann::ordered_json hub_vision_config(const VisionConfig& vision) {
  // Readers round width * mlp_ratio down.
  double mlp_ratio = static_cast<double>(vision.mlp_width) / static_cast<double>(vision.width);
  while (static_cast<int64_t>(static_cast<double>(vision.width) * mlp_ratio) < vision.mlp_width) {
    mlp_ratio = std::nextafter(mlp_ratio, std::numeric_limits<double>::max());
  }
  return {{"model_type", "perception_encoder"},
          {"width", vision.width},
          {"layers", vision.layers},
          {"heads", vision.heads},
          {"num_channels", 3},
          {"image_size", vision.image_size},
          {"patch_size", vision.patch_size},
          {"mlp_ratio", mlp_ratio},
          {"hidden_act", "quick_gelu"},
          {"layer_norm_eps", vision.layer_norm_eps},
          {"use_cls_token", false},
          {"use_ln_pre", true},
          {"use_ln_post", false},
          {"use_abs_posemb", true},
          {"use_rope2d", true},
          {"ls_init_value", vision.layer_scale_init},
          {"rope_parameters", {{"rope_type", "axial"}, {"rope_theta", vision.rope_theta}}}};
}

}  // namespace

PublishedConfig read_published_config(const std::filesystem::path& file) {
  return config_from_json(megatron_cpp::internal::read_json_file(file), file);
}

PublishedConfig published_config_from_text(const std::string& text, const std::filesystem::path& where) {
  return config_from_json(megatron_cpp::internal::parse_json(text, where), where);
}

std::string hub_form(const PublishedConfig& config) {
  nlohmann::ordered_json json = {{"architectures", {"Step3p7ForConditionalGeneration"}},
                                 {"model_type", "step3p7"},
                                 {"torch_dtype", config.dtype},
                                 {"image_token_id", config.image_token_id},
                                 {"projector_bias", config.projector_bias},
                                 {"understand_projector_stride", 2},
                                 {"vision_config", hub_vision_config(config.vision)},
                                 {"text_config", hub_text_config(config)}};
  if (config.image_start_token_id) json["image_start_token_id"] = *config.image_start_token_id;
  if (config.patch_start_token_id) json["patch_start_token_id"] = *config.patch_start_token_id;
  return json.dump(2);
}

std::string hub_form(const std::filesystem::path& file) {
  const auto json = megatron_cpp::internal::read_json_file(file);
  const auto config = config_from_json(json, file);
  return is_hub_form(json) ? json.dump(2) : hub_form(config);
}

std::string with_dtype(const std::string& text, const std::string& dtype) {
  auto json = nlohmann::ordered_json::parse(text);
  for (auto* object : {&json, &json["text_config"]}) {
    if (object->contains("dtype")) (*object)["dtype"] = dtype;
  }
  json["torch_dtype"] = dtype;
  return json.dump(2);
}

Step37Config step37_config(const PublishedConfig& config, bool train_padding_row) {
  Step37Config result;
  result.text = config.text;
  if (!train_padding_row) result.text.embedding_padding_idx = config.pad_token_id;
  result.vision = config.vision;
  result.projector_bias = config.projector_bias;
  return result;
}

}  // namespace megatron_cpp::step37
