#include "step37/published_tensors.h"

#include <fmt/format.h>

#include <utility>

namespace megatron_cpp::step37 {
namespace {

/// Adds tensors below a prefix.
class Adder {
 public:
  Adder(PublishedTensors& tensors, std::string prefix) : tensors_(tensors), prefix_(std::move(prefix)) {}

  void weight(const char* name, std::vector<int64_t> shape) const { add(name, ".weight", std::move(shape)); }
  void weight_and_bias(const char* name, std::vector<int64_t> shape) const {
    add(name, ".bias", {shape.front()});
    weight(name, std::move(shape));
  }
  void add(const char* name, const char* end, std::vector<int64_t> shape) const {
    tensors_.emplace(fmt::format("{}{}{}", prefix_, name, end), std::move(shape));
  }

 private:
  PublishedTensors& tensors_;
  std::string prefix_;
};

void add_feed_forward(PublishedTensors& tensors, const std::string& prefix, int64_t hidden, int64_t ffn) {
  const Adder add(tensors, prefix);
  add.weight("gate_proj", {ffn, hidden});
  add.weight("up_proj", {ffn, hidden});
  add.weight("down_proj", {hidden, ffn});
}

void add_decoder_layer(PublishedTensors& tensors, const TransformerConfig& config, const LayerConfig& layer,
                       const std::string& prefix) {
  const Adder add(tensors, prefix);
  const int64_t H = config.hidden_size;
  const int64_t heads = layer.num_attention_heads;
  add.weight("input_layernorm", {H});
  add.weight("post_attention_layernorm", {H});
  add.weight("self_attn.q_proj", {heads * config.head_dim, H});
  add.weight("self_attn.k_proj", {config.num_query_groups * config.head_dim, H});
  add.weight("self_attn.v_proj", {config.num_query_groups * config.head_dim, H});
  add.weight("self_attn.g_proj", {heads, H});
  add.weight("self_attn.o_proj", {H, heads * config.head_dim});
  if (config.qk_layernorm) {
    add.weight("self_attn.q_norm", {config.head_dim});
    add.weight("self_attn.k_norm", {config.head_dim});
  }
  if (!layer.has_experts) return add_feed_forward(tensors, prefix + "mlp.", H, config.ffn_hidden_size);
  const auto& moe = config.moe.value();
  const int64_t E = moe.num_experts;
  add.weight("moe.gate", {E, H});
  add.add("moe.router_bias", "", {E});
  add.weight("moe.gate_proj", {E, moe.ffn_hidden_size, H});
  add.weight("moe.up_proj", {E, moe.ffn_hidden_size, H});
  add.weight("moe.down_proj", {E, H, moe.ffn_hidden_size});
  if (moe.shared_expert_ffn_hidden_size > 0) {
    add_feed_forward(tensors, prefix + "share_expert.", H, moe.shared_expert_ffn_hidden_size);
  }
}

void add_vision(PublishedTensors& tensors, const VisionConfig& config) {
  const Adder add(tensors, "vision_model.");
  const int64_t width = config.width;
  const int64_t grid = config.image_size / config.patch_size;
  add.weight("conv1", {width, 3, config.patch_size, config.patch_size});
  add.add("positional_embedding", "", {grid * grid, width});
  add.weight_and_bias("ln_pre", {width});
  for (int64_t number = 0; number < config.layers; ++number) {
    const Adder block(tensors, fmt::format("vision_model.transformer.resblocks.{}.", number));
    block.weight_and_bias("ln_1", {width});
    block.weight_and_bias("ln_2", {width});
    block.add("attn.in_proj_weight", "", {3 * width, width});
    block.add("attn.in_proj_bias", "", {3 * width});
    block.weight_and_bias("attn.out_proj", {width, width});
    block.add("ls_1", ".gamma", {width});
    block.add("ls_2", ".gamma", {width});
    block.weight_and_bias("mlp.c_fc", {config.mlp_width, width});
    block.weight_and_bias("mlp.c_proj", {width, config.mlp_width});
  }
  add.weight_and_bias("vit_downsampler1", {2 * width, width, 3, 3});
  add.weight_and_bias("vit_downsampler2", {config.output_dim(), 2 * width, 3, 3});
}

}  // namespace

PublishedTensors published_tensors(const PublishedConfig& config) {
  PublishedTensors tensors;
  const auto& text = config.text;
  const Adder add(tensors, "");
  add.weight("model.embed_tokens", {text.vocabulary_size, text.hidden_size});
  add.weight("model.norm", {text.hidden_size});
  add.weight("lm_head", {text.vocabulary_size, text.hidden_size});
  for (size_t number = 0; number < text.layers.size(); ++number) {
    add_decoder_layer(tensors, text, text.layers[number], fmt::format("model.layers.{}.", number));
  }
  add_vision(tensors, config.vision);
  add.weight("vit_large_projector", {text.hidden_size, config.vision.output_dim()});
  if (config.projector_bias) add.add("vit_large_projector", ".bias", {text.hidden_size});
  return tensors;
}

PublishedTensors published_mtp_tensors(const PublishedConfig& config) {
  PublishedTensors tensors;
  const auto& text = config.text;
  for (size_t i = 0; i < text.mtp_layers.size(); ++i) {
    const auto prefix = fmt::format("model.layers.{}.", text.layers.size() + i);
    add_decoder_layer(tensors, text, text.mtp_layers[i], prefix);
    const Adder add(tensors, prefix);
    add.weight("enorm", {text.hidden_size});
    add.weight("hnorm", {text.hidden_size});
    add.weight("eh_proj", {text.hidden_size, 2 * text.hidden_size});
    add.weight("transformer.shared_head.norm", {text.hidden_size});
    add.weight("transformer.shared_head.output", {text.vocabulary_size, text.hidden_size});
  }
  return tensors;
}

}  // namespace megatron_cpp::step37
