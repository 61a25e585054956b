#!/usr/bin/env bash
# CRIU >= 4.2, by quickthaw's own command, which needs the project's environment (project.sh).
. "$(dirname "$0")/common.sh"
log="$home/logs/setup-criu.log"
QUICKTHAW_HOME="$home" "$home/venvs/project/bin/quickthaw" setup criu >"$log" 2>&1 </dev/null || die "$(tail -n 1 "$log")"
