"""What tests do with every answer that brings pictures."""

import base64
import io
from typing import Any

from fastapi.testclient import TestClient
from PIL import Image


def ask(client: TestClient, url: str, **fields: Any) -> dict[str, Any]:
    """The body of the answer, which must be a success."""
    response = client.post(url, json={"prompt": "red apple", **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def picture(item: dict[str, Any]) -> Image.Image:
    """What has a field ``b64_json``, decoded."""
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
