#!/usr/bin/env bash
# setup.sh [vllm] [sglang]: everything that the project needs on a fresh Debian 12, and the engines named. Idempotent; takes a second if there is
# nothing to do. Independent steps run in parallel.
. "$(dirname "$0")/common.sh"
exec 9>"$home/.setup.lock"
flock -w 1800 9 || die "another set-up is running for half an hour; see its logs in $home/logs"
"$here/system.sh" 9>&-
{ "$here/project.sh" && "$here/criu.sh"; } 9>&- &
waiting=($!)
for engine in "$@"; do
    "$here/engine.sh" "$engine" 9>&- &
    waiting+=($!)
done
for job in "${waiting[@]}"; do wait "$job" || exit 1; done
[ $# = 0 ] || "$here/model.sh" "$home/venvs/$1/bin/python" 9>&-
