"""What the training benchmark counts and repeats is right; what it measures is nobody's promise."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillers.evaluation.watch import Watched
from distillers.spec import RECIPES, check_spec
from tests.benchmarks import bench_train
from tests.benchmarks.evaluations import Kind, Recorder, repeat
from tests.helpers import picture_folder, tiny_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CPU = torch.device("cpu")


class Network(nn.Module):
    """Two halves, as a denoiser has: features come out of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(3, 4), nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor]:
        self.calls += 1
        return (self.up(self.down(x).tanh()) * scale,)


def recorded(network: Network, training: Callable[[], Any]) -> list[Kind]:
    recorder = Recorder({network: "net"})
    with recorder.watching():
        training()
    (kinds,) = recorder.taken()
    assert recorder.taken() == []
    check_repeated(network, recorder, kinds)
    return kinds


def check_repeated(network: Network, recorder: Recorder, kinds: list[Kind]) -> None:
    """Repeated, an evaluation is the same kind again, and leaves nothing behind."""
    for kind in kinds:
        before = network.calls
        again = Recorder({network: "net"})
        with again.watching():
            repeat(kind, recorder.examples[kind], CPU)
        assert again.taken() == [[kind]]
        assert network.calls == before + 1
    assert all(weight.grad is None for weight in network.parameters())
    assert nn.Module.__call__ is not None and not torch.nn.modules.module._global_forward_hooks


X = torch.ones(5, 3)


