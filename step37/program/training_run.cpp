#include "step37/program/training_run.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iomanip>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <sstream>
#include <system_error>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/json_integer.h"
#include "parallel/agree.h"
#include "parallel/hash.h"

namespace megatron_cpp::step37 {

namespace {

int64_t integer_at(const nlohmann::json& json, const char* key) {
  const auto value = megatron_cpp::internal::integer_of(json.at(key));
  TORCH_CHECK_VALUE(value.has_value(), key, " is not a 64-bit integer");
  return *value;
}

/// Whether `path` is a link to nothing.
bool dangles(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::is_symlink(path, ignored) && !std::filesystem::exists(path, ignored);
}

void refuse_dangling_link(const std::filesystem::path& path) {
  TORCH_CHECK_VALUE(!dangles(path), path.string(), " is a link to ", std::filesystem::read_symlink(path).string(),
                    ", which isn't there");
}

/// The working directory as in $PWD, with links that getcwd() would resolve.
std::filesystem::path current_folder() {
  const char* shell = std::getenv("PWD");
  if (shell != nullptr && shell[0] == '/') {
    std::error_code unknown;
    if (std::filesystem::equivalent(shell, ".", unknown)) return shell;
  }
  return std::filesystem::current_path();
}

}  // namespace

void check_run_files(const RunFiles& files) {
  std::error_code unknown;
  refuse_dangling_link(files.directory);
  refuse_dangling_link(files.checkpoints());
  const auto checkpoints = std::filesystem::status(files.checkpoints(), unknown);
  TORCH_CHECK_VALUE(!exists(checkpoints) || is_directory(checkpoints), files.checkpoints().string(), " is no folder");
  for (const auto& path : {files.metrics(), files.tokenizer(), files.published(), files.report(), files.lock()}) {
    // A link to a file that doesn't exist yet is allowed if its folder exists: the file is created there.
    if (dangles(path) && !exists(megatron_cpp::internal::link_target(path).parent_path(), unknown)) {
      refuse_dangling_link(path);
    }
    const auto status = std::filesystem::status(path, unknown);
    const bool is_read_again = path != files.report() && path != files.lock();
    TORCH_CHECK_VALUE(!exists(status) || is_regular_file(status) || !(is_read_again || is_directory(status)),
                      path.string(), " is no regular file");
  }
}

void remove_run_file(const std::filesystem::path& path) {
  const auto target = megatron_cpp::internal::link_target(path);
  std::error_code not_there;
  if (is_regular_file(target, not_there)) std::filesystem::remove(target);
}

void remove_earlier_run(const RunFiles& files) {
  remove_checkpoints(files.checkpoints());
  for (const auto& path : {files.metrics(), files.report(), files.tokenizer(), files.published()}) {
    remove_run_file(path);
  }
  for (const auto& [folder, beginning] :
       {std::pair(files.tensorboard(), "events.out.tfevents."), std::pair(files.profiles(), "rank-")}) {
    std::error_code not_a_folder;
    for (const auto& file : std::filesystem::directory_iterator(folder, not_a_folder)) {
      if (file.path().filename().string().starts_with(beginning)) std::filesystem::remove(file.path());
    }
  }
}

RunLock::RunLock(const std::filesystem::path& path, std::string_view activity)
    : file_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
  const auto reason = [] { return std::generic_category().message(errno); };
  if (file_ < 0) throw WriteError(fmt::format("cannot write {}: {}", path.string(), reason()));
  if (flock(file_, LOCK_EX | LOCK_NB) == 0) return;
  if (errno == EWOULDBLOCK) {
    close(file_);
    TORCH_CHECK_VALUE(false, "another process ", activity, " in ", path.parent_path().string(), ": it holds ",
                      path.string());
  }
  TORCH_WARN("cannot lock ", path.string(), ": ", reason(), "; nothing keeps a second process out of this folder");
}

RunLock::~RunLock() { close(file_); }

