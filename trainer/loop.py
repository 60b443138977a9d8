"""Stage 2: replay the views, stream the labels, train the student. The teacher is never loaded."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from pipeline.devices import resolve_device
from pipeline.draws import stream_of
from pipeline.errors import CheckpointError, LabelSetMismatch, TrainingError, UsageError
from pipeline.labelset import LabelSet, record_of
from pipeline.manifest import first_difference
from pipeline.recipe import PRESETS, Recipe
from pipeline.rendering import MappedRange, plan_workers, start_loader
from pipeline.replay import check_replay
from pipeline.sources import Source, open_source
from pipeline.storage import pretty_json, replace_file
from trainer.checkpoint import export_model, load_state, pack_training, save_state, unpack_training
from trainer.config import TrainConfig
from trainer.evaluate import Running, Scores, evaluate, forward_dtype, mixed_images, normalise
from trainer.losses import ClassTarget, TeacherTarget, distillation_loss
from trainer.metrics import MetricsLog, Rate
from trainer.optim import create_ema, create_optimizer, learning_rate, linear_scaled_lr, set_learning_rate
from trainer.order import Order, check_repeats, count_units, default_repeats
from trainer.stream import Batch, BatchRenderer, Catalogue, checked
from trainer.student import Student, create_student, hub_config

log = logging.getLogger("deit_cli.train")

STATE_NAME = "state.safetensors"
CONFIG_NAME = "config.json"
STATE_VERSION = 1


@dataclass(frozen=True)
class Data:
    """What a run trains on."""

    source: Source
    label_set: LabelSet | None
    recipe: Recipe
    num_classes: int
    class_names: tuple[str, ...] | None


@dataclass
class State:
    """What changes while training, and can be saved."""

    student: Student
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    next_index: int = 0
    best_top1: float = -1.0


def train(config: TrainConfig, recipe: Recipe | None = None) -> Path:
    """Train a student, or continue its run; return the run's folder.

    Args:
        config: all settings.
        recipe: of the views, where there is no label set to say it; default `deit`.
    """
    data = open_data(config, recipe)
    device = resolve_device(config.device)
    running = Running(
        device=device,
        dtype=forward_dtype(config.amp_dtype, device),
        workers=plan_workers(config.workers, device),
        batch_size=config.batch_size,
    )
    order = make_order(config, data)
    state = _build(config, data, device)
    meta = _identity(config, data)
    _resume(config, state, meta)
    _save_config(config, data)
    metrics = MetricsLog(config.output, next_index=state.next_index)
    eval_source = open_source(config.eval_data) if config.eval_data else None
    _announce(config, data, order, state)

    total = order.steps_per_epoch * config.epochs
    rate = Rate()
    for batch, waited in _batches(config, data, order, running, state.next_index, total):
        update, in_update = divmod(batch.index, config.grad_accum_steps)
        lr = _rate_at(config, order, update)
        set_learning_rate(state.optimizer, lr)
        torch.manual_seed(stream_of("step", str(config.seed), str(batch.index)).bits())  # stochastic depth
        loss, parts = _forward(config, state.student, batch, running)
        _check_finite(config, loss, batch)
        (loss / config.grad_accum_steps).backward()
        if in_update == config.grad_accum_steps - 1:
            parts |= _update(config, state)
        state.next_index = batch.index + 1
        rate.add(len(batch.keys), waited_s=waited)
        epoch, step = order.position(batch.index)
        last_of_epoch = step == order.steps_per_epoch - 1
        if in_update == config.grad_accum_steps - 1 and ((update + 1) % config.log_interval == 0 or last_of_epoch):
            _log_step(metrics, rate, batch, epoch, step, order, total, {"loss": loss.detach(), **parts}, lr)
        if last_of_epoch:
            if eval_source and ((epoch + 1) % config.eval_interval == 0 or epoch + 1 == config.epochs):
                _evaluate(config, data, state, eval_source, running, metrics, epoch)
            _export(config, state, "last")
            rate = Rate()
        if last_of_epoch or _is_recovery_point(config, update, in_update):
            save_state(config.output / STATE_NAME, _tensors(state), meta | _position(state))
    return config.output


def open_data(config: TrainConfig, recipe: Recipe | None = None) -> Data:
    """Open label set and source, and prove that this machine renders the labelled pixels.

    Raises:
        LabelSetError: the label set is incomplete, damaged, or of other images, recipe or pixels.
    """
    if config.labels is None:
        source = open_source(config.data or "")
        labels = [label for shard in source.shards for label in shard.class_labels if label is not None]
        if not labels:
            raise UsageError(f"{source.location} has no class labels to train on")
        return Data(source, None, recipe or PRESETS["deit"], source.num_classes or max(labels) + 1, source.class_names)
    label_set = LabelSet.open(config.labels)
    if recipe is not None and recipe.id != label_set.recipe.id:
        difference = first_difference(label_set.recipe.to_dict(), recipe.to_dict())
        raise LabelSetMismatch(f"{config.labels} was made with another recipe{difference}. Leave --recipe out")
    source = open_source(config.data or label_set.plan.source.location)
    difference = check_replay(label_set, source)
    if not difference:
        log.info("%d replay probes: every pixel as the teacher saw it", len(label_set.manifest.probes))
    return Data(source, label_set, label_set.recipe, label_set.num_classes, label_set.class_names)


def make_order(config: TrainConfig, data: Data) -> Order:
    """Return the order of all batches of the run."""
    catalogue = Catalogue(data.source, data.label_set)
    views = data.label_set.views if data.label_set else None
    repeats = config.repeated_aug or default_repeats(data.recipe, views)
    check_repeats(data.recipe, repeats, views)
    return Order(
        shard_units=tuple(count_units(data.recipe, catalogue.table(i).usable) for i in range(len(catalogue.names))),
        unit_size=2 if data.recipe.mixes else 1,
        batch_size=config.batch_size,
        repeated_aug=repeats,
        views=views,
        window=config.shuffle_window,
        seed=config.seed,
        grad_accum_steps=config.grad_accum_steps,
    )


def _build(config: TrainConfig, data: Data, device: torch.device) -> State:
    torch.manual_seed(config.seed)
    student = create_student(
        config.model,
        num_classes=data.num_classes,
        img_size=config.img_size or data.recipe.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        drop_path=config.drop_path,
        init_checkpoint=config.init,
        pretrained=config.pretrained,
        class_names=data.class_names,
    ).to(device)
    if student.img_size != data.recipe.img_size:
        raise UsageError(
            f"--img-size {student.img_size} is not that of the views, {data.recipe.img_size}: the student sees what the teacher saw"
        )
    if config.crop_pct is not None:
        student.model.pretrained_cfg["crop_pct"] = config.crop_pct
    optimizer = create_optimizer(
        student, lr=_top_rate(config), weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    ema = create_ema(student, config.model_ema_decay, config.model_ema_warmup) if config.model_ema else None
    student.train()
    return State(student, optimizer, ema)


def _identity(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return what a continuation must agree with."""
    return {
        "version": STATE_VERSION,
        "config": config.identity(),
        "recipe_id": data.recipe.id,
        "labelset_id": data.label_set.plan.labelset_id if data.label_set else None,
        "views": [data.label_set.views.start, data.label_set.views.stop] if data.label_set else None,
        "source_id": record_of(data.source).id,
    }


