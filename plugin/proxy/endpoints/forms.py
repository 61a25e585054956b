"""Read one field of a multipart form from a buffered body at a bounded cost.

python-multipart parses one slice at a time, and the event loop runs in between. A large form therefore delays other
streams by one slice at most.
"""

from __future__ import annotations

import asyncio
import logging

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from plugin.proxy.errors import ClientFault

# The parser warns about every malformed form, and any client can send those.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

_SLICE = 64 << 10
_MAX_PARTS = 1000
_MAX_VALUE = 1024


class _Field:
    """Collect the value of the first part called `name` (callbacks of `MultipartParser`)."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.value = bytearray()
        self.done = False
        self._parts = 0
        self._inside = False
        self._header, self._header_value = b"", b""

    def on_part_begin(self) -> None:
        self._parts += 1
        self._inside = False
        if self._parts > _MAX_PARTS:
            raise ClientFault("form-parts", f"over {_MAX_PARTS} parts before the form's `{self.name.decode()}`")

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._inside = parse_options_header(self._header_value)[1].get(b"name") == self.name
        self._header, self._header_value = b"", b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._inside and not self.done:
            self.value += data[start : min(end, start + _MAX_VALUE)]
            self.done = len(self.value) > _MAX_VALUE

    def on_part_end(self) -> None:
        self.done = self.done or self._inside


async def form_field(content_type: bytes, body: bytes | bytearray, name: str) -> str | None:
    """Return the value of the form's first field `name`, cut at 1 KiB, or None if the body has no such field or is no form.

    Raises ClientFault (form-parts) when more than 1,000 parts precede it.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        return None
    field = _Field(name.encode())
    callbacks = {key: getattr(field, key) for key in dir(field) if key.startswith("on_")}
    try:
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        for start in range(0, len(body), _SLICE):
            parser.write(bytes(body[start : start + _SLICE]))
            if field.done:
                return field.value.decode("utf-8", "replace")
            await asyncio.sleep(0)
    except FormParserError:
        return None
    return None
