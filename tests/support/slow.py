"""What other processes import by its name: a teacher that takes its time, and the node of a Ray process."""

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


def node_of_this_process(_: object = None) -> str:
    import ray

    return ray.get_runtime_context().get_node_id()
