#include "step37/program/pretrain.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/checkpoint_folder.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "megatron_cpp/training/product_rate.h"
#include "megatron_cpp/training/trainer.h"
#include "megatron_cpp/training/training_loop.h"
#include "parallel/activity.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/runtime.h"
#include "step37/checkpoint_names.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/picture_features.h"
#include "step37/data/utf8.h"
#include "step37/program/convert.h"
#include "step37/program/open_data_set.h"
#include "step37/program/report.h"
#include "step37/program/report_pictures.h"
#include "step37/program/run_config.h"
#include "step37/program/run_data.h"
#include "step37/program/run_metrics.h"
#include "step37/program/run_records.h"
#include "step37/program/run_saver.h"
#include "step37/program/shell_text.h"
#include "step37/program/start_run.h"
#include "step37/program/step_cost.h"
#include "step37/program/stop_signals.h"
#include "step37/program/training_run.h"
#include "step37/published_checkpoint.h"

namespace megatron_cpp::step37 {
namespace {

constexpr int64_t kSamplesLookedAt = 20'000;  // of millions, to look at all would take hours

/// The path of this program, for a shell in the working directory.
std::string this_program() {
  std::error_code error;
  const auto path = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? "step37" : shell_quoted_path(std::filesystem::proximate(path, error));
}

class PretrainRun {
 public:
  PretrainRun(parallel::Runtime& runtime, const parallel::ProcessGroups& groups, RunConfig config,
              ProgressStyle progress)
      : runtime_(runtime),
        groups_(groups),
        config_(std::move(config)),
        files_{config_.run.directory},
        progress_style_(progress),
        faults_(/*watch_changes=*/groups_.dp->getRank() == 0),
        saver_(files_.checkpoints(), groups_.world, config_.checkpoint) {}

  int run() {
    check_scales();
    open_data();
    prepare_directory();
    if (!config_.run.fresh) resume_from_ = find_checkpoint();
    RunState state;
    if (resume_from_) state = read_state();
    if (state.optimizer_steps < config_.training.steps) open_features();
    prepare_tokenizer(state);
    say_what_is_left_out();
    build_model();
    if (resume_from_) load_checkpoint(state);
    const int64_t done = state.optimizer_steps;
    if (done >= config_.training.steps) {
      say(fmt::format("this run has finished: step {} of {} is in {}; run.fresh=true starts over", done,
                      config_.training.steps, files_.checkpoints().string()));
      // Otherwise the next save does.
      parallel::agree_on(
          [&] {
            if (is_main()) megatron_cpp::internal::finish_killed_save(*resume_from_);
          },
          groups_.world);
    } else {
      check_tower();
      check_export();
      keep_indices();
      if (train(state) != 0) return parallel::kInterruptedStatus;
    }
    write_report();
    write_export(done);
    say_what_to_do_next();
    return 0;
  }

 private:
  bool is_main() const { return runtime_.rank() == 0; }
  /// Whether this rank packs batches for its tensor-parallel group.
  bool packs() const { return groups_.tp->getRank() == 0; }

  /// What rank 0 gives, on every rank. Collective.
  bool main_says(bool value) const { return parallel::broadcast_text(value ? "y" : "", 0, groups_.world) == "y"; }

  void say(const std::string& text) const {
    if (!is_main()) return;
    std::puts(text.c_str());
    std::fflush(stdout);
  }

  void say_what_to_do_next() const {
    if (!is_main()) return;
    say(fmt::format("\nThe report is {}: open it in a browser.", files_.report().string()));
    const auto latest = files_.checkpoints() / "latest";
    const auto checkpoint = std::filesystem::exists(latest) ? latest : files_.checkpoints();
    const auto picture = first_picture();
    if (picture.empty()) return;
    say(fmt::format("To caption a picture, one of these or your own:\n  {} generate --checkpoint {} --image {}",
                    this_program(), shell_quoted_path(checkpoint), shell_quoted_path(picture)));
  }

