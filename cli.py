"""deit-cli: parse -> frozen config -> one call -> one-line errors. Nothing else."""

import json
import logging
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

import click

from pipeline.errors import LabelSetError, UsageError
from pipeline.settings import program
from pipeline.settings.configs import (
    BenchConfig,
    EstimateConfig,
    ExportConfig,
    PrecomputeConfig,
    TeacherConfig,
    TimingConfig,
    VerifyConfig,
)
from pipeline.settings.options import (
    AS_JSON,
    LOG_JSON,
    ViewsType,
    asked_recipe,
    chosen_recipe,
    config_option,
    options_of,
    plain_option,
    recipe_options,
    say_settings,
    split_values,
)
from pipeline.settings.program import CONTINUES
from trainer.config import EvaluateConfig, TrainConfig
from trainer.console import ToStderr, say_counts, shown_progress

log = logging.getLogger("deit_cli")


def main() -> None:
    """Run the command line; every error is one line on stderr and an exit code."""
    program.run(commands)


@click.group(cls=program.Group, context_settings=program.CONTEXT)
@click.version_option(package_name="deit-cli")
@click.option("-v", "--verbose", is_flag=True, help="Show all messages, and the traceback of an unforeseen error.")
def commands(verbose: bool) -> None:
    """Distil a CNN into a vision transformer: run the teacher once, train DeiT students from its stored labels."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[ToStderr(every=verbose)])
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    click.get_current_context().call_on_close(say_counts)


@commands.command(continues=CONTINUES)
@config_option(PrecomputeConfig, TeacherConfig)
@options_of(TeacherConfig)
@options_of(PrecomputeConfig)
@recipe_options
@plain_option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.", group="Run")
@LOG_JSON
def precompute(dry_run: bool, log_json: Path | None, **values: Any) -> None:
    """Run the teacher once: render numbered views, and store its answers.

    \b
    Examples:
      deit-cli precompute --data imagenet/train --teacher regnety_160 --out shards --views 0:300
      torchrun --nproc-per-node 8 --no-python deit-cli precompute --data imagenet/train --out shards
    """
    config, teacher = split_values(values, PrecomputeConfig, TeacherConfig)
    recipe = chosen_recipe(values)
    say_settings(config, teacher, recipe=recipe)
    from pipeline.stage1.engines import load_here
    from pipeline.stage1.precompute import ended_line, look_ahead
    from pipeline.stage1.precompute import precompute as label

    with shown_progress(log_json) as progress:
        loaded, source = load_here(config, teacher)
        if dry_run:
            done = look_ahead(config, recipe, loaded, source).table()
        else:
            done = ended_line(config, label(config, recipe, loaded, source, progress=progress))
    click.echo(done)


@commands.command(continues=f"{CONTINUES}, with --resume if a checkpoint was written")
@config_option(TrainConfig)
@options_of(TrainConfig)
@recipe_options
@LOG_JSON
def train(log_json: Path | None, **values: Any) -> None:
    """Train a student from stored labels; the teacher is never loaded.

    \b
    Examples:
      deit-cli train --labels shards --model deit-s --eval-data imagenet/val --output runs/deit-s
      deit-cli train -c configs/deit-s-distilled.yaml --output runs/deit-s
      deit-cli train --distillation-type none --data imagenet/train --model resnet50 --output runs/teacher
    """
    (config,) = split_values(values, TrainConfig)
    recipe = asked_recipe(values)
    from pipeline.machine.ranks import rank_from
    from trainer.loop import train as run
    from trainer.pace import summary

    leads = rank_from(os.environ, arrays=False).rank == 0
    if not leads:  # only one of several ranks prints
        log.setLevel(logging.WARNING)
    say_settings(config, recipe=recipe)
    with shown_progress(log_json if leads else None) as progress:
        folder = run(config, recipe, progress=progress)
    if leads:
        click.echo(summary(folder, progress.last, location=config.output))


@commands.command()
@config_option(EvaluateConfig)
@options_of(EvaluateConfig)
@AS_JSON
def evaluate(as_json: bool, **values: Any) -> None:
    """Measure how accurate a student is, and how often it agrees with the teacher.

    Class head, distillation head and the fusions of both are measured, each by itself.

    \b
    Example:
      deit-cli evaluate --checkpoint runs/deit-s/best --data imagenet/val --labels shards
    """
    config = EvaluateConfig(**values)
    from trainer.evaluate import evaluate_checkpoint, score_table

    result = evaluate_checkpoint(config)
    click.echo(json.dumps(result, indent=1) if as_json else score_table(result))


@commands.command()
@config_option(PrecomputeConfig, TeacherConfig)
@options_of(TeacherConfig)
@options_of(PrecomputeConfig, where=attrgetter("timed"))
@recipe_options
@options_of(EstimateConfig)
@AS_JSON
def estimate(as_json: bool, **values: Any) -> None:
    """Estimate what labelling costs on this machine, and for how many students it pays off.

    Teacher and rendering are timed on the first images, in seven parts of about --seconds each; on a GPU the student is
    timed, too. A slow teacher labels only a few views, so that this takes a minute at most on a free machine. Nothing is
    written.

    \b
    Example:
      deit-cli estimate --data imagenet/train --teacher regnety_160 --views 0:300 --students 5 --epochs 300
    """
    config, teacher, asked = split_values(values | {"out": "."}, PrecomputeConfig, TeacherConfig, EstimateConfig)
    recipe = chosen_recipe(values)
    from pipeline.cost.estimate import estimate_labelling
    from trainer.student import create_student

    found = estimate_labelling(config, teacher, recipe, asked, create_student=create_student)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.table())


@commands.group()
def bench() -> None:
    """Measure where the time goes on this machine."""


@bench.command()
@config_option(PrecomputeConfig, TeacherConfig)
@options_of(TeacherConfig)
@options_of(PrecomputeConfig, where=attrgetter("timed"))
@recipe_options
@options_of(BenchConfig)
@AS_JSON
def stage1(as_json: bool, **values: Any) -> None:
    """Time each part of precompute alone, then all of them together.

    The seven parts take about --seconds each. Then all of them run together for five times as long, into a temporary
    folder. A slow teacher gets fewer images at a time, so that this does not take much longer.

    \b
    Example:
      deit-cli bench stage1 --data imagenet/train --teacher regnety_160
    """
    config, teacher, asked = split_values(values | {"out": "."}, PrecomputeConfig, TeacherConfig, BenchConfig)
    recipe = chosen_recipe(values)
    from pipeline.cost.bench import bench_labelling

    found = bench_labelling(config, teacher, recipe, asked)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.table())


@bench.command()
@config_option(TrainConfig)
@options_of(TrainConfig, where=attrgetter("timed"))
@recipe_options
@options_of(TimingConfig)
@AS_JSON
def stage2(as_json: bool, **values: Any) -> None:
    """Time the student alone, the loader processes alone, and training with both.

    The student, the stream of batches and each part of it take about --seconds each, without warm-up. Then the training
    loop runs for five times as long, into a temporary folder. An update of a large batch may take longer than that on a
    CPU: pass a smaller --batch-size there.

    \b
    Example:
      deit-cli bench stage2 --labels shards --model deit-s
    """
    config, timing = split_values(values, TrainConfig, TimingConfig)
    recipe = asked_recipe(values)
    from trainer.bench import bench_training

    found = bench_training(config, recipe, seconds=timing.seconds)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.table())


@commands.group()
def labels() -> None:
    """Inspect, extend and share label sets."""


LABELS = click.argument("folder")  # or a URL
EXPECT_MANIFEST = plain_option(
    "--expect-manifest",
    metavar="sha256:HEX",
    help="Pin of the manifest, as `labels info` prints it; any other manifest is refused.",
    group="Data",
)
WORKERS = plain_option(
    "-j",
    "--workers",
    type=click.IntRange(1, 256),
    default=8,
    help="Number of files that are moved at the same time.",
    group="Run",
)


@labels.command()
@LABELS
@EXPECT_MANIFEST
@AS_JSON
def info(folder: str, expect_manifest: str | None, as_json: bool) -> None:
    """Show what a label set holds: teacher, recipe, views, K, agreement, entropy, kept mass.

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
@plain_option(
    "--teacher",
    "--teacher-model",
    "teacher",
    multiple=True,
    help="Teacher that labels random views again, to compare its answers with the stored ones.",
    group="Teacher",
)
@options_of(TeacherConfig, where=lambda setting: setting.name not in ("teacher", "compile"))
@options_of(VerifyConfig)
@AS_JSON
def verify(folder: str, as_json: bool, **values: Any) -> None:
    """Check every file, row, probe and image of a label set, and say how to repair what is wrong.

    Files behind a URL are read anew, not from the cache. With --teacher, the teacher labels a random sample of views again.

    \b
    Examples:
      deit-cli labels verify shards
      deit-cli labels verify shards --data imagenet/train --teacher regnety_160 --relabel 512
      deit-cli labels verify s3://bucket/shards --public-key team.pub --no-probes
    """
    (config,) = split_values(values, VerifyConfig)
    teacher = split_values(values, TeacherConfig)[0] if values["teacher"] else None
    from pipeline.verify.report import verify_lines
    from pipeline.verify.verify import verify as verify_set

    with shown_progress() as progress:
        report = verify_set(folder, config, teacher, progress=progress)
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else verify_lines(report))
    if report.problems:
        raise LabelSetError(f"{folder}: {report.summary()}")


