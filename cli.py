"""deit-cli: parse -> frozen config -> one call -> one-line errors. Nothing else."""

import dataclasses
import json
import logging
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pipeline.config import PrecomputeConfig
from pipeline.errors import DeitCliError, UsageError
from trainer.config import TrainConfig

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 110,
    "token_normalize_func": lambda token: token.replace("_", "-"),  # DeiT writes --output_dir, timm --output-dir
}
log = logging.getLogger("deit_cli")


def main() -> None:
    """Run the command line; every expected error is one line on stderr and an exit code."""
    try:
        code = commands.main(standalone_mode=False)
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


class ViewsType(click.ParamType):
    """START:STOP, or a number of views from 0."""

    name = "START:STOP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Turn the text into two numbers."""
        if isinstance(value, tuple):
            return value
        start, colon, stop = str(value).partition(":")
        try:
            return (int(start or 0), int(stop)) if colon else (0, int(start))
        except ValueError:
            self.fail(f"{value!r} is not START:STOP, such as 0:30", param, ctx)


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
    kind = _plain_type(hint)
    declaration = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    default = ":".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    known: dict[str, Any] = {"required": True} if default is dataclasses.MISSING else {"default": default}
    return click.option(
        declaration,
        *field.metadata.get("flags", ()),
        field.name,
        type=None if kind is bool else _click_type(kind),
        help=field.metadata["help"],
        show_default=default is not dataclasses.MISSING and default is not None and default is not False,
        **known,
    )


def _plain_type(hint: Any) -> Any:
    """Return the type of an optional field."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


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


def _recipe(name: str | None, overrides: tuple[str, ...]) -> Any:
    from pipeline.recipe import load_recipe, parse_override

    return load_recipe(name or "deit", dict(parse_override(text) for text in overrides))


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="deit-cli")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
def commands(verbose: bool) -> None:
    """Distil a CNN into a vision transformer: run the teacher once, train DeiT students from its stored labels."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


