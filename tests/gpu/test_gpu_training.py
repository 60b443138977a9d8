"""Training on a GPU: stored labels are the online teacher's, runs resume, and dtypes, passes, EMA and NCCL do their part."""

import copy
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from on_gpu import CNN, TINY, labels_of, load, losses_of, run_config, state_of
from support.builders import before_update, interrupt
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import StoppedError
from trainer import loop
from trainer.loop import train
from trainer.losses import TeacherTarget
from trainer.parallel import Consensus, OnRank, World
from trainer.stream import Batch, mixed_images
from trainer.student import Student, create_student

pytestmark = pytest.mark.gpu

# Twenty-one updates, the same each time.
EXACT: dict[str, Any] = {"epochs": 7, "deterministic": True, "amp_dtype": "float32"}


# --- parity ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_training_from_stored_labels_has_the_losses_of_the_teacher_in_the_step(
    device, data, tmp_path, monkeypatch, kind
):
    """Twenty-one updates of the training loop itself. Hard labels: equal losses. Soft labels of all classes: to 1e-4, because
    passes of another size round a probability of the teacher in another way."""
    teacher = load(CNN, device)
    stored = labels_of(teacher, tmp_path / "set", data, precision="float32")
    real = loop.batch_loss
    differing: list[Tensor] = []

    def asking(shift: int) -> Callable[..., Any]:
        def batch_loss(settings: Any, on_rank: Any, student: Any, batch: Batch, dtype: torch.dtype) -> Any:
            with torch.no_grad():
                prob, index = teacher.logits(mixed_images(batch, device))[0].softmax(1).sort(dim=1, descending=True)
            assert batch.teacher is not None
            differing.append((index[:, 0] != batch.teacher.hard).sum())
            answers = TeacherTarget(
                hard=index[:, 0].roll(shift),
                topk_index=index.roll(shift, 0),
                topk_prob=prob.roll(shift, 0),
                tail_mass=torch.zeros_like(batch.teacher.tail_mass),
            )
            return real(settings, on_rank, student, dataclasses.replace(batch, teacher=answers), dtype)

        return batch_loss

    def losses(name: str) -> list[float]:
        return losses_of(train(run_config(stored, tmp_path / name, device, distillation_type=kind, **EXACT)))

    mine = losses("stored")
    monkeypatch.setattr(loop, "batch_loss", asking(0))
    theirs = losses("online")
    assert len(mine) == 21
    assert sum(int(each) for each in differing) == 0
    if kind == "hard":
        assert mine == theirs
    else:
        assert mine == pytest.approx(theirs, rel=0, abs=1e-4)
    monkeypatch.setattr(loop, "batch_loss", asking(2))
    assert losses("shifted") != pytest.approx(theirs, rel=0, abs=1e-2)  # labels of other views are noticed


# --- interruptions --------------------------------------------------------------------------------------------


def difference(one: Path, other: Path) -> dict[str, float]:
    """Return how far the tensors of two states are apart, those that are apart."""
    mine, theirs = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    return {n: float((mine[n] - theirs[n]).abs().max()) for n in mine if not torch.equal(mine[n], theirs[n])}


@pytest.mark.parametrize("amp_dtype", ["auto", "float32"])
def test_a_deterministic_run_that_is_stopped_and_resumed_ends_with_the_same_bits(
    device, label_set, tmp_path, amp_dtype
):
    """Weights, EMA and both moments, with stochastic depth and clipping."""
    settings = {"deterministic": True, "amp_dtype": amp_dtype, "drop_path": 0.2, "clip_grad": 1.0}
    train(run_config(label_set, tmp_path / "whole", device, **settings))
    with (
        before_update(4, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(StoppedError, match="stopped by SIGTERM after update 5, which is saved"),
    ):
        train(run_config(label_set, tmp_path / "cut", device, **settings))
    train(run_config(label_set, tmp_path / "cut", device, resume="auto", **settings))
    assert difference(tmp_path / "whole", tmp_path / "cut") == {}
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")


def test_any_run_that_is_interrupted_and_resumed_goes_on_as_if_nothing_had_been(
    device, label_set, tmp_path, record_property
):
    """Without --deterministic a GPU may add in another order each time: losses agree to 0.01, and 99 % of the weights to 1e-4,
    where nine updates may move each by 9e-3. (AdamW makes whole steps of gradients that are rounding alone.)"""
    settings = {"recovery_interval": 1, "drop_path": 0.2}
    train(run_config(label_set, tmp_path / "whole", device, **settings))
    with before_update(5, interrupt), pytest.raises(KeyboardInterrupt):
        train(run_config(label_set, tmp_path / "cut", device, **settings))
    train(run_config(label_set, tmp_path / "cut", device, resume="auto", **settings))
    worst = max(difference(tmp_path / "whole", tmp_path / "cut").values(), default=0.0)
    record_property("largest difference of a tensor of the state", worst)
    print(f"largest difference of a tensor of the state: {worst:g}")
    assert losses_of(tmp_path / "cut") == pytest.approx(losses_of(tmp_path / "whole"), rel=0, abs=0.01)
    assert share_within(tmp_path / "whole", tmp_path / "cut", 1e-4) > 0.99


def share_within(one: Path, other: Path, limit: float) -> float:
    """Return the share of the student's weights that are at most so far apart; the keys' bias, which has no gradient, is left
    out."""
    mine, theirs = state_of(one), state_of(other)
    apart = [(mine[n] - theirs[n]).abs().ravel() for n in mine if n.startswith("model.") and "qkv.bias" not in n]
    return float((torch.cat(apart) <= limit).float().mean())


# --- dtypes, passes, averages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp_dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_loss_falls_in_either_dtype_and_the_forward_pass_runs_in_it(
    device, label_set, tmp_path, amp_dtype, expected
):
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            seen.add(output.dtype)

    hook = register_module_forward_hook(note)
    try:
        train(run_config(label_set, tmp_path / "run", device, amp_dtype=amp_dtype, epochs=20, drop_path=0.0, lr=3e-3))
    finally:
        hook.remove()
    assert seen == {expected}
    assert {value.dtype for name, value in state_of(tmp_path / "run").items() if name.startswith("model.")} == {
        torch.float32
    }
    losses = losses_of(tmp_path / "run", "distill_loss")
    assert np.isfinite(losses).all()
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


