"""What people are shown of a label set: figures against a computation by hand, and pictures against the pixels."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from support.builders import CLASSES, encoded, make_labels, photo, small_recipe, write_tars

from pipeline.errors import LabelSetMismatch
from pipeline.images.decode import decode
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.overview import sheet as drawing
from pipeline.overview import summary as summarising
from pipeline.overview.sheet import _tile, contact_sheet
from pipeline.overview.summary import PIXELS, info_table, summarise
from pipeline.pixels.render import render
from pipeline.settings.files import load_recipe
from pipeline.views.mixing import apply_mix, mix_batch
from pipeline.views.pairs import draw_mix, pairs_of
from pipeline.views.recipe import RENDERERS
from pipeline.views.view import draw_view

SIZES = (13, 10)
PIXEL = 1 / 110  # inches


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), SIZES, unlabelled=5)


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, views_per_shard=2)


# --- figures --------------------------------------------------------------------------------------------------


def by_hand(label_set: LabelSet) -> dict[str, float | None]:
    """Label by label, in plain Python: whether it names the larger part, its entropy, and what it keeps."""
    hits: list[bool] = []
    entropies: list[float] = []
    kept: list[float] = []
    recipe, classes = label_set.recipe, label_set.num_classes
    for shard in label_set.shards:
        samples = label_set.samples(shard)
        for view in label_set.views:
            rows = label_set.read(shard, view)
            hard = dict(zip(rows.row.tolist(), rows.hard.tolist(), strict=True))
            for first, second in pairs_of(recipe, samples.key, samples.usable, view).rows.tolist():
                lam = draw_mix(recipe, samples.key[first], view).lam if second >= 0 else 1.0
                for own, partner in [(first, second), (second, first)] if second >= 0 else [(first, -1)]:
                    larger = samples.class_label[own if lam >= 0.5 else partner]
                    if larger is not None:
                        hits.append(hard[own] == larger)
            others = classes - label_set.plan.topk
            for prob, tail in zip(rows.topk_prob.tolist(), rows.tail_mass.tolist(), strict=False):  # K = 0: no tail
                spread = [tail / others for _ in range(others)]
                entropies.append(-sum(p * math.log(p) for p in [*prob, *spread] if p > 0))
                kept.append(1 - tail)

    def mean(values: list) -> float | None:
        return sum(values) / len(values) if values else None

    agreement = mean(hits)
    return {
        "hard_is_class_label_pct": None if agreement is None else 100 * agreement,
        "mean_entropy_nats": mean(entropies),
        "mean_kept_mass": mean(kept),
    }


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("deit", {"topk": 2}),  # one class is the tail
        ("deit", {"topk": 1}),  # two classes share it
        ("deit", {"topk": 3}),  # nothing is left but rounding
        ("crop-flip", {"topk": 2}),  # no partner: every view is of one image
        ("deit", {"topk": 2, "precision": "float32"}),
    ],
)
def test_figures_equal_a_computation_by_hand(data, tmp_path, recipe, settings):
    recipe = load_recipe(recipe, {"img_size": 16, "mix_block": 8})
    label_set = make_labels(tmp_path / "set", data, recipe=recipe, views=(0, 2), **settings)
    summary = summarise(label_set)
    # Where every class is kept, what is left in the tail is rounding, some 1e-7 of it, and its logarithm.
    assert {name: summary[name] for name in by_hand(label_set)} == pytest.approx(by_hand(label_set), abs=1e-5)
    assert summary["labels_looked_at"] == summary["labels"] == 2 * 23


def test_a_teacher_that_is_always_right_about_the_larger_part_agrees_in_all_labelled_views(label_set, monkeypatch):
    """Hard labels are replaced by the class of the larger part, wherever there is one."""
    stored = LabelSet.read

    def right(self, shard, view):
        rows, samples = stored(self, shard, view), self.samples(shard)
        hard = rows.hard.copy()
        for first, second in pairs_of(self.recipe, samples.key, samples.usable, view).rows.tolist():
            lam = draw_mix(self.recipe, samples.key[first], view).lam if second >= 0 else 1.0
            for own, partner in ((first, second), (second, first)) if second >= 0 else ((first, first),):
                hard[own] = samples.class_label[own if lam >= 0.5 else partner] or 0
        return replace(rows, hard=hard)

    monkeypatch.setattr(LabelSet, "read", right)
    assert summarise(label_set)["hard_is_class_label_pct"] == 100


def test_the_summary_says_what_the_set_is_made_of(label_set, data):
    summary = summarise(label_set)
    files = sorted(label_set.folder.glob("labels/*/*.parquet"))
    assert len(files) == 4
    size = sum(file.stat().st_size for file in files)
    assert (summary["labels"], summary["label_bytes"]) == (3 * 23, size)
    assert summary["bytes_per_label"] == pytest.approx(size / 69)
    assert summary["source"] == {
        "kind": "tar",
        "location": data,
        "shards": 2,
        "shards_of_plan": 2,
        "images": 23,
        "unlabelled": 5,  # 0, 5, 10, 15 and 20
        "bad": [],
    }
    assert (summary["views"], summary["topk"], summary["precision"], summary["sealed"]) == ([0, 3], 2, "float16", True)
    assert summary["labelset_id"] == label_set.plan.labelset_id
    assert summary["recipe_id"] == small_recipe().id
    assert summary["recipe"]["reprob"] == 0.25
    assert summary["pixels"].startswith("renderer 2: defined by docs/views-v2.md; no library decides a pixel")
    assert summary["teacher"]["name"] == "support.builders:confident_cnn"
    assert summary["environments"][0]["device"] == "cpu"
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize(
    ("renderer", "text", "opencv"),
    [
        (1, "renderer 1: the versions that they were made with (torch, OpenCV, the image decoder) decide their last bits", True),
        (2, "renderer 2: defined by docs/views-v2.md; no library decides a pixel but the image decoder", False),
    ],
)  # fmt: skip
def test_people_and_programs_read_what_the_pixels_depend_on(data, tmp_path, renderer, text, opencv):
    summary = summarise(make_labels(tmp_path / "set", data, recipe=small_recipe(renderer=renderer), views=(0, 1)))
    assert summary["pixels"] == text
    assert f"\npixels         {text}\n" in info_table(summary)
    assert ("opencv-python-headless" in summary["environments"][0]) == opencv
    assert ("opencv" in info_table(summary).splitlines()[-2]) == opencv


def test_there_is_a_line_on_the_pixels_of_every_renderer():
    assert {*PIXELS} == {*RENDERERS}


def test_hard_labels_alone_have_no_entropy_and_no_kept_mass(data, tmp_path):
    hard_only = make_labels(tmp_path / "set", data, topk=0, views=(0, 1))
    summary = summarise(hard_only)
    assert (summary["topk"], summary["mean_entropy_nats"], summary["mean_kept_mass"]) == (0, None, None)
    assert summary["hard_is_class_label_pct"] == pytest.approx(by_hand(hard_only)["hard_is_class_label_pct"])


def test_without_any_class_label_there_is_no_agreement(tmp_path):
    data = write_tars(tmp_path / "data", (5,), unlabelled=1)
    summary = summarise(make_labels(tmp_path / "set", data, views=(0, 1)))
    assert summary["hard_is_class_label_pct"] is None
    assert summary["source"]["unlabelled"] == 5
    assert summary["mean_entropy_nats"] > 0


def test_bad_images_are_named_with_what_is_wrong(tmp_path):
    data = write_tars(tmp_path / "data", SIZES, bad=(3, 15))
    label_set = make_labels(tmp_path / "set", data, on_bad_image="skip", views=(0, 1))
    summary = summarise(label_set)
    assert [text.partition(":")[0] for text in summary["source"]["bad"]] == ["img-0003", "img-0015"]
    assert all(": damaged or truncated" in text for text in summary["source"]["bad"])
    assert summary["source"]["images"] == 23
    assert summary["labels"] == summary["labels_looked_at"] == 21
    assert {name: summary[name] for name in by_hand(label_set)} == pytest.approx(by_hand(label_set))


def test_a_large_set_is_looked_at_in_part(label_set, monkeypatch):
    monkeypatch.setattr(summarising, "MAX_ROWS", 20)
    summary = summarise(label_set)
    assert summary["labels_looked_at"] == 23  # whole source shards of the first view: 13, and 10 more
    assert summary["labels"] == 69


# --- pictures -------------------------------------------------------------------------------------------------


def pixels_by_hand(label_set: LabelSet, data: str, shard: str, row: int, view: int) -> np.ndarray:
    """The mixed view of one sample: its pair mixed as both stages mix it, in float, then rounded."""
    source, recipe = open_source(data), label_set.recipe
    keys, usable = source.shard(shard).keys, label_set.samples(shard).usable
    pair = next(pair for pair in pairs_of(recipe, keys, usable, view).rows.tolist() if row in pair)
    rows = [r for r in pair if r >= 0]
    views = []
    for r in rows:
        image = decode(source.shard(shard)[r].image, key="x")
        views.append(render(image, draw_view(recipe, keys[r], view, height=24, width=32)))
    mixes = mix_batch([(0, 1 if len(rows) == 2 else -1)], [draw_mix(recipe, keys[rows[0]], view)], len(rows))
    mixed = apply_mix(torch.from_numpy(np.stack(views)), mixes)[rows.index(row)]
    return np.rint(mixed.permute(1, 2, 0).numpy()).astype(np.uint8)


@pytest.mark.parametrize("shard", ["train-000000", "train-000001"])
def test_a_tile_shows_the_mixed_pixels(label_set, data, shard):
    source = open_source(data)
    for row in label_set.samples(shard).usable.tolist():
        for view in label_set.views:
            tile = _tile(label_set, source, shard, row, view)
            np.testing.assert_array_equal(tile.pixels, pixels_by_hand(label_set, data, shard, row, view))


def test_a_caption_says_the_parts_and_the_teachers_answer(label_set, data):
    """Every line, written out from the label set and the draws."""
    source, recipe, shard, view = open_source(data), label_set.recipe, "train-000000", 1
    samples, rows = label_set.samples(shard), label_set.read(shard, view)
    seen: set[int] = set()
    for first, second in pairs_of(recipe, samples.key, samples.usable, view).rows.tolist():
        for row, partner in ((first, second), (second, first)) if second >= 0 else ((first, None),):
            lam = 1.0 if partner is None else draw_mix(recipe, samples.key[first], view).lam
            names = ["unlabelled" if i is None else CLASSES[i] for i in samples.class_label]
            lines = [f"view 1  img-{row:04}", f"label   {100 * lam:5.0f}% {names[row]}"]
            lines.append("" if partner is None else f"        {100 * (1 - lam):5.0f}% {names[partner]}")
            for index, prob in zip(rows.topk_index[row].tolist(), rows.topk_prob[row].tolist(), strict=True):
                lines.append(f"        {100 * prob:5.1f}% {CLASSES[index]}")
            lines[3] = lines[3].replace(" " * 7, "teacher", 1)
            assert _tile(label_set, source, shard, row, view).caption.split("\n") == lines
            seen.add(row)
    assert seen == set(range(13))
    assert "unlabelled" in _tile(label_set, source, shard, 5, view).caption


def test_captions_of_hard_labels_name_the_teachers_class(data, tmp_path):
    hard_only = make_labels(tmp_path / "set", data, topk=0, views=(0, 1))
    caption = _tile(hard_only, open_source(data), "train-000001", 4, 0).caption.split("\n")
    assert caption[3:] == [f"teacher  {CLASSES[int(hard_only.read('train-000001', 0).hard[4])]}"]


def named(folder: Path, names: tuple[str, ...] | None, *, sizes: tuple[int, ...] = (6,)) -> tuple[LabelSet, str]:
    """A label set whose three classes have these names; None: only numbers."""
    data = write_tars(folder / "data", sizes)
    listed = Path(data) / "classes.txt"
    listed.unlink() if names is None else listed.write_text("".join(f"{name}\n" for name in names))
    return make_labels(folder / "set", data, views=(0, 2), topk=3), data


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (None, "class 2"),  # nobody says
        (("a", "b", "hen-of-the-woods, Polyporus frondosus"), "hen-of-the-woods,…"),  # cut, so that tiles stay apart
    ],
)
def test_classes_are_shown_by_name_or_number(tmp_path, names, shown):
    label_set, data = named(tmp_path, names)
    lines = _tile(label_set, open_source(data), "train-000000", 2, 0).caption.split("\n")
    assert lines[1][15:] == shown
    assert max(map(len, lines)) <= 34


def sheet_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def drawn(label_set: LabelSet, data: str, path: Path, monkeypatch, **size) -> dict:
    """Draw a sheet and measure it in inches before it is written: pictures, captions and title as (x0, y0, x1, y1)."""
    save, found = Figure.savefig, {}

    def measures(self, *args, **options):
        def inches(artist) -> tuple[float, ...]:
            return tuple(artist.get_window_extent().transformed(self.dpi_scale_trans.inverted()).extents)

        save(self, *args, **options)  # a layout is final once it is drawn
        found["pictures"] = [inches(axis.images[0]) for axis in self.axes]
        found["captions"] = [
            inches(text)
            for axis in self.axes
            for text in axis.get_children()
            if isinstance(text, Text) and text.get_text()
        ]
        found["title"] = inches(self.texts[0])
        found["pixels"] = [np.asarray(axis.images[0].get_array()) for axis in self.axes]
        found["figure"] = tuple(self.get_size_inches())

    monkeypatch.setattr(Figure, "savefig", measures)
    contact_sheet(label_set, open_source(data), path, **size)
    return found


@pytest.mark.parametrize(
    ("samples", "views", "rows", "columns"),
    [
        (2, 2, 2, 2),
        (1, 1, 1, 1),
        (3, 6, 3, 3),  # the set has three views
    ],
)
def test_a_sheet_has_a_row_for_each_sample_and_a_column_for_each_view(
    label_set, data, tmp_path, monkeypatch, samples, views, rows, columns
):
    path = tmp_path / "new" / "sheet.png"
    found = drawn(label_set, data, path, monkeypatch, samples=samples, views=views)
    assert len(found["pictures"]) == rows * columns
    assert len({round(x0, 3) for x0, *_ in found["pictures"]}) == columns
    assert len({round(y0, 3) for _, y0, *_ in found["pictures"]}) == rows
    assert sheet_of(path).shape[:2] == tuple(round(110 * inches) for inches in reversed(found["figure"]))


def test_the_samples_of_a_sheet_are_spread_over_the_source(label_set):
    places = drawing._spread(label_set, 4)
    assert places == [("train-000000", 0), ("train-000000", 5), ("train-000000", 11), ("train-000001", 4)]


def test_a_sheet_with_room_for_more_samples_than_there_are_shows_each_once(label_set):
    assert len(set(drawing._spread(label_set, 99))) == 23


def test_bad_images_are_not_on_a_sheet(tmp_path):
    data = write_tars(tmp_path / "data", SIZES, bad=(0, 5))
    label_set = make_labels(tmp_path / "set", data, on_bad_image="skip", views=(0, 1))
    assert len(places := drawing._spread(label_set, 21)) == 21
    assert {("train-000000", 0), ("train-000000", 5)}.isdisjoint(places)
    contact_sheet(label_set, open_source(data), tmp_path / "sheet.png", samples=1, views=1)


def test_the_pictures_of_a_sheet_are_the_tiles_row_by_row(label_set, data, tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    found = drawn(label_set, data, path, monkeypatch, samples=2, views=2)
    places = [(place, view) for place in drawing._spread(label_set, 2) for view in (0, 1)]
    sheet = sheet_of(path)
    for pixels, (x0, y0, x1, y1), ((shard, row), view) in zip(found["pixels"], found["pictures"], places, strict=True):
        expected = pixels_by_hand(label_set, data, shard, row, view)
        np.testing.assert_array_equal(pixels, expected)
        # The middle of each of the lower 12 x 16 pixels, where it lies on the paper (a caption may hide the upper ones).
        for y in range(4, 15):
            for x in range(16):
                right = round(110 * (x0 + (x + 0.5) * (x1 - x0) / 16))
                down = round(sheet.shape[0] - 110 * (y1 - (y + 0.5) * (y1 - y0) / 16))
                np.testing.assert_array_equal(sheet[down, right], expected[y, x])


def test_text_stays_within_the_paper_and_beside_its_neighbour(tmp_path, monkeypatch):
    label_set, data = named(tmp_path, ("M" * 40, "W" * 40, "Zen-of-the-woods, Polyporus frondosus"))
    found = drawn(label_set, data, tmp_path / "sheet.png", monkeypatch, samples=2, views=2)
    for x0, _, x1, y1 in found["captions"]:
        assert x0 >= 0
        assert x1 <= found["figure"][0]
        assert y1 <= found["title"][1] + PIXEL  # below the title
    assert found["captions"][0][2] <= found["captions"][1][0]


def test_no_caption_lies_on_a_picture(data, tmp_path, monkeypatch):
    label_set = make_labels(tmp_path / "set", data, topk=3, views=(0, 2))
    found = drawn(label_set, data, tmp_path / "sheet.png", monkeypatch, samples=3, views=2)
    for left, bottom, right, top in found["captions"]:
        for x0, y0, x1, y1 in found["pictures"]:
            assert right <= x0 + PIXEL or left >= x1 - PIXEL or top <= y0 + PIXEL or bottom >= y1 - PIXEL


def test_the_title_of_a_narrow_sheet_is_whole(label_set, data, tmp_path, monkeypatch):
    found = drawn(label_set, data, tmp_path / "sheet.png", monkeypatch, samples=1, views=1)
    assert found["title"][0] >= 0
    assert found["title"][2] <= found["figure"][0]


def test_class_names_may_have_dollar_signs(tmp_path):
    label_set, data = named(tmp_path, ("$\\frac$", "b", "c"))
    contact_sheet(label_set, open_source(data), tmp_path / "sheet.png", samples=1, views=1)
    assert (tmp_path / "sheet.png").is_file()


def test_class_names_in_any_script_draw_without_a_warning(tmp_path):
    label_set, data = named(tmp_path, ("猫", "犬", "鳥"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contact_sheet(label_set, open_source(data), tmp_path / "sheet.png", samples=1, views=1)


def test_drawing_leaves_the_callers_matplotlib_as_it_was(label_set, data, tmp_path):
    matplotlib.use("svg")
    try:
        contact_sheet(label_set, open_source(data), tmp_path / "sheet.png", samples=1, views=1)
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use("agg")


def test_images_that_changed_are_not_shown_as_what_the_teacher_saw(label_set, data, tmp_path):
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    path = copy / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(encoded(photo(0)), encoded(photo(0))[:-1] + b"\xd8"))
    with pytest.raises(LabelSetMismatch, match="image 'img-0000' of train-000000 has other bytes"):
        contact_sheet(label_set, open_source(str(copy)), tmp_path / "sheet.png", samples=1, views=1)
    assert not (tmp_path / "sheet.png").exists()