def _position(state: State) -> dict[str, Any]:
    return {"next_index": state.next_index, "best_top1": state.best_top1}


def _resume(config: TrainConfig, state: State, meta: dict[str, Any]) -> None:
    path = config.output / STATE_NAME
    if not path.is_file():
        return
    if not config.resume:
        raise UsageError(f"{config.output} already holds a run: continue it with --resume, or choose another --output")
    tensors, saved = load_state(path)
    found = {name: saved.get(name) for name in meta}
    if found != meta:
        raise CheckpointError(
            f"{path} belongs to a run with other settings{first_difference(found, meta)}. Use those, or another --output"
        )
    unpack_training(tensors, state.student, state.optimizer, state.ema)
    state.next_index, state.best_top1 = saved["next_index"], saved["best_top1"]
    log.info("continuing at batch %d", state.next_index)


def _save_config(config: TrainConfig, data: Data) -> None:
    """Write what the run was asked and what that came to."""
    resolved = {"config": config.to_dict(), "recipe": data.recipe.to_dict(), "recipe_id": data.recipe.id}
    if data.label_set:
        resolved |= {
            "labelset_id": data.label_set.plan.labelset_id,
            "teacher": data.label_set.plan.teacher.model_dump(mode="json"),
        }
    replace_file(config.output / CONFIG_NAME, lambda file: _write(file, resolved))


