#include "parallel/host_memory.h"

#include <cstdlib>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace megatron_cpp::parallel {

void keep_freed_host_memory() {
  setenv("THP_MEM_ALLOC_ENABLE", "1", /*overwrite=*/0);  // LibTorch reads it at the first allocation
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);         // a block with its own mapping is unmapped when freed
  mallopt(M_TRIM_THRESHOLD, -1);  // never trim
#endif
}

}  // namespace megatron_cpp::parallel
