"""What torch says of the accelerator of a machine, where there is none."""

from typing import Any

import pytest
import torch


def imitate_accelerator(monkeypatch: pytest.MonkeyPatch, kind: str | None, number: int) -> None:
    """Let torch find `number` accelerators of a kind.

    Args:
        monkeypatch: takes it back.
        kind: type of the devices that torch is built for, such as xpu; None: for CPUs only.
        number: number of devices; 0: torch is built for them, and there is none.
    """

    def current(check_available: bool = False) -> Any:
        return torch.device(kind) if kind and (number or not check_available) else None

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)


def copies_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Return a list that grows by the device and `non_blocking` of each copy; the tensors stay where they are."""
    copies: list[tuple[str, bool]] = []

    def to(tensor: torch.Tensor, device: Any, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        copies.append((torch.device(device).type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    return copies
