#!/usr/bin/env bash
# Sets up what the build needs (Debian packages, LibTorch) and builds. May be run again at any time: what is there is
# kept, what an interrupted run left half done is done again.
#
#   scripts/build.sh [--preset NAME] [--target NAME] [cmake options, such as -DMCPP_WERROR=ON]
#
# Presets are those of CMakePresets.json: release without one, debug, sanitize, ...; each builds in a folder of its own.
# LibTorch comes from the PyPI wheel, in a virtual environment under the user's cache folder that all clones share; set
# Torch_ROOT to the torch/ (or libtorch/) folder of your own to use that instead.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

torch_version=2.15.0
cuda_version=13.2.*
packages=(g++ cmake ninja-build make ccache libopenmpi-dev openmpi-bin libgtest-dev librapidcheck-dev nlohmann-json3-dev
  libcli11-dev libyaml-cpp-dev libsentencepiece-dev 'libjpeg-dev|libjpeg62-turbo-dev' libpng-dev libwebp-dev libgif-dev
  libtiff-dev libstb-dev libspdlog-dev python3)
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
  local name=torch-$torch_version-1  # the last number changes when the packages in it do
  # nvidia-cuda-crt: headers that compiling against the wheel's CUDA parts needs and the wheel does not bring.
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
