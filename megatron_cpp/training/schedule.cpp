#include "megatron_cpp/training/schedule.h"

namespace megatron_cpp {

std::vector<Action> one_after_the_other(int64_t num_micro_batches) {
  std::vector<Action> actions;
  for (int64_t micro_batch = 0; micro_batch < num_micro_batches; ++micro_batch) {
    actions.push_back({Action::Kind::kForward, micro_batch});
    actions.push_back({Action::Kind::kBackward, micro_batch});
  }
  return actions;
}

}  // namespace megatron_cpp
