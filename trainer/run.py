"""Setup of a training run: open its data, build the student, check the output folder, resume from a checkpoint."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3

from pipeline.errors import CheckpointError, LabelSetMismatch, UsageError
from pipeline.images.source import Source, open_source
from pipeline.labels.combined import CombinedLabels, Labels, in_words, open_labels, sets_of
from pipeline.labels.comparing import record_of
from pipeline.labels.manifest import first_difference, short
from pipeline.labels.replay import check_start
from pipeline.settings.fields import settings_of
from pipeline.settings.files import plain_settings, recipe_settings
from pipeline.storage.atomic import refusals_named, replace_file
from pipeline.storage.cache import Cache, open_cache
from pipeline.storage.json import pretty_json, read_json
from pipeline.storage.yaml import to_yaml
from pipeline.text import count
from pipeline.views.recipe import PRESETS, Recipe
from pipeline.weights import weights_here
from trainer.checkpoint import load_state, unpack_training
from trainer.config import TrainConfig
from trainer.folders import CONFIG_NAME, EVALUATION_NAME, LOCK_NAME, STATE_NAME
from trainer.optim import create_ema, create_optimizer, linear_scaled_lr
from trainer.order import Order, Share, order_of
from trainer.stream import Catalogue
from trainer.student import Student, create_student
from trainer.tokens import why_no_tokens
from trainer.weights import start_from

log = logging.getLogger("deit_cli.train")

STATE_VERSION = 2
MOST_DIFFERENCES = 5  # settings that an error names
SETTINGS_NAME = "config.yaml"
SETTINGS_HEADER = b"# deit-cli train -c THIS_FILE --output ANOTHER_FOLDER trains the same again\n"


@dataclass(frozen=True)
class Data:
    """The images and labels of a run.

    Attributes:
        source: original images.
        label_set: label set with the teacher's answers, or several as one; None: train on class labels alone.
        recipe: recipe of the views.
        num_classes: number of classes, C.
        class_names: one name per class, or None.
    """

    source: Source
    label_set: Labels | None
    recipe: Recipe
    num_classes: int
    class_names: tuple[str, ...] | None


@dataclass
class State:
    """The part of a run that training changes and checkpoints save.

    Attributes:
        student: student in training.
        optimizer: AdamW of the student.
        ema: moving average of the student's weights, or None.
        next_update: index of the next update, which is the number of completed updates.
        evaluated: number of completed updates at the last evaluation.
        best_top1: best top-1 accuracy so far in percent, -1 before the first evaluation.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    next_update: int = 0
    evaluated: int = 0
    best_top1: float = -1.0


def cache_of(config: TrainConfig) -> Cache:
    """Return the cache for files from URLs."""
    return open_cache(config.cache_dir, config.cache_size, config.min_rate)


def open_data(config: TrainConfig, recipe: Recipe | None = None) -> Data:
    """Open the label set and the source, and check that this machine renders the pixels that the teacher saw.

    Args:
        config: settings of the run.
        recipe: requested recipe, or None; with a label set, it must be the recipe of the label set.

    Raises:
        LabelSetError: the label set is incomplete or damaged, or has other images, another recipe or other pixels.
        UsageError: no label set is given, and the source has no class labels.
    """
    cache = cache_of(config)
    if not config.labels:
        source = open_source(config.data or "", options=config.options, cache=cache)
        if source.max_label is None:
            raise UsageError(f"{source.location} has no class labels to train on")
        num_classes = source.num_classes or source.max_label + 1
        return Data(source, None, recipe or PRESETS["deit"], num_classes, source.class_names)
    label_set = open_labels(
        config.labels,
        pins=config.expect_manifest,
        cache=cache,
        weights=config.label_weights,
        mode=config.label_mode,
        seed=config.seed,
        spread=config.tail == "spread",
    )
    _refuse_soft_without_probabilities(config, label_set)
    if recipe is not None and recipe.id != label_set.recipe.id:
        difference = first_difference(label_set.recipe.model_dump(mode="json"), recipe.model_dump(mode="json"))
        raise LabelSetMismatch(
            f"{label_set.place} was made with another recipe{difference}",
            fix="Leave out --recipe and --set, on the command line and in the -c file: the recipe comes from the label set",
        )
    source = label_set.open_source(config.data, options=config.options, cache=cache)
    difference = check_start(label_set, source)
    if source.kept is not None:
        source.kept.complete_beside(source.shards)
    if not difference:
        shards = {*label_set.shards}
        probes = sum(probe.shard in shards for each in sets_of(label_set) for probe in each.manifest.probes)
        log.info("%d replay probes: every pixel is as the teacher saw it", probes)
    if label_set.is_part:
        message = "%s holds %d of %d source shards: the student trains only on their images"
        log.warning(message, label_set.place, len(label_set.shards), len(label_set.source_record.shards))
    return Data(source, label_set, label_set.recipe, label_set.num_classes, label_set.class_names)