@commands.command()
@options_of(PrecomputeConfig)
@recipe_options
@click.option(
    "--teacher",
    "--teacher-model",
    default="regnety_160",
    help="timm or hf-hub: name, exported folder, or module:function.",
)
@click.option(
    "--teacher-checkpoint",
    "--teacher-path",
    type=click.Path(path_type=Path),
    help="Weights of the teacher: safetensors or a state dict.",
)
@click.option("--pretrained/--no-pretrained", default=True, help="Published weights, or random ones for a trial.")
@click.option(
    "--teacher-img-size",
    type=click.IntRange(1, 4096),
    help="Pixels that the teacher sees; by default its configuration's.",
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto is cuda where there is one.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Of the teacher's forward pass; auto is bfloat16 on CUDA.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
def precompute(
    recipe: str | None,
    overrides: tuple[str, ...],
    teacher: str,
    teacher_checkpoint: Path | None,
    pretrained: bool,
    teacher_img_size: int | None,
    device: str,
    dtype: typing.Any,
    dry_run: bool,
    **values: Any,
) -> None:
    """Run the teacher once: render numbered views, store its answers.

    \b
    Example:
      deit-cli precompute --data imagenet/train --teacher regnety_160 --out shards --views 0:300
    """
    config = PrecomputeConfig(**values)
    chosen = _recipe(recipe, overrides)
    from pipeline import precompute as stage1
    from pipeline.devices import resolve_device
    from pipeline.sources import open_source
    from pipeline.teacher import load_teacher

    source = open_source(config.data)
    log.info("source %s", source.describe())
    loaded = load_teacher(
        teacher,
        checkpoint=teacher_checkpoint,
        pretrained=pretrained,
        num_classes=source.num_classes,
        img_size=teacher_img_size,
        device=str(resolve_device(device)),
        dtype=dtype,
    )
    identity = loaded.identity
    log.info(
        "teacher %s: %d classes, sees %d px, weights %s",
        identity.name,
        identity.num_classes,
        identity.img_size,
        identity.weights_sha256[:12],
    )
    if dry_run:
        work = stage1.plan_work(config, chosen, loaded, source)
        _print_plan(work)
        return
    with _progress() as progress:
        label_set = stage1.precompute(config, chosen, loaded, source, progress=progress)
    views = label_set.views
    click.echo(
        f"{label_set.folder}: views {views.start}:{views.stop} of {source.num_samples:,} images, sealed. Look: deit-cli labels show {label_set.folder}"
    )


def _print_plan(work: Any) -> None:
    plan = work.plan
    click.echo(f"label set      {plan.labelset_id[:12]} (recipe {plan.recipe_id[:12]}, teacher {plan.teacher.name})")
    click.echo(f"source         {len(plan.source.shards):,} shards, {work.num_samples:,} images")
    click.echo(f"views          {work.views_to_label:,} to label, in {len(work.blocks)} blocks")
    click.echo(f"teacher passes {work.teacher_passes:,}")
    click.echo(f"label bytes    at most {work.bytes_before_compression:,} before compression")


@commands.command()
@options_of(TrainConfig)
@recipe_options
def train(recipe: str | None, overrides: tuple[str, ...], **values: Any) -> None:
    """Train a student from stored labels; the teacher is never loaded.

    \b
    Examples:
      deit-cli train --labels shards --model deit-s --eval-data imagenet/val --output runs/deit-s
      deit-cli train --distillation-type none --data imagenet/train --model resnet50 --output runs/teacher
    """
    config = TrainConfig(**values)
    chosen = _recipe(recipe, overrides) if recipe is not None or overrides else None
    from trainer.loop import train as run

    folder = run(config, chosen)
    click.echo(
        f"{folder}: trained. Weights in {folder / 'last'}"
        + (f", the best in {folder / 'best'}" if config.eval_data else "")
    )


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
    type=click.Path(path_type=Path),
    help="Label set: also measure agreement with the teacher on its first view.",
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
    from trainer.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(**values)
    click.echo(json.dumps(result, indent=1) if as_json else _score_table(result))


def _score_table(result: dict[str, Any]) -> str:
    lines = [f"{'':20}{'top-1':>8}{'top-5':>8}{'agrees':>8}"]
    for name in [*(result.get("scores") or result["agreement"])]:
        scores = (result.get("scores") or {}).get(name, {})
        cells = [scores.get("top1"), scores.get("top5"), (result.get("agreement") or {}).get(name)]
        lines.append(f"{name:20}" + "".join(f"{'-' if cell is None else f'{cell:.2f}':>8}" for cell in cells))
    if "images" in result:
        lines.append(f"accuracy in % of {result['images']:,} images")
    if "agreement_views" in result:
        lines.append(f"agreement with the teacher in % of {result['agreement_views']:,} replayed views")
    return "\n".join(lines)


@commands.group()
def labels() -> None:
    """Look into a label set: info, verify, show."""


LABELS = click.argument("folder", type=click.Path(path_type=Path))


@labels.command()
@LABELS
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def info(folder: Path, as_json: bool) -> None:
    """Say what is inside: teacher, recipe, views, K, agreement, entropy, kept mass.

    \b
    Example:
      deit-cli labels info shards
    """
    from pipeline.inspection import summarise
    from pipeline.labelset import LabelSet

    summary = summarise(LabelSet.open(folder))
    click.echo(json.dumps(summary, indent=1) if as_json else _info_table(summary))


def _info_table(summary: dict[str, Any]) -> str:
    teacher, source, recipe = summary["teacher"], summary["source"], summary["recipe"]
    hit, entropy, kept = (summary[name] for name in ("hard_is_class_label_pct", "mean_entropy_nats", "mean_kept_mass"))
    first, stop = summary["views"]
    rows = [
        ("label set", f"{summary['labelset_id'][:12]}, {'sealed' if summary['sealed'] else 'not sealed'}"),
        (
            "teacher",
            f"{teacher['name']}, weights {teacher['weights_sha256'][:12]}, {teacher['num_classes']} classes, {teacher['img_size']} px",
        ),
        ("recipe", f"{summary['recipe_id'][:12]}: " + ", ".join(f"{k} {v}" for k, v in sorted(recipe.items()))),
        (
            "source",
            f"{source['kind']} {source['location']}: {source['images']:,} images in {source['shards']} shards, {source['unlabelled']:,} unlabelled",
        ),
        (
            "bad images",
            f"{len(source['bad'])} left out" + "".join(f"\n               {line}" for line in source["bad"][:20]),
        ),
        ("views", f"{first}:{stop}"),
        (
            "stored",
            f"K = {summary['topk']}, {summary['precision']}, {summary['labels']:,} labels, {summary['bytes_per_label']:.1f} bytes each",
        ),
        ("agreement", "-" if hit is None else f"{hit:.1f} %: hard label is the class label of the larger part"),
        ("entropy", "-" if entropy is None else f"{entropy:.3f} nats (tail spread evenly)"),
        ("kept mass", "-" if kept is None else f"{kept:.4f}"),
        ("made with", "; ".join(", ".join(f"{k} {v}" for k, v in sorted(e.items())) for e in summary["environments"])),
    ]
    looked = f"agreement, entropy and kept mass over {summary['labels_looked_at']:,} labels"
    return "\n".join(f"{name:15}{text}" for name, text in rows) + f"\n{'':15}{looked}"


@labels.command()
@LABELS
@click.option("--data", help="Images; by default where the label set found them.")
@click.option("--probes/--no-probes", default=True, help="Also render the replay probes again (needs the images).")
def verify(folder: Path, data: str | None, probes: bool) -> None:
    """Check every hash and every row, and render the replay probes again.

    \b
    Example:
      deit-cli labels verify shards
    """
    from pipeline.errors import LabelSetCorrupt
    from pipeline.labelset import LabelSet
    from pipeline.replay import check_replay
    from pipeline.sources import open_source

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
        difference = check_replay(label_set, open_source(data or label_set.plan.source.location))
        exact = "every pixel equal" if not difference else f"mean difference up to {difference:.3f} of 255"
        click.echo(f"{len(label_set.manifest.probes)} replay probes rendered again: {exact}")


@labels.command()
@LABELS
@click.option("--data", help="Images; by default where the label set found them.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("labels.png"), help="PNG to write.")
@click.option("--samples", type=click.IntRange(1, 64), default=4, help="Samples, one in each line.")
@click.option("--views", type=click.IntRange(1, 64), default=6, help="Views of each sample.")
def show(folder: Path, data: str | None, out: Path, samples: int, views: int) -> None:
    """Draw a contact sheet: mixed views as the teacher saw them, class labels, its top five.

    \b
    Example:
      deit-cli labels show shards --out labels.png
    """
    from pipeline.inspection import contact_sheet
    from pipeline.labelset import LabelSet
    from pipeline.sources import open_source

    label_set = LabelSet.open(folder)
    contact_sheet(label_set, open_source(data or label_set.plan.source.location), out, samples=samples, views=views)
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
    """Run the whole main job on scikit-learn's digits: about three minutes on two cores, no download.

    \b
    Example:
      deit-cli demo
    """
    from pipeline.inspection import contact_sheet
    from pipeline.precompute import precompute as stage1
    from pipeline.teacher import load_teacher
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
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar with rate and time left on a terminal; elsewhere a log line now and then."""
    if sys.stderr.isatty():
        yield from _bar()
    else:
        yield _lines()


def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        tasks: dict[str, bars.TaskID] = {}

        def update(phase: str, done: int, total: int) -> None:
            task = (
                tasks.setdefault(phase, shown.add_task(phase, total=total, rate=""))
                if phase not in tasks
                else tasks[phase]
            )
            speed = shown.tasks[task].speed
            shown.update(task, completed=done, total=total, rate=f"{speed:,.0f}/s" if speed else "")

        yield update


def _lines(every_s: float = 10.0) -> Callable[[str, int, int], None]:
    import time

    started: dict[str, float] = {}
    said: dict[str, float] = {}

    def update(phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun = started.setdefault(phase, now)
        if done < total and now - said.setdefault(phase, now) < every_s:
            return
        said[phase] = now
        rate = done / max(now - begun, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if done < total else ""
        log.info("%s %s of %s%s", phase, f"{done:,}", f"{total:,}", f", {rate:,.0f}/s{left}" if now > begun else "")

    return update


if __name__ == "__main__":
    main()
