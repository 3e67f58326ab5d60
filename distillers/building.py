"""Builds a job's networks, and its method on top of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distillers.adapters import add_adapters, copy_sharing_frozen
from distillers.methods.base import Guide, Method, MethodConfig, Setup
from distillers.precision import checkpointed
from weights.contracts import BaseReference, DistillJob
from weights.denoiser import Cond
from weights.families.base import TextToImage
from weights.store import Store, StudentFolder, digest_folder
from weights.students import check_base, load_student


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Builds a job's method: teacher, student, and whatever else the method trains."""

    job: DistillJob
    base: TextToImage
    """The base as loaded. Its network becomes the teacher, and is converted to the teacher's precision."""
    reference: BaseReference
    """Identifies the base."""
    store: Store
    """Contains the other students that the job names."""
    centroids: Tensor
    """Centroids of the partition, if the job is a part of one; otherwise empty."""
    device: torch.device
    precision: str

    def method(self, chosen: type[Method], config: MethodConfig, uncond: Cond) -> Method:
        """Builds the method on networks that are trainable where it trains them.

        Args:
            chosen: the method's class.
            config: its settings.
            uncond: conditions of the empty prompt, 1 row.

        Raises:
            ValueError: a student that the job names does not fit it.
            StoreError: that student is missing, or its files are not those that were published.
        """
        guide = self._guide()
        setup = Setup(
            base=self.base,
            uncond=uncond,
            latent_shape=self.base.latent_shape(),
            new_network=self._new_network,
            new_student=self._new_student,
            device=self.device,
            guide=guide,
        )
        built = chosen(config, setup)
        for frozen in (self.base,) if guide is None else (self.base, guide.model):
            self._spare_memory(frozen)  # some losses backpropagate through the teacher
            frozen.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # valid in torch
            if self.precision == "bfloat16":
                frozen.network.to(torch.bfloat16)  # autocast would convert its weights again at every call
        return built

    def teaching(self) -> list[str]:
        """sha256 of all weights that teach: the base's and, if there is a guide, the guide's.

        Raises:
            StoreError: the guide is missing, or its files are not those that were published.
        """
        guide = self.job.guide
        return [self.reference.sha256, *([] if guide is None else [digest_folder(self.store.open(guide.student).path)])]

    def _trainable(self, model: TextToImage, adapters: bool) -> TextToImage:
        if adapters and self.job.lora is not None:
            add_adapters(model, self.job.lora)
        else:
            model.network.requires_grad_(True)
        model.network.train()
        self._spare_memory(model)
        return model

    def _spare_memory(self, model: TextToImage) -> None:
        if not self.job.train.gradient_checkpointing:
            return
        enable = getattr(model.network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise ValueError(
                f"train.gradient_checkpointing: the family {model.family!r} does not support it; leave it out"
            )
        enable(checkpointed)

    def _new_network(self, adapters: bool) -> TextToImage:
        """See `Setup.new_network`."""
        base, lora = self.base, self.job.lora
        if adapters and lora is not None and lora.shared_base:
            return self._trainable(base.with_network(copy_sharing_frozen(base.network)), True)
        return self._trainable(base.copy(), adapters)

    def _new_student(self) -> TextToImage:
        """See `Setup.new_student`."""
        if self.job.network is not None:
            return self._trainable(self.base.with_random_network(self.job.network), True)
        if self.job.start is not None:
            return self._trainable(self._start(self.job.start), True)
        return self._new_network(True)

    def _start(self, name: str) -> TextToImage:
        """A student to continue from. Full weights may come from another version of the base; adapters may not."""
        folder = self._own_member(self.store.open(name))
        if folder.manifest.adapter == "lora":
            check_base(folder, self.reference.sha256)
        return load_student(folder, self.base)

    def _own_member(self, folder: StudentFolder) -> StudentFolder:
        """For a student routed over the same partition as this job's, the member of this job's part; else itself.

        Raises:
            ValueError: its partition differs, so that none of its members was trained for this part.
        """
        router, spec = folder.manifest.router, self.job.partition
        if router is None or spec is None or spec.part is None:
            return folder
        theirs = torch.tensor(router.centroids, dtype=self.centroids.dtype)
        if theirs.shape != self.centroids.shape or not torch.allclose(theirs, self.centroids, atol=1e-4):
            raise ValueError(
                f"start: the {len(theirs)} students of {folder.manifest.name!r} are for other parts than this job's "
                f"{spec.students}: use the data and the partition that it was made with, or start from one student"
            )
        return self.store.open(router.students[spec.part])

    def _guide(self) -> Guide | None:
        spec = self.job.guide
        if spec is None:
            return None
        if self.base.denoiser.embeds_guidance:
            raise ValueError(
                f"guide: the networks of base {self.job.base!r} are told their guidance scale, and autoguidance is for "
                "networks that are told none; leave it out"
            )
        folder = self.store.open(spec.student)
        check_base(folder, self.reference.sha256)
        model = load_student(folder, self.base)
        if model.denoiser.embeds_guidance:
            raise ValueError(
                f"guide: {spec.student!r} is conditioned on a guidance scale: name a student that denoises as the teacher "
                "does, made by score_matching"
            )
        model.network.requires_grad_(False).eval()
        return Guide(model=model, scale=spec.scale)
