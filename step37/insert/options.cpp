#include "step37/insert/options.h"

namespace step37 {

bool checked_by_default() {
#ifdef NDEBUG
  return false;
#else
  return true;
#endif
}

}  // namespace step37
