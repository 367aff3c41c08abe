// How the host's memory is had and kept.
#pragma once

namespace megatron_cpp::parallel {

/// Makes this process keep the memory that tensors on the CPU give back, and have it in huge pages. Without it glibc
/// returns every large block to the system, and the next step pays again for mapping, zeroing and first touching each
/// of its pages: forward and backward of a word embedding at S=8192, H=4096 then take twice as long
/// (docs/image-insert.md). The price is that a process does not shrink again below what it once had.
///
/// Call it first in main, before any tensor is made; the environment variable THP_MEM_ALLOC_ENABLE=0 leaves huge pages
/// off. Not collective. Does nothing but set that variable where the C library is not glibc.
void keep_freed_host_memory();

}  // namespace megatron_cpp::parallel
