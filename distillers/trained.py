"""A trained network with its optimizer, average and share of a checkpoint; and the networks of a turn as one module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distillers.checkpoint import pack_optimizer, unpack_optimizer
from distillers.ema import Average
from distillers.methods.base import Method, OptimizerSettings, Step, Trained, Turn, TurnLoss
from distillers.muon import Muon


class TrainedNetwork:
    """A trained network with its optimizer and moving average."""

    def __init__(self, trained: Trained, device: torch.device, ema_decay: float, captured: bool) -> None:
        """
        Args:
            trained: the method's declaration of it.
            device: where it is trained.
            ema_decay: of its moving average, if the method wants one; 0 for none.
            captured: whether its optimizer steps are captured as CUDA graphs.
        """
        self.module = trained.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings = trained.optimizer
        self.weights = {key: weight for key, weight in self.module.named_parameters() if weight.requires_grad}
        self.rate = torch.zeros((), device=device) if captured else None
        """Tensor from which a captured optimizer step reads its learning rate."""
        self.optimizer = _optimizer(self.settings, list(self.weights.values()), self.rate)
        self.average = Average(self.module, ema_decay) if trained.average and ema_decay > 0 else None
        self.updates = 0

    def train(self, mode: bool) -> None:
        """Sets the network's training mode; false turns dropout off."""
        if self.module.training != mode:  # visiting every module of a large network takes a while
            self.module.train(mode)

    def begin(self, turn: Turn) -> float:
        """Prepares the next update, in a turn.

        Returns:
            Its learning rate, before any cooldown.
        """
        if turn.since and self.updates == turn.since:
            self.optimizer.state.clear()
        peak = turn.lr if turn.lr is not None else self.settings.lr
        return peak * min(1.0, (self.updates - turn.since + 1) / self.settings.warmup) if self.settings.warmup else peak

    def set_rate(self, value: float) -> None:
        """Sets the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = value if self.rate is None else self.rate.fill_(value)

    def stepped(self) -> None:
        """Called after every update."""
        self.updates += 1
        if self.average is not None:
            self.average.update()

    def pack(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that training changes, as tensors (not copied) and JSON-serialisable hyper-parameters."""
        tensors = {f"network.{name}.{key}": value for key, value in self._kept().items()}
        moments, plain = pack_optimizer(self.optimizer, f"optimizer.{name}")
        tensors |= moments
        if self.average is not None:
            tensors |= {f"average.{name}.{key}": value for key, value in self.average.values.items()}
        return tensors, plain

    @torch.no_grad()
    def unpack(
        self, name: str, tensors: dict[str, Tensor], plain: dict[str, Any], updates: int, averaged: int | None
    ) -> None:
        """Restores what `pack` returned.

        Args:
            name: as given to `pack`.
            tensors: of the checkpoint.
            plain: the hyper-parameters.
            updates: number of updates of the network.
            averaged: number of updates of its average.
        """
        for key, kept in self._kept().items():
            kept.copy_(tensors[f"network.{name}.{key}"])
        unpack_optimizer(self.optimizer, f"optimizer.{name}", tensors, plain)
        self.updates = updates
        if self.average is not None:
            assert averaged is not None, "whether there is an average is part of the job's fingerprint"
            self.average.load(behind(tensors, f"average.{name}."), averaged)

    def _kept(self) -> dict[str, Tensor]:
        """The trained weights, and the buffers that change with them (not copied)."""
        frozen = {key for key, _ in self.module.named_parameters()} - self.weights.keys()
        state = self.module.state_dict(keep_vars=True)
        return {key: value.data for key, value in state.items() if key not in frozen}


class TurnModule(nn.Module):
    """A turn of a method as a module: its children are the trained networks, and its forward pass computes the loss."""

    def __init__(self, method: Method, turn: Turn, networks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self._compute: Callable[[Turn, Step], TurnLoss] = method.loss

    def forward(self, turn: Turn, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The turn's loss and metrics for one micro-batch."""
        computed = self._compute(turn, step)
        return computed.loss, computed.metrics


def behind(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer(settings: OptimizerSettings, weights: list[nn.Parameter], rate: Tensor | None) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": settings.lr if rate is None else rate, "betas": settings.betas, "eps": settings.eps}
    common |= {"weight_decay": settings.weight_decay, "capturable": rate is not None}
    if settings.kind == "radam":
        return torch.optim.RAdam(weights, decoupled_weight_decay=True, **common)
    if settings.kind == "muon":
        return Muon(weights, **common)
    fused = all(weight.device.type in ("cpu", "cuda") for weight in weights)
    return torch.optim.AdamW(weights, fused=fused, **common)
