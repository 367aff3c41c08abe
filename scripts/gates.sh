#!/usr/bin/env bash
# Runs the long checks, which take hours on two cores. Before a change is done, run those that it concerns; .ci/run has
# short forms of most.
#
#   scripts/gates.sh [NAME...]   the named checks, or all in this order:
#
#   tidy      clang-tidy on every file
#   sanitize  every check of the address and undefined-behaviour sanitizers, one- and two-rank tests
#   headers   each public header compiled alone
#   consumers complete builds of projects that include this one as a subproject
#   oldest    a build against the oldest LibTorch, and the two-rank tests of parallel/
#   shared    a build with shared libraries, installed, moved and used, and the two-rank tests
#   mpich     a build with MPICH and the two-rank tests under it
#   layouts   the distributed optimizer beside plain data parallelism, in every layout of 1 to 4 ranks
#   faults    200 ranks killed, stopped or throwing in the middle of a training step
#   torture   200 killed runs, 200 damaged checkpoints, and other faults of docs/reliability.md
#   precision 150 steps of training in bfloat16 beside float32
#   fuzz      a million inputs for every reader of outside data
#   coverage  the line coverage of the unit, one- and two-rank tests
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help ]] || { usage; exit 0; }
gates=("$@")
[[ $# -gt 0 ]] || gates=(tidy sanitize headers consumers oldest shared mpich layouts faults torture precision fuzz coverage)

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
    layouts)
      scripts/build.sh --target tensor_parallel_test
      use_launcher build
      for ranks in 1 2 3 4; do
        OMP_NUM_THREADS=1 TEST_RANKS=$ranks TEST_WATCHDOG_S=600 TEST_EVERY_LAYOUT=1 run "${launcher[@]}" -np "$ranks" \
          build/bin/tensor_parallel_test --gtest_filter='DistributedOptimizer.*'
      done
      ;;
    faults) scripts/faults.sh 200 ;;
    torture) scripts/torture.sh --kills 200 --damaged 200 --full-disks 20 --sigterms 50 --stops 20 --broken-data 60 ;;
    precision) scripts/precision.sh ;;
    fuzz) scripts/fuzz.sh --runs 1000000 ;;
    coverage)
      scripts/test.sh --preset coverage
      scripts/coverage.sh
      ;;
    *) fail "unknown gate $gate (see --help)" ;;
  esac
done
