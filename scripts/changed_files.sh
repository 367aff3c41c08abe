#!/usr/bin/env bash
# Prints the files that changed since the commit CI_BASE, one per line, for the short checks. Without CI_BASE it is the
# newest commit that is older than a day. Without git, or without such a commit, every file counts as changed.
#
#   scripts/changed_files.sh [NAME...]   only those with such names, as in '*.cpp' '*.h'
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help ]] || { usage; exit 0; }
[[ $# -gt 0 ]] || set -- '*'
cd "$root"
base=${CI_BASE:-}
if [[ -z $base ]] && git rev-parse -q --verify HEAD >/dev/null 2>&1; then
  base=$(git rev-list -1 --before='1 day ago' HEAD)
fi
if [[ -n $base ]]; then
  git rev-parse -q --verify "$base^{commit}" >/dev/null || fail "CI_BASE=$base is no commit of this clone"
  # Includes new files that aren't committed yet.
  { git diff --name-only --diff-filter=d "$base" -- "$@"; git ls-files --others --exclude-standard -- "$@"; } | sort -u
else
  names=()
  for name in "$@"; do names+=(-o -name "$name"); done
  find . \( -path './build*' -o -path ./.git \) -prune -o -type f \( "${names[@]:1}" \) -printf '%P\n' | sort -u
fi
