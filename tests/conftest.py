"""What holds for every test: nothing beyond this machine, and no state of the machine's user."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports the libraries that read these.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ["OMP_WAIT_POLICY"] = (
    "passive"  # threads that spin while they wait cost minutes where other processes compute
)
for _variable in [name for name in os.environ if name.startswith("FEWSTEP_")]:
    del os.environ[_variable]

import pytest
import torch
from hypothesis import settings

settings.register_profile("fewstep", deadline=None)  # a busy machine is no failure
settings.load_profile("fewstep")
torch.set_num_threads(1)  # the networks of tests are too small to share

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


# For the whole session, not for each test: hypothesis runs a test many times inside one function-scoped fixture.
@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A test that would reach beyond this machine fails with the address that it wanted."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to reach {address}: tests work on this machine alone")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Default folders (the store, the jobs) lie in a temporary home, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """For tests that run whole jobs here: accelerate keeps its precision for the process, of whoever asked first."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
