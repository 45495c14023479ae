"""What every test gets: one thread, no network, fixed seeds, and one Ray session for those that ask."""

import ipaddress
import os
import random
import socket
from collections.abc import Iterator

os.environ.update(  # before any test imports torch, ray, transformers or triton
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)

import numpy as np
import pytest
import torch


def _start_interpreter() -> None:
    """Without a GPU, Triton's kernels run in its interpreter, in this process only."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported ...
    from triton import knobs

    knobs.runtime.interpret = True  # ... and this when our kernels are
    del os.environ["TRITON_INTERPRET"]  # which children would inherit
    from .kernels import interpret  # noqa: F401 - corrects it


if not torch.cuda.is_available():
    _start_interpreter()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """No host's name is looked up but this machine's own, in the tests' process."""
    lookup = socket.getaddrinfo
    own = {None, "", "localhost", socket.gethostname()}

    def local_only(host, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if name not in own and not _is_address(name):
            raise OSError(f"a test looked up the host {name!r}; tests use no network")
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", local_only)
        yield


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray for the whole test run."""
    import ray

    from amalgam.rl.cluster import start_ray

    start_ray(None)
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
