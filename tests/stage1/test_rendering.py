"""Loader processes: which views they make, how the work is split, and what they must not do."""

import os
import time
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash
from support.builders import encoded, keys_decoded, photo, small_recipe, write_tars

from pipeline.errors import LabelSetMismatch, WorkerError
from pipeline.images.decode import decode
from pipeline.images.source import Source, open_source
from pipeline.labels.tables import SampleRows
from pipeline.machine.loaders import in_processes
from pipeline.pixels.render import render
from pipeline.settings.files import load_recipe
from pipeline.stage1 import rendering
from pipeline.stage1.rendering import (
    Block,
    BlockRenderer,
    ViewBatch,
    blocks_of,
    deal,
    stream_views,
    views_at_once,
)
from pipeline.views.pairs import Mix, draw_mix, pairs_of
from pipeline.views.recipe import Recipe
from pipeline.views.view import draw_view

VIEWS = range(4)  # one pairing of three views, and the first view of the next


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return open_source(write_tars(tmp_path_factory.mktemp("data"), (13, 10)))


def samples_of(source: Source, shard: str) -> SampleRows:
    """What indexing says of a shard whose images are all good."""
    held = list(source.shard(shard))
    return SampleRows(
        key=tuple(sample.key for sample in held),
        class_label=tuple(sample.class_label for sample in held),
        image_bytes=np.array([len(sample.image) for sample in held], np.uint32),
        image_xxh3=tuple(xxhash.xxh3_128_digest(sample.image) for sample in held),
        height=np.full(len(held), 24, np.uint32),
        width=np.full(len(held), 32, np.uint32),
        bad=(None,) * len(held),
    )


def blocks_in(source: Source, recipe: Recipe, views: range = VIEWS) -> list[Block]:
    tables = {shard.name: samples_of(source, shard.name) for shard in source.shards}
    return [block for name, samples in tables.items() for block in blocks_of(name, views, samples, recipe)]


def rendered(source: Source, recipe: Recipe, blocks: list[Block], *, workers: int = 0) -> list[ViewBatch]:
    """Every view of these blocks, in the order in which a loader brings them."""
    renderer = BlockRenderer(source, recipe)
    held = sum(len(block.chunk) for block in blocks)
    return list(stream_views(renderer, blocks, img_size=recipe.img_size, most=8, workers=workers, held=held))


def unheard(_: str) -> None:
    """A note that nobody asks for."""


def content(batch: ViewBatch) -> tuple:
    """Every value of a batch, in a form that can be compared."""
    tensors = (batch.rows, batch.images, batch.mix.partner, batch.mix.lam, batch.mix.box)
    return batch.shard, batch.views, batch.view, *((tuple(t.shape), t.numpy().tobytes()) for t in tensors)


@pytest.mark.parametrize("name", ["deit", "crop-flip"])
def test_a_batch_holds_every_sample_of_its_block_with_its_own_pixels_and_mix(source, name):
    recipe = load_recipe(name, {"img_size": 16, "mix_block": 8})
    seen = []
    for batch in rendered(source, recipe, blocks_in(source, recipe)):
        shard = source.shard(batch.shard)
        pairs = pairs_of(recipe, shard.keys, np.arange(len(shard)), batch.view).rows.tolist()
        partners = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        firsts = {row: pair[0] for pair in pairs for row in pair}
        rows = batch.rows.tolist()
        seen += [(batch.shard, batch.view, row) for row in rows]
        for at, row in enumerate(rows):
            image = decode(shard[row].image, key="x")
            drawn = draw_view(recipe, shard.keys[row], batch.view, height=24, width=32)
            np.testing.assert_array_equal(batch.images[at], render(image, drawn))
            mix = draw_mix(recipe, shard.keys[firsts[row]], batch.view) if partners[row] >= 0 else Mix()
            assert batch.mix.lam[at] == np.float32(mix.lam)
            assert batch.mix.box[at].tolist() == list(mix.box or (0, 0, 0, 0))
            assert rows[batch.mix.partner[at]] == (row if mix == Mix() else partners[row])
    every = [(shard.name, view, row) for shard in source.shards for view in VIEWS for row in range(len(shard))]
    assert sorted(seen) == sorted(every)


