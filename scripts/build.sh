#!/usr/bin/env bash
# Installs what the build needs (Debian packages, LibTorch) and builds. May be run again at any time: it keeps what is
# complete, and repeats what an interrupted run left incomplete.
#
#   scripts/build.sh [--preset NAME] [--target NAME] [cmake options, such as -DMCPP_WERROR=ON]
#
# Presets are those of CMakePresets.json: release (the default), debug, sanitize, ...; each has its own build folder.
# LibTorch comes from the PyPI wheel, in a virtual environment in the user's cache folder that all clones share. To use
# another LibTorch, set Torch_ROOT to its torch/ (or libtorch/) folder.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

torch_version=2.15.0
cuda_version=13.2.*
packages=(g++ cmake ninja-build make ccache libopenmpi-dev openmpi-bin libgtest-dev librapidcheck-dev nlohmann-json3-dev
  libcli11-dev libyaml-cpp-dev libsentencepiece-dev libxxhash-dev 'libjpeg-dev|libjpeg62-turbo-dev' libpng-dev libwebp-dev
  libgif-dev libtiff-dev libstb-dev libspdlog-dev python3)
preset=release
target=all
options=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --preset) [[ $# -ge 2 ]] || fail "--preset needs a name"; preset=$2; shift 2 ;;
    --target) [[ $# -ge 2 ]] || fail "--target needs a name"; target=$2; shift 2 ;;
    --help) usage; exit 0 ;;
    -DTorch_ROOT=* | -DTorch_ROOT:*=*) Torch_ROOT=${1#*=}; shift ;;
    -D*) options+=("$1"); shift ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
done

install_libtorch() {
  local name=torch-$torch_version-1  # the last number changes with the list of packages
  # nvidia-cuda-crt: headers that are needed to compile against the wheel's CUDA parts, but not in the wheel.
  python_environment "$name" "torch==$torch_version" "nvidia-cuda-crt==$cuda_version"
  Torch_ROOT=$(echo "$cache/$name"/lib/python3*/site-packages/torch)
}

Torch_ROOT=$(absolute Torch_ROOT "${Torch_ROOT:-}")
if [[ -z $Torch_ROOT ]]; then
  packages+=(python3-venv)
  use_cache  # before anything is installed
fi
install_packages "${packages[@]}"
[[ $preset != fuzz ]] || install_packages --of "Debian 12" clang-14 libclang-rt-14-dev libfuzzer-14-dev
[[ -n $Torch_ROOT ]] || install_libtorch

cd "$root"
run cmake --preset "$preset" -DTorch_ROOT="$Torch_ROOT" "${options[@]}"
run cmake --build --preset "$preset" --target "$target" -j "$(compile_jobs)"
