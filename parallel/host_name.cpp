#include "parallel/host_name.h"

#include <unistd.h>

#include <array>

namespace megatron_cpp::parallel {

std::string host_name() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "";
}

}  // namespace megatron_cpp::parallel
