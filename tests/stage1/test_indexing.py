"""Indexing counts the samples of all source shards, and keeps the samples of none."""

import gc
import random
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from support.label_sets import make_label_set, write_source

from pipeline.errors import UsageError
from pipeline.images.source import open_source
from pipeline.labels.tables import SampleRows
from pipeline.stage1 import indexing, plan
from pipeline.stage1.indexing import Census, Reading, index_samples
from pipeline.stage1.precompute import _spread
from pipeline.storage.json import pretty_json


def test_samples_of_at_most_two_source_shards_are_in_memory_at_a_time(tmp_path, monkeypatch):
    data = write_source(tmp_path / "images", (3,) * 12)
    label_set = make_label_set(data, tmp_path / "set")
    alive: list[weakref.ref[SampleRows]] = []
    most = 0

    def watched(*args):
        nonlocal most
        samples = checked_samples(*args)
        alive.append(weakref.ref(samples))
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))
        return samples

    checked_samples = indexing.checked_samples
    monkeypatch.setattr(indexing, "checked_samples", watched)
    reading = Reading(open_source(data), label_set.shards, "fail", 0, lambda _: None)
    census = index_samples(label_set.folder, label_set.plan, reading)
    assert len(alive) == 12
    assert most <= 2
    assert census.usable == dict.fromkeys(label_set.shards, 3)
    assert (census.images, census.bad) == (36, 0)


@pytest.mark.parametrize(
    ("labels", "neighbours", "same"),
    [
        ([[0, 0, 1]], 2, 1),
        ([[0], [0]], 0, 0),  # the last of a source shard and the first of the next are no neighbours
        ([[0, None, 0, 0]], 1, 1),
        ([[]], 0, 0),
    ],
)
def test_neighbours_are_pairs_within_a_source_shard_that_both_have_a_label(labels, neighbours, same):
    census = Census()
    for number, column in enumerate(labels):
        census.add(str(number), Rows(column))
    assert (census.neighbours, census.same_class) == (neighbours, same)
    assert census.classes == {label for column in labels for label in column}


class Rows(SampleRows):
    """The samples of which only the class labels matter."""

    def __init__(self, labels):
        nothing = (None,) * len(labels)
        super().__init__(tuple(map(str, labels)), tuple(labels), [], nothing, [], [], nothing)  # pyright: ignore


@pytest.mark.parametrize("limit", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_samples_for_the_accuracy_are_spread_as_over_the_list_of_all_labelled_samples(limit, seed):
    draw = random.Random(seed)
    columns = [[draw.choice([None, 0, 1]) for _ in range(draw.randrange(20))] for _ in range(draw.randrange(1, 9))]
    shards = tuple(SimpleNamespace(name=str(at), class_labels=column) for at, column in enumerate(columns))
    labelled = [(shard, row) for shard in shards for row, label in enumerate(shard.class_labels) if label is not None]
    expected = [labelled[i * len(labelled) // limit] for i in range(limit)] if len(labelled) > limit else labelled
    summaries = [SimpleNamespace(num_labelled=sum(label is not None for label in column)) for column in columns]
    source: Any = SimpleNamespace(shards=shards, summaries=summaries)
    assert list(_spread(source, limit)) == expected


def test_a_set_of_more_files_than_a_manifest_can_list_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    data = write_source(tmp_path / "images", (3,) * 12)
    monkeypatch.setattr(plan, "MAX_JSON_BYTES", 12 * 4 * 214)
    make_label_set(data, tmp_path / "set", views=(0, 6), views_per_shard=2)
    with pytest.raises(UsageError) as caught:
        make_label_set(data, tmp_path / "set", views=(6, 8), views_per_shard=2)  # together with those that are there
    assert str(caught.value) == (
        "12 source shards and 4 blocks of views would make a label set of 60 files, whose list has about 12.8 kB; at most 10.3 kB can"
        " be read. Pass a larger --views-per-shard than 2, or pack the images into larger tars"
    )
    with pytest.raises(UsageError, match="would make a label set of 60 files"):
        make_label_set(data, tmp_path / "other", views=(0, 8), views_per_shard=2)
    assert not (tmp_path / "other").exists()


def test_the_size_of_a_manifest_is_foreseen_within_a_tenth(tmp_path):
    """Of a large set: rows, bytes and views have more digits there than in the sets of tests."""
    entries = [
        {"kind": "labels", "shard": f"train-{number:06}", "view_start": 120, "view_stop": 150, "rows": 30_000}
        | {"bytes": 1_000_000 + number, "sha256": "0" * 64}
        for number in range(1000)
    ]
    size = len(pretty_json({"files": entries})) / len(entries)
    assert 0.9 < size / (plan.ENTRY_BYTES + len("train-000000")) < 1.1
