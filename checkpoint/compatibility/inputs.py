"""Digest what an engine's command line and environment refer to: files, folders, hub models, Python modules.

A restored engine has all of them in its memory, so each counts by its content, and an edit makes it another launch.
`Inputs.value` receives every value of a command line and recognises all forms of references: a path alone,
`name=PATH`, a list, or JSON that contains paths.

The model itself is not read here, because its manifest's digest covers it. Paths to which an engine only writes
(caches, dumps, logs) are not read either.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import blake3

from checkpoint.compatibility import hub
from checkpoint.compatibility.file_digests import FILES_LIMIT, FileDigests

log = logging.getLogger("quickthaw")
_NAMES = frozenset(
    [
        *("served-model-name", "root-path", "fastapi-root-path", "api-key", "admin-api-key", "otlp-service-name"),
        *("uds", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-keyfile-password"),
    ]
)
"""Flags whose values never refer to files that the engine reads: names and keys, and what quickthaw's port takes over."""
_WRITTEN = re.compile(
    r"(^|[-_.])(save|export|download|trace|profiler|storage|offload|cache|dump|output|media|metrics-to-file)[-_](dir|path|folder)$"
)
"""Flags and JSON keys for paths that an engine writes to, or reads at each request (`--allowed-local-media-path`)."""
_MODEL_FLAGS = frozenset({"model", "model-path"})
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:[A-Za-z_][\w.]*)?")
_MODULE_VARIABLES = ("_PACKAGE", "_MODULE", "_MODULES")
_FOLDER_VARIABLES = re.compile(r"_CONFIGS?_(DIR|FOLDER|PATH)$")
_CODE = (".py", ".so")
_CONFIG_LINE = re.compile(r"""^\s*["']?([A-Za-z_-]+)["']?\s*:\s*["']?([^"'\s,#]+)""", re.MULTILINE)
_CONFIG_LIMIT = 1 << 20
_LONGEST_PATH = 4096
_MOST_CANDIDATES = 512


