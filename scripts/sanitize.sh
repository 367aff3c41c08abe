#!/usr/bin/env bash
# Runs one- and two-rank tests under the quick address and undefined-behaviour sanitizers, in build-quick/: the named tests,
# or those of the files that scripts/changed_files.sh prints. scripts/gates.sh runs every test, with every check.
#
#   scripts/sanitize.sh [--minutes N] [TEST...]   --minutes: stops after N minutes, and prints which tests were left
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

minutes=
tests=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --minutes) [[ $# -ge 2 ]] || fail "--minutes needs a number"; minutes=$2; shift 2 ;;
    --help) usage; exit 0 ;;
    -*) fail "unknown option $1 (see --help)" ;;
    *) tests+=("$1"); shift ;;
  esac
done
[[ $minutes =~ ^[0-9]*$ ]] || fail "--minutes $minutes: expected a number"
end=$((minutes * 60))

cd "$root"
scripts/build.sh --preset quick --target help >/dev/null
if [[ ${#tests[@]} -eq 0 ]]; then
  affected=$(scripts/changed_files.sh '*.cpp' '*.h' | scripts/affected_tests.py build-quick)
  [[ -z $affected ]] || mapfile -t tests <<<"$affected"
fi

left=()
for test in "${tests[@]}"; do
  remaining=$((end - SECONDS))
  if [[ -n $minutes && $remaining -le 0 ]]; then
    left+=("$test")
    continue
  fi
  # If the time ends during a build, the next call continues it.
  limit=()
  [[ -z $minutes ]] || limit=(timeout --kill-after=10 "$remaining")
  status=0
  "${limit[@]}" scripts/build.sh --preset quick --target "$test" || status=$?
  # The target also builds the programs that the test starts.
  [[ $status -ne 0 ]] || "${limit[@]}" scripts/test.sh --preset quick --no-build -R "^$test(\\.np[12]|_corpus)?\$" || status=$?
  if [[ -n $minutes && $status -ge 124 ]]; then
    left+=("$test")
  elif [[ $status -ne 0 ]]; then
    fail "$test failed under sanitizers"
  fi
done
if [[ ${#left[@]} -gt 0 ]]; then
  printf 'left to scripts/gates.sh sanitize: %s\n' "${left[*]}"
fi
