"""Stage 2: replay the views, stream the labels, train the student. The teacher is never loaded."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DeitCliError, StoppedError, TrainingError, UsageError
from pipeline.images.source import Source, open_source
from pipeline.machine.loaders import prepare_loaders
from pipeline.machine.ranks import forward_dtype, rank_from
from pipeline.pixels.handover import renders_on_gpu
from pipeline.pixels.render import warn_without_kernel
from pipeline.repeats import counted_at_the_end
from pipeline.storage.atomic import replace_file, sweep_temporaries
from pipeline.storage.json import pretty_json
from pipeline.storage.mirror import Mirror, OneWriterMirror
from pipeline.views.draws import stream_of
from pipeline.views.recipe import Recipe
from trainer.checkpoint import BackgroundWriter, check_finite, pack_training, save_state, snapshot
from trainer.config import TrainConfig
from trainer.evaluate import Scores, evaluate, labelled_places, primary_head
from trainer.export import export_model, hub_config
from trainer.losses import LossSettings, distillation_loss
from trainer.metrics import Recorder, open_recorder
from trainer.optim import learning_rate, set_learning_rate
from trainer.order import Order, Share
from trainer.pace import Pace, StepProgress
from trainer.parallel import (
    Consensus,
    OnRank,
    Running,
    StopRequest,
    joined_world,
    lost_ranks_named,
    stop_request,
)
from trainer.run import (
    LOCK_NAME,
    STATE_NAME,
    State,
    announce,
    build_state,
    cache_of,
    check_output,
    make_order,
    only_run_in,
    open_data,
    resume,
    run_identity,
    save_config,
    save_evaluation,
    top_rate,
)
from trainer.stream import Batch, BatchRenderer, Catalogue, mixed_images, on_device, stream_batches
from trainer.student import Student, normalise
from trainer.tokens import PROBED_IMAGES, probe_tokens
from trainer.trackers import check_trackers

log = logging.getLogger("deit_cli.train")

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@counted_at_the_end()
def train(config: TrainConfig, recipe: Recipe | None = None, *, progress: StepProgress | None = None) -> Path:
    """Train a student, or continue its run; return the run's folder.

    Under torchrun, every rank calls this function, and rank 0 writes the files.

    Args:
        config: all settings.
        recipe: recipe of the views, for a run without a label set; default `deit`.
        progress: called by rank 0 after every update.

    Raises:
        StoppedError: Ctrl-C or SIGTERM; the run is saved.
        TrainingError: the loss is NaN or infinite.
        UsageError: with `deterministic`, the student needs an operation that has no deterministic algorithm.
        WorkerError: a loader process or another rank was lost.
    """
    check_trackers(tensorboard=config.log_tensorboard, wandb=config.log_wandb)
    with (
        only_deterministic() if config.deterministic else contextlib.nullcontext(),
        mirrored(config) as mirror,
        joined_world(config.device, config.workers) as world,
        lost_ranks_named(world),
    ):
        check_output(config)
        if world.workers:
            prepare_loaders(BatchRenderer.__module__)  # while this process opens the data and builds the student
        share = Share(world.rank, world.size, config.grad_accum_steps)
        running = Running(
            world=world, dtype=forward_dtype(config.amp_dtype, world.device), batch_size=config.batch_size
        )
        run = Run(config, recipe, share, running, progress, mirror)
        with run.begun(), BackgroundWriter() as writer, stop_request() as stop:
            run.train(writer, stop)
    return config.folder


@contextlib.contextmanager
def only_deterministic() -> Iterator[None]:
    """Make torch use only deterministic algorithms inside the block; enter it before CUDA is used.

    Raises:
        UsageError: an operation has no deterministic algorithm.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    environment = os.environ.get(CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it chooses algorithms by measured time, which varies
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # cuBLAS reads it once, at its first use
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        what, _, why = " ".join(str(error).split()).partition(", but ")
        if CUBLAS_WORKSPACE in why:
            raise UsageError(
                "--deterministic: this process used cuBLAS with a workspace that is not deterministic",
                fix=f"Set {CUBLAS_WORKSPACE}=:4096:8 before it starts",
            ) from error
        raise UsageError(
            f"--deterministic: {what}", fix="Train without --deterministic, or choose another --model"
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if environment is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)


@contextlib.contextmanager
def mirrored(config: TrainConfig) -> Iterator[Mirror | None]:
    """Download a run whose --output is a URL; the first rank uploads changes while the block runs."""
    mirror = OneWriterMirror.of(config.output, config.folder, last=STATE_NAME, leave=frozenset({LOCK_NAME}))
    with contextlib.ExitStack() as stack:
        if mirror is not None:
            mirror.bring()
            if rank_from(os.environ, arrays=False).rank == 0:
                stack.enter_context(mirror.sending())
        yield mirror


class Run:
    """A training run on one rank. Nothing is locked or written before `begun`."""

    def __init__(
        self,
        config: TrainConfig,
        recipe: Recipe | None,
        share: Share,
        running: Running,
        progress: StepProgress | None,
        mirror: Mirror | None = None,
    ) -> None:
        self.config, self.share, self.running, self.mirror = config, share, running, mirror
        self.loss_settings = LossSettings.of(config)
        world = running.world
        self.data = open_data(config, recipe)
        self.on_gpu = renders_on_gpu(config.render, self.data.recipe, world.device)
        self.order = make_order(config, self.data, share)
        self.state = build_state(config, self.data, self.order, world.device)
        self.meta = run_identity(config, self.data, self.order)
        world.check_same(self.meta, "settings")
        self.recorder = Recorder()
        updates = self.order.steps_per_epoch * config.epochs
        self.pace = Pace(
            total=updates, per_epoch=self.order.steps_per_epoch, progress=progress if world.leads else None
        )
        self.eval_source = self._open_eval_data(config.eval_data) if config.eval_data else None
        unused = not config.trains_both_heads and self.state.student.has_distillation_head
        self.on_rank = OnRank(self.state.student, world, compiled=config.compile, unused=unused)
        self.renderer = BatchRenderer(
            Catalogue(self.data.source, self.data.label_set, config.labelled_fraction),
            self.data.recipe,
            self.order,
            share,
        )

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Begin or continue the run; inside the block, no other process may train in its folder."""
        config, world = self.config, self.running.world
        with contextlib.ExitStack() as stack:
            if world.leads:
                stack.enter_context(only_run_in(config.folder))
                check_output(config)  # check again: the process that held the lock before may have left a run
            resume(config, self.state, self.meta)
            world.check_same(self.state.next_update, "checkpoint")
            if world.leads:
                sweep_temporaries(config.folder)
                save_config(config, self.data, self.order)
                announce(config, self.data, self.order, self.state, self.share)
                if self.data.recipe.renderer > 1:
                    warn_without_kernel()
                self.recorder = stack.enter_context(self._open_recorder())
            yield

    def train(self, writer: BackgroundWriter, stop: StopRequest) -> None:
        """Train to the last update, or until a signal asks to stop."""
        config, order, state, world = self.config, self.order, self.state, self.running.world
        consensus, watch = Consensus(world), _LossWatch(self)
        self._catch_up()
        for update, batches, waited in self._updates(order.steps_per_epoch * config.epochs):
            lr = _rate_at(config, order, update)
            set_learning_rate(state.optimizer, lr)
            share, sums = self.accumulate(batches)
            watch.add(update, sums["loss"])
            extra = update_weights(config, state, update)
            state.next_update = update + 1
            self.pace.count(update, sum(len(batch.keys) for batch in batches) * world.size, waited_s=waited, lr=lr)
            epoch, step = order.position(update)
            last = step == order.steps_per_epoch - 1
            if (update + 1) % config.log_interval == 0 or last:
                self._report(update, lr, share, sums, extra)
            if config.probe_interval and (update + 1) % config.probe_interval == 0 and world.leads:
                self._probe(update, batches[0])
            stops = consensus.stops(bool(stop))
            exports = last and _is_due(epoch, config.checkpoint_interval, config.epochs)
            if last or stops or _is_recovery_point(config, update):
                watch.check()
            if exports or stops or _is_recovery_point(config, update):
                self._save(writer, exports)  # before the evaluation, which may take long or fail
            if stops and update + 1 < order.steps_per_epoch * config.epochs:
                writer.wait()
                raise _stopped(stop, state.next_update)
            if last:
                self._end_epoch(epoch)
        watch.check()

    def _open_eval_data(self, location: str) -> Source:
        """Open the evaluation images; raise now if the evaluation would fail after an epoch."""
        source = open_source(location, options=self.config.eval_options, cache=cache_of(self.config))
        labelled_places(source, self.state.student)
        return source

    def _open_recorder(self) -> Recorder:
        config = self.config
        return open_recorder(
            config.folder,
            next_index=self.state.next_update,
            tensorboard=config.log_tensorboard,
            wandb=config.log_wandb,
            wandb_project=config.wandb_project,
            run_config=config.to_dict() | {"recipe": self.data.recipe.model_dump(mode="json")},
        )

    def _updates(self, total: int) -> Iterator[tuple[int, list[Batch], float]]:
        """Yield each remaining update, its batches on the device, and the seconds that the loop waited for them."""
        passes, world = self.share.passes, self.running.world
        left = range(self.state.next_update * passes, total * passes)
        stream = stream_batches(
            self.renderer, left, workers=world.workers, held=passes, device=world.device, unrendered=self.on_gpu
        )
        batches = on_device(stream, world.device)
        for update in range(self.state.next_update, total):
            began = time.monotonic()
            of_update = [next(batches) for _ in range(passes)]
            yield update, of_update, time.monotonic() - began

    def accumulate(self, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
        """Add up the gradients of an update's batches on this rank.

        Every view has the same weight, even though the parts of an update may differ by one unit.

        Returns:
            the share of the update's views that this rank had, times the number of ranks; the loss and its parts, each
            the mean over these views times that share.
        """
        sums: dict[str, Tensor] = {}
        share, passes = 0.0, len(batches)
        for number, batch in enumerate(batches):
            part = (batch.index // passes * self.share.size + self.share.rank) * passes + number
            torch.manual_seed(stream_of("step", str(self.config.seed), str(part)).bits())  # stochastic depth
            weight = len(batch.keys) * self.share.size / self.order.views_per_step
            with self.on_rank.accumulating() if number < passes - 1 else contextlib.nullcontext():
                loss, parts = batch_loss(
                    self.loss_settings, self.on_rank, self.state.student, batch, self.running.dtype
                )
                (loss * weight).backward()
            share += weight
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value * weight
        return share, sums

    def _report(self, update: int, lr: float, share: float, sums: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        """Log and record the numbers of an update: means over all its views, and values that are the same on all ranks."""
        epoch, step = self.order.position(update)
        added = torch.stack([*sums.values(), next(iter(sums.values())).new_tensor(share)]).float()
        *means, shares = self.running.world.mean(added).tolist()
        values = {name: mean / shares for name, mean in zip(sums, means, strict=True)}
        values |= {name: float(value) for name, value in extra.items()}
        speed = self.pace.look(values)
        self.recorder.add("train", update, epoch=epoch, step=step, lr=lr, **speed, **values)

    def _probe(self, update: int, batch: Batch) -> None:
        """Record how similar both tokens are for images of this batch. Nothing that the training uses is changed."""
        epoch, step = self.order.position(update)
        images = mixed_images(batch, self.running.device)[:PROBED_IMAGES]
        self.recorder.add(
            "tokens", update, epoch=epoch, step=step, **probe_tokens(self.state.student, images, self.running)
        )

    def _catch_up(self) -> None:
        """Evaluate now if an earlier start saved the end of an epoch but stopped before its evaluation."""
        epoch, step = self.order.position(self.state.next_update)
        if step == 0 and epoch > 0 and self.state.evaluated < self.state.next_update:
            self._end_epoch(epoch - 1)

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate if this epoch needs it; the time does not count as training."""
        if self.eval_source and _is_due(epoch, self.config.eval_interval, self.config.epochs):
            with self.pace.pause("evaluating"):
                self._evaluate(epoch, self.eval_source)
            self.state.evaluated = self.state.next_update
            if self.running.world.leads:
                save_evaluation(self.config.folder, self.state)

    def _evaluate(self, epoch: int, source: Source) -> None:
        """Evaluate the student and its EMA on all ranks, and keep the better one if it is the best so far."""
        state, world = self.state, self.running.world
        candidates: list[tuple[str, Student]] = [("student", state.student)]
        if state.ema is not None:
            candidates.append(("ema", state.ema.module))  # pyright: ignore[reportArgumentType]
        for name, student in candidates:
            world.share_buffers(student)  # each rank has seen different images
            scores, count = evaluate(student, source, self.running, crop_pct=self.config.crop_pct)
            top1 = scores[primary_head(scores) if self.config.trains_both_heads else "class_head"]["top1"]
            evaluated = {"weights": name, "images": count, "top1": top1, "scores": scores}
            self.recorder.add("eval", state.next_update - 1, epoch=epoch, **evaluated)
            if world.leads:
                log.info("epoch %d %s: %s on %d images", epoch, name, _brief(scores), count)
            if top1 > state.best_top1:
                state.best_top1 = top1
                weights = student.model.state_dict()
                check_finite(weights)
                if world.leads:
                    export_model(self.config.folder / "best", weights, hub_config=hub_config(student))

    def _save(self, writer: BackgroundWriter, exports: bool) -> None:
        """Copy the state and write it in the background; only rank 0 does so."""
        if not self.running.world.leads:
            return
        if self.mirror is not None:
            self.mirror.check()
        state, output = self.state, self.config.folder
        tensors = snapshot(pack_training(state.student, state.optimizer, state.ema))
        meta = self.meta | {"next_update": state.next_update}
        described = hub_config(state.student)

        def write() -> None:
            check_finite(tensors)
            if exports:
                for owner, name in (("model.", "last"), ("ema.", "last-ema")):
                    weights = {
                        key.removeprefix(owner): value for key, value in tensors.items() if key.startswith(owner)
                    }
                    if weights:
                        export_model(output / name, weights, hub_config=described)
            save_state(output / STATE_NAME, tensors, meta)

        writer.submit(write)

    def explain(self, update: int, loss: float) -> TrainingError:
        """Render this rank's views of an update with a NaN or infinite loss again, save them, and return the error."""
        passes, name = self.share.passes, f"nonfinite-rank{self.share.rank}"
        batches: list[Batch] = []
        for number in range(passes):
            with contextlib.suppress(DeitCliError):  # the error to report is the loss
                batches.append(self.renderer.render_here(update * passes + number))
        samples = [{"keys": list(batch.keys), "views": list(batch.views)} for batch in batches]
        record = {"update": update, "loss": str(loss), "batches": samples}
        tensors: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            saved = {"images": batch.images, "class_label": batch.classes.class_label}
            saved |= {} if batch.teacher is None else vars(batch.teacher)
            tensors |= {f"{number}.{name}": tensor for name, tensor in saved.items()}
        save_state(self.config.folder / f"{name}.safetensors", tensors, record)
        path = self.config.folder / f"{name}.json"
        replace_file(path, pretty_json(record))
        return TrainingError(
            f"the loss of update {update} is {loss}; its samples are listed in {path}, their pixels and"
            f" labels in {name}.safetensors beside it",
            fix=(
                "Lower --lr or set --clip-grad, and continue from the last checkpoint with another --output and --init"
            ),
        )


class _LossWatch:
    """Checks each loss one update later, when it has been computed, so that the check does not delay a GPU."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._waiting: tuple[int, Tensor, Any] | None = None  # update, loss on the CPU, the event of its copy

    def add(self, update: int, loss: Tensor) -> None:
        """Check the previous loss, and keep this one for the next call."""
        self.check()
        later = loss.device.type == "cuda"
        value = loss.to("cpu", non_blocking=later)
        event = torch.cuda.current_stream().record_event() if later else None
        self._waiting = (update, value, event)

    def check(self) -> None:
        """Raise TrainingError if the waiting loss is NaN or infinite, because every weight is then wrong."""
        if self._waiting is None:
            return
        update, value, event = self._waiting
        self._waiting = None
        if event is not None:
            event.synchronize()
        if not torch.isfinite(value):
            raise self._run.explain(update, value.item())


def batch_loss(
    settings: LossSettings, on_rank: OnRank, student: Student, batch: Batch, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mix a batch, run the student on it, and return the loss and its detached parts.

    Args:
        settings: kind and weights of the loss.
        on_rank: wrapped student, for the forward pass.
        student: student whose normalisation is used.
        batch: views and targets, on the student's device.
        dtype: dtype of the forward pass; the losses are computed in float32.
    """
    device = batch.images.device
    images = normalise(mixed_images(batch, device), student)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        heads = on_rank(images)
    distill_logits = heads.class_logits if heads.distill_logits is None else heads.distill_logits
    loss, parts = distillation_loss(heads.class_logits, distill_logits, batch.classes, batch.teacher, settings)
    if batch.teacher is not None and settings.distillation_type != "none":
        parts["teacher_agreement"] = (distill_logits.detach().argmax(1) == batch.teacher.hard).float().mean()
    return loss, parts


def update_weights(config: TrainConfig, state: State, update: int) -> dict[str, Tensor]:
    """Update the weights from their gradients, then their moving average; return the norm of the gradients if they are clipped."""
    extra: dict[str, Tensor] = {}
    if config.clip_grad is not None:
        extra["grad_norm"] = torch.nn.utils.clip_grad_norm_(state.student.parameters(), config.clip_grad)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.student, step=update)
    return extra


def _rate_at(config: TrainConfig, order: Order, update: int) -> float:
    top = top_rate(config, order)
    return learning_rate(
        update,
        updates_total=order.steps_per_epoch * config.epochs,
        updates_warmup=round(order.steps_per_epoch * config.warmup),
        lr=top,
        warmup_lr=min(config.warmup_lr, top),
        min_lr=min(config.min_lr, top),
    )


def _brief(scores: Scores) -> str:
    return "  ".join(f"{name} {values['top1']:.2f}" for name, values in scores.items())


def _is_due(epoch: int, interval: int, epochs: int) -> bool:
    return (epoch + 1) % interval == 0 or epoch + 1 == epochs


def _is_recovery_point(config: TrainConfig, update: int) -> bool:
    return bool(config.recovery_interval) and (update + 1) % config.recovery_interval == 0


def _stopped(stop: StopRequest, updates: int) -> StoppedError:
    number = stop.signal or signal.SIGTERM  # another rank received the signal
    return StoppedError(
        f"stopped by {number.name} after update {updates}, which is saved; the same command continues, with --resume",
        number,
    )
