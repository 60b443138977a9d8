"""Settings in YAML files: what may stand in them, what goes before them, and the ones under configs/."""

import dataclasses
import json
import logging
import re
import shlex
import typing
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st
from support.builders import make_labels, small_recipe, write_tars

import cli
from pipeline.errors import DeitCliError, UsageError
from pipeline.labels.labelset import LabelSet
from pipeline.settings import options
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.fields import settings_of
from pipeline.settings.files import describe_settings, load_recipe, plain_settings, read_settings, recipe_settings
from pipeline.storage.yaml import parse_yaml, to_yaml
from pipeline.views.recipe import PRESETS, Recipe
from trainer.config import TrainConfig
from trainer.export import export_model, hub_config
from trainer.student import create_student

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def parsed(command: str, *arguments: str) -> tuple[dict, dict]:
    """Return what click makes of these arguments, and the recipe fields of the file."""
    context = cli.commands.commands[command].make_context(command, list(arguments))
    return context.params, context.meta.get(options.RECIPE_FIELDS, {})


def train_config(*arguments: str) -> TrainConfig:
    params, _ = parsed("train", *arguments)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in params.items() if name in fields})


# --- what may stand in a file ---------------------------------------------------------------------------------

GOOD = [
    # text, what it sets
    ("epochs: 3", {"epochs": 3}),
    ("batch-size: 7", {"batch_size": 7}),
    # an option that may be repeated
    ("labels: a", {"labels": ("a",)}),
    ("labels: [a, b]\nlabel-weights: [0.7, 2]", {"labels": ("a", "b"), "label_weights": (0.7, 2)}),
    # a further name of the same option
    ("data_path: x\ninput-size: 32", {"data": "x", "img_size": 32}),
    # YAML 1.1 takes this for text
    ("lr: 1e-6", {"lr": 1e-6}),
    ("lr: 1", {"lr": 1}),
    ("clip_grad: null", {"clip_grad": None}),
    ("model_ema: no", {"model_ema": False}),
    ("distillation-type: none", {"distillation_type": "none"}),
    ("recipe: none\nset: {img-size: 32}", {"recipe": "none", "set": {"img-size": 32}}),
    ("{}", {}),
]


@pytest.mark.parametrize(("text", "settings"), GOOD)
def test_a_file_sets_options(tmp_path, text, settings):
    assert read_settings(written(tmp_path, text), TrainConfig) == settings


BAD = [
    # text, the message behind the file's name
    ("epoch: 3", r"there is no setting 'epoch'\. Did you mean epochs\?"),
    ("Labels: x", r"there is no setting 'Labels'\. Did you mean labels\?"),
    ("zzz: 3", r"there is no setting 'zzz'\. Settings are named as the options that --help shows"),
    ("1: 3", r"there is no setting '1'\. "),
    ("teacher: x", r"there is no setting 'teacher'\. "),
    ("epochs: 3\nepochs: 4", r"not valid YAML: the key 'epochs' stands there twice .*line 2"),
    ("batch-size: 3\nbatch_size: 4", r"batch_size is set twice, the second time as batch_size"),
    ("data: a\ndata-path: b", r"data is set twice, the second time as data-path"),
    ("epochs: '3'", r"epochs must be a whole number, got '3'"),
    ("epochs: 3.5", r"epochs must be a whole number, got 3\.5"),
    ("epochs: true", r"epochs must be a whole number, got True"),
    ("epochs: null", r"epochs must be a whole number, got None"),
    ("epochs: 1:30", r"epochs must be a whole number, got '1:30'"),
    ("lr: fast", r"lr must be a number or null, got 'fast'"),
    ("model_ema: 1", r"model_ema must be true or false, got 1"),
    ("model: 5", r"model must be text \(in quotes\), got 5"),
    ("data: [a]", r"data must be text \(in quotes\) or null, got \['a'\]"),
    ("labels: [1]", r"labels must be text \(in quotes\) or a list of them, got \[1\]"),
    ("label-weights: 0.7,0.3", r"label-weights must be a number or a list of them, got '0\.7,0\.3'"),
    ("distillation_type: loud", r"distillation_type must be one of none, soft, hard, got 'loud'"),
    ("set: 3", r"set must be a mapping of recipe fields, got 3"),
    ("model: " + "[" + "x, " * 100 + "]", r"model must be text \(in quotes\), got \['x', .{71}\.\.\.$"),
    ("- epochs", "a file of settings holds `name: value` lines, got list"),
    ("", "a file of settings holds `name: value` lines, got NoneType"),
    ("epochs: [", "not valid YAML: "),
    ("model: !!python/object/apply:os.getpid []", "not valid YAML: could not determine a constructor"),
    ("model: &a [x]\nlabels: *a", r"not valid YAML: aliases \(\*a\) are not read here"),
    ("model: " + "[" * 5000, "not valid YAML: "),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_what_does_not_belong_is_refused_with_file_and_name(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))}: {message}") as caught:
        read_settings(path, TrainConfig)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_or_is_too_large_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml: cannot read this file: No such file"):
        read_settings(tmp_path / "none.yaml", TrainConfig)
    with pytest.raises(UsageError, match="Is a directory"):
        read_settings(tmp_path, TrainConfig)
    with pytest.raises(UsageError, match="has at most 1048576 bytes, this one has more"):
        read_settings(written(tmp_path, "#" * (1 << 20) + "\n"), TrainConfig)


