// Keeps freed host memory in the process.
#pragma once

namespace megatron_cpp::parallel {

/// Keeps the memory of freed CPU tensors in this process, and uses huge pages for it. Without this glibc returns every
/// large block to the system, and the next step has to map, zero and touch all its pages again: forward and backward of
/// a word embedding at S=8192, H=4096 then take twice as long (docs/image-insert.md). The price is that a process does
/// not shrink again below what it once had.
///
/// Call it first in main, before any tensor is made; the environment variable THP_MEM_ALLOC_ENABLE=0 leaves huge pages
/// off. Not collective. Without glibc it only sets that variable.
void keep_freed_host_memory();

}  // namespace megatron_cpp::parallel
