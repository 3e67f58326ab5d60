"""A PNG encoder that takes at most about half the time of Pillow's at zlib level 1.

Pillow tries five filters on each row and searches for repeated strings. For generated images, differences to the pixel
on the left and runs of equal bytes compress as well. `python -m tests.benchmarks.bench_png`, on emoji as they are and
scaled up with some noise, AMD EPYC (Zen 4), 2026-11-26:

                     64x64                     1024x1024
    here             0.15 ms, 4,881 bytes      29 ms, 1.26 MB
    Pillow, level 1  0.26 ms, 4,803 bytes      83 ms, 1.51 MB
    Pillow, level 6  0.47 ms, 4,393 bytes     545 ms, 1.28 MB

The format is PNG, third edition (https://www.w3.org/TR/png-3/).
"""

import struct
import zlib

import numpy as np
from PIL.Image import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL, STRATEGY = 1, zlib.Z_RLE
"""Settings of zlib. Differences seldom repeat except in runs, and searching for nothing else is faster."""
SUB = 1
"""A row's filter type: each byte minus that of the pixel on the left (section 9.2)."""


def encode_png(image: Image, keyword: str = "", text: str = "") -> bytes:
    """Encode the image as a PNG with 8 bits per channel.

    Args:
        image: RGB.
        keyword: keyword of the text, which is an iTXt chunk; if empty, none is written.
        text: any text.

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"the image is {image.mode}: convert it to RGB")
    header = struct.pack(">2I5B", image.width, image.height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    told = _chunk(b"iTXt", keyword.encode("latin-1") + bytes(5) + text.encode()) if keyword else b""
    deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, STRATEGY)
    pixels = deflate.compress(_filtered(np.asarray(image))) + deflate.flush()
    return b"".join([SIGNATURE, _chunk(b"IHDR", header), told, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")])


def _filtered(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    """Rows ``(H, W, 3)`` as differences, each after its filter type."""
    height, width, _ = pixels.shape
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = SUB
    flat = pixels.reshape(height, 3 * width)
    rows[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])  # modulo 256, as the format requires
    return rows.tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Length, type, content and checksum (section 5.3)."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
