// The data of a training run: its data sets, what of them is held out, and the tokenizer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "parallel/process_groups.h"
#include "step37/data/batch_loader.h"
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

/// Opens the data sets of `config`: data.directory, or all of data.sets. World rank 0 searches folders of pictures,
/// starting from the index files in run.directory unless run.fresh is set, and prints warnings about what is left out.
/// The other ranks wait, even longer than run.timeout_seconds. Writes nothing. Collective over the world.
/// @throws parallel::AgreedError on every rank: errors of scan_folder and pictures_of; more unreadable pictures than
///         data.max_unreadable; a data set whose samples are all held out; a host whose folder differs from that of
///         rank 0 (the file sizes of a few pictures are compared).
RunData open_data(const parallel::Runtime& runtime, const parallel::ProcessGroups& groups, const RunConfig& config);

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
Tokenizer train_tokenizer(const std::vector<std::string>& texts, int64_t vocabulary_size);

/// The tokenizer that training starts with: model.from's own, or one that is trained on the data if the weights are
/// random. Not collective.
/// @throws c10::ValueError as Tokenizer::train and load; if model.from lacks one, or it has more pieces than the model.
Tokenizer first_tokenizer(const RunConfig& config, const RunData& data);

/// The number of samples that are too long for a pack. Not collective.
int64_t num_too_long(const std::vector<WeightedDataSet>& sets, const BatchLoaderOptions& options);

/// The global view of a picture as a small PNG file; empty if the picture can't be read. Not collective.
std::string thumbnail_of(const std::filesystem::path& file, const CropOptions& crops);

}  // namespace megatron_cpp::step37