def _refuse_soft_without_probabilities(config: TrainConfig, labels: Labels) -> None:
    """Raise UsageError for soft distillation from several label sets of which one has only hard labels.

    The loss refuses a single one, too.
    """
    hard_only = next((each for each in sets_of(labels) if each.plan.topk == 0), None)
    if config.distillation_type == "soft" and isinstance(labels, CombinedLabels) and hard_only:
        raise UsageError(
            f"soft distillation needs top-k labels (K >= 1), and {hard_only.place} holds only hard labels (K = 0)",
            fix="Train with hard distillation, or leave out this --labels",
        )


def check_output(config: TrainConfig) -> None:
    """Check that --output is free, or that the run in it is to be resumed.

    Raises:
        UsageError: --output holds a run or the remains of one, and --resume is not given.
    """
    if config.resume == "auto":
        return
    if (config.folder / STATE_NAME).is_file():
        raise UsageError(
            f"{config.output} already holds a run", fix="Continue it with --resume, or choose another --output"
        )
    if kept := next((name for name in ("last", "best") if (config.folder / name).is_dir()), None):
        raise UsageError(
            f"{config.output} holds {kept}/ of a run whose {STATE_NAME} is missing",
            fix="Choose another --output, or pass --resume to start again and replace it",
        )


@contextlib.contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """Lock a folder inside the block, so that no other process trains in it. A killed process releases its lock.

    Args:
        output: folder of the run, created if missing.

    Raises:
        UsageError: another process trains in the folder.
    """
    with refusals_named(output):
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / LOCK_NAME).open("ab")
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process trains in {output}", fix="Wait until it ends, or choose another --output"
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.debug("%s cannot be locked: %s", output, error)
        yield


def make_order(config: TrainConfig, data: Data, share: Share = Share()) -> Order:
    """Return the order of all updates of the run, which is the same on every rank.

    Args:
        config: settings of the run.
        data: images and labels of the run.
        share: this process's part of every update.

    Raises:
        UsageError: the views, the repeated augmentation or the batch size do not fit the data or the ranks.
    """
    catalogue = Catalogue(data.source, data.label_set, config.labelled_fraction)
    views = _views_to_train_on(config, data)
    if config.labelled_fraction < 1 and not catalogue.any_labelled():
        raise UsageError(
            f"--labelled-fraction {config.labelled_fraction:g} leaves no image with a class label",
            fix="Pass a larger share, or images with more class labels",
        )
    units = catalogue.units(data.recipe)
    if config.view_policy == "once" and views is not None and config.epochs > len(views):
        raise UsageError(
            f"--view-policy once allows one epoch per view: the labels have {count(len(views), 'view')},"
            f" --epochs is {config.epochs}",
            fix="Label more views with deit-cli precompute --views, or pass --view-policy cycle",
        )
    return order_of(
        data.recipe,
        units,
        views,
        batch_size=config.batch_size,
        share=share,
        repeated_aug=config.repeated_aug,
        window=config.shuffle_window,
        seed=config.seed,
        view_policy=config.view_policy,
    )


def _views_to_train_on(config: TrainConfig, data: Data) -> range | None:
    """Return the views of --views, else all labelled views; None (no label set) for an unlimited number of new views."""
    labelled = data.label_set.views if data.label_set else None
    if config.views is None:
        return labelled
    start, stop = config.views
    if labelled is None or not labelled.start <= start < stop <= labelled.stop:
        which = "all label sets have" if isinstance(data.label_set, CombinedLabels) else "the label set has"
        has = "no label set is given" if labelled is None else f"{which} {labelled.start}:{labelled.stop}"
        raise UsageError(f"--views must be START:STOP within the labelled views, got {start}:{stop}: {has}")
    return range(start, stop)


