#!/usr/bin/env bash
# Builds, fetches the pictures and trains Step3.7 on them. The next run resumes where this one stopped. Ctrl-C finishes the
# step and saves a checkpoint first (status 75); a second Ctrl-C ends at once.
#
#   scripts/pretrain.sh [--ranks N] [--config FILE] [section.key=value ...]
#
#   scripts/pretrain.sh                                      configs/tuxpaint.yaml on two ranks, or on one if there is one GPU
#   scripts/pretrain.sh data.directory=my/pictures run.directory=runs/mine
#   scripts/pretrain.sh --ranks 4 parallel.tp=2              two replicas of two ranks
#
# Paths in settings and in FILE are relative to the current folder; without --config (configs/tuxpaint.yaml), to the clone.
# The pictures are fetched if the configuration uses data/tuxpaint and no setting names another folder. If neither sets
# run.device, it is cuda if there is a GPU, otherwise cpu.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ranks=
config=
device=
overrides=()
pictures=
while [[ $# -gt 0 ]]; do
  case $1 in
    --ranks) [[ $# -ge 2 ]] || fail "--ranks needs a number"; ranks=$2; shift 2 ;;
    --config) [[ $# -ge 2 ]] || fail "--config needs a file"; config=$(absolute --config "$2"); shift 2 ;;
    --help) usage; exit 0 ;;
    data.directory=* | run.directory=*)
      path=$(absolute "${1%%=*}" "${1#*=}")
      [[ $PWD != "$root" ]] || path=${1#*=}  # as written, because it means the same in the clone
      overrides+=("${1%%=*}=$path")
      [[ $1 != data.directory=* ]] || pictures=$path
      shift
      ;;
    run.device=*) overrides+=("$1"); device=${1#*=}; shift ;;
    *=*) overrides+=("$1"); shift ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
done
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || fail "--ranks $ranks: expected a number of ranks"
[[ -z $config || -r $config ]] || fail "--config $config: there is no such file, or no right to read it"
# Without --config, paths are relative to the clone.
[[ -n $config ]] || { config=$root/configs/tuxpaint.yaml; cd "$root"; }

"$root/scripts/build.sh" --target step37
if [[ -z $pictures ]] && grep -q data/tuxpaint "$config"; then
  "$root/scripts/fetch_tuxpaint.sh"
  [[ data/tuxpaint -ef $root/data/tuxpaint ]] || overrides+=("data.directory=$root/data/tuxpaint")
fi

# Chosen here, not by run.device=auto, so that a GPU that can't be used is an error and not a slow run on the CPU.
gpus=0
! grep -qs '^MCPP_BUILT_WITH_NCCL:.*=ON' "$root/build/CMakeCache.txt" || gpus=$(gpus)
if [[ -z $device ]] && ! grep -qE '(^|[{,[:blank:]])device:' "$config"; then
  device=$([[ $gpus -gt 0 ]] && echo cuda || echo cpu)
  overrides+=("run.device=$device")
fi
[[ -n $ranks ]] || ranks=$([[ $device == cuda && $gpus -eq 1 ]] && echo 1 || echo 2)
# On one rank the tensor-parallel size must be 1, whatever the configuration says.
[[ $ranks -ne 1 || " ${overrides[*]}" =~ \ parallel\.(tp|tensor)= ]] || overrides+=(parallel.tp=1)

# Divides the cores among the ranks.
cores=$(cores)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
progress=plain
[[ -t 1 ]] && progress=line
use_launcher "$root/build"
program=$root/build/bin/step37
[[ $PWD != "$root" ]] || program=build/bin/step37
launch=("${launcher[@]}" -np "$ranks" "$program" pretrain --config "$config" --progress "$progress" "${overrides[@]}")

# mpirun kills its ranks a second after Ctrl-C or SIGTERM, but passes SIGUSR1 on: at the first one the ranks finish the step,
# save a checkpoint and end with status 75, at a second one they end at once.
show "${launch[@]}"
set -m  # mpirun in a process group of its own, which Ctrl-C doesn't reach
"${launch[@]}" </dev/null &
launched=$!
trap 'kill -USR1 "$launched" || true' INT TERM
while kill -0 "$launched" 2>/dev/null; do wait "$launched" || true; done  # a signal ends `wait`, too
wait "$launched"