@given(
    st.dictionaries(
        st.text(), st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())
    )
)
@example({"views": "1:30", "number": "1_000", "1:30": 1e-6, "0o7": "0b1", "time": "2026-11-29", "no": "y"})
def test_plain_values_survive_the_way_to_yaml_and_back(values):
    """Also if PyYAML reads them, which takes more texts for numbers."""
    text = to_yaml(values).decode("ascii")
    for found in (parse_yaml(text, where="x"), yaml.safe_load(text)):
        assert found == values
        assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in values.items()}


# --- on the command line --------------------------------------------------------------------------------------


def test_what_is_passed_goes_before_the_file_wherever_it_stands(tmp_path):
    path = str(written(tmp_path, "labels: shards\nepochs: 20\nmodel-ema: false\nlr: 1e-3\nworkers: 2"))
    for arguments in (
        ["-c", path, "--epochs", "30", "--model-ema"],
        ["--model-ema", "--epochs", "30", "--config", path],
    ):
        found = train_config(*arguments)
        assert (found.epochs, found.model_ema, found.lr, found.workers) == (30, True, 1e-3, 2)
        assert found.labels == ("shards",)
    assert train_config("-c", path).model_ema is False
    path = str(written(tmp_path, "labels: shards\nlr: null\nimg-size: null\ndata: null"))
    assert train_config("-c", path) == TrainConfig(labels="shards")


def test_a_file_of_precompute_reaches_its_configs(tmp_path):
    text = "data: images\nout: shards\nviews: 30:50\nteacher: [a, b]\nteacher-path: [x, y]\nbatch-size: auto\npretrained: no"
    params, _ = parsed("precompute", "-c", str(written(tmp_path, text)))
    config, teacher = options.split_values(params, PrecomputeConfig, TeacherConfig)
    assert (config.data, config.out, config.views, config.batch_size) == ("images", "shards", (30, 50), "auto")
    assert (teacher.teacher, teacher.teacher_checkpoint) == (("a", "b"), (Path("x"), Path("y")))
    assert teacher.pretrained is False
    for views, found in (("7", (0, 7)), ("[2, 5]", (2, 5)), ("'3:4'", (3, 4))):
        path = written(tmp_path, f"data: images\nout: shards\nviews: {views}\nteacher: one")
        params, _ = parsed("precompute", "-c", str(path))
        assert (params["views"], params["teacher"]) == (found, ("one",))
    params, _ = parsed("precompute", "-c", str(path), "--teacher", "two", "--views", "9")
    assert (params["views"], params["teacher"]) == ((0, 9), ("two",))
    with pytest.raises(UsageError, match=r"views must be START:STOP or a whole number, got \['a'\]"):
        parsed("precompute", "-c", str(written(tmp_path, "views: [a]")))
    with pytest.raises(click.BadParameter, match="'many' is not START:STOP"):
        parsed("precompute", "-c", str(written(tmp_path, "data: images\nout: shards\nviews: many")))


def test_estimate_and_bench_take_the_file_of_precompute(tmp_path):
    path = str(written(tmp_path, "data: images\nout: shards\nteacher: one\nviews: 7"))
    assert parsed("estimate", "-c", path)[0]["teacher"] == ("one",)
    context = cli.bench.commands["stage1"].make_context("stage1", ["-c", path])
    assert context.params["views"] == (0, 7)


