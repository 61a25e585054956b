"""Build dist/quickthaw-*.whl and dist/quickthaw_criu-*.whl: `make wheels`, or `python setup/wheels.py FOLDER [--from PATH …]`.

`--from` names Debian packages of CRIU instead of fetching them, as `quickthaw setup criu --from`. Both are built from copies, so
that files of an earlier build cannot get into a wheel.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))


def build(source: Path, target: Path) -> Path:
    """Build the wheel of a source folder into `target`, replacing older ones of the same name; return it."""
    with tempfile.TemporaryDirectory(dir=target) as made:
        argv = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            made,
            str(source),
        ]
        subprocess.run(argv, check=True)
        (wheel,) = Path(made).glob("*.whl")
        for old in target.glob(f"{wheel.name.partition('-')[0]}-*.whl"):
            old.unlink()
        return wheel.rename(target / wheel.name)


def copy_of_project(folder: Path) -> Path:
    """Copy what quickthaw's wheel is built from."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(REPO / name, folder)
    for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]:
        for package in REPO.glob(pattern):
            if (package / "__init__.py").exists():
                shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def copy_of_criu(folder: Path, given: list[Path]) -> Path:
    """Copy the frame of quickthaw-criu's wheel and put a self-contained CRIU into it."""
    from checkpoint.criu.self_contained import LICENSES
    from plugin.setup.criu import make_folder

    shutil.copytree(REPO / "setup" / "criu_wheel", folder)
    package = folder / "quickthaw_criu"
    made = folder / "made"
    version = make_folder(made, lambda text: print(text, file=sys.stderr), given)
    packages = [line.split()[0] for line in (made / LICENSES / "PACKAGES").read_text().splitlines()[1:]]
    if without := [name for name in packages if not (made / LICENSES / name).exists()]:
        sys.exit(f"wheels: no licence of {', '.join(without)}; nothing is built")
    for one in made.iterdir():
        one.rename(package / one.name)
    made.rmdir()
    (folder / "VERSION").write_text(version)
    return folder


def main() -> None:
    """Build both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--from", dest="given", action="append", default=[], type=Path)
    words = parser.parse_args()
    words.target.mkdir(parents=True, exist_ok=True)
    from checkpoint.errors import CheckpointError

    try:
        with tempfile.TemporaryDirectory(prefix="quickthaw-") as work:
            for source in (copy_of_project(Path(work) / "quickthaw"), copy_of_criu(Path(work) / "criu", words.given)):
                wheel = build(source, words.target)
                print(f"{wheel} {wheel.stat().st_size / 1e6:.1f} MB")
    except CheckpointError as error:
        sys.exit(f"wheels: {error}")


if __name__ == "__main__":
    main()
