#include "step37/insert/options.h"

namespace megatron_cpp::step37 {

bool checked_by_default() {
#ifdef NDEBUG
  return false;
#else
  return true;
#endif
}

}  // namespace megatron_cpp::step37