  /// Called before anything is read or removed. Parameter names don't depend on the size of the vocabulary.
  void check_scales() const {
    const auto& options = config_.training;
    if (options.learning_rate_scales.empty() && options.weight_decay_scales.empty()) return;
    const Step37Model model(model_config(config_, config_.data.vocabulary_size), groups_);
    std::vector<std::string> names;
    for (const auto& shard : parameter_shards(*model)) names.push_back(shard.name);
    options.check_prefixes(names);
  }

  void prepare_directory() {
    parallel::agree_on(
        [&] {
          if (!is_main()) return;
          check_run_files(files_);
          std::error_code error;
          std::filesystem::create_directories(files_.directory, error);
          if (error) {
            throw WriteError(
                fmt::format("run.directory {} cannot be made: {}", files_.directory.string(), error.message()));
          }
          lock_.emplace(files_.lock());
        },
        groups_.world);
  }

  /// The checkpoint of the highest step. If its files are damaged, an older one takes its place only when asked to:
  /// whoever runs this may have a copy, and steps would be lost.
  std::optional<std::filesystem::path> find_checkpoint() const {
    const auto search = find_whole_checkpoint(files_.checkpoints(), groups_.world);
    if (search.damaged.empty()) return search.whole;
    const auto older = search.whole->string();
    parallel::agree(config_.checkpoint.pass_over_damaged,
                    fmt::format("{}; checkpoint.pass_over_damaged=true goes on from {}, which is whole",
                                search.damaged.front(), older),
                    groups_.world);
    for (const auto& reason : search.damaged) {
      if (!is_main()) break;
      TORCH_WARN("passing over a damaged checkpoint: ", reason);
    }
    return search.whole;
  }

  void open_data() {
    const parallel::Phase phase("opening the data sets");
    data_ = step37::open_data(runtime_, groups_, config_);
    for (const auto& sentence : data_.summary) say(sentence);
  }

  /// A picture file to train on; empty if none is found at once. For rank 0.
  std::filesystem::path first_picture() const {
    for (const auto& data_set : data_.training) {
      const auto sample = data_set.samples->sample(0, loader_options_.format);
      if (!sample.pictures.empty() && sample.pictures.front().place.bytes == 0) return sample.pictures.front().path;
    }
    return {};
  }

  /// Refuses features that aren't this run's as early as can be known.
  void open_features() {
    if (config_.data.features.empty()) return;
    const parallel::Phase phase("opening the features");
    parallel::agree_on(
        [&] { features_.emplace(config_.data.features, picture_names(config_), feature_source(config_)); },
        groups_.world);
    parallel::agree_on(
        [&] {
          const WaitForAll wait(runtime_);
          if (is_main()) check_pictures_have_features();
        },
        groups_.world);
  }

  void check_pictures_have_features() const {
    SampleFormat format;
    format.crops = crop_options(config_);
    format.features = &*features_;
    int64_t num_pictures = 0;
    LeftOut missing;
    for (const auto* sets : {&data_.training, &data_.held_out}) {
      for (const auto& [samples, index] : spread_samples(*sets, kSamplesLookedAt)) {
        for (const auto& picture : samples->pictures(index, format)) {
          ++num_pictures;
          if (features_->find(picture) == nullptr) missing.add(features_->printable_name(picture));
        }
      }
    }
    TORCH_CHECK_VALUE(missing.count == 0, "data.features ", printable(config_.data.features), " lacks ", missing.count,
                      " of the ", num_pictures, " pictures that were looked at (first: ", missing.first,
                      "): ", features_->remedy());
  }

  /// Refuses features of a tower with other weights than the run's, which are loaded now.
  void check_tower() const {
    if (!features_) return;
    const auto checksum = tower_checksum(*model_->vision_model, groups_.tp);
    parallel::agree_on([&] { features_->check_tower(checksum); }, groups_.world);
  }

