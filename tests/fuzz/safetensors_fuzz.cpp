// The input is a safetensors file.
#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

const test_support::TemporaryFolder& folder() {
  static const test_support::TemporaryFolder folder;
  return folder;
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         (a.numel() == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0);
}

/// The first and the last row of a tensor, by themselves.
void check_slices(const SafetensorsFile& file, const std::string& name, const at::Tensor& whole) {
  for (int64_t dim = 0; dim < whole.dim(); ++dim) {
    const int64_t rows = whole.size(dim);
    if (rows == 0) continue;
    for (const int64_t row : {int64_t{0}, rows - 1}) {
      const auto box = Box::rows(whole.sizes().vec(), dim, {row, row + 1});
      FUZZ_CHECK(same(file.read(name, box), whole.narrow(dim, row, 1).contiguous()), name, " ", box.text());
    }
    const auto box = Box::rows(whole.sizes().vec(), dim, {rows - 1, rows + 1});
    FUZZ_CHECK(fuzz::refusal([&] { file.read(name, box); }), name, " has no ", box.text());
  }
}

/// What was read and written again reads the same.
void check_read_and_written(const SafetensorsFile& file) {
  std::vector<NamedTensor> tensors;
  for (const auto& [name, entry] : file.entries()) {
    tensors.push_back({name, file.read(name)});
    FUZZ_CHECK(tensors.back().tensor.sizes() == entry.shape && tensors.back().tensor.scalar_type() == entry.dtype);
    FUZZ_CHECK(static_cast<int64_t>(tensors.back().tensor.nbytes()) == entry.end - entry.begin);
    check_slices(file, name, tensors.back().tensor);
  }
  const auto path = folder().path() / "again.safetensors";
  write_safetensors(path, tensors, file.metadata());
  const SafetensorsFile again(path);
  FUZZ_CHECK(again.metadata() == file.metadata() && again.entries().size() == tensors.size());
  for (const auto& [name, tensor] : tensors) FUZZ_CHECK(same(again.read(name), tensor), name);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto path = folder().write("input.safetensors", fuzz::text_of(data, size));
  const auto reason = fuzz::refusal([&] { check_read_and_written(SafetensorsFile(path)); });
  if (reason) FUZZ_CHECK(fuzz::contains(*reason, path.string()), *reason, " names no file");
  return 0;
}

#ifdef MCPP_FUZZ
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

/// Mutates as libFuzzer does by itself; then, half of the time, makes the header as long as it looks. Few inputs would
/// get past their first eight bytes otherwise.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  size = LLVMFuzzerMutate(data, size, max_size);
  if (size <= 8 || seed % 2 == 0) return size;
  const auto header = fuzz::text_of(data + 8, size - 8);
  // Values of a small tensor hold a brace now and then, and then the header ends there.
  const uint64_t header_bytes = std::min(header.rfind('}') + 1, header.size());
  std::memcpy(data, &header_bytes, sizeof(header_bytes));
  return size;
}
#endif

}  // namespace megatron_cpp