def test_bad_rows_are_left_out_and_move_no_partner_of_another_block(source):
    recipe = small_recipe()
    samples = samples_of(source, "train-000000")
    bad = replace(samples, bad=tuple("cut" if row == 3 else None for row in range(13)))
    got = rendered(source, recipe, list(blocks_of("train-000000", VIEWS, bad, recipe)))
    whole = rendered(source, recipe, blocks_in(source, recipe))
    assert sorted(got[0].rows.tolist()) == [0, 1, 2, 4, 5, 6, 7]
    assert [content(batch) for batch in got[4:]] == [content(batch) for batch in whole[4:8]]  # rows 8..12


@pytest.mark.parametrize("held", [0, 1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 5])  # four blocks: the last processes have turns with no work
def test_what_is_held_is_not_overwritten_and_memory_is_used_again(source, workers, held):
    recipe, blocks = small_recipe(), blocks_in(source, small_recipe(), range(12))
    expected = {
        (batch.shard, batch.view, batch.rows.min().item()): content(batch) for batch in rendered(source, recipe, blocks)
    }
    batches = stream_views(BlockRenderer(source, recipe), blocks, img_size=16, most=8, workers=workers, held=held)
    holding: deque[ViewBatch] = deque()
    places, seen = set(), 0
    for batch in batches:
        places.add(batch.images.data_ptr())
        holding.append(batch)
        time.sleep(0.005)  # processes that could write too early would
        assert all(content(each) == expected[each.shard, each.view, each.rows.min().item()] for each in holding)
        if len(holding) > held:
            holding.popleft()
        seen += 1
    assert seen == len(expected) == 48
    assert len(places) <= 2 * workers + held + 1 < 48


def test_too_little_shared_memory_is_named_before_it_kills_a_process(source, monkeypatch):
    recipe, (block, *_) = small_recipe(), blocks_in(source, small_recipe())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20_000))
    with pytest.raises(WorkerError, match=r"need 0 MB of shared memory, /dev/shm has 0 MB: use fewer --workers"):
        stream_views(BlockRenderer(source, recipe), [block], img_size=16, most=8, workers=1, held=1)
    here = stream_views(BlockRenderer(source, recipe), [block], img_size=16, most=8, workers=0, held=1)
    assert len(list(here)) == len(VIEWS)


def test_views_come_in_order_block_after_block(source):
    recipe = small_recipe()
    order = [
        (batch.shard, batch.rows.min().item() // 8, batch.view)
        for batch in rendered(source, recipe, blocks_in(source, recipe))
    ]
    assert order == [(shard.name, block, view) for shard in source.shards for block in (0, 1) for view in VIEWS]


IMAGE, VIEW = 24 * 32 * 3, 16 * 16 * 3  # bytes of a decoded image and of a view: an image is three views


@pytest.mark.parametrize(
    ("held", "at_once", "decodes"),
    [
        (8 * IMAGE, 4, 23),  # a block's images are held decoded, and all views come from one decode
        (8 * IMAGE - 1, 2, 46),  # less: two views of each image take less than the image, and are held instead
        (8 * 2 * VIEW - 1, 1, 92),  # only one view at a time: a decode for each
        (1, 1, 92),  # not even one fits: it is made all the same
    ],
)
def test_less_memory_costs_decodes_and_changes_no_byte(source, monkeypatch, held, at_once, decodes):
    recipe = small_recipe()
    expected = [content(batch) for batch in rendered(source, recipe, blocks_in(source, recipe))]
    keys = keys_decoded(monkeypatch)
    monkeypatch.setattr(rendering, "HELD_BYTES", held)
    assert views_at_once(samples_of(source, "train-000000").take(np.arange(8)), 16, 4) == at_once
    monkeypatch.setattr(rendering, "views_at_once", lambda *_: at_once)  # smaller blocks would take more at once
    assert [content(batch) for batch in rendered(source, recipe, blocks_in(source, recipe))] == expected
    assert len(keys) == decodes


def test_what_is_held_of_large_images_is_bounded():
    recipe = load_recipe("deit")
    large = SampleRows(
        ("k",) * 256,
        (0,) * 256,
        np.ones(256, np.uint32),
        (b"",) * 256,
        *np.full((2, 256), 4000, np.uint32),
        (None,) * 256,
    )
    views = views_at_once(large, recipe.img_size, 300)
    assert views == rendering.HELD_BYTES // (256 * 224 * 224 * 3) == 8


def test_every_view_is_rendered_once_by_two_workers(source):
    recipe = small_recipe()
    blocks = blocks_in(source, recipe, range(2))
    expected = [content(batch) for batch in rendered(source, recipe, blocks)]
    got = [content(batch) for batch in rendered(source, recipe, blocks, workers=2)]
    assert len(got) == len(expected) == 8
    assert sorted(got) == sorted(expected)


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4, 9])  # four blocks: as many workers, fewer, more
def test_a_worker_gets_all_views_of_its_block_in_a_row(source, workers):
    units = list(deal(blocks_in(source, small_recipe()), workers))
    lanes = max(1, workers)
    for lane in range(lanes):
        mine = [(block.name, view) for unit in units[lane::lanes] if unit for block, view in [unit]]
        names = list(dict.fromkeys(name for name, _ in mine))
        assert mine == [(name, view) for name in names for view in VIEWS]
    every = [(block.name, view) for unit in units if unit for block, view in [unit]]
    assert len(every) == len(set(every)) == 4 * len(VIEWS)


