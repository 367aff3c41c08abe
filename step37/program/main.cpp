// The step37 program: the only place that reads the command line.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "parallel/host_memory.h"
#include "parallel/mpi/launcher.h"
#include "parallel/runtime.h"
#include "step37/program/check.h"
#include "step37/program/convert.h"
#include "step37/program/embed.h"
#include "step37/program/features.h"
#include "step37/program/forward.h"
#include "step37/program/generate.h"
#include "step37/program/plan.h"
#include "step37/program/pretrain.h"
#include "step37/program/verify.h"

namespace megatron_cpp {
namespace {

using Command = std::function<int(parallel::Runtime&)>;

constexpr char kOverridesHelp[] = "section.key=value, in place of the file's value; tp=8 is short for parallel.tp=8";

void add_embed(CLI::App& app, Command& command) {
  auto* embed =
      app.add_subcommand("embed", "Replay the image-insert embedding, forward and backward, on given tensors");
  auto arguments = std::make_shared<step37::EmbedArguments>();
  embed->add_option("--input", arguments->input, "Case to read (safetensors)")->required();
  embed->add_option("--output", arguments->output, "Results to write (safetensors)")->required();
  embed->add_option("--embedding-sharding", arguments->embedding_sharding, "vocab or hidden")->capture_default_str();
  embed->add_option("--projector-sharding", arguments->projector_sharding, "column, row or replicated")
      ->capture_default_str();
  embed->add_option("--exchange", arguments->exchange, "fused or all-gather")->capture_default_str();
  embed->add_flag("--sequence-parallel", arguments->sequence_parallel, "Split the sequence over the ranks");
  embed->add_flag("--frozen-features", arguments->frozen_features, "The features need no gradient");
  embed->add_flag("--frozen-projector", arguments->frozen_projector, "align_projector needs no gradient");
  embed->add_flag("--frozen-embedding", arguments->frozen_embedding, "The word embedding needs no gradient");
  embed->add_option("--on-mismatch", arguments->on_mismatch, "error or truncate")->capture_default_str();
  embed->add_option("--dtype", arguments->dtype, "float32 or bfloat16")->capture_default_str();
  embed->add_flag("--checked", arguments->checked, "Compare what must be equal on all ranks before anything is sent");
  embed->add_option("--stats", arguments->stats, "Write collectives and bytes to this file (JSON)");
  embed->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) {
      runtime.choose_device({.device = "auto", .may_leave_gpus = true});
      return step37::embed(runtime, *arguments);
    };
  });
}

void add_check(CLI::App& app, Command& command) {
  auto* check = app.add_subcommand("check", "Are the files of a checkpoint what was written?");
  auto arguments = std::make_shared<step37::CheckArguments>();
  check->add_option("--checkpoint", arguments->checkpoint, "Checkpoint of a training run, such as .../latest")
      ->required();
  check->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) { return step37::check(runtime, *arguments); };
  });
}

void add_convert(CLI::App& app, Command& command) {
  auto* convert = app.add_subcommand("convert", "Turn a published checkpoint into a training one, or the reverse");
  auto arguments = std::make_shared<step37::ConvertArguments>();
  convert->add_option("--from", arguments->from, "Checkpoint to read: a published one, a run or one of its steps")
      ->required();
  convert->add_option("--to", arguments->to, "Folder to write; must not exist, or be empty")->required();
  convert->add_option("--config", arguments->config, "Configuration of the run that a training result is to begin");
  convert->add_option("--layout", arguments->layout, "published or training [the other one than --from has]");
  convert->add_option("--dtype", arguments->dtype, "float32 or bfloat16 [as config.json says]");
  convert->add_option("--max-shard-size", arguments->max_shard_size, "Largest file of a published checkpoint [5GB]")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true));
  convert->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) { return step37::convert(runtime, *arguments); };
  });
}

