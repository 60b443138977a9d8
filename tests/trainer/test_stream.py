"""Batches of stage 2: the replayed views, their mixes and their labels, whoever renders them."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import encoded, keys_decoded, make_labels, photo, small_recipe, write_tars
from support.training import content
from torch import Tensor

from pipeline.errors import BadImageError, LabelSetCorrupt, LabelSetMismatch, SourceError
from pipeline.images.decode import decode
from pipeline.images.samples import SourceOptions
from pipeline.images.source import Source, open_source
from pipeline.labels.checked_files import ViewsInOrder
from pipeline.labels.labelset import LabelSet
from pipeline.pixels.render import render
from pipeline.settings.files import load_recipe
from pipeline.stage1.rendering import BlockRenderer, blocks_of, stream_views
from pipeline.views.pairs import Mix, count_pairs, draw_mix, pairs_of
from pipeline.views.recipe import Recipe
from pipeline.views.view import draw_view
from trainer import stream
from trainer.losses import TeacherTarget
from trainer.order import Order
from trainer.stream import Batch, BatchRenderer, Catalogue, CentreRenderer, _Recent, on_device, stream_batches

SIZES = (13, 10)  # blocks of 8, 5, 8 and 2: an odd one, so that one sample of each view has no partner


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), SIZES, unlabelled=5)


@pytest.fixture(scope="module")
def source(data) -> Source:
    return open_source(data)


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, views=(0, 6), views_per_shard=3)


def order_of(recipe: Recipe, *, sizes: tuple[int, ...] = SIZES, views: range | None = range(6), **changes) -> Order:
    units = tuple(count_pairs(recipe, np.arange(size)) for size in sizes)
    settings = {"batch_size": 6, "repeated_aug": 1, "window": 2, "seed": 0}
    return Order(shard_units=units, unit_size=2 if recipe.mixes else 1, views=views, **(settings | changes))


def renderer_of(source: Source, label_set: LabelSet | None, recipe: Recipe | None = None, **changes) -> BatchRenderer:
    recipe = recipe or small_recipe()
    return BatchRenderer(Catalogue(source, label_set), recipe, order_of(recipe, **changes))


def answers(batch: Batch) -> TeacherTarget:
    """What is stored for a batch of labelled views."""
    assert batch.teacher is not None
    return batch.teacher


def place_of(source: Source, key: str) -> tuple[str, int]:
    return next((shard.name, shard.keys.index(key)) for shard in source.shards if key in shard.keys)


def pair_by_hand(source: Source, recipe: Recipe, key: str, view: int) -> tuple[str | None, Mix]:
    """The partner's key (None for a sample without one) and the mix, from the pairs of the whole source shard."""
    name, row = place_of(source, key)
    keys = source.shard(name).keys
    pair = next(pair for pair in pairs_of(recipe, keys, np.arange(len(keys)), view).rows.tolist() if row in pair)
    if pair[1] < 0:
        return None, Mix()
    return keys[pair[0] + pair[1] - row], draw_mix(recipe, keys[pair[0]], view)


def view_by_hand(source: Source, recipe: Recipe, key: str, view: int) -> np.ndarray:
    name, row = place_of(source, key)
    image = decode(source.shard(name)[row].image, key=key)
    return render(image, draw_view(recipe, key, view, height=image.shape[0], width=image.shape[1]))