def _announce(config: TrainConfig, data: Data, order: Order, state: State) -> None:
    parameters = sum(p.numel() for p in state.student.parameters())
    log.info(
        "student %s: %.1f M parameters, %d px, %d classes",
        config.model,
        parameters / 1e6,
        state.student.img_size,
        data.num_classes,
    )
    log.info(
        "%d epochs of %d batches, %d views each, lr %.3g%s",
        config.epochs,
        order.steps_per_epoch,
        order.units_per_step * order.unit_size * order.repeated_aug,
        _top_rate(config),
        f", {order.repeated_aug} views of an image together" if order.repeated_aug > 1 else "",
    )
    repeats = order.repeats_after()
    if repeats is not None and repeats < config.epochs:
        log.warning("the label set has %d views: from epoch %d on they repeat", repeats, repeats)
    if config.distillation_type != "none" and not state.student.has_distillation_head:
        log.warning("%s has no distillation token: its one head learns class labels and teacher", config.model)


def _batches(
    config: TrainConfig, data: Data, order: Order, running: Running, start: int, total: int
) -> Iterator[tuple[Batch, float]]:
    """Yield the batches that are left, and the seconds that each was waited for."""
    with_labels = data.label_set
    renderer = BatchRenderer(Catalogue(data.source, with_labels), data.recipe, order)
    loader = start_loader(
        MappedRange(renderer, total),
        workers=running.workers,
        sampler=range(start, total),
        pin_memory=running.device.type == "cuda",
    )
    asked = time.monotonic()
    for batch in checked(loader):
        yield batch, time.monotonic() - asked
        asked = time.monotonic()


def _forward(config: TrainConfig, student: Student, batch: Batch, running: Running) -> tuple[Tensor, dict[str, Tensor]]:
    device = running.device
    images = normalise(mixed_images(batch, device), student)
    with torch.autocast(device.type, dtype=running.dtype, enabled=running.dtype != torch.float32):
        heads = student(images)
    class_target = ClassTarget(
        batch.class_label.to(device), batch.labelled.to(device), batch.mix.partner.to(device), batch.mix.lam.to(device)
    )
    teacher = None
    if config.distillation_type != "none":
        stored = (batch.hard, batch.topk_index, batch.topk_prob, batch.tail_mass)
        teacher = TeacherTarget(*(tensor.to(device) for tensor in stored))
    distill_logits = heads.class_logits if heads.distill_logits is None else heads.distill_logits
    loss, parts = distillation_loss(
        heads.class_logits,
        distill_logits,
        class_target,
        teacher,
        distillation_type=config.distillation_type,
        alpha=config.distillation_alpha,
        tau=config.distillation_tau,
        tail=config.tail,
        reduction=config.soft_reduction,
        smoothing=config.smoothing,
    )
    if teacher is not None:
        parts["teacher_agreement"] = (distill_logits.detach().argmax(1) == teacher.hard).float().mean()
    return loss, parts


def _check_finite(config: TrainConfig, loss: Tensor, batch: Batch) -> None:
    """A loss that is no number would spoil every weight; say where it came from and stop."""
    if torch.isfinite(loss):
        return
    path = config.output / "nonfinite.json"
    record = {"index": batch.index, "views": list(batch.views), "keys": list(batch.keys), "loss": str(loss.item())}
    replace_file(path, lambda file: _write(file, record))
    raise TrainingError(
        f"the loss of batch {batch.index} is {loss.item()}; its samples are listed in {path}."
        " Lower --lr or set --clip-grad, and --resume from the last checkpoint"
    )


