"""Initial weights: adapt a checkpoint to a student with another image size, other classes, or another number of heads.

Every change to the weights is reported. All other tensors must fit exactly, as in evaluation.
"""

import math
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.weights import read_hub_config, read_tensors
from trainer.student import Student, load_exactly

_TOKEN = "dist_token"  # distillation token in timm's DeiT models; its position embedding is the second one


def start_from(student: Student, path: Path) -> list[str]:
    """Load weights into a student; its image size, classes and distillation token may differ from the checkpoint's.

    Args:
        student: student that receives the weights; parts that the checkpoint does not have keep their initial values.
        path: folder that a run exported, or a file of weights that `pipeline.weights.read_tensors` reads.

    Returns:
        the changes that made the weights fit, one phrase each; empty if they fit as they are.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has another architecture; the student is unchanged.
    """
    file, class_names = _find_weights(path)
    found = read_tensors(file)
    if bad := next((n for n, t in found.items() if t.is_floating_point() and not torch.isfinite(t).all()), None):
        raise CheckpointError(
            f"{file}: {bad} holds NaN or infinity: its training diverged", fix="Start from an earlier checkpoint"
        )
    changes = _fit_heads(student, found, class_names, file)
    changes += _fit_token(student, found)
    changes += _fit_positions(student, found)
    load_exactly(student, found, file)
    return changes


def _find_weights(path: Path) -> tuple[Path, tuple[str, ...] | None]:
    """Return the file of weights and its class names; None for a single file or a folder without names."""
    if not path.is_dir():
        return path, None
    weights, config = path / "model.safetensors", path / "config.json"
    if not weights.is_file():
        inside = next((name for name in ("best", "last") if (path / name / "model.safetensors").is_file()), None)
        raise CheckpointError(
            f"{path}: this folder holds no model.safetensors",
            fix=f"Did you mean {path / inside}?" if inside else "Pass last/ or best/ of a run",
        )
    if not config.is_file():
        return weights, None
    names = read_hub_config(path).get("label_names")
    return weights, None if names is None else tuple(names)


def _fit_heads(
    student: Student, found: dict[str, Tensor], class_names: tuple[str, ...] | None, path: Path
) -> list[str]:
    """Replace the checkpoint's heads by the student's new ones if they have other classes; return the change."""
    heads = [name for name in student.head_names if getattr(found.get(f"{name}.weight"), "ndim", 0)]
    counts = sorted({found[f"{name}.weight"].shape[0] for name in heads})
    if len(counts) > 1:
        raise CheckpointError(f"{path}: its heads disagree on the number of classes: {' and '.join(map(str, counts))}")
    same_names = None in (class_names, student.class_names) or class_names == student.class_names
    if not counts or (counts == [student.num_classes] and same_names):
        return []
    for name, value in student.model.state_dict().items():
        if any(name.startswith(f"{head}.") for head in heads):
            found[name] = value
    what = f"{len(heads)} heads are new" if len(heads) > 1 else "the head is new"
    if counts == [student.num_classes]:
        return [f"{what}: the {student.num_classes} classes have other names or another order in the checkpoint"]
    return [f"{what}: {counts[0]} classes in the checkpoint, {student.num_classes} here"]


def _fit_token(student: Student, found: dict[str, Tensor]) -> list[str]:
    """Add the distillation token with its position and head to the weights, or remove it; return the change."""
    wanted = student.model.state_dict()
    has, needs = _TOKEN in found, _TOKEN in wanted
    shapes = [state["pos_embed"].shape for state in (found, wanted) if "pos_embed" in state]
    if has == needs or len(shapes) < 2 or len(shapes[0]) != 3 or shapes[0][2] != shapes[1][2]:
        return []  # not transformers of the same width: `load_exactly` names the tensor that does not fit
    heads = [name for name in (found if has else wanted) if name.startswith("head_dist.")]
    positions = found["pos_embed"]
    if has:
        for name in (_TOKEN, *heads):
            del found[name]
        found["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
        return ["its distillation token is left out, with its position and head: this student has none"]
    found |= {name: wanted[name] for name in (_TOKEN, *heads)}
    found["pos_embed"] = torch.cat([positions[:, :1], wanted["pos_embed"][:, 1:2], positions[:, 1:]], dim=1)
    return ["the distillation token, its position and its head are new: the checkpoint has none"]


def _fit_positions(student: Student, found: dict[str, Tensor]) -> list[str]:
    """Interpolate the position embedding [1, prefix + N, D] to the student's grid; return the change.

    DeiT's interpolation is bicubic without antialiasing. (Antialiased bicubic uses another kernel, even for larger grids.)
    """
    model = student.model
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    positions, wanted = found.get("pos_embed"), model.state_dict().get("pos_embed")
    if grid is None or positions is None or wanted is None or positions.ndim != 3 or positions.shape == wanted.shape:
        return []
    prefix = wanted.shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(0, positions.shape[1] - prefix))
    if side == 0 or side**2 != positions.shape[1] - prefix:
        return []  # not a square grid: `load_exactly` refuses the shape
    found["pos_embed"] = resample_abs_pos_embed(
        positions,
        new_size=list(grid),
        old_size=[side, side],
        num_prefix_tokens=prefix,
        interpolation="bicubic",
        antialias=False,
    )
    return [f"positions are interpolated from {side}x{side} patches to {grid[0]}x{grid[1]}"]
