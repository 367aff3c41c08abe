#include "step37/program/convert.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <charconv>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/agree.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "step37/data/preprocessor_config.h"
#include "step37/program/run_config.h"
#include "step37/program/shell_text.h"
#include "step37/program/training_run.h"
#include "step37/published_checkpoint.h"
#include "step37/published_tensors.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;

/// The dimension with the most elements is split: a rank's rows of it, [begin, end).
Box own_part(const std::vector<int64_t>& shape, const parallel::GroupPtr& world) {
  if (shape.empty()) return Box::whole(shape);
  size_t dim = 0;
  for (size_t i = 1; i < shape.size(); ++i) {
    if (shape[i] > shape[dim]) dim = i;
  }
  const auto size = static_cast<int64_t>(world->getSize());
  const auto rank = static_cast<int64_t>(world->getRank());
  return Box::rows(shape, static_cast<int64_t>(dim), {shape[dim] * rank / size, shape[dim] * (rank + 1) / size});
}

/// optimizer.safetensors in a published folder: AdamW's moments, "exp_avg/NAME" and "exp_avg_sq/NAME" by published
/// names, and in its metadata "step", how many steps it has made. scripts/from_megatron.py writes it.
class OptimizerFile {
 public:
  /// @throws c10::ValueError naming the file, and a tensor that isn't a moment of one of `weights`, in its shape.
  OptimizerFile(const fs::path& folder, const PublishedTensors& weights) : file_(folder / kName) {
    const auto& metadata = file_.metadata();
    const auto found = metadata.find("step");
    const auto text = found == metadata.end() ? std::string() : found->second;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), step_);
    TORCH_CHECK_VALUE(error == std::errc() && end == text.data() + text.size() && step_ >= 0, file_.path().string(),
                      ": step in its metadata is \"", text, "\", not a number of steps");
    for (const auto& [key, entry] : file_.entries()) {
      const auto id = id_of(key);
      const auto weight = id ? weights.find(id->name) : weights.end();
      TORCH_CHECK_VALUE(weight != weights.end(), file_.path().string(), ": tensor ", key,
                        " is not a moment of a tensor of the model");
      TORCH_CHECK_VALUE(entry.shape == weight->second && entry.dtype == at::kFloat, file_.path().string(), ": tensor ",
                        key, " is ", entry.dtype_name, " of shape ", at::IntArrayRef(entry.shape),
                        ", expected F32 of shape ", at::IntArrayRef(weight->second));
      moments_.emplace_back(*id, key);
    }
  }

  static bool is_in(const fs::path& folder) {
    std::error_code unknown;
    return fs::exists(folder / kName, unknown);
  }

  int64_t step() const { return step_; }
  const std::vector<std::pair<TensorId, std::string>>& moments() const { return moments_; }  ///< and their keys
  const std::vector<int64_t>& shape(const std::string& key) const { return file_.entries().at(key).shape; }
  at::Tensor read(const std::string& key, const Box& box) const { return file_.read(key, box); }

 private:
  static constexpr const char* kName = "optimizer.safetensors";

  static std::optional<TensorId> id_of(const std::string& key) {
    for (const auto& [prefix, role] :
         {std::pair{std::string("exp_avg/"), TensorRole::kExpAvg}, {"exp_avg_sq/", TensorRole::kExpAvgSq}}) {
      if (key.starts_with(prefix)) return TensorId(key.substr(prefix.size()), role);
    }
    return std::nullopt;
  }

  SafetensorsFile file_;
  int64_t step_ = -1;
  std::vector<std::pair<TensorId, std::string>> moments_;
};

/// The state of a run that goes on from `from` with this configuration; its data begin from the start.
RunState begun_state(const fs::path& config, const fs::path& to, const PublishedCheckpoint& source) {
  RunState state;
  state.config = load_run_config(config, {"run.directory=" + to.string()});
  const auto& published = state.config.published;
  TORCH_CHECK_VALUE(published && published_tensors(*published) == published_tensors(source.config()), config.string(),
                    ": model.from or model.config must give the shape of the model in ", source.folder().string());
  return state;
}

/// Of a run that has made no step: what a checkpoint must say to be captioned with.
RunState imported_state(const fs::path& from, const VisionConfig& vision) {
  const auto crops = read_preprocessor_config(from, vision.image_size, vision.patch_size);
  RunState state;
  state.config.training.steps = 1;  // of a training to come: 0 isn't valid
  state.config.data.crops = crops.with_crops;
  state.config.data.crop_side = crops.crop_side;
  state.config.data.max_side = crops.max_side;
  return state;
}

