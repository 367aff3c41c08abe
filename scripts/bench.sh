#!/usr/bin/env bash
# Builds and runs every benchmark, and compares with the ratios in benchmarks/ratios.json.
#
#   scripts/bench.sh [--ranks N] [--quick] [--full] [--update] [--strict] [cmake options, such as -DMCPP_WERROR=ON]
#
# --ranks N   ranks of each benchmark: 1, 2 (the default) or 4
# --quick     few rounds, one dtype for most, to see whether everything runs; its ratios are rough
# --full      all settings of the image insert: needs 12 GB of memory instead of 4 GB, and half an hour more
# --update    stores the ratios of this run in benchmarks/ratios.json
# --strict    exit status 1 if a ratio got worse by more than 25 %; a shared machine is too noisy for that
#
# Writes build/bench/results.json and build/bench/report.html. docs/benchmarks.md says what is measured.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ranks=2
quick=
full=
report_options=()
build_options=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --ranks) [[ $# -ge 2 ]] || fail "--ranks needs a number"; ranks=$2; shift 2 ;;
    --quick) quick=1; shift ;;
    --full) full=1; shift ;;
    --update | --strict) report_options+=("$1"); shift ;;
    --help) usage; exit 0 ;;
    -D*) build_options+=("$1"); shift ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
done
[[ $ranks =~ ^[124]$ ]] || fail "--ranks $ranks: expected 1, 2 or 4"
[[ -z $quick || ${report_options[*]} != *--update* ]] || fail "--quick is too rough for --update"
[[ -z $quick || -z $full ]] || fail "--quick and --full exclude each other"

"$root/scripts/build.sh" --target benchmarks "${build_options[@]}"
cd "$root"
use_launcher build
export OMP_NUM_THREADS=1
bin=build/bin
results=build/bench
mkdir -p "$results"
rm -f "$results"/*.jsonl

# to_file NAME COMMAND...: writes the JSON lines of COMMAND to build/bench/NAME.jsonl.
to_file() {
  local name=$1
  shift
  local start=$SECONDS
  run "$@" >"$results/$name.jsonl"
  printf '  %s: %d s\n' "$name" $((SECONDS - start)) >&2
}

# on_ranks NAME PROGRAM...
on_ranks() {
  local name=$1
  shift
  to_file "$name" "${launcher[@]}" -np "$ranks" "$@"
}

collectives=()
layers=()
training_step=()
image_insert=(--dtype bfloat16 --scale 2 --seconds 5)
if [[ -n $quick ]]; then
  collectives=(--repetitions 5)
  layers=(--dtype float32 --seconds 1)
  image_insert=(--dtype bfloat16 --scale 2 --seconds 1)
  training_step=(--dtype float32 --seconds 1)
elif [[ -n $full ]]; then
  image_insert=(--full)
fi

on_ranks collectives $bin/benchmark_collectives "${collectives[@]}"
python=
if [[ -n ${XDG_CACHE_HOME:-${HOME:-}} ]]; then
  use_cache
  python=$(compgen -G "$cache/torch-*/bin/python" | tail -n 1 || true)
fi
if [[ -n $python ]] && "$python" -c 'import torch' 2>/dev/null; then
  to_file gloo_collectives "$python" benchmarks/gloo_collectives.py --ranks "$ranks" "${collectives[@]}"
else
  printf 'No Python with PyTorch that scripts/build.sh has set up: Gloo is left out.\n' >&2
fi
on_ranks layers $bin/benchmark_layers "${layers[@]}"
if [[ -x $bin/benchmark_image_insert ]]; then
  on_ranks image_insert $bin/benchmark_image_insert "${image_insert[@]}"
else
  printf 'benchmark_image_insert is not built (MCPP_PROGRAMS=OFF): left out.\n' >&2
fi
on_ranks training_step $bin/benchmark_training_step "${training_step[@]}"

run python3 benchmarks/report.py "$results" --ratios benchmarks/ratios.json "${report_options[@]}"