std::string model_text(const RunConfig& config) {
  if (config.published_form) return config.published_form->to_text();
  auto json = nlohmann::ordered_json::object();
  for (const auto& [key, value] : settings(config)) {
    const auto section = key.substr(0, key.find('.'));
    if (section == "model" || section == "vision") json[section][key.substr(section.size() + 1)] = value;
  }
  return json.dump();
}

std::string to_text(const RunState& state) {
  auto data = nlohmann::ordered_json::object();
  for (const auto& [name, where] : state.data) {
    data[name] = {{"epoch", where.sampler.epoch},
                  {"position", where.sampler.position},
                  {"num_samples", where.sampler.num_samples},
                  {"credit", where.credit}};
  }
  nlohmann::ordered_json json{{"data", std::move(data)},
                              {"optimizer_steps", state.optimizer_steps},
                              {"repeated_steps", state.step_counts.repeated},
                              {"skipped_steps", state.step_counts.skipped},
                              {"consumed_tokens", state.consumed.tokens},
                              {"consumed_samples", state.consumed.samples}};
  if (state.tokenizer) {
    json["tokenizer"] = {{"hash", state.tokenizer->hash}, {"vocabulary_size", state.tokenizer->vocabulary_size}};
  }
  return json.dump();
}

RunState run_state_from_text(const std::string& text, const std::string& where,
                             const CheckpointConfiguration& configuration, const std::string& model) {
  RunState state;
  try {
    const auto json = nlohmann::json::parse(text);
    std::vector<std::string> kept;
    for (const auto& [key, value] : configuration) kept.push_back(key + "=" + value);
    if (configuration.empty()) {
      for (const auto& entry : json.at("settings")) {
        kept.push_back(entry.at(0).get<std::string>() + "=" + entry.at(1).get<std::string>());
      }
    }
    state.config = run_config_from_settings(kept, PublishedForm::from_text(model, where));
    if (const auto sampler = json.find("sampler"); sampler != json.end()) {
      // Of a version whose passes had other orders: the next one begins.
      state.data[kDirectoryDataSet].sampler = {integer_at(*sampler, "epoch") + 1, 0};
    } else {
      for (const auto& [name, position] : json.at("data").items()) {
        state.data[name] = {
            {integer_at(position, "epoch"), integer_at(position, "position"), integer_at(position, "num_samples")},
            position.at("credit").get<double>()};
      }
    }
    state.optimizer_steps = integer_at(json, "optimizer_steps");
    if (json.contains("skipped_steps")) {
      state.step_counts = {integer_at(json, "repeated_steps"), integer_at(json, "skipped_steps")};
    }
    if (json.contains("consumed_tokens")) {
      state.consumed = {integer_at(json, "consumed_tokens"), integer_at(json, "consumed_samples")};
    }
    if (const auto found = json.find("tokenizer"); found != json.end()) {
      state.tokenizer = {found->at("hash").get<std::string>(), integer_at(*found, "vocabulary_size")};
    }
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK_VALUE(false, where, ": its state is not that of a training run: ", error.what());
  } catch (const c10::ValueError& error) {
    TORCH_CHECK_VALUE(false, where, ": its state is not that of a training run: ", error.what_without_backtrace());
  }
  return state;
}

RunState run_state_of(const CheckpointReader& reader) {
  return run_state_from_text(reader.state(), reader.folder().string(), reader.configuration(), reader.model());
}

