"""Networks from a folder: diffusers' own bits, nothing that other threads see meanwhile, and errors that tell."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers import tiny_pipeline, tiny_unet
from weights.families.stable_diffusion import StableDiffusion
from weights.networks import BadNetwork, read_network
from weights.quiet import quiet

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    tiny_unet().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def in_shards(folder: Path) -> Path:
    network = UNet2DConditionModel.from_pretrained(folder)
    network.save_pretrained(folder / "shards", max_shard_size="60KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    return folder / "shards"


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return read_network(UNet2DConditionModel, folder, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_it_is_what_diffusers_loads_to_the_bit(folder: Path, dtype: torch.dtype, shards: bool) -> None:
    folder = in_shards(folder) if shards else folder
    theirs, ours = UNet2DConditionModel.from_pretrained(folder, dtype=dtype), read(folder, dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        assert torch.equal(mine, tensor), name
        assert (mine.dtype, mine.device, mine.stride()) == (tensor.dtype, tensor.device, tensor.stride()), name
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(module.training for module in ours.modules())
    told = [{k: v for k, v in each.config.items() if k != "_name_or_path"} for each in (ours, theirs)]
    assert told[0] == told[1]


def test_it_outlives_its_files_and_draws_no_random_numbers(folder: Path) -> None:
    state = torch.get_rng_state()
    network = read(folder)
    assert torch.equal(torch.get_rng_state(), state)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    size = (folder / FILE).stat().st_size
    with open(folder / FILE, "r+b") as file:  # in place: a mapped file would change with it
        file.write(b"\xff" * size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# What other threads see


def shared_state() -> tuple[Any, ...]:
    """What torch's libraries change for all threads while they load."""
    functions = [getattr(nn.init, name) for name in sorted(vars(nn.init)) if name.endswith("_")]
    return torch.get_default_dtype(), nn.Module.register_parameter, nn.Module.register_buffer, *functions


def changes_shared_state(work: Callable[[], object]) -> bool:
    """Whether there is a Python call in this work at whose start or end the shared state is another one."""
    usual, seen = shared_state(), []

    def look(_frame: object, _event: str, _arg: object) -> None:
        seen.append(shared_state() == usual)

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return not all(seen)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    return StableDiffusion.load(tiny_pipeline(tmp_path_factory.mktemp("base")), dtype=torch.bfloat16)


def test_a_student_is_loaded_unseen(base: StableDiffusion, tmp_path: Path) -> None:
    base.save_network(tmp_path)
    assert not changes_shared_state(lambda: base.load_network(tmp_path))
    theirs = lambda: UNet2DConditionModel.from_pretrained(tmp_path / "unet", dtype=torch.bfloat16)  # noqa: E731
    assert changes_shared_state(theirs), "this test could not see it"


def test_adapters_are_merged_unseen(base: StableDiffusion, tmp_path: Path) -> None:
    adapted = base.copy()
    adapted.network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(adapted.network))
    assert not changes_shared_state(lambda: base.with_loras([(tmp_path, 0.5)]))


def test_libraries_are_quiet_until_the_last_thread_is_out() -> None:
    before = diffusers_logging.get_verbosity()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with quiet:
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    with quiet:
        leave.set()
        thread.join()
        assert diffusers_logging.get_verbosity() == diffusers_logging.ERROR
    assert diffusers_logging.get_verbosity() == before != diffusers_logging.ERROR


# What is wrong with a folder


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / FILE)
    change(weights)
    save_file(weights, folder / FILE)


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


NAME = "conv_in.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / FILE).unlink(), FILE),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "cut off": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-100]), "no complete UNet2DConditionModel"),
    "empty": (lambda f: (f / FILE).write_bytes(b""), "no complete UNet2DConditionModel"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "no complete UNet2DConditionModel"),
    "no such network": (lambda f: configured(f, block_out_channels=[8]), "no complete UNet2DConditionModel"),
    "a missing weight": (lambda f: changed(f, lambda w: w.pop(NAME)), "Missing key.*conv_in.weight"),
    "a surplus weight": (lambda f: changed(f, lambda w: w.update(more=torch.ones(1))), "Unexpected key.*more"),
    "another shape": (
        lambda f: changed(f, lambda w: w.update({NAME: torch.ones(1)})),
        "size mismatch for conv_in.weight",
    ),
    "a shard elsewhere": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {NAME: f"../unet/{FILE}"}})),
        "which is not a safetensors file beside it",
    ),
    "an index of nothing": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_does_not_hold_the_network(folder: Path, case: str) -> None:
    spoil, says = WRONG[case]
    spoil(folder)
    with pytest.raises(BadNetwork, match=says) as caught:
        read(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("twice", [False, True])
def test_shards_that_do_not_add_up(folder: Path, twice: bool) -> None:
    folder = in_shards(folder)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    if twice:
        save_file({**load_file(first), **load_file(second)}, second)
    else:
        first.unlink()
    with pytest.raises(BadNetwork, match="is in two of the files" if twice else "No such file"):
        read(folder)


class Computed(UNet2DConditionModel):
    """With a buffer that no file holds."""

    @classmethod
    def from_config(cls, config: Any, **_options: Any) -> Any:
        network = UNet2DConditionModel.from_config(config)
        network.register_buffer("table", torch.arange(4.0), persistent=False)
        return network


def test_a_buffer_that_no_file_holds_is_not_left_without_numbers(folder: Path) -> None:
    with pytest.raises(BadNetwork, match=r"no file contains .*table"):
        read_network(Computed, folder, "cpu", torch.float32)
