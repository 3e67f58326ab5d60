"""What tests do with every answer that brings pictures."""

import base64
import io
from typing import Any

from fastapi.testclient import TestClient
from PIL import Image

UNREADABLE = [
    (b"{", "Expecting property name enclosed in double quotes at character 1"),
    (b'{"prompt": "caf\xe9"}', "byte 0xe9 at position 15 is not UTF-8; send the body as UTF-8"),
    (b"[" * 4000, "nested too deeply; use at most 64 levels"),
    (b'{"a": ' * 4000, "nested too deeply; use at most 64 levels"),
    (b'{"seed": ' + b"9" * 4301 + b"}", "more than 4300 digits, the most that can be read; send a smaller number"),
]
"""Bodies that the JSON parser gives up on, and what the answer says of each."""


def ask(client: TestClient, url: str, **fields: Any) -> dict[str, Any]:
    """The body of the answer, which must be a success."""
    response = client.post(url, json={"prompt": "red apple", **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def picture(item: dict[str, Any]) -> Image.Image:
    """What has a field ``b64_json``, decoded."""
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
