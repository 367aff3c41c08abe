

namespace megatron_cpp {

// Source of the target with the precompiled header that every library and test reuses (see the top CMakeLists.txt).

}  // namespace megatron_cpp