def places(batch: Batch) -> dict[tuple[str, int], int]:
    """Where each (key, view) stands: the views of a pair follow each other, first one view of both, then the next."""
    found: dict[tuple[str, int], int] = {}
    for at, key in enumerate(batch.keys):
        view = next(view for view in batch.views if (key, view) not in found)
        found[key, view] = at
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},  # one view of each image
        {"repeated_aug": 3, "batch_size": 12},  # three at once
    ],
    ids=str,
)
def test_batches_are_what_a_slow_reference_makes_one_view_at_a_time(source, label_set, changes):
    recipe, renderer = label_set.recipe, renderer_of(source, label_set, **changes)
    classes = {key: label for shard in source.shards for key, label in zip(shard.keys, shard.class_labels, strict=True)}
    order = order_of(recipe, **changes)
    for index in range(2 * order.steps_per_epoch):
        batch = renderer.render_here(index)
        epoch, _ = order.position(index)
        assert (batch.index, batch.views) == (index, order.views_of_epoch(epoch))
        assert batch.images.dtype == torch.uint8
        for (key, view), at in places(batch).items():
            np.testing.assert_array_equal(batch.images[at], view_by_hand(source, recipe, key, view))
            assert bool(batch.classes.labelled[at]) is (classes[key] is not None)
            assert int(batch.classes.class_label[at]) == (classes[key] or 0)
            shard, row = place_of(source, key)
            labels = label_set.read(shard, view)
            stored = labels.row.tolist().index(row)
            assert int(answers(batch).hard[at]) == labels.hard[stored]
            assert answers(batch).topk_index[at].tolist() == labels.topk_index[stored].tolist()
            assert answers(batch).topk_prob[at].tolist() == labels.topk_prob[stored].astype(np.float32).tolist()
            assert float(answers(batch).tail_mass[at]) == float(labels.tail_mass[stored])


@pytest.mark.parametrize("changes", [{}, {"repeated_aug": 3, "batch_size": 12}], ids=str)
def test_partners_stand_in_the_same_batch_with_the_mix_that_was_drawn_for_them(source, label_set, changes):
    recipe, renderer = label_set.recipe, renderer_of(source, label_set, **changes)
    alone = mixed = 0
    for index in range(3 * order_of(recipe, **changes).steps_per_epoch):
        batch = renderer.render_here(index)
        position = places(batch)
        for (key, view), at in position.items():
            partner, mix = pair_by_hand(source, recipe, key, view)
            there = position[partner, view] if partner is not None and mix != Mix() else at
            assert int(batch.mix.partner[at]) == there
            assert float(batch.mix.lam[at]) == np.float32(mix.lam)
            assert batch.mix.box[at].tolist() == list(mix.box or (0, 0, 0, 0))
            alone, mixed = alone + (partner is None), mixed + (there != at)
    assert alone
    assert mixed > alone


def test_an_epoch_shows_every_image_once(source, label_set):
    recipe = label_set.recipe
    whole = order_of(recipe, batch_size=24)  # 12 pairs and single samples: all of an epoch
    batch = BatchRenderer(Catalogue(source, label_set), recipe, whole).render_here(0)
    assert sorted(batch.keys) == sorted(key for shard in source.shards for key in shard.keys)
    assert len(batch.keys) == 23


# --- purity ---------------------------------------------------------------------------------------------------


def test_a_batch_is_the_same_from_any_process_and_any_order_of_asking(source, label_set):
    total = 2 * order_of(label_set.recipe).steps_per_epoch
    forward = [content(renderer_of(source, label_set).render_here(index)) for index in range(total)]
    renderer = renderer_of(source, label_set)  # one renderer for all: what it remembers must not show
    assert [content(renderer.render_here(index)) for index in reversed(range(total))] == forward[::-1]
    for workers in (0, 2):
        batches = stream_batches(renderer_of(source, label_set), range(total), workers=workers)
        assert [content(batch) for batch in batches] == forward
    assert len({str(batch) for batch in forward}) == total


def test_a_continuation_asks_for_the_batches_that_are_left(source, label_set):
    renderer = renderer_of(source, label_set)
    batches = stream_batches(renderer, range(5, 9), workers=0)
    assert [content(batch) for batch in batches] == [content(renderer.render_here(i)) for i in range(5, 9)]


