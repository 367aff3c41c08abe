# Shared by the scripts beside it; source it, don't run it.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# The root of the file system when limits are read; tests replace it by another folder.
system=${system:-}

# Prints a command in a form that can be pasted into a shell.
show() {
  printf '+%s\n' "$(printf ' %q' "$@")" >&2
}

# Prints a command and runs it.
run() {
  show "$@"
  "$@"
}

# Prints the comment at the beginning of the script, its help text.
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

# absolute WHAT PATH: prints PATH as an absolute path. Refuses ~, which the shell doesn't expand in key=~/folder.
absolute() {
  [[ $2 != "~" && $2 != "~"/* ]] || fail "$1 $2 starts with ~, which isn't expanded here: write \$HOME"
  [[ -z $2 || $2 == /* ]] || { printf '%s\n' "$PWD/$2"; return; }
  printf '%s\n' "$2"
}

# use_cache: sets `cache`, the folder that all clones of a user share. Called only where it is needed: HOME may be unset.
use_cache() {
  local base=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
  [[ -n $base ]] || fail "there is no HOME for LibTorch and pictures: set XDG_CACHE_HOME to a folder with room for them"
  cache=$(absolute XDG_CACHE_HOME "$base")/megatron_cpp
}

# need_space FOLDER GIGABYTES WHAT: fails if FOLDER has less free space than that. Does nothing if df can't tell.
need_space() {
  local free
  free=$(df -Pk -- "$1" 2>/dev/null | awk 'NR == 2 { print $4 }') || true
  [[ $free =~ ^[0-9]+$ && $free -lt $(($2 * 1000000)) ]] || return 0
  free=$(awk -v k="$free" 'BEGIN { printf "%.1f", k * 1024 / 1e9 }')
  fail "no room for $3: $free GB are free in $1, and $2 are needed to set it up. Set XDG_CACHE_HOME to a folder on a larger disk"
}

# as_root COMMAND...: runs COMMAND as root, with sudo if necessary.
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

# install_packages [--of SYSTEM] NAME...: installs the Debian packages that are missing. `a|b`: either is enough, and a is
# installed if both are missing. SYSTEM: the only release that has these packages, for the error message.
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
  # A killed installation may have left dpkg incomplete. This and a package source that doesn't answer are only warnings: the
  # installation fails if they matter.
  as_root dpkg --configure -a || warn "dpkg --configure -a failed"
  as_root apt-get update -qq || warn "apt-get update failed: going on with the lists that are there"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    -o DPkg::Lock::Timeout=120 "${missing[@]}" ||
    fail "apt-get can't install: ${missing[*]}. $of have them under these names; this is $(system_name)"
}

# python_environment NAME PACKAGE...: creates the virtual environment $cache/NAME, which all clones share, with these PyPI
# packages. A new list of packages needs a new name.
python_environment() {
  use_cache
  local environment=$cache/$1 name=$1 gigabytes=1
  shift
  # 5.3 GB, plus the wheels.
  [[ $* != *torch==* ]] || gigabytes=9
  mkdir -p "$cache" || fail "$cache can't be made: set XDG_CACHE_HOME to a folder of yours"
  # If two clones start at the same time, the second one waits for the first.
  exec 9>"$environment.lock"
  flock 9
  if [[ ! -e $environment/complete ]]; then
    rm -rf "$environment"
    need_space "$cache" "$gigabytes" "$name"
    run /usr/bin/python3 -m venv "$environment"
    # pip's temporary files go here, where the free space was checked; /tmp is often small.
    mkdir "$environment/tmp"
    TMPDIR=$environment/tmp run "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir "$@"
    rm -rf "$environment/tmp"
    touch "$environment/complete"
  fi
  flock -u 9
}

# use_oldest_libtorch: installs the oldest LibTorch that the project supports, and sets Torch_ROOT to it. The GPU machines
# of scripts/gpu_check.sh have it, too.
use_oldest_libtorch() {
  local name=torch-2.11.0-1  # the last number changes with the list of packages
  python_environment "$name" torch==2.11.0 "nvidia-cuda-crt==13.0.*"
  Torch_ROOT=$(echo "$cache/$name"/lib/python3*/site-packages/torch)
  export Torch_ROOT
}

# cgroup_folders CONTROLLER: prints the folders with the limits of this process's control groups, versions 2 and 1,
# innermost group first. CONTROLLER: cpu or memory.
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
    # In a container the path is often that of the host, while the mount has the process's group at its root.
    while [[ -n $path && $path != / ]]; do
      [[ ! -d $mount$path ]] || printf '%s\n' "$mount$path"
      path=${path%/*}
    done
    [[ ! -d $mount ]] || printf '%s\n' "$mount"
  done <"$system/proc/self/cgroup"
}

# Prints the limit in a file, or nothing if there is none: "max", -1, or in version 1 a number near 2^63.
limit_in() {
  local value=
  [[ ! -r $1 ]] || read -r value _ <"$1" || true
  [[ ! $value =~ ^[0-9]{1,17}$ ]] || printf '%s\n' "$value"
}

# cores: prints the number of cores that this process may use, by its affinity and the CPU quota of its control groups.
# nproc alone ignores control groups, and obeys OMP_NUM_THREADS, which isn't meant for compilers.
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

# gpus: prints the number of GPUs that a program can use here.
gpus() {
  local count=0 visible=${CUDA_VISIBLE_DEVICES-all}
  if command -v nvidia-smi >/dev/null; then
    count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
  fi
  # CUDA_VISIBLE_DEVICES hides GPUs that it doesn't list, and all those after an entry -1.
  if [[ $visible != all ]]; then
    visible=$(tr ',' '\n' <<<"$visible" | awk '/^ *-/ || !/[^ ]/ { exit } { ++n } END { print n + 0 }')
    [[ $visible -ge $count ]] || count=$visible
  fi
  printf '%d\n' "$count"
}

# available_memory: prints the available memory in MB, of the machine and the control groups; cached files count as free.
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

# compile_jobs: prints the number of compilers for these cores and this memory: each needs up to 2 GB for LibTorch's headers.
compile_jobs() {
  local jobs memory_jobs
  jobs=$(cores)
  memory_jobs=$(($(available_memory) / 2048))
  [[ $memory_jobs -ge $jobs ]] || jobs=$memory_jobs
  printf '%d\n' $((jobs > 0 ? jobs : 1))
}

# For mpirun and its programs: allows root, for containers, and makes waiting ranks yield their core.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
# hwloc complains in containers without /sys.
export HWLOC_HIDE_ERRORS=2

# use_launcher BUILD: sets `launcher`, the command with flags that starts programs of that build folder on `-np N` ranks. It
# belongs to the MPI that they were built with; the first mpirun in PATH may belong to another MPI.
use_launcher() {
  local mpiexec
  [[ -r $1/CMakeCache.txt ]] || fail "there is no $1/CMakeCache.txt: run scripts/build.sh before"
  mpiexec=$(sed -n 's/^MPIEXEC_EXECUTABLE:[A-Z]*=//p' "$1/CMakeCache.txt")
  command -v "${mpiexec:-mpiexec}" >/dev/null ||
    fail "${mpiexec:-mpiexec}, which starts the programs in $1, isn't there: build again (scripts/build.sh)"
  launcher=("${mpiexec:-mpiexec}")
  # By default Open MPI refuses more ranks than cores, and binds all threads of a rank to one core. MPICH's Hydra does
  # neither, and doesn't know these flags.
  if [[ $("${launcher[0]}" --version 2>&1) =~ Open\ MPI|OpenRTE ]]; then  # as mpirun and mpiexec of version 4 say
    launcher+=("${open_mpi_flags[@]}")
  fi
}
open_mpi_flags=(--oversubscribe --bind-to none)
