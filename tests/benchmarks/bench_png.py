"""Times our PNG writer beside Pillow's, on the bundled pictures as they are and scaled up, with some noise.

    python -m tests.benchmarks.bench_png [--pictures 20] [--side 1024]

The writers take turns on each picture, and medians are shown.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from distillers.emoji.data import load_pictures, load_records
from service.png import encode_png

NOISE = 1.5
"""Standard deviation, of 255. A picture that was only scaled up would be flatter than any that is drawn."""


def pillow(level: int) -> Callable[[Image.Image], bytes]:
    """Its writer at this level of zlib."""

    def encode(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=level)
        return buffer.getvalue()

    return encode


WRITERS: Mapping[str, Callable[[Image.Image], bytes]] = {
    "service.png": encode_png,
    "Pillow, level 1": pillow(1),
    "Pillow, level 6 (its default)": pillow(6),
}


def pictures(count: int, side: int) -> list[Image.Image]:
    """The first bundled pictures; noisy where they had to be scaled up."""
    pixels = load_pictures(load_records()[:count]).permute(0, 2, 3, 1).numpy()
    found = list(map(Image.fromarray, pixels))
    random = np.random.default_rng(0)
    return [image if image.width == side else _scaled(image, side, random) for image in found]


def _scaled(image: Image.Image, side: int, random: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray((pixels + random.normal(0, NOISE, pixels.shape)).round().clip(0, 255).astype(np.uint8))


def measure(images: Sequence[Image.Image]) -> dict[str, tuple[float, int]]:
    """Median milliseconds and mean bytes, by writer."""
    seconds: dict[str, list[float]] = {name: [] for name in WRITERS}
    sizes: dict[str, list[int]] = {name: [] for name in WRITERS}
    for image in images:
        for name, encode in WRITERS.items():
            started = time.perf_counter()
            file = encode(image)
            seconds[name].append(time.perf_counter() - started)
            sizes[name].append(len(file))
    return {name: (1000 * statistics.median(seconds[name]), round(statistics.mean(sizes[name]))) for name in WRITERS}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_png", description=__doc__)
    made.add_argument("--pictures", type=int, default=20)
    made.add_argument("--side", type=int, default=1024, help="of the larger ones (%(default)s)")
    options = made.parse_args(arguments)
    table = Table("writer", title="a picture as PNG")
    sides = (64, options.side)
    for side in sides:
        table.add_column(f"{side}x{side}: ms", justify="right")
        table.add_column("bytes", justify="right")
    found = [measure(pictures(options.pictures, side)) for side in sides]
    for name in WRITERS:
        table.add_row(name, *(cell for each in found for cell in (f"{each[name][0]:.2f}", f"{each[name][1]:,}")))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
