// The pictures of a training run: found once, on one rank, however long that takes, and handed to those that pack.
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

/// The file in run.directory that keeps what a search has found, so that the next start opens no file that it needn't.
inline constexpr char kIndexFile[] = "pictures.index";

/// The pictures of a run. Lists are empty on ranks that don't pack (all but tensor-parallel rank 0).
struct RunPictures {
  CaptionLoader::Source training;
  CaptionLoader::Source held_out;
  std::vector<std::string> training_captions;
  std::vector<std::string> held_out_captions;
  int64_t num_without_caption = 0;
  int64_t max_unreadable = 0;  ///< that may turn out to be so later; on every rank
  std::string index;           ///< on world rank 0: what is to be written to the index file; empty if it is there
};

/// Searches data.directory on world rank 0, starting from `index_file` unless run.fresh is set, and prints warnings
/// about what is left out. All ranks wait without regard to run.timeout_seconds. Writes nothing. Collective over the
/// world.
/// @throws parallel::AgreedError on every rank: scan_folder's and pictures_of's errors; more unreadable pictures than
///         data.max_unreadable; all pictures held out; a host whose folder isn't the same as rank 0's (a few pictures
///         are compared, by the size of their files).
RunPictures find_pictures(const parallel::Runtime& runtime, const parallel::ProcessGroups& groups,
                          const RunConfig& config, const std::filesystem::path& index_file);

/// Holds ranks up, where it goes out of scope, until all are there, however long that takes: a collective of the groups
/// would give up after run.timeout_seconds. For rank 0's long work: made first thing in an action of agree_on.
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

/// Samples that fit into no pack. Not collective.
int64_t num_too_long(const CaptionLoader::Source& source, const CaptionLoader::Options& options);

/// The global view of a picture, which the model sees, as a small PNG file; empty if the picture can't be read. Not
/// collective.
std::string thumbnail_of(const std::filesystem::path& file, const CropOptions& crops);

}  // namespace megatron_cpp::step37