def test_recipe_fields_of_the_file_and_of_the_command_line_add_up(tmp_path):
    path = str(written(tmp_path, "recipe: crop-flip\nset: {img-size: 32, scale: [0.4, 1.0]}\nlabels: x"))

    @cli.commands.command("show-recipe")
    @options.config_option(TrainConfig, recipe=True)
    @options.recipe_options("deit")
    def show(**values):
        click.echo(json.dumps(options.chosen_recipe(values).model_dump(mode="json")))

    try:
        for arguments, expected in (
            ([], load_recipe("crop-flip", {"img_size": 32, "scale": [0.4, 1.0]})),
            (["--set", "img_size=48"], load_recipe("crop-flip", {"img_size": 48, "scale": [0.4, 1.0]})),
            (["--recipe", "none"], load_recipe("none", {"img_size": 32, "scale": [0.4, 1.0]})),
        ):
            done = CliRunner().invoke(show, ["-c", path, *arguments], catch_exceptions=False)
            assert Recipe(**json.loads(done.stdout)) == expected
    finally:
        del cli.commands.commands["show-recipe"]


def test_help_tells_of_the_file_and_a_missing_option_is_still_missing(tmp_path):
    for command in ("train", "precompute", "estimate"):
        assert "--config FILE.yaml" in CliRunner().invoke(cli.commands, [command, "--help"]).output
    done = CliRunner().invoke(cli.commands, ["precompute", "-c", str(written(tmp_path, "data: x"))])
    assert (done.exit_code, "Missing option '--out'" in done.output) == (2, True)


def test_settings_are_said_as_the_options_that_differ():
    config = TrainConfig(labels=Path("my shards"), lr=1e-3, model_ema=False)
    assert describe_settings(config) == "--labels 'my shards' --lr 0.001 --no-model-ema"
    both = PrecomputeConfig(data="x", out=Path("y"), views=(0, 7)), TeacherConfig(teacher=("a", "b"))
    assert describe_settings(*both) == "--data x --out y --views 0:7 --teacher a --teacher b"
    several = TrainConfig(labels=["a", Path("b")], label_weights=(0.7, 2.0), label_mode="random")
    assert describe_settings(several) == (
        "--labels a --labels b --label-weights 0.7 --label-weights 2.0 --label-mode random"
    )
    recipe = load_recipe("none", {"img_size": 32, "scale": [0.4, 1], "aa": None})
    assert describe_settings(config, recipe=recipe).endswith("--recipe none --set img_size=32 --set 'scale=[0.4, 1.0]'")
    assert describe_settings(recipe=Recipe(aa=None, hflip=1e-7)) == "--set hflip=1.0e-07 --set aa=null"


def range_of(kind: type, name: str) -> tuple[float, float]:
    """Return the smallest and largest value that a test gives to a field."""
    if kind is Recipe:
        bounds = Recipe.model_fields[name].metadata
        return (bounds[0].ge, bounds[1].le) if len(bounds) == 2 else (2, 10**6)
    setting = next(setting for setting in settings_of(kind) if setting.name == name)
    return (2, 10**6) if setting.low is None else (setting.low, setting.high or 10**6)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
SPECIAL = {
    # field: values that only some texts or pairs are
    "labels": st.lists(TEXT, min_size=2, max_size=2).map(tuple),
    "label_weights": st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=2).map(tuple),
    "expect_manifest": st.just(("sha256:" + "0a" * 32, "sha256:" + "0b" * 32)),
    "cache_size": st.sampled_from(["1MB", "2TB", "64GiB"]),
    "min_rate": st.sampled_from(["1B", "10kB", "2MiB"]),
    "include_images": st.sampled_from(["original", "256"]),
    "views": st.tuples(st.integers(0, 100), st.integers(101, 2**20)),
    "teacher": st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    "teacher_checkpoint": st.lists(TEXT.map(Path), min_size=1, max_size=3).map(tuple),
    "aa": st.sampled_from([None, "rand-m5", "rand-m9-n3-p0.25-mstd0.5-inc1"]),
    "scale": st.tuples(st.floats(0.01, 0.4), st.floats(0.5, 1)),
    "ratio": st.tuples(st.floats(0.1, 0.9), st.floats(1, 50)),
    "renderer": st.just(1),
}


