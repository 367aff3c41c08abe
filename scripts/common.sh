# Shared by the scripts beside it; source it, don't run it.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# The folder that stands for / where limits are read; tests have one of their own.
system=${system:-}

# Prints a command, so that it can be pasted.
show() {
  printf '+%s\n' "$(printf ' %q' "$@")" >&2
}

# Prints a command and runs it.
run() {
  show "$@"
  "$@"
}

# Prints the comment at the head of the script: its help.
usage() {
  awk 'NR > 1 { if (!/^#( |$)/) exit; sub(/^# ?/, ""); print }' "$0"
}

warn() {
  printf '%s: warning: %s\n' "$(basename -- "$0")" "$*" >&2
}

fail() {
  printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
  exit 1
}

# absolute WHAT PATH: prints PATH as seen from elsewhere, too. The shell expands ~ at the beginning of a word only, so it
# arrives as it stands in key=~/folder.
absolute() {
  [[ $2 != "~" && $2 != "~"/* ]] || fail "$1 $2 starts with ~, which isn't expanded here: write \$HOME"
  [[ -z $2 || $2 == /* ]] || { printf '%s\n' "$PWD/$2"; return; }
  printf '%s\n' "$2"
}

# use_cache: sets `cache`, the folder for what all clones of a user share. Asked for where it is needed: not everybody has
# a HOME.
use_cache() {
  local base=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
  [[ -n $base ]] || fail "there is no HOME for LibTorch and pictures: set XDG_CACHE_HOME to a folder with room for them"
  cache=$(absolute XDG_CACHE_HOME "$base")/megatron_cpp
}

# need_space FOLDER GIGABYTES WHAT: refuses to begin what can't be finished. What df doesn't know is not held against it.
need_space() {
  local free
  free=$(df -Pk -- "$1" 2>/dev/null | awk 'NR == 2 { print $4 }') || true
  [[ $free =~ ^[0-9]+$ && $free -lt $(($2 * 1000000)) ]] || return 0
  free=$(awk -v k="$free" 'BEGIN { printf "%.1f", k * 1024 / 1e9 }')
  fail "no room for $3: $free GB are free in $1, and $2 are needed to set it up. Set XDG_CACHE_HOME to a folder on a larger disk"
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

system_name() {
  (. "$system/etc/os-release" 2>/dev/null && printf '%s\n' "${PRETTY_NAME:-}") || printf 'an unknown system\n'
}

# install_packages [--of SYSTEM] NAME...: those of Debian's packages that aren't there yet; any of those in `a|b` will do,
# and a is what is installed. SYSTEM: the release that has them, where others don't.
install_packages() {
  local of="Debian 12 and 13, and Ubuntu 24.04"
  if [[ $1 == --of ]]; then
    of=$2
    shift 2
  fi
  command -v dpkg-query >/dev/null || fail "this is no Debian system; install the equivalents of: ${*%%|*}"
  local package name missing=()
  for package in "$@"; do
    for name in ${package//|/ }; do
      [[ $(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null) != installed ]] || continue 2
    done
    missing+=("${package%%|*}")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  printf 'Debian packages that are missing: %s\n' "${missing[*]}" >&2
  command -v apt-get >/dev/null || fail "this system has no apt-get; install the equivalents of: ${missing[*]}"
  # A set-up that was killed may have left dpkg half way. Whether that, or a source of apt's that doesn't answer, matters is for
  # the installation to find out.
  as_root dpkg --configure -a || warn "dpkg --configure -a failed"
  as_root apt-get update -qq || warn "apt-get update failed: going on with the lists that are there"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    -o DPkg::Lock::Timeout=120 "${missing[@]}" ||
    fail "apt-get can't install: ${missing[*]}. $of have them under these names; this is $(system_name)"
}

# python_environment NAME PACKAGE...: the virtual environment $cache/NAME with these packages of PyPI, which all clones
# share. A new list of packages wants a new name.
python_environment() {
  use_cache
  local environment=$cache/$1 name=$1 gigabytes=1
  shift
  # 5.3 GB, and the wheels that it is unpacked from.
  [[ $* != *torch==* ]] || gigabytes=9
  mkdir -p "$cache" || fail "$cache can't be made: set XDG_CACHE_HOME to a folder of yours"
  # Two clones may set up at the same time: the second waits and finds it done.
  exec 9>"$environment.lock"
  flock 9
  if [[ ! -e $environment/complete ]]; then
    rm -rf "$environment"
    need_space "$cache" "$gigabytes" "$name"
    run /usr/bin/python3 -m venv "$environment"
    # What pip unpacks on the way goes beside it: the room was looked for there, and /tmp is often small.
    mkdir "$environment/tmp"
    TMPDIR=$environment/tmp run "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir "$@"
    rm -rf "$environment/tmp"
    touch "$environment/complete"
  fi
  flock -u 9
}

# use_oldest_libtorch: sets up the oldest LibTorch that the project builds with, and sets Torch_ROOT to it. It is also the one
# of the machines with a GPU that scripts/gpu_check.sh is for.
use_oldest_libtorch() {
  local name=torch-2.11.0-1  # the last number changes when the packages in it do
  python_environment "$name" torch==2.11.0 "nvidia-cuda-crt==13.0.*"
  Torch_ROOT=$(echo "$cache/$name"/lib/python3*/site-packages/torch)
  export Torch_ROOT
}

# cgroup_folders CONTROLLER: the folders, own one first, in which the limits of this process's control groups stand, of
# version 2 and of version 1 (CONTROLLER: cpu or memory).
cgroup_folders() {
  local id controllers path mount
  [[ -r $system/proc/self/cgroup ]] || return 0
  while IFS=: read -r id controllers path; do
    if [[ $id == 0 && -z $controllers ]]; then
      mount=$system/sys/fs/cgroup
      [[ ! -d $mount/unified ]] || mount+=/unified
    elif [[ ,$controllers, == *,$1,* ]]; then
      mount=$system/sys/fs/cgroup/$controllers
      [[ -d $mount ]] || mount=$system/sys/fs/cgroup/$1
    else
      continue
    fi
    # In a container the path is often the host's, and the mount shows the own group at its root.
    while [[ -n $path && $path != / ]]; do
      [[ ! -d $mount$path ]] || printf '%s\n' "$mount$path"
      path=${path%/*}
    done
    [[ ! -d $mount ]] || printf '%s\n' "$mount"
  done <"$system/proc/self/cgroup"
}

# A number out of a file, or nothing: "max" and -1 are no limit, and v1's is a number near 2^63.
limit_in() {
  local value=
  [[ ! -r $1 ]] || read -r value _ <"$1" || true
  [[ ! $value =~ ^[0-9]{1,17}$ ]] || printf '%s\n' "$value"
}

# cores: how many this process may use, by its affinity and by its control groups' CPU time. nproc alone goes by
# OMP_NUM_THREADS, which isn't for compilers, and knows no control groups.
cores() {
  local count folder quota period
  count=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
  while read -r folder; do
    quota=$(limit_in "$folder/cpu.cfs_quota_us") period=$(limit_in "$folder/cpu.cfs_period_us")
    if [[ -r $folder/cpu.max ]]; then
      quota=$(limit_in "$folder/cpu.max")
      read -r _ period <"$folder/cpu.max" || true
    fi
    [[ -n $quota && ${period:-0} -gt 0 && $((quota / period)) -lt $count ]] || continue
    count=$((quota / period))
  done < <(cgroup_folders cpu)
  printf '%d\n' $((count > 0 ? count : 1))
}

# gpus: how many GPUs a program sees here.
gpus() {
  local count=0 visible=${CUDA_VISIBLE_DEVICES-all}
  if command -v nvidia-smi >/dev/null; then
    count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
  fi
  # A list hides the rest; from -1 on it hides everything.
  if [[ $visible != all ]]; then
    visible=$(tr ',' '\n' <<<"$visible" | awk '/^ *-/ || !/[^ ]/ { exit } { ++n } END { print n + 0 }')
    [[ $visible -ge $count ]] || count=$visible
  fi
  printf '%d\n' "$count"
}

# available_memory: in MB, of the machine and of the control groups; files that are cached can be given up.
available_memory() {
  local available folder limit name used cached left
  available=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' "$system/proc/meminfo")
  while read -r folder; do
    for name in memory.max memory.high memory.limit_in_bytes; do
      limit=$(limit_in "$folder/$name")
      [[ -n $limit ]] || continue
      used=$(limit_in "$folder/memory.current")
      [[ $name != memory.limit_in_bytes ]] || used=$(limit_in "$folder/memory.usage_in_bytes")
      cached=0
      [[ ! -r $folder/memory.stat ]] || cached=$(awk -v v1="$([[ $name != memory.limit_in_bytes ]] || echo total_)" \
        '$1 == v1 "inactive_file" || $1 == v1 "active_file" { sum += $2 } END { printf "%.0f", sum }' "$folder/memory.stat")
      left=$(((limit - ${used:-0} + cached) / 1048576))
      [[ $left -ge ${available:-$((left + 1))} ]] || available=$left
    done
  done < <(cgroup_folders memory)
  printf '%d\n' $((${available:-0} > 0 ? available : 0))
}

# compile_jobs: as many as there are cores and memory for: one compiler takes up to 2 GB with LibTorch's headers.
compile_jobs() {
  local jobs memory_jobs
  jobs=$(cores)
  memory_jobs=$(($(available_memory) / 2048))
  [[ $memory_jobs -ge $jobs ]] || jobs=$memory_jobs
  printf '%d\n' $((jobs > 0 ? jobs : 1))
}

# mpirun and the programs under it: root is fine in a container, and waiting ranks leave their core to those that work.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
# hwloc complains where a container has no /sys.
export HWLOC_HIDE_ERRORS=2

# use_launcher BUILD: sets `launcher`, which starts programs of that build folder on `-np N` ranks, with the flags that it
# wants. It is the one of the MPI that they were built with: the first mpirun in PATH may be another's.
use_launcher() {
  local mpiexec
  [[ -r $1/CMakeCache.txt ]] || fail "there is no $1/CMakeCache.txt: run scripts/build.sh before"
  mpiexec=$(sed -n 's/^MPIEXEC_EXECUTABLE:[A-Z]*=//p' "$1/CMakeCache.txt")
  command -v "${mpiexec:-mpiexec}" >/dev/null ||
    fail "${mpiexec:-mpiexec}, which starts the programs in $1, isn't there: build again (scripts/build.sh)"
  launcher=("${mpiexec:-mpiexec}")
  # Open MPI takes as many ranks as there are cores unless told otherwise, and binds each to its own, two ranks' threads to one.
  # MPICH's Hydra does neither, and knows no such flags.
  if [[ $("${launcher[0]}" --version 2>&1) == *"Open MPI"* ]]; then
    launcher+=("${open_mpi_flags[@]}")
  fi
}
open_mpi_flags=(--oversubscribe --bind-to none)
