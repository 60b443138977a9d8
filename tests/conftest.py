"""Threads are few on purpose: tests compare results to the bit, and those depend on how a sum is split."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; worker processes inherit it

import cv2
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
