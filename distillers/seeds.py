"""Seeds derived from names: every random number of a job depends only on its seed and where in the job it is drawn.

A job's random state and data position are therefore functions of its iteration, and a resumed run draws the same
numbers as an uninterrupted one.
"""

import hashlib

import torch

_MASK = 2**63 - 1


def seed_of(*parts: int | str) -> int:
    """A seed in 0..2^63-1, derived from the parts; different parts give different seeds."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator with the seed `seed_of` the parts."""
    return torch.Generator("cpu").manual_seed(seed_of(*parts))
