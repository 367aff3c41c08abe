#!/usr/bin/env bash
# Runs clang-tidy (.clang-tidy) and fails if it has findings. Uses clang-tidy from PyPI: since version 21 it skips the
# declarations in system headers, which with LibTorch's headers takes a quarter of the time of Debian's version.
#
#   scripts/tidy.sh                          every source file
#   scripts/tidy.sh --changed [--minutes N]  those that scripts/changed_files.sh prints; stops after N minutes, and prints
#                                            which files were left
#   scripts/tidy.sh FILE.cpp ...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

changed=
minutes=
files=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --changed) changed=1; shift ;;
    --minutes) [[ $# -ge 2 ]] || fail "--minutes needs a number"; minutes=$2; shift 2 ;;
    --help) usage; exit 0 ;;
    -*) fail "unknown option $1 (see --help)" ;;
    *) [[ -e $1 ]] || fail "there is no file $1"; files+=("$(realpath --relative-to "$root" "$1")"); shift ;;
  esac
done
[[ $minutes =~ ^[0-9]*$ ]] || fail "--minutes $minutes: expected a number"
cd "$root"
if [[ -n $changed ]]; then
  found=$(scripts/changed_files.sh '*.cpp')
  [[ -z $found ]] || mapfile -t files <<<"$found"
elif [[ ${#files[@]} -eq 0 ]]; then
  mapfile -t files < <(git ls-files '*.cpp')
fi

# A separate build folder, which is only configured: clang can't read the precompiled headers of g++.
scripts/build.sh --preset tidy --target help >/dev/null
# Examples are separate projects, and nccl_groups.cpp is compiled only if LibTorch has CUDA.
listed=()
unlisted=()
for file in "${files[@]}"; do
  if grep -q "\"file\": \"$root/$file\"" build-tidy/compile_commands.json; then listed+=("$file"); else unlisted+=("$file"); fi
done
printf '+ clang-tidy on %d files\n' "${#listed[@]}" >&2
[[ ${#unlisted[@]} -eq 0 ]] || printf 'not compiled here, so left out: %s\n' "${unlisted[*]}" >&2
[[ ${#listed[@]} -gt 0 ]] || exit 0

version=23.1.4
install_packages python3-venv
python_environment "clang-tidy-$version" "clang-tidy==$version"
export tidy="$cache/clang-tidy-$version/bin/clang-tidy" end=
[[ -z $minutes ]] || end=$(($(date +%s) + minutes * 60))
left=$(mktemp)
trap 'rm -f "$left"' EXIT
export left
one_file() {
  if [[ -n $end && $(date +%s) -ge $end ]]; then
    printf '%s ' "$1" >>"$left"
  else
    "$tidy" -p build-tidy --quiet --warnings-as-errors='*' "$1"
  fi
}
export -f one_file
status=0
printf '%s\0' "${listed[@]}" | xargs -0 -n 1 -P "$(cores)" bash -c 'one_file "$1"' one_file || status=$?
[[ ! -s $left ]] || printf 'left to scripts/gates.sh tidy: %s\n' "$(cat "$left")"
exit "$status"
