// A group of which only one rank exists: for plans, shapes and volumes at sizes that no machine at hand has.
#pragma once

#include "parallel/group.h"

namespace parallel {

/// A group in which this process is rank `rank` of `size` and nobody else is there. Collectives on CPU tensors send
/// nothing and return at once, as if the other ranks contributed zeros: sums are this rank's summand, gathered parts of
/// others are zero. Shapes are checked as the MPI backend checks them. What compares ranks (agree(), check_equal(), the
/// checked mode of layers) finds zeros and throws. Put it under record() to count what would be sent. Not collective.
/// @throws c10::ValueError unless 0 <= rank < size.
GroupPtr make_rehearsal_group(int rank, int size);

}  // namespace parallel