@labels.command()
@click.argument("folder", type=click.Path(path_type=Path))
@plain_option(
    "--private-key",
    type=click.Path(path_type=Path),
    help="PEM file of an elliptic-curve key; without one, Sigstore signs.",
    group="Data",
)
@plain_option(
    "--identity-token",
    help="Token that tells Sigstore who signs; by default that of the CI job, or a browser asks.",
    group="Data",
)
def sign(folder: Path, private_key: Path | None, identity_token: str | None) -> None:
    """Sign the manifest of a label set, which holds the hash of every other file.

    The signature is written to manifest.json.sig, beside the manifest.

    \b
    Example:
      deit-cli labels sign shards --private-key team.pem
    """
    from pipeline.sharing.signing import sign as sign_set

    click.echo(str(sign_set(folder, private_key=private_key, identity_token=identity_token)))


@labels.command()
@LABELS
@plain_option("--data", help="Images; by default where the label set found them.", group="Data")
@plain_option(
    "--out", type=click.Path(path_type=Path), default=Path("labels.png"), help="PNG file to write.", group="Data"
)
@plain_option(
    "--samples", type=click.IntRange(1, 64), default=4, help="Number of samples, each in its own line.", group="Data"
)
@plain_option("--views", type=click.IntRange(1, 64), default=6, help="Number of views of each sample.", group="Data")
def show(folder: str, data: str | None, out: Path, samples: int, views: int) -> None:
    """Draw a contact sheet: mixed views as the teacher saw them, class labels, and the teacher's top five.

    \b
    Example:
      deit-cli labels show shards --out labels.png
    """
    from pipeline.labels.labelset import LabelSet
    from pipeline.labels.sheet import contact_sheet

    label_set = LabelSet.open(folder)
    contact_sheet(label_set, label_set.open_source(data), out, samples=samples, views=views)
    click.echo(str(out))


