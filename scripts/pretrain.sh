#!/usr/bin/env bash
# Sets up, builds, fetches the pictures and trains Step3.7 on them. Run again, it goes on where it stopped.
#
#   scripts/pretrain.sh [--ranks N] [--config FILE] [section.key=value ...]
#
#   scripts/pretrain.sh                                      configs/tuxpaint.yaml on two ranks
#   scripts/pretrain.sh data.directory=my/pictures run.directory=runs/mine
#   scripts/pretrain.sh --ranks 4 parallel.tensor=2          two replicas of two ranks
#
# Folders in the configuration and in settings are relative to the clone's root. The pictures are fetched if the
# configuration names data/tuxpaint and no setting another folder.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ranks=2
config=$root/configs/tuxpaint.yaml
overrides=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --ranks) [[ $# -ge 2 ]] || fail "--ranks needs a number"; ranks=$2; shift 2 ;;
    --config) [[ $# -ge 2 ]] || fail "--config needs a file"; config=$(realpath "$2"); shift 2 ;;
    --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *=*) overrides+=("$1"); shift ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "--ranks $ranks: expected a number of ranks"

"$root/scripts/build.sh" --target step37
cd "$root"
if grep -q data/tuxpaint "$config" && [[ " ${overrides[*]}" != *" data.directory="* ]]; then
  scripts/fetch_tuxpaint.sh
fi

# Cores are shared out among the ranks.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
progress=plain
[[ -t 1 ]] && progress=line
run mpirun -np "$ranks" "${mpirun_flags[@]}" build/bin/step37 pretrain --config "$config" --progress "$progress" \
  "${overrides[@]}"