void add_features(CLI::App& app, Command& command) {
  auto* features =
      app.add_subcommand("features", "Write a frozen vision tower's features of all pictures, to train from them");
  auto arguments = std::make_shared<step37::FeaturesArguments>();
  features->add_option("--config", arguments->config, "Configuration of the run (YAML)")->required();
  features
      ->add_option("--output", arguments->output, "Folder to write, for data.features; one with features is added to")
      ->required();
  features->add_option("overrides", arguments->overrides, kOverridesHelp);
  features->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) { return step37::features(runtime, *arguments); };
  });
}

void add_forward(CLI::App& app, Command& command) {
  auto* forward = app.add_subcommand("forward", "Run a published checkpoint on given tensors");
  auto arguments = std::make_shared<step37::ForwardArguments>();
  forward->add_option("--model", arguments->model, "Folder with config.json and safetensors files")->required();
  forward->add_option("--input", arguments->input, "Tensors to read (safetensors)")->required();
  forward->add_option("--output", arguments->output, "Results to write (safetensors)")->required();
  forward->add_option("--image-start-token", arguments->image_start_token, "Token id before an image's rows");
  forward->add_option("--patch-start-token", arguments->patch_start_token, "Token id before a patch's rows");
  forward->add_flag("--sequence-parallel", arguments->sequence_parallel, "Split the sequence over the ranks");
  forward
      ->add_option("--mm-encoder-tp-mode", arguments->mm_encoder_tp_mode,
                   "Share out the vision tower's pictures (data) or its weights (weights)")
      ->capture_default_str();
  forward->add_flag("--gradients", arguments->gradients, "Write gradients of the loss, too");
  forward->add_option("--expert-parallel", arguments->expert_parallel, "Ranks that share out the experts")
      ->capture_default_str();
  forward->add_option("--expert-tensor-parallel", arguments->expert_tensor_parallel,
                      "Ranks that share each expert [ranks / expert-parallel]");
  forward->add_option("--dtype", arguments->dtype, "float32, float64 or bfloat16")->capture_default_str();
  forward->add_option("--dump", arguments->dump, "layers: write the output of every decoder layer, too");
  forward->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) {
      runtime.choose_device({.device = "auto", .may_leave_gpus = true});
      return step37::forward(runtime, *arguments);
    };
  });
}

void add_pretrain(CLI::App& app, Command& command) {
  auto* pretrain = app.add_subcommand("pretrain", "Train Step3.7 on captioned pictures");
  auto arguments = std::make_shared<step37::PretrainArguments>();
  pretrain->add_option("--config", arguments->config, "Configuration of the run (YAML)")->required();
  pretrain->add_option("overrides", arguments->overrides, kOverridesHelp);
  const std::map<std::string, step37::ProgressStyle> styles = {{"line", step37::ProgressStyle::kLine},
                                                               {"plain", step37::ProgressStyle::kPlain}};
  // Ranks can't find out: mpirun gives them a terminal of its own even if its output goes to a file.
  pretrain->add_option("--progress", arguments->progress, "line (for a terminal) or plain")
      ->transform(CLI::CheckedTransformer(styles));
  pretrain->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) { return step37::pretrain(runtime, *arguments); };
  });
}

void add_plan(CLI::App& app, Command& command) {
  auto* plan = app.add_subcommand("plan", "Memory, bytes sent and FLOPs of a configuration; reads no data");
  auto arguments = std::make_shared<step37::PlanArguments>();
  plan->add_option("--config", arguments->config, "Configuration of the run (YAML)")->required();
  plan->add_option("overrides", arguments->overrides, kOverridesHelp);
  auto* ranks = plan->add_option("--ranks", arguments->ranks, "Number of ranks; default: what parallel.* give");
  ranks->check(CLI::PositiveNumber);
  plan->add_option("--gpus", arguments->gpus, "Search the best layouts of as many ranks")
      ->check(CLI::PositiveNumber)
      ->excludes(ranks);
  plan->add_option("--memory", arguments->memory, "Memory of a rank in GB (10^9 bytes)")->check(CLI::PositiveNumber);
  plan->add_option("--images-per-pack", arguments->images_per_pack, "Pictures of a pack; default: as many as fit");
  plan->add_option("--intra-node-gbps", arguments->intra_node_gbps, "Gbit/s that a rank sends inside a node")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  plan->add_option("--inter-node-gbps", arguments->inter_node_gbps, "Gbit/s that a rank sends to other nodes")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  plan->add_option("--ranks-per-node", arguments->ranks_per_node, "Ranks of a node")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  plan->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) { return runtime.rank() == 0 ? step37::plan(*arguments) : 0; };
  });
}