def build_state(config: TrainConfig, data: Data, order: Order, device: torch.device) -> State:
    """Build the student, its optimizer and its EMA from the settings and their seed; the result is equal on every rank.

    Raises:
        UsageError: timm cannot build the student, or its image size is not that of the views.
        CheckpointError: the weights of --init do not fit.
        StorageError: the weights of --init or the published ones cannot be read.
    """
    torch.manual_seed(config.seed)
    continues = (config.folder / STATE_NAME).is_file()  # a resumed run does not need --init and --pretrained
    student = create_student(
        config.model,
        num_classes=data.num_classes,
        img_size=config.img_size or data.recipe.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        drop_path=config.drop_path,
        pretrained=config.pretrained and not continues,
        class_names=data.class_names,
    )
    if student.img_size != data.recipe.img_size:
        raise UsageError(
            f"--img-size must be the size of the views, {data.recipe.img_size}, got {student.img_size}: the student"
            " sees what the teacher saw",
            fix=f"For {student.img_size} pixels, label with --recipe deit-384 or --set img_size={student.img_size}",
        )
    if not continues:
        _load_initial_weights(config, student)
    if config.linear_probe:
        student.freeze_backbone()
    _check_second_token(config, student)
    student.to(device)
    if config.crop_pct is not None:
        student.model.pretrained_cfg["crop_pct"] = config.crop_pct
    optimizer = create_optimizer(
        student, lr=top_rate(config, order), weight_decay=config.weight_decay, fused=device.type in ("cuda", "cpu")
    )
    ema = create_ema(student, config.model_ema_decay, config.model_ema_warmup) if config.model_ema else None
    student.train()
    return State(student, optimizer, ema)


def _check_second_token(config: TrainConfig, student: Student) -> None:
    """Raise UsageError if the settings need a second head or token that the student lacks."""
    if config.second_token == "class" and not student.has_distillation_head:
        raise UsageError(
            f"--second-token class needs a student with two heads, {config.model} has one",
            fix="Choose a --model with a distillation token, such as deit-s, or leave out --second-token",
        )
    if config.probe_interval and (why := why_no_tokens(student)):
        raise UsageError(
            f"--probe-interval compares two tokens, and {config.model} has {why}",
            fix="Choose a --model with a distillation token, such as deit-s, or leave out --probe-interval",
        )


def _load_initial_weights(config: TrainConfig, student: Student) -> None:
    """Load the weights of --init, and log the changes that made the initial weights fit."""
    if config.init is not None:
        changes = start_from(student, weights_here(config.init))
        log.info("starting from %s: %s", config.init, "; ".join(changes) or "all weights as they are")
    if config.pretrained:
        published = student.model.pretrained_cfg["num_classes"]
        new = f": the heads are new: {published} classes in the published weights, {student.num_classes} here"
        log.info("starting from timm's published weights%s", new if published != student.num_classes else "")


def run_identity(config: TrainConfig, data: Data, order: Order) -> dict[str, Any]:
    """Return the settings and ids that must stay the same if a run is resumed, on any number of ranks."""
    return {
        "version": STATE_VERSION,
        "config": config.identity(),
        "views_per_update": order.batch_size,
        "recipe_id": data.recipe.id,
        **_label_identity(data.label_set),
        "expect_manifest": config.to_dict()["expect_manifest"],
        "repeated_aug": order.repeated_aug,
        "views": [order.views.start, order.views.stop] if order.views else None,
        "source_id": (data.label_set.source_record if data.label_set else record_of(data.source)).id,
        "shards": list(data.label_set.shards) if data.label_set and data.label_set.is_part else None,
    }


def _label_identity(labels: Labels | None) -> dict[str, Any]:
    """Return the id of the label set; of several, their ids in order, and how they are combined."""
    ids = [each.plan.labelset_id for each in sets_of(labels)] if labels else [None]
    if isinstance(labels, CombinedLabels):
        how = labels.combination
        return {"labelset_id": ids, "label_weights": list(how.weights), "label_mode": how.mode}
    return {"labelset_id": ids[0]}