void check_resumable(const RunConfig& began, const RunConfig& now, const std::string& where) {
  // Settings that define the weights, the sampler's order (seed), the parameters that have optimizer moments in the
  // checkpoint (freeze, whether multi-token prediction is trained) and the tokenizer.
  const bool trained_mtp = began.model.mtp_loss_scaling_factor > 0.0;
  const bool trains_mtp = now.model.mtp_loss_scaling_factor > 0.0;
  const auto is_fixed = [&](const std::string& key) {
    static const std::set<std::string> free = {"model.init_std",
                                               "model.moe_aux_loss_coeff",
                                               "model.moe_group_balance_loss_coeff",
                                               "model.moe_group_balance_groups",
                                               "model.moe_z_loss_coeff",
                                               "model.moe_router_bias_update_rate"};
    if (key == "data.vocabulary_size" || key == "data.tokenizer" || key == "training.seed") return true;
    if (key == "model.mtp_loss_scaling_factor") return trained_mtp != trains_mtp;
    return (key.starts_with("model.") || key.starts_with("vision.")) && !free.contains(key);
  };
  const auto all = settings(now);
  const std::map<std::string, std::string> after(all.begin(), all.end());
  std::string changed;
  for (const auto& [key, value] : settings(began)) {
    const auto found = after.find(key);  // none: of a shape that is given by model.config now, which has changed then
    if (!is_fixed(key) || found == after.end() || found->second == value) continue;
    changed += fmt::format("{}{} {} (was {})", changed.empty() ? "" : ", ", key, found->second, value);
  }
  TORCH_CHECK_VALUE(changed.empty(), "the run can't go on from ", where, " with ", changed,
                    ": give the old value, or another run.directory; run.fresh=true starts over");
}

std::string bytes_of_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK_VALUE(file.is_open(), "cannot read ", path.string(), ": ", std::strerror(errno));
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TokenizerMark mark_of(const std::filesystem::path& path, const Tokenizer& tokenizer) {
  const auto bytes = bytes_of_file(path);
  std::ostringstream hash;
  hash << std::hex << std::setw(16) << std::setfill('0') << parallel::stable_hash(bytes);
  return {hash.str(), tokenizer.vocab_size()};
}

Tokenizer load_tokenizer(const std::filesystem::path& path, const RunState& state,
                         const std::filesystem::path& checkpoint) {
  auto tokenizer = Tokenizer::load(path);
  if (!state.tokenizer) return tokenizer;
  const auto found = mark_of(path, tokenizer);
  TORCH_CHECK_VALUE(found == *state.tokenizer, path.string(), " (hash ", found.hash, ", ", found.vocabulary_size,
                    " pieces) is not the tokenizer of ", checkpoint.string(), " (hash ", state.tokenizer->hash, ", ",
                    state.tokenizer->vocabulary_size, " pieces)");
  return tokenizer;
}

std::filesystem::path checkpoints_of(const std::filesystem::path& path) {
  std::error_code unknown;
  const auto inside = RunFiles{path}.checkpoints();
  return std::filesystem::is_directory(inside, unknown) ? inside : path;
}

std::filesystem::path find_checkpoint_together(const std::filesystem::path& path, const parallel::GroupPtr& world) {
  std::string found;
  parallel::agree_on(
      [&] {
        if (world->getRank() == 0) found = find_checkpoint(path).string();
      },
      world);
  const std::filesystem::path folder = parallel::broadcast_text(found, 0, world);
  try {
    verify_checkpoint(folder, world);
  } catch (const parallel::AgreedError& error) {
    const auto beside = find_whole_checkpoint(folder.parent_path(), world).whole;
    if (!beside) throw;  // it is in no folder of checkpoints
    parallel::agree(
        false, fmt::format("{}; the newest whole one beside it is {}", parallel::error_text(error), beside->string()),
        world);
  }
  return folder;
}

std::filesystem::path tokenizer_of_checkpoint(const std::filesystem::path& given, const std::filesystem::path& folder) {
  const auto parent = [](const std::filesystem::path& path) {
    auto absolute = current_folder() / path;
    while (absolute.has_relative_path() && (absolute.filename().empty() || absolute.filename() == ".")) {
      absolute = absolute.parent_path();
    }
    return absolute.parent_path();
  };
  // `given` is a step folder, `latest`, or the folder that contains them.
  std::error_code unknown;
  const bool holds_steps = equivalent(given, folder.parent_path(), unknown);
  const auto run = holds_steps ? parent(given) : parent(parent(given));
  auto own = RunFiles{folder.parent_path().parent_path()}.tokenizer();
  for (const auto& directory : {run, run.lexically_normal()}) {
    const auto beside = RunFiles{directory}.tokenizer();
    if (exists(beside, unknown)) return equivalent(beside, own, unknown) ? own : beside;
  }
  return own;
}

