# Shared by the scripts beside it; source it, don't run it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_cpp

# Prints a command and runs it.
run() {
  printf '+ %s\n' "$*" >&2
  "$@"
}

# Prints the comment at the head of the script: its help.
usage() {
  awk 'NR > 1 { if (!/^#( |$)/) exit; sub(/^# ?/, ""); print }' "$0"
}

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# as_root COMMAND...: as root, by sudo if need be.
as_root() {
  local sudo=()
  if [[ $(id -u) -ne 0 ]]; then
    command -v sudo >/dev/null || fail "there is neither root nor sudo for: $*"
    sudo=(sudo)
  fi
  run "${sudo[@]}" "$@"
}

# install_packages NAME...: those of Debian's packages that aren't there yet.
install_packages() {
  command -v dpkg-query >/dev/null || fail "this is no Debian system; install the equivalents of: $*"
  local package missing=()
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  printf 'Debian packages that are missing: %s\n' "${missing[*]}" >&2
  # A set-up that was killed may have left dpkg half way.
  as_root dpkg --configure -a
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# python_environment NAME PACKAGE...: the virtual environment $cache/NAME with these packages of PyPI, which all clones
# share. A new list of packages wants a new name.
python_environment() {
  local environment=$cache/$1
  shift
  mkdir -p "$cache"
  # Two clones may set up at the same time: the second waits and finds it done.
  exec 9>"$environment.lock"
  flock 9
  if [[ ! -e $environment/complete ]]; then
    rm -rf "$environment"
    run /usr/bin/python3 -m venv "$environment"
    run "$environment/bin/pip" install --quiet --disable-pip-version-check "$@"
    touch "$environment/complete"
  fi
  flock -u 9
}

# mpirun and the programs under it: root is fine in a container, ranks are bound to no core (mpirun -np 2 alone would
# pin each to one), and waiting ranks leave their core to those that work.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
mpirun_flags=(--oversubscribe --bind-to none)
