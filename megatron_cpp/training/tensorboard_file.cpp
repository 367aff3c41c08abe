#include "megatron_cpp/training/tensorboard_file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>

namespace megatron_cpp {
namespace {

/// CRC-32C (Castagnoli), by table.
uint32_t crc32c(std::string_view bytes) {
  static const auto table = [] {
    std::array<uint32_t, 256> values{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1U) ^ ((value & 1U) != 0 ? 0x82f63b78U : 0U);
      values[i] = value;
    }
    return values;
  }();
  uint32_t crc = ~0U;
  for (const char byte : bytes) crc = table[(crc ^ static_cast<unsigned char>(byte)) & 0xffU] ^ (crc >> 8U);
  return ~crc;
}

/// TFRecord's: a file that holds checksums would else have the same one for different data.
uint32_t masked_crc(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return ((crc >> 15U) | (crc << 17U)) + 0xa282ead8U;
}

/// Little-endian, as the machines that this library runs on are.
template <class Value>
std::string bytes_of(Value value) {
  std::string bytes(sizeof(value), '\0');
  std::memcpy(bytes.data(), &value, sizeof(value));
  return bytes;
}

/// A message of protocol buffers (https://protobuf.dev/programming-guides/encoding).
class Message {
 public:
  Message& add(int field, double value) { return raw(field, 1, bytes_of(value)); }
  Message& add(int field, float value) { return raw(field, 5, bytes_of(value)); }
  Message& add(int field, int64_t value) { return raw(field, 0, varint(static_cast<uint64_t>(value))); }
  Message& add(int field, std::string_view value) { return raw(field, 2, varint(value.size()) + std::string(value)); }

  const std::string& bytes() const { return bytes_; }

 private:
  static std::string varint(uint64_t value) {
    std::string bytes;
    for (; value >= 0x80U; value >>= 7U) bytes += static_cast<char>((value & 0x7fU) | 0x80U);
    return bytes + static_cast<char>(value);
  }
  Message& raw(int field, int wire_type, const std::string& value) {
    bytes_ += varint(static_cast<uint64_t>(field * 8 + wire_type)) + value;
    return *this;
  }

  std::string bytes_;
};

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

std::filesystem::path file_in(const std::filesystem::path& folder) {
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) std::strcpy(host.data(), "host");
  return folder / fmt::format("events.out.tfevents.{:010}.{}.{}", static_cast<int64_t>(now()), host.data(), ::getpid());
}

}  // namespace

// Fields of Event: 1 wall_time, 2 step, 3 file_version, 5 summary, 7 session_log.
TensorBoardFile::TensorBoardFile(const std::filesystem::path& folder, int64_t last_step)
    : path_(file_in(folder)), file_(-1) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  file_.reset(::open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666));
  if (file_.get() < 0) throw WriteError(c10::str("cannot write ", path_.string(), ": ", std::strerror(errno)));
  write_event(Message().add(1, now()).add(3, std::string_view("brain.Event:2")).bytes());
  const int64_t start = 1;  // SessionLog.START
  write_event(Message().add(1, now()).add(2, last_step + 1).add(7, Message().add(1, start).bytes()).bytes());
}

void TensorBoardFile::write(const StepMetrics& metrics) {
  Message summary;
  for (const auto& [name, value] : metrics.numbers()) {
    summary.add(1, Message().add(1, std::string_view(name)).add(2, static_cast<float>(value)).bytes());
  }
  write_event(Message().add(1, now()).add(2, metrics.step).add(5, summary.bytes()).bytes());
}

void TensorBoardFile::write_event(std::string_view event) {
  const auto length = bytes_of(static_cast<uint64_t>(event.size()));
  const auto record = length + bytes_of(masked_crc(length)) + std::string(event) + bytes_of(masked_crc(event));
  const auto end = ::lseek(file_.get(), 0, SEEK_END);
  try {
    internal::write_all(file_.get(), record.data(), record.size(), path_.string());
  } catch (const WriteError&) {
    // A reader would stop at a record that is cut short.
    if (::ftruncate(file_.get(), end) != 0) TORCH_WARN("cannot shorten ", path_.string());
    throw;
  }
}

}  // namespace megatron_cpp
