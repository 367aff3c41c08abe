#include "megatron_cpp/training/tensorboard_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cstring>
#include <system_error>

#include "parallel/host_name.h"

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
  return std::rotr(crc, 15) + 0xa282ead8U;
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
    bytes_ += varint(static_cast<uint64_t>(field) * 8 + static_cast<uint64_t>(wire_type)) + value;
    return *this;
  }

  std::string bytes_;
};

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

std::filesystem::path new_file_in(const std::filesystem::path& folder) {
  std::error_code ignored;  // opening the file says it
  std::filesystem::create_directories(folder, ignored);
  return folder / fmt::format("events.out.tfevents.{:010}.{}.{}", static_cast<int64_t>(now()), parallel::host_name(),
                              ::getpid());
}

}  // namespace

// Fields of Event: 1 wall_time, 2 step, 3 file_version, 5 summary, 7 session_log.
TensorBoardFile::TensorBoardFile(const std::filesystem::path& folder, int64_t last_step) : file_(new_file_in(folder)) {
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
  file_.append(length + bytes_of(masked_crc(length)) + std::string(event) + bytes_of(masked_crc(event)));
}

}  // namespace megatron_cpp
