"""The recipe: a frozen, complete description of the augmentation. Its id is the SHA-256 of its canonical JSON.

Fields have the names of timm's flags if the meaning is the same. A view is a pure function of (recipe id, sample key,
view number), so everything that may change a pixel or a partner is a field, including the seed and `renderer`, the version
of the code that renders views.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.errors import RecipeError
from pipeline.storage.json import Record, sha256_json
from pipeline.text import did_you_mean

DEFAULT_RECIPE = "deit"  # a preset
RENDERER = 2  # docs/views-v2.md; increase it when the same recipe would give other pixels, partners or mixes
RENDERERS = (1, RENDERER)
MAX_IMG_SIZE = 4096
MAX_LAYERS = 15  # the number of RandAugment operations
Crop = Literal["random", "center"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """The settings of RandAugment, written in timm's notation: `rand-m9-mstd0.5-inc1`."""

    magnitude: float = 10.0  # `m`, on a scale of 0..10
    layers: int = 2  # `n`, operations chosen per view
    prob: float = 0.5  # `p`, chance that a chosen operation is applied
    magnitude_std: float = 0.0  # `mstd`; above 100: uniform in [0, magnitude]
    magnitude_max: float = 10.0  # `mmax`
    increasing: bool = False  # `inc`: operations grow stronger with the magnitude

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the settings from timm's notation; raise RecipeError for an unknown section."""
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
        if values.get("layers", 2) > MAX_LAYERS:
            raise RecipeError(f"aa: n is at most {MAX_LAYERS}, the number of operations, got {text!r}")
        return cls(**values)


def _whole(low: int, high: int) -> Any:
    return Field(ge=low, le=high, description=f"a whole number in {low}..{high}")


def _number(low: float, high: float) -> Any:
    return Field(ge=low, le=high, description=f"a number in {low:g}..{high:g}")


Share = Annotated[float, _number(0, 1)]
Alpha = Annotated[float, _number(0, 100)]  # parameter of Beta(alpha, alpha); 0: no such mixes
Area = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0.01, le=100)]


