#!/usr/bin/env bash
# Prints the line coverage of the tests, per file and in total. Run scripts/test.sh --preset coverage first.
#
#   scripts/coverage.sh [--html FILE]   FILE: a page that shows each line
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --html) [[ $# -ge 2 ]] || fail "--html needs a file"; options+=(--html-details "$(realpath "$2")"); shift 2 ;;
    --help) usage; exit 0 ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
done
[[ -d $root/build-coverage ]] || fail "there is no build-coverage/: run scripts/test.sh --preset coverage first"
install_packages gcovr

cd "$root"
run gcovr -j "$(cores)" --root . --filter parallel/ --filter megatron_cpp/ --filter step37/ \
  --exclude-throw-branches build-coverage "${options[@]}"
