// The input is what a checkpoint of a training run keeps beside tensors, as JSON.
#include "step37/program/training_run.h"
#include "tests/fuzz/fuzz.h"

namespace megatron_cpp {

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  step37::RunState state;
  const auto reason =
      fuzz::refusal([&] { state = step37::run_state_from_text(std::string(fuzz::text_of(data, size)), "step-7"); });
  if (reason) {
    FUZZ_CHECK(fuzz::contains(*reason, "step-7"), *reason, " doesn't say where");
    return 0;
  }
  const auto text = to_text(state);
  const auto again = step37::run_state_from_text(text, "again", settings(state.config));
  FUZZ_CHECK(to_text(again) == text);
  FUZZ_CHECK(settings(again.config) == settings(state.config));
  return 0;
}

}  // namespace megatron_cpp
