"""Training iterations as CUDA graphs, for networks so small that the GPU waits for the processor to start kernels.

A graph replays fixed GPU work. An iteration can be captured if everything that changes between iterations is on the
GPU: the batch, the learning rates, and the random numbers, whose generator is the GPU's own, seeded by (seed,
iteration) before each replay. Each outcome of a decision on the processor, such as which of the student's steps is
trained, needs its own graph (`Method.branch`). Losses are not checked before the optimizer step, which would wait for
the GPU, but when they are reported and before a checkpoint is written.
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from distillers.graphs import Replayed
from distillers.methods.base import Batch, Step, Turn
from weights.denoiser import Cond

if TYPE_CHECKING:
    from distillers.trainer import Trainer


class Captured:
    """A trainer's graphs, captured as they are needed."""

    def __init__(self, trainer: "Trainer") -> None:
        """
        Args:
            trainer: its method, settings and device are set; its networks may follow later. `distillers.spec` has
                checked that its job's settings can be captured.

        Raises:
            ValueError: see `check_place`.
        """
        check_place(trainer.accelerator)
        self._trainer = trainer
        self._graphs: dict[Hashable, tuple[Replayed, list[str]]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def iterate(self, batches: list[Batch]) -> None:
        """Runs one iteration: all of its turns, including what follows each optimizer step.

        Args:
            batches: exactly one, since gradient accumulation is not captured.
        """
        trainer, (batch,) = self._trainer, batches
        turns = trainer.method.turns(trainer.iteration)
        branch = trainer.method.branch(trainer.iteration, lambda turn: trainer.shared_generator(turn, 0))
        key = (tuple(turn.name for turn in turns), branch)
        if key not in self._graphs:
            self._graphs[key] = self._capture(turns, batch)
            trainer.seed_global()  # again, since the capture has drawn numbers
        for turn in turns:
            trainer.set_rates(turn)
        replayed, names = self._graphs[key]
        trainer.note(dict(zip(names, replayed(*_tensors(batch)).unbind(), strict=True)))
        for turn in turns:
            trainer.stepped(turn)

    def _capture(self, turns: list[Turn], batch: Batch) -> tuple[Replayed, list[str]]:
        """Captures the iteration; returns its graph and the names of the metrics that it outputs."""
        trainer = self._trainer
        networks = [trainer.networks[name] for turn in turns for name in turn.trains]
        optimizers = [network.optimizer for network in networks]
        kept = [_moments(each) for each in optimizers]
        own = {name: value.clone() for name, value in trainer.method.state().items()}
        names: list[str] = []

        def iteration(*tensors: Tensor) -> Tensor:
            given, scratch = _batch(batch, tensors), dict[str, Any]()
            noted: dict[str, Tensor] = {}
            for turn in turns:
                for metrics in trainer.learn(turn, [self._step(turn, given, scratch)], check=False):
                    noted |= metrics
            names[:] = noted
            return torch.stack([value.detach().float() for value in noted.values()])

        def restore() -> None:
            """Undoes the warm-up: a learning rate of 0 preserves weights, but not moments or the method's state."""
            for name, value in trainer.method.state().items():
                value.copy_(own[name])
            for optimizer, before in zip(optimizers, kept, strict=True):
                for weight, state in optimizer.state.items():
                    for name, value in state.items():
                        value.copy_(before.get((weight, name), torch.zeros_like(value)))

        for network in networks:
            network.set_rate(0.0)
        return Replayed(iteration, *_tensors(batch), pool=self._pool, warmed=restore), names

    def _step(self, turn: Turn, batch: Batch, scratch: dict[str, Any]) -> Step:
        trainer = self._trainer
        return Step(
            iteration=trainer.iteration,
            micro=0,
            batch=batch,
            shared=trainer.shared_generator(turn, 0),
            local=_generator(trainer.accelerator.device),
            scratch=scratch,
        )


def check_place(accelerator: Accelerator) -> None:
    """Rejects capture in an environment that does not support it.

    Raises:
        ValueError: the job has several processes, or no NVIDIA GPU.
    """
    reason = None
    if accelerator.num_processes > 1:
        reason = f"works in one process, not in {accelerator.num_processes}"
    elif accelerator.device.type != "cuda":
        reason = f"needs an NVIDIA GPU, but this job runs on {accelerator.device}"
    if reason is not None:
        raise ValueError(f"train.capture: {reason}; or turn capture off")


def _generator(device: torch.device) -> torch.Generator:
    """The GPU's default generator, which supports graph capture."""
    return torch.cuda.default_generators[device.index or 0]


def _moments(optimizer: torch.optim.Optimizer) -> dict[tuple[Tensor, str], Tensor]:
    """Copies of the optimizer's state, by weight and name."""
    return {(weight, name): value.clone() for weight, state in optimizer.state.items() for name, value in state.items()}


def _tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch in a fixed order; `_batch` reverses this."""
    real = [] if batch.real is None else [batch.real]
    return [*batch.cond.values(), *real, *(batch.real_cond or {}).values()]


def _batch(like: Batch, tensors: tuple[Tensor, ...]) -> Batch:
    left = iter(tensors)

    def cond(given: Cond) -> Cond:
        return {name: next(left) for name in given}

    return Batch(
        cond=cond(like.cond),
        real=None if like.real is None else next(left),
        real_cond=None if like.real_cond is None else cond(like.real_cond),
    )
