"""deit-cli: parse -> frozen config -> one call -> one-line errors. Nothing else."""

import logging
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

import click

from pipeline.errors import LabelSetError, UsageError
from pipeline.settings import program
from pipeline.settings.completion import SHELLS, script
from pipeline.settings.configs import (
    BenchConfig,
    EstimateConfig,
    ExportConfig,
    PackConfig,
    PrecomputeConfig,
    SourceConfig,
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
    file_record,
    options_of,
    plain_option,
    recipe_options,
    say_settings,
    show_result,
    split_values,
)
from pipeline.settings.program import CONTINUES
from pipeline.text import byte_size
from trainer.config import (
    STUDENT_SIZES,
    AnalyseConfig,
    CompareConfig,
    EvaluateConfig,
    InferenceConfig,
    InitConfig,
    ReportConfig,
    RunsConfig,
    TrainConfig,
)
from trainer.console import say_counts, set_up, shown_progress
from trainer.exports.config import StudentExportConfig

log = logging.getLogger("deit_cli")

RECIPE_OF_TRAIN = "that of --labels (any other is refused), else deit"  # default of `train --recipe`
BENCHED_VIEWS = "START is the first view of the last measurement; STOP - START limits --views-per-shard."


def main() -> None:
    """Run the command line; every error is one line on stderr and an exit code."""
    program.run(commands)


@click.group("deit-cli", cls=program.Group, context_settings=program.CONTEXT, set_up=set_up)
@click.version_option(package_name="deit-cli")
def commands() -> None:
    """Distil a CNN into a vision transformer: run the teacher once, train DeiT students from its stored labels.

    \b
    Examples:
      deit-cli precompute --data imagenet/train --teacher regnety_160 --out shards --views 0:300
      deit-cli train --labels shards --model deit-s --eval-data imagenet/val --output runs/deit-s
      deit-cli evaluate --checkpoint runs/deit-s/best --data imagenet/val
    """
    click.get_current_context().call_on_close(say_counts)


@commands.command(continues=CONTINUES)
@config_option(PrecomputeConfig, TeacherConfig, recipe=True)
@options_of(TeacherConfig)
@options_of(PrecomputeConfig)
@recipe_options("deit")
@plain_option("--dry-run", is_flag=True, help="Print what would be done, without doing it.", group="Run")
@LOG_JSON
@AS_JSON
def precompute(dry_run: bool, log_json: Path | None, as_json: bool, **values: Any) -> None:
    """Render numbered views, run the teacher, store its answers.

    A view is one augmented version of an image. Its number and the recipe decide every random choice, so that `train` can
    render the same pixels again. One command uses all GPUs of a machine; torchrun or Slurm start it on several machines.

    \b
    Examples:
      deit-cli precompute --data imagenet/train --teacher regnety_160 --out shards --views 0:300
      deit-cli precompute --data imagenet/train --recipe deit-384 --set reprob=0 --teacher regnety_160 --out shards-384
      deit-cli precompute --data photos --teacher resnet50 --teacher-checkpoint resnet50.safetensors --out labels
      torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint head:29500 --no-python \\
        deit-cli precompute --data s3://bucket/train --out s3://bucket/shards
    """
    config, teacher = split_values(values, PrecomputeConfig, TeacherConfig)
    recipe = chosen_recipe(values)
    say_settings(config, teacher, recipe=recipe)
    from pipeline.stage1.engines import load_here
    from pipeline.stage1.precompute import ended, look_ahead
    from pipeline.stage1.precompute import precompute as label

    with shown_progress(log_json) as progress:
        loaded, source = load_here(config, teacher)
        if dry_run:
            show_result(look_ahead(config, recipe, loaded, source).described(as_json=as_json))
        else:
            label_set = label(config, recipe, loaded, source, progress=progress)
            show_result(ended(config, label_set, as_json=as_json))


@commands.command(
    continues=f"{CONTINUES}, with --resume: from the last checkpoint, or from the beginning if there is none"
)
@config_option(TrainConfig, recipe=True)
@options_of(TrainConfig)
@recipe_options(RECIPE_OF_TRAIN)
@LOG_JSON
@AS_JSON
def train(log_json: Path | None, as_json: bool, **values: Any) -> None:
    """Train a student from stored labels, without the teacher.

    Each view is rendered again, exactly as the teacher saw it. torchrun trains on several GPUs.

    \b
    Examples:
      deit-cli train --labels shards --model deit-s --eval-data imagenet/val --output runs/deit-s
      deit-cli train --labels shards --model deit-s --distillation-type soft --distillation-tau 3 --output runs/soft
      deit-cli train --labels shards --labels shards-convnext --label-weights 0.7,0.3 --distillation-type soft --output runs/two
      deit-cli train -c runs/deit-s/config.yaml --output runs/again
      deit-cli train --labels shards --model deit-s --output runs/deit-s --resume
      torchrun --nproc-per-node 8 --no-python deit-cli train --labels shards --model deit-b --output runs/deit-b
      deit-cli train --distillation-type none --data imagenet/train --model resnet50 --output runs/teacher
    """
    (config,) = split_values(values, TrainConfig)
    recipe = asked_recipe(values)
    from pipeline.machine.ranks import rank_from
    from trainer.loop import train as run
    from trainer.pace import run_record, summary

    leads = rank_from(os.environ, arrays=False).rank == 0
    if not leads:  # only one of several ranks prints
        log.setLevel(logging.WARNING)
    say_settings(config, recipe=recipe)
    with shown_progress(log_json if leads else None) as progress:
        folder = run(config, recipe, progress=progress)
    if leads:
        show_result((run_record if as_json else summary)(folder, progress.last, location=config.output))


