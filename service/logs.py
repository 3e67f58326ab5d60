"""The log: text for people or JSON lines for machines, each line with the id of the request that it is about.

Prompts, keys and picture ids are in no message: whoever logs one names the request instead.
"""

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is being answered here; None outside of any."""


def choose_id(offered: str | None) -> str:
    """A request's id: the client's own where it is sane, so that it can find its request in this log, else a new one."""
    if offered is not None and SANE_ID.fullmatch(offered):
        return offered
    return f"req_{secrets.token_hex(12)}"


class TextLines(logging.Formatter):
    """``time LEVEL logger: message [request id]``, and a trace below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(request)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        current = request_id.get()
        record.request = "" if current is None else f" [{current}]"
        return super().format(record)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, the access log's fields, and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str, log_format: LogFormat) -> None:
    """Send the log of this process to standard error, uvicorn's included, where it is told to leave it alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
