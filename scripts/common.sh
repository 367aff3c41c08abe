# Shared by the scripts beside it; source it, don't run it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_cpp

# Prints a command and runs it.
run() {
  printf '+ %s\n' "$*" >&2
  "$@"
}

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# mpirun and the programs under it: root is fine in a container, ranks are bound to no core (mpirun -np 2 alone would
# pin each to one), and waiting ranks leave their core to those that work.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
mpirun_flags=(--oversubscribe --bind-to none)
