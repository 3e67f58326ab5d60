"""Cheap previews: what the linear map gives for pictures of the bundled model, and for a base of any latent shape."""

import torch
import torch.nn.functional as F

from service.engine.pictures import shown_steps
from service.engine.preview import LinearPreview
from tests.service.conftest import TinyBase
from weights.bundled import STUDENTS
from weights.drawing import draw
from weights.families import load
from weights.store import Store
from weights.students import load_student


@torch.inference_mode()
def test_it_shows_what_the_decoder_would() -> None:
    """Of the bundled student's pictures, at each of their steps, it explains most of what differs from grey."""
    base = load("stable_diffusion", "emoji-base")
    store = Store(STUDENTS)
    folder = store.open(store.names()[0])
    seen: list[torch.Tensor] = []
    cond = base.encode_prompts(["red apple", "blue whale", "yellow sun"])
    student = load_student(folder, base)
    schedule = folder.manifest.schedules[max(folder.manifest.schedules)]
    draw(student, cond, None, (1, 2, 3), schedule, on_step=lambda _step, x0: seen.append(x0))
    x0 = torch.cat(seen)
    wanted = F.adaptive_avg_pool2d(base.decode(x0), x0.shape[-2:])
    shown = LinearPreview.fit(base)(x0)
    assert shown.shape == wanted.shape
    left = (shown - wanted).square().mean() / (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    assert left < 0.25


def test_it_is_the_same_each_time_and_inside_the_range(tiny_base: TinyBase) -> None:
    latents = 10 * torch.randn(2, *tiny_base.model.latent_shape(), generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, second = (LinearPreview.fit(tiny_base.model)(latents) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.abs().max() <= 1


def test_which_steps_are_shown() -> None:
    assert shown_steps(4, 0) == frozenset()
    assert shown_steps(4, 1) == {2}
    assert shown_steps(4, 3) == shown_steps(4, 99) == {1, 2, 3}
    assert shown_steps(1, 5) == frozenset()
    assert shown_steps(50, 4) == {10, 20, 30, 40}
    for steps in range(1, 30):
        for previews in range(30):
            shown = shown_steps(steps, previews)
            assert len(shown) == min(previews, steps - 1) and shown <= set(range(1, steps))
