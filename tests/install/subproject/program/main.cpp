#include <cstdio>

#include "parallel/runtime.h"

int main() {
  return parallel::Runtime::run([](parallel::Runtime& runtime) {
    std::printf("rank %d of %d\n", runtime.rank(), runtime.size());
    return 0;
  });
}
