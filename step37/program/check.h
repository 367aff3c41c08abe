// Are the files of a checkpoint what was written?
#pragma once

#include <filesystem>

namespace megatron_cpp::parallel {
class Runtime;
}

namespace megatron_cpp::step37 {

/// The options of `step37 check`.
struct CheckArguments {
  std::filesystem::path checkpoint;  ///< as find_checkpoint takes it, or a run directory
};

/// Reads all files of a checkpoint and compares them with the sizes and checksums in its manifest; the ranks share the
/// files. Writes nothing. Prints one line: the folder, its files and bytes, and the library that wrote it.
/// @return  the exit status, 0.
/// @throws parallel::AgreedError on every rank as find_checkpoint_together. Collective over all ranks.
int check(parallel::Runtime& runtime, const CheckArguments& arguments);

}  // namespace megatron_cpp::step37
