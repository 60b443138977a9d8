"""deit-cli: parse -> frozen config -> one call -> one-line errors. Nothing else."""

import dataclasses
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline.errors import DeitCliError, StoppedError, UsageError
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig, VerifyConfig
from pipeline.settings.options import (
    AS_JSON,
    LOG_JSON,
    SECONDS,
    ViewsType,
    chosen_recipe,
    config_option,
    options_of,
    recipe_fields,
    recipe_options,
    say_settings,
    split_values,
)
from trainer.config import TrainConfig
from trainer.console import ToStderr, say_counts, shown_progress

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
    """Run the command line; every error is one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _stop_once(Terminated))
    signal.signal(signal.SIGINT, _stop_once(KeyboardInterrupt))
    settings: dict[str, Any] = {}
    threading.excepthook = partial(_report_thread, settings)
    try:
        code = commands.main(prog_name="deit-cli", standalone_mode=False, obj=settings)
    except Terminated:
        click.echo(f"terminated{_continued(settings)}", err=True)
        code = 128 + signal.SIGTERM
    except StoppedError as error:
        click.echo(str(error), err=True)
        code = error.exit_code
    except DeitCliError as error:
        click.echo("error: " + str(error).replace("\n", "\\n"), err=True)  # a name may have such a character
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"stopped{_continued(settings)}", err=True)
        code = 130
    except Exception as error:  # nobody foresaw it
        from pipeline.crash import CRASHED

        click.echo(_reported(error, settings), err=True)
        code = CRASHED
    sys.exit(code)


CONTINUED = {"precompute", *(f"labels {name}" for name in ("push", "pull", "merge", "extend", "import", "export"))}


def _continued(settings: dict[str, Any]) -> str:
    """Return how a stopped command goes on, if it does."""
    command = settings.get("command", "").removeprefix("deit-cli ")
    if command == "train":
        return "; the same command continues, with --resume if a checkpoint was written"
    return "; the same command continues" if command in CONTINUED else ""


def _report_thread(settings: dict[str, Any], of_thread: threading.ExceptHookArgs) -> None:
    """Report what ended a thread, if nobody foresaw it; the command goes on."""
    if not issubclass(of_thread.exc_type, SystemExit):
        click.echo(_reported(of_thread.exc_value, settings), err=True)


def _reported(error: BaseException | None, settings: dict[str, Any]) -> str:
    """Write the report of an error that nobody foresaw, and return what to say of it."""
    from pipeline.crash import crash_of, save_report

    crash = crash_of(error or RuntimeError("unknown"))
    path = save_report(crash, sys.argv[1:], settings)
    kept = f"the report is in {path}" if path else "the report could not be written: no folder takes it"
    said = f"error: {crash.summary}. This is a fault of deit-cli, and {kept}: please send it with a bug report"
    return f"{crash.traceback}{said}" if log.isEnabledFor(logging.DEBUG) else said


class Command(click.Command):
    """A command that takes no empty text, and keeps what its options came to, for a report."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; an empty one is what a shell makes of a variable that is not set."""
        for before, argument in zip(["", *args], args, strict=False):
            if argument == "" or re.fullmatch(r"--[\w-]+=", argument):
                where = argument.removesuffix("=") or before
                raise UsageError(
                    f"{where or 'an argument'} has an empty value: is a variable not set? Leave it out, or give one"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if isinstance(ctx.obj, dict):
            ctx.obj |= {"command": ctx.command_path} | ctx.params
        return super().invoke(ctx)


class Group(click.Group):
    """A group of such commands, and of groups."""

    command_class = Command
    group_class = type


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="deit-cli")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
def commands(verbose: bool) -> None:
    """Distil a CNN into a vision transformer: run the teacher once, train DeiT students from its stored labels."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[ToStderr(every=verbose)])
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    click.get_current_context().call_on_close(say_counts)


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
    config, asked = split_values(values, PrecomputeConfig, TeacherConfig)
    chosen = chosen_recipe(recipe, overrides)
    say_settings(config, asked, recipe=chosen)
    from pipeline.stage1 import precompute as stage1
    from pipeline.stage1.engines import load_here
    from pipeline.stage1.precompute import plan_table

    with shown_progress(log_json) as progress:
        loaded, source = load_here(config, asked)
        if dry_run:
            done = plan_table(stage1.look_ahead(config, chosen, loaded, source))
        else:
            done = _labelled(config, stage1.precompute(config, chosen, loaded, source, progress=progress))
    click.echo(done)


def _labelled(config: PrecomputeConfig, label_set: Any) -> str:
    """Return what labelling came to."""
    if label_set is None:
        return f"{config.out}: this rank's label shards are complete; the rank that ends last seals the set"
    views = label_set.views
    return (
        f"{config.out}: views {views.start}:{views.stop} of {label_set.num_samples:,} images, sealed."
        f" Look: deit-cli labels show {config.out}"
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
    chosen = chosen_recipe(recipe, overrides) if recipe is not None or overrides or recipe_fields() else None
    from pipeline.machine.ranks import rank_from
    from trainer.loop import train as run
    from trainer.pace import Step, summary

    leads = rank_from(os.environ, arrays=False).rank == 0
    last: Step | None = None
    if not leads:  # of several ranks, one speaks
        log.setLevel(logging.WARNING)
    say_settings(config, recipe=chosen)

    with shown_progress(log_json if leads else None) as progress:

        def update(step: Step) -> None:
            nonlocal last
            last = step
            progress(step)

        folder = run(config, chosen, progress=update)
    if leads:
        click.echo(summary(folder, last, location=config.output))


@commands.command()
@click.option(
    "--checkpoint",
    help="Folder that a run exported (last, best), or a file of weights; path or URL.",
)
@click.option("--model", help="timm name, for a file of weights or --pretrained.")
@click.option("--pretrained", is_flag=True, help="timm's published weights.")
@click.option("--data", help="Labelled images: folder, tars or Parquet.")
@click.option(
    "--labels",
    help="Label set, folder or URL: also measure agreement with the teacher on its first view.",
)
@click.option("--labels-data", help="Images of the label set; by default where it found them.")
@click.option("--expect-manifest", metavar="sha256:HEX", help="Refuse --labels whose manifest has other bytes.")
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
    config, asked = split_values(values | {"out": "."}, PrecomputeConfig, TeacherConfig)
    chosen = chosen_recipe(recipe, overrides)
    from pipeline.cost import estimate as estimating
    from pipeline.cost.estimate import estimate_table
    from pipeline.cost.measuring import forward_flops, measure_rates, training_step_s
    from pipeline.labels.encoding import codec_of
    from pipeline.stage1.engines import load_here
    from pipeline.stage1.precompute import choose_topk
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
        bytes_per_label=codec_of(config.precision, classes, topk).label_bytes,
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
    config, asked = split_values(values | {"out": "."}, PrecomputeConfig, TeacherConfig)
    chosen = chosen_recipe(recipe, overrides)
    from pipeline.cost.estimate import pace, parts_table, plan_machine
    from pipeline.cost.measuring import measure_rates, measure_together
    from pipeline.stage1.engines import load_here
    from pipeline.stage1.precompute import choose_topk

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
    chosen = chosen_recipe(recipe, overrides) if recipe is not None or overrides or recipe_fields() else None
    from trainer.measuring import measure_training, stage2_table

    found = measure_training(config, chosen, seconds=seconds)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else stage2_table(found))


@commands.group()
def labels() -> None:
    """Look into a label set, make one larger (merge, extend), share it (push, pull, sign, card, export)."""


LABELS = click.argument("folder")  # or a URL
# What the plan of a set decides when it is extended, or `extend` asks for by itself.
FROM_PLAN = frozenset({"data", "out", "views", "topk", "precision", "views_per_shard", "include_images"})
EXPECT_MANIFEST = click.option(
    "--expect-manifest", metavar="sha256:HEX", help="Refuse a manifest of other bytes; `labels info` prints its hash."
)


@labels.command()
@LABELS
@EXPECT_MANIFEST
@AS_JSON
def info(folder: str, expect_manifest: str | None, as_json: bool) -> None:
    """Say what is inside: teacher, recipe, views, K, agreement, entropy, kept mass.

    \b
    Example:
      deit-cli labels info shards
    """
    from pipeline.labels.labelset import LabelSet
    from pipeline.labels.summary import info_table, summarise

    summary = summarise(LabelSet.open(folder, expect_manifest=expect_manifest))
    click.echo(json.dumps(summary, indent=1) if as_json else info_table(summary))


@labels.command()
@LABELS
@options_of(VerifyConfig)
@click.option(
    "--teacher", "--teacher-model", "teacher", multiple=True, help="Label random views again with it, and compare."
)
@options_of(TeacherConfig, skip=frozenset({"teacher", "compile"}))
@AS_JSON
def verify(folder: str, as_json: bool, **values: Any) -> None:
    """Look at every file, row, probe and image, and list all that is wrong with what repairs it.

    A URL is read anew, not from the cache. With --teacher the teacher is asked again for a random sample of views.

    \b
    Examples:
      deit-cli labels verify shards
      deit-cli labels verify shards --data imagenet/train --teacher regnety_160 --relabel 512
      deit-cli labels verify s3://bucket/shards --public-key team.pub --no-probes
    """
    (config,) = split_values(values, VerifyConfig)
    asked = split_values(values, TeacherConfig)[0] if values["teacher"] else None
    from pipeline.errors import LabelSetError
    from pipeline.verify.report import verify_lines
    from pipeline.verify.verify import verify as verify_set

    with shown_progress() as progress:
        report = verify_set(folder, config, asked, progress=progress)
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else verify_lines(report))
    if report.problems:
        raise LabelSetError(f"{folder}: {report.summary()}")


@labels.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--private-key", type=click.Path(path_type=Path), help="PEM of an elliptic curve; without it Sigstore is asked."
)
@click.option("--identity-token", help="Of Sigstore; by default the CI job's own, or a browser asks.")
def sign(folder: Path, private_key: Path | None, identity_token: str | None) -> None:
    """Sign the manifest, which holds the hash of every other file: writes manifest.json.sig beside it.

    \b
    Example:
      deit-cli labels sign shards --private-key team.pem
    """
    from pipeline.sharing.signing import sign as sign_set

    click.echo(str(sign_set(folder, private_key=private_key, identity_token=identity_token)))


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
    from pipeline.labels.labelset import LabelSet
    from pipeline.labels.sheet import contact_sheet

    label_set = LabelSet.open(folder)
    contact_sheet(label_set, label_set.open_source(data), out, samples=samples, views=views)
    click.echo(str(out))


WORKERS = click.option("-j", "--workers", type=click.IntRange(1, 256), default=8, help="Files that move at a time.")


@labels.command()
@LABELS
@click.argument("url", metavar="URL|FOLDER")
@WORKERS
def push(folder: str, url: str, workers: int) -> None:
    """Send a sealed label set to a bucket or another folder: what is missing there, checked by its hash.

    The same command continues what was cut. Views or source shards that are there already, of the same label set, stay,
    and what comes is added to them.

    \b
    Example:
      deit-cli labels push shards s3://bucket/shards
    """
    from pipeline.sharing.transfer import moved_line, push

    with shown_progress() as progress:
        moved = push(Path(folder), url, workers=workers, progress=progress)
    click.echo(moved_line(url, moved, "sent"))


@labels.command()
@click.argument("url", metavar="URL|FOLDER")
@LABELS
@click.option("--views", type=ViewsType(), help="Only these; whole blocks come.  [default: all]")
@click.option(
    "--shards", multiple=True, metavar="NAME", help="Only this source shard, or those of a pattern; repeatable."
)
@EXPECT_MANIFEST
@WORKERS
def pull(
    url: str,
    folder: str,
    views: tuple[int, int] | None,
    shards: tuple[str, ...],
    expect_manifest: str | None,
    workers: int,
) -> None:
    """Bring a label set, or a part of it, into a folder: what is missing there, checked by its hash.

    The same command continues what was cut, in the middle of a file too. A part is a label set of its own; more views or
    source shards may be pulled beside it later.

    \b
    Examples:
      deit-cli labels pull s3://bucket/shards shards
      deit-cli labels pull https://host/shards shards --views 0:100 --shards 'train-0000*'
    """
    from pipeline.labels.card import refresh_card
    from pipeline.labels.labelset import LabelSet
    from pipeline.sharing.transfer import moved_line, pull

    with shown_progress() as progress:
        moved = pull(
            url,
            Path(folder),
            views=views,
            shards=shards or None,
            expect_manifest=expect_manifest,
            workers=workers,
            progress=progress,
        )
    if views or shards or moved.found_files:  # the card that came is of the whole
        refresh_card(LabelSet.open(folder))
    click.echo(moved_line(folder, moved, "received"))


@labels.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("sets", nargs=-1, required=True, metavar="SET...")
def merge(out: Path, sets: tuple[str, ...]) -> None:
    """Make one label set of views or source shards that several machines made of one identity.

    Sets may be sealed, parts, or folders of ranks and stopped runs, which never were. What is complete is sealed; OUT may
    hold a set of the same identity, and grows. Nothing is overwritten, and the same command continues a killed one.

    \b
    Example:
      deit-cli labels merge shards machine-a/shards machine-b/shards
    """
    from pipeline.sharing.merging import merge as merge_sets
    from pipeline.sharing.merging import merged_lines

    with shown_progress() as progress:
        merged = merge_sets(out, sets, progress=progress)
    click.echo(merged_lines(out, merged))


@labels.command()
@LABELS
@click.option("--views", type=ViewsType(), required=True, help="View numbers START:STOP that the set is to have too.")
@click.option("--data", help="Images; by default the set's own, or where it found them.")
@click.option(
    "--teacher",
    "--teacher-model",
    "teacher",
    multiple=True,
    help="By default the set's, by its resolved name; pass the file or module of a teacher that has no public name.",
)
@options_of(PrecomputeConfig, skip=FROM_PLAN)
@options_of(TeacherConfig, skip=frozenset({"teacher"}))
@LOG_JSON
def extend(folder: str, views: tuple[int, int], data: str | None, log_json: Path | None, **values: Any) -> None:
    """Label more views of a set: recipe, teacher, K and precision are those of its plan. Another teacher is refused.

    \b
    Example:
      deit-cli labels extend shards --views 30:60
    """
    from pipeline.stage1.engines import load_here
    from pipeline.stage1.extending import extension
    from pipeline.stage1.precompute import precompute as stage1

    config, asked, recipe = extension(folder, values, data=data, views=views)
    with shown_progress(log_json) as progress:
        teacher, source = load_here(config, asked)
        label_set = stage1(config, recipe, teacher, source, progress=progress)
    click.echo(_labelled(config, label_set))


@labels.command(name="import")
@click.argument("kind", metavar="FORMAT", type=click.Choice(["fkd", "tinyvit"]))
@click.argument("path")
@click.argument("out")
@click.option("--num-classes", default=1000, help="The teacher's classes; every stored class is checked against it.")
@click.option("--topk", type=int, show_default="all that are stored", help="Classes to keep of each view.")
def import_(kind: Any, path: str, out: str, num_classes: int, topk: int | None) -> None:
    """Import published labels (FORMAT: fkd, tinyvit) into Parquet tables, and say what is lost.

    The tables can be read and compared; they are no label set, because their views cannot be replayed.

    \b
    Examples:
      deit-cli labels import fkd FKD_soft_label/imagenet/train fkd-labels
      deit-cli labels import tinyvit teacher_logits tinyvit-labels --num-classes 21841
    """
    from pipeline.exchange.import_record import import_table
    from pipeline.exchange.imports import import_labels

    with shown_progress() as progress:
        record = import_labels(kind, path, out, num_classes=num_classes, topk=topk, progress=progress)
    click.echo(import_table(record, out))


@commands.command()
@click.option(
    "--out",
    metavar="FOLDER|URL",
    help="Also look whether a place is fit to be written to: up to 256 MB are (8 MB to a URL), and deleted again.",
)
@click.option("--labels", metavar="FOLDER|URL", help="Also render the replay probes of a label set again.")
@click.option("--data", help="Images of --labels; by default where the label set found them.")
@AS_JSON
@click.pass_context
def doctor(context: click.Context, out: str | None, labels: str | None, data: str | None, as_json: bool) -> None:
    """Say what is wrong with this machine before a long run does: packages, GPUs, decoders, memory, limits, names.

    Exits with 0 where nothing is wrong, warnings apart, and with 1 where something is.

    \b
    Examples:
      deit-cli doctor
      deit-cli doctor --out /scratch/shards --labels shards --data imagenet/train
    """
    from pipeline.doctor.examine import examine
    from pipeline.doctor.findings import report_json, report_table, verdict

    if data is not None and labels is None:
        raise UsageError("--data names the images of --labels: pass that too")
    sections = examine(out=out, labels=labels, data=data)
    click.echo(json.dumps(report_json(sections), indent=1) if as_json else report_table(sections))
    context.exit(1 if verdict(sections)[0] else 0)


@labels.command()
@LABELS
@click.option("--license", "identifier", help="The Hub's identifier of the licence, such as cc-by-4.0, or other.")
@click.option("--license-name", help="Of a licence without identifier.")
@click.option("--license-link", help="Where it is to be read.")
@click.option("--replace", is_flag=True, help="Also a README.md that somebody has written or changed.")
def card(
    folder: str, identifier: str | None, license_name: str | None, license_link: str | None, replace: bool
) -> None:
    """Write the dataset card, README.md, anew: what the set holds, under which licence, how to load it.

    \b
    Example:
      deit-cli labels card shards --license cc-by-4.0
    """
    from pipeline.labels.card import CARD_NAME, Licence, write_card
    from pipeline.labels.labelset import LabelSet

    if identifier is None and (license_name or license_link):
        raise UsageError("--license-name and --license-link are of a --license: pass --license other as well")
    licence = Licence(identifier, license_name, license_link) if identifier else None
    if not write_card(LabelSet.open(folder), licence, replace=replace):
        raise UsageError(
            f"{folder}/{CARD_NAME} is not as deit-cli wrote it: pass --replace to write it anew all the same"
        )
    click.echo(f"{folder}/{CARD_NAME}")


@labels.command()
@LABELS
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", help="Images; by default the set's own, or those where it found them.")
@click.option("--views", type=ViewsType(), default=None, show_default="the first", help="Views START:STOP to export.")
@click.option(
    "--pixels",
    type=click.Choice(["views", "originals"]),
    default="views",
    help="Views as the teacher saw them, or the original files, which it saw only where the recipe changes nothing.",
)
@click.option(
    "--encoding",
    type=click.Choice(["png", "jpeg"]),
    default="png",
    help="Of views: png loses nothing but the rounding of mixup, jpeg (quality 95, 4:4:4) is smaller.",
)
@click.option("--format", "kind", type=click.Choice(["webdataset"]), default="webdataset", help="Of the export.")
@click.option(
    "-j", "--workers", "--num-workers", type=click.IntRange(0, 1024), help="Processes; by default one a core."
)
def export(
    folder: str,
    out: Path,
    data: str | None,
    views: tuple[int, int] | None,
    pixels: Any,
    encoding: Any,
    kind: str,
    workers: int | None,
) -> None:
    """Write images with the teacher's hard labels beside them, for timm and `datasets` as they are.

    \b
    Example:
      deit-cli labels export shards exported --views 0:10
    """
    from pipeline.exchange.export import ExportConfig, export_labels
    from pipeline.labels.labelset import LabelSet
    from pipeline.machine.threads import usable_cores

    config = ExportConfig(
        views=views, pixels=pixels, encoding=encoding, workers=usable_cores() if workers is None else workers
    )
    label_set = LabelSet.open(folder)
    with shown_progress() as progress:
        count = export_labels(label_set, label_set.open_source(data), out, config, progress=progress)
    click.echo(f"{out}: {count:,} images in {kind} tars")


@commands.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("deit-demo"),
    help="Folder for everything that the demo makes.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, order and stochastic depth.")
def demo(out: Path, seed: int) -> None:
    """Run the whole main job on scikit-learn's digits: about a minute on two cores, no download.

    \b
    Example:
      deit-cli demo
    """
    from pipeline.labels.sheet import contact_sheet
    from pipeline.stage1.precompute import precompute as stage1
    from pipeline.teacher.loading import load_teacher
    from trainer.demo import run_demo

    with shown_progress() as progress:
        table = run_demo(
            out,
            seed=seed,
            load_teacher=load_teacher,
            precompute=stage1,
            contact_sheet=contact_sheet,
            progress=progress,
        )
    click.echo(table)


if __name__ == "__main__":
    main()