PublishedConfig published_config(const RunConfig& config, const Tokenizer& tokenizer) {
  const auto model = model_config(config, tokenizer.vocab_size());
  PublishedConfig published;
  published.text = model.text;
  published.vision = model.vision;
  published.projector_bias = model.projector_bias;
  published.image_token_id = tokenizer.id_of("<im_patch>");
  published.image_start_token_id = tokenizer.id_of("<im_start>");
  published.patch_start_token_id = tokenizer.id_of("<patch_start>");
  published.pad_token_id = tokenizer.pad_id();
  published.eos_token_ids = {tokenizer.eos_id()};
  published.max_position_embeddings = config.training.sequence_length;
  published.dtype = "float32";
  return published;
}

int64_t padding_multiple(int tensor_parallel_size) {
  return std::lcm<int64_t>(64, std::lcm<int64_t>(tensor_parallel_size, 16));
}

std::optional<PublishedCheckpoint> published_weights(const RunConfig& config) {
  if (config.model.from.empty()) return std::nullopt;
  PublishedCheckpoint checkpoint(config.model.from);
  if (!checkpoint.has_weights()) return std::nullopt;
  return checkpoint;
}

void begin_parameters(const std::vector<ParameterShard>& parameters, const RunConfig& config,
                      const std::optional<PublishedCheckpoint>& published) {
  initialize_parameters(parameters, static_cast<uint64_t>(config.training.seed));
  if (published) published->load(parameters);
}

BatchLoaderOptions loader_options(const RunConfig& config, const Tokenizer& tokenizer, int tensor_parallel_size) {
  BatchLoaderOptions options;
  options.format = sample_format(tokenizer, crop_options(config));
  options.packing.max_length = config.training.sequence_length;
  options.packing.pad_to = padding_multiple(tensor_parallel_size);
  options.packing.pad_token = tokenizer.pad_id();
  options.packing.oversize = config.data.oversize;
  options.global_batch_size = config.training.global_batch_size;
  options.micro_batch_size = config.training.micro_batch_size;
  options.seed = static_cast<uint64_t>(config.training.seed);
  options.mm_encoder_tp_mode = config.parallel.mm_encoder_tp_mode;
  options.num_decoding_threads = config.data.decoding_threads;
  return options;
}

CaptionerOptions captioner_options(const Tokenizer& tokenizer, const CropOptions& crops) {
  CaptionerOptions options;
  options.format = sample_format(tokenizer, crops);
  options.pad_id = tokenizer.pad_id();
  options.end_ids = {options.format.end_id};
  constexpr std::string_view kEndOfTurn = "<|im_end|>";  // of chat templates
  if (tokenizer.has(kEndOfTurn)) options.end_ids.push_back(tokenizer.id_of(kEndOfTurn));
  const auto& ids = options.format.picture_ids;
  options.not_text = {ids.im_start,  ids.im_patch,      ids.im_end,         ids.patch_start,
                      ids.patch_end, ids.patch_newline, tokenizer.bos_id(), tokenizer.pad_id()};
  return options;
}

CaptionerOptions captioner_options(const RunConfig& config, const Tokenizer& tokenizer, int tensor_parallel_size) {
  auto options = captioner_options(tokenizer, crop_options(config));
  options.pad_to = config.parallel.sequence_parallel ? tensor_parallel_size : 1;
  options.max_new_tokens = config.report.max_new_tokens;
  return options;
}

}  // namespace megatron_cpp::step37
