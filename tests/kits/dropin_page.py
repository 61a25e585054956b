"""docs/compatibility.md, made from the rows that tests/t2/test_dropin.py runs: `python -m tests.kits.dropin_page > docs/compatibility.md`."""

import shlex

from tests.kits.dropin_rows import (
    AS_GIVEN,
    COMMANDS,
    DIFFERENT,
    DOORS,
    EMBEDDING,
    FEATURES,
    ITS_OWN,
    PLAIN,
    PLAINLY,
    RESTORED,
    SGLANG,
    SPELLINGS,
    SURROUNDINGS,
    VLLM,
    Command,
    Row,
)

_SHOWN = {
    "{script}": "",
    "{python}": "python3",
    "{model}": "MODEL",
    "{link}": "LINK",
    "{tokenizer}": "DIR",
    "{folder}": "DIR",
    "{port}": "8000",
    "{home}": "DIR",
    "{certificate}": "CERT.pem",
    "{key}": "KEY.pem",
    "{socket}": "/run/engine.sock",
    "{collector}": "http://COLLECTOR/v1/traces",
}
_FOLLOWS = {
    RESTORED: "restored, the same answer",
    PLAIN: "plain start: `{code}`",
    AS_GIVEN: "runs as given: `{code}`",
    ITS_OWN: "not this snapshot: `{code}`",
}
_HEAD = """# Compatibility: command lines and environments, tried with the real engines

Made by `python -m tests.kits.dropin_page > docs/compatibility.md` from the table that `tests/t2/test_dropin*.py` run, row by row, with vLLM 0.32 and
SGLang 0.5.23 (CPU) and SmolLM2-135M-Instruct. "Restored": the snapshot that one start took serves this one too, and the greedy text is the same.
[Limits](limits.md) says what is not here; [options](options.md) lists quickthaw's own.
"""


def shown(row: Row | Command) -> str:
    """The row's command as a reader would type it; "…" stands for the first command line of the engine's."""
    meaning = _SHOWN | {"{script}": row.engine}

    def filled(word: str) -> str:
        for name, value in meaning.items():
            word = word.replace(name, value)
        return word.replace("\\\n", "")

    variables = [f"{name}={filled(value)}" for name, value in getattr(row, "environment", {}).items()]
    before = getattr(row, "before", "")
    command = shlex.join(["quickthaw", "launch", *getattr(row, "options", ()), *map(filled, row.words)])
    if variables or before:
        shell = ["sh", "-c", shlex.quote(filled(before)), "sh"] if before else []
        return " ".join([*variables, *shell, "quickthaw launch …" if row.words in (VLLM, SGLANG) else command])
    return command


def table() -> list[tuple[str, str, str, str, str]]:
    """Section, engine, what, command, and what follows, of each row."""
    found = []
    for section, group in (
        ("Command lines", SPELLINGS),
        ("Environments", SURROUNDINGS),
        ("What needs its own snapshot", DIFFERENT),
        ("Plain starts", PLAINLY),
        ("TLS, Unix sockets, traces", DOORS),
    ):
        for row in group:
            found.append((section, row.engine, row.what, shown(row), _FOLLOWS[row.outcome].format(code=row.code)))
    for command in COMMANDS:
        found.append(("Other commands", command.engine, command.what, shown(command), "its own output and exit code"))
    for feature in FEATURES:
        follows = (
            "the same answer, cold and restored" if feature.status == 200 else f"{feature.status}, cold and restored"
        )
        found.append(
            (
                "Options of the engines",
                feature.engine,
                feature.what,
                f"{'POST' if feature.body else 'GET'} {feature.path}",
                follows,
            )
        )
    found.append(
        (
            "Options of the engines",
            "vllm",
            "--speculative-config, a draft model",
            "/metrics",
            "it drafts, cold and restored",
        )
    )
    for engine, words in EMBEDDING.items():
        found.append(
            ("Options of the engines", engine, "an embedding model", " ".join(words), "restored, within its own noise")
        )
    return found


def page() -> str:
    """The text of docs/compatibility.md."""
    lines = [_HEAD]
    section = ""
    for name, engine, what, command, follows in table():
        if name != section:
            section = name
            lines += [f"\n## {name}", "| engine | what | command | what follows |", "|---|---|---|---|"]
        code = f"`{command}`" if command else ""
        lines.append(f"| {engine} | {what} | {code.replace('|', chr(92) + '|')} | {follows} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
