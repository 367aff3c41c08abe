

namespace megatron_cpp {

// Carries the precompiled header that every library and test reuses (see the top CMakeLists.txt).

}  // namespace megatron_cpp
