"""The trainer: optimizers, cadence, averages, precision, checkpoints, resumption. It is independent of the methods.

accelerate provides devices, mixed precision and DDP. Each turn of a method is wrapped as one module, whose forward pass
is the turn's loss and whose parameters are those of the networks that the turn trains, so that DDP works for any
method.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distillers.captured import Captured
from distillers.checkpoint import checkpoints_in, load_checkpoint, save_checkpoint
from distillers.events import Reporter, now
from distillers.identity import Identity
from distillers.methods.base import Batch, Method, Step, Turn
from distillers.precision import fast_kernels
from distillers.processes import Interrupted, agreed, wait
from distillers.rollout import evaluating
from distillers.seeds import generator_of, seed_of
from distillers.sheets import Sheet
from distillers.stopwatch import Stopwatch
from distillers.trained import TrainedNetwork, TurnModule, behind
from distillers.watch import Watch
from weights.contracts import TrainSpec
from weights.events import Progress, Saved, Started


class Diverged(RuntimeError):
    """A loss or gradient is not finite, or stays far too large; names the iteration, turn and last good checkpoint."""


class BadCheckpoint(ValueError):
    """A checkpoint belongs to another job."""


class Batches(Protocol):
    """The trainer's interface to the data."""

    def batch(self, iteration: int, micro: int = 0, rank: int = 0) -> Batch:
        """The batch with that index; always the same for the same arguments."""


