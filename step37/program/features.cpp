#include "step37/program/features.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <deque>
#include <future>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "parallel/activity.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/runtime.h"
#include "step37/data/picture_features.h"
#include "step37/data/picture_pack.h"
#include "step37/data/utf8.h"
#include "step37/program/run_config.h"
#include "step37/program/run_data.h"
#include "step37/program/shell_text.h"
#include "step37/program/start_run.h"
#include "step37/program/training_run.h"
#include "step37/vision/vision_tower.h"

namespace megatron_cpp::step37 {
namespace {

using Json = nlohmann::json;

constexpr int64_t kBytesOfChunk = int64_t{1} << 30;    // a file that has more takes no further picture
constexpr size_t kPicturesOfBatch = 16;                // that are decoded together
constexpr int64_t kPatchesOfBatch = int64_t{1} << 15;  // that the tower runs on at a time

/// Runs the tower on pictures, some at a time, while it decodes the next ones.
class TowerQueue {
 public:
  using Load = std::function<std::vector<ImageForInsert>(const std::vector<PictureReference>&)>;
  using Run = std::function<at::Tensor(const at::Tensor& pixels)>;

  /// @param load  makes the groups of load_pictures, by a thread of its own
  /// @param run   makes features [N, L, C] of pixels
  TowerQueue(const std::vector<PictureReference>& pictures, const CropOptions& crops, Load load, Run run)
      : pictures_(pictures), crops_(crops), load_(std::move(load)), run_(std::move(run)) {
    decode_next();
  }

  /// The features of the next picture, [rows, C].
  at::Tensor next() {
    if (ready_.empty()) {
      const auto batch = std::exchange(batch_, {});
      const auto groups = decoded_.get();
      decode_next();
      add(batch, groups);
    }
    const auto features = ready_.front();
    ready_.pop_front();
    return features;
  }

 private:
  void decode_next() {
    const auto end = std::min(begin_ + kPicturesOfBatch, pictures_.size());
    batch_.assign(pictures_.begin() + static_cast<std::ptrdiff_t>(begin_),
                  pictures_.begin() + static_cast<std::ptrdiff_t>(end));
    begin_ = end;
    if (!batch_.empty()) decoded_ = std::async(std::launch::async, load_, batch_);
  }

  void add(const std::vector<PictureReference>& batch, const std::vector<ImageForInsert>& groups) {
    const auto global = run_(groups.back().images);
    const auto crops = groups.size() > 1 ? run_(groups.front().images) : at::Tensor();
    int64_t first_crop = 0;
    for (size_t i = 0; i < batch.size(); ++i) {
      auto rows = global[static_cast<int64_t>(i)];
      if (const auto num_crops = plan_crops(batch[i].width, batch[i].height, crops_).num_crops(); num_crops > 0) {
        rows = at::cat({crops.narrow(0, first_crop, num_crops).flatten(0, 1), rows});
        first_crop += num_crops;
      }
      ready_.push_back(rows);
    }
  }

  const std::vector<PictureReference>& pictures_;
  const CropOptions& crops_;
  Load load_;
  Run run_;
  size_t begin_ = 0;                     ///< the first picture behind batch_
  std::vector<PictureReference> batch_;  ///< is being decoded
  std::deque<at::Tensor> ready_;
  std::future<std::vector<ImageForInsert>> decoded_;  ///< its destructor waits for the thread
};

class FeaturesRun {
 public:
  FeaturesRun(parallel::Runtime& runtime, const parallel::ProcessGroups& groups, RunConfig config,
              std::filesystem::path output, size_t pictures_of_chunk)
      : runtime_(runtime),
        groups_(groups),
        config_(std::move(config)),
        folder_(std::move(output)),
        pictures_of_chunk_(pictures_of_chunk),
        names_(picture_names(config_)),
        source_(feature_source(config_)),
        device_(runtime.device()),
        tower_(config_.vision, GradientDomain::kReplicated) {
    format_.crops = source_.crops;
  }

  int run() {
    const auto data = open_data(runtime_, groups_, config_);
    for (const auto& sentence : data.summary) say(sentence);
    load_tower();
    prepare_folder();
    share_out(find_pictures(data));
    write(data.max_unreadable);
    say(fmt::format("wrote the features of {} pictures: {} rows, {} bytes in {}; {} pictures were there already",
                    num_pictures_, sum_of(num_rows_), sum_of(num_bytes_), printable(folder_.string()), num_there_));
    return 0;
  }

