#!/usr/bin/env bash
# CRIU >= 4.2 as $QUICKTHAW_HOME/criu/criu: the system's own where it is new enough, else Debian unstable's,
# unpacked into a private folder with the libraries it names and started through that libc's own loader.
# The apt that fetches it has lists and sources of its own, so the machine's configuration is read and never changed;
# the mirror is the one the machine already uses, and apt checks Debian's signatures.
. "$(dirname "$0")/common.sh"
target="$home/criu"
new_enough() { # PROGRAM
    local version
    version="$("$1" --version 2>/dev/null | sed -n 's/^Version: //p')" || return 1
    [ -n "$version" ] && [ "$(printf '%s\n4.2\n' "$version" | sort -V | head -n 1)" = 4.2 ]
}
[ -x "$target/criu" ] && new_enough "$target/criu" && exit 0
if command -v criu >/dev/null && new_enough criu; then
    mkdir -p "$target" && ln -sfn "$(command -v criu)" "$target/criu"
    exit 0
fi
say "criu (Debian unstable, unpacked privately)"
mirror="$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    awk '$1 !~ /security|updates|backports/ && $2 ~ /\/debian\/?$/ {print $2; exit}')"
[ -n "$mirror" ] || die "no Debian mirror in this machine's apt configuration; install criu >= 4.2 yourself and run again"

private="$(mktemp -d)"
trap 'rm -rf "$private"' EXIT
chmod 0755 "$private" # apt downloads as its own user
mkdir -p "$private"/{lists/partial,archives/partial,state,root}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
printf 'deb [signed-by=%s] %s sid main\n' "$keyring" "$mirror" >"$private/sources.list"
: >"$private/state/status"
options=(-o Dir::Etc::SourceList="$private/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State="$private/state" -o Dir::State::Lists="$private/lists" -o Dir::State::Status="$private/state/status"
    -o Dir::Cache="$private" -o Dir::Cache::Archives="$private/archives" -o Dir::Etc::Preferences=/dev/null
    -o Dir::Etc::PreferencesParts=/dev/null -o APT::Sandbox::User=root -o Acquire::Retries=3
    -o APT::Install-Recommends=false -o Acquire::Languages=none)
fetch() {
    apt-get "${options[@]}" update -qq
    # The libraries criu links to, read from its own dependencies; the rest of its dependencies (python, iptables) is not needed here.
    local wanted
    wanted="$(apt-cache "${options[@]}" depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
        --no-replaces --no-enhances criu | grep -E '^(lib[a-z]|criu$)' | grep -vE '^libpython|^libperl|-data$' | sort -u)"
    (cd "$private/archives" && apt-get "${options[@]}" download $wanted)
    local file
    for file in "$private"/archives/*.deb; do dpkg -x "$file" "$private/root"; done
}
step criu fetch
binary="$(cd "$private/root" && find . -path '*/sbin/criu' -type f | head -n 1)"
[ -n "$binary" ] || die "the criu package holds no sbin/criu"
new="$(mktemp -d "$home/criu.XXXXXX")"
chmod 0755 "$new"
mkdir "$new/lib"
cp "$private/root/$binary" "$new/criu.bin"
find "$private/root" \( -name '*.so*' \) \( -type f -o -type l \) -path '*linux-gnu*' ! -path '*/gconv/*' ! -path '*/engines-*' -exec cp -a {} "$new/lib/" \;
loader="$(cd "$new/lib" && ls ld-linux-*.so.* | head -n 1)"
[ -n "$loader" ] || die "no dynamic loader among the unpacked libraries"
cat >"$new/criu" <<SCRIPT
#!/bin/sh
# criu, run by the loader of the libc it was built for.
d="\$(dirname "\$(readlink -f "\$0")")"
exec "\$d/lib/$loader" --library-path "\$d/lib" "\$d/criu.bin" "\$@"
SCRIPT
chmod 0755 "$new/criu"
new_enough "$new/criu" || die "the unpacked criu does not start: $("$new/criu" --version 2>&1 | head -n 1)"
rm -rf "$target"
mv -T "$new" "$target"
say "  $("$target/criu" --version | head -n 1), $(du -sh "$target" | cut -f1)"
