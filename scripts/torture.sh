#!/usr/bin/env bash
# Kills, stops and interrupts ranks of small training runs, damages their checkpoints, fills their disks, breaks their data.
# Checks that each job ends soon and says why, that no checkpoint is lost, and that the run that goes on has the losses and
# weights of one that nothing happened to, bit for bit.
#
#   scripts/torture.sh [OPTIONS]   a minute, unless counts are given
#   scripts/torture.sh --kills 200 --damaged 200 --full-disks 20 --sigterms 50 --stops 20 --broken-data 60
#   scripts/torture.sh --seed S --only kills:3   repeats a case alone
#
# Counts are numbers of faults. --pictures data/tuxpaint: train on a mix of conversations about two of these pictures, text
# without pictures, and the captioned pictures, 2 : 1 : 1; no broken data then. --ranks 2: no runs of four ranks. --seconds: in which a job must end after a fault (10).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help ]] || { usage; exit 0; }
"$root/scripts/build.sh" --target step37
export OMP_NUM_THREADS=1
use_launcher "$root/build"
export MCPP_MPIEXEC="${launcher[*]@Q} -np" MCPP_PROGRAM=$root/build/bin/step37
run python3 -B "$root/tests/field/torture.py" "$@"
