#include "step37/program/generate.h"

#include <c10/util/Exception.h>

#include <cstdio>
#include <optional>
#include <utility>

#include "parallel/agree.h"
#include "parallel/runtime.h"
#include "step37/checkpoint_names.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/picture.h"
#include "step37/program/shell_text.h"
#include "step37/program/training_run.h"

namespace megatron_cpp::step37 {

std::string trimmed_prompt(const std::string& prompt) {
  const auto [text, fault] = caption_from_text(prompt);
  TORCH_CHECK_VALUE(fault != Caption::Fault::kNotUtf8, "--prompt is not UTF-8");
  TORCH_CHECK_VALUE(fault != Caption::Fault::kControlCharacter, "--prompt has control characters");
  const auto rest = prompt.find_first_of("\r\n", prompt.find_first_not_of(" \t\r\v\f\n"));
  TORCH_CHECK_VALUE(rest == std::string::npos || caption_from_text(prompt.substr(rest)).fault == Caption::Fault::kEmpty,
                    "--prompt has several lines; a caption has one");
  return text;
}

int generate(parallel::Runtime& runtime, const GenerateArguments& arguments) {
  const auto groups = parallel::make_process_groups(runtime, {.tp = runtime.size()});
  check_no_tilde("--checkpoint", arguments.checkpoint);
  check_no_tilde("--image", arguments.image);
  const auto prompt = trimmed_prompt(arguments.prompt);
  // Only one rank looks: it warns once, and `latest` may change between two looks.
  std::string found;
  parallel::agree_on(
      [&] {
        if (runtime.rank() == 0) found = find_checkpoint(arguments.checkpoint).string();
      },
      groups.world);
  const std::filesystem::path checkpoint = parallel::broadcast_text(found, 0, groups.world);
  std::optional<Tokenizer> tokenizer;
  RunState state;
  Step37Model model{nullptr};
  parallel::agree_on(
      [&] {
        const CheckpointReader reader(checkpoint);
        state = run_state_of(reader);
        tokenizer.emplace(load_tokenizer(tokenizer_of_checkpoint(arguments.checkpoint, checkpoint), state, checkpoint));
        model = Step37Model(model_config(state.config, tokenizer->vocab_size()), groups.tp);
        reader.load(sharded_tensors(parameter_shards(*model), published_name, groups), UnusedTensors::kAllow);
        model->to(runtime.device());
        // Unlike a broken picture in a data set, a broken picture on the command line is an error.
        const auto decoded = decode_picture(arguments.image);
        TORCH_CHECK_VALUE(decoded.ok(), decoded.error);
      },
      groups.world);
  auto options = captioner_options(state.config, *tokenizer, arguments.image.parent_path(), runtime.size());
  options.max_new_tokens = arguments.max_new_tokens;
  PictureFaults faults;
  options.faults = &faults;
  const auto picture =
      reference_to(options.folder, arguments.image.filename().string(), state.config.vision.image_size);
  const auto caption =
      caption_picture(model, *tokenizer, picture, tokenizer->encode(prompt), options, groups.tp, runtime.device());
  faults.share(groups.world);
  if (runtime.rank() == 0) std::puts(caption.c_str());
  parallel::destroy_process_groups(runtime, groups);
  return 0;
}

}  // namespace megatron_cpp::step37
