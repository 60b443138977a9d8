"""What a stream asks of CUDA, where there is none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Cuda:
    """What a stream asks of CUDA, in order: the device that is current, and what is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.current: list[torch.device] = []
        register = SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.unregister)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: register)
        monkeypatch.setattr(torch.cuda, "check_error", lambda code: self.calls.append(("check", code)))
        monkeypatch.setattr(torch.cuda, "device", self.made_current)

    def made_current(self, device: torch.device) -> Any:
        cuda = self

        class Current:
            def __enter__(self) -> None:
                cuda.current.append(device)

            def __exit__(self, *_: object) -> None:
                cuda.current.pop()

        return Current()

    def register(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("lock", self.current[-1], address, size, flags))
        return 0

    def unregister(self, address: int) -> int:
        self.calls.append(("unlock", self.current[-1], address))
        return 0
