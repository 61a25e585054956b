#!/usr/bin/env bash
# engine.sh vllm|sglang: an engine's own virtual environment (the two want different versions of torch).
. "$(dirname "$0")/common.sh"
engine="${1:?engine.sh vllm|sglang}"
requirements="$here/requirements/$engine.txt"
[ -f "$requirements" ] || die "there is no engine $engine; known: vllm, sglang"
venv="$home/venvs/$engine"
inputs="$(cat "$requirements" "$here/engine.sh" "$here/sgl_kernel.py" | sha256sum | cut -c1-16)"
done_before "$engine" "$inputs" && [ -x "$venv/bin/python" ] && exit 0
say "$engine's environment (about two minutes)"
make_venv() {
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --no-compile --no-deps -r "$requirements"
    # vllm.txt names no CUDA libraries: a machine that knows a CPU build of torch gets that. PyPI's build links those that its metadata names.
    if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        "$venv/bin/python" -c 'import importlib.metadata as m; print(*(r for r in m.requires("torch") if r.startswith(("cuda-toolkit", "nvidia-"))), sep="\n")' \
            >"$venv/cuda.txt"
        "$venv/bin/pip" install -q --no-compile -r "$venv/cuda.txt"
        "$venv/bin/python" -c 'import torch'
    fi
    if [ "$engine" = sglang ]; then
        # SGLang publishes no CPU wheel of sgl_kernel and imports it at start; nothing of it is called when a Llama is served on CPU.
        local site
        site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        mkdir -p "$site/sgl_kernel"
        cp "$here/sgl_kernel.py" "$site/sgl_kernel/__init__.py"
    fi
    # A fair baseline needs compiled bytecode: without it every cold start would compile a thousand modules.
    "$venv/bin/python" -m compileall -q -j 2 "$venv/lib" >/dev/null || true # packages carry files of other Pythons
}
step "$engine" make_venv
mark_done "$engine" "$inputs"
