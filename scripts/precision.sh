#!/usr/bin/env bash
# Trains configs/tuxpaint.yaml on two ranks for 150 steps, in float32 and in bfloat16, and compares the mean losses of the
# last 10 steps: bfloat16's may be at most 5 % and 0.01 above float32's. Takes five minutes on two cores.
#
#   scripts/precision.sh [key=value ...]   settings for both runs
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help ]] || { usage; exit 0; }

cd "$root"
for precision in float32 bfloat16; do
  run scripts/pretrain.sh --ranks 2 "run.directory=runs/precision_$precision" run.fresh=true training.steps=150 \
    report.pictures=0 "training.precision=$precision" "$@"
done
python3 - runs/precision_{float32,bfloat16}/metrics.jsonl <<'EOP'
import json
import sys

means = []
for path in sys.argv[1:]:
    losses = [json.loads(line)["loss"] for line in open(path)]
    means.append(sum(losses[-10:]) / 10)
    print(f"{path}: mean loss of the last 10 of {len(losses)} steps {means[-1]:.4f}")
limit = 1.05 * means[0] + 0.01
print(f"bfloat16 may reach {limit:.4f}")
sys.exit(means[1] > limit)
EOP
