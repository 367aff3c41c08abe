#!/usr/bin/env bash
# Builds and runs the tests, all unless ctest options select some.
#
#   scripts/test.sh [--preset NAME] [--device cpu|cuda] [--target NAME | --no-build] [ctest options, such as -R linear]
#
# Presets are those of CMakePresets.json: release (the default), debug, sanitize, quick, coverage, oldest, shared, mpich.
# --target builds only that target.
# --device cuda runs the multi-rank tests over NCCL; ranks share GPUs if there are more ranks than GPUs.
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
# Removes the line counts of earlier runs.
[[ $preset != coverage ]] || find build-coverage -name '*.gcda' -delete
run ctest --preset "$preset" -j "$(cores)" "${options[@]}"