@labels.command(continues=CONTINUES)
@LABELS
@click.argument("url", metavar="URL|FOLDER")
@WORKERS
def push(folder: str, url: str, workers: int) -> None:
    """Send a sealed label set to a bucket or another folder.

    Only missing files are sent, each is checked by its hash, and the same command continues an interrupted transfer. Views
    and source shards of the same label set that are there already stay; the new ones are added to them.

    \b
    Example:
      deit-cli labels push shards s3://bucket/shards
    """
    from pipeline.sharing.transfer import moved_line
    from pipeline.sharing.transfer import push as push_set

    with shown_progress() as progress:
        moved = push_set(Path(folder), url, workers=workers, progress=progress)
    click.echo(moved_line(url, moved, "sent"))


@labels.command(continues=CONTINUES)
@click.argument("url", metavar="URL|FOLDER")
@LABELS
@plain_option(
    "--views", type=ViewsType(), help="View numbers START:STOP, in whole blocks; by default all.", group="Data"
)
@plain_option(
    "--shards",
    multiple=True,
    metavar="NAME",
    help="Name or pattern of the source shards; by default all. Repeat the option for several.",
    group="Data",
)
@EXPECT_MANIFEST
@WORKERS
def pull(url: str, folder: str, views: tuple[int, int] | None, shards: tuple[str, ...], **values: Any) -> None:
    """Bring a label set, or a part of it, into a folder.

    Only missing files are fetched, each is checked by its hash, and the same command continues an interrupted transfer, even
    in the middle of a file. A part is a label set of its own; more views or source shards may be added to it later.

    \b
    Examples:
      deit-cli labels pull s3://bucket/shards shards
      deit-cli labels pull https://host/shards shards --views 0:100 --shards 'train-0000*'
    """
    from pipeline.labels.card import refresh_card
    from pipeline.labels.labelset import LabelSet
    from pipeline.sharing.transfer import moved_line
    from pipeline.sharing.transfer import pull as pull_set

    with shown_progress() as progress:
        moved = pull_set(url, Path(folder), views=views, shards=shards or None, progress=progress, **values)
    if views or shards or moved.found_files:  # the downloaded card describes the whole set
        refresh_card(LabelSet.open(folder))
    click.echo(moved_line(folder, moved, "received"))


