"""Fits the adapters of an extracted student to what the student predicts, and not only to its weights.

The nearest matrices of a low rank (`distillers.extraction`) treat every direction of a weight's change alike, but an
image depends on some much more than on others. From these matrices on, the adapters are therefore trained to give the
student's own predictions F, at the states x_t that it meets at inference:

    mean ||F_adapted(x_t, t, c) - F_student(x_t, t, c)||^2

x_t is a state of one of the student's schedules, from fresh noise and the student's own earlier steps (backward
simulation, as in DMD2, https://arxiv.org/abs/2405.14867, section 4.5). Prompts are all the data that this takes. It is
knowledge distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531) into a network that begins close to its
teacher.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distillers.rollout import at_time, draw_noise, draw_step, simulate
from weights.contracts import StepSchedule
from weights.denoiser import Cond, Denoiser
from weights.drawing import guided
from weights.families.base import TextToImage

BATCH = 32
LEARNING_RATE = 1e-4
WARMUP = 20
"""Updates over which the learning rate rises; over the last half of all it falls to 0."""
BETAS = (0.9, 0.99)
SEED = 0


class Fitting:
    """A student, a model with adapters that is to predict the same, and the prompts for both."""

    def __init__(
        self,
        adapted: TextToImage,
        student: TextToImage,
        schedules: dict[int, StepSchedule],
        prompts: Sequence[str],
        guidance_scale: float = 1.0,
    ) -> None:
        """
        Args:
            adapted: with trainable adapters (`add_adapters`) and everything else frozen.
            student: the student, on the same device.
            schedules: the student's.
            prompts: texts, at least one.
            guidance_scale: which a student that embeds guidance is told; without effect on others.

        Raises:
            ValueError: there is no prompt.
        """
        if not prompts:
            raise ValueError("prompts: there are none; give at least one")
        self.student, self.prompts, self.schedules = student, prompts, schedules
        scale = guidance_scale if student.denoiser.embeds_guidance else 1.0
        self.ours: Denoiser = guided(adapted.denoiser, None, scale)
        self.theirs: Denoiser = guided(student.denoiser, None, scale)
        self.weights = [weight for weight in adapted.network.parameters() if weight.requires_grad]
        self.generator = torch.Generator().manual_seed(SEED)

    def fit(self, iterations: int, done: Callable[[int], None] = lambda count: None) -> list[float]:
        """Trains the adapters with AdamW, in batches of `BATCH` states.

        Args:
            iterations: number of updates.
            done: called with 1 after each of them.

        Returns:
            The `difference` before and after.
        """
        before = self.difference()
        optimizer = torch.optim.AdamW(self.weights, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
        for iteration in range(iterations):
            for group in optimizer.param_groups:
                rising, falling = (iteration + 1) / WARMUP, (iterations - iteration) / (iterations / 2)
                group["lr"] = LEARNING_RATE * min(1.0, rising, falling)
            optimizer.zero_grad()
            self._loss(*draw_step(self.schedules, None, self.generator), self.generator).backward()
            optimizer.step()
            done(1)
        return [before, self.difference()]

    @torch.no_grad()
    def difference(self) -> float:
        """The mean squared difference of the predictions, over every step of every schedule, at the same states always."""
        generator = torch.Generator().manual_seed(SEED + 1)
        losses = [
            self._loss(schedule, step, generator)
            for _, schedule in sorted(self.schedules.items())
            for step in range(len(schedule.timesteps))
        ]
        return float(torch.stack(losses).mean())

    def _loss(self, schedule: StepSchedule, step: int, generator: torch.Generator) -> Tensor:
        x_t, t, cond = self._state(schedule, step, generator)
        with torch.no_grad():
            wanted = self.theirs(x_t, t, cond)
        return (self.ours(x_t, t, cond) - wanted).float().square().mean()

    @torch.no_grad()
    def _state(self, schedule: StepSchedule, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
        """What the student is given at a step of a schedule: ``x_t (BATCH, ...)``, ``t (BATCH,)``, conditions."""
        rows = torch.randint(len(self.prompts), (BATCH,), generator=generator).tolist()
        cond = self.student.encode_prompts([self.prompts[row] for row in rows])
        device = next(iter(cond.values())).device
        noise = draw_noise((BATCH, *self.student.latent_shape()), generator, device)
        x_t = simulate(self.theirs, noise, schedule, step, cond, generator)
        return x_t, at_time(schedule.network_times[step], x_t), cond