class Recipe(Record):
    """A complete description of how views of an image are made. The defaults are DeiT's (Touvron et al. 2021, table 9).

    A wrong or unknown field raises RecipeError. 1 and 1.0 are one recipe.
    """

    # The title of a field is its meaning, its description the allowed values.
    img_size: Annotated[int, _whole(1, MAX_IMG_SIZE), Field(title="height and width of a view, in pixels")] = 224
    crop: Annotated[
        Crop,
        Field(
            title="a random resized crop, or a resize and a centre crop",
            description=f"one of {', '.join(get_args(Crop))}",
        ),
    ] = "random"
    scale: Annotated[
        tuple[Area, Area],
        Field(
            title="range of the area of a random crop, as a share of the image",
            description="two rising numbers in 0..1",
        ),
    ] = (0.08, 1.0)
    ratio: Annotated[
        tuple[Ratio, Ratio],
        Field(
            title="range of the width of a random crop divided by its height",
            description="two rising numbers in 0.01..100",
        ),
    ] = (3 / 4, 4 / 3)
    crop_pct: Annotated[
        float, _number(0.01, 1), Field(title="share of the resized shorter side that a centre crop keeps")
    ] = 0.875
    interpolation: Annotated[
        Literal["random", Interpolation],
        Field(
            title="filter of the resize and of the geometric operations of RandAugment; random: either, for each of them",
            description="one of random, bilinear, bicubic",
        ),
    ] = "bicubic"
    hflip: Annotated[Share, Field(title="probability of a horizontal flip")] = 0.5
    aa: Annotated[
        str | None,
        Field(title="RandAugment in timm's notation; null: none", description="text or null"),
    ] = "rand-m9-mstd0.5-inc1"
    reprob: Annotated[Share, Field(title="probability of random erasing: one box of pixel noise")] = 0.25
    mixup: Annotated[
        Alpha, Field(title="alpha of Beta(alpha, alpha), which draws the share of each image in a mixup; 0: no mixup")
    ] = 0.8
    cutmix: Annotated[
        Alpha, Field(title="alpha of Beta(alpha, alpha), which draws the area of a CutMix; 0: no CutMix")
    ] = 1.0
    mixup_prob: Annotated[Share, Field(title="probability that a pair of images is mixed at all")] = 1.0
    mixup_switch_prob: Annotated[Share, Field(title="probability of CutMix where both mixes are on")] = 0.5
    mix_block: Annotated[
        int, _whole(2, 65536), Field(title="number of images of a source shard, in order, that may be partners")
    ] = 256
    views_per_pairing: Annotated[
        int, _whole(1, 65536), Field(title="number of consecutive views with the same partners: one decode")
    ] = 3
    seed: Annotated[int, _whole(0, 2**63 - 1), Field(title="random seed of all choices")] = 0
    renderer: Annotated[int, _whole(0, 2**31), Field(title="version of the code that renders views")] = RENDERER

    @field_validator("scale", "ratio", mode="wrap")
    @classmethod
    def _rise(cls, value: Any, check: ValidatorFunctionWrapHandler) -> tuple[float, float]:
        low, high = check(tuple(value) if isinstance(value, list) else value)  # JSON and YAML have only lists
        if low > high:
            raise ValueError("they fall")
        return low, high

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_plain_words(cls, values: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            recipe = build(values)
        except ValidationError as error:
            if not isinstance(values, dict):
                raise
            raise RecipeError(_sentence(error, values), fix=_similar_field(error)) from error
        if recipe.renderer not in RENDERERS:
            raise RecipeError(
                f"this version renders recipes of renderer {' and '.join(map(str, RENDERERS))}, the recipe asks for"
                f" {recipe.renderer}"
            )
        if recipe.interpolation != "bicubic" and recipe.renderer == 1:
            raise RecipeError(f"interpolation must be bicubic in a recipe of renderer 1, got {recipe.interpolation!r}")
        if recipe.interpolation == "random" and recipe.crop == "center":
            raise RecipeError("interpolation must be bilinear or bicubic where crop is 'center', got 'random'")
        _ = recipe.randaugment  # parsed now, so that wrong notation is an error here
        return recipe

    @model_serializer(mode="wrap")
    def _fields_of_its_renderer(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the fields; renderer 1 had no `interpolation`, and the ids of its recipes do not change."""
        fields = serialize(self)
        return fields if self.renderer > 1 else {name: fields[name] for name in fields if name != "interpolation"}

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return sha256_json(self.model_dump(mode="json"))

    @cached_property
    def randaugment(self) -> RandAugment | None:
        """Settings parsed from `aa`."""
        return None if self.aa is None else RandAugment.parse(self.aa)

    @property
    def mixes(self) -> bool:
        """True where views of this recipe are mixed with a partner."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def with_fields(self, /, **values: Any) -> Self:
        """Return this recipe with other values in some fields, or raise RecipeError."""
        return type(self)(**self.model_dump() | values)


def _sentence(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Return the error message for the first wrong field of a recipe."""
    fields, problems = Recipe.model_fields, error.errors()
    names = [str(problem["loc"][0]) for problem in problems]
    if unknown := sorted(set(names) - set(fields)):
        return f"a recipe has no field {', '.join(unknown)}; its fields are {', '.join(fields)}"
    return f"{names[0]} must be {fields[names[0]].description}, got {values[names[0]]!r}"


def _similar_field(error: ValidationError) -> str | None:
    names = [str(problem["loc"][0]) for problem in error.errors()]
    unknown = [name for name in names if name not in Recipe.model_fields]
    return did_you_mean(unknown[0], Recipe.model_fields) if unknown else None


PRESETS: dict[str, Recipe] = {
    "deit": Recipe(),
    "deit-384": Recipe(img_size=384),
    "crop-flip": Recipe(aa=None, reprob=0.0, mixup=0.0, cutmix=0.0),
    "none": Recipe(crop="center", hflip=0.0, aa=None, reprob=0.0, mixup=0.0, cutmix=0.0),
}
