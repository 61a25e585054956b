"""Make the folder that `benchmarks/gpu.py run` needs on a machine with a GPU and no network: engine, quickthaw's needs, CRIU, tokenizer.

That machine has `THERE` (seen 2026-11-17). Each engine is a release for that PyTorch, with what it imports to serve a Llama in bfloat16
on a Hopper GPU, and no more: vLLM's was seen to work on one, SGLang's is the newest for it.
"""

from __future__ import annotations

import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.gpu_wheels import NotElf, add_wheel
from plugin.runtime.config import state_home

PYTHON = "3.12"
PLATFORMS = ("_2_17", "_2_24", "_2_26", "_2_27", "_2_28", "_2_31", "_2_34", "_2_35", "2014", "1")
LIMIT = 64 << 20
"""Bytes that may travel, the working tree with them."""
THERE = "torch 2.11.0+cu130, triton 3.6.0, numpy, cuda-bindings, nvidia-ml-py, psutil, pytest, nvcc and a C compiler"

_QUICKTHAW = "blake3==1.0.11 httptools==0.9.0 msgspec==0.23.0 obstore pytest-timeout starlette==1.10.0 zstandard xxhash"
_SERVER = """
annotated-types==0.8.0 fastapi==0.136.3 jiter==0.19.0 openai==2.6.1 openai-harmony==0.0.8 partial-json-parser==0.2.1.1.post7
prometheus-fastapi-instrumentator==8.1.0 pybase64==1.5.1 pydantic==2.14.4 pydantic-core==2.50.5 python-multipart==0.0.34
pyzmq==27.3.0 setproctitle==1.3.8 sniffio==1.3.1 distro==1.9.0 typing-inspection==0.4.5 uvicorn==0.54.0 watchfiles==1.3.0
compressed-tensors==0.17.0 loguru==0.7.3 llguidance==1.7.6 xgrammar==0.2.3 apache-tvm-ffi==0.1.9
"""
_VLLM = """
vllm==0.24.0 cachetools==8.0.2 cbor2==6.3.0 diskcache==5.6.3 jmespath==1.1.0 lark==1.2.2
model-hosting-container-standards==0.1.16 python-json-logger==4.2.0
"""
_SGLANG = """
sglang==0.5.17 sglang-kernel==0.4.5 torch_memory_saver==0.0.10 flashinfer-python==0.6.15.post1 transformers==5.12.1
tokenizers==0.22.2 cffi==2.1.1 pycparser==3.12 dill==0.4.1 gguf==0.19.0 interegular==0.3.3 jsonschema==4.26.0
jsonschema-specifications==2025.9.1 orjson==3.13.0 referencing==0.37.0 rpds-py==2026.9.1 soundfile==0.13.1
"""


def _all(*lists: str) -> tuple[str, ...]:
    return tuple(" ".join(lists).split())


@dataclass(frozen=True)
class Engine:
    """What is carried for an engine: pinned wheels, and the files of theirs that stay here (a regular expression)."""

    wheels: tuple[str, ...]
    left_out: str
    stubs: tuple[tuple[str, str], ...] = ()
    """Modules (name in site-packages, source) in place of packages that the engine imports and a server never calls."""
    without: str = ""
    """What such an engine cannot do, for the report."""


_HOLLOW = 'def __getattr__(name):\n    if name.startswith("__"):\n        raise AttributeError(name)\n    return type(name, (), {})\n'
_COMMON = r"\.(a|h|hpp|cuh|pyi|pxd)$|/include/|/tests?/|(^|/)share/|\.dist-info/licenses/"
ENGINES = {
    "vllm": Engine(
        _all(_VLLM, _SERVER, _QUICKTHAW),
        rf"{_COMMON}|vllm/vllm-rs$|_vllm_fa2_C|deep_gemm/_C\.cpython-3(10|11|13|14)|third_party/fmha_sm100",
        without="no FlashInfer, no FlashAttention 2, no DeepGEMM",
    ),
    "sglang": Engine(
        _all(_SGLANG, _SERVER, _QUICKTHAW),
        r"\.(a|pyi|pxd)$|^sgl_kernel/(sm100/|infllm_ops|flash_ops|flashmla_ops)|^lib/|^lib64/|^bin/|^_mscclpp"
        r"|(multimodal|server|grpc)/_core|flashinfer/data/(cutlass|cccl|spdlog)|multimodal_gen/|_cu12\.abi3"
        r"|_hook_mode_(torch|preload)\.abi3|\.dist-info/licenses/",
        (("IPython/__init__.py", ""), ("IPython/display.py", _HOLLOW)),
        without="no FlashAttention 3 (--attention-backend triton), no FlashInfer kernels, no gRPC server",
    ),
}


