"""The arithmetic of `deit-cli estimate`, against numbers worked out by hand."""

import dataclasses
import io

import numpy as np
import pytest

from pipeline.cost.estimate import Estimate, estimate
from pipeline.cost.rates import Rates
from pipeline.cost.reach import Machine, ReachableRates, reachable_rates
from pipeline.labels.encoding import codec_of
from pipeline.labels.format import Precision
from pipeline.labels.tables import LabelsFooter, write_labels

# 10 ms to read and 20 ms to decode an image, 2 ms to render a view, 1 ms for the teacher's answer.
RATES = Rates(read_s=0.010, decode_s=0.020, render_s=0.002, copy_s=5e-5, teacher_s=0.0009, topk_s=0.0001, write_s=1e-6)


def worked_out(reachable: ReachableRates | None = None, **changes) -> Estimate:
    known = {
        "num_images": 1000,
        "num_views": 36,
        "views_per_decode": 30,
        "bytes_per_label": 44,
        "teacher_s": 3.0,  # in any unit: the teacher costs 3, a student's step 2
        "student_s": 2.0,
        "students": 4,
        "epochs": 18,
    }
    return estimate(RATES, reachable or ReachableRates(1000.0, 333.0, None), **(known | changes))


def test_a_view_costs_its_render_and_its_share_of_one_decode():
    assert RATES.view_s(1) == pytest.approx(0.032)
    assert RATES.view_s(30) == pytest.approx(0.003)  # 30 ms / 30 + 2 ms
    assert RATES.answer_s == pytest.approx(0.001)


def test_hours_bytes_and_passes():
    result = worked_out()
    assert result.passes == 36_000
    assert result.teacher_hours == pytest.approx(0.01)  # 36,000 x 1 ms = 36 s
    assert result.render_core_hours == pytest.approx(0.03)  # 36,000 x 3 ms = 108 s
    assert result.hours == pytest.approx(36_000 / 333 / 3600)
    assert result.limit == "rendering"
    assert result.cores_per_device == pytest.approx(3)  # cores that make 3 ms views for 1 ms answers
    assert result.label_bytes == 36_000 * 44


def test_cost_of_both_ways():
    result = worked_out()
    # 18,000 steps of each of 4 students. The unit is a third of an answer: 1/3 ms.
    # Offline: 36,000 x 1 ms + 72,000 x 2/3 ms = 36 s + 48 s. Online: 72,000 x (1 + 2/3) ms = 120 s.
    assert result.offline_hours == pytest.approx(84 / 3600)
    assert result.online_hours == pytest.approx(120 / 3600)
    assert result.online_ratio == pytest.approx(2.5)


BREAK_EVEN = [
    # views, epochs, smallest number of students whose online passes outnumber the views
    (30, 300, 1),  # 300 > 30
    (300, 300, 2),  # one student is a tie: 300 = 300
    (299, 300, 1),
    (301, 300, 2),
    (600, 300, 3),
    (30, 10, 4),  # three students: 30 = 30
    (1, 1, 2),
]


@pytest.mark.parametrize(("views", "epochs", "students"), BREAK_EVEN)
def test_break_even_is_the_first_number_of_students_for_which_offline_costs_less(views, epochs, students):
    for number in range(1, students + 2):
        result = worked_out(num_views=views, epochs=epochs, students=number)
        assert result.offline_from == students
        cheaper = result.offline_hours < result.online_hours * (1 - 1e-9)
        assert cheaper == (number >= students)


def test_more_images_cost_in_proportion_and_move_no_ratio():
    one, ten = worked_out(), worked_out(num_images=10_000)
    for name in (
        "passes",
        "teacher_hours",
        "render_core_hours",
        "hours",
        "label_bytes",
        "offline_hours",
        "online_hours",
    ):
        assert getattr(ten, name) == pytest.approx(10 * getattr(one, name)), name
    for name in ("online_ratio", "offline_from", "cores_per_device", "limit"):
        assert getattr(ten, name) == getattr(one, name)