def values_of(kind: type, name: str, hint) -> st.SearchStrategy:
    """Return values that a field may have, from its type and its range."""
    if name in SPECIAL:
        return SPECIAL[name]
    low, high = range_of(kind, name)
    choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(choices)
    wanted = set(choices or [hint])
    if bool in wanted:
        return st.booleans()
    if int in wanted:
        return st.integers(int(low), int(high))
    if float in wanted:
        return st.floats(low, high)
    return TEXT.map(Path) if Path in wanted else TEXT


def configs_of(kind: type) -> st.SearchStrategy:
    """Return configs of a kind with any of their fields set, those that may stand together."""
    hints = typing.get_type_hints(kind)
    known = {} if kind is Recipe else {field.name: field for field in dataclasses.fields(kind)}
    fields = {name: values_of(kind, name, hints[name]) for name in known or Recipe.model_fields}
    needed = {name: fields.pop(name) for name, field in known.items() if field.default is dataclasses.MISSING}

    def made(values):
        try:
            return kind(**values)
        except UsageError:  # two that exclude each other
            reject()

    return st.fixed_dictionaries(needed, optional=fields).map(made)


def read_back(command: click.Command, said: str, *kinds: type) -> tuple:
    """Return the configs, and the recipe, that a command makes of what was said."""
    context = command.make_context(command.name, shlex.split(said))
    with context:
        recipe = options.chosen_recipe(context.params)
    return *options.split_values(context.params, *kinds), recipe


@given(configs_of(TrainConfig), configs_of(Recipe))
@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_what_train_says_reads_back_as_the_same_settings(config, recipe):
    said = describe_settings(config, recipe=recipe)
    assert read_back(cli.train, said, TrainConfig) == (config, recipe)


@given(configs_of(PrecomputeConfig), configs_of(TeacherConfig), configs_of(Recipe))
@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_what_precompute_says_reads_back_as_the_same_settings(config, teacher, recipe):
    said = describe_settings(config, teacher, recipe=recipe)
    assert read_back(cli.precompute, said, PrecomputeConfig, TeacherConfig) == (config, teacher, recipe)


@given(configs_of(TrainConfig), configs_of(Recipe))
@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_what_is_saved_reads_back_as_the_same_settings(tmp_path_factory, config, recipe):
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    path.write_bytes(to_yaml(plain_settings(config) | recipe_settings(recipe)))
    context = cli.train.make_context("train", ["-c", str(path)])
    with context:
        assert options.chosen_recipe(context.params) == recipe
    assert options.split_values(context.params, TrainConfig) == (config,)


# --- of a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (16, 12))


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, topk=2)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.commands, list(arguments))
    assert not isinstance(result.exception, DeitCliError), result.exception
    assert result.exception is None, result.exception
    return result.output


SHRUNK = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
QUICK = ["--epochs", "1", "-b", "12", "-j", "0", "--log-interval", "1"]


def test_the_saved_settings_of_a_run_are_the_same_run_again(label_set, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli")
    run, again = tmp_path / "run", tmp_path / "again"
    settings = ["--labels", str(label_set.folder), "--lr", "1e-3", "--no-model-ema", *SHRUNK, *QUICK]
    invoke("train", *settings, "--output", str(run), "--resume")
    assert f"settings: --labels {label_set.folder} --output {run} " in caplog.text
    assert " --lr 0.001 --no-model-ema " in caplog.text
    invoke("train", "-c", str(run / "config.yaml"), "--output", str(again))
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (run, again))
    assert one["config"] | {"output": "", "resume": "never"} == two["config"] | {"output": ""}
    assert (run / "last/model.safetensors").read_bytes() == (again / "last/model.safetensors").read_bytes()


def test_the_recipe_of_a_run_without_labels_is_saved_too(data, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    settings = ["--distillation-type", "none", "--data", data, "--recipe", "crop-flip", *SHRUNK, *QUICK]
    invoke("train", *settings, "--set", "img_size=16", "--set", "mix_block=8", "--output", str(run))
    invoke("train", "-c", str(run / "config.yaml"), "--output", str(again))
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (run, again))
    assert one["recipe"] == two["recipe"]
    assert one["config"] | {"output": ""} == two["config"] | {"output": ""}