 private:
  bool is_main() const { return runtime_.rank() == 0; }
  int64_t sum_of(int64_t number) const {
    return parallel::all_reduce(at::full({1}, number, at::kLong), groups_.world).item<int64_t>();
  }
  void say(const std::string& text) const {
    if (!is_main()) return;
    std::puts(text.c_str());
    std::fflush(stdout);
  }

  /// As the model of a training run has it.
  void load_tower() {
    const parallel::Phase phase("loading the vision tower");
    tower_->to(device_, config_.training.precision);
    const auto model = std::make_shared<torch::nn::Module>();
    model->register_module("vision_model", tower_.ptr());
    parallel::agree_on([&] { begin_parameters(parameter_shards(*model), config_, published_weights(config_)); },
                       groups_.world);
    checksum_ = tower_checksum(*tower_, groups_.tp);
    parallel::check_equal_texts({{"the checksum of the vision tower's weights", checksum_}}, groups_.world);
  }

  void prepare_folder() {
    parallel::agree_on(
        [&] {
          if (!is_main()) return;
          begin_feature_folder(folder_, source_, checksum_);
          lock_.emplace(folder_ / "lock", "writes features");
          remove_unfinished_chunks(folder_);
        },
        groups_.world);
  }

  /// The pictures of all samples, each once, by name; on rank 0.
  std::map<std::string, PictureReference> find_pictures(const RunData& data) const {
    const parallel::Phase phase("finding the pictures");
    std::map<std::string, PictureReference> own;
    parallel::agree_on(
        [&] {
          const WaitForAll wait(runtime_);
          for (const auto* sets : {&data.training, &data.held_out}) {
            for (const auto& data_set : *sets) {
              const auto& samples = *data_set.samples;
              for (int64_t i = runtime_.rank(); i < samples.num_samples(); i += runtime_.size()) {
                for (auto& picture : samples.pictures(i, format_)) {
                  auto name = names_.name_of(picture);
                  own.emplace(std::move(name), std::move(picture));
                }
              }
            }
          }
        },
        groups_.world);
    std::string bytes;
    Json::to_cbor(Json(own), bytes);
    std::map<std::string, PictureReference> all;
    for (const auto& of_rank : parallel::gather_texts(bytes, groups_.world)) {
      if (is_main()) all.merge(Json::from_cbor(of_rank).get<std::map<std::string, PictureReference>>());
    }
    return all;
  }

  /// Gives each rank its pictures of those that the folder lacks, or that have changed.
  void share_out(std::map<std::string, PictureReference> pictures) {
    std::string bytes;
    parallel::agree_on(
        [&] {
          const WaitForAll wait(runtime_);
          if (!is_main()) return;
          TORCH_CHECK_VALUE(!pictures.empty(), "the data sets have no pictures");
          const auto num_all = pictures.size();
          const PictureFeatures there(folder_, names_, source_);
          std::erase_if(pictures, [&](const auto& entry) {
            const auto* stored = there.find(entry.second);
            return stored != nullptr && stored->stamp == file_stamp(entry.second);
          });
          std::vector<PictureReference> left;
          for (auto& [name, picture] : pictures) left.push_back(std::move(picture));
          Json::to_cbor({left, next_feature_chunk(folder_), num_all - left.size()}, bytes);
        },
        groups_.world);
    const auto json = Json::from_cbor(parallel::broadcast_text(bytes, 0, groups_.world));
    const auto left = json[0].get<std::vector<PictureReference>>();
    first_chunk_ = json[1];
    num_there_ = json[2];
    num_pictures_ = static_cast<int64_t>(left.size());
    const auto ranks = assign_pictures(left, format_.crops, runtime_.size());
    int64_t bytes_of_last = 0;
    for (size_t i = 0; i < left.size(); ++i) {
      if (ranks[i] != runtime_.rank()) continue;
      if (chunks_.empty() || chunks_.back().size() >= pictures_of_chunk_ || bytes_of_last >= kBytesOfChunk) {
        chunks_.emplace_back();
        bytes_of_last = 0;
      }
      chunks_.back().push_back(left[i]);
      bytes_of_last += num_feature_rows(left[i], format_.crops) * config_.vision.output_dim() * 2;
    }
  }

