#!/usr/bin/env bash
# The long checks, which take hours on two cores: those of what a change touches before it is called done. .ci/run does
# the short form of most.
#
#   scripts/gates.sh [NAME...]   all, in this order, or those that are named:
#
#   tidy      clang-tidy on every file
#   sanitize  every check of the address and undefined-behaviour sanitizers, one- and two-rank tests
#   headers   each public header compiled alone
#   consumers projects that have this one as a part of theirs, built whole
#   oldest    a build against the oldest LibTorch, and the two-rank tests of parallel/
#   shared    a build with shared libraries, installed, moved and used, and the two-rank tests
#   mpich     a build with MPICH and the two-rank tests under it
#   faults    200 ranks killed, stopped or throwing in the middle of a training step
#   fuzz      a million inputs for every reader of outside data
#   coverage  the share of the lines that the one- and two-rank tests run
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help ]] || { usage; exit 0; }
gates=("$@")
[[ $# -gt 0 ]] || gates=(tidy sanitize headers consumers oldest shared mpich faults fuzz coverage)

cd "$root"
for gate in "${gates[@]}"; do
  printf '\n== %s\n' "$gate" >&2
  case $gate in
    tidy) scripts/tidy.sh ;;
    sanitize) scripts/test.sh --preset sanitize -L '^(unit|np1|np2)$' ;;
    headers) MCPP_CHANGED_HEADERS=all scripts/test.sh -R '^(install_package|headers_alone_test)$' ;;
    consumers)
      scripts/test.sh -L install
      for project in add_subdirectory FetchContent; do
        run cmake --build "build/installed/${project}_test" -j "$(compile_jobs)"
      done
      ;;
    oldest) (use_oldest_libtorch && scripts/test.sh --preset oldest --target parallel_test -R '^parallel_test.np2$') ;;
    shared) scripts/test.sh --preset shared -L '^(install|np2)$' ;;
    mpich)
      install_packages libmpich-dev mpich
      scripts/test.sh --preset mpich -L '^np2$'
      ;;
    faults) scripts/faults.sh 200 ;;
    fuzz) scripts/fuzz.sh --runs 1000000 ;;
    coverage)
      scripts/test.sh --preset coverage
      scripts/coverage.sh
      ;;
    *) fail "unknown gate $gate (see --help)" ;;
  esac
done
