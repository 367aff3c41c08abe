// The input is a configuration in YAML. Lines after one that says "# overrides" are overrides.
#include <vector>

#include "step37/program/run_config.h"
#include "step37/program/training_run.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

struct Input {
  std::string_view yaml;
  std::vector<std::string> overrides;
};

Input read_input(std::string_view text) {
  constexpr std::string_view kSeparator = "\n# overrides\n";
  const auto separator = text.find(kSeparator);
  Input input{text.substr(0, separator), {}};
  if (separator == std::string_view::npos) return input;
  text.remove_prefix(separator + kSeparator.size());
  while (!text.empty()) {
    const auto line = text.substr(0, text.find('\n'));
    input.overrides.emplace_back(line.substr(0, line.find('\0')));  // as arguments of programs are
    text.remove_prefix(std::min(line.size() + 1, text.size()));
  }
  return input;
}

/// Its settings, as overrides and in a checkpoint, make the same configuration again.
void check_settings(const step37::RunConfig& config) {
  const auto settings = step37::settings(config);
  std::vector<std::string> overrides;
  overrides.reserve(settings.size());
  for (const auto& [key, value] : settings) overrides.push_back(key + "=" + value);
  FUZZ_CHECK(step37::settings(step37::run_config_from_settings(overrides, config.published_form)) == settings);

  const auto text =
      to_text(step37::RunState{.config = config, .data = {{"directory", {{3, 4, 9}, 0.25}}}, .optimizer_steps = 5});
  const auto state = step37::run_state_from_text(text, "here", settings, step37::model_text(config));
  FUZZ_CHECK(step37::settings(state.config) == settings);
  FUZZ_CHECK((state.data == step37::MixState{{"directory", {{3, 4, 9}, 0.25}}}) && state.optimizer_steps == 5);
}

/// What validation lets through can be computed with.
void check_valid(const step37::RunConfig& config, int num_ranks) {
  const auto grid = step37::rank_grid(config, num_ranks);
  FUZZ_CHECK(grid.tp >= 1 && grid.dp >= 1 && grid.tp * grid.dp == num_ranks);
  FUZZ_CHECK(config.training.global_batch_size % (config.training.micro_batch_size * grid.dp) == 0);
  const auto model = step37::model_config(config, config.data.vocabulary_size);
  FUZZ_CHECK(model.text.num_layers() == config.model.num_layers);
  FUZZ_CHECK(model.vision.output_dim() > 0);
  const auto crops = step37::crop_options(config);
  const int64_t rows = model.vision.feature_rows(config.vision.image_size, config.vision.image_size);
  FUZZ_CHECK(crops.global_tokens() == rows && rows < config.training.sequence_length);
  const auto schedule = step37::learning_rate_schedule(config);
  for (const int64_t step : {int64_t{1}, config.training.steps}) {
    FUZZ_CHECK(schedule.at(step) >= 0.0 && schedule.at(step) <= config.training.learning_rate, "step ", step);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  const auto input = read_input(fuzz::text_of(data, size));
  const auto path = folder.write("input.yaml", input.yaml);
  step37::RunConfig config;
  const auto reason = fuzz::refusal([&] { config = step37::load_run_config(path, input.overrides); });
  if (reason) {
    FUZZ_CHECK(fuzz::contains(*reason, path.string()) || fuzz::contains(*reason, "in the override ") ||
                   fuzz::contains(*reason, "the override "),
               *reason, " names neither file nor override");
    return 0;
  }
  check_settings(config);
  for (const int num_ranks : {1, 2, 6}) {
    const auto misfit = fuzz::refusal([&] { step37::validate(config, num_ranks); });
    if (!misfit) check_valid(config, num_ranks);
  }
  return 0;
}

}  // namespace megatron_cpp
