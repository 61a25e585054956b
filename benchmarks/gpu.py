"""Measure quickthaw on a machine with a GPU, without network, for minutes; and prepare that on this one.

    python benchmarks/gpu.py prepare --engine vllm|sglang        here: makes build/gpu/ENGINE, which travels with the checkout
    python3 benchmarks/gpu_unpack.py build/gpu/ENGINE /tmp/gpu   there: makes /tmp/gpu/venv and /tmp/gpu/home
    /tmp/gpu/venv/bin/python benchmarks/gpu.py run --engine ENGINE --work /tmp/gpu --out $OUT [--budget 8m]
    /tmp/gpu/venv/bin/python benchmarks/gpu.py tests --work /tmp/gpu --out $OUT
    python benchmarks/gpu.py run --double --engine ENGINE …      here: the whole script on the doubles of the engine and of the driver

`run` prints one table and leaves OUT/figures.json and OUT/table.txt, both written after every figure: what kills it costs what it
was about to measure. The commands' logs are in OUT/logs.tar.gz. docs/gpu.md has the command lines for a lent machine.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

import launchers  # noqa: E402
from benchmarks.gpu_figures import Figures  # noqa: E402
from benchmarks.gpu_model import made  # noqa: E402
from plugin.bench.presets import Preset  # noqa: E402
from plugin.options import Duration  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402

WORK = click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder of gpu_unpack.py; state and models go here."
)
OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the figures.")
ENGINE = click.option("--engine", type=click.Choice(["vllm", "sglang"]), required=True)
BUDGET = click.option(
    "--budget", "budget_s", type=Duration(1.0), default="8m", help="What would end later is not begun."
)
TESTS = ("test_cuda_real.py", "test_weight_ring.py", "test_cuda_engine.py")  # the longest last: time may run out


@click.group(help=__doc__)
def main() -> None:
    """Run one of the commands."""
    unwind()


@main.command()
@ENGINE
@WORK
@OUT
@BUDGET
@click.option("--restores", type=click.IntRange(1), default=4, show_default=True)
@click.option("--alones", type=click.IntRange(1), default=2, show_default=True)
@click.option("--wakes", type=click.IntRange(1), default=3, show_default=True)
@click.option("--double", is_flag=True, help="Use the doubles of the engine and of the driver: no GPU.")
def run(
    engine: str, work: Path, out: Path, budget_s: float, restores: int, alones: int, wakes: int, double: bool
) -> int:
    """Measure an engine: restored, by phase, from standby, alone, and by its own sleep mode, on one model in one run."""
    from benchmarks.gpu_steps import ARGUMENTS, SNAPSHOT, GpuBench, Run, steps

    work, out = work.absolute(), out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (work / "logs").mkdir(parents=True, exist_ok=True)
    os.environ["QUICKTHAW_HOME"] = str(work / "home")
    figures = Figures(out, budget_s)
    figures.save()
    try:
        if double:
            preset, program = doubles(engine, work)
        else:
            model = made(work, "model", sys.executable)
            arguments = (launchers.engine(engine).model_flags[0], str(model), *ARGUMENTS[engine])
            preset = Preset(engine, Path(sys.executable), model, arguments, loader_path())
            program = ("-m", "plugin.launch")
        options = (
            ("--no-mount", "--weights", "excluded") if double else ("--no-mount",)
        )  # the double's are too few for a ring
        bench = GpuBench(preset, SNAPSHOT, work / "logs", 300.0, options, program)
        steps(Run(engine, bench, figures, work, restores, alones, wakes, double))
    finally:
        figures.save()
        with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
            archive.add(work / "logs", "logs")
        click.echo(figures.table())
    return 1 if figures.failed else 0


def loader_path() -> dict[str, str]:
    """Return LD_LIBRARY_PATH with the CUDA runtime of PyTorch's packages: SGLang's memory saver is preloaded, before PyTorch is there."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*/lib/libcudart.so.*"):
            return {
                "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(file.parent), os.environ.get("LD_LIBRARY_PATH"))))
            }
    return {}


def doubles(engine: str, work: Path) -> tuple[Preset, tuple[str, ...]]:
    """Return the engine's double as a preset, and the launch on the driver's double; both are set up in `work`."""
    from tests.kits.checkpoint.cuda_double import GPU0, TOTAL, configure, write
    from tests.kits.launch_rig import environment, model

    gpu = work / "gpu"
    gpu.mkdir(parents=True, exist_ok=True)
    write(gpu / "gpus.json", {GPU0: TOTAL})
    configure(gpu, memory={GPU0: 1 << 20})
    python, folder = environment(work / "engine"), model(work / "model")
    variables = {
        "GPU_DOUBLE": str(gpu),
        "ENGINE_DOUBLE_GPU": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "QUICKTHAW_SHARED_STEP": "1",
        "PYTHONPATH": str(ROOT),
    }
    return Preset(engine, python, folder, (launchers.engine(engine).model_flags[0], str(folder)), variables), (
        "-m",
        "tests.programs.gpu_launch",
    )


@main.command()
@WORK
@OUT
@click.option("--limit", "limit_s", type=Duration(1.0), default="6m", show_default=True)
def tests(work: Path, out: Path, limit_s: float) -> int:
    """Run tests/gpu with the real driver and a small model of random numbers; their report is OUT/tests.xml."""
    out.mkdir(parents=True, exist_ok=True)
    model = made(work.absolute(), "small", sys.executable)
    environment = {**os.environ, "QUICKTHAW_GPU_PYTHON": sys.executable, "QUICKTHAW_GPU_MODEL": str(model)}
    environment["QUICKTHAW_HOME"] = str(work.absolute() / "home")
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        f"--junitxml={out.absolute() / 'tests.xml'}",
    ]
    argv += ["-o", "timeout=300", *(f"tests/gpu/{name}" for name in TESTS)]
    with (out / "tests.txt").open(
        "wb"
    ) as log:  # a report is written at the end only; each line of this as its test ends
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            process.terminate()
            process.wait(30)
    click.echo((out / "tests.txt").read_text(errors="replace")[-8000:])
    return code


def _prepare() -> click.Command:
    from benchmarks.gpu_prepare import prepare  # what runs there has no need of it

    return prepare


main.add_command(_prepare())

if __name__ == "__main__":
    sys.exit(main(standalone_mode=False))