  void prepare_tokenizer(const RunState& state) {
    const parallel::Phase phase("preparing the tokenizer");
    parallel::agree_on(
        [&] {
          const WaitForAll wait(runtime_);
          if (!is_main()) return;
          if (resume_from_) {
            // A new tokenizer would give the pieces other ids than the weights were trained with.
            TORCH_CHECK_VALUE(std::filesystem::exists(files_.tokenizer()), files_.tokenizer().string(),
                              " is missing: the run can't go on with another tokenizer; run.fresh=true starts over");
            return;
          }
          const auto tokenizer = first_tokenizer(config_, data_);
          // Only now, when all input is known to be usable.
          if (config_.run.fresh) remove_earlier_run(files_);
          tokenizer.save(files_.tokenizer());
          if (config_.published_form) write_file(files_.published(), config_.published_form->to_text() + "\n");
        },
        groups_.world);
    parallel::agree_on(
        [&] {
          const auto path = files_.tokenizer();
          tokenizer_.emplace(resume_from_ ? load_tokenizer(path, state, *resume_from_) : Tokenizer::load(path));
          tokenizer_mark_ = mark_of(path, *tokenizer_);
          check_chat_symbols(config_.data.sets, *tokenizer_);
          loader_options_ = loader_options(config_, *tokenizer_, groups_.grid.tp);
        },
        groups_.world);
    for (const auto& data_set : data_.training) {
      loader_options_.indices.push_back(files_.picture_index(data_set.name));
    }
    loader_options_.device = runtime_.device();
    loader_options_.max_unreadable = data_.max_unreadable;
    loader_options_.balance = config_.data.balance;
    if (features_) loader_options_.format.features = &*features_;
    loader_options_.pack_cost = [model = model_config(config_, tokenizer_->vocab_size()), grid = groups_.grid,
                                 crops = crop_options(config_), runs_tower = !features_](const PicturePack& pack) {
      return pack_flops(model, grid, pack, crops, runs_tower);
    };
  }

  void say_what_is_left_out() {
    const parallel::Phase phase("measuring the samples");
    parallel::agree_on(
        [&] {
          const WaitForAll wait(runtime_);
          if (!is_main()) return;
          if (config_.data.oversize == OversizePolicy::kExtend) return;
          int64_t num_samples = 0;
          int64_t left_out = 0;
          for (const auto* sets : {&data_.training, &data_.held_out}) {
            const auto samples = spread_samples(*sets, kSamplesLookedAt);
            num_samples += std::ssize(samples);
            left_out += num_too_long(samples, loader_options_);
          }
          if (left_out > 0) {
            say(
                fmt::format("samples left out because they take more than the {} positions of "
                            "training.sequence_length: {} of the {} that were looked at",
                            config_.training.sequence_length, left_out, num_samples));
          }
        },
        groups_.world);
  }

  /// Writes the indices of picture folders for the next start.
  void keep_indices() {
    parallel::agree_on(
        [&] {
          for (const auto& [file, bytes] : data_.indices) write_file(file, bytes);
        },
        groups_.world);
    data_.indices.clear();
  }

  void build_model() {
    const parallel::Phase phase("building the model");
    model_ = Step37Model(model_config(config_, tokenizer_->vocab_size()), groups_);
    model_->to(runtime_.device(), config_.training.precision);
    parameters_ = parameter_shards(*model_);
    TrainerOptions options;
    options.gradients = gradient_buffer_options(config_.training);
    options.check_replicas = config_.training.check_replicas;
    options.not_finite = config_.training.not_finite;
    options.max_skipped_steps = config_.training.max_skipped_steps;
    options.loss_spike = config_.training.loss_spike;
    options.adamw = config_.training;
    options.learning_rate = learning_rate_schedule(config_);
    options.clip_grad_norm = config_.training.clip_grad_norm;
    options.auxiliary_losses = model_->config().auxiliary_losses();
    const auto moe_layers = model_->language_model->decoder->moe_layers();
    if (!moe_layers.empty()) expert_balance_ = std::make_shared<ExpertBalance>(moe_layers, groups_);
    options.expert_balance = expert_balance_;
    options.before_update = [this] { saver_.synchronize_staging(); };
    trainer_ = std::make_unique<Trainer>(parameters_, groups_, options);
    parallel::agree_on(
        [&] {
          std::optional<PublishedCheckpoint> published;
          if (!resume_from_) published = published_weights(config_);
          trainer_->optimizer().fill_parameters(
              parameters_, [&](const ParameterShard& shard) { begin_parameters({shard}, config_, published); });
        },
        groups_.world);
    const auto& grid = groups_.grid;
    const auto experts = model_->config().text.moe ? fmt::format(", ep {}, etp {}", grid.ep, grid.expert_tp()) : "";
    say(fmt::format("{} parameters on {} ranks: tp {}, dp {}{}{}{}", num_parameters(), runtime_.size(), grid.tp,
                    grid.dp, experts, config_.parallel.sequence_parallel ? ", sequence parallel" : "",
                    loss_text(model_->config().execution.loss_chunk)));
  }

