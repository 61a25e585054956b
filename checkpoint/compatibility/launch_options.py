"""Which engine arguments matter to a snapshot, and which arguments and variables look like secrets.

The rule is one-sided: every argument matters unless it is listed here as irrelevant, so a mistake costs a cold start
but never gives a wrong answer. An argument is irrelevant if the restored process would give the same answers to the
same clients with the old value, because quickthaw takes over its function (host, port) or because it only changes
how much is logged. Arguments that control whether the *content* of requests is logged, or who may send them, matter.
docs/identity.md describes these rules in prose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from checkpoint.compatibility.inputs import Inputs

# Flag without dashes → number of its values (needed to remove them together).
_EVERY_ENGINE = {"host": 1, "port": 1}
IRRELEVANT_ARGUMENTS: dict[str, dict[str, int]] = {
    "vllm": {
        **_EVERY_ENGINE,
        "uvicorn-log-level": 1,
        "max-log-len": 1,
        "disable-uvicorn-access-log": 0,
        "disable-access-log-for-endpoints": 1,
        "aggregate-engine-logging": 0,
    },
    "sglang": {
        **_EVERY_ENGINE,
        "log-level": 1,
        "log-level-http": 1,
        "decode-log-interval": 1,
        "show-time-cost": 0,
        "nccl-port": 1,
        "crash-dump-folder": 1,
    },
}

# A secret is recognised by its name, word by word (`MAX_TOKENS` and `TOKENIZERS_…` do not match) …
_SECRET_WORDS = frozenset(
    [
        "key", "apikey", "token", "secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials",
        "auth", "authorization", "cookie", "dsn", "jwt",
    ]
)  # fmt: skip
# … or by the form of its value: vendor prefixes, a JSON web token, a PEM block, or a password in a URL.
_SECRET_VALUE = re.compile(
    r"\b(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|nvapi-[\w-]{20,}|eyJ[\w-]{8,1000}\.[\w-]{8,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]*:[^/\s:@]+@"
)
_PLAIN_VALUE = re.compile(r"[+-]?[0-9.]{0,9}|true|false|yes|no|on|off|auto|none|null", re.IGNORECASE)
# argparse accepts an unambiguous prefix of a flag.
_SECRET_FLAGS = ("api-key", "admin-api-key", "hf-token", "ssl-keyfile-password")

Arguments = dict[str, tuple[tuple[str, ...], ...]]
"""Flag with its dashes (`""` for positional words) → the values of each of its occurrences."""


def looks_secret(name: str, value: str) -> bool:
    """Return whether a variable's or flag's value must never be shown or stored."""
    if _PLAIN_VALUE.fullmatch(value):
        return False
    words = re.split(r"[-_.]+", name.strip("-").lower())
    if _SECRET_WORDS.intersection(words) or any(len(name) > 4 and f.startswith(name.strip("-")) for f in _SECRET_FLAGS):
        return True
    return bool(_SECRET_VALUE.search(value))


def secret_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of variables that look like secrets, whether they matter or not; for `inspect` and `--scrub-env`."""
    return tuple(sorted(name for name, value in environment.items() if looks_secret(name, value)))


def normalised_arguments(
    engine: str, arguments: Sequence[str], model_paths: Sequence[str] = (), inputs: Inputs | None = None
) -> Arguments:
    """Return the relevant arguments, independent of the order of flags, of `-` or `_` in them and of `=` or a space.

    `arguments` are the words after the module or the word `serve`. With `--served-model-name`, values equal to one
    of `model_paths` become `{model}`, because the model then counts by its digest alone. Without it, the path is the
    name that clients use. Values that refer to files count by their content (Inputs.value).
    """
    if not any(word.replace("_", "-").partition("=")[0] == "--served-model-name" for word in arguments):
        model_paths = ()
    inputs = inputs or Inputs(arguments)
    irrelevant = IRRELEVANT_ARGUMENTS.get(engine, _EVERY_ENGINE)
    found: dict[str, list[tuple[str, ...]]] = {}
    positional: list[str] = []
    words = list(arguments)
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            positional += words[at:]
            break
        if not _is_flag(word):
            positional.append(word)
            continue
        head, equals, attached = word.partition("=")
        flag = head.replace("_", "-") if head.startswith("--") else head
        values = [attached] if equals else []
        takes = irrelevant.get(flag.removeprefix("--"))
        if takes is not None:
            at += 0 if equals else min(takes, len(words) - at)
            continue
        while not equals and at < len(words) and not _is_flag(words[at]):
            values.append(words[at])
            at += 1
        found.setdefault(flag, []).append(tuple(_value(flag, v, model_paths, inputs) for v in values))
    if positional:
        found[""] = [tuple(_value("", v, model_paths, inputs) for v in positional)]
    return {flag: tuple(found[flag]) for flag in sorted(found)}


def _is_flag(word: str) -> bool:
    # A negative number is a value.
    return word.startswith("-") and len(word) > 1 and not re.fullmatch(r"-[0-9.]+(e[+-]?[0-9]+)?", word)


def _value(flag: str, value: str, model_paths: Sequence[str], inputs: Inputs) -> str:
    return "{model}" if value in model_paths else inputs.value(flag, value)
