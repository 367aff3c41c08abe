#!/usr/bin/env bash
# Runs clang-tidy (.clang-tidy) and fails if it has something to say. It is PyPI's: from version 21 on it passes over
# the declarations of system headers, which with LibTorch's is three quarters of Debian's time.
#
#   scripts/tidy.sh                  every source file
#   scripts/tidy.sh --last-commit    those that the last commit changed
#   scripts/tidy.sh FILE.cpp ...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$root"
case ${1:-} in
  --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
  --last-commit)
    git rev-parse -q --verify HEAD~1 >/dev/null || { echo "there is no earlier commit to compare with" >&2; exit 0; }
    mapfile -t files < <(git diff --name-only --diff-filter=d HEAD~1 HEAD -- '*.cpp')
    ;;
  "") mapfile -t files < <(git ls-files '*.cpp') ;;
  -*) fail "unknown option $1 (see --help)" ;;
  *)
    files=("$@")
    for file in "${files[@]}"; do [[ -e $file ]] || fail "there is no file $file"; done
    ;;
esac

# A build folder of its own, never built: clang can't read g++'s precompiled headers.
scripts/build.sh --preset tidy --target help >/dev/null
# Examples are projects of their own; nccl_groups.cpp is listed only where LibTorch has CUDA.
listed=()
for file in "${files[@]}"; do
  grep -q "\"file\": \"$root/$file\"" build-tidy/compile_commands.json && listed+=("$file")
done
printf '+ clang-tidy on %d files\n' "${#listed[@]}" >&2
[[ ${#listed[@]} -gt 0 ]] || exit 0

version=23.1.4
install_packages python3-venv
python_environment "clang-tidy-$version" "clang-tidy==$version"
printf '%s\0' "${listed[@]}" | xargs -0 -n 1 -P "$(nproc)" "$cache/clang-tidy-$version/bin/clang-tidy" -p build-tidy --quiet --warnings-as-errors='*'
