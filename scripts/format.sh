#!/usr/bin/env bash
# Formats every source file with clang-format 14.
#
#   scripts/format.sh [--check]   --check changes nothing, and fails if a file would change
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=(-i)
case ${1:-} in
  "") ;;
  --check) action=(--dry-run --Werror) ;;
  --help) usage; exit 0 ;;
  *) fail "unknown option $1 (see --help)" ;;
esac

tool=clang-format-14
command -v "$tool" >/dev/null || tool=clang-format
command -v "$tool" >/dev/null || { tool=clang-format-14; install_packages --of "Debian 12" "$tool"; }
[[ $("$tool" --version) == *"version 14."* ]] || fail "$("$tool" --version): the project is formatted with version 14, which Debian 12 has (clang-format-14)"
cd "$root"
mapfile -t files < <(git ls-files --cached --others --exclude-standard '*.h' '*.cpp')
printf '+ %s %s (%d files)\n' "$tool" "${action[*]}" "${#files[@]}" >&2
"$tool" "${action[@]}" "${files[@]}"
