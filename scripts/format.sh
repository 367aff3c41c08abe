#!/usr/bin/env bash
# Formats every source file with clang-format 14; with --check changes nothing and fails if one would change.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tool=clang-format-14
command -v "$tool" >/dev/null || tool=clang-format
command -v "$tool" >/dev/null || { tool=clang-format-14; install_packages "$tool"; }
[[ $("$tool" --version) == *"version 14."* ]] || fail "$("$tool" --version): the project is formatted with version 14"
cd "$root"
mapfile -t files < <(git ls-files --cached --others --exclude-standard '*.h' '*.cpp')
action=(-i)
[[ ${1:-} == --check ]] && action=(--dry-run --Werror)
printf '+ %s %s (%d files)\n' "$tool" "${action[*]}" "${#files[@]}" >&2
"$tool" "${action[@]}" "${files[@]}"
