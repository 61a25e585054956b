#!/usr/bin/env bash
# The project's own virtual environment, with everything its tests and benchmarks need.
. "$(dirname "$0")/common.sh"
venv="$home/venvs/project"
inputs="$(cat "$here/requirements/project.txt" "$here/project.sh" | sha256sum | cut -c1-16)"
if ! { done_before project "$inputs" && [ -x "$venv/bin/python" ]; }; then
    say "the project's environment"
    make_venv() {
        rm -rf "$venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install -q --no-compile --no-deps --no-build-isolation setuptools==80.9.0 wheel==0.45.1
        "$venv/bin/pip" install -q --no-compile --no-deps -r "$here/requirements/project.txt"
        "$venv/bin/python" -m compileall -q -j 2 "$venv/lib" >/dev/null || true # packages carry files of other Pythons
    }
    step project make_venv
    mark_done project "$inputs"
fi
# The command `quickthaw` points at this checkout, and at the entry point that its pyproject names.
checkout="$repo $(sha256sum <"$repo/pyproject.toml")"
if [ "$(cat "$venv/.checkout" 2>/dev/null)" != "$checkout" ]; then
    # By a path (compat), not by an import hook, which costs every start of Python 12 ms.
    step project-link "$venv/bin/pip" install -q --no-deps --no-build-isolation --config-settings editable_mode=compat -e "$repo"
    printf '%s' "$checkout" >"$venv/.checkout"
fi
