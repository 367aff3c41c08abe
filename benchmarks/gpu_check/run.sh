#!/usr/bin/env bash
# Runs the parts of this GPU check with the LibTorch of the python3 in PATH: run.sh [PART...] [--output DIR]
# --help lists the parts.
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v python3 >/dev/null || { echo "run.sh: python3 is missing, and with it LibTorch" >&2; exit 2; }
exec python3 -B "$folder/run_parts.py" "$@"
