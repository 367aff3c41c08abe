// Reading and writing safetensors files.
//
// Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data_offsets), then the raw
// little-endian row-major values (https://github.com/huggingface/safetensors#format).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "megatron_cpp/checkpoint/file_digest.h"
#include "megatron_cpp/parameters/box.h"

namespace megatron_cpp {

namespace internal {
class CompleteFile;
}

/// What the header says of one tensor.
struct SafetensorsEntry {
  at::ScalarType dtype;        ///< LibTorch's dtype; Undefined for one that can't be read (such as F8_E4M3)
  std::string dtype_name;      ///< its name in the file
  std::vector<int64_t> shape;  ///< empty for a scalar
  int64_t begin;               ///< first byte, counted from the end of the header
  int64_t end;                 ///< one past the last byte
};

/// A safetensors file, memory-mapped: reading a slice of a large tensor touches only the slice.
class SafetensorsFile {
 public:
  /// Opens the file and checks its header against its size: offsets that overlap, leave a hole or run past the end,
  /// and shapes that contradict the byte counts, are refused. A tensor of a dtype that can't be read doesn't prevent
  /// reading the others.
  /// @throws c10::ValueError naming the file, and the tensor where one is at fault.
  explicit SafetensorsFile(const std::filesystem::path& path);

  /// As given to the constructor.
  const std::filesystem::path& path() const { return path_; }
  /// Whether the header lists a tensor of this name.
  bool contains(const std::string& name) const { return entries_.count(name) > 0; }
  /// All tensors by name.
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  /// The header's `__metadata__`.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// A copy of the whole tensor, on the CPU.
  /// @throws c10::ValueError naming the file and the tensor if it isn't there, or if its dtype is Undefined.
  at::Tensor read(const std::string& name) const;

  /// A copy of a part of it, on the CPU, contiguous; the rest isn't read.
  /// @throws c10::ValueError as read(), and naming `box` if that isn't in the tensor.
  at::Tensor read(const std::string& name, const Box& box) const;

  /// Copies a part of it into `target`, of the shape of the part and of any dtype, device and strides, without a copy
  /// between them on the CPU. The rest isn't read.
  /// @throws c10::ValueError as read().
  void copy_to(const at::Tensor& target, const std::string& name, const Box& box) const;

 private:
  at::Tensor view(const std::string& name, const Box& box) const;
  const SafetensorsEntry& entry(const std::string& name) const;
  at::Tensor view(const std::string& name) const;

  std::filesystem::path path_;
  std::shared_ptr<const std::byte> mapping_;  ///< the whole file; unmapped with the last owner
  int64_t data_begin_ = 0;
  std::map<std::string, SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// A tensor and the name it has in a file.
struct NamedTensor {
  std::string name;   ///< any characters; unique in a file
  at::Tensor tensor;  ///< any device, any strides
};

/// The name of a dtype in safetensors files: "F32".
/// @throws c10::ValueError naming `tensor`, the tensor of this dtype, if the format has no name for it.
std::string safetensors_dtype(at::ScalarType dtype, const std::string& tensor);

/// Writes a file one tensor after the other, so that no more than one has to be in memory; completely or not at all, as
/// write_file does.
class SafetensorsWriter {
 public:
  /// A tensor that will be written.
  struct Entry {
    std::string name;            ///< unique in the file
    at::ScalarType dtype;        ///< of a kind that the format knows
    std::vector<int64_t> shape;  ///< of sizes that fit
  };
  /// The entries of these tensors, in their order.
  static std::vector<Entry> entries_of(const std::vector<NamedTensor>& tensors);

  /// Writes the header to a temporary file.
  /// @throws c10::ValueError naming the tensor (unsupported dtype, a name given twice); WriteError as write_file.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<Entry> entries,
                    const std::map<std::string, std::string>& metadata = {});
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// Writes the next tensor, which has the dtype and shape of its entry; any device, any strides.
  void write(const at::Tensor& tensor);
  /// Makes the file appear under its name, after the last tensor. Returns what was written.
  /// @throws WriteError as write_file.
  FileDigest commit();

 private:
  std::vector<Entry> entries_;
  size_t next_ = 0;
  std::unique_ptr<internal::CompleteFile> file_;
};

/// Writes `tensors` (any device, any strides) in the order given, as write_file does. Returns what was written.
/// @throws c10::ValueError naming the tensor (unsupported dtype, a name given twice); WriteError as write_file.
FileDigest write_safetensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors,
                             const std::map<std::string, std::string>& metadata = {});

}  // namespace megatron_cpp
