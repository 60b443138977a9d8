"""Fixtures of the tests of a GPU: `pytest -m gpu`.

Without a GPU the CPU runs what it can, at toy size, so that these tests do not rot; the others are skipped by name.
"""

import os
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, and some tests are deterministic

import pytest
import torch
from support.builders import make_labels, write_tars

from pipeline.labels.labelset import LabelSet

HERE = Path(__file__).parent
# What torch says of its own plans and of this card is no defect of ours, and differs from version to version.
CATEGORIES = ("UserWarning", "FutureWarning", "DeprecationWarning", "ResourceWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Compiled code comes last: where it crashes, it takes the process along.
    items.sort(key=lambda item: item.path.name == "test_gpu_compile.py" and HERE in item.path.parents)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(90))  # one that hangs must not take the time of the others
            for category in CATEGORIES:
                item.add_marker(pytest.mark.filterwarnings(f"default::{category}"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; without one the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def gpu(device) -> torch.device:
    """The GPU, for a test that says nothing on a CPU."""
    if device.type != "cuda":
        pytest.skip("needs a real GPU: a CPU has no streams, no page-locked memory and no memory of its own")
    return device


@pytest.fixture
def full_float32(monkeypatch) -> None:
    """Let convolutions in float32 keep all their bits (TF32 keeps ten), and choose the same algorithm each time."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """Forty photographs in two tars; each mix block is full."""
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16), unlabelled=5)


@pytest.fixture(scope="session")
def label_set(data, tmp_path_factory) -> LabelSet:
    """Labels of a teacher on the CPU."""
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, topk=2)
