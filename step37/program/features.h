// `step37 features`: writes what a frozen vision tower makes of the pictures, once, for training from it.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

namespace megatron_cpp::parallel {
class Runtime;
}  // namespace megatron_cpp::parallel

namespace megatron_cpp::step37 {

/// The command line of `step37 features`.
struct FeaturesArguments {
  std::filesystem::path config;
  std::filesystem::path output;        ///< for data.features
  std::vector<std::string> overrides;  ///< "section.key=value"
  size_t pictures_of_chunk = 1024;     ///< at most, in a file: what a killed command may lose of each rank's work
};

/// Writes the features of each picture of all data sets of the configuration, trained on or held out, into a folder for
/// PictureFeatures: those of the tower that `step37 pretrain` of this configuration begins with. Pictures whose
/// features are there already are left out, unless their files have changed, so a command that was killed goes on. The
/// ranks share out the pictures, and each runs the whole tower, whatever parallel.* and the batch sizes say. Returns 0.
/// Collective over all ranks.
/// @throws c10::ValueError or parallel::AgreedError on every rank: a configuration that doesn't fit, or whose tower is
///         trained (vision.freeze); missing data, or no picture in them; features of another tower in the folder; more
///         unreadable pictures than data.max_unreadable allows; a file that can't be written.
int features(parallel::Runtime& runtime, const FeaturesArguments& arguments);

}  // namespace megatron_cpp::step37
