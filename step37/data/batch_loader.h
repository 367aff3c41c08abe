// Batches for training: samples of several data sets, packed on one rank, and their pictures, decoded ahead on the
// ranks that run the tower.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <future>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/data/packed_batch.h"
#include "megatron_cpp/data/sampler.h"
#include "parallel/process_groups.h"
#include "step37/data/data_set.h"
#include "step37/data/picture_faults.h"
#include "step37/data/picture_pack.h"

namespace megatron_cpp::step37 {

/// A data set and its share of a mix.
struct WeightedDataSet {
  std::string name;  ///< unique in the mix: its state in a checkpoint has this name
  std::shared_ptr<const DataSet> samples;
  double weight = 1.0;                         ///< share of the draws, relative to the sum of the weights
  SampleOrder order = SampleOrder::kShuffled;  ///< in which a pass goes through it
};

/// Where each data set of a mix is, by name.
using MixState = std::map<std::string, MixedSampler::State>;

/// The micro-batches of a data-parallel rank for one step, and the counts of the global batch.
struct StepPacks {
  std::vector<PicturePack> micro_batches;
  int64_t num_loss_tokens = 0;  ///< of the global batch
  int64_t num_tokens = 0;       ///< of the global batch, padding left out
  int64_t num_positions = 0;    ///< of the global batch, with padding
  int64_t num_samples = 0;      ///< of the global batch
  int64_t num_pictures = 0;     ///< of the global batch
  int64_t cost = 0;             ///< BatchLoaderOptions::pack_cost of the global batch
  int64_t largest_cost = 0;     ///< and of the data-parallel rank with the most
  MixState next;                ///< of the data sets after the step
};

/// How samples are packed and pictures loaded.
struct BatchLoaderOptions {
  SampleFormat format;
  PackingOptions packing;
  int64_t global_batch_size = 1;  ///< packs per step, over all data-parallel ranks
  int64_t micro_batch_size = 1;   ///< packs per micro-batch; times data-parallel size a divisor of global_batch_size
  uint64_t seed = 0;
  MmEncoderTpMode mm_encoder_tp_mode = MmEncoderTpMode::kData;  ///< which pictures a rank decodes
  c10::Device device = c10::Device(c10::kCPU);  ///< that the model runs on; for a GPU pixels are in pinned memory
  int64_t num_decoding_threads = 1;             ///< of a rank
  /// What a pack costs, such as its floating-point operations; empty: not known. Called on tensor-parallel rank 0, by a
  /// thread of the loader.
  std::function<int64_t(const PicturePack&)> pack_cost = {};
  /// Whether the packs of a step are shared out so that the sums of pack_cost on the data-parallel ranks are balanced,
  /// since all wait for the slowest; else each rank gets a run of packs.
  bool balance = true;
  /// The number of pictures that may be unreadable; one more ends the run.
  int64_t max_unreadable = std::numeric_limits<int64_t>::max();
  /// Files that are removed if a picture has changed: indices of picture folders.
  std::vector<std::filesystem::path> indices;
};

/// The sample of tensor-parallel rank 0, on all ranks of the group. Collective over tp.
PictureSample broadcast_sample(const PictureSample& sample, const parallel::GroupPtr& tp);

/// The data-parallel rank of each pack of a step: balanced_assignment with as many packs for each. Packs of a rank in
/// the order of their cost, so that ranks that exchange tokens of experts in each micro-batch have similar ones at the
/// same time. Element r lists the packs of rank r.
std::vector<std::vector<size_t>> balanced_packs(const std::vector<int64_t>& costs, int num_replicas);

/// Draws samples of a mix, packs them on tensor-parallel rank 0 in the background, sends token ids and picture
/// references to its group, and decodes pictures in the background, one step ahead. All data-parallel ranks draw the
/// same samples and take their packs of them.
class BatchLoader {
 public:
  using Options = BatchLoaderOptions;

  /// @param mix     on tensor-parallel rank 0, equal on all of them; empty on the other ranks
  /// @param start   of the data sets before the first step that next() returns; one without a state begins
  /// @param faults  must outlive the loader
  /// Collective over tp. @throws c10::ValueError for batch sizes that don't divide each other; AgreedError if the mix
  /// is empty, and as MixedSampler does.
  BatchLoader(Options options, std::vector<WeightedDataSet> mix, const parallel::ProcessGroups& groups,
              const MixState& start, PictureFaults& faults);
  BatchLoader(const BatchLoader&) = delete;
  BatchLoader& operator=(const BatchLoader&) = delete;

  /// A step with this rank's decoded pictures.
  struct LoadedStep {
    StepPacks packs;
    std::vector<std::vector<ImageForInsert>> images;  ///< of each micro-batch
  };
  /// The next step. Collective over the world: shares the faults of pictures, and starts loading the step after it,
  /// which is broadcast over tp.
  /// @throws c10::ValueError on every rank if more than max_unreadable pictures were unreadable; parallel::AgreedError
  ///         as DataSet::sample does, or if no sample fits a pack.
  LoadedStep next();

 private:
  void load_ahead();
  StepPacks make_step();
  std::vector<std::vector<size_t>> share_out(const std::vector<int64_t>& costs) const;

  Options options_;
  std::vector<WeightedDataSet> mix_;
  parallel::ProcessGroups groups_;
  std::optional<MixedSampler> sampler_;  ///< on tensor-parallel rank 0
  PicturePacker packer_;
  PictureFaults& faults_;
  // The destructors of these two wait for their threads, before anything else is gone.
  std::future<StepPacks> packed_;   ///< the step after the one that is decoded
  std::future<LoadedStep> loaded_;  ///< the next step
};

/// Packs the samples of all data sets once, in order, into at most `max_packs` packs, for validation. Tensor-parallel
/// rank 0 packs; collective over tp. A micro-batch is one pack; pack i goes to data-parallel rank i % dp. Counts are of
/// all packs. If replicas share experts, ranks with a micro-batch less get one more, without loss: all must run as
/// many.
StepPacks pack_once(const std::vector<WeightedDataSet>& sets, const std::optional<int64_t>& max_packs,
                    const BatchLoaderOptions& options, const parallel::ProcessGroups& groups);

}  // namespace megatron_cpp::step37