def _update(config: TrainConfig, state: State) -> dict[str, Tensor]:
    extra: dict[str, Tensor] = {}
    if config.clip_grad is not None:
        extra["grad_norm"] = torch.nn.utils.clip_grad_norm_(state.student.parameters(), config.clip_grad)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.student, step=state.next_index // config.grad_accum_steps)
    return extra


def _rate_at(config: TrainConfig, order: Order, update: int) -> float:
    per_epoch = order.steps_per_epoch // config.grad_accum_steps
    return learning_rate(
        update,
        updates_total=per_epoch * config.epochs,
        updates_warmup=round(per_epoch * config.warmup_epochs),
        lr=_top_rate(config),
        warmup_lr=min(config.warmup_lr, _top_rate(config)),
        min_lr=min(config.min_lr, _top_rate(config)),
    )


def _top_rate(config: TrainConfig) -> float:
    scaled = linear_scaled_lr(config.lr_base, config.batch_size * config.grad_accum_steps)
    return scaled if config.lr is None else config.lr


def _log_step(
    metrics: MetricsLog,
    rate: Rate,
    batch: Batch,
    epoch: int,
    step: int,
    order: Order,
    total: int,
    parts: dict[str, Tensor],
    lr: float,
) -> None:
    numbers = {name: float(value) for name, value in parts.items()}
    per_second, waiting = rate.take()
    metrics.add(
        "train", batch.index, epoch=epoch, step=step, lr=lr, images_per_s=per_second, data_wait=waiting, **numbers
    )
    left_s = (total - batch.index - 1) * len(batch.keys) / max(per_second, 1e-9)
    log.info(
        "epoch %d %d/%d  %s  lr %.2e  %.0f images/s  waiting %.0f %%  %s left",
        epoch,
        step + 1,
        order.steps_per_epoch,
        "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()),
        lr,
        per_second,
        100 * waiting,
        time.strftime("%H:%M:%S", time.gmtime(left_s)) if left_s < 86400 else f"{left_s / 86400:.1f} days",
    )


def _evaluate(
    config: TrainConfig, data: Data, state: State, source: Source, running: Running, metrics: MetricsLog, epoch: int
) -> None:
    """Evaluate the student and its EMA, and keep the better one if it is the best so far."""
    candidates: list[tuple[str, Student]] = [("student", state.student)]
    if state.ema is not None:
        candidates.append(("ema", state.ema.module))  # pyright: ignore[reportArgumentType]
    for name, student in candidates:
        scores, count = evaluate(student, source, running, crop_pct=config.crop_pct)
        metrics.add("eval", state.next_index - 1, epoch=epoch, weights=name, images=count, scores=scores)
        log.info("epoch %d %s: %s on %d images", epoch, name, _brief(scores), count)
        top1 = primary_top1(scores)
        if top1 > state.best_top1:
            state.best_top1 = top1
            export_model(config.output / "best", student, hub_config=hub_config(student))


def primary_top1(scores: Scores) -> float:
    """Return the top-1 by which the best checkpoint is chosen: the mean of both heads, or the only one."""
    return scores.get("mean_logits", scores["class_head"])["top1"]


def _brief(scores: Scores) -> str:
    return "  ".join(f"{name} {values['top1']:.2f}" for name, values in scores.items())


def _export(config: TrainConfig, state: State, name: str) -> None:
    export_model(config.output / name, state.student, hub_config=hub_config(state.student))
    if state.ema is not None:
        averaged: Any = state.ema.module
        export_model(config.output / f"{name}-ema", averaged, hub_config=hub_config(averaged))


def _tensors(state: State) -> dict[str, Tensor]:
    return pack_training(state.student, state.optimizer, state.ema)


def _is_recovery_point(config: TrainConfig, update: int, in_update: int) -> bool:
    whole = in_update == config.grad_accum_steps - 1
    return bool(config.recovery_interval) and whole and (update + 1) % config.recovery_interval == 0


def _write(file: Any, value: dict[str, Any]) -> None:
    file.write(pretty_json(json.loads(json.dumps(value))))
