"""Write a Llama of random numbers in bfloat16: PYTHON benchmarks/gpu_model.py FOLDER TOKENIZER [--layers 32] [--device cuda].

With 32 layers 7.4 billion parameters, 14.8 GB in six files. Needs torch and safetensors. A folder that is whole is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD, VOCABULARY = 4096, 14336, 32, 8, 128, 49152
SCALE = 0.02
"""Standard deviation of every matrix, as in a Llama's initialisation: activations stay finite over any number of layers."""


def shapes(layers: int, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor."""
    heads, kv = hidden // HEAD * HEAD, max(1, KV_HEADS * hidden // HIDDEN) * HEAD
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.self_attn.{part}_proj.weight": (size, hidden)
            for part, size in (("q", heads), ("k", kv), ("v", kv))
        }
        found[f"{name}.self_attn.o_proj.weight"] = (hidden, heads)
        found |= {f"{name}.mlp.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")}
        found[f"{name}.mlp.down_proj.weight"] = (hidden, intermediate)
        found |= {f"{name}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    found["lm_head.weight"] = (VOCABULARY, hidden)
    return found


def config(layers: int, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> dict[str, object]:
    """Return the model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": max(1, KV_HEADS * hidden // HIDDEN),
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write(
    folder: Path, tokenizer: Path, layers: int, device: str, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE
) -> None:
    """Write the model. The same seed makes the same numbers on the same kind of device."""
    import torch
    from safetensors.torch import save_file

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        shutil.copy2(file, folder / file.name)
    generator = torch.Generator(device).manual_seed(7)
    wanted = list(shapes(layers, hidden, intermediate).items())
    step = max(1, -(-len(wanted) // 6))
    index: dict[str, str] = {}
    for number, at in enumerate(range(0, len(wanted), step)):
        name, tensors = f"model-{number:05}.safetensors", {}
        for key, shape in wanted[at : at + step]:
            tensor = torch.ones(shape, dtype=torch.bfloat16, device=device)
            tensors[key] = tensor if len(shape) == 1 else tensor.normal_(0.0, SCALE, generator=generator)
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, str(folder / name), {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(
        json.dumps(config(layers, hidden, intermediate))
    )  # last: the folder is whole then


LAYERS = {"model": 32, "small": 4}
"""Of the models that `made` writes: 14.8 GB and 2.5 GB."""


def made(work: Path, name: str, python: str) -> Path:
    """Return the folder of a model under `work`, written by an interpreter with torch if it is not there. Raises CalledProcessError."""
    folder = work / "models" / name
    argv = [python, __file__, str(folder), str(work / "tokenizer"), "--layers", str(LAYERS[name])]
    subprocess.run(argv, check=True)
    return folder


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("folder", type=Path)
    words.add_argument("tokenizer", type=Path)
    words.add_argument("--layers", type=int, default=32)
    words.add_argument("--hidden", type=int, default=HIDDEN)
    words.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    words.add_argument("--device", default="cuda")
    given = words.parse_args()
    write(given.folder, given.tokenizer, given.layers, given.device, given.hidden, given.intermediate)
