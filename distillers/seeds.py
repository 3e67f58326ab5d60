"""Seeds by name: every random number of a job follows from its seed and from where in the job it is drawn.

So the random state and the data position of a job ARE its iteration: a resumed run draws what it would have drawn.
"""

import hashlib

import torch

_MASK = 2**63 - 1


def seed_of(*parts: int | str) -> int:
    """A seed in 0..2^63-1 made from the parts; other parts, another seed."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_of` the parts."""
    return torch.Generator("cpu").manual_seed(seed_of(*parts))
