#!/usr/bin/env bash
# Sets up, builds and runs all tests.
#
#   scripts/test.sh [--preset NAME] [--device cpu|cuda] [--target NAME | --no-build] [ctest options, such as -R linear]
#
# Presets are those of CMakePresets.json: release without one, debug, sanitize, quick, coverage, oldest, shared,
# mpich. --target builds no more than that.
# --device cuda runs the multi-rank tests over NCCL; ranks share GPUs where they outnumber them.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset=release
device=cpu
build=1
target=()
options=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --preset) [[ $# -ge 2 ]] || fail "--preset needs a name"; preset=$2; shift 2 ;;
    --device) [[ $# -ge 2 ]] || fail "--device needs cpu or cuda"; device=$2; shift 2 ;;
    --target) [[ $# -ge 2 ]] || fail "--target needs a name"; target=(--target "$2"); shift 2 ;;
    --no-build) build=; shift ;;
    --help) usage; exit 0 ;;
    *) options+=("$1"); shift ;;
  esac
done
[[ $device == cpu || $device == cuda ]] || fail "--device $device: expected cpu or cuda"
[[ $device == cuda ]] && export NCCL_MULTI_RANK_GPU_ENABLE=1

[[ -z $build ]] || "$root/scripts/build.sh" --preset "$preset" "${target[@]}" -DMCPP_TEST_DEVICE="$device"
cd "$root"
# Lines are counted from here on, and not on top of those of another build.
[[ $preset != coverage ]] || find build-coverage -name '*.gcda' -delete
run ctest --preset "$preset" -j "$(cores)" "${options[@]}"
