"""What is done on which kind of device, told from calls: no accelerator is needed."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.builders import teacher_of
from support.fake_accelerator import copies_of, imitate_accelerator

from pipeline.errors import UsageError
from pipeline.machine import timing
from pipeline.pixels.handover import refuse_impossible
from pipeline.stage1.ray import plan_ray
from pipeline.teacher.teacher import one_thread
from pipeline.views.mixing import mix_batch
from pipeline.views.recipe import PRESETS
from trainer import parallel
from trainer.losses import ClassTarget
from trainer.stream import Batch, mixed_images

# Only CUDA's streams and events say when a copy that does not wait has ended.
LATER = [("cuda", True), ("xpu", False), ("mps", False)]


@pytest.mark.parametrize(("kind", "later"), LATER)
def test_copies_to_a_device_wait_unless_a_stream_says_when_they_ended(monkeypatch, kind, later):
    one = torch.zeros(1, dtype=torch.int64)
    classes = ClassTarget(*(copy.copy(one) for _ in ClassTarget.__dataclass_fields__))
    batch = Batch(0, range(1), ("a",), torch.zeros(1, 2, 2, 3, dtype=torch.uint8), mix_batch([], [], 1), classes, None)
    copies = copies_of(monkeypatch)
    batch.to(torch.device(kind))
    mixed_images(batch, torch.device(kind))
    assert set(copies) == {(kind, later)}
    assert len(copies) >= 1 + 3 + 3


@pytest.mark.parametrize("with_streams", [False, True])
def test_answers_come_back_without_waiting_only_where_an_event_is_recorded(monkeypatch, with_streams):
    teacher = teacher_of("test_resnet", pretrained=False, num_classes=3, img_size=16)
    images, mix = torch.zeros(2, 16, 16, 3, dtype=torch.uint8), mix_batch([], [], 2)
    teacher._copies = object() if with_streams else None  # pyright: ignore[reportAttributeAccessIssue]
    with one_thread(teacher.device):
        copies = copies_of(monkeypatch)
        teacher._compute(images, mix, 2)
    assert copies[-4:] == [("cpu", with_streams)] * 4


@pytest.mark.parametrize(("kind", "waits"), [("cpu", 0), ("cuda", 1), ("xpu", 1), ("mps", 1)])
def test_a_measurement_waits_for_the_work_of_any_device(monkeypatch, kind, waits):
    waited: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    timing.synchronise(torch.device(kind))
    assert waited == [torch.device(kind)] * waits


@pytest.mark.parametrize("kind", ["cpu", "xpu", "mps"])
def test_only_cuda_renders_views(kind):
    with pytest.raises(
        UsageError, match=f"--render gpu: it needs a CUDA device, this run uses {kind}. Pass --render cpu"
    ):
        refuse_impossible("gpu", PRESETS["deit"], torch.device(kind))


TWO_RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TWO_RANKS |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("kind", "device", "backend"),
    [(None, "cpu", "gloo"), ("cuda", "cuda:1", "nccl"), ("xpu", "xpu:1", "xccl")],
)
def test_ranks_talk_through_the_library_of_their_devices(monkeypatch, kind, device, backend):
    imitate_accelerator(monkeypatch, kind, 2 if kind else 0)
    began, current = [], []
    monkeypatch.setattr(parallel, "resolve_device", torch.device)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(set_device=current.append))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: began.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with parallel.joined_world("auto", 0, TWO_RANKS) as world:
        assert world.device == torch.device(device)
    assert began == [backend]
    assert current == ([torch.device(device)] if kind else [])


def test_two_ranks_on_apples_gpu_are_refused(monkeypatch):
    imitate_accelerator(monkeypatch, "mps", 1)
    monkeypatch.setattr(parallel, "resolve_device", torch.device)
    with (
        pytest.raises(UsageError, match=r"2 ranks cannot share Apple's GPU\. Start one process, or pass --device cpu"),
        parallel.joined_world("auto", 0, TWO_RANKS),
    ):
        pass


@pytest.mark.parametrize(
    ("device", "planned"),
    [("auto", ("cuda", 3, 4)), ("cuda", ("cuda", 3, 4)), ("xpu", ("xpu", 3, 4)), ("cpu", ("cpu", 20, 1))],
)
def test_ray_gives_each_worker_a_gpu_of_the_kind_that_was_asked_for(device, planned):
    nodes = [{"GPU": 2.0, "CPU": 8.0}, {"GPU": 1.0, "CPU": 8.0}, {"CPU": 4.0}]
    assert plan_ray(nodes, device, None) == planned
