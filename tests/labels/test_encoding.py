"""Codes for probabilities: what `log8` keeps, what it costs, and that reading it is fast and exact."""

import dataclasses
import itertools
import math
from itertools import chain, combinations, pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.builders import files_of, make_labels, small_recipe, small_teacher, write_tars
from support.tables import assert_equal, encode_rows, footer_of, write

from pipeline.errors import LabelSetCorrupt
from pipeline.images.source import open_source
from pipeline.labels.checked_files import ViewsInOrder
from pipeline.labels.encoding import (
    CODECS,
    LOG8_STEP,
    LOG8_ZERO,
    LabelRows,
    codec_of,
    find_problem,
    from_codes,
    to_codes,
)
from pipeline.labels.format import Precision
from pipeline.labels.labelset import LabelSet
from pipeline.labels.tables import Contents, labels_schema, read_views


def slow_codes(prob: list[float], tail: float, num_classes: int) -> list[int]:
    """The definition, one value after the other."""
    values = [*prob, tail / max(1, num_classes - len(prob))]
    codes: list[int] = []
    fallen = 0
    for value in values[1:]:
        if value <= 0 or (LOG8_ZERO in codes) or math.log(prob[0] / value) / LOG8_STEP >= 1100:
            codes.append(LOG8_ZERO)
            continue
        step = round(math.log(prob[0] / value) / LOG8_STEP - fallen)
        codes.append(min(max(step, 0), 254))
        fallen += codes[-1]
    return codes


def slow_values(codes: list[int], num_classes: int) -> list[float]:
    """Relative to the first, then divided by their sum; the last one is the tail."""
    values, fallen = [1.0], 0
    for code in codes:
        fallen = 10**9 if code == LOG8_ZERO else fallen + code
        values.append(math.exp(-LOG8_STEP * fallen) if fallen < 1100 else 0.0)
    values[-1] *= num_classes - len(codes)
    return [value / math.fsum(values) for value in values]


def answers(rows: int, topk: int, classes: int, seed: int, spread: float = 3.0) -> tuple[NDArray[np.float32], Any]:
    logits = np.random.default_rng(seed).normal(0, spread, (rows, classes))
    full = np.exp(logits - logits.max(1, keepdims=True))
    full /= full.sum(1, keepdims=True)
    index = np.argsort(-full, axis=1, kind="stable")
    return np.take_along_axis(full, index[:, :topk], 1).astype(np.float32), np.take_along_axis(full, index, 1)


@given(st.integers(1, 12), st.integers(0, 200), st.integers(0, 10**6), st.floats(0.1, 60))
def test_codes_are_those_of_the_definition(topk, more, seed, spread):
    prob, _ = answers(4, topk, topk + more, seed, spread)
    tail = np.clip(1 - prob.astype(np.float64).sum(1), 0, 1)
    codes = to_codes(prob, tail, topk + more)
    assert codes.tolist() == [slow_codes(p, t, topk + more) for p, t in zip(prob.astype(float).tolist(), tail.tolist(), strict=True)]  # fmt: skip
    kept, left = from_codes(codes, topk + more)
    expected = np.array([slow_values(row, topk + more) for row in codes.tolist()])
    np.testing.assert_allclose(np.column_stack([kept, left]), expected, rtol=1e-6, atol=1e-37)


@given(st.integers(1, 20), st.integers(0, 50), st.data())
def test_any_codes_are_labels_that_a_teacher_can_have_answered(topk, more, data):
    codes = np.array(data.draw(st.lists(st.lists(st.integers(0, 255), min_size=topk, max_size=topk), min_size=1, max_size=5)), np.uint8)  # fmt: skip
    kept, left = from_codes(codes, topk + more)
    index = np.tile(np.arange(topk, dtype=np.uint16), (len(codes), 1))
    rows = encode_rows(np.arange(len(codes)), index[:, 0], index, kept, num_classes=topk + more, precision="float32")
    assert find_problem(rows, topk + more) is None
    np.testing.assert_allclose(kept.sum(1) + left, 1, atol=1e-5)