def _label_sets_in_words(identity: dict[str, Any]) -> str:
    """Return the label sets in a run's identity as text, for an error."""
    ids, weights = identity.get("labelset_id"), identity.get("label_weights")
    if isinstance(ids, list) and isinstance(weights, list) and len(ids) == len(weights):
        return f"label sets {in_words([short(str(each)) for each in ids], weights, str(identity.get('label_mode')))}"
    return f"label set {short(str(ids))}" if ids else "no label set"


def resume(config: TrainConfig, state: State, meta: dict[str, Any]) -> None:
    """Load the state of the run in --output, if there is one, into `state`.

    Args:
        config: settings of the run.
        state: state as `build_state` returns it; changed in place.
        meta: `run_identity` of the run.

    Raises:
        CheckpointError: the file of the state is damaged, or belongs to a run with other settings.
    """
    path = config.folder / STATE_NAME
    if not path.is_file():
        return
    tensors, saved = load_state(path)
    if not isinstance(saved, dict) or type(saved.get("next_update")) is not int or saved["next_update"] < 0:
        raise CheckpointError(f"{path} is not the state of a run: it does not say after which update it was saved")
    found = {name: saved.get(name) for name in meta}
    if isinstance(found["config"], dict):  # a run that is older than a setting has its default
        found["config"] = default_settings() | found["config"]
    pin = found.pop("expect_manifest")
    meta = {name: value for name, value in meta.items() if name != "expect_manifest"}
    # A changed pin is intended; a missing pin may be a mistake.
    if pin is not None and not config.expect_manifest:
        pins = " --expect-manifest ".join(map(str, pin if isinstance(pin, list) else [pin]))
        raise CheckpointError(
            f"{path} belongs to a run that is pinned to a manifest",
            fix=f"Pass --expect-manifest {pins}, or the new pin if you know why the manifest changed",
        )
    saved_views, views = found["views_per_update"], meta["views_per_update"]
    if found | {"views_per_update": views} == meta and saved_views != views:
        raise CheckpointError(
            f"{path} belongs to a run with {saved_views} views per update, this one has {views}",
            fix=f"Choose --batch-size, --grad-accum-steps and ranks so that their product is {saved_views}",
        )
    then, now = _label_sets_in_words(saved), _label_sets_in_words(meta)
    if "label_weights" in {**saved, **meta} and then != now:
        raise CheckpointError(
            f"{path} belongs to a run on {then}, this one is on {now}",
            fix="Pass --labels, --label-weights and --label-mode as that run had them, or another --output",
        )
    if found["views"] != meta["views"] and found | {"views": meta["views"]} == meta:
        views = ":".join(map(str, found["views"])) if isinstance(found["views"], list) else str(found["views"])
        raise CheckpointError(
            f"{path} belongs to a run on views {views}, this one has {meta['views']}", fix=f"Pass --views {views}"
        )
    if found != meta:
        raise CheckpointError(
            f"{path} belongs to a run with other settings{_differences(found, meta)}",
            fix="Use the settings of that run, or another --output",
        )
    unpack_training(tensors, state.student, state.optimizer, state.ema)
    state.next_update = saved["next_update"]
    state.evaluated, state.best_top1 = _last_evaluation(config.folder)
    log.info("continuing at update %d", state.next_update)


def _differences(found: dict[str, Any], meta: dict[str, Any]) -> str:
    """Return ` (--epochs: 6, not 8)`: the options in which two runs differ, or else the first other difference."""
    then, now = found["config"], meta["config"]
    names = [name for name in now if then.get(name) != now[name]] if isinstance(then, dict) else []
    if not names:
        return first_difference(found, meta)
    flags = {setting.name: setting.flag for setting in settings_of(TrainConfig)}
    told = [first_difference(then.get(name), now[name], flags[name])[2:-1] for name in names[:MOST_DIFFERENCES]]
    more = len(names) - len(told)
    return f" ({'; '.join(told)}{f'; {more} more' if more else ''})"


def default_settings() -> dict[str, Any]:
    """Return the default of every setting that a resumed run must keep."""
    return {setting.name: setting.default for setting in settings_of(TrainConfig) if not setting.free}


