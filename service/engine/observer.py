"""What an engine tells about itself as it works, for whoever counts: metrics, a benchmark, a test."""

from typing import Literal, Protocol

Call = Literal["text", "network", "decoder"]
Outcome = Literal["done", "cancelled", "timed_out", "refused", "failed"]


class Observer(Protocol):
    """Called on the engine's thread or the event loop's: quick, and safe from either."""

    def called(self, call: Call, model: str, rows: int, batch: int, seconds: float) -> None:
        """One call of a model: ``rows`` that somebody waits for, padded to ``batch``."""

    def ended(self, outcome: Outcome, pictures: int, waited: float, seconds: float) -> None:
        """One request is over: seconds until its first call, and in all."""


class Silence:
    """An observer that does nothing."""

    def called(self, call: Call, model: str, rows: int, batch: int, seconds: float) -> None:
        """See `Observer.called`."""

    def ended(self, outcome: Outcome, pictures: int, waited: float, seconds: float) -> None:
        """See `Observer.ended`."""