@pytest.mark.parametrize("recipe", [*PRESETS.values(), small_recipe(), load_recipe("none", {"scale": [0.5, 1]})])
def test_a_recipe_is_saved_as_its_nearest_preset(recipe):
    saved = recipe_settings(recipe)
    assert load_recipe(saved["recipe"], saved.get("set", {})) == recipe
    assert ("set" in saved) == (recipe not in PRESETS.values())


# --- configs/ -------------------------------------------------------------------------------------------------

PUBLISHED = {
    # file: percent that is expected, pixels, parameters in millions (arXiv 2012.12877, tables 1, 5, 7)
    "deit-ti": ("72.2", 224, 5.7),
    "deit-s": ("79.8", 224, 22.1),
    "deit-b": ("81.8", 224, 86.6),
    "deit-ti-distilled": ("74.5", 224, 5.9),
    "deit-s-distilled": ("81.2", 224, 22.4),
    "deit-b-distilled": ("83.4", 224, 87.3),
    "deit-b-384": ("83.1", 384, 86.9),
    "deit-b-distilled-384": ("84.5", 384, 87.6),
    "cifar10-transfer": ("99.1", 224, 85.8),
}
header = re.compile(r"^# (\w+):")


def head_of(path: Path) -> dict[str, str]:
    """Return the parts of the comment that a file begins with."""
    parts: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        word = header.match(line)
        if word:
            parts[word[1]] = []
        if parts:
            list(parts.values())[-1].append(line[13:])
    return {word: "\n".join(lines) for word, lines in parts.items()}


def test_every_published_result_has_a_file():
    assert {path.stem for path in FILES} == set(PUBLISHED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_how_to_run_it_what_to_expect_and_what_was_run(path, monkeypatch):
    head = head_of(path)
    assert list(head) == ["command", "expected", "source", "published", "run"]
    assert f"{PUBLISHED[path.stem][0]} %" in head["expected"]
    assert "2012.12877" in head["source"]
    monkeypatch.chdir(ROOT)
    shown = [line for line in head["command"].replace("\\\n", "").splitlines() if line.startswith("deit-cli")]
    distils = train_config("-c", str(path)).distillation_type != "none"
    assert [line.split()[1] for line in shown] == (["precompute"] if distils else []) + ["train"]
    for line in shown:
        params, _ = parsed(*shlex.split(line)[1:])
        assert {"precompute": "out", "train": "output"}[shlex.split(line)[1]] in params
    assert f"-c configs/{path.name}" in shown[-1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_makes_the_student_of_the_paper(path):
    config = train_config("-c", str(path))
    settings = read_settings(path, TrainConfig)
    recipe = load_recipe(settings["recipe"], settings.get("set"))
    _, img_size, millions = PUBLISHED[path.stem]
    assert recipe.img_size == img_size
    with torch.device("meta"):
        classes = 10 if path.stem.startswith("cifar") else 1000
        student = create_student(
            config.model, num_classes=classes, img_size=recipe.img_size, drop_path=config.drop_path
        )
    assert student.has_distillation_head == (config.distillation_type != "none") == ("distilled" in path.stem)
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    together = config.batch_size * config.grad_accum_steps
    assert together == (768 if path.stem.startswith("cifar") else 512 if "384" in path.stem else 1024)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_trains_a_few_updates_shrunk(path, data, label_set, tmp_path, caplog):
    settings = read_settings(path, TrainConfig)
    asked = ["--output", str(tmp_path / "run"), "--eval-data", data, "--no-pretrained", "--warmup-epochs", "0"]
    asked += ["--grad-accum-steps", "2", *SHRUNK, *QUICK, "--epochs", "3"]
    asked += ["--set", "img_size=16", "--set", "mix_block=8"]
    asked += ["--labels", str(label_set.folder)] if "labels" in settings else ["--data", data]
    if "init" in settings or "pretrained" in settings:  # of twice the size, and of ImageNet's classes
        student = create_student(settings["model"], num_classes=1000, img_size=32, **TINY)
        export_model(tmp_path / "start", student.model.state_dict(), hub_config=hub_config(student))
        asked += ["--init", str(tmp_path / "start")]
    caplog.set_level(logging.INFO, logger="deit_cli")
    invoke("train", "-c", str(path), *asked)
    assert ("positions are interpolated from 4x4 patches to 2x2" in caplog.text) == ("--init" in asked)
    updates = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "train" for line in updates) == 3
    assert {line["kind"] for line in updates} == {"train", "eval"}
