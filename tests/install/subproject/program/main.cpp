#include <cstdio>

#include "megatron_cpp/parallel/runtime.h"

namespace parallel = megatron_cpp::parallel;

int main() {
  return parallel::Runtime::run([](parallel::Runtime& runtime) {
    std::printf("rank %d of %d\n", runtime.rank(), runtime.size());
    return 0;
  });
}
