#!/usr/bin/env bash
# Trains Step3.7 as a Slurm job, from the root of a clone that scripts/build.sh has built:
#
#   sbatch [sbatch options] scripts/slurm_pretrain.sh [--config FILE] [section.key=value ...]
#
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 scripts/slurm_pretrain.sh parallel.tp=4
#   sbatch --ntasks 2 --time 02:00:00 scripts/slurm_pretrain.sh run.directory=runs/mine
#
# Near its time limit the job finishes the step, saves a checkpoint and requeues itself; after the failure of a node Slurm
# requeues it. It then resumes from the latest checkpoint, whatever run.fresh says. If hosts compute wrongly, it requeues
# itself without them. Any other error ends it.
#SBATCH --job-name=step37
#SBATCH --output=step37-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

[[ -n ${SLURM_JOB_ID:-} ]] || { source "$(dirname "${BASH_SOURCE[0]}")/common.sh"; usage; exit 1; }
cd "$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this script from elsewhere
[[ -e scripts/common.sh ]] || { echo "submit from the root of the clone, not from $SLURM_SUBMIT_DIR" >&2; exit 1; }
source scripts/common.sh
[[ -x build/bin/step37 ]] || fail "there is no build/bin/step37: run scripts/build.sh before"

config=configs/tuxpaint.yaml
overrides=()
# If GPUs were requested but can't be used, the run fails, instead of running slowly on the CPU.
[[ ${SLURM_JOB_GPUS:+some}${SLURM_GPUS_ON_NODE:-0} == 0 ]] || overrides=(run.device=cuda)
while [[ $# -gt 0 ]]; do
  case $1 in
    --config) [[ $# -ge 2 ]] || fail "--config needs a file"; config=$2; shift 2 ;;
    *=*) overrides+=("$1"); shift ;;
    *) fail "unknown option $1: expected --config FILE or section.key=value" ;;
  esac
done
# run.fresh=true, here or in the file, applies to the first start only: a requeued job resumes.
[[ ${SLURM_RESTART_COUNT:-0} -eq 0 ]] || overrides+=(run.fresh=false)

# srun doesn't inherit --cpus-per-task from sbatch.
cores=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
launch=(srun --mpi=pmix --cpu-bind=none --kill-on-bad-exit=1 --cpus-per-task="$cores")
# If Slurm has no PMIx: mpirun asks Slurm where to start the ranks.
if [[ $(srun --mpi=list 2>&1) != *pmix* ]]; then
  open_mpi_flags=(--bind-to none)
  use_launcher build
  launch=("${launcher[@]}")
fi

# After status 71: starts again without the hosts that the messages name ("the numbers of rank 3 on node7, ... changed,
# which points to a fault of that machine"), and without those that were left out before.
requeue_elsewhere() {
  wait "$reader" || true  # has written all messages then
  local hosts before
  hosts=$(grep 'points to a fault of that machine' "$messages" | grep -o 'rank [0-9]* on [^ ,.]*' | awk '{ print $4 }' |
    sort -u | paste -sd,) || return 0
  before=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'ExcNodeList=[^ (]*') || true
  before=${before#ExcNodeList=}
  trap '' TERM  # Slurm ends this script after a requeue; only then, while it waits, a job can be changed
  run scontrol requeue "$SLURM_JOB_ID"
  run scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}$hosts"
}

# Ends with the status of the ranks (docs/training.md).
end() {
  [[ $1 -ne 71 ]] || requeue_elsewhere
  exit "$1"
}

# srun and mpirun pass SIGUSR1 on to the ranks, which finish the step, save a checkpoint and end with status 75. Ranks that
# take longer than 90 seconds are killed when the job is requeued, and lose the steps after the last checkpoint.
at_time_limit() {
  kill -USR1 "$launched" || true
  local second status=0
  for ((second = 0; second < 90; ++second)); do
    kill -0 "$launched" 2>/dev/null || break
    sleep 1
  done
  if ! kill -0 "$launched" 2>/dev/null; then
    wait "$launched" || status=$?
    case $status in 0 | 1 | 65 | 71 | 74) end "$status" ;; esac  # all is done, or it would end so again
  fi
  run scontrol requeue "$SLURM_JOB_ID"
}

launch+=(build/bin/step37 pretrain --config "$config" --progress plain "${overrides[@]}")
show "${launch[@]}"
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
exec {errors}> >(tee "$messages" >&2)
reader=$!
"${launch[@]}" 2>&"$errors" &
launched=$!
exec {errors}>&-
trap at_time_limit USR1  # bash handles a signal between commands, or in `wait`
while kill -0 "$launched" 2>/dev/null; do wait "$launched" || true; done
status=0
wait "$launched" || status=$?
end "$status"