def test_the_batch_size_moves_no_pixel_and_no_label(source, label_set):
    def views(batch_size: int) -> dict[tuple[str, int], tuple]:
        order = order_of(label_set.recipe, batch_size=batch_size)
        renderer = BatchRenderer(Catalogue(source, label_set), label_set.recipe, order)
        batches = [renderer.render_here(index) for index in range(order.steps_per_epoch)]
        return {
            place: (batch.images[at].numpy().tobytes(), int(answers(batch).hard[at]), float(batch.mix.lam[at]))
            for batch in batches
            for place, at in places(batch).items()
        }

    whole = views(24)
    for size in (2, 6):
        part = views(size)
        assert part.items() <= whole.items()
        assert len(part) > 12


def test_both_stages_render_the_same_pixels_and_mixes(source, label_set):
    recipe = label_set.recipe
    blocks = [
        block for name in label_set.shards for block in blocks_of(name, range(3), label_set.samples(name), recipe)
    ]
    first: dict[tuple[str, int], tuple] = {}
    renderer = BlockRenderer(source, recipe)
    for block in stream_views(renderer, blocks, img_size=16, most=8, workers=0, held=1):
        keys = [label_set.samples(block.shard).key[row] for row in block.rows.tolist()]
        for at, key in enumerate(keys):
            partner = keys[int(block.mix.partner[at])]
            mix = (float(block.mix.lam[at]), tuple(block.mix.box[at].tolist()))
            first[key, block.view] = (block.images[at].numpy().tobytes(), partner, *mix)
    second: dict[tuple[str, int], tuple] = {}
    renderer = renderer_of(source, label_set, batch_size=24)
    for index in range(3):
        batch = renderer.render_here(index)
        for (key, view), at in places(batch).items():
            partner = batch.keys[int(batch.mix.partner[at])]
            mix = (float(batch.mix.lam[at]), tuple(batch.mix.box[at].tolist()))
            second[key, view] = (batch.images[at].numpy().tobytes(), partner, *mix)
    assert len(first) == 23 * 3
    assert second == first


# --- copies to a device ---------------------------------------------------------------------------------------