@pytest.mark.usefixtures("full_float32")
def test_two_passes_of_half_the_batch_are_one_of_the_whole(device, label_set, tmp_path):
    """In float32, to the order of sums: losses to 1e-4, the gradients' norm to 0.1 %, and 99 % of the weights to 1e-5, where each
    may move by 4e-3. (AdamW does not see the size of a gradient; its norm shows it, with a limit that is never reached.)"""
    settings = {"drop_path": 0.0, "epochs": 2, "warmup_epochs": 0, "amp_dtype": "float32", "clip_grad": 1e3}
    train(run_config(label_set, tmp_path / "one", device, batch_size=16, **settings))
    train(run_config(label_set, tmp_path / "two", device, batch_size=8, grad_accum_steps=2, **settings))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=0, abs=1e-4)
    one, two = (losses_of(tmp_path / name, "grad_norm") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)
    assert share_within(tmp_path / "one", tmp_path / "two", 1e-5) > 0.99


def test_the_average_of_the_weights_is_the_one_worked_out_by_hand(device, label_set, tmp_path, monkeypatch):
    real, decay = loop.update_weights, 0.7
    by_hand: dict[str, Tensor] = {}

    def step(config: Any, state: Any, update: int) -> dict[str, Tensor]:
        if not by_hand:
            by_hand.update({name: value.cpu().double() for name, value in state.student.state_dict().items()})
        extra = real(config, state, update)
        assert {value.device.type for value in state.ema.module.state_dict().values()} == {device.type}
        kept = decay if update > 1 else 0.0  # timm's average starts with the weights after the second update
        for name, value in state.student.state_dict().items():
            by_hand[name] = kept * by_hand[name] + (1 - kept) * value.cpu().double()
        return extra

    monkeypatch.setattr(loop, "update_weights", step)
    train(run_config(label_set, tmp_path / "run", device, model_ema_decay=decay, warmup_epochs=0))
    state = state_of(tmp_path / "run")
    averaged = {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")}
    assert averaged
    found = {name: value for name, value in by_hand.items() if name.removeprefix("model.") in averaged}
    assert len(found) == len(averaged)
    for name, value in found.items():
        torch.testing.assert_close(averaged[name.removeprefix("model.")].double(), value, rtol=0, atol=1e-6)
    assert any(not torch.equal(state[f"model.{name}"], value) for name, value in averaged.items())


# --- several ranks, of which one is there ---------------------------------------------------------------------


@pytest.fixture
def world(device, tmp_path, monkeypatch) -> Iterator[World]:
    """Half of a world of two: a group with this process alone. A sum over it is its own value, as is a gradient."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        yield World(0, 2, device, 0)
    finally:
        dist.destroy_process_group()


def tiny_student(device: torch.device) -> Student:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if name != "model"}
    student = create_student("deit-ti", num_classes=3, img_size=16, drop_path=0.0, **sizes).to(device)
    for head in (student.model.head, student.model.head_dist):
        nn.init.normal_(head.weight, std=0.5)  # DeiT's start at zero, which stops every gradient below
    return student.train()


def gradients(on_rank: OnRank, student: Student, images: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradients that these batches add up to, the last one shared with the other ranks."""
    for batch in images[:-1]:
        with on_rank.accumulating():
            _loss(on_rank, batch).backward()
    _loss(on_rank, images[-1]).backward()
    return {name: value.grad for name, value in student.named_parameters() if value.grad is not None}


def _loss(on_rank: OnRank, images: Tensor) -> Tensor:
    heads = on_rank(images)
    assert heads.distill_logits is not None
    return heads.class_logits.square().mean() + heads.distill_logits.square().mean()


@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_through_the_wrapper_of_several_ranks_are_those_of_the_bare_student(world, passes):
    bare = tiny_student(world.device)
    wrapped = copy.deepcopy(bare)
    images = [torch.randn(6, 3, 16, 16, device=world.device) for _ in range(passes)]
    alone = World(0, 1, world.device, 0)
    expected = gradients(OnRank(bare, alone, compiled=False, unused=False), bare, images)
    on_rank = OnRank(wrapped, world, compiled=False, unused=False)
    assert isinstance(on_rank._call, DistributedDataParallel)
    found = gradients(on_rank, wrapped, images)
    assert found.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_ranks_add_up_average_and_share_over_the_group(world):
    counts = torch.tensor([[3, 4], [5, 2**40]])
    assert torch.equal(world.total(counts), counts)
    assert world.total(counts).device.type == "cpu"
    values = torch.tensor([1.5, -2.0], device=world.device)
    assert world.mean(values).tolist() == [0.75, -1.0]  # of two ranks, of which the other adds nothing
    module = nn.BatchNorm1d(4).to(world.device)
    before = {name: value.clone() for name, value in module.named_buffers()}
    world.share_buffers(module)
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    consensus = Consensus(world)
    assert [consensus.stops(told) for told in (False, True, False, False)] == [False, False, True, False]
