"""The recipe: a frozen, complete description of the augmentation. Its id is the SHA-256 of its canonical JSON.

Field names are timm's flags where the meaning is the same. A view is a pure function of (recipe id, sample key,
view number), so whatever may move a pixel or a partner stands here: the seed too, and `renderer`, the version of
the code that obeys the recipe.
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

from pipeline.errors import RecipeError
from pipeline.storage.json import sha256_json

DEFAULT_RECIPE = "deit"  # a preset
RENDERER = 1  # raise it when the same recipe would give other pixels, partners or mixes
MAX_IMG_SIZE = 4096
Crop = Literal["random", "center"]

_RANGES: list[tuple[str, float, float]] = [
    ("img_size", 1, MAX_IMG_SIZE),
    ("crop_pct", 0.01, 1.0),
    ("hflip", 0.0, 1.0),
    ("reprob", 0.0, 1.0),
    ("mixup", 0.0, 100.0),
    ("cutmix", 0.0, 100.0),
    ("mixup_prob", 0.0, 1.0),
    ("mixup_switch_prob", 0.0, 1.0),
    ("mix_block", 2, 65536),
    ("views_per_pairing", 1, 65536),
    ("seed", 0, 2**63 - 1),
]


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment as timm spells it: `rand-m9-mstd0.5-inc1`."""

    magnitude: float = 10.0  # `m`, of 10
    layers: int = 2  # `n`, operations chosen per view
    prob: float = 0.5  # `p`, chance that a chosen operation is applied
    magnitude_std: float = 0.0  # `mstd`; above 100: uniform in [0, magnitude]
    magnitude_max: float = 10.0  # `mmax`
    increasing: bool = False  # `inc`: operations grow stronger with the magnitude

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read timm's notation; raise RecipeError for a section that it does not know."""
        head, *sections = text.split("-")
        names = {"m": "magnitude", "n": "layers", "p": "prob", "mstd": "magnitude_std", "mmax": "magnitude_max"}
        values: dict[str, Any] = {}
        if head != "rand":
            raise RecipeError(f"aa must begin with 'rand' (RandAugment), got {text!r}")
        for section in sections:
            match = re.fullmatch(r"([a-z]+)([0-9]{1,9})(\.[0-9]{1,18})?", section)
            name = match and ({"inc": "increasing"} | names).get(match[1])
            if not match or not name or name in values or (match[3] and name in ("layers", "increasing")):
                raise RecipeError(f"aa: section {section!r} of {text!r} must be one of m n p mstd mmax inc, once each")
            number = float(match[2] + (match[3] or ""))
            values[name] = {"layers": int, "increasing": bool}.get(name, float)(number)
        if values.get("prob", 0.5) > 1:
            raise RecipeError(f"aa: p is a probability, 0..1, got {text!r}")
        if values.get("layers", 2) > 15:
            raise RecipeError(f"aa: n is at most 15, the number of operations, got {text!r}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How views of an image are made. The defaults are DeiT's (Touvron et al. 2021, table 9)."""

    img_size: int = 224  # pixels, height and width of a view
    crop: Crop = "random"  # random resized crop, or resize and centre crop
    scale: tuple[float, float] = (0.08, 1.0)  # area of a random crop, as a share of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of a random crop
    crop_pct: float = 0.875  # centre crop: share of the resized shorter side
    hflip: float = 0.5  # probability
    aa: str | None = "rand-m9-mstd0.5-inc1"  # RandAugment in timm's notation
    reprob: float = 0.25  # probability of random erasing (one box, pixel noise)
    mixup: float = 0.8  # alpha of Beta(alpha, alpha); 0: no mixup
    cutmix: float = 1.0  # alpha of Beta(alpha, alpha); 0: no CutMix
    mixup_prob: float = 1.0  # probability that a pair is mixed at all
    mixup_switch_prob: float = 0.5  # probability of CutMix where both are on
    mix_block: int = 256  # samples of a source shard, in order, among which partners are drawn
    views_per_pairing: int = 3  # consecutive views that keep their partners, so that one decode serves them all
    seed: int = 0
    renderer: int = RENDERER

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # 1 and 1.0 are one recipe, so they must be one text
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.default))
        for name, low, high in _RANGES:
            _check_range(name, getattr(self, name), low, high)
        _check_interval("scale", self.scale, 0.0, 1.0)
        _check_interval("ratio", self.ratio, 0.01, 100.0)
        if self.crop not in get_args(Crop):
            raise RecipeError(f"crop must be one of {', '.join(get_args(Crop))}, got {self.crop!r}")
        if self.renderer != RENDERER:
            raise RecipeError(
                f"this version renders recipes of renderer {RENDERER}, the recipe asks for {self.renderer}"
            )
        _ = self.randaugment  # parsed now, so that a wrong notation is found here

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return sha256_json(self.to_dict())

    @cached_property
    def randaugment(self) -> RandAugment | None:
        """The parsed `aa`."""
        return None if self.aa is None else RandAugment.parse(self.aa)

    @property
    def mixes(self) -> bool:
        """Whether any view of this recipe is mixed with a partner."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a recipe from plain values; unknown fields and wrong types are refused."""
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise RecipeError(f"a recipe has no field {', '.join(unknown)}; its fields are {', '.join(fields)}")
        return cls(**values)


def _typed(name: str, value: Any, default: Any) -> Any:
    """Return `value` as the type of the field's default; 1 is a fine float, True is no number."""
    if name == "aa":
        wanted, ok = "text or null", value is None or isinstance(value, str)
    elif isinstance(default, tuple):
        wanted = "two numbers"
        ok = isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(v) for v in value)
        value = tuple(float(v) for v in value) if ok else value
    elif isinstance(default, str):
        wanted, ok = "text", isinstance(value, str)
    elif isinstance(default, int):
        wanted, ok = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    else:
        wanted, ok = "a number", _is_number(value)
        value = float(value) if ok else value
    if not ok:
        raise RecipeError(f"{name} must be {wanted}, got {value!r}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RecipeError(f"{name} must be in {low:g}..{high:g}, got {value!r}")


def _check_interval(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if not (low < value[0] <= value[1] <= high):
        raise RecipeError(f"{name} must be two rising numbers in {low:g}..{high:g}, got {list(value)}")


PRESETS: dict[str, Recipe] = {
    "deit": Recipe(),
    "deit-384": Recipe(img_size=384),
    "crop-flip": Recipe(aa=None, reprob=0.0, mixup=0.0, cutmix=0.0),
    "none": Recipe(crop="center", hflip=0.0, aa=None, reprob=0.0, mixup=0.0, cutmix=0.0),
}
