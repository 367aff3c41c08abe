#include "step37/program/forward.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cstdio>
#include <map>
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
#include "step37/program/forward_batch.h"
#include "step37/program/shell_text.h"
#include "step37/published_checkpoint.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {
namespace {

at::ScalarType dtype_of(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "float64") return at::kDouble;
  if (name == "bfloat16") return at::kBFloat16;
  TORCH_CHECK_VALUE(false, "--dtype ", name, ": expected float32, float64 or bfloat16");
}

MmEncoderTpMode mm_encoder_tp_mode_of(const std::string& name) {
  if (name == "data") return MmEncoderTpMode::kData;
  if (name == "weights") return MmEncoderTpMode::kWeights;
  TORCH_CHECK_VALUE(false, "--mm-encoder-tp-mode ", name, ": expected data or weights");
}

/// The steps of a run, in the order in which forward() calls them.
class ForwardRun {
 public:
  ForwardRun(const ForwardArguments& arguments, const parallel::ProcessGroups& groups, at::Device device)
      : arguments_(arguments),
        groups_(groups),
        device_(device),
        dtype_(dtype_of(arguments.dtype)),
        mm_encoder_tp_mode_(mm_encoder_tp_mode_of(arguments.mm_encoder_tp_mode)) {
    TORCH_CHECK_VALUE(arguments.dump.empty() || arguments.dump == "layers", "--dump ", arguments.dump,
                      ": expected layers");
  }

  void read() {
    checkpoint_.emplace(arguments_.model);
    TORCH_CHECK_VALUE(checkpoint_->has_weights(), arguments_.model.string(),
                      " has neither model.safetensors nor model.safetensors.index.json");
    ForwardBatchOptions options;
    options.image_start_token = arguments_.image_start_token;
    options.patch_start_token = arguments_.patch_start_token;
    if (arguments_.sequence_parallel) options.multiple_of = groups_.tp->getSize();
    input_ = read_forward_batch(arguments_.input, checkpoint_->config(), options, device_);
    TORCH_CHECK_VALUE(!arguments_.gradients || input_.batch.labels.defined(), arguments_.input.string(),
                      ": --gradients needs labels");
  }

  void build() {
    auto config = step37_config(checkpoint_->config(), /*train_padding_row=*/false);
    config.text.mtp_layers.clear();
    config.execution.sequence_parallel = arguments_.sequence_parallel;
    config.mm_encoder_tp_mode = mm_encoder_tp_mode_;
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
    embeddings_ = model_->embed(input_.batch);
    auto& decoder = model_->language_model->decoder;
    const auto attention = decoder->attention_batch(embeddings_, input_.batch.attention);
    auto hidden = embeddings_;
    for (auto& layer : decoder->layers) {
      hidden = layer->forward(hidden, attention);
      if (arguments_.dump.empty()) continue;
      if (arguments_.gradients) hidden.retain_grad();
      layer_outputs_.push_back(hidden);
    }
    logits_ = model_->language_model->output_layer->forward(decoder->final_layernorm->forward(hidden));
    if (!input_.batch.labels.defined()) return;
    const CrossEntropyOptions options{.vocabulary_size = model_->config().text.vocabulary_size};
    const auto losses =
        vocab_parallel_cross_entropy(logits_, input_.batch.labels.t().contiguous(), options, groups_.tp);
    loss_ = losses.sum() / static_cast<double>(input_.num_loss_tokens);
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
    if (!input_.places.empty()) {
      const auto rows = at::tensor(at::ArrayRef<int64_t>(input_.places), at::kLong).to(embeddings.device());
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
  at::Tensor whole_sequence(const at::Tensor& tensor) const {
    return arguments_.sequence_parallel ? parallel::all_gather(tensor, groups_.tp) : tensor;
  }

  /// [S + padding, B, ..] -> [B, S, ..].
  at::Tensor batch_first(const at::Tensor& tensor) const {
    return tensor.narrow(0, 0, input_.sequence_length).transpose(0, 1);
  }

  void gather_gradients(std::vector<NamedTensor>& results) const {
    for (const auto& shard : parameters_) {
      if (!shard.parameter.requires_grad()) continue;
      const bool counts = groups_.of(shard.domain.replicated_over())->getRank() == 0;
      std::map<std::string, at::Tensor> wholes;  // several segments may be boxes of one tensor
      for (const auto& segment : shard.segments) {
        auto& whole = wholes[segment.name];
        if (!whole.defined()) whole = at::zeros(segment.global_shape, shard.parameter.options().requires_grad(false));
        if (counts) segment.in_global(whole).copy_(segment.in_local(shard.parameter.grad()));
      }
      for (auto& [name, whole] : wholes) {
        parallel::all_reduce_in_place(whole, groups_.world);
        results.push_back({"grad." + published_name(name), whole});
      }
    }
  }

  ForwardArguments arguments_;
  parallel::ProcessGroups groups_;
  at::Device device_;
  at::ScalarType dtype_;
  MmEncoderTpMode mm_encoder_tp_mode_;
  std::optional<PublishedCheckpoint> checkpoint_;
  ForwardBatch input_;
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
