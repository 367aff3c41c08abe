// The data of a training run: its data sets, what of them is held out, and the tokenizer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "parallel/process_groups.h"
#include "step37/data/batch_loader.h"
#include "step37/data/picture_features.h"
#include "step37/data/tokenizer.h"
#include "step37/program/run_config.h"

namespace megatron_cpp::parallel {
class Runtime;
}  // namespace megatron_cpp::parallel

namespace megatron_cpp::step37 {

/// The data of a run. Data sets are empty on ranks that don't pack (all but tensor-parallel rank 0).
struct RunData {
  std::vector<WeightedDataSet> training;  ///< those with a sample that isn't held out
  std::vector<WeightedDataSet> held_out;  ///< those with a sample that is
  int64_t max_unreadable = 0;             ///< pictures that may still turn out to be unreadable; on every rank
  /// On world rank 0: files in run.directory that speed up the next start, and their new contents.
  std::vector<std::pair<std::filesystem::path, std::string>> indices;
  std::vector<std::string> summary;  ///< on world rank 0: a sentence about each data set
};

/// Opens the data sets of `config`: data.directory, or all of data.sets. World rank 0 searches folders of captioned
/// pictures, starting from the index files in run.directory unless run.fresh is set; every rank that packs opens the
/// other kinds. Rank 0 prints warnings about what is left out. The other ranks wait, even longer than
/// run.timeout_seconds. Writes nothing. Collective over the world.
/// @throws parallel::AgreedError on every rank: errors of scan_folder, pictures_of and open_data_set; more unreadable
///         pictures than data.max_unreadable; a data set whose samples are all held out, or that holds token ids
///         without given_tokenizer; a host whose data set differs from that of rank 0 (the file sizes of a few
///         pictures, or the number of samples, are compared).
RunData open_data(const parallel::Runtime& runtime, const parallel::ProcessGroups& groups, const RunConfig& config);

/// What a folder of features calls the pictures of the data sets.
PictureNames picture_names(const RunConfig& config);

/// What the features of the run's pictures depend on.
FeatureSource feature_source(const RunConfig& config);

/// A sample of a data set, which outlives it.
struct SampleReference {
  const DataSet* samples = nullptr;
  int64_t index = 0;
};

/// At most `count` samples of all of `sets`, spread evenly, in their order.
std::vector<SampleReference> spread_samples(const std::vector<WeightedDataSet>& sets, int64_t count);

/// The texts of the training samples, for a tokenizer; of more than a million samples as many, spread evenly.
std::vector<std::string> training_texts(const RunData& data);

/// Its destructor is a barrier without time limit; a collective of the groups would fail after run.timeout_seconds. For
/// long work on rank 0: the first object in an action of agree_on.
class WaitForAll {
 public:
  explicit WaitForAll(const parallel::Runtime& runtime) : runtime_(runtime) {}
  ~WaitForAll();
  WaitForAll(const WaitForAll&) = delete;
  WaitForAll& operator=(const WaitForAll&) = delete;

 private:
  const parallel::Runtime& runtime_;
};

/// Tokenizer::train, with a warning if the vocabulary is too small for the texts' characters. Not collective.
/// @param symbols  as Tokenizer::train
Tokenizer train_tokenizer(const std::vector<std::string>& texts, int64_t vocabulary_size,
                          const std::vector<std::string>& symbols);

/// The tokenizer file that a run is given: data.tokenizer, or that of the published checkpoint model.from; nullopt if
/// it trains one. Not collective.
/// @throws c10::ValueError if model.from has weights and no tokenizer.
std::optional<std::filesystem::path> given_tokenizer(const RunConfig& config);

/// The tokenizer that training starts with: the given one, or one that is trained on the data. Not collective.
/// @throws c10::ValueError as given_tokenizer, Tokenizer::train and load; if it has more pieces than the model, or
/// lacks a symbol of pictures
///         or of a data set's chat template.
Tokenizer first_tokenizer(const RunConfig& config, const RunData& data);

/// How many of `samples` are too long for a pack. Not collective.
int64_t num_too_long(const std::vector<SampleReference>& samples, const BatchLoaderOptions& options);

/// The global view of a picture as a small PNG file; empty if the picture can't be read. Not collective.
std::string thumbnail_of(const PictureReference& picture, const CropOptions& crops);

}  // namespace megatron_cpp::step37
