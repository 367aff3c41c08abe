// A program that logs with spdlog, whose fmt is a library, and another one than that among LibTorch's headers.
#include <spdlog/spdlog.h>

#include "megatron_cpp/parallel/runtime.h"

namespace parallel = megatron_cpp::parallel;

#if FMT_VERSION != OWN_FMT_VERSION
#error "this is LibTorch's fmt"
#endif
#ifdef FMT_HEADER_ONLY
#error "LibTorch's way of using fmt has got into a project of others"
#endif

int main() {
  return parallel::Runtime::run([](parallel::Runtime& runtime) {
    spdlog::info("rank {} of {}, with an fmt of its own", runtime.rank(), runtime.size());
    return 0;
  });
}
