#include "step37/program/check.h"

#include <fmt/format.h>

#include <cstdint>
#include <cstdio>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "step37/program/shell_text.h"
#include "step37/program/training_run.h"

namespace megatron_cpp::step37 {

int check(parallel::Runtime& runtime, const CheckArguments& arguments) {
  check_no_tilde("--checkpoint", arguments.checkpoint);
  const auto groups = parallel::make_process_groups(runtime, {.dp = runtime.size()});
  const auto folder = find_checkpoint_together(checkpoints_of(arguments.checkpoint), groups.world);
  if (runtime.rank() == 0) {
    const CheckpointReader reader(folder);
    int64_t bytes = 0;
    for (const auto& [name, digest] : reader.files()) bytes += digest.bytes;
    const auto writer = reader.library_version().empty()
                            ? "of a library without checksums: sizes alone were compared"
                            : fmt::format("written by megatron_cpp {}", reader.library_version());
    std::puts(fmt::format("{} is whole: {} files, {} bytes, {}", folder.string(), reader.files().size(), bytes, writer)
                  .c_str());
  }
  parallel::destroy_process_groups(runtime, groups);
  return 0;
}

}  // namespace megatron_cpp::step37
