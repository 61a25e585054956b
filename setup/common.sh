# Sourced by the other scripts of this folder: paths, and functions that report progress.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repo="$(dirname "$here")"
home="${QUICKTHAW_HOME:-$HOME/.cache/quickthaw}"
umask 022
mkdir -p "$home" "$home/logs"
chmod 0700 "$home"
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# done_before NAME DIGEST: true when step NAME finished with the same inputs; mark_done records it.
done_before() { [ "$(cat "$home/.setup-$1" 2>/dev/null)" = "$2" ]; }
mark_done() { printf '%s' "$2" >"$home/.setup-$1"; }

# step LOGNAME COMMAND…: run with its output in a log that is shown when it fails.
step() {
    local log="$home/logs/setup-$1.log" began=$SECONDS
    shift
    # In a condition bash would go on after a command that failed in a function, and the step would count as done.
    local code=0
    set +e
    (set -e && "$@") >"$log" 2>&1 </dev/null
    code=$?
    set -e
    if [ $code != 0 ]; then
        tail -n 25 "$log" >&2
        die "failed: $* (whole log: $log)"
    fi
    say "  done in $((SECONDS - began)) s"
}

root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
