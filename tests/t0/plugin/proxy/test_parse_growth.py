"""Client input is parsed in time proportional to its size.

Each case is doubled up to a megabyte. CPU time counts: a case fails if four times the input takes over ten times as long (quadratic:
sixteen times) and the time is noticeable.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import zlib
from collections.abc import Callable

import pytest

from capacity.errors import InputError
from capacity.inputs.units import parse
from checkpoint.compatibility.launch_options import looks_secret
from lazyfs.content.chunk_store import _REF
from plugin.proxy.endpoints.forms import form_field
from plugin.proxy.endpoints.models import ModelRouter
from plugin.proxy.endpoints.models_file import Config, ModelConfig
from plugin.proxy.errors import ClientFault
from plugin.proxy.http import wire
from plugin.proxy.http.path_rules import PathRules
from plugin.proxy.http.request import Request
from plugin.proxy.pool.pool import ReplicaPool

pytestmark = pytest.mark.t0

SMALLEST, LARGEST = 16 << 10, 1 << 20
HEAD = 64 << 10
"""The largest head that the proxy accepts (Settings.max_head)."""
NOTICEABLE_S = 0.2
KIND = b"multipart/form-data; boundary=b"
DISPOSITION = b"Content-Disposition: form-data; "


def growth(work: Callable[[bytes], object], unit: bytes, largest: int = LARGEST) -> None:
    """Double the input up to `largest` bytes, and fail at the first size whose CPU time grew disproportionately."""
    took: list[float] = []
    for size in itertools.takewhile(lambda n: n <= largest, (SMALLEST << step for step in itertools.count())):
        data = unit * (size // len(unit))
        began = time.process_time()
        work(data)
        took.append(time.process_time() - began)
        if len(took) > 2 and took[-1] > NOTICEABLE_S:
            assert took[-1] < 10 * took[-3], f"{size} bytes took {took[-1]:.2f} s, a quarter of them {took[-3]:.3f} s"
    assert took[-1] < 30 * NOTICEABLE_S, took


def routed(body: bytes, kind: bytes, coding: bytes = b"") -> object:
    """Return the pool that the router of several models finds for a request with this body."""
    request = Request()
    request.headers = [(b"content-type", b"Content-Type", kind)]
    if coding:
        request.headers.append((b"content-encoding", b"Content-Encoding", coding))
    request.body[:] = body
    request.complete, request.length = True, len(body)
    router = ModelRouter(Config({"a": ModelConfig(command="x", served_name="b")}), {"a": ReplicaPool()})

    class Client:
        class host:
            buffered = 0

        @staticmethod
        async def wait_body(request: Request, limit: int) -> bool:
            return request.complete

    try:
        return asyncio.run(router.route(Client(), request))  # type: ignore[arg-type]
    except ClientFault as fault:
        return fault.code


FORMS = {
    "one header, for ever": (b"--b\r\n" + DISPOSITION, DISPOSITION),
    "the field's name, for ever": (b"--b\r\n" + DISPOSITION, b'name="model"\r\n'),
    "headers without an end": (b"--b\r\n", b"X: y\r\n"),
    "parameters": (b"--b\r\n" + DISPOSITION, b"a=b;"),
    "almost boundaries": (b"--b\r\n\r\n", b"\r\n--bX"),
    "line ends": (b"", b"\r\n"),
    "empty parts": (b"", b"--b\r\n\r\n\r\n"),
    "quotes": (b"--b\r\n" + DISPOSITION + b'name="', b'\\"'),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_without_a_model_is_parsed_in_linear_time(name):
    before, unit = FORMS[name]
    growth(lambda data: routed(before + data, KIND), unit)


JSON = {
    "nested arrays": (b'{"a":', b"["),
    "many keys": (b"{", b'"a":1,'),
    "the same key, at the end a model": (b"{", b'"model":"a",'),
    "escapes": (b'{"model":"', b"\\u0041"),
    "digits": (b'{"model":', b"7"),
    "spaces": (b"", b" "),
}


@pytest.mark.slow
def test_a_compressed_body_costs_no_more_than_the_client_sent():
    body = zlib.compress(b'{"a":[' + b"1," * (24 << 20) + b'1],"model":"a"}', 9)
    assert len(body) < 64 << 10
    began = time.process_time()
    assert routed(body, b"application/json", b"deflate") == "body-too-large"
    assert time.process_time() - began < NOTICEABLE_S
    text = b'{"a":"' + b"".join(b"%d " % (n * n) for n in range(300_000)) + b'","model":"a"}'
    assert isinstance(routed(zlib.compress(text), b"application/json", b"deflate"), ReplicaPool)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("coding", [b"", b"deflate"])
def test_a_json_body_is_parsed_in_linear_time(name, coding):
    before, unit = JSON[name]
    pack = zlib.compress if coding else bytes
    growth(lambda data: routed(pack(before + data), b"application/json", coding), unit)


@pytest.mark.parametrize(
    "unit", [b"/a", b"/", b"/..", b"/../a", b"%2f", b"%25", b"%2525", b";", b"/;", b"\\", b"/%2e%2e", b"?"]
)
def test_a_path_is_classified_in_linear_time(unit):
    def classify(path: bytes) -> None:
        PathRules("/-", frozenset({"/sleep", "/v1/load_lora_adapter"})).classify(b"/" + path)

    growth(classify, unit, HEAD)


@pytest.mark.parametrize("name", [b"connection", b"prefer", b"x-forwarded-for", b"x-quickthaw-hold", b"cookie"])
def test_a_request_head_is_parsed_in_linear_time(name):
    def classify(value: bytes) -> None:
        request = Request()
        request.target = b"/"
        request.headers = [(b"host", b"Host", b"h"), (name, name, value)]
        try:
            request.validate(b"GET", "1.1", True)
        except ClientFault:
            return

    for unit in (b"a,", b"wait=1,", b"1", b" ", b"wait=1;"):
        growth(classify, unit, HEAD)


def test_an_answers_head_is_parsed_in_linear_time():
    """Any server may be the engine; upstream_connection.py reads up to 256 KiB of a head."""

    def head(data: bytes) -> None:
        names = data.split(b",")
        fields = [(b"connection", b"Connection", b"x%d" % n) for n in range(len(names))]
        wire.response_head(200, b"OK", fields, request_id=b"i", chunked=False, close=False)

    growth(head, b"x,", 256 << 10)


EXPRESSIONS = {
    "numbers with units (a plan's file)": lambda text: _refused(text),
    "secrets (a command line)": lambda text: looks_secret("X", text),
    "references (a store's index)": _REF.fullmatch,
}


def _refused(text: str) -> None:
    try:
        parse(text, "duration")
    except InputError:
        return


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize(
    "unit",
    ["1", " ", "1 a", "a", "_", "a/", "://", ":a", "-", "sk-", "eyJaaaaaaaa.", "BEGIN ", ".", "1_", "-eyJaaaaaaaa"],
)
def test_regular_expressions_match_in_linear_time(name, unit):
    for before in ("", "1", "1a"):
        growth(lambda data: EXPRESSIONS[name](before + data.decode() + "\x01"), unit.encode(), 256 << 10)  # noqa: B023


def test_a_field_is_found_anywhere_in_its_form():
    file = (
        b"--b\r\n"
        + DISPOSITION
        + b'name="file"; filename="model"\r\nContent-Type: audio/wav\r\n\r\n'
        + b"\r\n--x" * 40_000
    )
    model = b"--b\r\ncontent-disposition: form-data; name=model\r\n\r\nblue"
    other = b"--b\r\n" + DISPOSITION + b'name="models"\r\n\r\nred'

    def found(*parts: bytes, kind: bytes = KIND) -> str | None:
        return asyncio.run(form_field(kind, b"\r\n".join(parts) + b"\r\n--b--\r\n", "model"))

    assert found(model) == found(file, model) == found(model, file) == found(other, file, model) == "blue"
    assert found(file) is None and found(other) is None and found(model, kind=b"multipart/form-data") is None
    quoted = model.replace(b"name=model", b'name="model"').replace(b"--b", b"--Web'Kit")
    assert (
        asyncio.run(form_field(b'multipart/form-data; boundary="Web\'Kit"', quoted + b"\r\n--Web'Kit--", "model"))
        == "blue"
    )
    with pytest.raises(ClientFault, match="1000 parts"):
        found(*[b"--b\r\n\r\n"] * 1001, model)
