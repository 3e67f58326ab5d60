"""Divergence: losses and gradients that stay far above their usual size without ceasing to be finite.

A diverged student need not produce NaN. Its losses may settle at 1e10, noisily, and the job would go on to publish it.
So each value is followed by two running means of its logarithm: a level over the last updates, and a scale over the
last thousand. The value has diverged once the level is ``FACTOR`` times the scale:

    size = ln max(1, |value|),    level += (size - level) / 20,    scale += (size - scale) / 1000
    level - scale > ln FACTOR

Means of logarithms, because diverged values vary by orders of magnitude from one update to the next. A single outlier,
however large, cannot move the level that far: the largest float32 adds 88 / 20 to it, and ln 1000 is 6.9. A sustained
jump is noticed after 7 updates at 1e10, and after about 30 at 1e4.

Sizes below 1 count as 1. Latents have unit variance, so that a healthy loss is of the order of 1 or smaller: it may
start at exactly 0 (fake score and teacher are the same network at first), grow a millionfold, cross zero and change its
sign. Only values that stay above ``FACTOR`` itself can be taken for diverged, wherever they started.
"""

import math

FACTOR = 1000.0
"""Ratio of level to scale that counts as divergence. In the analytic tests, that of healthy values reaches 7."""
LEVEL_UPDATES, SCALE_UPDATES = 20, 1000


class Watch:
    """Follows values by name."""

    def __init__(self) -> None:
        self.sizes: dict[str, list[float]] = {}
        """By name: level, scale and the latest size. JSON-serialisable, so that a checkpoint can hold it."""

    def diverged(self, name: str, value: float) -> str | None:
        """Takes in the next value.

        Args:
            name: of the quantity.
            value: finite.

        Returns:
            What is wrong with the value, as the rest of a sentence; None if it has not diverged.
        """
        size = math.log(max(1.0, abs(value)))
        level, scale, _ = self.sizes.get(name, (size, size, size))
        level += (size - level) / LEVEL_UPDATES
        scale += (size - scale) / SCALE_UPDATES
        self.sizes[name] = [level, scale, size]
        if level - scale <= math.log(FACTOR):
            return None
        return f"{value:.4g} and stays over {FACTOR:g} times its usual size, {math.exp(scale):.3g}: it has diverged"

    @property
    def calm(self) -> bool:
        """Whether no value is on its way to divergence: weights behind such a value must not replace good ones."""
        limit = math.log(FACTOR)
        return all(level - scale < limit / 2 and size - scale < limit for level, scale, size in self.sizes.values())
