"""deit-cli: parse -> frozen config -> one call -> one-line errors. Nothing else."""

import dataclasses
import json
import logging
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pipeline.config import PrecomputeConfig, TeacherConfig
from pipeline.errors import DeitCliError, StoppedError, UsageError
from trainer.config import TrainConfig

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 110,
    "token_normalize_func": lambda token: token.replace("_", "-"),  # DeiT writes --output_dir, timm --output-dir
}
log = logging.getLogger("deit_cli")


class Terminated(BaseException):
    """SIGTERM: what a scheduler sends before it takes the machine away."""


def _stop_once(reason: type[BaseException]) -> Callable[..., None]:
    """Return a signal handler that begins the end; whoever is impatient does not disturb it."""

    def stop(*_: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise reason

    return stop


def main() -> None:
    """Run the command line; every expected error is one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _stop_once(Terminated))
    signal.signal(signal.SIGINT, _stop_once(KeyboardInterrupt))
    try:
        code = commands.main(standalone_mode=False)
    except Terminated:
        click.echo("terminated; the same command continues (train: with --resume)", err=True)
        code = 128 + signal.SIGTERM
    except StoppedError as error:
        click.echo(str(error), err=True)
        code = error.exit_code
    except DeitCliError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; the same command continues (train: with --resume)", err=True)
        code = 130
    sys.exit(code)


class ToStderr(logging.Handler):
    """Messages to whatever stderr is at the time: a progress bar takes its place for as long as it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        click.echo(self.format(record), err=True)


class ViewsType(click.ParamType):
    """START:STOP, or a number of views from 0."""

    name = "START:STOP"

    @staticmethod
    def text(views: tuple[int, int]) -> str:
        """Return how a user would write it."""
        return f"{views[0]}:{views[1]}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Turn the text into two numbers."""
        if isinstance(value, tuple):
            return value
        start, colon, stop = str(value).partition(":")
        try:
            return (int(start or 0), int(stop)) if colon else (0, int(start))
        except ValueError:
            self.fail(f"{value!r} is not START:STOP, such as 0:30", param, ctx)


class NumberOrAuto(click.ParamType):
    """A whole number, or `auto`."""

    name = "INTEGER|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Turn the text into a number, unless it is `auto`."""
        text = str(value).lower()
        try:
            return text if text == "auto" else int(text)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor auto", param, ctx)


def options_of(config: type, *, skip: frozenset[str] = frozenset()) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for every field of a config: its help, its type, its default."""
    hints = typing.get_type_hints(config)

    def decorate(command: Any) -> Any:
        for field in reversed(dataclasses.fields(config)):
            if field.name not in skip:
                command = _option(field, hints[field.name])(command)
        return command

    return decorate


def _option(field: dataclasses.Field[Any], hint: Any) -> Callable[[Any], Any]:
    flag = field.name.replace("_", "-")
    kind, repeats = _plain_type(hint)
    declaration = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    default: Any = field.default
    if _click_type(kind).__class__ is ViewsType and isinstance(default, tuple):
        default = ViewsType.text(default)
    known: dict[str, Any] = {"required": True} if default is dataclasses.MISSING else {"default": default}
    if (bare := field.metadata.get("bare")) is not None:
        known |= {"is_flag": False, "flag_value": bare}
    shown = default is not dataclasses.MISSING and default not in (None, False, ())
    return click.option(
        declaration,
        *field.metadata.get("flags", ()),
        field.name,
        type=None if kind is bool else _click_type(kind),
        help=field.metadata["help"],
        show_default=shown,
        multiple=repeats,
        **known,
    )


def _plain_type(hint: Any) -> tuple[Any, bool]:
    """Return the type of one value of a field, without its None, and whether the option repeats."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return (kinds[0] if len(kinds) == 1 else NumberOrAuto()), False
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        return typing.get_args(hint)[0], True
    return hint, False


def _click_type(kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        return click.Choice(typing.get_args(kind))
    if kind is Path:
        return click.Path(path_type=Path)
    return ViewsType() if typing.get_origin(kind) is tuple else kind


def recipe_options(command: Any) -> Any:
    """Add --recipe and --set."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Change a field of the recipe, such as img_size=32; repeatable.",
    )(command)
    return click.option(
        "--recipe", default=None, show_default="deit", help="deit, deit-384, crop-flip, none, or a YAML file."
    )(command)


LOG_JSON = click.option(
    "--log-json",
    type=click.Path(path_type=Path),
    help="Append messages and progress to this file, a JSON object a line.",
)


RECIPE_FIELDS = "deit_cli.recipe_fields"  # what a file of settings says under `set`, in the command's context


def config_option(*kinds: type) -> Callable[[Any], Any]:
    """Return a decorator that adds -c/--config: a file with the fields of these configs, under what is passed."""

    def read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        from pipeline.config_file import read_settings

        settings = read_settings(path, *kinds)
        context.meta[RECIPE_FIELDS] = {str(k).replace("-", "_"): v for k, v in settings.pop("set", {}).items()}
        context.default_map = settings

    return click.option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=read,
        help="Take these options from a YAML file (name: value); what is passed here goes before it.",
    )


def _recipe(name: str | None, overrides: tuple[str, ...]) -> Any:
    from pipeline.recipe import load_recipe, parse_override

    return load_recipe(name or "deit", _recipe_fields() | dict(parse_override(text) for text in overrides))


def _recipe_fields() -> dict[str, Any]:
    return click.get_current_context().meta.get(RECIPE_FIELDS, {})


def _say_settings(*configs: Any, recipe: Any) -> None:
    from pipeline.config_file import describe_settings

    changes = describe_settings(recipe) if recipe is not None else ""
    log.info("settings: %s%s", describe_settings(*configs), f"; recipe: {changes}" if changes else "")


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="deit-cli")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
def commands(verbose: bool) -> None:
    """Distil a CNN into a vision transformer: run the teacher once, train DeiT students from its stored labels."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[ToStderr()])
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


@commands.command()
@config_option(PrecomputeConfig, TeacherConfig)
@options_of(PrecomputeConfig)
@recipe_options
@options_of(TeacherConfig)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@LOG_JSON
def precompute(
    recipe: str | None, overrides: tuple[str, ...], dry_run: bool, log_json: Path | None, **values: Any
) -> None:
    """Run the teacher once: render numbered views, store its answers.

    \b
    Examples:
      deit-cli precompute --data imagenet/train --teacher regnety_160 --out shards --views 0:300
      torchrun --nproc-per-node 8 --no-python deit-cli precompute --data imagenet/train --out shards
    """
    config, asked = _split(values, PrecomputeConfig, TeacherConfig)
    chosen = _recipe(recipe, overrides)
    _say_settings(config, asked, recipe=chosen)
    from pipeline import precompute as stage1
    from pipeline.engines import load_here
    from pipeline.tables import plan_table

    with _progress(log_json) as progress:
        loaded, source = load_here(config, asked)
        if dry_run:
            click.echo(plan_table(stage1.plan_work(config, chosen, loaded, source)))
            return
        label_set = stage1.precompute(config, chosen, loaded, source, progress=progress)
    if label_set is None:
        click.echo(f"{config.out}: this rank's label shards are complete; the rank that ends last seals the set")
        return
    views = label_set.views
    click.echo(
        f"{label_set.folder}: views {views.start}:{views.stop} of {source.num_samples:,} images, sealed. Look: deit-cli labels show {label_set.folder}"
    )


def _split(values: dict[str, Any], *kinds: type) -> Any:
    """Make one config of each kind from the values of its own options."""
    return tuple(
        kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}) for kind in kinds
    )


