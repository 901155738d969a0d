"""The GPU's checks: ordinary tests whose device is a pretended one in the ordinary test commands, and a real one in `make gpu-check`.

Those with a real device are marked ``gpu`` and left out unless ``-m gpu`` asks for them; without a device they are then skipped.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from pretended import pretended_gpu

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA is used: without it its products may differ from run to run
REAL = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run by `make gpu-check`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "gpu" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def real_device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device is visible to torch {torch.__version__}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["pretended", REAL])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """For what does not train."""
    if request.param == "cuda":
        yield real_device()
    elif torch.cuda.is_available():
        pytest.skip("a GPU is here and need not be pretended: make gpu-check")
    else:
        with pretended_gpu() as pretended:
            yield pretended


@pytest.fixture(params=["cpu", REAL])
def training_device(request: pytest.FixtureRequest) -> torch.device:
    """For what trains: autograd cannot be pretended, so this is the CPU where there is no GPU."""
    return real_device() if request.param == "cuda" else torch.device("cpu")