void import_checkpoint(const fs::path& from, const fs::path& to, const fs::path& config,
                       const parallel::GroupPtr& world) {
  CheckpointContents contents;
  parallel::agree_on(
      [&] {
        const PublishedCheckpoint source(from);
        for (const auto& [name, shape] : source.tensors()) {
          const auto part = own_part(shape, world);
          const auto values = source.read(name, part);
          // float64 doesn't occur in published checkpoints; it would lose bits.
          contents.tensors.push_back({name, values.to(at::kFloat), shape, {part}});
        }
        auto state = config.empty() ? imported_state(from, source.config().vision) : begun_state(config, to, source);
        if (OptimizerFile::is_in(from)) {
          const OptimizerFile optimizer(from, source.tensors());
          for (const auto& [id, key] : optimizer.moments()) {
            const auto part = own_part(optimizer.shape(key), world);
            contents.tensors.push_back({id, optimizer.read(key, part), optimizer.shape(key), {part}});
          }
          contents.step = state.optimizer_steps = optimizer.step();
        }
        contents.state = to_text(state);
        contents.configuration = settings(state.config);
        contents.model = source.form().to_text();
        if (world->getRank() != 0) return;
        check_new_folder(to);
        fs::create_directories(to);
        copy_tokenizer_files(from, to);
        if (!config.empty()) write_file(RunFiles{to}.published(), contents.model + "\n");
      },
      world);
  save_checkpoint(RunFiles{to}.checkpoints(), contents, world);
}

/// How to write the model of a training checkpoint, and the tensors that it has.
struct TrainedModel {
  PublishedForm form;
  PublishedTensors tensors;
  CropOptions crops;
};

TrainedModel model_of(const CheckpointReader& reader, const fs::path& run_directory) {
  TrainedModel model;
  for (const auto& id : reader.tensors()) {
    if (id.role == TensorRole::kParameter) model.tensors[id.name] = reader.global_shape(id);
  }
  const auto state = run_state_of(reader);
  model.crops = crop_options(state.config);
  if (state.config.published_form) {
    model.form = *state.config.published_form;
  } else {
    const auto tokenizer = load_tokenizer(RunFiles{run_directory}.tokenizer(), state, reader.folder());
    model.form.config = hub_form(published_config(state.config, tokenizer));
  }
  return model;
}

}  // namespace

void export_checkpoint(const fs::path& from, const fs::path& to, const parallel::GroupPtr& world,
                       WritePublishedOptions options) {
  const auto folder = find_checkpoint_together(checkpoints_of(from), world);
  std::optional<CheckpointReader> reader;
  TrainedModel model;
  fs::path run_directory;
  parallel::agree_on(
      [&] {
        reader.emplace(folder);
        run_directory = tokenizer_of_checkpoint(checkpoints_of(from), folder).parent_path();
        model = model_of(*reader, run_directory);
      },
      world);
  const auto read = [&](const std::string& name) {
    const auto& shape = model.tensors.at(name);
    auto values = at::empty(shape, at::kFloat);
    reader->load({{name, values, shape, {Box::whole(shape)}}}, UnusedTensors::kAllow);
    return values;
  };
  options.files = {{kPreprocessorConfig, preprocessor_config(model.crops)}};
  write_published_checkpoint(to, model.form, model.tensors, read, run_directory, world, options);
}

int convert(parallel::Runtime& runtime, const ConvertArguments& arguments) {
  check_no_tilde("--from", arguments.from);
  check_no_tilde("--to", arguments.to);
  check_no_tilde("--config", arguments.config);
  const auto& dtype = arguments.dtype;
  TORCH_CHECK_VALUE(dtype.empty() || dtype == "float32" || dtype == "bfloat16", "--dtype ", dtype,
                    ": expected float32 or bfloat16");
  auto layout = arguments.layout;
  TORCH_CHECK_VALUE(layout.empty() || layout == "published" || layout == "training", "--layout ", layout,
                    ": expected published or training");
  const auto groups = parallel::make_process_groups(runtime, {.dp = runtime.size()});
  const auto& world = groups.world;
  bool from_published = false;
  parallel::agree_on(
      [&] {
        std::error_code unknown;
        TORCH_CHECK_VALUE(fs::is_directory(arguments.from, unknown), "--from ", arguments.from.string(),
                          " is no folder");
        from_published = PublishedCheckpoint::is_at(arguments.from);
        if (layout.empty()) layout = from_published ? "training" : "published";
        TORCH_CHECK_VALUE(from_published || layout == "published", "--from ", arguments.from.string(),
                          " has the training layout already");
        TORCH_CHECK_VALUE(layout == "training" || arguments.config.empty(), "--config ", arguments.config.string(),
                          ": a published result has no run");
        TORCH_CHECK_VALUE(layout == "published" || dtype.empty() || dtype == "float32", "--dtype ", dtype,
                          ": training checkpoints are in float32");
        check_new_folder(arguments.to);
      },
      world);
  const WritePublishedOptions options{.dtype = dtype, .max_shard_size = arguments.max_shard_size};
  if (layout == "training") {
    import_checkpoint(arguments.from, arguments.to, arguments.config, world);
  } else if (from_published) {
    std::optional<PublishedCheckpoint> source;
    parallel::agree_on([&] { source.emplace(arguments.from); }, world);
    const auto tensors = source->tensors();
    const auto read = [&](const std::string& name) { return source->read(name, Box::whole(tensors.at(name))); };
    write_published_checkpoint(arguments.to, source->form(), tensors, read, arguments.from, world, options);
  } else {
    export_checkpoint(arguments.from, arguments.to, world, options);
  }
  parallel::destroy_process_groups(runtime, groups);
  return 0;
}

}  // namespace megatron_cpp::step37