def test_no_ratio_is_off_by_more_than_half_a_step_however_many_classes_are_kept():
    prob, _ = answers(200, 64, 1000, seed=1)
    tail = 1 - prob.astype(np.float64).sum(1)
    kept, left = from_codes(to_codes(prob, tail, 1000), 1000)
    values = np.column_stack([prob, tail[:, None] / (1000 - 64)]).astype(float)
    stored = np.column_stack([kept, left[:, None] / (1000 - 64)]).astype(float)
    off = np.log(values / values[:, :1]) - np.log(stored / stored[:, :1])
    assert np.abs(off).max() <= LOG8_STEP / 2 + 1e-5


def test_the_divergence_that_codes_cost_is_small():
    prob, full = answers(500, 10, 1000, seed=2)
    tail = 1 - prob.astype(np.float64).sum(1)

    def divergence(kept: NDArray[np.floating], left: NDArray[np.floating]) -> float:
        rest = np.repeat(left[:, None] / 990, 990, axis=1)
        return float((full * np.log(full / np.column_stack([kept, rest]))).sum(1).mean())

    cost = divergence(*from_codes(to_codes(prob, tail, 1000), 1000)) - divergence(prob.astype(float), tail)
    assert 0 < cost < LOG8_STEP**2 / 24  # the variance of a uniform error of a logit, halved


@pytest.mark.parametrize(
    ("prob", "tail", "classes", "codes"),
    [
        ([1.0], 0.0, 1, [255]),  # the only class
        ([1.0, 0.0, 0.0], 0.0, 5, [255, 255, 255]),  # certain
        ([0.5, 0.5], 0.0, 2, [0, 255]),  # every class is kept
        ([0.4, 0.2], 0.4, 4, [7, 0]),  # ln 2 is 6.93 steps; the mean of the rest is 0.2 too
        ([0.25, 0.25], 0.5, 3, [0, 0]),  # a tail larger than its classes can have: never up
        ([1.0, 1e-30], 0.0, 9, [254, 255]),  # farther than a code reaches
    ],
)
def test_extreme_answers_have_codes(prob, tail, classes, codes):
    found = to_codes(np.array([prob], np.float32), np.array([tail]), classes)
    assert found.tolist() == [codes]
    kept, left = from_codes(found, classes)
    assert np.isfinite(kept).all()
    assert abs(kept.sum() + left[0] - 1) < 1e-6


def test_a_label_has_a_byte_for_each_probability_and_no_column_of_its_hard_label():
    some, many, none = codec_of("log8", 1000, 10), codec_of("log8", 70_000, 10), codec_of("log8", 1000, 0)
    assert labels_schema(some).names == ["view", "row", "topk_index", "topk_code"]
    assert labels_schema(none).names == ["view", "row", "hard"]
    assert (some.label_bytes, many.label_bytes, none.label_bytes) == (30, 50, 2)


def test_every_precision_has_a_codec_and_every_column_is_a_field_of_the_rows():
    assert set(CODECS) == set(get_args(Precision))
    fields = {field.name for field in dataclasses.fields(LabelRows)}
    for precision, topk in itertools.product(CODECS, (0, 1, 10)):
        codec, prob = codec_of(precision, 1000, topk), np.full((2, topk), 0.1, np.float32)
        assert set(codec.record.names) <= fields, precision
        assert list(codec.store(np.zeros(2), np.zeros((2, topk)), prob)) == list(codec.record.names)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_storing_changes_no_probability_by_more_than_the_codec_says(precision):
    codec = codec_of(precision, 1000, 10)
    for seed, spread in itertools.product(range(5), (0.5, 3, 8)):
        prob, _ = answers(200, 10, 1000, seed, spread)
        rows = codec.encode(np.arange(200), np.zeros(200), np.zeros((200, 10)), prob)
        assert np.abs(rows.topk_prob.astype(float) - prob).max() <= codec.rounding


