#!/usr/bin/env bash
# Fetches the captioned pictures of Debian's package tuxpaint-stamps-default (796 PNG, 785 with a caption) through apt,
# without installing it, into the user's cache folder, and links data/tuxpaint to them. Quick if they are there. No options.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help ]] || { usage; exit 0; }
[[ $# -eq 0 ]] || fail "unknown option $1 (see --help)"

package=tuxpaint-stamps-default
use_cache
pictures=$cache/$package

mkdir -p "$cache"
exec 9>"$cache/$package.lock"
flock 9
if [[ ! -e $pictures/complete ]]; then
  for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || fail "$tool is missing: the pictures come from a Debian package.
Use a folder of your own instead: scripts/pretrain.sh data.directory=/path/to/pictures"
  done
  partial=$pictures.partial
  rm -rf "$pictures" "$partial"
  mkdir -p "$partial/download"
  # Without the option apt, run as root, would download as user _apt, who can't write here, and print a confusing warning.
  download() { (cd "$partial/download" && run apt-get download -qq -o APT::Sandbox::User=root "$package"); }
  # Container images often have no package lists. One source that doesn't answer makes the update fail, but usually not the
  # download.
  download || { (as_root apt-get update -qq) || warn "apt-get update failed: going on with the lists that are there"; download; } ||
    fail "apt-get can't download $package, of Debian and Ubuntu; this is $(system_name).
Use a folder of your own instead: scripts/pretrain.sh data.directory=/path/to/pictures"
  run dpkg-deb -x "$partial/download/$package"_*.deb "$partial/unpacked"
  rm -rf "$partial/download"
  touch "$partial/complete"
  mv "$partial" "$pictures"
fi
flock -u 9

mkdir -p "$root/data"
ln -sfn "$pictures/unpacked/usr/share/tuxpaint/stamps" "$root/data/tuxpaint"
