"""The recipe: pinned ids, YAML files, overrides, and what is refused with which words."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import RecipeError, UsageError
from pipeline.settings.files import load_recipe, parse_override
from pipeline.views.recipe import PRESETS, RENDERER, RandAugment, Recipe

IDS = [
    ("deit", "e0b159eacfeb5b543cf2ab54fb653a1676cfb8e72714dad0fe6e31a9402a7792"),
    ("deit-384", "42f69c851a4bb98597205309efd210eea5fc9fd6e6add763374b7db51c183ad3"),
    ("crop-flip", "9da66ba3e2cf100346fc45e7c86970540aad4caad66ea57beff3990bf02540cb"),
    ("none", "6f85d80126a99fa7c5fb068bca1de291506dc83d0dd09aa4a10b0d01bb15026d"),
]


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("preset", "recipe_id"), IDS)
def test_preset_ids_are_pinned(preset, recipe_id):
    assert load_recipe(preset).id == recipe_id, (
        "an id seeds every draw and names every label set: with another id all stored label sets are of no use"
    )


def test_every_preset_has_a_pinned_id():
    assert sorted(PRESETS) == sorted(name for name, _ in IDS)


CANONICAL = [
    # fields, the fields between img_size and mix_block in canonical JSON, renderer
    ({}, '"interpolation":"bicubic",', 2),
    ({"interpolation": "random"}, '"interpolation":"random",', 2),
    # renderer 1 had no such field
    ({"renderer": 1}, "", 1),
    ({"renderer": 1, "interpolation": "bicubic"}, "", 1),
]


@pytest.mark.parametrize(("fields", "interpolation", "renderer"), CANONICAL)
def test_id_is_the_sha256_of_the_fields_in_canonical_json(fields, interpolation, renderer):
    text = (
        '{"aa":"rand-m9-mstd0.5-inc1","crop":"random","crop_pct":0.875,"cutmix":1.0,"hflip":0.5,"img_size":224,'
        f'{interpolation}"mix_block":256,"mixup":0.8,"mixup_prob":1.0,"mixup_switch_prob":0.5,'
        f'"ratio":[0.75,1.3333333333333333],"renderer":{renderer},"reprob":0.25,"scale":[0.08,1.0],"seed":0,'
        '"views_per_pairing":3}'
    )
    recipe = Recipe(**fields)
    assert recipe.id == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text) == recipe.model_dump(mode="json") == json.loads(recipe.model_dump_json())
    assert Recipe(**json.loads(text)) == recipe


def test_the_id_of_an_old_recipe_is_what_it_was():
    """`test_renderer1.py` has those of all presets."""
    assert Recipe(renderer=1).id == "20ad9f5bf9d15dc7d5b1ee6db1b261d32bd76efab7332f85a25aee2d1ccf9bec"


def test_other_fields_of_an_old_recipe_keep_its_renderer():
    recipe = Recipe(renderer=1).with_fields(img_size=64)
    assert recipe.renderer == 1
    assert "interpolation" not in recipe.model_dump()
    assert recipe.with_fields(renderer=2).model_dump()["interpolation"] == "bicubic"


OTHER_VALUES = {
    "img_size": 32,
    "crop": "center",
    "scale": (0.2, 1.0),
    "ratio": (0.5, 2.0),
    "crop_pct": 0.9,
    "interpolation": "bilinear",
    "hflip": 0.0,
    "aa": None,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.5,
    "mixup_prob": 0.5,
    "mixup_switch_prob": 0.25,
    "mix_block": 128,
    "views_per_pairing": 1,
    "seed": 1,
}


def test_every_field_is_part_of_the_id():
    assert set(OTHER_VALUES) | {"renderer"} == set(Recipe.model_fields)
    changed = {name: Recipe(**{name: value}).id for name, value in OTHER_VALUES.items()}
    assert len({Recipe().id, *changed.values()}) == len(OTHER_VALUES) + 1


def test_a_recipe_reaches_another_process_with_its_id_and_serves_as_a_key():
    """Loader processes get it with every block, and its id seeds every stream."""
    recipe = Recipe(**OTHER_VALUES)
    assert (recipe.id, recipe.randaugment) == (Recipe(**OTHER_VALUES).id, None)
    again = pickle.loads(pickle.dumps(recipe))
    assert again.__dict__["id"] == recipe.id  # and is not hashed again
    assert (again, hash(again)) == (recipe, hash(recipe))
    assert again == Recipe(**OTHER_VALUES)  # whose id was not asked for
    assert {recipe: 1}[Recipe(**OTHER_VALUES)] == 1


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="Instance is frozen"):
        Recipe().img_size = 32  # type: ignore[misc]


@pytest.mark.parametrize("recipe", [*PRESETS.values(), Recipe(**OTHER_VALUES)], ids=[*PRESETS, "other"])
def test_a_recipe_survives_its_dict_and_json(recipe):
    again = Recipe(**json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again == recipe
    assert again.id == recipe.id


SAME = [
    # plain values that mean the same: whole floats are written as integers in YAML and on the command line
    ({"cutmix": 1}, {"cutmix": 1.0}),
    ({"mixup": 0, "cutmix": 2}, {"mixup": 0.0, "cutmix": 2.0}),
    ({"scale": [1, 1]}, {"scale": (1.0, 1.0)}),
    ({"ratio": (1, 2)}, {"ratio": [1.0, 2.0]}),
    ({}, {"seed": 0}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_and_one_point_zero_give_the_same_id(one, other):
    assert Recipe(**one).id == Recipe(**other).id
    assert Recipe(**one) == Recipe(**other)


def test_one_and_one_point_zero_are_the_same_to_the_constructor_too():
    assert Recipe(cutmix=1) == Recipe(cutmix=1.0)
    assert Recipe(cutmix=1).id == Recipe(cutmix=1.0).id


MIXING = [
    # fields, whether anything is mixed
    ({}, True),
    ({"mixup": 0.0}, True),
    ({"cutmix": 0.0}, True),
    ({"mixup": 0.0, "cutmix": 0.0}, False),
    ({"mixup_prob": 0.0}, False),
]


@pytest.mark.parametrize(("fields", "mixes"), MIXING)
def test_a_recipe_knows_whether_it_mixes(fields, mixes):
    assert Recipe(**fields).mixes is mixes


# --- files and overrides --------------------------------------------------------------------------------------

FILES = [
    # text of the file, the recipe it means
    ("img_size: 32", Recipe(img_size=32)),
    # the others start from the named preset
    ("preset: none\nimg_size: 32", PRESETS["none"].with_fields(img_size=32)),
    ("preset: deit", Recipe()),
    ("renderer: 1", Recipe(renderer=1)),
    ("interpolation: random", Recipe(interpolation="random")),
    ("preset: none\ninterpolation: bilinear", PRESETS["none"].with_fields(interpolation="bilinear")),
    ("preset: deit-384\nseed: 7\naa: null", Recipe(img_size=384, seed=7, aa=None)),
    ("scale: [0.2, 1]\nratio: [1, 1]", Recipe(scale=(0.2, 1.0), ratio=(1.0, 1.0))),
    ("aa: rand-m7-n1\nmixup: 0\n# a comment\n", Recipe(aa="rand-m7-n1", mixup=0.0)),
    # JSON is YAML
    (PRESETS["crop-flip"].model_dump_json(), PRESETS["crop-flip"]),
    ("{}", Recipe()),
]


@pytest.mark.parametrize(("text", "recipe"), FILES)
def test_a_yaml_file_is_a_recipe(tmp_path, text, recipe):
    loaded = load_recipe(written(tmp_path, text))
    assert loaded == recipe
    assert loaded.id == recipe.id


def test_overrides_win_over_the_file_and_the_file_over_its_preset(tmp_path):
    path = written(tmp_path, "preset: none\nimg_size: 64\nseed: 5")
    loaded = load_recipe(path, {"img_size": 96})
    assert (loaded.img_size, loaded.seed, loaded.crop) == (96, 5, "center")


def test_overrides_of_a_preset_leave_the_preset_as_it_was():
    assert load_recipe("deit", {"img_size": 32}).img_size == 32
    assert load_recipe("deit").id == IDS[0][1]


OVERRIDES = [
    # command line, field and value
    ("img_size=32", ("img_size", 32)),
    ("img-size=32", ("img_size", 32)),
    ("aa=null", ("aa", None)),
    ("interpolation=random", ("interpolation", "random")),
    ("aa=rand-m9-mstd0.5", ("aa", "rand-m9-mstd0.5")),
    ("scale=[0.1, 1]", ("scale", [0.1, 1])),
    (" mixup = 0.2", ("mixup", 0.2)),
    # only the first equals sign divides
    ("aa=a=b", ("aa", "a=b")),
]


@pytest.mark.parametrize(("text", "parsed"), OVERRIDES)
def test_an_override_is_a_field_and_a_yaml_value(text, parsed):
    assert parse_override(text) == parsed


BAD_FIELDS = [
    # fields, the whole message
    ({"img_size": 0}, "img_size must be a whole number in 1..4096, got 0"),
    ({"img_size": 4097}, "img_size must be a whole number in 1..4096, got 4097"),
    ({"img_size": 32.0}, "img_size must be a whole number in 1..4096, got 32.0"),
    ({"img_size": "32"}, "img_size must be a whole number in 1..4096, got '32'"),
    # True is an int to Python
    ({"seed": True}, "seed must be a whole number in 0..9223372036854775807, got True"),
    ({"seed": -1}, "seed must be a whole number in 0..9223372036854775807, got -1"),
    ({"hflip": 1.01}, "hflip must be a number in 0..1, got 1.01"),
    ({"hflip": False}, "hflip must be a number in 0..1, got False"),
    ({"reprob": -0.1}, "reprob must be a number in 0..1, got -0.1"),
    ({"mixup": float("nan")}, "mixup must be a number in 0..100, got nan"),
    ({"cutmix": float("inf")}, "cutmix must be a number in 0..100, got inf"),
    ({"cutmix": 101}, "cutmix must be a number in 0..100, got 101"),
    ({"mixup_prob": 2}, "mixup_prob must be a number in 0..1, got 2"),
    ({"mixup_switch_prob": None}, "mixup_switch_prob must be a number in 0..1, got None"),
    # a block of one has no partners
    ({"mix_block": 1}, "mix_block must be a whole number in 2..65536, got 1"),
    ({"views_per_pairing": 0}, "views_per_pairing must be a whole number in 1..65536, got 0"),
    ({"crop_pct": 0}, "crop_pct must be a number in 0.01..1, got 0"),
    ({"crop": "middle"}, "crop must be one of random, center, got 'middle'"),
    ({"crop": 5}, "crop must be one of random, center, got 5"),
    ({"scale": 0.5}, "scale must be two rising numbers in 0..1, got 0.5"),
    ({"scale": [0.1, 0.5, 1.0]}, "scale must be two rising numbers in 0..1, got [0.1, 0.5, 1.0]"),
    ({"scale": [0.0, 1.0]}, "scale must be two rising numbers in 0..1, got [0.0, 1.0]"),
    ({"scale": [0.5, 0.1]}, "scale must be two rising numbers in 0..1, got [0.5, 0.1]"),
    ({"scale": [0.5, 1.1]}, "scale must be two rising numbers in 0..1, got [0.5, 1.1]"),
    ({"scale": [True, 1]}, "scale must be two rising numbers in 0..1, got [True, 1]"),
    # a set has no order
    ({"scale": {0.5}}, "scale must be two rising numbers in 0..1, got {0.5}"),
    ({"ratio": [0.001, 1]}, "ratio must be two rising numbers in 0.01..100, got [0.001, 1]"),
    ({"aa": 9}, "aa must be text or null, got 9"),
    ({"renderer": True}, "renderer must be a whole number in 0..2147483648, got True"),
    ({"renderer": RENDERER + 1}, "this version renders recipes of renderer 1 and 2, the recipe asks for 3"),
    ({"renderer": 0}, "this version renders recipes of renderer 1 and 2, the recipe asks for 0"),
    ({"interpolation": "lanczos"}, "interpolation must be one of random, bilinear, bicubic, got 'lanczos'"),
    ({"interpolation": None}, "interpolation must be one of random, bilinear, bicubic, got None"),
    ({"interpolation": "Bicubic"}, "interpolation must be one of random, bilinear, bicubic, got 'Bicubic'"),
    (
        {"interpolation": "bilinear", "renderer": 1},
        "interpolation must be bicubic in a recipe of renderer 1, got 'bilinear'",
    ),
    (
        {"interpolation": "random", "renderer": 1},
        "interpolation must be bicubic in a recipe of renderer 1, got 'random'",
    ),
    # which filter the view has would be chance, and nothing else about the middle is
    (
        {"interpolation": "random", "crop": "center"},
        "interpolation must be bilinear or bicubic where crop is 'center', got 'random'",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_a_bad_field_is_refused_with_the_rule_and_the_value(fields, message):
    with pytest.raises(RecipeError) as caught:
        Recipe(**fields)
    assert str(caught.value) == message


def test_unknown_fields_are_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"^a recipe has no field colour, zoom; its fields are img_size, crop, .*"):
        Recipe(**{"zoom": 1, "colour": 2})


BAD_FILES = [
    # text of the file, what the message says
    ("", r"recipe\.yaml: a recipe file holds `field: value` lines, got NoneType$"),
    ("- img_size", r"a recipe file holds `field: value` lines, got list$"),
    ("just text", r"a recipe file holds `field: value` lines, got str$"),
    ("img_size: [32", r"recipe\.yaml: not valid YAML: while parsing a flow sequence"),
    ("img_size: 32: 4", r"not valid YAML: mapping values are not allowed here"),
    # safe_load: a file cannot make objects
    ("seed: !!python/object/apply:os.getpid []", r"not valid YAML: could not determine a constructor"),
    ("preset: vit", r"^preset must be one of deit, deit-384, crop-flip, none, got 'vit'$"),
    ("preset: null", r"^preset must be one of deit, deit-384, crop-flip, none, got None$"),
    ("presets: deit", r"^a recipe has no field presets; its fields are img_size"),
    ("1: 2", r"^a recipe has no field 1; its fields are"),
    ("img_size: 1e2", r"^img_size must be a whole number in 1\.\.4096, got 100\.0$"),
    # YAML's own reader keeps the last of two
    ("img_size: 32\nimg_size: 64", r"recipe\.yaml: not valid YAML: the key 'img_size' stands there twice"),
    # and reads this as 190
    ("seed: 3:10", r"^seed must be a whole number in 0\.\.9223372036854775807, got '3:10'$"),
    ("scale: &a [0.1, 1]\nratio: *a", r"not valid YAML: aliases \(\*a\) are not read here"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)


ESCAPES = [
    # text of the file that raises something else than RecipeError today
    "preset: [deit]",  # TypeError: unhashable
    "seed: 2026-13-45",  # ValueError of the YAML constructor: no such date
    "cutmix: " + "9" * 400,  # OverflowError: too large for a float
    "cutmix: " + "9" * 5000,  # ValueError: more digits than int() reads
]


@pytest.mark.parametrize("text", ESCAPES, ids=["list", "date", "400 digits", "5000 digits"])
def test_a_bad_file_is_always_a_recipe_error(tmp_path, text):
    with pytest.raises(RecipeError):
        load_recipe(written(tmp_path, text))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no.yaml"):
        message = f"a recipe is one of deit, deit-384, crop-flip, none or a YAML file, got {str(path)!r}"
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe(str(path))


BAD_OVERRIDES = [
    ("img_size", r"a recipe override is FIELD=VALUE, such as img_size=32, got 'img_size'"),
    ("", r"a recipe override is FIELD=VALUE, such as img_size=32, got ''"),
    ("scale=[1", r"^scale=\[1: not valid YAML: "),
]


@pytest.mark.parametrize(("text", "message"), BAD_OVERRIDES)
def test_a_bad_override_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_override(text)


def test_recipe_errors_are_misuse():
    """The exit code of a wrong value is 2."""
    assert issubclass(RecipeError, UsageError)
    assert RecipeError.exit_code == 2


# --- RandAugment's notation -----------------------------------------------------------------------------------

NOTATION = [
    # text, what it means
    ("rand", RandAugment()),
    ("rand-m9-mstd0.5-inc1", RandAugment(magnitude=9.0, magnitude_std=0.5, increasing=True)),
    ("rand-m7-n3-p0.75", RandAugment(magnitude=7.0, layers=3, prob=0.75)),
    # sections in any order
    ("rand-inc1-mstd0.5-m9", RandAugment(magnitude=9.0, magnitude_std=0.5, increasing=True)),
    ("rand-inc0", RandAugment(increasing=False)),
    ("rand-m15-mmax20", RandAugment(magnitude=15.0, magnitude_max=20.0)),
    # above 100: uniform magnitudes
    ("rand-m9-mstd101", RandAugment(magnitude=9.0, magnitude_std=101.0)),
    ("rand-n0", RandAugment(layers=0)),
    ("rand-p1", RandAugment(prob=1.0)),
]


@pytest.mark.parametrize(("text", "meaning"), NOTATION)
def test_randaugment_reads_timms_notation(text, meaning):
    assert RandAugment.parse(text) == meaning
    assert Recipe(aa=text).randaugment == meaning


def test_no_notation_is_no_randaugment():
    assert Recipe(aa=None).randaugment is None


BAD_NOTATION = [
    # text, what the message says
    ("", r"aa must begin with 'rand' \(RandAugment\), got ''"),
    ("augmix", r"aa must begin with 'rand' \(RandAugment\), got 'augmix'"),
    ("original-mstd0.5", r"aa must begin with 'rand' \(RandAugment\), got 'original-mstd0.5'"),
    ("rand-m9-", r"section '' of 'rand-m9-' must be one of m n p mstd mmax inc, once each"),
    # timm's other sets of operations
    ("rand-m9-tweights", r"section 'tweights' of .* must be one of m n p mstd mmax inc"),
    ("rand-w0", r"section 'w0' of 'rand-w0' must be one of"),
    ("rand-m", r"section 'm' of 'rand-m' must be one of"),
    ("rand-9", r"section '9' of 'rand-9' must be one of"),
    ("rand-m9-m8", r"section 'm8' of 'rand-m9-m8' must be one of .* once each"),
    # a minus sign divides sections
    ("rand-m-9", r"section 'm' of 'rand-m-9' must be one of"),
    ("rand-m9.", r"section 'm9\.' of"),
    ("rand-minf", r"section 'minf' of"),
    ("rand-M9", r"section 'M9' of"),
    ("rand-m9 ", r"section 'm9 ' of"),
    ("rand-p1.5", r"aa: p is a probability, 0\.\.1, got 'rand-p1\.5'"),
]


@pytest.mark.parametrize(("text", "message"), BAD_NOTATION)
def test_a_bad_notation_is_refused_when_the_recipe_is_made(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(aa=text)


@pytest.mark.parametrize("text", ["rand-n2.5", "rand-inc0.5"])
def test_a_fraction_of_a_layer_is_refused(text):
    with pytest.raises(RecipeError):
        Recipe(aa=text)
