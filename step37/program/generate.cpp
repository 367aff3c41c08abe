#include "step37/program/generate.h"

#include <c10/util/Exception.h>

#include <cstdio>
#include <optional>
#include <utility>

#include "parallel/agree.h"
#include "parallel/runtime.h"
#include "step37/checkpoint_names.h"
#include "step37/data/picture.h"
#include "step37/program/training_run.h"

namespace step37 {

int generate(parallel::Runtime& runtime, const GenerateArguments& arguments) {
  const auto groups = parallel::make_process_groups(runtime, {.tp = runtime.size()});
  std::optional<Tokenizer> tokenizer;
  RunState state;
  int64_t step = -1;
  Step37Model model{nullptr};
  parallel::agree_on(
      [&] {
        const megatron::CheckpointReader reader(arguments.checkpoint);
        step = reader.step();
        state = run_state_from_text(reader.state(), reader.folder().string());
        // checkpoints/step-N lies in the run's directory, as does the tokenizer.
        const RunFiles files{reader.folder().parent_path().parent_path()};
        tokenizer.emplace(Tokenizer::load(files.tokenizer()));
        model = Step37Model(model_config(state.config, tokenizer->vocab_size()), groups.tp);
        reader.load(megatron::sharded_tensors(megatron::parameter_shards(*model), published_name, groups),
                    megatron::UnusedTensors::kAllow);
        model->to(runtime.device());
        // A picture of a data set may be broken, the one a user asks for may not.
        const auto decoded = decode_picture(arguments.image);
        TORCH_CHECK_VALUE(decoded.ok(), decoded.error);
      },
      groups.world);
  // `latest` may have moved on between two ranks' looks at it.
  parallel::check_equal({{"the step of checkpoint " + arguments.checkpoint.string(), step}}, groups.world);
  auto options = captioner_options(state.config, *tokenizer, arguments.image.parent_path(), runtime.size());
  options.max_new_tokens = arguments.max_new_tokens;
  const auto picture =
      reference_to(options.folder, arguments.image.filename().string(), state.config.vision.image_size);
  const auto caption = caption_picture(model, *tokenizer, picture, tokenizer->encode(arguments.prompt), options,
                                       groups.tp, runtime.device());
  if (runtime.rank() == 0) std::printf("%s\n", caption.c_str());
  parallel::destroy_process_groups(runtime, groups);
  return 0;
}

}  // namespace step37