class TestEvaluations:
    def test_a_plain_forward(self) -> None:
        network = Network()

        def training() -> None:
            with torch.no_grad():
                network(X, scale=2.0)

        (kind,) = recorded(network, training)
        assert (kind.title, kind.rows, kind.graph) == ("forward", 5, False)

    def test_a_graph_that_no_gradient_comes_back_through_is_no_backward(self) -> None:
        network = Network()
        (kind,) = recorded(network, lambda: network(X))
        assert (kind.title, kind.graph) == ("forward", True)

    def test_a_backward_pass_to_weights_or_to_the_input_alone(self) -> None:
        network = Network()
        (kind,) = recorded(network, lambda: network(X)[0].sum().backward())
        assert kind.title == "forward + backward"
        network.requires_grad_(False)
        (kind,) = recorded(network, lambda: network(X.clone().requires_grad_())[0].sum().backward())
        assert kind.title == "forward + backward to the input"

    def test_features_that_end_the_call_early(self) -> None:
        network = Network()

        class Enough(Exception):
            pass

        def training() -> None:
            kept: list[Tensor] = []

            def stop(_module: nn.Module, _args: Any, output: Tensor) -> None:
                kept.append(output)
                raise Enough

            handle = network.down.register_forward_hook(stop)
            with pytest.raises(Enough):
                network(X)
            handle.remove()
            kept[0].sum().backward()

        (kind,) = recorded(network, training)
        assert kind.title == "forward up to down + backward"

    def test_a_loss_on_features_alone_goes_back_from_there(self) -> None:
        network = Network()

        def training() -> None:
            kept: list[Tensor] = []
            handle = network.down.register_forward_hook(lambda _m, _a, output: kept.append(output))
            network(X)
            handle.remove()
            kept[0].sum().backward()

        (kind,) = recorded(network, training)
        assert kind.title == "forward + backward from down"

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, inside jvp
    def test_directional_derivatives(self) -> None:
        network = Network()

        def training() -> None:
            with torch.no_grad():
                torch.func.jvp(lambda x: network(x)[0], (X,), (X,))
            value, _ = torch.func.jvp(lambda x: network(x)[0], (X,), (X,))
            value.sum().backward()

        plain, trained = recorded(network, training)
        assert (plain.title, trained.title) == ("jvp", "jvp + backward")

    def test_two_backward_passes_are_two(self) -> None:
        network = Network()

        def training() -> None:
            (output,) = network(X)
            torch.autograd.grad(output.sum(), list(network.parameters()), retain_graph=True)
            output.sum().backward()
            network.zero_grad()

        (kind,) = recorded(network, training)
        assert kind.title == "forward + 2 backward"

    def test_modules_without_weights_are_no_evaluation_and_nested_calls_are_one(self) -> None:
        network = Network()

        def training() -> None:
            network(nn.Tanh()(X))
            network(torch.cat([X, X]))

        kinds = recorded(network, training)
        assert [kind.rows for kind in kinds] == [5, 10]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, pictures, and a recipe of two methods on them."""
    folder = tmp_path_factory.mktemp("bench")
    base, pictures = tiny_pipeline(folder / "base"), picture_folder(folder / "pictures")
    head = f'student = "x"\nbase = "{base}"\n[data]\nsource = "{pictures}"\n[train]\nmax_minutes = 1\nthreads = 1\n'
    (folder / "emoji_consistency.toml").write_text('method = "consistency"\n' + head)
    dmd2 = "[config]\nstudent_every = 2\nschedules.1.timesteps = [1.0]\nshare_times = true\n"
    (folder / "emoji_dmd2.toml").write_text('method = "dmd2"\n' + head + dmd2)
    return folder


def options(recipes: Path, *more: str) -> argparse.Namespace:
    return bench_train.parser().parse_args(
        ["--recipes", str(recipes), "--cache", str(recipes / "cache"), "--batch", "4", "--iterations", "2", *more]
    )


def test_it_counts_what_the_methods_evaluate(recipes: Path) -> None:
    row = bench_train.measure(recipes / "emoji_consistency.toml", options(recipes, "--threads", "1"))
    # One guided call of twice the rows, the average's answer, and the student's own.
    assert row.counts == {
        "UNet2DConditionModel: forward": 1,
        "student: forward + backward": 1,
        "teacher: forward": 2,
    }
    assert (row.recipe, row.method, row.batch, row.iterations) == ("consistency", "consistency", 4, 2)
    assert min(row.iteration, row.evaluations, row.updates, row.peak_bytes, row.pictures_per_second) > 0

    row = bench_train.measure(recipes / "emoji_dmd2.toml", options(recipes, "--threads", "1"))
    # In two iterations: one student's turn, which looks at the critic's features, and two of the critic's, of which the
    # first makes its own samples.
    assert row.counts == {
        "fake_score: forward + backward": 1,
        "fake_score: forward + backward from mid_block to the input": 0.5,
        "fake_score: forward up to mid_block + backward": 1,
        "heads: forward + backward": 2,
        "heads: forward + backward to the input": 0.5,
        "student: forward": 0.5,
        "student: forward + backward": 0.5,
        "teacher: forward": 1,
    }


def test_the_report(recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The process of each method is stood in for by a call; one of them fails."""

    def called(command: list[str], report: Path, log: Path, **_: Any) -> Watched:
        assert command[1:3] == ["-m", "tests.benchmarks.bench_train"]
        if "dmd2" in command:
            log.write_text("out of memory")
            return Watched(1, 1.0, 1.0, 1)
        return Watched(bench_train.main(command[3:]), 1.0, 1.0, 1)

    monkeypatch.setattr(bench_train, "watched", called)
    out = tmp_path / "deep" / "bench.json"
    arguments = ["--recipes", str(recipes), "--cache", str(recipes / "cache"), "--batch", "2", "--iterations", "1"]
    assert bench_train.main([*arguments, "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert [row["recipe"] for row in report["methods"]] == ["consistency"]
    assert report["failed"] == ["dmd2"]
    assert report["machine"]["processor"]
    printed = capsys.readouterr()
    assert "pictures/s" in printed.out and "teacher: forward" in printed.out
    assert "out of memory" in printed.err


def test_without_a_recipe_it_says_so(recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_train.main(["--recipes", str(recipes), "--only", "nothing", "--out", str(tmp_path / "x")]) == 2
    assert "nothing to time" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("emoji_*.toml")))
def test_every_recipe_can_be_timed(name: str) -> None:
    """However few iterations are timed, the job is as long as the recipe's, whose phases it must reach."""
    raw = bench_train.job(RECIPES / f"{name}.toml", None, 4, 1)
    assert check_spec(raw)[0].train.batch_size == 4
