"""Stage 2: replay the views, stream the labels, train the student. The teacher is never loaded."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.devices import resolve_device
from pipeline.draws import stream_of
from pipeline.errors import TrainingError
from pipeline.loading import Mapped, checked, plan_workers, start_loader
from pipeline.recipe import Recipe
from pipeline.sources import Source, open_source
from pipeline.storage import replace_file, sweep_temporaries
from trainer.checkpoint import export_model, pack_training, save_state
from trainer.config import TrainConfig
from trainer.evaluate import Running, Scores, evaluate, forward_dtype, mixed_images, normalise
from trainer.losses import ClassTarget, TeacherTarget, distillation_loss
from trainer.metrics import Console, MetricsLog
from trainer.optim import learning_rate, set_learning_rate
from trainer.order import Order
from trainer.setup import (
    STATE_NAME,
    Data,
    State,
    announce,
    build_state,
    make_order,
    open_data,
    resume,
    run_identity,
    save_config,
    top_rate,
    write_json,
)
from trainer.stream import Batch, BatchRenderer, Catalogue
from trainer.student import Student, hub_config

log = logging.getLogger("deit_cli.train")


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
    state = build_state(config, data, device)
    meta = run_identity(config, data)
    resume(config, state, meta)
    sweep_temporaries(config.output)
    save_config(config, data)
    metrics = MetricsLog(config.output, next_index=state.next_index)
    eval_source = open_source(config.eval_data) if config.eval_data else None
    announce(config, data, order, state)

    total = order.steps_per_epoch * config.epochs
    console = Console(total, order.steps_per_epoch)
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
        console.count(len(batch.keys), waited_s=waited)
        epoch, step = order.position(batch.index)
        last_of_epoch = step == order.steps_per_epoch - 1
        if in_update == config.grad_accum_steps - 1 and ((update + 1) % config.log_interval == 0 or last_of_epoch):
            numbers = {name: float(value) for name, value in {"loss": loss.detach(), **parts}.items()}
            speed = console.say(batch.index, numbers, lr)
            metrics.add("train", batch.index, epoch=epoch, step=step, lr=lr, **speed, **numbers)
        checkpoint = last_of_epoch and ((epoch + 1) % config.checkpoint_interval == 0 or epoch + 1 == config.epochs)
        if last_of_epoch:
            if eval_source and ((epoch + 1) % config.eval_interval == 0 or epoch + 1 == config.epochs):
                _evaluate(config, data, state, eval_source, running, metrics, epoch)
            if checkpoint:
                _export(config, state, "last")
            console.restart()
        if checkpoint or _is_recovery_point(config, update, in_update):
            save_state(config.output / STATE_NAME, _tensors(state), meta | _position(state))
    return config.output


def _position(state: State) -> dict[str, Any]:
    return {"next_index": state.next_index, "best_top1": state.best_top1}


def _batches(
    config: TrainConfig, data: Data, order: Order, running: Running, start: int, total: int
) -> Iterator[tuple[Batch, float]]:
    """Yield the batches that are left, and the seconds that each was waited for."""
    with_labels = data.label_set
    renderer = BatchRenderer(Catalogue(data.source, with_labels), data.recipe, order)
    loader = start_loader(
        Mapped(renderer, total),
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
    replace_file(path, lambda file: write_json(file, record))
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
        updates_warmup=round(per_epoch * config.warmup),
        lr=top_rate(config),
        warmup_lr=min(config.warmup_lr, top_rate(config)),
        min_lr=min(config.min_lr, top_rate(config)),
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
        top1 = scores["class_head" if config.distillation_type == "none" else primary_head(scores)]["top1"]
        if top1 > state.best_top1:
            state.best_top1 = top1
            export_model(config.output / "best", student, hub_config=hub_config(student))


def primary_head(scores: Scores) -> str:
    """Return the answer by which the best checkpoint is chosen: the mean of both heads, or the only one."""
    return "mean_logits" if "mean_logits" in scores else "class_head"


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