void add_verify(CLI::App& app, Command& command) {
  auto* verify = app.add_subcommand("verify", "Does a configuration compute the same in every layout of the ranks?");
  auto arguments = std::make_shared<step37::VerifyArguments>();
  verify->add_option("--config", arguments->config, "Configuration of the run (YAML)")->required();
  verify->add_option("overrides", arguments->overrides, kOverridesHelp);
  verify->add_option("--layers", arguments->layers, "Take the decoder's first layers only");
  verify->add_option("--dtype", arguments->dtype, "float64 or float32")->capture_default_str();
  verify->add_option("--tolerance", arguments->tolerance, "Largest relative difference [float64 1e-10, float32 1e-4]")
      ->check(CLI::NonNegativeNumber);
  verify->add_option("--against", arguments->against, "Gradients from elsewhere, by published name (safetensors)");
  verify->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) { return step37::verify(runtime, *arguments); };
  });
}

void add_generate(CLI::App& app, Command& command) {
  auto* generate = app.add_subcommand("generate", "Caption pictures with a trained model");
  auto arguments = std::make_shared<step37::GenerateArguments>();
  generate->add_option("--checkpoint", arguments->checkpoint, "Checkpoint of a training run, such as .../latest");
  generate->add_option("--model", arguments->model, "Or a folder with config.json and safetensors files");
  generate->add_option("--image", arguments->images, "Picture; give the option again for each further one")
      ->required()
      ->allow_extra_args(false);
  generate->add_option("--prompt", arguments->prompt, "How the caption begins");
  generate->add_option("--max-new-tokens", arguments->max_new_tokens, "Longest caption, in tokens")
      ->capture_default_str();
  generate->add_option("--temperature", arguments->sampling.temperature, "0: always the most probable token")
      ->capture_default_str();
  generate->add_option("--top-p", arguments->sampling.top_p, "Draw from the tokens that make up this probability")
      ->capture_default_str();
  generate->add_option("--seed", arguments->sampling.seed, "Of the draws")->capture_default_str();
  generate->add_flag("!--no-cache", arguments->cache, "Recompute all positions for every token");
  generate->add_flag("--ids", arguments->ids, "Print token ids in place of text");
  generate->add_option("--expert-parallel", arguments->expert_parallel, "Ranks that share out the experts")
      ->capture_default_str();
  generate->callback([arguments, &command] {
    command = [arguments](parallel::Runtime& runtime) {
      runtime.choose_device({.device = "auto", .may_leave_gpus = true});
      return step37::generate(runtime, *arguments);
    };
  });
}

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  parallel::keep_freed_host_memory();
  CLI::App app("Step3.7, tensor- and sequence-parallel. Start alone or with mpirun -np N.", "step37");
  app.set_version_flag("--version", std::string(MCPP_VERSION));
  app.require_subcommand(1);
  Command command;
  add_plan(app, command);
  add_verify(app, command);
  add_pretrain(app, command);
  add_generate(app, command);
  add_check(app, command);
  add_convert(app, command);
  add_embed(app, command);
  add_features(app, command);
  add_forward(app, command);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Every rank has the same wrong command line. Only one prints the error; the others exit with 0, because a launcher
    // might otherwise kill that one before it has printed.
    return parallel::launcher_rank(parallel::process_environment()) == 0 ? app.exit(error) : 0;
  }
  return parallel::Runtime::run(command);
}
