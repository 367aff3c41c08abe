#include "parallel/mpi/peer_process.h"

#include <fmt/format.h>
#include <mpi.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <iterator>
#include <sstream>

#include "parallel/hash.h"
#include "parallel/mpi/mpi_check.h"

namespace megatron_cpp::parallel {
namespace {

using std::chrono::milliseconds;

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string target_of(const char* link) {
  std::array<char, 256> target{};
  const auto length = readlink(link, target.data(), target.size() - 1);
  return length < 0 ? std::string{} : std::string(target.data(), static_cast<size_t>(length));
}

/// Nothing if the process is gone.
std::optional<ProcessLook> look_at(int64_t pid, int64_t start) {
  const auto look = parse_process_stat(text_of(fmt::format("/proc/{}/stat", pid)), sysconf(_SC_CLK_TCK));
  return look && look->start == start ? look : std::nullopt;
}

bool can_be_seen(const PeerProcess& peer) {
  static const auto own = own_process();
  return own.place != 0 && own.place == peer.place;
}

bool is_one_of(std::string_view states, char state) { return states.find(state) != std::string_view::npos; }

}  // namespace

PeerProcess own_process() {
  PeerProcess own;
  own.pid = getpid();
  const auto look = parse_process_stat(text_of("/proc/self/stat"), sysconf(_SC_CLK_TCK));
  if (!look) return own;  // no /proc: place 0 means that no process can be seen
  own.start = look->start;
  own.place = stable_hash(text_of("/proc/sys/kernel/random/boot_id") + target_of("/proc/self/ns/pid"));
  return own;
}

std::vector<PeerProcess> processes_of(const MpiCommunicator& communicator) {
  const auto own = own_process();
  std::vector<PeerProcess> all(static_cast<size_t>(communicator.size()));
  MCPP_MPI_CHECK(MPI_Allgather(&own, sizeof(own), MPI_BYTE, all.data(), sizeof(own), MPI_BYTE, communicator.get()));
  return all;
}

std::optional<ProcessLook> parse_process_stat(const std::string& text, int64_t ticks_per_second) {
  // "PID (name) state ...": the name may hold blanks and brackets.
  const auto name_end = text.rfind(") ");
  if (name_end == std::string::npos || ticks_per_second <= 0) return std::nullopt;
  std::istringstream fields(text.substr(name_end + 2));
  ProcessLook look;
  fields >> look.state;
  // By the numbers of proc(5): 14 and 15 are the time in user mode and in the kernel, 22 the start.
  std::array<int64_t, 23> values{};
  for (size_t field = 4; field <= 22; ++field) fields >> values[field];
  if (!fields) return std::nullopt;
  look.cpu_time = milliseconds((values[14] + values[15]) * 1000 / ticks_per_second);
  look.start = values[22];
  return look;
}

std::optional<char> state_of(const PeerProcess& peer) {
  if (!can_be_seen(peer)) return std::nullopt;
  const auto look = look_at(peer.pid, peer.start);
  return look ? look->state : 'X';
}

PeerPatience::PeerPatience(const PeerProcess& peer, Clock::time_point begin)
    : peer_(peer), begin_(begin), is_here_(can_be_seen(peer)) {
  if (is_here_) first_ = look_at(peer_.pid, peer_.start);
}

bool PeerPatience::is_over(Clock::time_point now) {
  const auto waited = std::chrono::duration_cast<milliseconds>(now - begin_);
  if (!is_here_) return waited >= std::chrono::seconds(10);
  const auto look = look_at(peer_.pid, peer_.start);
  seen_ = !look || is_one_of("ZX", look->state) ? "gone" : is_one_of("Tt", look->state) ? "stopped" : "";
  if (!first_) return true;
  ++num_looks_;
  if (look && look->state == 'S') ++num_asleep_;
  return is_over(*first_, look, waited, 10 * num_asleep_ >= 9 * num_looks_);
}

bool PeerPatience::is_over(const ProcessLook& first, const std::optional<ProcessLook>& now, milliseconds waited,
                           bool mostly_asleep) {
  if (!now || is_one_of("TtZX", now->state)) return true;
  // Several threads together use a second of CPU time early, so two seconds must have passed as well.
  if (waited < std::chrono::seconds(2)) return false;
  const auto used = now->cpu_time - first.cpu_time;
  // A rank that waits for its peers polls: it uses CPU time, even if the process's main thread sleeps.
  return used >= std::chrono::seconds(1) || (mostly_asleep && used < milliseconds(50)) ||
         waited >= std::chrono::seconds(60);
}

}  // namespace megatron_cpp::parallel
