// The pictures of a training run: rank 0 searches the folder and sends them to the ranks that pack batches.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "parallel/process_groups.h"
#include "step37/data/caption_batches.h"
#include "step37/data/tokenizer.h"
#include "step37/program/run_config.h"

namespace megatron_cpp::parallel {
class Runtime;
}  // namespace megatron_cpp::parallel

namespace megatron_cpp::step37 {

/// The file in run.directory with the result of a search: the next start opens only files that changed.
inline constexpr char kIndexFile[] = "pictures.index";

/// The pictures of a run. Lists are empty on ranks that don't pack (all but tensor-parallel rank 0).
struct RunPictures {
  CaptionLoader::Source training;
  CaptionLoader::Source held_out;
  std::vector<std::string> training_captions;
  std::vector<std::string> held_out_captions;
  int64_t num_without_caption = 0;
  int64_t max_unreadable = 0;  ///< pictures that may still turn out to be unreadable; on every rank
  std::string index;           ///< on world rank 0: new contents of the index file; empty if it is up to date
};

/// Searches data.directory on world rank 0, starting from `index_file` unless run.fresh is set, and prints warnings
/// about what is left out. The other ranks wait, even longer than run.timeout_seconds. Writes nothing. Collective over
/// the world.
/// @throws parallel::AgreedError on every rank: errors of scan_folder and pictures_of; more unreadable pictures than
///         data.max_unreadable; all pictures held out; a host whose folder differs from that of rank 0 (the file sizes
///         of a few pictures are compared).
RunPictures find_pictures(const parallel::Runtime& runtime, const parallel::ProcessGroups& groups,
                          const RunConfig& config, const std::filesystem::path& index_file);

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

/// Tokenizer::train, with a warning if the vocabulary is too small for the captions' characters. Not collective.
Tokenizer train_tokenizer(const std::vector<std::string>& captions, int64_t vocabulary_size);

/// The tokenizer that training starts with: model.from's own, or one that is trained on the captions if the weights are
/// random. Not collective.
/// @throws c10::ValueError as Tokenizer::train and load; if model.from lacks one, or it has more pieces than the model.
Tokenizer first_tokenizer(const RunConfig& config, const std::vector<std::string>& captions);

/// The number of samples that are too long for a pack. Not collective.
int64_t num_too_long(const CaptionLoader::Source& source, const CaptionLoader::Options& options);

/// The global view of a picture as a small PNG file; empty if the picture can't be read. Not collective.
std::string thumbnail_of(const std::filesystem::path& file, const CropOptions& crops);

}  // namespace megatron_cpp::step37