  /// All ranks write their first chunks, then their second ones, and so on.
  void write(int64_t max_unreadable) {
    const parallel::Phase phase("computing features");
    const auto own_rounds = at::full({1}, std::ssize(chunks_), at::kLong);
    const auto rounds = parallel::all_reduce(own_rounds, groups_.world, parallel::Reduction::kMax).item<int64_t>();
    using Clock = std::chrono::steady_clock;
    auto told = Clock::now();
    int64_t num_done = 0;
    for (int64_t round = 0; round < rounds; ++round) {
      parallel::agree_on(
          [&] {
            const WaitForAll wait(runtime_);
            if (round < std::ssize(chunks_)) num_done += write_chunk(round);
          },
          groups_.world);
      faults_.share(groups_.world);
      TORCH_CHECK_VALUE(faults_.num_unreadable() <= max_unreadable, faults_.num_unreadable(),
                        " more pictures can't be read, which is more than data.max_unreadable allows (first: ",
                        faults_.first_unreadable(), ")");
      const auto all_done = sum_of(num_done);
      if (Clock::now() - told < std::chrono::seconds(5)) continue;
      told = Clock::now();
      say(fmt::format("features of {} of {} pictures", all_done, num_pictures_));
    }
  }

  /// Returns the number of its pictures.
  int64_t write_chunk(int64_t round) {
    const auto& pictures = chunks_[static_cast<size_t>(round)];
    TowerQueue queue(
        pictures, format_.crops,
        [this](const auto& batch) {
          return load_pictures(batch, format_, MmEncoderTpMode::kWeights, groups_.tp, faults_,
                               config_.data.decoding_threads);
        },
        [this](const at::Tensor& pixels) { return features_of(pixels); });
    num_bytes_ += write_feature_chunk(folder_, first_chunk_ + round, runtime_.rank(), names_, source_, pictures,
                                      [&] { return queue.next(); });
    for (const auto& picture : pictures) num_rows_ += num_feature_rows(picture, format_.crops);
    return std::ssize(pictures);
  }

  /// [N, L, C] of [N, 3, side, side] uint8.
  at::Tensor features_of(const at::Tensor& pixels) {
    const c10::NoGradGuard no_grad;
    const int64_t side = pixels.size(-1) / config_.vision.patch_size;
    std::vector<at::Tensor> features;
    for (const auto& part : pixels.split(std::max<int64_t>(1, kPatchesOfBatch / (side * side)))) {
      features.push_back(tower_->forward(normalize(part.to(device_))));
    }
    return at::cat(features);
  }

  parallel::Runtime& runtime_;
  parallel::ProcessGroups groups_;
  RunConfig config_;
  std::filesystem::path folder_;
  size_t pictures_of_chunk_;
  PictureNames names_;
  FeatureSource source_;
  at::Device device_;
  VisionTower tower_;
  std::string checksum_;  ///< of its weights
  SampleFormat format_;   ///< without tokenizer
  PictureFaults faults_;
  std::optional<RunLock> lock_;                        ///< on rank 0
  std::vector<std::vector<PictureReference>> chunks_;  ///< that this rank has to write
  int64_t first_chunk_ = 0;                            ///< the number of each rank's first one
  int64_t num_pictures_ = 0;                           ///< in the chunks of all ranks
  int64_t num_there_ = 0;                              ///< pictures that the folder had
  int64_t num_rows_ = 0;                               ///< that this rank has written
  int64_t num_bytes_ = 0;                              ///< likewise, of files
};

/// Each rank computes by itself: no group or batch has to be divisible.
RunConfig with_ranks_of_their_own(RunConfig config, int num_ranks) {
  config.parallel = {.tp = 1, .dp = num_ranks};
  config.training.micro_batch_size = 1;
  config.training.global_batch_size = num_ranks;
  return config;
}

}  // namespace

int features(parallel::Runtime& runtime, const FeaturesArguments& arguments) {
  check_no_tilde("--output", arguments.output);
  auto config = read_run_config(arguments.config, arguments.overrides, /*warns=*/runtime.rank() == 0);
  TORCH_CHECK_VALUE(config.vision.freeze,
                    "vision.freeze is false: a tower that is trained gives other features after each step");
  config = with_ranks_of_their_own(std::move(config), runtime.size());
  validate(config, runtime.size());
  runtime.choose_device({.device = config.run.device, .share_devices = config.run.share_gpus});
  const auto groups = make_run_groups(runtime, config);
  check_equal_settings(config, groups.world);
  const int status =
      FeaturesRun(runtime, groups, std::move(config), arguments.output, arguments.pictures_of_chunk).run();
  parallel::destroy_process_groups(runtime, groups);
  return status;
}

}  // namespace megatron_cpp::step37
