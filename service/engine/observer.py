"""What an engine reports about its work, for metrics, benchmarks and tests."""

from typing import Literal, Protocol

Call = Literal["text", "network", "decoder"]
Outcome = Literal["done", "cancelled", "timed_out", "refused", "failed"]


class Observer(Protocol):
    """Called on the engine's thread or the event loop's, so it must be quick and thread-safe."""

    def called(self, call: Call, model: str, rows: int, batch: int, seconds: float) -> None:
        """One model call was made: ``rows`` that requests wait for, padded to ``batch``."""

    def ended(self, outcome: Outcome, pictures: int, waited: float, seconds: float) -> None:
        """One request has ended, with its seconds until the first call and in total."""


class Silence:
    """An observer that does nothing."""

    def called(self, call: Call, model: str, rows: int, batch: int, seconds: float) -> None:
        """See `Observer.called`."""

    def ended(self, outcome: Outcome, pictures: int, waited: float, seconds: float) -> None:
        """See `Observer.ended`."""
