"""Contact sheets: grids of labelled images."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 8
_INK, _PAPER, _QUIET = (26, 28, 32), (255, 255, 255), (226, 229, 233)


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Converts images ``(N, 3, H, W)`` uint8 to PIL."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in pictures.cpu()]


def sheet(
    pictures: Tensor | Sequence[Image.Image],
    labels: Sequence[str],
    columns: int,
    *,
    cell: int = 128,
    title: str | None = None,
    lines: int = 2,
) -> Image.Image:
    """A grid of images, row by row, with a label below each.

    Args:
        pictures: ``(N, 3, H, W)`` uint8, or N images; scaled to ``cell`` pixels, by whole factors without smoothing.
        labels: N of them, wrapped to at most ``lines`` lines; empty ones leave their space blank.
        columns: images per row.
        cell: width and height of an image on the sheet.
        title: above the grid.
        lines: lines reserved for each label; 0 for no labels.

    Raises:
        ValueError: labels and images differ in number, or there is no column.
    """
    images = to_images(pictures) if isinstance(pictures, Tensor) else list(pictures)
    if len(images) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: give one for each, which may be empty")
    if columns < 1:
        raise ValueError(f"a sheet needs at least 1 column, got {columns}")
    font, title_font = ImageFont.load_default(12), ImageFont.load_default(18)
    line_height, head = 15, 34 if title else 0
    rows = -(-len(images) // columns)
    step_y = cell + lines * line_height + GAP
    canvas = Image.new("RGB", (GAP + columns * (cell + GAP), head + GAP + rows * step_y), _PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((GAP, 9), title, fill=_INK, font=title_font)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = GAP + index % columns * (cell + GAP), head + GAP + index // columns * step_y
        canvas.paste(_fitted(image, cell), (x, y))
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=_QUIET)
        for number, line in enumerate(_wrapped(label, cell, font, lines)):
            draw.text((x, y + cell + 2 + number * line_height), line, fill=_INK, font=font)
    return canvas


def table(
    rows: Sequence[Tensor],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    cell: int = 128,
    title: str | None = None,
) -> Image.Image:
    """A table of images with a label for each row and column, to compare models on the same prompts.

    Args:
        rows: each ``(C, 3, H, W)`` uint8.
        row_labels: one per row.
        column_labels: C of them.
        cell: width and height of an image.
        title: above the table.
    """
    if len(rows) != len(row_labels) or any(len(row) != len(column_labels) for row in rows):
        raise ValueError(
            f"give {len(row_labels)} rows of {len(column_labels)} images, got {[len(row) for row in rows]}"
        )
    font, title_font = ImageFont.load_default(12), ImageFont.load_default(18)
    left, top = 150, (34 if title else 0) + 52
    size = (left + len(column_labels) * (cell + GAP), top + len(rows) * (cell + GAP) + GAP)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((GAP, 9), title, fill=_INK, font=title_font)
    for column, label in enumerate(column_labels):
        for number, line in enumerate(_wrapped(label, cell + GAP // 2, font, 3)):
            draw.text((left + column * (cell + GAP), top - 48 + 15 * number), line, fill=_INK, font=font)
    for number, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + number * (cell + GAP)
        for at, line in enumerate(_wrapped(label, left - 2 * GAP, font, 4)):
            draw.text((GAP, y + cell // 2 - 22 + 15 * at), line, fill=_INK, font=font)
        for column, image in enumerate(to_images(row)):
            canvas.paste(_fitted(image, cell), (left + column * (cell + GAP), y))
    return canvas


def save(image: Image.Image, path: Path) -> Path:
    """Writes a PNG; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", optimize=True)
    return path


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """The image at ``cell`` x ``cell``: sharp if scaled by a whole factor, otherwise resampled smoothly."""
    rgb = image.convert("RGB")
    if rgb.size == (cell, cell):
        return rgb
    whole = rgb.width == rgb.height and cell % rgb.width == 0
    return rgb.resize((cell, cell), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, lines: int) -> list[str]:
    """Wraps text to at most ``lines`` lines of ``width`` pixels, with an ellipsis if it does not fit."""
    if not text or lines < 1:
        return []
    per_line = max(4, int(width / max(1.0, font.getlength("abcdefghijklmnopqrstuvwxyz") / 26)))
    found = textwrap.wrap(text, per_line, max_lines=lines, placeholder="...")
    while any(font.getlength(line) > width for line in found) and per_line > 4:
        per_line -= 1
        found = textwrap.wrap(text, per_line, max_lines=lines, placeholder="...")
    return found