  int64_t num_parameters() const {
    std::map<std::string, int64_t> elements;  // several segments may be boxes of one tensor
    for (const auto& shard : parameters_) {
      for (const auto& segment : shard.segments) {
        elements[segment.name] = c10::multiply_integers(segment.global_shape);
      }
    }
    int64_t total = 0;
    for (const auto& [name, count] : elements) total += count;
    return total;
  }

  std::vector<ShardedTensor> tensors() const {
    return sharded_tensors(parameters_, trainer_->optimizer(), published_name, groups_);
  }

  RunState read_state() const {
    RunState state;
    parallel::agree_on(
        [&] {
          const CheckpointReader reader(*resume_from_);
          state = run_state_of(reader);
          check_resumable(state.config, config_, resume_from_->string());
        },
        groups_.world);
    return state;
  }

  void load_checkpoint(const RunState& state) {
    const parallel::Phase phase("loading the checkpoint");
    parallel::agree_on([&] { CheckpointReader(*resume_from_).load(tensors()); }, groups_.world);
    trainer_->write_parameters();
    trainer_->optimizer().set_num_steps(state.optimizer_steps);
    trainer_->set_step_counts(state.step_counts);
    resumed_steps_ = state.optimizer_steps;
    say(fmt::format("resuming after step {} from {}", state.optimizer_steps, resume_from_->string()));
  }

  CheckpointContents contents(int64_t step, const MixState& data) const {
    const RunState state{config_, data, step, tokenizer_mark_, trainer_->step_counts(), consumed_};
    return {.step = step,
            .state = to_text(state),
            .tensors = tensors(),
            .model = model_text(config_),
            .tokenizer = tokenizer_mark_.hash,
            .configuration = settings(config_)};
  }

  /// After each step: takes a checkpoint that is being written on. Returns the signal that asked any rank to stop,
  /// equal on all ranks; 0: none. Collective: all-reduces two numbers on the CPU.
  int poll_saver_and_signals() {
    const auto own = at::tensor({saver_.is_ready() ? 0 : 1, StopSignals::received()}, at::kInt);
    const auto all = parallel::all_reduce(own, groups_.world, parallel::Reduction::kMax);
    saver_.poll(/*all_are_ready=*/all[0].item<int>() == 0);
    return all[1].item<int>();
  }

  /// Floating-point operations a second that a rank could do. Collective.
  double peak_rate() const {
    const auto& device = runtime_.device();
    // On a CPU a small product, so that a run starts at once: it comes within some 20 % of a large one.
    const ProductShape shape = device.is_cpu() ? ProductShape{.rows = 256, .columns = 512, .inner = 1024}
                                               : ProductShape{.rows = 8192, .columns = 8192, .inner = 8192};
    return product_rate(config_.training.precision, shape, groups_.world, device);
  }