def test_the_lines_of_a_card_decode_as_the_codec_does():
    prob, _ = answers(50, 10, 1000, seed=3)
    codec = codec_of("log8", 1000, 10)
    rows = codec.encode(np.arange(50), np.zeros(50), np.zeros((50, 10)), prob)
    names = {"np": np, "code": rows.topk_code}
    exec("\n".join(codec.numpy_lines()), names)
    np.testing.assert_allclose(names["values"], np.column_stack([rows.topk_prob, rows.tail_mass]), rtol=1e-5)
    assert codec_of("float16", 1000, 10).numpy_lines() == codec_of("log8", 1000, 0).numpy_lines() == ()


@pytest.mark.parametrize("topk", [0, 2])
def test_a_set_of_codes_holds_what_one_of_floats_holds_but_for_rounding(tmp_path, topk):
    data = write_tars(tmp_path / "data")
    source = open_source(data)
    sets = {
        name: make_labels(
            tmp_path / name, data, teacher=small_teacher(source), recipe=small_recipe(), precision=name, topk=topk
        )
        for name in ("float32", "log8")
    }
    assert sets["log8"].plan.labelset_id != sets["float32"].plan.labelset_id
    coded = LabelSet.open(tmp_path / "log8")
    for shard in coded.shards:
        for view in coded.views:
            mine, exact = coded.read(shard, view), sets["float32"].read(shard, view)
            assert mine.row.tolist() == exact.row.tolist()
            assert mine.hard.tolist() == exact.hard.tolist()
            assert mine.topk_index.tolist() == exact.topk_index.tolist()
            assert mine.topk_prob.dtype == np.float32
            np.testing.assert_allclose(mine.topk_prob, exact.topk_prob, rtol=0.06)
    again = make_labels(
        tmp_path / "again", data, teacher=small_teacher(source), recipe=small_recipe(), precision="log8", topk=topk
    )
    assert files_of(tmp_path / "again") == files_of(tmp_path / "log8")
    assert again.plan.precision == "log8"


def slow_problem(rows: LabelRows, num_classes: int) -> str | None:
    """Rule 11 of the format page, one value after the other, in the order in which problems are named."""
    row, index, hard = rows.row.tolist(), rows.topk_index.tolist(), rows.hard.tolist()
    prob, tail = rows.topk_prob.astype(float).tolist(), rows.tail_mass.astype(float).tolist()
    rules = {
        "rows are not in ascending order": all(a < b for a, b in pairwise(row)),
        "a class occurs twice in top-k": all(len(set(each)) == len(each) for each in index),
        f"a class is not below {num_classes}": all(c < num_classes for c in (*hard, *chain(*index))),
        "a probability is outside 0..1": all(0 <= p <= 1 and math.copysign(1, p) > 0 for p in (*chain(*prob), *tail)),
        "probabilities are not in descending order": all(not a < b for each in prob for a, b in pairwise(each)),
        "probabilities do not add up to 1": all(
            not abs(sum(p) + t - 1) > 0.01 for p, t in zip(prob, tail, strict=False)
        ),
        "`hard` is not the first class of top-k": all(
            h == each[0] for h, each in zip(hard, index, strict=True) if each
        ),
    }
    return next((problem for problem, holds in rules.items() if not holds), None)


def sound_rows(rows: int, topk: int, classes: int, precision: Precision, seed: int) -> LabelRows:
    prob, _ = answers(rows, topk, classes, seed)
    index = np.stack([np.random.default_rng(seed + row).permutation(classes)[: max(topk, 1)] for row in range(rows)])
    kept = np.arange(rows), index[:, 0], index[:, :topk], prob
    return encode_rows(*kept, num_classes=classes, precision=precision)


