"""RandAugment's operations: their names, their order, and the argument of each magnitude.

All of them are those of timm (`timm.data.auto_augment`). The code is our own, because the pixels of a stored label must stay the same if
timm changes its tables; a test compares the two. What an operation does to pixels is defined in docs/views-v2.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

FILL = (124, 116, 104)  # ImageNet mean, with which timm fills uncovered corners
MAX_LEVEL = 10.0


@dataclass(frozen=True)
class Op:
    """An operation of RandAugment.

    Attributes:
        name: name of the operation in timm.
        argument: function that turns share (magnitude / 10) and sign (1 or -1) into degrees, shear, share of the image,
            bits to keep, threshold or blend factor; it returns 0 for an operation that takes no argument.
        increasing: function that replaces `argument` under timm's `inc`, with which operations grow stronger with the
            magnitude; such an operation is called NAMEIncreasing. None if `inc` changes nothing.
    """

    name: str
    argument: Callable[[float, float], float] = lambda share, sign: 0.0
    increasing: Callable[[float, float], float] | None = None


def op_argument(name: str, level: float, *, negate: bool) -> float:
    """Return the argument that timm gives operation `name` at a magnitude.

    Args:
        name: name in INCREASING or PLAIN.
        level: magnitude, 0..10 (more where `mmax` allows it).
        negate: random choice of the direction, for operations that have two.

    Returns:
        the argument, as described at `Op.argument`.
    """
    op = _BY_NAME[name]
    argument = op.argument if op.increasing is None or name == op.name else op.increasing
    return argument(level / MAX_LEVEL, -1.0 if negate else 1.0)


def _blend(share: float, _: float) -> float:
    return share * 1.8 + 0.1


def _blend_increasing(share: float, sign: float) -> float:
    return max(0.1, 1.0 + sign * share * 0.9)


# A draw is a position in this table, so its order is part of the format: a new order needs a new RENDERER.
OPERATIONS = (
    Op("AutoContrast"),
    Op("Equalize"),
    Op("Invert"),
    Op("Rotate", lambda share, sign: sign * share * 30),
    Op("Posterize", lambda share, _: int(share * 4), lambda share, _: 4 - int(share * 4)),
    Op("Solarize", lambda share, _: min(256, int(share * 256)), lambda share, _: 256 - min(256, int(share * 256))),
    Op("SolarizeAdd", lambda share, _: min(128, int(share * 110))),
    Op("Color", _blend, _blend_increasing),
    Op("Contrast", _blend, _blend_increasing),
    Op("Brightness", _blend, _blend_increasing),
    Op("Sharpness", _blend, _blend_increasing),
    Op("ShearX", lambda share, sign: sign * share * 0.3),
    Op("ShearY", lambda share, sign: sign * share * 0.3),
    Op("TranslateXRel", lambda share, sign: sign * share * 0.45),
    Op("TranslateYRel", lambda share, sign: sign * share * 0.45),
)  # fmt: skip
PLAIN = tuple(op.name for op in OPERATIONS)
INCREASING = tuple(f"{op.name}Increasing" if op.increasing else op.name for op in OPERATIONS)
_BY_NAME = dict(zip(PLAIN + INCREASING, OPERATIONS + OPERATIONS, strict=True))
