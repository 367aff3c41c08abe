#include "step37/program/generate.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <utility>

#include "megatron_cpp/checkpoint/json_object.h"
#include "parallel/agree.h"
#include "parallel/runtime.h"
#include "step37/checkpoint_names.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/picture.h"
#include "step37/data/preprocessor_config.h"
#include "step37/program/shell_text.h"
#include "step37/program/training_run.h"
#include "step37/published_checkpoint.h"

namespace megatron_cpp::step37 {
namespace {

constexpr const char* kTokenizerVariable = "STEP37_TOKENIZER";

/// A model and what is needed to caption with it.
struct LoadedModel {
  Step37Model model{nullptr};
  std::optional<Tokenizer> tokenizer;  ///< none: text goes through kTokenizerVariable's program, if it is set
  CaptionerOptions options;
  int64_t max_positions = 0;
};

void check_arguments(const GenerateArguments& arguments, int num_ranks) {
  TORCH_CHECK_VALUE(arguments.checkpoint.empty() != arguments.model.empty(), "give either --checkpoint or --model");
  TORCH_CHECK_VALUE(!arguments.images.empty(), "--image is missing");
  check_no_tilde("--checkpoint", arguments.checkpoint);
  check_no_tilde("--model", arguments.model);
  for (const auto& image : arguments.images) check_no_tilde("--image", image);
  TORCH_CHECK_VALUE(arguments.max_new_tokens >= 1, "--max-new-tokens ", arguments.max_new_tokens,
                    ": expected 1 or more");
  arguments.sampling.validate();
  TORCH_CHECK_VALUE(arguments.expert_parallel > 0 && num_ranks % arguments.expert_parallel == 0, "--expert-parallel ",
                    arguments.expert_parallel, " does not divide the ", num_ranks, num_ranks == 1 ? " rank" : " ranks");
}

std::vector<PictureReference> readable_pictures(const std::vector<std::filesystem::path>& images) {
  std::vector<PictureReference> pictures;
  for (const auto& image : images) {
    // Unlike a broken picture in a data set, a broken picture on the command line is an error.
    const auto decoded = decode_picture(image);
    TORCH_CHECK_VALUE(decoded.ok(), decoded.error);
    pictures.push_back({image.string(), decoded.pixels.size(2), decoded.pixels.size(1)});
  }
  return pictures;
}

LoadedModel load_run(const std::filesystem::path& given, const std::filesystem::path& checkpoint,
                     const parallel::ProcessGroups& groups) {
  const CheckpointReader reader(checkpoint);
  auto state = run_state_of(reader);
  state.config.parallel.sequence_parallel = false;  // it would pad single tokens to one for each rank
  LoadedModel loaded;
  loaded.tokenizer.emplace(load_tokenizer(tokenizer_of_checkpoint(given, checkpoint), state, checkpoint));
  loaded.model = Step37Model(model_config(state.config, loaded.tokenizer->vocab_size()), groups);
  reader.load(sharded_tensors(parameter_shards(*loaded.model), published_name, groups), UnusedTensors::kAllow);
  loaded.options = captioner_options(state.config, *loaded.tokenizer, groups.grid.tp);
  loaded.max_positions = state.config.training.sequence_length;
  return loaded;
}

/// The object in `file`, if the file is there; else an empty one.
nlohmann::ordered_json json_or_empty(const std::filesystem::path& file) {
  return exists(file) ? megatron_cpp::internal::read_json_file(file) : nlohmann::ordered_json::object();
}

/// The ids of the symbols that `pictures` need, from config.json or tokenizer.json.
PictureTokenIds published_picture_ids(const PublishedCheckpoint& checkpoint,
                                      const std::vector<PictureReference>& pictures, const CropOptions& crops) {
  const auto& config = checkpoint.config();
  std::map<std::string, int64_t, std::less<>> known;
  const auto file = checkpoint.folder() / "tokenizer.json";
  const auto json = json_or_empty(file);
  const megatron_cpp::internal::JsonObject tokenizer(json, file);
  if (tokenizer.has_value("added_tokens")) {
    for (const auto& token : tokenizer.objects("added_tokens")) known[token.text("content")] = token.integer("id");
  }
  known["<im_patch>"] = config.image_token_id;
  if (config.image_start_token_id) known["<im_start>"] = *config.image_start_token_id;
  if (config.patch_start_token_id) known["<patch_start>"] = *config.patch_start_token_id;

  // The pictures' tokens, each as the number of its symbol in kPictureSymbols.
  SampleFormat format;
  format.crops = crops;
  format.picture_ids = {0, 1, 2, 3, 4, 5};
  const auto symbols = prompt_tokens(pictures, format);
  std::array<int64_t, kPictureSymbols.size()> ids{};
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto found = known.find(kPictureSymbols[i]);
    const bool is_needed = std::find(symbols.begin(), symbols.end(), static_cast<int64_t>(i)) != symbols.end();
    TORCH_CHECK_VALUE(found != known.end() || !is_needed, checkpoint.folder().string(), ": the id of ",
                      kPictureSymbols[i], " is neither in config.json nor among the added_tokens of tokenizer.json");
    ids[i] = found != known.end() ? found->second : -1;
  }
  return {ids[0], ids[1], ids[2], ids[3], ids[4], ids[5]};
}

std::vector<int64_t> published_end_ids(const PublishedCheckpoint& checkpoint) {
  const auto file = checkpoint.folder() / "generation_config.json";
  const auto json = json_or_empty(file);
  const megatron_cpp::internal::JsonObject generation(json, file);
  const std::string key = "eos_token_id";
  if (generation.has_value(key)) {
    return generation.is_array(key) ? generation.integers(key) : std::vector<int64_t>{generation.integer(key)};
  }
  return checkpoint.config().eos_token_ids;
}

LoadedModel load_published(const std::filesystem::path& folder, const std::vector<PictureReference>& pictures,
                           const parallel::ProcessGroups& groups) {
  const PublishedCheckpoint checkpoint(folder);
  TORCH_CHECK_VALUE(checkpoint.has_weights(), folder.string(),
                    " has neither model.safetensors nor model.safetensors.index.json");
  LoadedModel loaded;
  loaded.max_positions = checkpoint.config().max_position_embeddings;
  const auto& vision = checkpoint.config().vision;
  const auto crops = read_preprocessor_config(folder, vision.image_size, vision.patch_size);
  if (const auto file = folder / "tokenizer.model"; exists(file)) {
    loaded.tokenizer.emplace(Tokenizer::load(file));
    loaded.options = captioner_options(*loaded.tokenizer, crops);
  } else {
    loaded.options.format.crops = crops;
    loaded.options.format.picture_ids = published_picture_ids(checkpoint, pictures, crops);
  }
  if (auto end_ids = published_end_ids(checkpoint); !end_ids.empty()) loaded.options.end_ids = std::move(end_ids);
  auto config = step37_config(checkpoint.config(), /*train_padding_row=*/false);
  config.text.mtp_layers.clear();
  loaded.model = Step37Model(config, groups);
  checkpoint.load(parameter_shards(*loaded.model));
  return loaded;
}

/// What the program in kTokenizerVariable, such as scripts/tokenize_text.py, writes for `input`; nothing if there is no
/// such variable.
/// @param action  encode or decode
std::optional<std::string> tokenized(const std::string& action, const std::filesystem::path& folder,
                                     const std::string& input) {
  const char* program = std::getenv(kTokenizerVariable);
  if (program == nullptr) return std::nullopt;
  const auto command = fmt::format("printf %s {} | {} {} {}", shell_quoted(input), shell_quoted_path(program), action,
                                   shell_quoted_path(folder));
  auto* pipe = popen(command.c_str(), "r");  // NOLINT(bugprone-command-processor): the user's own program
  TORCH_CHECK_VALUE(pipe != nullptr, "cannot start ", program, ": ", std::strerror(errno));
  std::string output;
  for (int byte = std::getc(pipe); byte != EOF; byte = std::getc(pipe)) output += static_cast<char>(byte);
  TORCH_CHECK_VALUE(pclose(pipe) == 0, kTokenizerVariable, "=", program, " failed: ", command);
  return output;
}

std::string to_text(const std::vector<int64_t>& ids) { return fmt::format("{}", fmt::join(ids, " ")); }

std::vector<int64_t> ids_from(const std::string& text) {
  std::istringstream words(text);
  return {std::istream_iterator<int64_t>(words), {}};
}

/// The ids of the prompt, as to_text writes them.
std::string encoded(const std::string& prompt, const LoadedModel& loaded, const std::filesystem::path& folder) {
  if (prompt.empty()) return {};
  if (loaded.tokenizer) return to_text(loaded.tokenizer->encode(prompt));
  const auto ids = tokenized("encode", folder, prompt);
  TORCH_CHECK_VALUE(ids, "--prompt needs a tokenizer: ", folder.string(), " has no tokenizer.model, and ",
                    kTokenizerVariable, " is not set");
  return *ids;
}

/// The text of `ids`, or themselves where there is no tokenizer.
std::string decoded(const std::vector<int64_t>& ids, const LoadedModel& loaded, const std::filesystem::path& folder) {
  if (loaded.tokenizer) return loaded.tokenizer->decode(ids);
  if (auto text = tokenized("decode", folder, to_text(ids))) return *text;
  std::fprintf(stderr, "%s has no tokenizer.model, and %s is not set: printing ids\n", folder.c_str(),
               kTokenizerVariable);
  return to_text(ids);
}

}  // namespace

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
  check_arguments(arguments, runtime.size());
  const auto text = trimmed_prompt(arguments.prompt);
  const int ep = arguments.expert_parallel;
  const auto groups =
      parallel::make_process_groups(runtime, {.tp = runtime.size(), .ep = ep, .etp = runtime.size() / ep});
  std::filesystem::path checkpoint;
  if (arguments.model.empty()) checkpoint = find_checkpoint_together(arguments.checkpoint, groups.world);
  LoadedModel loaded;
  std::vector<PictureReference> pictures;
  std::string prompt_text;
  parallel::agree_on(
      [&] {
        pictures = readable_pictures(arguments.images);
        loaded = arguments.model.empty() ? load_run(arguments.checkpoint, checkpoint, groups)
                                         : load_published(arguments.model, pictures, groups);
        loaded.model->to(runtime.device());
        if (runtime.rank() == 0) prompt_text = encoded(text, loaded, arguments.model);
      },
      groups.world);
  const auto prompt = ids_from(parallel::broadcast_text(prompt_text, 0, groups.world));
  auto tokens = prompt_tokens(pictures, loaded.options.format);
  tokens.insert(tokens.end(), prompt.begin(), prompt.end());
  TORCH_CHECK_VALUE(static_cast<int64_t>(tokens.size()) <= loaded.max_positions, "pictures and prompt take ",
                    tokens.size(), " positions, the model was made for ", loaded.max_positions);
  auto& options = loaded.options;
  options.max_new_tokens = arguments.max_new_tokens;
  options.sampling = arguments.sampling;
  options.cache = arguments.cache;
  PictureFaults faults;
  options.faults = &faults;
  auto ids = prompt;
  const auto added = caption_ids(loaded.model, tokens, pictures, options, groups.tp, runtime.device());
  ids.insert(ids.end(), added.begin(), added.end());
  faults.share(groups.world);
  parallel::agree_on(
      [&] {
        if (runtime.rank() != 0) return;
        std::puts((arguments.ids ? to_text(ids) : decoded(ids, loaded, arguments.model)).c_str());
      },
      groups.world);
  parallel::destroy_process_groups(runtime, groups);
  return 0;
}

}  // namespace megatron_cpp::step37
