"""A base's card: ``fewstep.json`` beside its model_index.json, with what diffusers' own files do not say.

Every entry is optional: ``default_steps``, ``default_guidance`` and ``licence``; a FLUX.1's usual ``size`` in pixels; and
``sha256``, the digest of the weights (`digest_base`), which are then verified whenever the base is loaded.

    python -m weights.cards FOLDER      writes the digest of the folder's weights into its card
"""

import json
import sys
from pathlib import Path
from typing import Any

from weights.commands import parser_of
from weights.files import write_atomically
from weights.student_files import NotFound, digest_base

CARD_FILE = "fewstep.json"
DIGEST = "sha256"


class WrongWeights(ValueError):
    """A base's weights are not those that its card states."""


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a pipeline's folder; empty if it has none.

    Raises:
        ValueError: it is not a JSON object.
    """
    file = folder / CARD_FILE
    if not file.is_file():
        return {}
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): correct it, or delete it") from error
    if not isinstance(card, dict):
        raise ValueError(f'{file} holds {card!r}, not a JSON object such as {{"default_steps": 50}}: correct it')
    return card


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write a folder's card, which states the digest of the weights that the folder holds now."""
    write_atomically(folder / CARD_FILE, json.dumps({**card, DIGEST: digest_base(folder)}, indent=2) + "\n")


def check_weights(folder: Path, card: dict[str, Any]) -> None:
    """Check a folder's weights against its card, if that states a digest.

    Raises:
        WrongWeights: they differ, or there are none.
    """
    stated = card.get(DIGEST)
    if stated is None:
        return
    try:
        found = digest_base(folder)
    except NotFound as error:
        raise WrongWeights(str(error)) from error
    if found != stated:
        raise WrongWeights(
            f"{folder} holds weights with digest {found}, but its {CARD_FILE} states {stated}: copy the folder again, or, "
            f"if the weights were changed on purpose, state theirs: python -m weights.cards {folder}"
        )


def main(arguments: list[str]) -> int:
    """Runs the command in the module's docstring and returns its exit status."""
    parser = parser_of("weights.cards", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a diffusers pipeline")
    try:
        for folder in parser.parse_args(arguments).folders:
            write_card(folder, read_card(folder))
            print(folder / CARD_FILE)
    except (NotFound, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
