"""What is asked of the servers, and when: requests of every kind in a fixed mixture, and arrivals without a memory."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SUBJECTS = (
    "red apple, noto emoji",
    "smiling face, fluent 3d emoji",
    "dog, twemoji",
    "food fruit",
    "animals & nature, fluent 3d emoji",
    "sun behind a cloud",
    "flag with a green star",
    "musical instrument, noto emoji",
)


def prompt(chance: random.Random) -> str:
    """One that hardly ever comes twice: what has been encoded before must be no help."""
    return f"{chance.choice(SUBJECTS)} {chance.randrange(10**9)}"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request."""

    prompt: str
    seed: int
    steps: int
    n: int
    guidance_scale: float

    def body(self, model: str) -> dict[str, Any]:
        """As it is sent, to this server and to the baselines alike."""
        return {
            "model": model,
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "n": self.n,
            "guidance_scale": self.guidance_scale,
            "response_format": "b64_json",
            "output_format": "png",
        }


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What requests are made of; each value as likely as the others, but for guidance."""

    steps: tuple[int, ...] = (1, 2, 4)
    most_pictures: int = 4
    """n is 1 to this."""
    guided: float = 0.25
    """Share of the requests that are guided."""
    guidance_scale: float = 1.5

    def asks(self, seed: int) -> Iterator[Ask]:
        """Endless requests; a seed always gives the same ones, so that every server gets them."""
        chance = random.Random(seed)
        while True:
            yield Ask(
                prompt=prompt(chance),
                seed=chance.randrange(2**31),
                steps=chance.choice(self.steps),
                n=chance.randint(1, self.most_pictures),
                guidance_scale=self.guidance_scale if chance.random() < self.guided else 1.0,
            )


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of arrivals in ``[0, seconds)``, at ``rate`` a second: exponential intervals, as of many clients together."""
    chance = random.Random(seed)
    times: list[float] = []
    now = chance.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += chance.expovariate(rate)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of the values does not exceed (nearest rank).

    Args:
        values: at least one.
        share: in (0, 1].
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f"a percentile wants values and a share in (0, 1], got {len(values)} and {share}")
    return sorted(values)[math.ceil(share * len(values)) - 1]
