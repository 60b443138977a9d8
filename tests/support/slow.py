"""A teacher that takes its time, in a module of its own, so that every process can import it."""

import os
import time
from typing import Any

import torch
from torch import nn

from support.builders import confident_cnn


class Slow(nn.Module):
    """A network that takes its time, so that a signal meets a run in the middle of its work."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(float(os.environ.get("SLOW_TEACHER_S", "0")))
        return self.network(images)


def slow_cnn() -> tuple[nn.Module, dict[str, Any]]:
    network, settings = confident_cnn()
    return Slow(network), settings
