import gc
import os
from collections.abc import Iterator

import pytest

# Before torch is imported by any test.
os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})

from launch import Scripts

gc.set_threshold(100_000, 50, 100)  # what the tests import is a million objects, over which a collection goes for nothing


def pytest_collection_finish() -> None:
    """Leaves what is imported by now out of every later collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    """Runs ``train_unconditional.py`` with the given words: ``script(argv)`` to its end, ``script.start(argv)`` without waiting."""
    scripts = Scripts(tmp_path_factory.mktemp("runs"))
    yield scripts
    scripts.close()
