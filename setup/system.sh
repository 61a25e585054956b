#!/usr/bin/env bash
# system.sh [LIST]: system packages by apt, of system-packages.txt or another list of this folder. Quick when they are all there.
. "$(dirname "$0")/common.sh"
missing=()
for package in $(grep -v '^#' "$here/${1:-system-packages.txt}"); do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} = 0 ] && exit 0
say "system packages: ${missing[*]}"
install() {
    root apt-get update -qq && root apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
step system install