@commands.command()
@config_option(TrainConfig)
@options_of(TrainConfig)
@recipe_options
@LOG_JSON
def train(recipe: str | None, overrides: tuple[str, ...], log_json: Path | None, **values: Any) -> None:
    """Train a student from stored labels; the teacher is never loaded.

    \b
    Examples:
      deit-cli train --labels shards --model deit-s --eval-data imagenet/val --output runs/deit-s
      deit-cli train -c configs/deit-s-distilled.yaml --output runs/deit-s
      deit-cli train --distillation-type none --data imagenet/train --model resnet50 --output runs/teacher
    """
    config = TrainConfig(**values)
    chosen = _recipe(recipe, overrides) if recipe is not None or overrides or _recipe_fields() else None
    from pipeline.ranks import rank_from
    from trainer.loop import train as run
    from trainer.pace import Step, summary

    leads = rank_from(os.environ, arrays=False).rank == 0
    last: Step | None = None
    if not leads:  # of several ranks, one speaks
        log.setLevel(logging.WARNING)
    _say_settings(config, recipe=chosen)

    with _progress(log_json if leads else None) as progress:

        def update(step: Step) -> None:
            nonlocal last
            last = step
            progress(step)

        folder = run(config, chosen, progress=update)
    if leads:
        click.echo(summary(folder, last))


