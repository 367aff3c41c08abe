#include "megatron_cpp/checkpoint/safetensors.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/json_integer.h"

namespace megatron_cpp {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::pair<at::ScalarType, std::string_view> kDtypeNames[] = {
    {at::kDouble, "F64"}, {at::kFloat, "F32"}, {at::kHalf, "F16"}, {at::kBFloat16, "BF16"}, {at::kLong, "I64"},
    {at::kInt, "I32"},    {at::kShort, "I16"}, {at::kChar, "I8"},  {at::kByte, "U8"},       {at::kBool, "BOOL"},
};

/// Bits per element of the format's other dtypes, which can't be read here.
constexpr std::pair<std::string_view, int64_t> kOtherDtypeBits[] = {
    {"F4", 4},          {"F6_E2M3", 6},     {"F6_E3M2", 6}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"U16", 16},    {"U32", 32},    {"U64", 64},    {"C64", 64},
};

/// Undefined for a dtype that can't be read here.
at::ScalarType dtype_from_name(const std::string& name) {
  for (const auto& [dtype, known] : kDtypeNames) {
    if (known == name) return dtype;
  }
  return at::ScalarType::Undefined;
}

/// Bits per element; nothing for an unknown dtype.
std::optional<int64_t> bits_of(const SafetensorsEntry& entry) {
  if (entry.dtype != at::ScalarType::Undefined) return 8 * static_cast<int64_t>(c10::elementSize(entry.dtype));
  for (const auto& [name, bits] : kOtherDtypeBits) {
    if (name == entry.dtype_name) return bits;
  }
  return std::nullopt;
}

std::string system_reason() { return std::strerror(errno); }

/// Number of bytes of a tensor whose elements have `bits` bits, or nothing if a size is negative, the product
/// overflows, or it isn't a whole number of bytes. Sizes of 0 are left out of the product, as in strides.
std::optional<int64_t> byte_count(const std::vector<int64_t>& shape, int64_t bits) {
  const auto all_bits = internal::product_of_sizes(shape, bits);
  if (!all_bits) return std::nullopt;
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  return *all_bits % 8 == 0 ? std::optional(*all_bits / 8) : std::nullopt;
}

std::vector<int64_t> parse_integers(const std::string& name, const Json& json, const char* key,
                                    const std::filesystem::path& path) {
  const auto values = internal::integers_of(json.at(key));
  TORCH_CHECK_VALUE(values.has_value(), path.string(), ": tensor ", name, ": ", key,
                    " is not a list of 64-bit integers");
  return *values;
}

SafetensorsEntry parse_entry(const std::string& name, const Json& json, const std::filesystem::path& path) {
  SafetensorsEntry entry{};
  try {
    entry.dtype_name = json.at("dtype").get<std::string>();
    entry.dtype = dtype_from_name(entry.dtype_name);
    entry.shape = parse_integers(name, json, "shape", path);
    const auto offsets = parse_integers(name, json, "data_offsets", path);
    TORCH_CHECK_VALUE(offsets.size() == 2, path.string(), ": tensor ", name, " has ", offsets.size(), " data offsets");
    entry.begin = offsets[0];
    entry.end = offsets[1];
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK_VALUE(false, path.string(), ": header entry of tensor ", name, ": ", error.what());
  }
  const auto bits = bits_of(entry);
  // For an unknown dtype the shape can't be compared with the bytes, but must be valid.
  const auto expected = byte_count(entry.shape, bits.value_or(8));
  TORCH_CHECK_VALUE(
      expected && entry.begin >= 0 && entry.end >= entry.begin && (!bits || entry.end - entry.begin == *expected),
      path.string(), ": tensor ", name, " of shape ", at::IntArrayRef(entry.shape), " and dtype ", entry.dtype_name,
      " does not fit its bytes [", entry.begin, ", ", entry.end, ")");
  return entry;
}