VALUES = {  # what a damaged or hostile column might hold
    "row": [0, 1, 2, 2**32 - 1],
    "hard": [0, 1, 8, 9, 65_535],
    "topk_index": [0, 1, 8, 9, 65_535],
    "topk_prob": [0.0, -0.0, 6e-8, 0.1, 0.5, 0.99, 1.0, 1.001, -0.5, math.nan, math.inf, -math.inf],
    "tail_mass": [0.0, -0.0, 6e-8, 0.009, 0.011, 1.0, 1.001, -0.5, math.nan, math.inf],
}


@given(st.integers(1, 6), st.integers(0, 9), st.sampled_from(["float16", "float32"]), st.integers(0, 99), st.data())
@settings(max_examples=400)
def test_the_fast_check_finds_what_the_slow_one_finds(rows, topk, precision, seed, data):
    found = sound_rows(rows, topk, 9, precision, seed)
    for name in data.draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=2)):
        column = getattr(found, name).copy()
        if column.size:
            column.reshape(-1)[data.draw(st.integers(0, column.size - 1))] = data.draw(st.sampled_from(VALUES[name]))
        found = dataclasses.replace(found, **{name: column})
    assert find_problem(found, 9) == slow_problem(found, 9)


@pytest.mark.parametrize("topk", [1, 2, 3, 8, 9, 63, 64, 65, 100])
def test_a_class_that_stands_twice_is_found_at_any_two_ranks(topk):
    rows = sound_rows(2, topk, 200, "float32", seed=topk)
    assert find_problem(rows, 200) is None
    for first, second in combinations(range(topk), 2):
        index = rows.topk_index.copy()
        index[1, second] = index[1, first]
        hard = index[:, 0]
        found = dataclasses.replace(rows, topk_index=index, hard=hard)
        assert find_problem(found, 200) == "a class occurs twice in top-k", (first, second)


@pytest.mark.parametrize("views", [1, 2, 5])
def test_several_views_are_checked_as_each_of_them(views):
    """Rows rise within a view and begin again in the next one."""
    parts = [sound_rows(4, 3, 9, "float16", seed) for seed in range(views)]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(LabelRows)}
    whole = LabelRows(**{name: np.concatenate(each) for name, each in columns.items() if each[0] is not None})
    assert find_problem(whole, 9, views) is None
    last = whole.row.copy()
    last[-1] = last[-2]
    assert find_problem(dataclasses.replace(whole, row=last), 9, views) == "rows are not in ascending order"


@pytest.mark.parametrize("precision", ["float16", "float32", "log8"])
@pytest.mark.parametrize("topk", [0, 3])
def test_views_are_the_same_in_whatever_order_they_are_read(tmp_path, precision, topk):
    views = [sound_rows(5, topk, 9, precision, seed) for seed in range(12)]
    path = write(tmp_path / "a.parquet", views, footer_of(views, 9, precision, view_start=3))
    rng = np.random.default_rng(0)
    orders = [list(range(12)), list(range(12))[::-1], [0, 1, 1, 2, 0, 1, 2, 3, 4, 5, 3, 11], *rng.permutation(12)[None].repeat(3, 0).tolist()]  # fmt: skip
    for order in orders:
        reader = ViewsInOrder(Contents("a", path.read_bytes()))
        for view in order:
            assert_equal(reader.read(3 + view), views[view])


def test_a_damaged_view_spoils_none_that_is_read_with_it(tmp_path):
    views = [sound_rows(5, 3, 9, "float16", seed) for seed in range(8)]
    tail = views[6].tail_mass.copy()
    tail[2] = np.nan
    views[6] = dataclasses.replace(views[6], tail_mass=tail)
    contents = Contents("a", write(tmp_path / "a.parquet", views, footer_of(views, 9)).read_bytes())
    for read in (ViewsInOrder(contents).read, lambda view: read_views(contents, view, 1)[0]):
        for view in range(6):
            assert_equal(read(view), views[view])
        with pytest.raises(LabelSetCorrupt, match="a: view 6: a probability is outside"):
            read(6)
        assert_equal(read(7), views[7])
