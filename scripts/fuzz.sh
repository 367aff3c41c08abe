#!/usr/bin/env bash
# Builds the fuzz targets (tests/fuzz) with Clang's libFuzzer and sanitizers, and runs them one after the other, each with
# its committed corpus and the inputs that earlier runs added in build-fuzz/corpus/NAME.
#
#   scripts/fuzz.sh [--runs N] [--seconds N] [TARGET...]
#
# --runs: number of inputs per target, 20000 by default; --seconds: time limit per target, which replaces the default of
# --runs. Without TARGET all targets run. Ends with status 1 at the first finding, and names the file with the input.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

runs=
seconds=0
targets=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --runs) [[ $# -ge 2 ]] || fail "--runs needs a number"; runs=$2; shift 2 ;;
    --seconds) [[ $# -ge 2 ]] || fail "--seconds needs a number"; seconds=$2; shift 2 ;;
    --help) usage; exit 0 ;;
    -*) fail "unknown option $1 (see --help)" ;;
    *) targets+=("$1"); shift ;;
  esac
done

[[ -n $runs ]] || runs=$([[ $seconds -gt 0 ]] && echo -1 || echo 20000)  # -1: no limit

corpora=$root/tests/fuzz/corpus
[[ ${#targets[@]} -gt 0 ]] || mapfile -t targets < <(ls "$corpora")
for target in "${targets[@]}"; do
  [[ -d $corpora/$target ]] || fail "there is no target $target; there are: $(ls "$corpora" | paste -sd ' ')"
done

"$root/scripts/build.sh" --preset fuzz --target fuzz

# Readers that take a path get a file in memory.
memory=/dev/shm
[[ -w $memory ]] || memory=${TMPDIR:-/tmp}
work=$(mktemp -d -p "$memory")
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work OMP_NUM_THREADS=1 ASAN_OPTIONS=quarantine_size_mb=64${ASAN_OPTIONS:+:$ASAN_OPTIONS}

summary=()
for target in "${targets[@]}"; do
  found=$root/build-fuzz/findings/$target
  grown=$root/build-fuzz/corpus/$target
  mkdir -p "$found" "$grown"
  max_len=2048
  [[ $target != captions ]] || max_len=512  # longer inputs spend all time in the tokenizer
  options=(-runs="$runs" -max_total_time="$seconds" -max_len="$max_len" -timeout=10 -rss_limit_mb=2048
    -malloc_limit_mb=600 -print_final_stats=1 -artifact_prefix="$found/")
  dictionary=$root/tests/fuzz/$target.dict
  [[ ! -e $dictionary ]] || options+=(-dict="$dictionary")
  log=$found/log
  printf '+ %s_fuzz\n' "$target" >&2
  if ! "$root/build-fuzz/bin/${target}_fuzz" "${options[@]}" "$grown" "$corpora/$target" &>"$log"; then
    tail -n 60 "$log" >&2
    input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -1)
    fail "$target: a finding; the input is ${input:-in the corpus}, what was printed in $log"
  fi
  rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")
  count=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  summary+=("$(printf '%-20s %9d executions, %6d a second' "$target" "$count" "$rate")")
done
printf '%s\n' "${summary[@]}"