void check_layout(const std::map<std::string, SafetensorsEntry>& entries, int64_t data_bytes,
                  const std::filesystem::path& path) {
  std::vector<std::pair<const SafetensorsEntry*, const std::string*>> by_begin;
  by_begin.reserve(entries.size());
  for (const auto& [name, entry] : entries) by_begin.emplace_back(&entry, &name);
  std::sort(by_begin.begin(), by_begin.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->begin, a.first->end) < std::pair(b.first->begin, b.first->end);
  });
  int64_t position = 0;
  for (const auto& [entry, name] : by_begin) {
    TORCH_CHECK_VALUE(entry->end <= data_bytes, path.string(), ": truncated: tensor ", *name, " ends at byte ",
                      entry->end, " of the data, the file has ", data_bytes);
    TORCH_CHECK_VALUE(entry->begin == position, path.string(), ": tensor ", *name, " begins at byte ", entry->begin,
                      " of the data, expected ", position, " (overlap or hole)");
    position = entry->end;
  }
  TORCH_CHECK_VALUE(position == data_bytes, path.string(), ": ", data_bytes - position,
                    " bytes after the last tensor belong to none");
}

}  // namespace

std::string safetensors_dtype(at::ScalarType dtype, const std::string& tensor) {
  for (const auto& [known, name] : kDtypeNames) {
    if (known == dtype) return std::string(name);
  }
  TORCH_CHECK_VALUE(false, "tensor ", tensor, ": safetensors has no name for dtype ", dtype);
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path) {
  const internal::FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  TORCH_CHECK_VALUE(file.get() >= 0, "cannot open ", path.string(), ": ", system_reason());
  struct stat status {};
  TORCH_CHECK_VALUE(::fstat(file.get(), &status) == 0 && S_ISREG(status.st_mode), path.string(),
                    " is not a regular file");
  const int64_t file_bytes = status.st_size;
  TORCH_CHECK_VALUE(file_bytes >= 8, path.string(), ": ", file_bytes, " bytes are no safetensors file");
  void* address = ::mmap(nullptr, static_cast<size_t>(file_bytes), PROT_READ, MAP_PRIVATE, file.get(), 0);
  TORCH_CHECK_VALUE(address != MAP_FAILED, "cannot map ", path.string(), ": ", system_reason());
  mapping_ = std::shared_ptr<const std::byte>(
      static_cast<const std::byte*>(address),
      [file_bytes](const std::byte* base) { ::munmap(const_cast<std::byte*>(base), static_cast<size_t>(file_bytes)); });

  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, mapping_.get(), sizeof(header_bytes));
  TORCH_CHECK_VALUE(header_bytes <= static_cast<uint64_t>(file_bytes - 8), path.string(), ": header of ", header_bytes,
                    " bytes does not fit a file of ", file_bytes);
  data_begin_ = 8 + static_cast<int64_t>(header_bytes);
  const auto* header_begin = reinterpret_cast<const char*>(mapping_.get()) + 8;
  // The parser silently drops the first of two equal names, so repeated names are found while it parses.
  std::set<std::string> seen;
  std::string repeated;
  const Json header = Json::parse(
      header_begin, header_begin + header_bytes,
      [&](int depth, Json::parse_event_t event, Json& parsed) {
        if (depth == 1 && event == Json::parse_event_t::key) {
          const auto name = parsed.get<std::string>();
          if (!seen.insert(name).second) repeated = name;
        }
        return true;
      },
      /*allow_exceptions=*/false);
  TORCH_CHECK_VALUE(header.is_object(), path.string(), ": the header is not a JSON object");
  TORCH_CHECK_VALUE(repeated.empty(), path.string(), ": tensor ", repeated, " appears twice in the header");
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (value.is_null()) continue;  // some writers write null for no metadata
      TORCH_CHECK_VALUE(value.is_object(), path.string(), ": __metadata__ is not a JSON object");
      for (const auto& [key, text] : value.items()) {
        TORCH_CHECK_VALUE(text.is_string(), path.string(), ": metadata ", key, " is not a string");
        metadata_.emplace(key, text.get<std::string>());
      }
    } else {
      entries_.emplace(name, parse_entry(name, value, path));
    }
  }
  check_layout(entries_, file_bytes - data_begin_, path);
}

