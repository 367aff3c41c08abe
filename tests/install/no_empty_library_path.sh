#!/bin/sh
# no_empty_library_path.sh BUILD PREFIX: no program or shared library of either has an empty entry in its library path.
set -eu
found=0
for file in "$1"/bin/step37 "$1"/lib*/*.so "$2"/bin/* "$2"/lib*/*.so; do
  [ -f "$file" ] || continue
  found=$((found + 1))
  if readelf -d "$file" | grep -E '\((RPATH|RUNPATH)\).*(\[:|::|:\])'; then
    echo "$file: an empty entry in the library path"
    exit 1
  fi
done
[ "$found" -gt 0 ]