@labels.command(continues=CONTINUES)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("sets", nargs=-1, required=True, metavar="SET...")
def merge(out: Path, sets: tuple[str, ...]) -> None:
    """Merge views or source shards that several machines made into one label set.

    All sets must have the same identity. They may be sealed, parts, or folders of ranks and stopped runs, which are not
    sealed. What is complete is sealed in OUT, to which the same command can add later. Nothing is overwritten, and the same
    command continues where it was killed.

    \b
    Example:
      deit-cli labels merge shards machine-a/shards machine-b/shards
    """
    from pipeline.sharing.merging import merge as merge_sets
    from pipeline.sharing.merging import merged_lines

    with shown_progress() as progress:
        merged = merge_sets(out, sets, progress=progress)
    click.echo(merged_lines(out, merged))


@labels.command(continues=CONTINUES)
@LABELS
@plain_option(
    "--views", type=ViewsType(), required=True, help="View numbers START:STOP to add to the set.", group="Data"
)
@plain_option("--data", help="Images; by default the set's own, or else where it found them.", group="Data")
@plain_option(
    "--teacher",
    "--teacher-model",
    "teacher",
    multiple=True,
    help="Teacher; by default the set's, by its resolved name. Pass the file or module of one without a public name.",
    group="Teacher",
)
@options_of(TeacherConfig, where=lambda setting: setting.name != "teacher")
@options_of(PrecomputeConfig, where=lambda setting: not setting.planned)
@LOG_JSON
def extend(folder: str, views: tuple[int, int], data: str | None, log_json: Path | None, **values: Any) -> None:
    """Label more views of a label set.

    Recipe, teacher, K and precision are those of its plan; another teacher is refused.

    \b
    Example:
      deit-cli labels extend shards --views 30:60
    """
    from pipeline.stage1.engines import load_here
    from pipeline.stage1.plan import extension
    from pipeline.stage1.precompute import ended_line
    from pipeline.stage1.precompute import precompute as label

    config, asked, recipe = extension(folder, values, data=data, views=views)
    with shown_progress(log_json) as progress:
        teacher, source = load_here(config, asked)
        label_set = label(config, recipe, teacher, source, progress=progress)
    click.echo(ended_line(config, label_set))