const SafetensorsEntry& SafetensorsFile::entry(const std::string& name) const {
  const auto found = entries_.find(name);
  TORCH_CHECK_VALUE(found != entries_.end(), path_.string(), ": no tensor ", name);
  return found->second;
}

at::Tensor SafetensorsFile::view(const std::string& name) const {
  const auto& found = entry(name);
  TORCH_CHECK_VALUE(found.dtype != at::ScalarType::Undefined, path_.string(), ": tensor ", name, " has dtype ",
                    found.dtype_name, ", which is not supported");
  // from_blob wants a mutable pointer; the mapping is private and callers copy before anyone can write.
  auto* data = const_cast<std::byte*>(mapping_.get() + data_begin_ + found.begin);
  return at::from_blob(data, found.shape, at::TensorOptions().dtype(found.dtype));
}

at::Tensor SafetensorsFile::read(const std::string& name) const { return view(name).clone(); }

at::Tensor SafetensorsFile::read(const std::string& name, const Box& box) const {
  return view(name, box).clone(at::MemoryFormat::Contiguous);
}

void SafetensorsFile::copy_to(const at::Tensor& target, const std::string& name, const Box& box) const {
  target.copy_(view(name, box));
}

at::Tensor SafetensorsFile::view(const std::string& name, const Box& box) const {
  const auto& shape = entry(name).shape;
  TORCH_CHECK_VALUE(box.is_in(shape), path_.string(), ": tensor ", name, " of shape ", at::IntArrayRef(shape),
                    " has no part ", box.text());
  return view_of(view(name), Box::whole(shape), box);
}

std::vector<SafetensorsWriter::Entry> SafetensorsWriter::entries_of(const std::vector<NamedTensor>& tensors) {
  std::vector<Entry> entries;
  for (const auto& [name, tensor] : tensors) entries.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  return entries;
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata)
    : entries_(std::move(entries)) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t position = 0;
  for (const auto& [name, dtype, shape] : entries_) {
    TORCH_CHECK_VALUE(name != "__metadata__" && !header.contains(name), path.string(), ": tensor name ", name,
                      " is reserved or given twice");
    const auto dtype_name = safetensors_dtype(dtype, name);
    const auto bytes = byte_count(shape, 8 * static_cast<int64_t>(c10::elementSize(dtype)));
    TORCH_CHECK_VALUE(bytes.has_value(), path.string(), ": tensor ", name, " can't have shape ",
                      at::IntArrayRef(shape));
    header[name] = {{"dtype", dtype_name}, {"shape", shape}, {"data_offsets", {position, position + *bytes}}};
    position += *bytes;
  }
  auto text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // values start at a multiple of 8 bytes
  const uint64_t header_bytes = text.size();
  file_ = std::make_unique<internal::CompleteFile>(path);
  file_->write(&header_bytes, sizeof(header_bytes));
  file_->write(text.data(), text.size());
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const at::Tensor& tensor) {
  TORCH_INTERNAL_ASSERT(next_ < entries_.size() && tensor.scalar_type() == entries_[next_].dtype &&
                        tensor.sizes() == entries_[next_].shape);
  const auto values = tensor.detach().to(at::kCPU).contiguous();
  file_->write(values.const_data_ptr(), values.nbytes());
  ++next_;
}

FileDigest SafetensorsWriter::commit() {
  TORCH_INTERNAL_ASSERT(next_ == entries_.size());
  return file_->commit();
}

FileDigest write_safetensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors,
                             const std::map<std::string, std::string>& metadata) {
  SafetensorsWriter writer(path, SafetensorsWriter::entries_of(tensors), metadata);
  for (const auto& [name, tensor] : tensors) writer.write(tensor);
  return writer.commit();
}

}  // namespace megatron_cpp