def _last_evaluation(output: Path) -> tuple[int, float]:
    """Return the number of updates done at the last evaluation, and the best top-1 so far in percent."""
    path = output / EVALUATION_NAME
    if not path.is_file():
        return 0, -1.0
    record = read_json(path)
    values = record if isinstance(record, dict) else {}
    update, best = values.get("update"), values.get("best_top1", -1.0)
    if type(update) is not int or type(best) not in (int, float) or not -1 <= best <= 100:
        raise CheckpointError(
            f"{path} is damaged", fix="Delete it; the best weights are then chosen among later evaluations only"
        )
    return update, float(best)


def save_evaluation(output: Path, state: State) -> None:
    """Write the last evaluation to the output folder, so that a resumed run does not repeat it."""
    record = {"update": state.evaluated, "best_top1": state.best_top1}
    replace_file(output / EVALUATION_NAME, pretty_json(record))


def save_config(config: TrainConfig, data: Data, order: Order) -> None:
    """Write config.json, with all settings and ids, and config.yaml, which `train -c` takes to repeat the training."""
    resolved = {
        "config": config.to_dict(),
        "recipe": data.recipe.model_dump(mode="json"),
        "recipe_id": data.recipe.id,
        "views": [order.views.start, order.views.stop] if order.views else None,
        "views_per_update": order.batch_size,
        "updates_per_epoch": order.steps_per_epoch,
    }
    if data.label_set:
        teachers = [each.plan.teacher.model_dump(mode="json") for each in sets_of(data.label_set)]
        resolved |= _label_identity(data.label_set) | {"teacher": teachers if len(teachers) > 1 else teachers[0]}
    replace_file(config.folder / CONFIG_NAME, pretty_json(resolved))
    settings = plain_settings(config)
    settings.pop("resume")  # an option of the command, not a setting of the run
    if data.label_set is None:  # with a label set, its plan gives the recipe
        settings |= recipe_settings(data.recipe)
    replace_file(config.folder / SETTINGS_NAME, SETTINGS_HEADER + to_yaml(settings))


def announce(config: TrainConfig, data: Data, order: Order, state: State, share: Share) -> None:
    """Log the student and the schedule, and warn about settings with surprising effects."""
    student, classes, lr = state.student, data.num_classes, top_rate(config, order)
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    log.info("student %s: %.1f M parameters, %d px, %d classes", config.model, millions, student.img_size, classes)
    parts = f" in {share.parts} parts ({share.size} ranks, {share.passes} passes)" if share.parts > 1 else ""
    together = f", {order.repeated_aug} views of an image together" if order.repeated_aug > 1 else ""
    if isinstance(data.label_set, CombinedLabels):
        names, how = [each.plan.teacher.name for each in data.label_set.sets], data.label_set.combination
        log.info("teachers %s", in_words(names, how.weights, how.mode))
    message = "%d epochs of %d updates, %d views each%s, lr %.3g%s"
    log.info(message, config.epochs, order.steps_per_epoch, order.views_per_step, parts, lr, together)
    if student.backbone_frozen:
        learning = sum(p.numel() for p in student.parameters() if p.requires_grad)
        heads = " and ".join(student.head_names)
        log.info("linear probe: only %s learn (%d parameters), the rest is frozen", heads, learning)
    if order.views is not None and len(order.views) < config.epochs:
        number = len(order.views)
        log.warning("the labels have %s of each image: from epoch %d on they repeat", count(number, "view"), number)
    if config.distillation_type != "none" and not student.has_distillation_head:
        log.warning("%s has no distillation token: its one head learns from class labels and teacher", config.model)
    if config.second_token == "class":
        log.info(
            "control experiment: the second head of %s learns the class labels too, without a teacher", config.model
        )
    if not config.trains_both_heads and student.has_distillation_head:
        log.warning("%s has a distillation head, which stays untrained without teacher labels", config.model)


def top_rate(config: TrainConfig, order: Order) -> float:
    """Return the peak learning rate: --lr, or --lr-base scaled by the views per update.

    If the source has too few images for a full update, the actual number of views is used.
    """
    is_full = order.least_units_per_step == order.units_per_step
    views = order.batch_size if is_full else min(order.batch_size, order.views_per_step)
    return linear_scaled_lr(config.lr_base, views) if config.lr is None else config.lr
