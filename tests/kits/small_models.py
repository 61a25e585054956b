"""Small models made from another one for tests: a LoRA adapter with random weights, a draft model of its first layers."""

import json
import shutil
import struct
from pathlib import Path

import numpy
from safetensors.numpy import save_file


def adapter(model: Path, folder: Path, rank: int = 4, seed: int = 1) -> Path:
    """Write a LoRA adapter for the query and value projections of a Llama model; weights of about 0.1, so that it changes the text."""
    config = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head = hidden // config["num_attention_heads"]
    outputs = {"q_proj": hidden, "v_proj": head * config["num_key_value_heads"]}
    draw = numpy.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for name, size in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (rank, hidden)), ("lora_B", (size, rank))):
                tensors[f"{prefix}.{part}.weight"] = draw.normal(0.0, 0.1, shape).astype(numpy.float32)
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(outputs),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def draft(model: Path, folder: Path, layers: int = 4) -> Path:
    """Copy a Llama model with its first `layers` layers only: a draft model with the same tokenizer."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    data = (model / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    kept, parts, at = {}, [], 0
    for name, tensor in header.items():
        if name == "__metadata__":
            kept[name] = tensor
        elif ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers:
            begin, end = (8 + size + offset for offset in tensor["data_offsets"])
            kept[name] = tensor | {"data_offsets": [at, at + end - begin]}
            parts.append(data[begin:end])
            at += end - begin
    head = json.dumps(kept).encode()
    head += b" " * (-len(head) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"".join(parts))
    return folder
