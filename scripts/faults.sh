#!/usr/bin/env bash
# Injects faults into random ranks in random collectives of a training step: the rank is killed, stopped, or throws. Checks
# that the job ends, names the rank, and leaves no process behind.
#
#   scripts/faults.sh [COUNT]   200 faults unless told otherwise; FAULTS_SEED=N repeats a run
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

count=${1:-200}
if [[ $count == --help ]]; then
  usage
  exit 0
fi
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "$count: expected a number of faults"

"$root/scripts/build.sh" --target faults_test
export FAULTS=$count OMP_NUM_THREADS=1
use_launcher "$root/build"
export MCPP_MPIEXEC="${launcher[*]@Q} -np" MCPP_TEST_PROGRAM=$root/build/bin/fault_program
run "$root/build/bin/faults_test"
