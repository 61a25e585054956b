"""Structured logs: one JSON object per line on standard error, with the fields from `extra={"fields": …}`."""

from __future__ import annotations

import datetime
import json
import logging
import sys


class JsonFormatter(logging.Formatter):
    """Format as `{"time": …, "level": …, "event": …, "message": …, …fields}`, with an exception's text under `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Format for a terminal: `08:41:33 info  r0: asleep → waking (woken)`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line, followed by an exception's traceback."""
        when = datetime.datetime.fromtimestamp(record.created).astimezone()
        fields: dict[str, object] = getattr(record, "fields", {})
        why = fields.get("reason") if getattr(record, "event", "") == "phase" else None
        request = f" [{fields['request_id']}]" if "request_id" in fields else ""
        line = (
            f"{when:%H:%M:%S} {record.levelname.lower():7} {record.getMessage()}{f' ({why})' if why else ''}{request}"
        )
        line = "".join(c if c.isprintable() else "�" for c in line)  # an engine's own text may be in it
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(level: str = "info", form: str = "auto") -> None:
    """Log to standard error as `json` lines, as `text` lines, or (`auto`) as text if it is a terminal, else JSON."""
    handler = logging.StreamHandler(sys.stderr)
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logger = logging.getLogger("quickthaw.proxy")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
