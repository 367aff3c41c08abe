// The name of the host that this process runs on.
#pragma once

#include <string>

namespace megatron_cpp::parallel {

/// As gethostname(2) says it; empty if that fails, with its reason in errno. Not collective.
std::string host_name();

}  // namespace megatron_cpp::parallel