def option(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option (`revision`) on a command line, or else in a file that `--config` names."""
    line, files = None, []
    for index, word in enumerate(arguments):
        head, equals, value = word.partition("=")
        if not head.startswith("--"):
            continue
        if not equals:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
        flag = head[2:].replace("_", "-")
        if flag == name:
            line = value
        elif flag == "config":
            files.append(value)
    if line is None:
        for file in files:
            for key, value in _CONFIG_LINE.findall(_text(Path(file))):
                line = value if key.replace("_", "-") == name else line
    return line or None


def _text(file: Path) -> str:
    try:
        if file.is_file() and file.stat().st_size <= _CONFIG_LIMIT:
            return file.read_text(errors="replace")
    except (OSError, ValueError):
        pass  # the engine reports it
    return ""


class Inputs:
    """Digests of everything a launch reads, except its model.

    `arguments`: its command line. `environment`: the engine's. `model`: the folder covered by the manifest's digest.
    `model_name`: its name on the command line. `modules`: folders of installed packages. `cache`: cache file for
    digests of large files.
    """

    def __init__(
        self,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        *,
        model: Path | None = None,
        model_name: str = "",
        modules: Sequence[Path] = (),
        cache: Path | None = None,
        engine: str = "",
    ) -> None:
        self.arguments, self.environment = arguments, environment or {}
        self.model, self.model_name, self.engine = model, model_name, engine
        self.digests = FileDigests(cache)
        self._packages = modules
        self._covered = tuple({os.path.abspath(model), os.path.realpath(model)}) if model else ()
        self._options: dict[str, str | None] = {}
        self._hub: list[Path] | None = None

    def value(self, flag: str, value: str) -> str:
        """Return the normalised value of a flag (`--x`, or "" for positional words).

        A file's path becomes its digest, so the same file elsewhere makes the same launch. To any other value, a
        digest over everything it refers to is appended.
        """
        name = flag.lstrip("-")
        covered = name in _MODEL_FLAGS or (value == self.model_name and not name)
        if not value or covered or name in _NAMES or _WRITTEN.search(name):
            return value
        found: dict[str, str] = {}
        shown, whole = value, self._whole_file(value)
        if whole:
            shown = f"file:{whole}"
        else:
            found = self._references_in(name, value)
        if whole and name == "config":
            for key, token in _tokens(_text(Path(value).expanduser())):
                if key not in _MODEL_FLAGS | _NAMES and not _WRITTEN.search(key):
                    found |= self._references_in(key, token)
        return f"{shown} [{_combined(found)}]" if found else shown

    def _whole_file(self, value: str) -> str:
        """Return the digest of the file at this path; "" if there is none."""
        try:
            path = Path(value).expanduser()
            return self.digests.of_file(path) if path.is_file() else ""
        except (OSError, ValueError, RuntimeError):
            return ""

    def variable(self, name: str, value: str) -> str:
        """Digest the files that an environment variable refers to.

        Folders count only if the name says that they hold configurations; those of PYTHONPATH count by their code.
        """
        found: dict[str, str] = {}
        if name == "PYTHONPATH":
            for folder in filter(None, value.split(os.pathsep)):
                found |= self._importable(Path(folder))
        if name.endswith(_MODULE_VARIABLES):
            for word in re.split(r"[\s,:]+", value):
                found |= self._module(word)
        for path in dict.fromkeys((value, *re.split(r"[\s,:]+", value))) if "/" in value else ():
            if path.startswith(("/", "~")) and len(path) < _LONGEST_PATH:
                at = Path(path).expanduser()
                if at.is_file() or (_FOLDER_VARIABLES.search(name) and at.is_dir()):
                    found |= self._path(at)
        return _combined(found)

    def remote_code(self) -> str:
        """With `--trust-remote-code`, digest the code in other repositories that the model's configuration refers to."""
        given = {word.partition("=")[0].replace("_", "-") for word in self.arguments}
        if self.model is None or not ("--trust-remote-code" in given or self._option("trust-remote-code")):
            return ""
        found: dict[str, str] = {}
        for repo in hub.code_repositories(self.model):
            found |= self._repository(repo, self._option("code-revision"))
        return _combined(found)

    def _references_in(self, name: str, value: str) -> dict[str, str]:
        """Map everything that a value refers to to its digest."""
        found: dict[str, str] = {}
        if name == "code-revision":
            return self._repository(self.model_name, value)
        flags = hub.TEXT_REVISIONS.get(name) or (f"{name}-revision", f"{name.removesuffix('-path')}-revision")
        revision = next(filter(None, map(self._option, flags)), None)
        for candidate, own_revision in _candidates(value):
            found |= self._resolve(candidate, own_revision or revision)
        return found

    def _option(self, name: str) -> str | None:
        if name not in self._options:
            self._options[name] = option(self.arguments, name)
        return self._options[name]

    def _resolve(self, candidate: str, revision: str | None) -> dict[str, str]:
        try:
            path = Path(candidate.removeprefix("file://")).expanduser()
            if path.exists():
                return self._path(path)
        except (OSError, ValueError, RuntimeError):
            return {}  # not a path: too long, contains a null byte, or names an unknown user
        if _MODULE.fullmatch(candidate) and (module := self._module(candidate)):
            return module
        return self._repository(candidate, revision)

    def _path(self, path: Path, endings: tuple[str, ...] = ("",)) -> dict[str, str]:
        name = os.path.abspath(path)
        if name == "/" or name in self._covered or (self._covered and os.path.realpath(path) in self._covered):
            return {}
        try:
            if path.is_file():
                return {name: self.digests.of_file(path)}
            if path.is_dir():
                digest = self.digests.of_folder(path, endings)
                if digest is None:
                    log.warning(
                        "%s has more than %d files and is not compared: a restore does not notice changes in it",
                        name,
                        FILES_LIMIT,
                    )
                    return {name: "too many files"}
                return {name: digest} if digest else {}
        except OSError as error:
            return {name: f"unreadable {error.errno}"}
        return {}

    def _repository(self, name: str, revision: str | None) -> dict[str, str]:
        if self._hub is None:
            places = hub.caches(self.environment, self._option("download-dir"))
            self._hub = [place for place in places if place.is_dir()]
        folder = hub.folder(name, revision, self._hub) if self._hub else None
        return self._path(folder) if folder else {}

    def _module(self, name: str) -> dict[str, str]:
        """Digest a Python module's sources: those of its folder or package.

        For an installed module, only its own file (its version counts).
        """
        parts = name.partition(":")[0].split(".")
        if not all(part.isidentifier() for part in parts) or parts[0] in (self.engine, "quickthaw_engine"):
            return {}
        own = (Path(folder) for folder in ("", *self.environment.get("PYTHONPATH", "").split(os.pathsep)))
        for place in (*own, *self._editable()):
            package, file = place / parts[0], place / f"{parts[0]}.py"
            if (package / "__init__.py").is_file() or (package.is_dir() and _deepest(place, parts)):
                return self._path(package, _CODE)
            if file.is_file():
                return {name: digest for source in place.glob("*.py") for name, digest in self._path(source).items()}
        for place in self._packages:
            if found := _deepest(place, parts):
                return self._path(found)
        return {}

    def _importable(self, folder: Path) -> dict[str, str]:
        """Digest everything that Python can import from a folder.

        Installed distributions count by their lists of files (RECORD), as those beside the engine count by version.
        """
        if any(folder.resolve() == place.resolve() for place in self._packages):
            return {}
        found: dict[str, str] = {}
        no_package = {"__pycache__"}
        for record in sorted(folder.glob("*.dist-info/RECORD")):
            found |= self._path(record)
            with contextlib.suppress(OSError), record.open(errors="replace") as lines:
                no_package.update(line.partition("/")[0] for line in lines)
        for entry in sorted(folder.glob("*")):
            package = entry.name.isidentifier() and entry.name not in no_package and entry.is_dir()
            if package or entry.name.endswith(_CODE):
                found |= self._path(entry, _CODE)
        return found

    def _editable(self) -> Iterator[Path]:
        """Yield folders that the installation's `.pth` files add."""
        for place in self._packages:
            for file in sorted(place.glob("*.pth")):
                for line in _text(file).splitlines():
                    if line.startswith("/"):
                        yield Path(line.strip())


def _deepest(place: Path, parts: Sequence[str]) -> Path | None:
    """Return the file of a dotted name below a folder; its last parts may be a class or a function."""
    for count in range(len(parts), 0, -1):
        stem = place.joinpath(*parts[:count])
        for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if file.is_file():
                return file
    return None


def _candidates(value: str) -> Iterator[tuple[str, str | None]]:
    """Yield every part of a value that may be a reference, each with the revision that its JSON object specifies."""
    text = value.strip()
    if text[:1] in ("{", "["):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            yield from _in_json(parsed)
            return
    seen: dict[str, None] = {text: None, text.removeprefix("@"): None, text.partition("=")[2]: None}
    for part in text.split(","):
        seen |= {part.strip(): None, part.partition("=")[2].strip(): None}
    seen |= dict.fromkeys(re.split(r"[\s,;:=]+", text))
    for candidate in list(seen)[:_MOST_CANDIDATES]:
        if candidate and candidate not in (".", "..", "/", "//") and len(candidate) < _LONGEST_PATH:
            yield candidate, None


def _in_json(document: Any) -> Iterator[tuple[str, str | None]]:
    todo: list[tuple[Any, str | None]] = [(document, None)]
    while todo:
        parsed, revision = todo.pop()
        if isinstance(parsed, str) and parsed.strip()[:1] not in ("{", "["):
            yield from ((candidate, revision) for candidate, _ in _candidates(parsed))
        elif isinstance(parsed, list):
            todo += [(item, revision) for item in parsed]
        elif isinstance(parsed, dict):
            own = parsed.get("revision")
            revision = own if isinstance(own, str) else revision
            todo += [(item, revision) for key, item in parsed.items() if not _WRITTEN.search(key)]


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Yield everything a configuration file may refer to, with its key: the rest of every line, and each of its words."""
    seen: dict[tuple[str, str], None] = {}
    key = ""
    for line in text.splitlines():
        head, colon, rest = line.strip().partition(":")
        if colon and not head.startswith("- "):
            key = head.strip("\"' ").replace("_", "-")
        else:
            rest = line.strip().removeprefix("- ")
        words = (rest, *re.split(r"[\s,\[\]{}]+", rest))
        seen |= {(key, token): None for word in words if (token := word.strip("\"' "))}
    yield from list(seen)[: _MOST_CANDIDATES * 8]


def _combined(found: Mapping[str, str]) -> str:
    if not found:
        return ""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(found.items()))
    return blake3.blake3(lines.encode(errors="surrogateescape")).hexdigest()[:32]
