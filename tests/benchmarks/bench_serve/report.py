"""What was measured: medians over rounds, ratios within pairs, the bars, a table."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

NAMES = {"lock": "diffusers behind a lock", "window": "diffusers, fixed window", "ours": "fewstep serve"}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One server at one rate of arrivals."""

    server: str
    share: float
    """Of the lock's saturation."""
    p50: float
    p95: float
    requests: int
    refused: int


@dataclass(frozen=True, kw_only=True)
class Alone:
    """Requests of one kind while there are no others, each beside the bare calls for the same."""

    ours: float
    """Median seconds of an answer."""
    bare: float
    """Median seconds of the calls."""
    overhead: float
    """The median over the pairs of one over the other, less one."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> "Alone":
        """From the seconds of answers and of bare calls."""
        ours, bare = zip(*pairs, strict=True)
        ratios = [answer / calls for answer, calls in pairs]
        return cls(ours=statistics.median(ours), bare=statistics.median(bare), overhead=statistics.median(ratios) - 1)


@dataclass(frozen=True, kw_only=True)
class Round:
    """Everything measured once, one server after another."""

    images_per_second: Mapping[str, float]
    """At saturation, by server."""
    loaded: Sequence[Loaded]
    alone: Mapping[str, Alone]
    """This server, by kind of request."""
    answer: float
    """Median seconds of this server's answer when nothing is to be drawn, alone as well."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A promise, and what came of it."""

    what: str
    value: float
    limit: float
    at_least: bool
    """Whether the limit is the least or the most."""

    @property
    def holds(self) -> bool:
        """Whether it is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def ratio(rounds: Sequence[Round], over: str) -> float:
    """The median over the rounds of this server's images a second over another's in the same round."""
    return statistics.median(each.images_per_second["ours"] / each.images_per_second[over] for each in rounds)


def p95_ratio(rounds: Sequence[Round], share: float) -> float:
    """The median over the rounds of this server's p95 over the lock's, at the same arrivals."""

    def p95(each: Round, server: str) -> float:
        return next(row.p95 for row in each.loaded if (row.server, row.share) == (server, share))

    return statistics.median(p95(each, "ours") / p95(each, "lock") for each in rounds)


def alone(rounds: Sequence[Round]) -> dict[str, Alone]:
    """The medians over the rounds, by kind of request."""

    def median(kind: str, name: str) -> float:
        return statistics.median(getattr(each.alone[kind], name) for each in rounds)

    names = ("ours", "bare", "overhead")
    return {kind: Alone(**{name: median(kind, name) for name in names}) for kind in rounds[0].alone}


def overhead(rounds: Sequence[Round]) -> float:
    """One request of each kind after the other, over the bare calls of all of them, less one."""
    kinds = alone(rounds).values()
    return sum(each.ours for each in kinds) / sum(each.bare for each in kinds) - 1


def bars(rounds: Sequence[Round], share: float) -> list[Bar]:
    """The promises of the serving engine (docs/architecture.md)."""
    return [
        Bar(what="images/s over the lock's", value=ratio(rounds, "lock"), limit=4.0, at_least=True),
        Bar(what="images/s over the window's", value=ratio(rounds, "window"), limit=1.5, at_least=True),
        Bar(what=f"p95 over the lock's, at {share:.0%}", value=p95_ratio(rounds, share), limit=0.5, at_least=False),
        Bar(what="alone, over the bare calls (all kinds)", value=overhead(rounds), limit=0.15, at_least=False),
        Bar(
            what="alone, over the bare calls (worst)",
            value=max(each.overhead for each in alone(rounds).values()),
            limit=0.15,
            at_least=False,
        ),
    ]


def servers_table(rounds: Sequence[Round], title: str) -> Table:
    """Every server's medians."""
    made = Table("server", title=title)
    made.add_column("images/s", justify="right")
    shares = sorted({row.share for row in rounds[0].loaded})
    for share in shares:
        made.add_column(f"p50 / p95 s at {share:.0%}", justify="right")
    for server, name in NAMES.items():
        cells = [f"{statistics.median(each.images_per_second[server] for each in rounds):.2f}"]
        for share in shares:
            rows = [row for each in rounds for row in each.loaded if (row.server, row.share) == (server, share)]
            p50, p95 = (statistics.median(getattr(row, name) for row in rows) for name in ("p50", "p95"))
            refused = sum(row.refused for row in rows)
            cells.append(f"{p50:.2f} / {p95:.2f}" + (f" ({refused} refused)" if refused else ""))
        made.add_row(name, *cells)
    return made


def bars_table(found: Sequence[Bar], rounds: Sequence[Round]) -> Table:
    """The bars, and what alone costs by kind of request, and without anything to draw."""
    made = Table("bar", title="bars")
    for heading in ("measured", "wanted", ""):
        made.add_column(heading, justify="right")
    for bar in found:
        wanted = f"{'at least' if bar.at_least else 'at most'} {bar.limit:g}"
        made.add_row(bar.what, f"{bar.value:.2f}", wanted, "holds" if bar.holds else "MISSED")
    for kind, each in alone(rounds).items():
        milliseconds = f"{1000 * each.ours:.1f} ms over {1000 * each.bare:.1f}"
        made.add_row(f"  alone, {kind}", f"{each.overhead:+.1%}", milliseconds)
    answer = statistics.median(each.answer for each in rounds)
    made.add_row("  alone, nothing to draw", "", f"{1000 * answer:.1f} ms")
    return made
