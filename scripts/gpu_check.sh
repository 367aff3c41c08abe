#!/usr/bin/env bash
# Builds a folder with checks for a machine with a GPU, and runs them. docs/gpu.md says what each part shows.
#
#   scripts/gpu_check.sh build [FOLDER]                        default: build-gpu/bundle; the path must have no blanks
#   scripts/gpu_check.sh run FOLDER [PART...] [--output DIR]   as FOLDER/run.sh; its --help lists the parts
#
# build: needs Debian 12; uses torch 2.11.0 for CUDA 13.0, which it installs in the cache. The folder contains programs,
# tests, test cases, pictures, Open MPI and all shared libraries that aren't part of LibTorch or glibc, 40 MiB at most. The
# last line of output is "GPU check: FOLDER".
# run: uses the LibTorch of the python3 in PATH; needs no network, compiler or MPI. Parts are letters; the default is all.
# Without a GPU, parts run on the CPU at small sizes, or say so. Exit status 0 if nothing that ran was wrong.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build() {
  local folder
  case ${1:-} in
    -*) fail "unknown option $1 (see --help)" ;;
    '') folder=$(realpath --relative-to="$PWD" -m "$root/build-gpu/bundle") ;;
    *) folder=$1 ;;
  esac
  [[ $# -le 1 ]] || fail "build takes one folder, not also $2 (see --help)"
  [[ ! $folder =~ [[:space:]] ]] || fail "'$folder': the folder's path must have no blanks"
  # Programs need the glibc of the system that they were built on, or a newer one: build on an old system.
  grep -qs '^VERSION_CODENAME=bookworm' "$system/etc/os-release" ||
    fail "build wants Debian 12, whose programs run on later systems; this is $(system_name)"

  install_packages python3-venv
  use_oldest_libtorch
  "$root/scripts/build.sh" --preset gpu --target gpu_check_programs >&2
  # Pictures are scaled with Pillow.
  install_packages binutils openmpi-bin python3-pil
  "$root/scripts/fetch_tuxpaint.sh" >&2
  run /usr/bin/python3 -B "$root/benchmarks/gpu_check/bundle.py" --source "$root" --build "$root/build-gpu" \
    --torch "$Torch_ROOT" --pictures "$root/data/tuxpaint" --folder "$folder"
  printf 'GPU check: %s\n' "$folder"
}

case ${1:-} in
  build) shift; build "$@" ;;
  run)
    [[ $# -ge 2 ]] || fail "run needs the folder that build made (see --help)"
    [[ -e $2/run.sh ]] || fail "$2 is no folder that build made: it has no run.sh"
    exec "$2/run.sh" "${@:3}"
    ;;
  --help) usage ;;
  '') fail "build or run? (see --help)" ;;
  *) fail "unknown command $1: expected build or run (see --help)" ;;
esac
