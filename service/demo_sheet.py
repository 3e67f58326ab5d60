"""The demo's contact sheet: one labelled image that compares models, step counts and diversity side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 112
GAP = 8
LABEL_WIDTH = 250
INK, PALE, PAPER = (24, 24, 27), (92, 92, 100), (255, 255, 255)
STRIPE = (243, 244, 246)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the sheet: its label, its cost, and an image per column."""

    label: str
    steps: int
    evaluations: int
    """Network evaluations per image."""
    milliseconds: float
    """Per image."""
    pictures: Sequence[Image.Image]

    @property
    def cost(self) -> str:
        """The figures under the label."""
        steps, plural = ("step" if self.steps == 1 else "steps"), ("" if self.evaluations == 1 else "s")
        return (
            f"{self.steps} {steps}, {self.evaluations} network evaluation{plural}, {self.milliseconds:.0f} ms per image"
        )


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font at this size."""
    return ImageFont.load_default(size=size)


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break the text into lines no wider than ``width`` pixels, at spaces where possible."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = max(1, sum(font.getlength(word[: end + 1]) <= width for end in range(len(word))))
            lines.append(word[:fits])
            word = word[fits:]  # noqa: PLW2901 - the rest of a word that is too long for one line
        lines.append(word)
    return lines


def draw_sheet(title: str, columns: Sequence[str], rows: Sequence[Row], footer: str = "") -> Image.Image:
    """Draw the sheet.

    Args:
        title: the line at the top.
        columns: what each column shows, such as its prompt and seed.
        rows: each with as many images as there are columns, of any size.
        footer: small print at the bottom.

    Raises:
        ValueError: a row has a different number of images.
    """
    for row in rows:
        if len(row.pictures) != len(columns):
            raise ValueError(f"row {row.label!r} has {len(row.pictures)} images for {len(columns)} columns")
    big, plain, small = font(20), font(14), font(12)
    headings = [wrap(column, CELL, small) for column in columns]
    width = LABEL_WIDTH + len(columns) * (CELL + GAP) + GAP
    note = wrap(footer, width - 2 * GAP, small)
    top = 44 + 15 * max(len(lines) for lines in headings) + GAP
    height = top + len(rows) * (CELL + GAP) + GAP + 16 * len(note)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 10), title, fill=INK, font=big)
    for index, lines in enumerate(headings):
        left = LABEL_WIDTH + index * (CELL + GAP)
        pen.multiline_text((left, top - GAP), "\n".join(lines), fill=INK, font=small, anchor="ld", spacing=2)
    for index, row in enumerate(rows):
        y = top + index * (CELL + GAP)
        if index % 2 == 0:
            pen.rectangle((0, y - GAP // 2, width, y + CELL + GAP // 2 - 1), fill=STRIPE)
        lines = wrap(row.label, LABEL_WIDTH - 2 * GAP, plain)
        pen.multiline_text((GAP, y + 22), "\n".join(lines), fill=INK, font=plain, spacing=3)
        cost = wrap(row.cost, LABEL_WIDTH - 2 * GAP, small)
        pen.multiline_text((GAP, y + 26 + 19 * len(lines)), "\n".join(cost), fill=PALE, font=small, spacing=2)
        for column, picture in enumerate(row.pictures):
            cell = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(cell, (LABEL_WIDTH + column * (CELL + GAP), y))
    pen.multiline_text((GAP, height - 16 * len(note) - 4), "\n".join(note), fill=PALE, font=small, spacing=2)
    return sheet
