"""Threads are few on purpose: tests compare results to the bit, and those depend on how a sum is split."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; worker processes inherit it

import gc
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch
from support.label_sets import make_label_set, write_source
from support.s3_server import s3_server


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """No test writes into the user's cache, where indexes of sources are kept."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.__setitem__("XDG_CACHE_HOME", before)


@pytest.fixture(autouse=True, scope="module")
def _no_process_is_left() -> Iterator[None]:
    """Loader processes end with their stream; one that stays holds memory, and no signal ends it."""
    yield
    gc.collect()  # torch's own DataLoader stays in the traceback of an error
    assert multiprocessing.active_children() == []


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Two tars of coloured noise, nine samples; no test changes them."""
    return write_source(tmp_path_factory.mktemp("images") / "tars")


@pytest.fixture(scope="session")
def made(images, tmp_path_factory) -> Path:
    """A label set of these, of two shards and two blocks of two views; tests that change it take `copied`."""
    return make_label_set(images, tmp_path_factory.mktemp("made") / "set").folder


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Iterator[str]:
    """URL of an S3 store with an empty bucket; each test writes to keys of its own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of that label set."""
    return Path(shutil.copytree(made, tmp_path / "set"))