class LateCopies:
    """A stream of a GPU that copies what it was given only when somebody waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[tuple[Tensor, Tensor]] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
        monkeypatch.setattr(Batch, "record_stream", lambda *_: None)
        monkeypatch.setattr(Batch, "to", lambda batch, device: self.queue(batch, device))

    def queue(self, batch: Batch, device: torch.device) -> Batch:
        there = torch.zeros_like(batch.images)
        self.waiting.append((there, batch.images))
        return replace(batch, images=there)

    def synchronize(self) -> None:
        for there, here in self.waiting:
            there.copy_(here)
        self.waiting.clear()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_that_copies_batches_as_late_as_it_may_has_their_pixels(source, label_set, monkeypatch, workers):
    total = 2 * order_of(label_set.recipe).steps_per_epoch
    expected = [content(renderer_of(source, label_set).render_here(index)) for index in range(total)]
    LateCopies(monkeypatch)
    batches = stream_batches(renderer_of(source, label_set), range(total), workers=workers, held=1)
    assert [content(batch) for batch in on_device(batches, torch.device("cuda"))] == expected


def test_a_batch_takes_all_that_it_holds_to_a_device_and_each_tensor_once(source, label_set):
    batch = renderer_of(source, label_set).render_here(0)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.teacher is not None
    held = (moved.mix, moved.classes, moved.teacher)
    assert {tensor.device.type for tensor in (moved.images, *(t for r in held for t in vars(r).values()))} == {"meta"}
    assert moved.classes.partner is moved.mix.partner
    assert moved.classes.lam is moved.mix.lam
    assert (moved.index, moved.views, moved.keys) == (batch.index, batch.views, batch.keys)


# --- repeated augmentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repeats", "views"),
    [
        (1, [[0], [1], [2], [3]]),  # an epoch, a view
        (3, [[0, 1, 2]] * 3 + [[3, 4, 5]]),  # three epochs share their views and part the images among them
    ],
)
def test_an_image_is_decoded_once_for_all_its_views_in_a_batch(source, label_set, monkeypatch, repeats, views):
    keys = keys_decoded(monkeypatch)
    renderer = renderer_of(source, label_set, repeated_aug=repeats, batch_size=6 * repeats)
    steps = order_of(label_set.recipe, repeated_aug=repeats, batch_size=6 * repeats).steps_per_epoch
    for epoch, expected in enumerate(views):
        keys.clear()
        batch = renderer.render_here(epoch * steps)
        assert list(batch.views) == expected
        assert len(keys) == len(set(keys)) == len(batch.keys) / repeats
        assert sorted(batch.keys) == sorted(keys * repeats)


# --- labels ---------------------------------------------------------------------------------------------------


def test_without_a_label_set_batches_have_class_labels_alone(source, label_set):
    bare, full = (renderer_of(source, labels).render_here(0) for labels in (None, label_set))
    assert bare.teacher is None
    assert full.teacher is not None
    held = content(full)
    assert content(bare) == {name: held[name] for name in held if not name.startswith("teacher.")}


def test_without_a_label_set_views_have_no_end(source):
    renderer = renderer_of(source, None, views=None, batch_size=24)
    batch = renderer.render_here(1000)
    assert list(batch.views) == [1000]
    np.testing.assert_array_equal(batch.images[0], view_by_hand(source, small_recipe(), batch.keys[0], 1000))


def test_unlabelled_samples_have_the_teachers_label_and_a_class_label_that_counts_for_nothing(source, label_set):
    batch = renderer_of(source, label_set, batch_size=24).render_here(0)
    unlabelled = [key for key, known in zip(batch.keys, batch.classes.labelled.tolist(), strict=True) if not known]
    assert sorted(unlabelled) == [f"img-{number:04}" for number in range(0, 23, 5)]
    assert batch.classes.class_label[~batch.classes.labelled].tolist() == [0] * 5
    assert answers(batch).hard.shape == (23,)


def test_hard_labels_alone_leave_the_other_columns_empty(source, data, tmp_path):
    hard_only = make_labels(tmp_path / "set", data, topk=0, views=(0, 1))
    batch = renderer_of(source, hard_only, views=range(1)).render_here(0)
    assert answers(batch).hard.shape == (len(batch.keys),)
    assert answers(batch).topk_index.shape == answers(batch).topk_prob.shape == (len(batch.keys), 0)
    assert answers(batch).tail_mass.tolist() == [0.0] * len(batch.keys)


def test_a_recipe_that_does_not_mix_has_no_partners(source):
    recipe = load_recipe("crop-flip", {"img_size": 16})
    batch = renderer_of(source, None, recipe, repeated_aug=2, batch_size=7).render_here(0)
    assert len(batch.keys) == 6  # three images, two views each
    assert batch.mix.partner.tolist() == list(range(6))
    assert batch.mix.lam.tolist() == [1.0] * 6


def test_rows_that_could_not_be_labelled_are_never_asked_for(tmp_path):
    data = write_tars(tmp_path / "data", SIZES, bad=(3, 15))
    label_set, source = make_labels(tmp_path / "set", data, on_bad_image="skip"), open_source(data)
    recipe = label_set.recipe
    units = tuple(count_pairs(recipe, label_set.samples(name).usable) for name in label_set.shards)
    order = Order(shard_units=units, unit_size=2, batch_size=24, repeated_aug=1, views=range(3), window=2, seed=0)
    batch = BatchRenderer(Catalogue(source, label_set), recipe, order).render_here(1)
    assert sorted(batch.keys) == [f"img-{number:04}" for number in range(23) if number not in (3, 15)]
    for (key, view), at in places(batch).items():
        shard, row = place_of(source, key)
        labels = label_set.read(shard, view)
        assert int(answers(batch).hard[at]) == labels.hard[labels.row.tolist().index(row)]


def test_labels_of_shards_and_views_are_not_mixed_up_when_few_are_remembered(tmp_path, monkeypatch):
    sizes = (6,) * 8
    data = write_tars(tmp_path / "data", sizes)
    label_set, source = make_labels(tmp_path / "set", data, views=(0, 3)), open_source(data)
    reads: list[tuple[str, int]] = []
    read = LabelSet.read
    monkeypatch.setattr(
        LabelSet, "read", lambda self, shard, view: reads.append((shard, view)) or read(self, shard, view)
    )
    renderer = renderer_of(source, label_set, sizes=sizes, views=range(3), window=1, batch_size=4)
    steps = order_of(label_set.recipe, sizes=sizes, views=range(3), window=1, batch_size=4).steps_per_epoch
    for index in [*range(3 * steps), *range(steps)]:  # the three views, and the first again: long forgotten
        batch = renderer.render_here(index)
        for (key, view), at in places(batch).items():
            shard, row = place_of(source, key)
            labels = read(label_set, shard, view)
            assert int(answers(batch).hard[at]) == labels.hard[row]
            assert answers(batch).topk_prob[at].tolist() == labels.topk_prob[row].astype(np.float32).tolist()
    assert len(reads) == 8 * 4  # once for each shard and view while it is in use, though only four are kept


@pytest.mark.parametrize("size", [1, 3])
def test_recent_values_are_made_once_and_the_least_recently_asked_for_goes(size):
    made: list[int] = []
    recent = _Recent[int](size)
    asked = [0, 1, 2, 0, 3, 0, 1]  # 3 drives out 1, not 0, which was asked for since
    assert [recent.get(key, lambda key=key: made.append(key) or key * 10) for key in asked] == [k * 10 for k in asked]
    assert made == {1: asked, 3: [0, 1, 2, 3, 1]}[size]


def test_a_value_that_could_not_be_made_is_asked_for_again():
    recent = _Recent[int](2)

    def fails() -> int:
        raise SourceError("not now")

    with pytest.raises(SourceError, match="not now"):
        recent.get("a", fails)
    assert recent.get("a", lambda: 7) == 7


def test_labels_whose_rows_are_not_those_of_the_samples_are_refused(source, label_set, monkeypatch):
    read = ViewsInOrder.read

    def one_less(self, view):
        return read(self, view).part(slice(1, None))

    monkeypatch.setattr(ViewsInOrder, "read", one_less)
    message = r"train-00000.\.parquet: view 0 does not have the usable rows of its samples file\. Fetch it"
    with pytest.raises(LabelSetCorrupt, match=message):
        renderer_of(source, label_set).render_here(0)


# --- errors ---------------------------------------------------------------------------------------------------


def change_image(folder: Path, number: int) -> None:
    """Change the last byte of a photo where it lies in its tar."""
    path = folder / f"train-{0 if number < SIZES[0] else 1:06}.tar"
    before = path.read_bytes()
    after = before.replace(encoded(photo(number)), encoded(photo(number))[:-1] + b"\xd8")
    assert before != after
    path.write_bytes(after)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changed_after_labelling_is_refused_with_its_key(label_set, tmp_path, workers):
    data = write_tars(tmp_path / "data", SIZES, unlabelled=5)
    change_image(tmp_path / "data", 17)
    renderer = renderer_of(open_source(data), label_set, batch_size=24)
    with pytest.raises(
        LabelSetMismatch, match="image 'img-0017' of train-000001 has other bytes than the one that was"
    ):
        list(stream_batches(renderer, range(3), workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_arrives_whole_from_another_process(tmp_path, workers):
    data = write_tars(tmp_path / "data", SIZES, bad=(20,))
    renderer = renderer_of(open_source(data), None, batch_size=24)
    with pytest.raises(BadImageError, match="image 'img-0020': damaged or truncated") as caught:
        list(stream_batches(renderer, range(2), workers=workers))
    assert caught.value.key == "img-0020"
    assert caught.value.reason.startswith("damaged or truncated")
    assert str(caught.value).endswith(f". Repair or delete 'img-0020' in {data}/train-000001.tar")


def is_bad(renderer: BatchRenderer, index: int) -> bool:
    try:
        renderer.render_here(index)
    except BadImageError:
        return True
    return False


def test_batches_before_an_error_are_used(tmp_path):
    data = write_tars(tmp_path / "data", SIZES, bad=(20,))
    renderer = renderer_of(open_source(data), None)
    last = next(index for index in range(100) if is_bad(renderer, index))
    assert last > 0
    batches = stream_batches(renderer, range(100), workers=0)
    assert [next(batches).index for _ in range(last)] == list(range(last))
    with pytest.raises(BadImageError, match="img-0020"):
        next(batches)


def test_only_errors_on_purpose_are_sent_on(source, label_set, monkeypatch):
    def breaks(image, recipe, key, views, take):
        raise ZeroDivisionError(key)

    monkeypatch.setattr(stream, "draw_encoded", breaks)
    with pytest.raises(ZeroDivisionError, match="img-00"):  # a defect of ours keeps its traceback
        renderer_of(source, label_set).render_here(0)


# --- centre crops ---------------------------------------------------------------------------------------------


def test_centre_batches_hold_the_samples_in_order_and_a_last_partial_one(source):
    recipe = load_recipe("none", {"img_size": 16})
    chosen = [(0, 1), (1, 0), (0, 4), (1, 9), (0, 7)]
    got: list[tuple[np.ndarray, list[int]]] = []
    for batch in CentreRenderer(source, chosen, recipe, 2).stream(workers=0):
        got.append((batch.images.numpy().copy(), batch.class_label.tolist()))
    assert [len(target) for _, target in got] == [2, 2, 1]
    flat = [(image, label) for images, target in got for image, label in zip(images, target, strict=True)]
    for (shard, row), (image, label) in zip(chosen, flat, strict=True):
        sample = source.shards[shard][row]
        np.testing.assert_array_equal(image, view_by_hand(source, recipe, sample.key, 0))
        assert label == sample.class_label


def test_centre_batches_send_a_bad_image_on(tmp_path):
    source = open_source(write_tars(tmp_path / "data", (4,), bad=(2,)))
    recipe = load_recipe("none", {"img_size": 16})
    with pytest.raises(BadImageError) as caught:
        list(CentreRenderer(source, [(0, row) for row in range(4)], recipe, 4).stream(workers=0))
    assert caught.value.key == "img-0002"


@pytest.mark.parametrize("from_file", [False, True])
def test_a_bad_image_of_a_folder_is_named_by_its_path(tmp_path, from_file):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "IMG_0001.jpg").write_bytes(b"\xff\xd8\xff" + bytes(20))
    (tmp_path / "labels.csv").write_text("path,label\ncat/IMG_0001.jpg,0\ndog/IMG_0001.jpg,1\n")
    given = SourceOptions(labels_file=str(tmp_path / "labels.csv") if from_file else None)
    source = open_source(tmp_path, options=given)
    row = list(source.shards[0].keys).index("cat/IMG_0001")
    with pytest.raises(BadImageError) as caught:
        list(CentreRenderer(source, [(0, row)], load_recipe("none", {"img_size": 16}), 4).stream(workers=0))
    assert caught.value.fix == f"Repair or delete {tmp_path}/cat/IMG_0001.jpg"


def test_a_class_label_that_went_away_is_named(source):
    recipe = load_recipe("none", {"img_size": 16})
    batches = CentreRenderer(source, [(0, 5)], recipe, 4).stream(workers=0)  # listed as labelled; it is not
    with pytest.raises(SourceError, match=r"^'img-0005' has lost its class label since the source was opened$"):
        list(batches)
