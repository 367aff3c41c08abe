// The namespaces of 0.1, for programs written for it; to be removed with the version after the next. A program includes
// this header itself: the library doesn't, since a program may have namespaces of these names.
#pragma once

namespace megatron_cpp {
namespace parallel {}
namespace step37 {}
}  // namespace megatron_cpp

namespace megatron = megatron_cpp;            ///< what is in megatron_cpp itself
namespace parallel = megatron_cpp::parallel;  ///< ranks, groups of them and collectives
namespace step37 = megatron_cpp::step37;      ///< the image insert and the model