@commands.command()
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Folder that a run exported (last, best), or a file of weights.",
)
@click.option("--model", help="timm name, for a file of weights or --pretrained.")
@click.option("--pretrained", is_flag=True, help="timm's published weights.")
@click.option("--data", help="Labelled images: folder, tars or Parquet.")
@click.option(
    "--labels",
    help="Label set, folder or URL: also measure agreement with the teacher on its first view.",
)
@click.option("--labels-data", help="Images of the label set; by default where it found them.")
@click.option(
    "--num-classes",
    type=click.IntRange(1),
    help="Classes of a file of weights; by default those of --data or --labels.",
)
@click.option(
    "--agreement-samples", type=click.IntRange(2), default=10_000, help="Views on which agreement is measured, at most."
)
@click.option("-b", "--batch-size", type=click.IntRange(1), default=256, help="Images in one forward pass.")
@click.option(
    "-j",
    "--workers",
    "--num-workers",
    type=click.IntRange(0, 1024),
    help="Loader processes; by default from the number of cores.",
)
@click.option(
    "--crop-pct", type=click.FloatRange(0.01, 1), help="Centre crop, share of the shorter side; by default the model's."
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto is cuda where there is one.")
@click.option(
    "--amp-dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Of the forward pass; auto is bfloat16 on CUDA.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(**values: Any) -> None:
    """Measure class head, distillation head and their fusions.

    \b
    Example:
      deit-cli evaluate --checkpoint runs/deit-s/best --data imagenet/val --labels shards
    """
    as_json = values.pop("as_json")
    if values["data"] is None and values["labels"] is None:
        raise UsageError("pass --data to measure accuracy, --labels to measure agreement with the teacher, or both")
    from trainer.evaluate import evaluate_checkpoint, score_table

    result = evaluate_checkpoint(**values)
    click.echo(json.dumps(result, indent=1) if as_json else score_table(result))


OF_PRECOMPUTE = frozenset(
    {"out", "engine", "address", "on_bad_image", "include_images", "min_teacher_accuracy", "accuracy_samples"}
)
SECONDS = click.option(
    "--seconds",
    type=click.FloatRange(0.1, 600),
    default=2.0,
    help="Spent on each measurement, about.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@commands.command()
@config_option(PrecomputeConfig, TeacherConfig)
@options_of(PrecomputeConfig, skip=OF_PRECOMPUTE)
@recipe_options
@options_of(TeacherConfig)
@click.option(
    "--images",
    type=click.IntRange(1),
    help="Of the whole set, where --data is a part of it; by default those of --data.",
)
@click.option("--students", type=click.IntRange(1), default=1, help="How many will learn from the labels.")
@click.option("--epochs", type=click.IntRange(1), default=300, help="Of each student.")
@click.option(
    "--model", default="deit_small_distilled_patch16_224", help="The students: timm name, or deit-ti, deit-s, deit-b."
)
@SECONDS
@AS_JSON
def estimate(
    recipe: str | None,
    overrides: tuple[str, ...],
    images: int | None,
    students: int,
    epochs: int,
    model: str,
    seconds: float,
    as_json: bool,
    **values: Any,
) -> None:
    """Say what labelling will cost here, and from how many students on it is cheaper than asking in every step.

    Teacher and rendering are timed on the first images: seven parts, about --seconds each, and on a GPU the student too.
    A slow teacher is asked for a few views only, so that this takes a minute at most on a free machine. Nothing is written.

    \b
    Example:
      deit-cli estimate --data imagenet/train --teacher regnety_160 --views 0:300 --students 5 --epochs 300
    """
    config, asked = _split(values | {"out": Path()}, PrecomputeConfig, TeacherConfig)
    chosen = _recipe(recipe, overrides)
    from pipeline import estimate as estimating
    from pipeline.engines import load_here
    from pipeline.labels import label_bytes
    from pipeline.measuring import forward_flops, measure_rates, training_step_s
    from pipeline.precompute import choose_topk
    from pipeline.tables import estimate_table
    from trainer.student import create_student

    teacher, source = load_here(config, asked)
    classes = teacher.identity.num_classes
    topk = choose_topk(config.topk, classes)
    student = create_student(model, num_classes=classes, img_size=chosen.img_size).model
    rates = measure_rates(source, chosen, teacher, topk=topk, precision=config.precision, least_s=seconds)
    by_time = teacher.device.type == "cuda"
    if by_time:
        teacher_cost, student_cost = rates.answer_s, training_step_s(student, chosen.img_size, teacher.device)
    else:  # forward and backward are three times the forward pass
        teacher_cost = sum(forward_flops(network.module, network.img_size) for network in teacher.networks)
        student_cost = 3.0 * forward_flops(student, chosen.img_size)
    machine = estimating.plan_machine(config, teacher)
    reachable = estimating.pace(rates, machine)
    asked_for = {
        "num_images": images or source.num_samples,
        "num_views": config.views[1] - config.views[0],
        "students": students,
        "epochs": epochs,
    }
    result = estimating.estimate(
        rates,
        reachable,
        **asked_for,
        views_per_decode=machine.views_per_decode,
        bytes_per_label=label_bytes(classes, topk, config.precision),
        teacher_s=teacher_cost,
        student_s=student_cost,
    )
    if as_json:
        measured = {"rates": dataclasses.asdict(rates), "compared_by": "time" if by_time else "FLOPs"}
        click.echo(
            json.dumps(asked_for | dataclasses.asdict(result) | dataclasses.asdict(machine) | measured, indent=1)
        )
    else:
        click.echo(estimate_table(result, asked_for, machine, rates, reachable, model))


@commands.group()
def bench() -> None:
    """Measure where the time goes on this machine."""


@bench.command()
@config_option(PrecomputeConfig, TeacherConfig)
@options_of(PrecomputeConfig, skip=OF_PRECOMPUTE)
@recipe_options
@options_of(TeacherConfig)
@click.option("--images", type=click.IntRange(2), default=512, help="Of the source, at most, for the run of all parts.")
@SECONDS
@AS_JSON
def stage1(
    recipe: str | None,
    overrides: tuple[str, ...],
    images: int,
    seconds: float,
    as_json: bool,
    **values: Any,
) -> None:
    """Time each part of precompute alone, then all of them together.

    Seven parts take about --seconds each; then all run together for five times as long, into a temporary folder. With a
    slow teacher fewer images at a time are taken, so that it does not take much longer.

    \b
    Example:
      deit-cli bench stage1 --data imagenet/train --teacher regnety_160
    """
    config, asked = _split(values | {"out": Path()}, PrecomputeConfig, TeacherConfig)
    chosen = _recipe(recipe, overrides)
    from pipeline.engines import load_here
    from pipeline.estimate import pace, plan_machine
    from pipeline.measuring import measure_rates, measure_together
    from pipeline.precompute import choose_topk
    from pipeline.tables import parts_table

    teacher, source = load_here(config, asked)
    topk = choose_topk(config.topk, teacher.identity.num_classes)
    rates = measure_rates(source, chosen, teacher, topk=topk, precision=config.precision, least_s=seconds)
    images = min(images, max(2, int(0.5 / rates.answer_s)))  # so that an answer comes at least twice a second
    together = measure_together(source, chosen, teacher, config, num_images=images, seconds=5 * seconds)
    machine = plan_machine(config, teacher)
    reachable = pace(rates, machine)
    if as_json:
        both = {"parts": dataclasses.asdict(rates), "together": dataclasses.asdict(together)}
        both["together"]["per_second"] = together.per_second
        best = {"teacher": reachable.teacher, "rendering": reachable.rendering, "cores": reachable.cores}
        click.echo(
            json.dumps(both | {"reachable": best, "limit": reachable.limit} | dataclasses.asdict(machine), indent=1)
        )
    else:
        click.echo(parts_table(rates, together, machine, reachable))


OF_TRAIN = frozenset(
    {
        *(
            "output",
            "resume",
            "epochs",
            "lr",
            "lr_base",
            "warmup_epochs",
            "warmup_lr",
            "min_lr",
            "weight_decay",
            "seed",
        ),
        *("distillation_alpha", "distillation_tau", "smoothing", "view_policy", "model_ema_decay", "model_ema_warmup"),
        *("eval_data", "crop_pct", "eval_interval", "checkpoint_interval", "recovery_interval", "log_interval"),
        *("log_tensorboard", "log_wandb", "wandb_project"),
    }
)


@bench.command()
@config_option(TrainConfig)
@options_of(TrainConfig, skip=OF_TRAIN)
@recipe_options
@SECONDS
@AS_JSON
def stage2(recipe: str | None, overrides: tuple[str, ...], seconds: float, as_json: bool, **values: Any) -> None:
    """Time the student alone, the loader processes alone, and training with both.

    The student, the stream of batches and each part of it take about --seconds each, warm-up excluded; then the training loop
    runs for five times as long, into a temporary folder. An update of a big batch may take longer than that on a CPU: pass
    a smaller --batch-size there.

    \b
    Example:
      deit-cli bench stage2 --labels shards --model deit-s
    """
    config = TrainConfig(**values)
    chosen = _recipe(recipe, overrides) if recipe is not None or overrides or _recipe_fields() else None
    from trainer.measuring import measure_training, stage2_table

    found = measure_training(config, chosen, seconds=seconds)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else stage2_table(found))


@commands.group()
def labels() -> None:
    """Look into a label set: info, verify, show."""


LABELS = click.argument("folder")  # or a URL


@labels.command()
@LABELS
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def info(folder: str, as_json: bool) -> None:
    """Say what is inside: teacher, recipe, views, K, agreement, entropy, kept mass.

    \b
    Example:
      deit-cli labels info shards
    """
    from pipeline.inspection import summarise
    from pipeline.labelset import LabelSet
    from pipeline.tables import info_table

    summary = summarise(LabelSet.open(folder))
    click.echo(json.dumps(summary, indent=1) if as_json else info_table(summary))


@labels.command()
@LABELS
@click.option("--data", help="Images; by default where the label set found them.")
@click.option("--probes/--no-probes", default=True, help="Also render the replay probes again (needs the images).")
def verify(folder: str, data: str | None, probes: bool) -> None:
    """Check every hash and every row, and render the replay probes again.

    \b
    Example:
      deit-cli labels verify shards
    """
    from pipeline.errors import LabelSetCorrupt
    from pipeline.labelset import LabelSet
    from pipeline.replay import check_replay

    label_set = LabelSet.open(folder)
    problems = label_set.verify()
    for problem in problems:
        click.echo(problem)
    if problems:
        raise LabelSetCorrupt(
            f"{folder}: {len(problems)} of {len(label_set.manifest.files)} files are not as the manifest promises"
        )
    click.echo(f"{len(label_set.manifest.files)} files: lengths, hashes, schemas and rows are as promised")
    if probes:
        difference = check_replay(label_set, label_set.open_source(data))
        exact = "every pixel equal" if not difference else f"mean difference up to {difference:.3f} of 255"
        click.echo(f"{len(label_set.manifest.probes)} replay probes rendered again: {exact}")


@labels.command()
@LABELS
@click.option("--data", help="Images; by default where the label set found them.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("labels.png"), help="PNG to write.")
@click.option("--samples", type=click.IntRange(1, 64), default=4, help="Samples, one in each line.")
@click.option("--views", type=click.IntRange(1, 64), default=6, help="Views of each sample.")
def show(folder: str, data: str | None, out: Path, samples: int, views: int) -> None:
    """Draw a contact sheet: mixed views as the teacher saw them, class labels, its top five.

    \b
    Example:
      deit-cli labels show shards --out labels.png
    """
    from pipeline.inspection import contact_sheet
    from pipeline.labelset import LabelSet

    label_set = LabelSet.open(folder)
    contact_sheet(label_set, label_set.open_source(data), out, samples=samples, views=views)
    click.echo(str(out))


@commands.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("deit-demo"),
    help="Folder for everything that the demo makes.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, order and stochastic depth.")
def demo(out: Path, seed: int) -> None:
    """Run the whole main job on scikit-learn's digits: about two minutes on two cores, no download.

    \b
    Example:
      deit-cli demo
    """
    from pipeline.inspection import contact_sheet
    from pipeline.precompute import precompute as stage1
    from pipeline.teacher_loading import load_teacher
    from trainer.demo import run_demo

    with _progress() as progress:
        click.echo(
            run_demo(
                out,
                seed=seed,
                load_teacher=load_teacher,
                precompute=stage1,
                contact_sheet=contact_sheet,
                progress=progress,
            )
        )


@contextmanager
def _progress(log_json: Path | None = None) -> Iterator[Callable[[Any], None]]:
    """Show a bar on a terminal, elsewhere a log line now and then; and write a JSON log where one is asked for."""
    from pipeline.progress import json_log

    with _bar() if sys.stderr.isatty() else _lines() as show, json_log(log_json) as write:

        def update(tick: Any) -> None:
            show(tick)
            write(tick)

        yield update


@contextmanager
def _lines() -> Iterator[Callable[[Any], None]]:
    from pipeline.progress import now_and_then, say
    from trainer import pace

    say_step = pace.now_and_then()
    with now_and_then(say, every_s=60) as say_tick:
        yield lambda tick: say_step(tick) if isinstance(tick, pace.Step) else say_tick(tick)


@contextmanager
def _bar() -> Iterator[Callable[[Any], None]]:
    from rich import progress as bars
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from pipeline.progress import state
    from trainer import pace

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=None),
        bars.TextColumn("{task.fields[count]}", style="progress.download"),
        bars.TextColumn("{task.fields[left]}"),
    )
    rows = bars.Progress(*columns, expand=True)
    live = Live(rows, console=Console(stderr=True), transient=True)
    tasks: dict[str, bars.TaskID] = {}

    def update(tick: Any) -> None:
        if tick.phase not in tasks:
            tasks[tick.phase] = rows.add_task(tick.phase, count="", left="")
        shown: dict[str, Any] = {"count": f"{tick.done:,}/{tick.total:,}"}
        if isinstance(tick, pace.Step):
            done = f"{100 * tick.done // tick.total} %"
            shown = {"description": pace.place(tick), "count": done, "left": pace.left(tick)}
        below = pace.state(tick) if isinstance(tick, pace.Step) else state(tick)
        rows.update(tasks[tick.phase], completed=tick.done, total=tick.total, **shown)
        live.update(Group(rows, Text(below)))
        live.start()  # only now: before it there may be questions to the user

    try:
        yield update
    finally:
        live.stop()


if __name__ == "__main__":
    main()