  /// Trains the remaining steps. Returns the signal that stopped it, after saving a checkpoint; 0: all steps are done.
  int train(const RunState& state) {
    std::optional<RunRecords> records;  // on rank 0
    parallel::agree_on(
        [&] {
          if (!is_main()) return;
          auto report = report_input();
          report.total_steps = config_.training.steps;
          records.emplace(files_, config_, std::move(report), state.optimizer_steps);
        },
        groups_.world);
    const double peak = peak_rate();
    consumed_ = state.consumed;
    const auto validation = pack_once(data_.held_out, config_.validation.packs, loader_options_, groups_);
    BatchLoader loader(loader_options_, data_.training, groups_, state.data, faults_);
    Progress progress(state.optimizer_steps + 1, config_.training.steps, progress_style_);
    const StopSignals signals;  // before this there is nothing to save
    int signal = 0;
    MixState data;  // after the step
    int64_t flops = 0;
    TrainingLoopCallbacks callbacks;
    callbacks.next_batch = [&] {
      const auto start = std::chrono::steady_clock::now();
      auto loaded = std::make_shared<BatchLoader::LoadedStep>(loader.next());
      const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      data = loaded->packs.next;
      flops = loaded->packs.cost;
      consumed_.tokens += loaded->packs.num_tokens;
      consumed_.samples += loaded->packs.num_samples;
      auto batch = step_batch(loaded);
      batch.values = data_values(loaded->packs, groups_.grid.dp, waited);
      return batch;
    };
    callbacks.validation_loss = [&] { return validation_loss(validation); };
    callbacks.report = [&](StepMetrics line) {
      if (!is_main()) return;
      const auto speed = speed_values(flops, line.seconds, runtime_.size(), peak, runtime_.device());
      line.values.insert(line.values.end(), speed.begin(), speed.end());
      records->write(line);
      progress.show(line);
    };
    callbacks.save = [&](int64_t step) {
      if (is_main() && step == config_.training.steps) records->remove_report();
      saver_.save(contents(step, data));
    };
    // A signal may reach the ranks at different steps, or only one rank.
    callbacks.stops = [&] {
      signal = poll_saver_and_signals();
      return signal != 0;
    };
    TrainingLoopOptions options;
    options.steps = config_.training.steps;
    options.validation_interval = config_.validation.interval;
    options.checkpoint_interval = config_.checkpoint.interval;
    if (config_.run.profile.first > 0) {
      const auto file = files_.profiles() / fmt::format("rank-{:04}.json", runtime_.rank());
      options.profile = std::make_shared<StepProfile>(config_.run.profile, file, runtime_.device());
    }
    const int64_t last_step = run_training_loop(*trainer_, options, callbacks);
    saver_.finish(contents(last_step, data));
    parallel::agree_on(
        [&] {
          if (is_main()) records->flush();
        },
        groups_.world);
    if (signal != 0) {
      say(fmt::format(
          "\nstopped by SIG{} after step {} of {}, which is saved: start the same command again, and it goes on",
          sigabbrev_np(signal), last_step, config_.training.steps));
    }
    return signal;
  }

  StepBatch step_batch(const std::shared_ptr<BatchLoader::LoadedStep>& loaded) {
    const auto& step = loaded->packs;
    return {.num_micro_batches = static_cast<int64_t>(step.micro_batches.size()),
            .num_loss_tokens = step.num_loss_tokens,
            .loss_sum =
                [this, loaded](int64_t micro_batch) {
                  const auto i = static_cast<size_t>(micro_batch);
                  return model_->loss_sum(
                      to_model_batch(loaded->packs.micro_batches[i].packed, loaded->images[i], runtime_.device()),
                      expert_balance_.get(), 1.0 / static_cast<double>(loaded->packs.num_loss_tokens));
                },
            .counts = data_counts(step, consumed_),
            .sample_names =
                [loaded](int64_t micro_batch) {
                  return loaded->packs.micro_batches[static_cast<size_t>(micro_batch)].samples;
                }};
  }

  /// Mean over the loss tokens of the held-out packs; nullopt if there are none.
  std::optional<double> validation_loss(const StepPacks& validation) {
    if (validation.num_loss_tokens == 0) return std::nullopt;
    const parallel::Phase phase("validating");
    const at::NoGradGuard no_grad;
    auto sum = at::zeros({1}, at::TensorOptions().device(runtime_.device()).dtype(at::kDouble));
    for (const auto& pack : validation.micro_batches) {
      auto images = load_pictures(pack.pictures, loader_options_.format, loader_options_.mm_encoder_tp_mode, groups_.tp,
                                  faults_, loader_options_.num_decoding_threads);
      sum.add_(model_->loss_sum(to_model_batch(pack.packed, std::move(images), runtime_.device())).tokens);
    }
    return parallel::all_reduce(sum, groups_.dp).item<double>() / static_cast<double>(validation.num_loss_tokens);
  }