class Trainer:
    """Trains a method until its last iteration, or until asked to stop."""

    def __init__(
        self,
        method: Method,
        feed: Batches,
        spec: TrainSpec,
        *,
        accelerator: Accelerator,
        folder: Path,
        reporter: Reporter,
        identity: Identity,
        sheet: Sheet | None = None,
    ) -> None:
        """
        Args:
            method: with its networks on the accelerator's device.
            feed: provides the batches.
            spec: the trainer's settings.
            accelerator: devices and mixed precision.
            folder: the job's; checkpoints/ and samples/ are created in it.
            reporter: receives the events.
            identity: everything that must not change between a checkpoint and its resumption.
            sheet: generates sample sheets; none are generated when left out.

        Raises:
            ValueError: the job asks for captured iterations, which are not possible here.
        """
        self.method = method
        self.feed = feed
        self.spec = spec
        self.accelerator = accelerator
        self.folder = folder
        self.reporter = reporter
        self.identity = identity
        self.sheet = sheet
        self.iteration = 0
        self.time = Stopwatch()
        self.watch = Watch()
        self.asked_to_stop = False
        self.captured = Captured(self) if spec.capture else None
        self.networks = {
            name: TrainedNetwork(trained, accelerator.device, spec.ema_decay, spec.capture)
            for name, trained in method.trained().items()
        }
        self._turns: dict[str, nn.Module] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    # Training

    def run(self) -> None:
        """Trains from the current iteration to the end, and saves the final state.

        Raises:
            Diverged: a loss or gradient is not finite, or has diverged.
            Interrupted: `asked_to_stop` was set; the state has been saved.
        """
        self.reporter.emit(
            Started(at=now(), step=self.iteration, iterations=self.spec.iterations, resumed_from=self.iteration)
        )
        saved = sampled = self.iteration
        due, ended = False, self._ended()
        while not ended:
            with self.time:  # saving and sampling do not count as training time
                self._iterate()
            self.iteration += 1
            ended = self._ended()
            if ended or self.iteration % self.spec.log_every == 0:
                self._log()
            if self._should_stop():
                self.save()
                raise Interrupted(f"stopped after iteration {self.iteration}")
            due = due or self.iteration % self.spec.checkpoint_every == 0
            if due and self.watch.calm:  # else later: a bad state must not replace a good one
                self.save()
                saved, due = self.iteration, False
            if self.iteration % self.spec.sample_every == 0:
                self.sample()
                sampled = self.iteration
        if saved != self.iteration:
            self.save()
        if sampled != self.iteration:
            self.sample()

    def _ended(self) -> bool:
        """Whether the last iteration is done, or the time is up."""
        limit = self.spec.max_minutes
        late = agreed(limit is not None and self.time.seconds >= limit * 60, self.accelerator.device)
        return late or self.iteration >= self.spec.iterations

    def _should_stop(self) -> bool:
        return agreed(self.asked_to_stop, self.accelerator.device)

    def _iterate(self) -> None:
        """Runs one iteration: each of its turns on all micro-batches."""
        rank, seed = self.accelerator.process_index, self.spec.seed
        self.seed_global()
        micros = range(self.spec.gradient_accumulation)
        batches = [self.feed.batch(self.iteration, micro, rank) for micro in micros]
        if self.captured is not None:
            self.captured.iterate(batches)
            return
        scratches: list[dict[str, Any]] = [{} for _ in micros]
        for turn in self.method.turns(self.iteration):
            steps = [
                Step(
                    iteration=self.iteration,
                    micro=micro,
                    batch=batches[micro],
                    shared=self.shared_generator(turn, micro),
                    local=generator_of(seed, "local", turn.name, self.iteration, micro, rank),
                    scratch=scratches[micro],
                )
                for micro in micros
            ]
            self.set_rates(turn)
            for metrics in self.learn(turn, steps, check=True):
                self.note(metrics)
            self.stepped(turn)

    def seed_global(self) -> None:
        """Seeds torch's global generators, for dropout and other implicit draws; for all draws if captured."""
        torch.manual_seed(seed_of(self.spec.seed, "global", self.iteration, self.accelerator.process_index))

    def shared_generator(self, turn: Turn, micro: int) -> torch.Generator:
        """`Step.shared` for a turn of this iteration, in its initial state."""
        return generator_of(self.spec.seed, "shared", turn.name, self.iteration, micro)

    def set_rates(self, turn: Turn) -> None:
        """Sets this iteration's learning rates for the networks of a turn."""
        for name in turn.trains:
            network = self.networks[name]
            network.set_rate(network.begin(turn) * self._cooldown())

    def learn(self, turn: Turn, steps: list[Step], *, check: bool) -> list[dict[str, Tensor]]:
        """Runs a turn: losses and gradients of all micro-batches, and one optimizer step.

        Args:
            turn: the turn.
            steps: its micro-batches.
            check: check losses and gradients before the optimizer step; waits for the device.

        Returns:
            Values to log, of each micro-batch and then of the turn, still on the device.
        """
        trained = [self.networks[name] for name in turn.trains]
        noted: list[dict[str, Tensor]] = []
        self._only(turn)
        module = self._module(turn)
        for number, step in enumerate(steps):
            with self._unsynced(module, number + 1 < len(steps)), fast_kernels(self.accelerator.device):
                loss, metrics = module(turn, step)
                if check and self.accelerator.num_processes == 1:  # else, others would wait for this one's gradients
                    self.check(f"{turn.name}/loss", float(loss.detach()))
                self.accelerator.backward(loss / len(steps))
            noted.append({f"{turn.name}/loss": loss.detach(), **metrics})
        weights = [weight for network in trained for weight in network.weights.values()]
        norm = self.accelerator.clip_grad_norm_(weights, self.spec.gradient_clip)
        if check:
            try:
                self.check(f"{turn.name}/gradient_norm", float(norm))
            except Diverged:
                wait()  # all processes have this norm: the first to exit must not cut off the rest on their way here
                raise
        for network in trained:
            network.optimizer.step()
            network.optimizer.zero_grad(set_to_none=True)
        return [*noted, {f"{turn.name}/gradient_norm": norm.detach()}]

    def stepped(self, turn: Turn) -> None:
        """Called after a turn's optimizer step."""
        for name in turn.trains:
            self.networks[name].stepped()
        self.method.after_step(turn, self.iteration)

    def _cooldown(self) -> float:
        """The factor on learning rates: 1, then falling linearly to ``1 / n`` at the last of n cooldown iterations.

        It depends on iterations, not on time, so that a resumed job is identical to an uninterrupted one.
        """
        cooling = self.spec.cooldown * self.spec.iterations
        return min(1.0, (self.spec.iterations - self.iteration) / cooling) if cooling >= 1 else 1.0

    def _only(self, turn: Turn) -> None:
        """Enables gradients for the turn's networks only, so that the loss reaches no others and no work is wasted.

        Others are evaluated without dropout, for the whole turn, since a backward pass may compute them again. Only the
        student keeps its dropout: critics judge the images that its own turn makes.
        """
        for name, network in self.networks.items():
            network.train(name in turn.trains or name == "student")
            for weight in network.weights.values():
                weight.requires_grad_(name in turn.trains)

    def _module(self, turn: Turn) -> nn.Module:
        if turn.name not in self._turns:
            networks = {name: self.networks[name].module for name in turn.trains}
            self._turns[turn.name] = self.accelerator.prepare_model(TurnModule(self.method, turn, networks))
        return self._turns[turn.name]

    def _unsynced(self, module: nn.Module, accumulating: bool) -> AbstractContextManager[Any]:
        return self.accelerator.no_sync(module) if accumulating else nullcontext()

    def check(self, name: str, value: float, *, watch: bool = True) -> None:
        """Stops the training if a value is not finite, or has diverged.

        Args:
            name: of the metric, ``"turn/what"``.
            value: its value.
            watch: compare it with its earlier values; each may be given once.

        Raises:
            Diverged: it is not finite, or has diverged.
        """
        wrong = f"{value}" if not math.isfinite(value) else self.watch.diverged(name, value) if watch else None
        if wrong is not None:
            last, (turn, _, what) = self.latest_checkpoint(), name.partition("/")
            raise Diverged(
                f"iteration {self.iteration}: the {turn} turn's {what.replace('_norm', '')} is {wrong}; last good "
                f"checkpoint: {last.name if last else 'none'}. Lower the learning rates or the loss weights, or use "
                "precision float32"
            )

    # Reports

    def note(self, metrics: dict[str, Tensor]) -> None:
        """Adds metrics to the means of the next report."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def _means(self) -> dict[str, float]:
        """Means of the metrics since the last report; waits for the device.

        Raises:
            Diverged: one of them is not finite. Captured iterations are checked only in reports, and events cannot
                represent such values.
        """
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        for name, mean in means.items():
            self.check(name, mean, watch=False)
        return means

    def _log(self) -> None:
        """Reports the means since the last report, as an event and as TensorBoard scalars."""
        metrics = self._means()
        self._sums, self._counts = {}, {}
        if self.captured is not None:
            for name in metrics:
                if name.endswith(("/loss", "/gradient_norm")):
                    self.check(name, metrics[name])
        step, end = self.iteration, self.spec.iterations
        seconds_left = self.time.seconds / step * (end - step)
        if self.spec.max_minutes is not None:
            seconds_left = min(seconds_left, max(0.0, self.spec.max_minutes * 60 - self.time.seconds))
        self.reporter.emit(Progress(at=now(), step=step, iterations=end, metrics=metrics, seconds_left=seconds_left))
        self.reporter.scalars(step, metrics)

    def sample(self) -> None:
        """Generates a sample sheet with the averaged student."""
        if self.sheet is None or not self.accelerator.is_main_process:
            return
        path = self.folder / "samples" / f"iteration-{self.iteration:08d}.png"
        inference = evaluating(self.networks["student"].module)
        with inference, self.averaged(), self.accelerator.autocast(), fast_kernels(self.accelerator.device):
            pictures = self.sheet.draw(self.method.student)
        self.reporter.picture(self.iteration, "samples", self.sheet.save(pictures, path))
        self._saved("samples", path)

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the student holds its averaged weights."""
        average = self.networks["student"].average
        return average.applied() if average is not None else nullcontext()

    def _saved(self, kind: str, path: Path) -> None:
        self.reporter.emit(
            Saved.model_validate(
                {"kind": kind, "at": now(), "step": self.iteration, "path": str(path.relative_to(self.folder))}
            )
        )

    # Checkpoints

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint's path."""
        paths = checkpoints_in(self.folder)
        return paths[-1] if paths else None

    def save(self) -> None:
        """Writes a checkpoint of everything that training has changed, and deletes the oldest ones.

        The data position and all random states are functions of the seed and the iteration (see `distillers.seeds`),
        which it contains.
        """
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        if self.captured is not None:
            self._means()  # raises if not finite: a bad state must not replace a good one
        tensors: dict[str, Tensor] = {f"method.{name}": value for name, value in self.method.state().items()}
        optimizers: dict[str, Any] = {}
        for name, network in self.networks.items():
            own, optimizers[name] = network.pack(name)
            tensors |= own
        path = self.folder / "checkpoints" / f"iteration-{self.iteration:08d}.safetensors"
        state = {
            "iteration": self.iteration,
            "seed": self.spec.seed,
            "seconds": self.time.seconds,
            "processor_seconds": self.time.processor_seconds,
            "settings": self.identity.settings,
            "sizes": self.watch.sizes,
            "updates": {name: network.updates for name, network in self.networks.items()},
            "averaged": {name: n.average.updates for name, n in self.networks.items() if n.average is not None},
            "optimizers": optimizers,
        }
        save_checkpoint(path, tensors, state)
        for old in checkpoints_in(self.folder)[: -self.spec.keep_checkpoints]:
            old.unlink()
        self._saved("checkpoint", path)

    def load(self, path: Path) -> None:
        """Restores a checkpoint.

        Raises:
            BadCheckpoint: it belongs to another job.
            ValueError: it cannot be read.
        """
        tensors, state = load_checkpoint(path)
        differences = self.identity.differences(state)
        if differences:
            raise BadCheckpoint(
                f"{path} was written with other settings ({', '.join(differences)}), so continuing from it would mix two "
                "jobs: restore them, or start in an empty folder"
            )
        for name, network in self.networks.items():
            updates, averaged = state["updates"][name], state["averaged"].get(name)
            network.unpack(name, tensors, state["optimizers"][name], updates, averaged)
        self.method.load_state(behind(tensors, "method."))
        self.iteration = state["iteration"]
        self.reporter.resumed(self.iteration)
        # Early checkpoints of version 0.1.0 have neither sizes nor processor time.
        self.watch.sizes = state.get("sizes", {})
        self.time = Stopwatch(state["seconds"], state.get("processor_seconds", 0.0))