REACHABLE = [
    # devices, loaders, cores, threads, views per decode: views/s of teacher, rendering, cores; which decides
    (1, 3, 4, None, 30, (1000, 1000, None), "teacher"),
    (2, 3, 4, None, 30, (2000, 1000, None), "rendering"),
    (1, 64, 65, None, 1, (1000, 2000, None), "teacher"),  # one view a decode: 32 ms each
    (1, 1, 2, 2, 30, (1000, 1000 / 3, 400), "rendering"),  # 2 cores / (2 x 1 ms + 3 ms)
    (1, 2, 2, 2, 30, (1000, 2000 / 3, 400), "cores"),
    (4, 4, 2, 1, 30, (4000, 4000 / 3, 500), "cores"),  # more processes than cores help nobody
]


@pytest.mark.parametrize(("devices", "loaders", "cores", "threads", "shared", "expected", "limit"), REACHABLE)
def test_the_slowest_part_decides(devices, loaders, cores, threads, shared, expected, limit):
    found = reachable_rates(
        RATES,
        Machine(device="any", views_per_decode=shared, devices=devices, loaders=loaders, cores=cores, threads=threads),
    )
    assert found.teacher == pytest.approx(expected[0])
    assert found.rendering == pytest.approx(expected[1])
    assert found.cores == (None if expected[2] is None else pytest.approx(expected[2]))
    assert found.together == pytest.approx(min(value for value in expected if value is not None))
    assert found.limit == limit


def test_an_estimate_can_be_written_as_json_by_its_names():
    """Scripts read these."""
    assert [field.name for field in dataclasses.fields(Estimate)] == [
        "passes",
        "teacher_hours",
        "render_core_hours",
        "hours",
        "limit",
        "cores_per_device",
        "label_bytes",
        "online_ratio",
        "offline_from",
        "offline_hours",
        "online_hours",
    ]


def label_shard(classes: int, topk: int, precision: Precision) -> int:
    """Write 8 views of 2,000 images, answered at random, and return the size of the file."""
    rng = np.random.default_rng(0)
    rows, views, codec = np.arange(2000), [], codec_of(precision, classes, topk)
    for _ in range(8):
        prob = -np.sort(-rng.dirichlet(np.full(classes, 0.1), size=2000).astype(np.float32), axis=1)[:, :topk]
        index = rng.permuted(np.tile(np.arange(classes), (2000, 1)), axis=1)[:, : max(1, topk)]
        views.append(codec.encode(rows, index[:, 0], index[:, :topk], prob))
    footer = LabelsFooter(
        labelset_id="0" * 64,
        recipe_id="0" * 64,
        teacher_id="0" * 64,
        source_id="0" * 64,
        shard="train-000000",
        view_start=0,
        view_stop=8,
        rows_per_view=2000,
        num_classes=classes,
        topk=topk,
        precision=precision,
        content_xxh3=codec.content_xxh3(views),
        probes=[],
        environment={},
    )
    file = io.BytesIO()
    write_labels(file, views, footer)
    return len(file.getvalue())


SHARDS: list[tuple[int, int, Precision, int]] = [
    # classes, K, precision, bytes of a label: 2 for each class number, 2 or 4 for each probability and the tail
    (100, 10, "float16", 2 + 10 * (2 + 2) + 2),
    (100, 5, "float32", 2 + 5 * (2 + 4) + 4),
    (100, 0, "float16", 2),
]


@pytest.mark.parametrize(("classes", "topk", "precision", "each"), SHARDS, ids=range(len(SHARDS)))
def test_the_bytes_that_are_promised_are_those_of_a_file(classes, topk, precision, each):
    assert codec_of(precision, classes, topk).label_bytes == each
    assert 0.4 * each * 16_000 < label_shard(classes, topk, precision) < 1.1 * each * 16_000
