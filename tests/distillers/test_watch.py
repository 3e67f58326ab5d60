"""When losses count as diverged: what stays far too large is noticed, and nothing that a healthy training does."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distillers.methods.base import Batch, Step, Turn, TurnLoss
from distillers.methods.consistency import Consistency, ConsistencyConfig
from distillers.trainer import Diverged
from distillers.watch import Watch
from tests.distillers.mixtures import mixture_setup, trainer_of
from tests.distillers.test_trainer import fake_trainer


def noticed(values: Iterable[float], watch: Watch | None = None) -> int | None:
    """Index of the value that counts as diverged."""
    watch = watch or Watch()
    return next((index for index, value in enumerate(values) if watch.diverged("student/loss", value)), None)


@pytest.mark.parametrize(("size", "within"), [(1e4, 40), (1e6, 20), (1e10, 10), (-1e10, 10)])
def test_a_loss_that_stays_too_large_is_noticed(size: float, within: int) -> None:
    found = noticed([0.3] * 100 + [size] * 100)
    assert found is not None and 102 <= found < 100 + within


def test_so_is_one_that_varies_by_orders_of_magnitude_and_one_that_grows_steadily() -> None:
    noisy = [10 ** (2 + 8 * float(torch.rand((), generator=torch.Generator().manual_seed(i)))) for i in range(100)]
    assert noticed([0.01, *noisy]) is not None
    growing = noticed(1.05**i for i in range(700))
    assert growing is not None and 1.05**growing < 1e9


HEALTHY = {
    "one update of any size": [*[0.3] * 50, 3e38, *[0.3] * 50],
    "outliers now and then": [1e9 if i % 100 == 50 else 0.3 for i in range(1000)],
    "from nothing to its usual size": [1e-12 * 1.5**i if i < 68 else 0.9 for i in range(500)],
    "across zero": [math.sin(i / 7) * 30 for i in range(500)],
    "a hinge that drifts": [-0.1 * i for i in range(3000)],
    "a phase of another size": [*[1e-3] * 500, *[50.0] * 500, *[1e-3] * 500],
    "large from the start": [2e5] * 500,
    "from large to small": [2e5 * 0.9**i for i in range(500)],
    "slowly to another size": [1.002**i for i in range(5000)],
    "from exactly zero": [*[0.0] * 100, *[20.0] * 100],
}


@pytest.mark.parametrize("values", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_one_is_not(values: list[float]) -> None:
    assert noticed(values) is None


def test_what_it_remembers_survives_a_checkpoint() -> None:
    values = [0.3] * 100 + [1e10] * 10
    straight = noticed(values)
    first, second = Watch(), Watch()
    assert noticed(values[:103], first) is None
    second.sizes = json.loads(json.dumps(first.sizes))
    found = noticed(values[103:], second)
    assert found is not None and 103 + found == straight


def test_a_resumed_trainer_remembers_it(tmp_path: Path) -> None:
    trainer, other = (fake_trainer(tmp_path) for _ in range(2))
    trainer.check("student/loss", 5.0)
    trainer.save()
    other.load(other.latest_checkpoint())
    assert other.watch.sizes == trainer.watch.sizes != {}


def test_it_is_calm_before_and_after_an_outlier_and_no_more_before_it_notices() -> None:
    watch = Watch()
    for value, calm in ((0.3, True), (1e9, False), (0.3, True), *[(1e9, False)] * 4):
        assert watch.diverged("student/loss", value) is None
        assert watch.calm == calm, value


def test_a_job_stops_with_the_step_the_loss_and_the_checkpoint_from_before(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, iterations=100, checkpoint_every=1, gradient_clip=1e-6)
    right = trainer.method.loss

    def wrong(turn: Turn, step: Step) -> TurnLoss:
        found: TurnLoss = right(turn, step)
        return found if step.iteration < 10 else replace(found, loss=1e10 * found.loss)

    trainer.method.loss = wrong
    with pytest.raises(Diverged) as error:
        trainer.run()
    for part in ("student turn's loss is", "1000 times its usual size", "checkpoint: iteration-00000010.safetensors"):
        assert part in str(error.value)
    assert 12 < trainer.iteration < 25 and f"iteration {trainer.iteration}:" in str(error.value)


@pytest.mark.parametrize(
    ("name", "stops"), [("student/loss", True), ("student/gradient_norm", True), ("student/std", False)]
)
def test_captured_iterations_are_watched_in_reports(name: str, stops: bool, tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, iterations=60, log_every=2)

    def iterate(batches: list[Batch]) -> None:
        trainer.note({name: torch.tensor(0.3 if trainer.iteration < 10 else 1e10)})

    trainer.captured = SimpleNamespace(iterate=iterate)
    if not stops:
        trainer.run()
        return
    with pytest.raises(Diverged, match="1000 times"):
        trainer.run()
    assert trainer.iteration % 2 == 0


def test_consistency_at_an_absurd_rate_is_stopped(tmp_path: Path) -> None:
    setup = mixture_setup()
    torch.manual_seed(0)
    method = Consistency(ConsistencyConfig(guidance_scale=1.0, lr=30.0), setup)
    with pytest.raises(Diverged, match="it has diverged; last good checkpoint: none"):
        trainer_of(method, setup, tmp_path, batch_size=16, iterations=60).run()
