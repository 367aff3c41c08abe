#!/usr/bin/env bash
# Writes the reference of the public headers to build/docs/index.html; fails on any warning, so that every public
# member is documented. Installs doxygen where it is missing.
#
#   scripts/docs.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -eq 0 ]] || { usage; exit 0; }

command -v doxygen >/dev/null || install_packages doxygen

# Prints the installed headers of a library: those of its FILE_SET.
public_headers() {
  awk -v folder="$1" '/FILE_SET HEADERS/ { on = 1 }
    on { for (i = 1; i <= NF; ++i) if ($i ~ /\.h\)?$/) { sub(/\)/, "", $i); print folder "/" $i } }
    /\)/ { on = 0 }' "$1/CMakeLists.txt"
}

cd "$root"
mapfile -t headers < <(for folder in parallel megatron_cpp step37; do public_headers "$folder"; done)
[[ ${#headers[@]} -gt 0 ]] || fail "no FILE_SET HEADERS in the CMakeLists.txt of the libraries"
mkdir -p build/docs
printf '+ doxygen docs/Doxyfile (%d headers)\n' "${#headers[@]}" >&2
{ cat docs/Doxyfile; printf 'INPUT = README.md CONTRIBUTING.md CHANGELOG.md docs %s\n' "${headers[*]}"; } | doxygen -
# Doxygen doesn't copy pictures, and doesn't change links to files that aren't its input.
mkdir -p build/docs/figures
cp docs/figures/*.svg docs/figures/*.jsonl build/docs/figures/
sed -i -E 's#href="(\.\./)?((parallel|megatron_cpp|step37|examples)(/[a-z0-9_/.]*\.cpp)?)"#href="../../\2"#g' \
  build/docs/index.html build/docs/md_*.html
printf 'build/docs/index.html\n'
