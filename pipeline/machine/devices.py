"""Which torch device a name means."""

import torch

from pipeline.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Return the torch device of a name; `auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).fill_(1).item()  # a device without memory (meta) cannot say it
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