@click.command()
@click.option("--engine", type=click.Choice(list(ENGINES)), required=True)
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path),
    default=Path("build/gpu"),
    show_default=True,
    help="An ignored folder.",
)
@click.option("--wheels", type=click.Path(path_type=Path), help="Keep the wheels here.")
def prepare(engine: str, target: Path, wheels: Path | None) -> None:
    """Download an engine's wheels, cut them down, and write TARGET/ENGINE, which travels to the machine with the GPU."""
    one, folder = ENGINES[engine], target / engine
    kept = wheels or target / f"wheels-{engine}"
    kept.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        download(one.wheels, kept)
        (folder / "contents.json").write_text(json.dumps(pack(one, kept, folder / "site.tar.xz"), indent=1))
        _carry_criu(folder / "criu.tar.xz")
        _carry_tokenizer(folder / "tokenizer.tar.xz")
    except (OSError, subprocess.CalledProcessError, NotElf, LookupError) as error:
        shutil.rmtree(folder, ignore_errors=True)  # half of it would start and fail there
        raise click.ClickException(f"nothing was prepared: {error}") from error
    finally:
        if wheels is None:
            shutil.rmtree(kept, ignore_errors=True)
    report(folder)


def report(folder: Path) -> None:
    """Print the sizes, and fail if they do not travel together with the working tree."""
    parts = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    for name, size in parts.items():
        click.echo(f"{size / (1 << 20):7.2f} MiB  {folder / name}")
    tree = tree_bytes(Path(__file__).resolve().parent.parent)
    total = sum(parts.values()) + tree
    click.echo(f"{tree / (1 << 20):7.2f} MiB  the working tree\n{total / (1 << 20):7.2f} MiB  in all, of {LIMIT >> 20}")
    if total > LIMIT:
        raise click.ClickException(f"{(total - LIMIT) / (1 << 20):.1f} MiB too much")


def tree_bytes(repository: Path) -> int:
    """Return the bytes of the files that git tracks or would add. Raises OSError or CalledProcessError without git."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(argv, cwd=repository, capture_output=True, check=True).stdout.decode().split("\0")
    return sum((repository / name).lstat().st_size for name in names if name and (repository / name).exists())


def download(wheels: tuple[str, ...], folder: Path) -> None:
    """Fetch wheels for that machine's Python without what they need. Raises CalledProcessError."""
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    argv += ["--python-version", PYTHON, "--implementation", "cp", "-d", str(folder)]
    for name in PLATFORMS:
        argv += ["--platform", f"manylinux{name}_x86_64"]
    subprocess.run([*argv, "--platform", "linux_x86_64", *wheels], check=True)


def pack(engine: Engine, wheels: Path, target: Path) -> dict[str, int | str]:
    """Write an engine's site-packages as an archive; return the bytes by wheel. Raises LookupError for a wheel that is missing."""
    dropped: Callable[[str], bool] = lambda name: re.search(engine.left_out, name) is not None  # noqa: E731
    found: dict[str, int | str] = {"needs there": THERE, "without": engine.without}
    with lzma.open(target, "wb", preset=6) as out, tarfile.open(fileobj=out, mode="w|") as archive:
        for wheel in (wheel_of(name, wheels) for name in engine.wheels):
            found[wheel.name] = add_wheel(archive, wheel, dropped)
        for name, source in engine.stubs:
            add_text(archive, name, source)
    return found


def wheel_of(requirement: str, folder: Path) -> Path:
    """Return the downloaded wheel of a requirement (`name` or `name==version`). Raises LookupError."""
    name, _, version = requirement.partition("==")
    stem = re.sub(r"[-_.]+", "_", name).lower()
    for wheel in sorted(folder.glob("*.whl")):
        found, its_version = wheel.name.split("-")[:2]
        if re.sub(r"[-_.]+", "_", found).lower() == stem and version in ("", its_version):
            return wheel
    raise LookupError(f"no wheel of {requirement} was downloaded")


def add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    """Add a file with this text to an archive."""
    import io

    where, data = tarfile.TarInfo(name), text.encode()
    where.size = len(data)
    archive.addfile(where, io.BytesIO(data))


def _carry_criu(target: Path) -> None:
    """Archive this host's self-contained CRIU. Raises LookupError where there is none."""
    from checkpoint.criu import self_contained

    folder = (state_home() / "criu").resolve()
    if not (folder / self_contained.BINARY).exists():
        raise LookupError(f"{folder} is no self-contained CRIU; run: quickthaw setup criu")
    with tarfile.open(target, "w:xz") as archive:
        archive.add(
            folder, "criu", filter=lambda one: None if one.name.startswith(f"criu/{self_contained.LICENSES}") else one
        )


def _carry_tokenizer(target: Path) -> None:
    """Archive the tokenizer of the demo's model: the model itself is made of random numbers there."""
    from plugin.bench.presets import MODEL

    model = state_home() / "models" / MODEL
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    if not (model / names[0]).exists():
        raise LookupError(f"{model} has no tokenizer; run: make setup")
    with tarfile.open(target, "w:xz") as archive:
        for name in names:
            if (model / name).exists():
                archive.add(model / name, name)