  std::filesystem::path export_folder() const { return files_.directory / config_.checkpoint.export_to; }

  /// Refuses to start training whose result would have no place.
  void check_export() const {
    if (config_.checkpoint.export_to.empty()) return;
    parallel::agree_on(
        [&] {
          if (is_main()) check_new_folder(export_folder());
        },
        groups_.world);
  }

  /// @param steps_before  that were done when this run was started; a finished run has written its export.
  void write_export(int64_t steps_before) {
    if (config_.checkpoint.export_to.empty()) return;
    const bool is_done = steps_before >= config_.training.steps;
    if (main_says(is_main() && is_done && PublishedCheckpoint::is_at(export_folder()))) return;
    const parallel::Phase phase("exporting the model");
    export_checkpoint(files_.checkpoints(), export_folder(), groups_.world);
    say(fmt::format("The model in the published layout is in {}.", export_folder().string()));
  }

  /// Captions a few pictures and writes the report, unless a finished run has written it.
  void write_report() {
    const parallel::Phase phase("captioning for the report");
    const bool exists = main_says(is_main() && std::filesystem::exists(files_.report()));
    if (exists && trainer_->optimizer().num_steps() == resumed_steps_) return;
    auto shown = report_pictures(model_, config_, *tokenizer_, data_, groups_, runtime_.device(), faults_);
    parallel::agree_on(
        [&] {
          if (!is_main()) return;
          auto input = report_input();
          input.pictures = std::move(shown);
          write_file(files_.report(), render_report(input));
        },
        groups_.world);
  }

  ReportInput report_input() const {
    ReportInput input;
    input.title = "Step3.7 on " + data_title();
    input.settings = settings(config_);
    input.metrics = files_.metrics();
    input.num_parameters = num_parameters();
    input.num_ranks = runtime_.size();
    return input;
  }

  /// "data/tuxpaint", or the names of data.sets.
  std::string data_title() const {
    if (!config_.data.directory.empty()) return printable(config_.data.directory);
    std::string names;
    for (const auto& [name, section] : config_.data.sets) names += (names.empty() ? "" : ", ") + name;
    return names;
  }

  parallel::Runtime& runtime_;
  parallel::ProcessGroups groups_;
  RunConfig config_;
  RunFiles files_;
  ProgressStyle progress_style_;
  std::optional<RunLock> lock_;  ///< on world rank 0
  std::optional<std::filesystem::path> resume_from_;
  int64_t resumed_steps_ = -1;
  RunData data_;
  PictureFaults faults_;
  RunSaver saver_;
  std::optional<PictureFeatures> features_;  ///< while training, if data.features says so
  std::optional<Tokenizer> tokenizer_;
  TokenizerMark tokenizer_mark_;
  BatchLoaderOptions loader_options_;
  Step37Model model_{nullptr};
  std::vector<ParameterShard> parameters_;
  std::shared_ptr<ExpertBalance> expert_balance_;  ///< null without experts
  std::unique_ptr<Trainer> trainer_;
  ConsumedData consumed_;
};

}  // namespace

int pretrain(parallel::Runtime& runtime, const PretrainArguments& arguments) {
  const auto config = read_run_config(arguments.config, arguments.overrides, /*warns=*/runtime.rank() == 0);
  validate(config, runtime.size());
  runtime.choose_device({.device = config.run.device, .share_devices = config.run.share_gpus});
  const auto groups = make_run_groups(runtime, config);
  check_equal_settings(config, groups.world);
  const int status = PretrainRun(runtime, groups, config, arguments.progress).run();
  parallel::destroy_process_groups(runtime, groups);
  return status;
}

}  // namespace megatron_cpp::step37