@labels.command(name="import", continues=CONTINUES)
@click.argument("kind", metavar="FORMAT", type=click.Choice(["fkd", "tinyvit"]))
@click.argument("path")
@click.argument("out")
@plain_option(
    "--num-classes",
    default=1000,
    help="Number of the teacher's classes; every stored class is checked against it.",
    group="Data",
)
@plain_option(
    "--topk", type=int, help="Number of classes to keep for each view; by default all that are stored.", group="Data"
)
def import_(kind: Any, path: str, out: str, num_classes: int, topk: int | None) -> None:
    """Import published labels (FORMAT: fkd, tinyvit) into Parquet tables, and say what is lost.

    The tables can be read and compared. They are not a label set, because their views cannot be replayed.

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
@plain_option(
    "--out",
    metavar="FOLDER|URL",
    help="Place to write to as a test: up to 256 MB (8 MB to a URL), which are deleted again.",
    group="Data",
)
@plain_option("--labels", metavar="FOLDER|URL", help="Label set whose replay probes are rendered again.", group="Data")
@plain_option("--data", help="Images of --labels; by default where the label set found them.", group="Data")
@AS_JSON
@click.pass_context
def doctor(context: click.Context, out: str | None, labels: str | None, data: str | None, as_json: bool) -> None:
    """Check this machine before a long run: packages, GPUs, decoders, memory, limits, names.

    The exit code is 1 if something is wrong; warnings alone leave it at 0.

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
@plain_option(
    "--license", "identifier", help="Identifier of the licence on the Hub, such as cc-by-4.0, or `other`.", group="Data"
)
@plain_option("--license-name", "name", help="Name of a licence without identifier.", group="Data")
@plain_option("--license-link", "link", help="Link to the text of a licence without identifier.", group="Data")
@plain_option(
    "--replace", is_flag=True, help="Replace README.md even if somebody has written or changed it.", group="Run"
)
def card(folder: str, identifier: str | None, name: str | None, link: str | None, replace: bool) -> None:
    """Write the dataset card, README.md: what the set holds, under which licence, how to load it.

    \b
    Example:
      deit-cli labels card shards --license cc-by-4.0
    """
    from pipeline.labels.card import CARD_NAME, Licence, write_card
    from pipeline.labels.labelset import LabelSet

    if identifier is None and (name or link):
        raise UsageError("--license-name and --license-link are of a --license: pass --license other as well")
    licence = Licence(identifier, name, link) if identifier else None
    if not write_card(LabelSet.open(folder), licence, replace=replace):
        raise UsageError(
            f"{folder}/{CARD_NAME} was not written by deit-cli, or was changed: pass --replace to replace it"
        )
    click.echo(f"{folder}/{CARD_NAME}")


@labels.command(continues=CONTINUES)
@LABELS
@click.argument("out", type=click.Path(path_type=Path))
@plain_option("--data", help="Images; by default the set's own, or else where it found them.", group="Data")
@options_of(ExportConfig)
def export(folder: str, out: Path, data: str | None, **values: Any) -> None:
    """Write images with the teacher's hard labels beside them, which timm and `datasets` read as they are.

    \b
    Example:
      deit-cli labels export shards exported --views 0:10
    """
    config = ExportConfig(**values)
    from pipeline.exchange.export import export_labels
    from pipeline.labels.labelset import LabelSet

    label_set = LabelSet.open(folder)
    with shown_progress() as progress:
        count = export_labels(label_set, label_set.open_source(data), out, config, progress=progress)
    click.echo(f"{out}: {count:,} images in {config.format} tars")


@commands.command()
@plain_option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("deit-demo"),
    help="Folder for everything that the demo makes.",
    group="Data",
)
@plain_option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    help="Random seed of the weights, the order and stochastic depth.",
    group="Run",
)
def demo(out: Path, seed: int) -> None:
    """Run the whole main job on scikit-learn's digits: about a minute on two cores, no download.

    \b
    Example:
      deit-cli demo
    """
    from pipeline.labels.sheet import contact_sheet
    from pipeline.stage1.precompute import precompute as label
    from pipeline.teacher.loading import load_teacher
    from trainer.demo import run_demo

    steps = {"load_teacher": load_teacher, "precompute": label, "contact_sheet": contact_sheet}
    with shown_progress() as progress:
        table = run_demo(out, seed=seed, **steps, progress=progress)
    click.echo(table)


if __name__ == "__main__":
    main()