@commands.command()
@config_option(EvaluateConfig)
@options_of(EvaluateConfig)
@AS_JSON
def evaluate(as_json: bool, **values: Any) -> None:
    """Measure a student's accuracy and agreement with the teacher.

    The result has one line for each head, for each fusion of both heads, and for a linear classifier of both tokens if it was fitted.
    Pass --data and/or --labels; and --checkpoint, or --model with --pretrained. The folder of a run means its best/, or else its last/.

    \b
    Examples:
      deit-cli evaluate --checkpoint runs/deit-s/best --data imagenet/val --labels shards
      deit-cli evaluate --checkpoint runs/deit-s/best --data imagenet/val --fit-data imagenet/train
      deit-cli evaluate --checkpoint runs/deit-s/best --data imagenet/val --img-size 160 --img-size 224 --flip
      deit-cli evaluate --model deit_small_distilled_patch16_224 --pretrained --data imagenet/val
    """
    config = EvaluateConfig(**values)
    from trainer.evidence.scores import evaluate_checkpoint, score_table

    result = evaluate_checkpoint(config)
    show_result(result if as_json else score_table(result))


@commands.command(continues=CONTINUES)
@click.argument("study", metavar="STUDY.yaml", type=click.Path(path_type=Path))
@options_of(CompareConfig)
@plain_option("--dry-run", is_flag=True, help="Print the plan with its time and space; run nothing.", group="Run")
@AS_JSON
def compare(study: Path, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Run a study: train and compare many students.

    Each step is a command of its own: train and evaluate teachers, label, train and evaluate students. Finished steps are kept and
    used again. The table has the top-1 accuracy of each cell over the seeds, and the difference to the baseline. To compare runs that
    you have already, pass them to `report` and `analyse`.

    \b
    Examples:
      deit-cli compare configs/studies/distillation.yaml --dry-run
      deit-cli compare configs/studies/distillation.yaml
      deit-cli compare configs/studies/sizes.yaml --scale configs/scales/imagenet.yaml \\
        --launcher "torchrun --nproc-per-node 8 --no-python"
    """
    (config,) = split_values(values, CompareConfig)
    from trainer.studies.compare import compare as run
    from trainer.studies.forecast import forecast_table, foresee
    from trainer.studies.results import check_all_done, study_table

    result = foresee(study, config) if dry_run else run(study, config)
    table = forecast_table if dry_run else study_table
    show_result(result if as_json else table(result))
    check_all_done(result)


@commands.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH|URL...")
@config_option(ReportConfig)
@options_of(ReportConfig)
@AS_JSON
def report(paths: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Write a page with the results of studies, runs and label sets.

    PATH is the folder of a study, a run or a label set, or a JSON file that `evaluate`, `analyse`, `labels audit`, `compare` or
    `bench inference` wrote. The page is one file and needs no network. FILE-data.json beside it holds every number of the page.

    \b
    Examples:
      deit-cli report runs/deit-s shards
      deit-cli report runs/hard runs/soft --out two-runs.html
      deit-cli report studies/digits/distillation.json --out distillation.html
    """
    config = ReportConfig(**values)
    from trainer.evidence.report import write_report

    page = write_report(config, paths)
    show_result(file_record(page, data=str(config.data_file)) if as_json else str(page))


@commands.command(name="export")
@click.argument("run", metavar="RUN|URL")
@config_option(StudentExportConfig)
@options_of(StudentExportConfig)
@AS_JSON
def export_run(run: str, as_json: bool, **values: Any) -> None:
    """Export a student for timm, ONNX Runtime or torch.export.

    RUN is the folder of a run (its best/, or else its last/ is used), or a folder that `train` exported; of such a folder also a
    URL. The export is compared with the student before it is published. It has a model card and export.json, which says where it
    comes from, and needs nothing of this project.

    \b
    Examples:
      deit-cli export runs/deit-s --to timm --license apache-2.0 --push hf://user/deit-s
      deit-cli export runs/deit-s --to onnx --answer class_head --answer distillation_head --preprocess nhwc
      deit-cli export runs/deit-s --to onnx --precision int8 --data imagenet/val --out deit-s-int8
      deit-cli export runs/deit-s --to torch
    """
    config = StudentExportConfig(**values)
    from trainer.exports.export import export_student, export_table

    result = export_student(run, config)
    show_result(result if as_json else export_table(result))


@commands.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@config_option(AnalyseConfig)
@options_of(AnalyseConfig)
@AS_JSON
def analyse(runs: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Compare the two tokens of students, and the answers of networks.

    It measures how similar class token and distillation token are from block to block, and on which share of the images two
    networks disagree. RUN is the folder of a run (its best/, or else its last/ is used), a folder that `train` exported, or
    timm:NAME for published weights. Networks with one head are compared by their answers only.

    \b
    Examples:
      deit-cli analyse runs/deit-s --data imagenet/val --attention 4 --out analysis
      deit-cli analyse runs/deit-s runs/teacher --data imagenet/val --samples 0
      deit-cli analyse runs/deit-s --labels shards
    """
    config = AnalyseConfig(**values)
    from trainer.evidence.analyse import analyse as analyse_runs
    from trainer.evidence.analyse import analysis_text

    result = analyse_runs(runs, config)
    show_result(result if as_json else analysis_text(result))


@commands.command()
@config_option(PrecomputeConfig, TeacherConfig, EstimateConfig, recipe=True)
@options_of(TeacherConfig)
@options_of(PrecomputeConfig, where=attrgetter("timed"))
@recipe_options("deit")
@options_of(TrainConfig, where=lambda setting: setting.name in STUDENT_SIZES)
@options_of(EstimateConfig)
@AS_JSON
def estimate(as_json: bool, **values: Any) -> None:
    """Estimate the cost of labelling, and when it pays off.

    The result says how long labelling takes here, how many bytes the labels have before compression, and how many
    students you must train before stored labels save time. The first images are labelled as a test, in seven measurements of about --seconds
    each. On a GPU the student is timed, too; on a CPU the operations of both networks are counted. Nothing is written.

    \b
    Examples:
      deit-cli estimate --data imagenet/train --teacher regnety_160 --views 0:300 --students 5 --epochs 300
      deit-cli estimate -c precompute.yaml --model deit-ti --patch-size 4 --epochs 30
    """
    config, teacher, asked = split_values(values | {"out": "."}, PrecomputeConfig, TeacherConfig, EstimateConfig)
    recipe = chosen_recipe(values)
    from pipeline.cost.estimate import estimate_labelling
    from trainer.student import create_student

    sizes = {name: values[name] for name in STUDENT_SIZES if values[name] is not None}
    found = estimate_labelling(config, teacher, recipe, asked, create_student=create_student, sizes=sizes)
    show_result(found.to_dict() if as_json else found.table())


@commands.group()
def bench() -> None:
    """Time the parts of labelling and training."""


@bench.command()
@config_option(PrecomputeConfig, TeacherConfig, BenchConfig, recipe=True)
@options_of(TeacherConfig)
@options_of(PrecomputeConfig, where=attrgetter("timed"), helps={"views": BENCHED_VIEWS})
@recipe_options("deit")
@options_of(BenchConfig)
@AS_JSON
def stage1(as_json: bool, **values: Any) -> None:
    """Time `precompute`: each part, then all of them together.

    There are seven measurements of about --seconds each, then one of all parts together, five times as long. It writes to a
    temporary folder.

    \b
    Example:
      deit-cli bench stage1 --data imagenet/train --teacher regnety_160
    """
    config, teacher, asked = split_values(values | {"out": "."}, PrecomputeConfig, TeacherConfig, BenchConfig)
    recipe = chosen_recipe(values)
    from pipeline.cost.bench import bench_labelling

    found = bench_labelling(config, teacher, recipe, asked)
    show_result(found.to_dict() if as_json else found.table())


@bench.command()
@config_option(TrainConfig, TimingConfig, recipe=True)
@options_of(TrainConfig, where=attrgetter("timed"))
@recipe_options(RECIPE_OF_TRAIN)
@options_of(TimingConfig)
@AS_JSON
def stage2(as_json: bool, **values: Any) -> None:
    """Time `train`: student, loader processes, then both together.

    Each measurement takes about --seconds, and the last, of the whole training loop, five times as long. It writes to a
    temporary folder. On a CPU one update with a large batch may take longer than that: pass a smaller --batch-size.

    \b
    Example:
      deit-cli bench stage2 --labels shards --model deit-s
    """
    config, timing = split_values(values, TrainConfig, TimingConfig)
    recipe = asked_recipe(values)
    from trainer.bench import bench_training

    found = bench_training(config, recipe, seconds=timing.seconds)
    show_result(found.to_dict() if as_json else found.table())


@bench.command()
@click.argument("networks", nargs=-1, required=True, metavar="RUN|timm:NAME...")
@config_option(InferenceConfig)
@options_of(InferenceConfig)
@AS_JSON
def inference(networks: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Time trained networks: images per second at inference.

    RUN is the folder of a run (its best/, or else its last/ is used), or a folder that it exported; timm:NAME means the weights that timm
    publishes.
    The networks take turns in five rounds, so that their speeds can be compared.

    \b
    Examples:
      deit-cli bench inference runs/deit-s runs/teacher
      deit-cli bench inference runs/deit-ti runs/deit-s -b 1 -b 256 --compile --out speed.json
    """
    config = InferenceConfig(**values)
    from trainer.evidence.speed import bench_inference, speed_table

    result = bench_inference(config, networks)
    show_result(result if as_json else speed_table(result))


@commands.group()
def labels() -> None:
    """Inspect, verify, extend and share label sets."""


LABELS = click.argument("folder", metavar="FOLDER|URL")
HERE = click.argument("folder", metavar="FOLDER")
EXPECT_MANIFEST = plain_option(
    "--expect-manifest",
    metavar="sha256:HEX",
    help="Expected hash of the manifest, which `labels info` prints; any other manifest is refused.",
    group="Data",
)
ONE_DEVICE = "Device: cpu, cuda, cuda:1, xpu or mps; auto means a GPU if there is one, else the CPU."
EXTENDED_SIZE = "Size in pixels to which views are resized for the teacher; by default that of the label set."
IMAGES = plain_option(
    "--data",
    metavar="PATH|URL",
    help="Images: path or URL; by default those in the label set, or else the local path stored in it.",
    group="Data",
)
WORKERS = plain_option(
    "-j",
    "--workers",
    type=click.IntRange(1, 256),
    default=8,
    help="Number of files that are transferred at the same time.",
    group="Run",
)


@labels.command()
@LABELS
@EXPECT_MANIFEST
@AS_JSON
def info(folder: str, expect_manifest: str | None, as_json: bool) -> None:
    """Describe a label set: teacher, recipe, views, statistics.

    The statistics of the labels are the teacher's agreement with the class labels, the entropy of its probabilities, and the share of
    probability that the stored top-k classes hold.

    \b
    Example:
      deit-cli labels info shards
    """
    from pipeline.labels.labelset import LabelSet
    from pipeline.overview.summary import info_table, summarise

    summary = summarise(LabelSet.open(folder, expect_manifest=expect_manifest))
    show_result(summary if as_json else info_table(summary))


@labels.command()
@LABELS
@plain_option(
    "--teacher",
    "--teacher-model",
    "teacher",
    multiple=True,
    help="Teacher that labels random views again; its answers are compared with the stored ones.",
    group="Teacher",
)
@options_of(
    TeacherConfig, where=lambda setting: setting.name not in ("teacher", "compile"), helps={"device": ONE_DEVICE}
)
@options_of(VerifyConfig)
@AS_JSON
def verify(folder: str, as_json: bool, **values: Any) -> None:
    """Check every file and label, and say how to repair them.

    The exit code is 1 if there is a problem. Files behind a URL are downloaded again, without the cache. With --teacher, random views are labelled again.

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
    show_result(report.to_dict() if as_json else verify_lines(report))
    if report.problems:
        raise LabelSetError(f"{folder}: {report.summary()}")


@labels.command()
@click.argument("folder", type=click.Path(path_type=Path))
@plain_option(
    "--private-key",
    type=click.Path(path_type=Path),
    help="PEM file of an elliptic-curve private key; by default the set is signed with Sigstore. Both need deit-cli[sign].",
    group="Signature",
)
@plain_option(
    "--identity-token",
    help="OpenID Connect token for Sigstore; by default that of the CI job, else a browser window asks you to sign in.",
    group="Signature",
)
@AS_JSON
def sign(folder: Path, private_key: Path | None, identity_token: str | None, as_json: bool) -> None:
    """Sign a label set.

    manifest.json.sig signs the manifest, which holds the hashes of the plan, labels and images.

    \b
    Examples:
      deit-cli labels sign shards --private-key team.pem
      deit-cli labels sign shards
      deit-cli labels verify shards --public-key team.pub
    """
    from pipeline.sharing.signing import sign as sign_set

    signature = sign_set(folder, private_key=private_key, identity_token=identity_token)
    show_result(file_record(signature) if as_json else str(signature))


@labels.command()
@LABELS
@EXPECT_MANIFEST
@plain_option(
    "--views",
    type=ViewsType(),
    help="Views to read, START:STOP; by default all. Fewer are faster, and rank the suspects less well.",
    group="Views",
)
@plain_option(
    "--top",
    type=click.IntRange(1),
    default=20,
    help="Number of entries of each list in the tables and in gallery.html.",
    group="Output",
)
@plain_option(
    "--data",
    metavar="PATH|URL",
    help="Images of the page in --out: path or URL; by default those in the label set, or else the local path stored in it.",
    group="Data",
)
@options_of(SourceConfig)
@plain_option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the complete result: audit.json, suspects.csv, and gallery.html with pictures.",
    group="Output",
)
@AS_JSON
def audit(folder: str, expect_manifest: str | None, as_json: bool, **values: Any) -> None:
    """List images whose class label the teacher contradicts.

    The stored answers of the teacher alone decide; no image is opened, except for the page in --out. The other lists are
    the classes that are confused, images of which no view has a clear answer, and images with the same bytes.

    \b
    Examples:
      deit-cli labels audit shards
      deit-cli labels audit shards --views 0:10 --top 50 --out audit
    """
    views, top, data, out = (values[name] for name in ("views", "top", "data", "out"))
    options = split_values(values, SourceConfig)[0].options_for(data)
    if data is not None and out is None:
        raise UsageError("--data names the images of the page in --out: pass --out too")
    from pipeline.labels.labelset import LabelSet
    from trainer.evidence import audit as auditing

    with shown_progress() as progress:
        found = auditing.audit(LabelSet.open(folder, expect_manifest=expect_manifest), views, progress=progress)
    if out is not None:
        from trainer.evidence.audit_files import write_audit

        write_audit(found, out, top=top, data=data, options=options)
    show_result(found.to_dict() if as_json else auditing.audit_table(found, top))


@labels.command()
@LABELS
@IMAGES
@options_of(SourceConfig)
@plain_option(
    "--out", type=click.Path(path_type=Path), default=Path("labels.png"), help="PNG file to write.", group="Output"
)
@plain_option("--samples", type=click.IntRange(1, 64), default=4, help="Number of images, one per row.", group="Data")
@plain_option("--views", type=click.IntRange(1, 64), default=6, help="Number of views of each image.", group="Views")
@AS_JSON
def show(folder: str, data: str | None, out: Path, samples: int, views: int, as_json: bool, **values: Any) -> None:
    """Draw views as the teacher saw them, with its answers.

    Above each view are its class labels and the teacher's five most probable classes.

    \b
    Example:
      deit-cli labels show shards
    """
    from pipeline.labels.labelset import LabelSet
    from pipeline.overview.sheet import contact_sheet

    options = split_values(values, SourceConfig)[0].options_for(data)
    label_set = LabelSet.open(folder)
    contact_sheet(label_set, label_set.open_source(data, options=options), out, samples=samples, views=views)
    show_result(file_record(out) if as_json else str(out))


@labels.command(continues=CONTINUES)
@HERE
@click.argument("url", metavar="FOLDER|URL")
@WORKERS
@AS_JSON
def push(folder: str, url: str, workers: int, as_json: bool) -> None:
    """Copy a label set to a bucket or another folder.

    Only missing files are sent, and the hash of each is checked. The same command continues an interrupted transfer. If the
    destination holds other views of the same label set, the new ones are added to them.

    \b
    Example:
      deit-cli labels push shards s3://bucket/shards
    """
    from pipeline.sharing.transfer import moved_line, moved_record
    from pipeline.sharing.transfer import push as push_set

    with shown_progress() as progress:
        moved = push_set(Path(folder), url, workers=workers, progress=progress)
    show_result(moved_record(url, moved) if as_json else moved_line(url, moved, "sent"))


@labels.command(continues=CONTINUES)
@click.argument("url", metavar="FOLDER|URL")
@HERE
@plain_option(
    "--views",
    type=ViewsType(),
    help="Views to copy, START:STOP; label files are copied whole, so more views may come. By default all.",
    group="Views",
)
@plain_option(
    "--shards",
    multiple=True,
    metavar="NAME",
    help="Source shards (tars, parts of Parquet files or folders) to copy: a name or a pattern; by default all. Repeat the option for several.",
    group="Data",
)
@EXPECT_MANIFEST
@WORKERS
@AS_JSON
def pull(
    url: str, folder: str, views: tuple[int, int] | None, shards: tuple[str, ...], as_json: bool, **values: Any
) -> None:
    """Copy a label set, or a part of it, into a local folder.

    Only missing files are fetched, and the hash of each is checked. The same command continues an interrupted transfer, even
    in the middle of a file. A part can be used as a label set; another `labels pull` can add to it later.

    \b
    Examples:
      deit-cli labels pull s3://bucket/shards shards
      deit-cli labels pull https://host/shards shards --views 0:100 --shards 'train-0000*'
    """
    from pipeline.labels.labelset import LabelSet
    from pipeline.overview.card import refresh_card
    from pipeline.sharing.transfer import moved_line, moved_record
    from pipeline.sharing.transfer import pull as pull_set

    with shown_progress() as progress:
        moved = pull_set(url, Path(folder), views=views, shards=shards or None, progress=progress, **values)
    if views or shards or moved.found_files:  # the downloaded card describes the whole set
        refresh_card(LabelSet.open(folder))
    show_result(moved_record(folder, moved) if as_json else moved_line(folder, moved, "received"))


@labels.command(continues=CONTINUES)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("sets", nargs=-1, required=True, metavar="FOLDER|URL...")
@AS_JSON
def merge(out: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Merge the parts of several machines into one label set.

    The parts must have the same images, recipe and teacher. They may hold different views or source shards, and may come from
    runs that were stopped. OUT gets all complete label files; parts can be added later. Nothing is overwritten, and the same
    command continues an interrupted merge.

    \b
    Example:
      deit-cli labels merge shards machine-a/shards machine-b/shards
    """
    from pipeline.sharing.merging import merge as merge_sets
    from pipeline.sharing.merging import merged_lines, merged_record

    with shown_progress() as progress:
        merged = merge_sets(out, sets, progress=progress)
    show_result((merged_record if as_json else merged_lines)(out, merged))


@labels.command(continues=CONTINUES)
@LABELS
@plain_option(
    "--views",
    type=ViewsType(),
    required=True,
    help="Views to add, START:STOP, without a gap to those of the label set.",
    group="Views",
)
@IMAGES
@plain_option(
    "--teacher",
    "--teacher-model",
    "teacher",
    multiple=True,
    help="Teacher; by default the one of the label set. A teacher from a folder, a file or a Python function must be passed again.",
    group="Teacher",
)
@options_of(TeacherConfig, where=lambda setting: setting.name != "teacher", helps={"teacher_img_size": EXTENDED_SIZE})
@options_of(PrecomputeConfig, where=lambda setting: not setting.planned)
@LOG_JSON
@AS_JSON
def extend(
    folder: str, views: tuple[int, int], data: str | None, log_json: Path | None, as_json: bool, **values: Any
) -> None:
    """Label more views of the images of a label set.

    Recipe, teacher, top-k and precision stay those of the label set; another teacher is refused.

    \b
    Example:
      deit-cli labels extend shards --views 30:60
    """
    from pipeline.stage1.engines import load_here
    from pipeline.stage1.plan import extended_source, extension
    from pipeline.stage1.precompute import ended
    from pipeline.stage1.precompute import precompute as label

    config, asked, recipe = extension(folder, values, data=data, views=views)
    with shown_progress(log_json) as progress:
        teacher, source = load_here(config, asked, extended_source(config, data))
        label_set = label(config, recipe, teacher, source, progress=progress)
    show_result(ended(config, label_set, as_json=as_json))


@labels.command(name="import", continues=CONTINUES)
@click.argument("kind", metavar="FORMAT", type=click.Choice(["fkd", "tinyvit"]))
@click.argument("path")
@click.argument("out")
@plain_option(
    "--num-classes",
    default=1000,
    help="Number of the teacher's classes; a class number that is not below it is an error.",
    group="Data",
)
@plain_option(
    "--topk", type=int, help="Number of classes to keep for each view; by default all stored classes.", group="Data"
)
@AS_JSON
def import_(kind: Any, path: str, out: str, num_classes: int, topk: int | None, as_json: bool) -> None:
    """Convert published labels of FKD or TinyViT to Parquet.

    FORMAT is fkd or tinyvit. The command reports what the tables cannot hold. The tables can be read and compared. `train` cannot use them, because their views cannot be rendered again exactly.

    \b
    Examples:
      deit-cli labels import fkd FKD_soft_label/imagenet/train fkd-labels
      deit-cli labels import tinyvit teacher_logits tinyvit-labels --num-classes 21841
    """
    from pipeline.exchange.import_record import import_table
    from pipeline.exchange.imports import import_labels

    with shown_progress() as progress:
        record = import_labels(kind, path, out, num_classes=num_classes, topk=topk, progress=progress)
    show_result(record.model_dump(mode="json") if as_json else import_table(record, out))


@commands.command()
@plain_option(
    "--out",
    metavar="FOLDER|URL",
    help="Folder or URL in which writing is tested with up to 256 MB (8 MB for a URL), which are then deleted.",
    group="Data",
)
@plain_option(
    "--labels",
    metavar="FOLDER|URL",
    help="Label set to test: a few views are rendered again and compared with the stored hashes.",
    group="Data",
)
@plain_option(
    "--data",
    help="Images of --labels: path or URL; by default those in the label set, or else the local path stored in it. Without --labels: images that are decoded, and the damaged ones listed.",
    group="Data",
)
@options_of(SourceConfig)
@AS_JSON
@click.pass_context
def doctor(
    context: click.Context, out: str | None, labels: str | None, data: str | None, as_json: bool, **values: Any
) -> None:
    """Check this machine before a long run.

    It looks at packages, GPUs, image decoders, memory, the limit of open files, and modules whose names clash with ours. The exit code is 1 if there is a problem; warnings alone do not change it.

    \b
    Examples:
      deit-cli doctor
      deit-cli doctor --data imagenet/train
      deit-cli doctor --out /scratch/shards --labels shards --data imagenet/train
    """
    from pipeline.doctor.examine import examine
    from pipeline.doctor.findings import report_json, report_table, verdict

    SourceConfig(**values).check_used(data)
    sections = examine(out=out, labels=labels, data=data, options=values)
    show_result(report_json(sections) if as_json else report_table(sections))
    context.exit(1 if verdict(sections)[0] else 0)


@labels.command()
@HERE
@plain_option(
    "--license",
    "identifier",
    help="Licence, by its identifier on the Hub, such as cc-by-4.0; `other` if it has none. By default that of the present card.",
    group="Licence",
)
@plain_option("--license-name", "name", help="Name of the licence, for --license other.", group="Licence")
@plain_option("--license-link", "link", help="Link to the text of the licence, for --license other.", group="Licence")
@plain_option(
    "--replace", is_flag=True, help="Replace README.md even if it was written or changed by hand.", group="Run"
)
@AS_JSON
def card(folder: str, identifier: str | None, name: str | None, link: str | None, replace: bool, as_json: bool) -> None:
    """Write the dataset card (README.md) of a label set.

    It says what the set contains, its licence, and how to load it.

    \b
    Example:
      deit-cli labels card shards --license cc-by-4.0
    """
    from pipeline.labels.labelset import LabelSet
    from pipeline.overview.card import CARD_NAME, Licence, write_card

    if identifier is None and (name or link):
        raise UsageError("--license-name and --license-link are of a --license: pass --license other as well")
    licence = Licence(identifier, name, link) if identifier else None
    if not write_card(LabelSet.open(folder), licence, replace=replace):
        raise UsageError(
            f"{folder}/{CARD_NAME} was not written by deit-cli, or was changed: pass --replace to replace it"
        )
    written = f"{folder}/{CARD_NAME}"
    show_result(file_record(Path(written)) if as_json else written)


@labels.command(continues=CONTINUES)
@LABELS
@click.argument("out", type=click.Path(path_type=Path))
@IMAGES
@options_of(SourceConfig)
@options_of(ExportConfig)
@AS_JSON
def export(folder: str, out: Path, data: str | None, as_json: bool, **values: Any) -> None:
    """Write images and hard labels as tars for other programs.

    timm and Hugging Face's `datasets` can read them. The label of each image is the teacher's most probable class.

    \b
    Example:
      deit-cli labels export shards exported --views 0:10
    """
    config, reading = split_values(values, ExportConfig, SourceConfig)
    options = reading.options_for(data)
    from pipeline.exchange.export import export_labels
    from pipeline.labels.labelset import LabelSet

    label_set = LabelSet.open(folder)
    with shown_progress() as progress:
        source = label_set.open_source(data, options=options)
        count = export_labels(label_set, source, out, config, progress=progress)
    record = {"path": str(out), "images": count, "format": config.format}
    show_result(record if as_json else f"{out}: {count:,} images in {config.format} tars")


@commands.command(continues=CONTINUES)
@click.argument("source", metavar="PATH|URL")
@click.argument("out", type=click.Path(path_type=Path))
@options_of(PackConfig)
@plain_option("--dry-run", is_flag=True, help="Print what would be written; write nothing.", group="Run")
@LOG_JSON
@AS_JSON
def pack(source: str, out: Path, dry_run: bool, log_json: Path | None, as_json: bool, **values: Any) -> None:
    """Write images as WebDataset tars of even size, shuffled.

    The source is whatever `precompute --data` takes: an image folder, tars or Parquet, here or behind a URL. The same images,
    options and versions give the same bytes. OUT gets the tars, the class names, and SHA256SUMS last.

    \b
    Examples:
      deit-cli pack imagenet/train imagenet-tars
      deit-cli pack imagenet/val imagenet-val-tars --prefix val --shorter-side 256 --quality 90
      deit-cli pack hf://datasets/timm/mini-imagenet/data mini-imagenet --samples-per-shard 500
    """
    config = PackConfig(**values)
    from pipeline.exchange.pack import pack as write_pack
    from pipeline.exchange.pack import plan_pack

    with shown_progress(log_json) as progress:
        if dry_run:
            plan = plan_pack(source, out, config, progress=progress)
            show_result(plan.to_dict() if as_json else plan.table)
        else:
            packed = write_pack(source, out, config, progress=progress)
            show_result(packed.to_dict() if as_json else packed.line)


@commands.command()
@click.argument("source", metavar="PATH")
@options_of(SourceConfig, where=lambda setting: setting.name not in ("labels_file", "class_depth"))
@LOG_JSON
@AS_JSON
def index(source: str, log_json: Path | None, as_json: bool, **values: Any) -> None:
    """Write the index of tars or Parquet files beside them.

    Every command indexes a large source once and keeps the index in the user's cache folder. An index beside the data serves everyone
    who reads it: other users, other machines, and copies of the folder. It says where the images are; what is read is compared
    with the files, so an index that does not fit can only be an error. PATH is a folder, a file, or a brace expression. The options are
    those of the commands that use the index.

    \b
    Examples:
      deit-cli index imagenet-tars
      deit-cli index "imagenet-tars/train-{000000..001281}.tar"
    """
    from pipeline.images.index import write_sidecar
    from pipeline.images.source import open_source

    opened = open_source(source, options=SourceConfig(**values).options)
    with shown_progress(log_json) as progress:
        path = write_sidecar(opened, progress)
    record = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "samples": opened.num_samples,
        "labelled": opened.num_labelled,
    }
    line = f"{path}: {record['samples']:,} samples, {record['labelled']:,} with a class label, {byte_size(record['bytes'])}"
    show_result(record if as_json else line)


@commands.command()
@click.argument("pattern", required=False, metavar="[PATTERN]")
@plain_option(
    "--teachers",
    is_flag=True,
    help="List the published networks that can be teachers, instead of the students.",
    group="Teacher",
)
@AS_JSON
def models(pattern: str | None, teachers: bool, as_json: bool) -> None:
    """List the networks that can be students or teachers.

    Without PATTERN the students are DeiT's models; any model of timm can be one. PATTERN is a name, or a shell pattern in quotes. The
    teachers are all networks for which timm publishes weights; docs/teachers.md has the others. Nothing is downloaded.

    \b
    Examples:
      deit-cli models
      deit-cli models "deit3_*"
      deit-cli models --teachers "regnety_*"
    """
    if teachers:
        from pipeline.teacher.listing import list_teachers as found_by
        from pipeline.teacher.listing import teachers_table as table
    else:
        from trainer.models import list_students as found_by
        from trainer.models import students_table as table

    found = found_by(pattern)
    named = {"teachers" if teachers else "students": found}
    show_result(named if as_json else table(found))


@commands.command()
@click.argument("names", nargs=-1, metavar="[NAME|FILE]...")
@plain_option(
    "--yaml",
    "as_yaml",
    is_flag=True,
    help="Print one recipe as YAML, each field with its meaning: a file for --recipe.",
    group="Output",
)
@AS_JSON
def recipes(names: tuple[str, ...], as_yaml: bool, as_json: bool) -> None:
    """List the recipes, show one, or compare two.

    A recipe is the complete description of the augmentation. Without NAME the presets are listed. One NAME or FILE shows all fields with
    their meaning and the difference from `deit`; two show where they differ.

    \b
    Examples:
      deit-cli recipes
      deit-cli recipes crop-flip
      deit-cli recipes deit none
      deit-cli recipes deit --yaml > recipe.yaml
    """
    from pipeline.overview.recipes import describe_recipes, recipe_yaml, recipes_table
    from pipeline.settings.files import load_recipe

    loaded = {name: load_recipe(name) for name in names}
    if as_yaml:
        click.echo(recipe_yaml(loaded))
    else:
        found = describe_recipes(loaded)
        show_result(found if as_json else recipes_table(found))


@commands.command()
@click.argument("folders", nargs=-1, metavar="[FOLDER]...")
@options_of(RunsConfig)
@AS_JSON
def runs(folders: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """List the runs and label sets below a folder.

    FOLDER is the current one by default. A line says of each run how far it is, whether a process of this machine trains it, its best
    accuracy, loss and speed. The runs of studies are listed, too. The accuracy is that of the answer in the column `of`. Nothing is written.

    \b
    Examples:
      deit-cli runs
      deit-cli runs runs studies --sort top1
    """
    config = RunsConfig(**values)
    from trainer.folders import find_runs, runs_table

    found = find_runs(folders or ["."], config.sort)
    show_result(found if as_json else runs_table(found))


@commands.command()
@click.argument("folder", required=False, default=".", type=click.Path(path_type=Path), metavar="[FOLDER]")
@options_of(InitConfig)
@plain_option(
    "--yes", is_flag=True, help="Ask nothing: take the default of every option that is not passed.", group="Run"
)
@plain_option("--overwrite", is_flag=True, help="Replace settings files that are in FOLDER already.", group="Output")
@AS_JSON
def init(folder: Path, yes: bool, overwrite: bool, as_json: bool, **values: Any) -> None:
    """Write settings files for your images: questions first.

    It asks for the images, the images for evaluation, the student, the teacher, and how long to train, and checks each answer at
    once. Then it looks at the machine, and writes precompute.yaml and train.yaml, in which a comment gives the reason of each line.
    Each option answers a question; FOLDER is the current one by default. Nothing else is written, and nothing is downloaded.

    \b
    Examples:
      deit-cli init
      deit-cli init flowers --data flowers/train --eval-data flowers/test --yes
    """
    config = InitConfig(**values)
    from pipeline.settings.questions import Questions
    from pipeline.teacher.listing import classes_of_teacher
    from trainer.advice.init import set_up, set_up_text

    made = set_up(
        config, folder, questions=Questions(yes), classes_of=classes_of_teacher, overwrite=overwrite, say=log.info
    )
    show_result(made if as_json else set_up_text(made))


@commands.command()
@plain_option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("deit-demo"),
    help="Folder for everything that the demo makes; it must be new or empty.",
    group="Output",
)
@plain_option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    help="Random seed of the weights, the order of the data and stochastic depth.",
    group="Run",
)
@AS_JSON
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Run precompute and train on scikit-learn's digits.

    It takes about a minute on two cores and needs no download, only the extra deit-cli[demo]. The table compares students with and without the teacher, and report.html shows everything.

    \b
    Example:
      deit-cli demo
    """
    from pipeline.stage1.precompute import precompute as label
    from pipeline.teacher.loading import load_teacher
    from trainer.evidence.demo import demo_table, run_demo

    result = run_demo(out, seed=seed, load_teacher=load_teacher, precompute=label, shown=shown_progress)
    show_result(result if as_json else demo_table(result))


@commands.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script with which a shell completes commands, options and values.

    The shell then asks deit-cli at each press of Tab. Values are names of models, recipes and their fields, choices, and paths.

    \b
    Examples:
      deit-cli completion bash > ~/.local/share/bash-completion/completions/deit-cli
      deit-cli completion zsh > ~/.zfunc/_deit-cli
      deit-cli completion fish > ~/.config/fish/completions/deit-cli.fish
    """
    click.echo(script(shell), nl=False)


@commands.command()
@plain_option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the pages to.", group="Output"
)
@AS_JSON
def man(out: Path, as_json: bool) -> None:
    """Write the man pages of all commands.

    There is one page for each command, with the texts of its --help.

    \b
    Examples:
      deit-cli man --out ~/.local/share/man/man1
      man deit-cli-train
    """
    from pipeline.settings.manual import write_pages

    pages = write_pages(commands, out)
    record = {"path": str(out), "files": [path.name for path in pages]}
    show_result(record if as_json else f"{out}: {len(pages)} pages, such as {pages[0].name}")


if __name__ == "__main__":
    main()