def test_blocks_are_taken_when_they_are_needed(source):
    taken = []
    blocks = blocks_in(source, small_recipe())
    units = deal((taken.append(block) or block for block in blocks), 2)
    for _ in range(2 * len(VIEWS)):
        next(units)
    assert len(taken) == 2  # nobody else could have had the other two otherwise


def test_each_image_is_decoded_once_by_each_worker(source, monkeypatch):
    recipe, keys = small_recipe(), keys_decoded(monkeypatch)
    workers = [BlockRenderer(source, recipe) for _ in range(3)]
    for at, unit in enumerate(deal(blocks_in(source, recipe), 3)):
        if unit:
            workers[at % 3](unit, torch.empty(8, 16, 16, 3, dtype=torch.uint8), unheard)
    assert len(keys) == len(set(keys)) == 23


def test_an_image_that_is_not_the_indexed_one_stops_the_block_with_its_key(source, tmp_path):
    recipe = small_recipe()
    blocks = blocks_in(source, recipe)
    folder = tmp_path / "data"
    write_tars(folder, (13, 10))
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(encoded(photo(4)), encoded(photo(4))[:-1] + b"\xd8"))
    with pytest.raises(
        LabelSetMismatch, match="image 'img-0004' of train-000000 has other bytes than the one that was"
    ):
        rendered(open_source(str(folder)), recipe, blocks)


# --- processes ------------------------------------------------------------------------------------------------

# What a worker says of itself; a module of its own, because a worker that imports this file imports all of it.
SPY = """
import os, sys
import torch

class Spy:
    def __init__(self, renderer, shape):
        self.renderer, self.shape = renderer, shape

    def __call__(self, index, note):
        self.renderer(index, torch.empty(self.shape, dtype=torch.uint8), note)
        return os.getpid(), sorted(sys.modules), torch.get_num_threads()
"""


def centre_batches(source: Source):
    from trainer.stream import CentreRenderer

    return CentreRenderer(source, [(0, row) for row in range(13)], load_recipe("none", {"img_size": 16}), 5)


def train_batches(source: Source):
    from trainer.order import Order
    from trainer.stream import BatchRenderer, Catalogue

    order = Order(
        shard_units=(7, 5), unit_size=2, batch_size=6, repeated_aug=1, views=None, window=2, seed=0
    )  # pairs of blocks of 8 and 5, 8 and 2
    return BatchRenderer(Catalogue(source, None), small_recipe(), order)


@pytest.mark.parametrize("make", [centre_batches, train_batches])
def test_workers_are_processes_of_one_thread_that_never_import_timm_or_matplotlib(source, tmp_path, monkeypatch, make):
    (tmp_path / "loader_spy.py").write_text(SPY)
    monkeypatch.syspath_prepend(tmp_path)
    from loader_spy import Spy  # pyright: ignore[reportMissingImports]

    seen = list(in_processes(Spy(make(source), (8, 16, 16, 3)), range(3), workers=1))
    assert len(seen) == 3
    for process, modules, threads in seen:
        assert process != os.getpid()
        assert {"torch", "trainer.stream"} <= set(modules)
        assert [name for name in modules if name.split(".")[0] in ("timm", "matplotlib", "click", "rich", "cv2")] == []
        assert threads == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_never_moves_the_global_random_states(source, workers):
    from trainer.stream import stream_batches

    recipe = small_recipe()
    torch.manual_seed(3)
    np.random.seed(3)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    rendered(source, recipe, blocks_in(source, recipe, range(1)), workers=workers)
    list(stream_batches(train_batches(source), range(2), workers=workers))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.random.get_state()[1].tolist() == numpy_before
