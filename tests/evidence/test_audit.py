"""`labels audit`: every number against plain loops over the stored rows, planted faults, and the page in a browser."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.builders import ROOT, encoded, make_labels, photo, write_tars
from support.commands import invoke
from support.label_sets import seal_again
from webdataset.writer import TarWriter

from pipeline.errors import LabelSetError, LabelSetMismatch, UsageError
from pipeline.labels.encoding import LabelRows
from pipeline.labels.labelset import LabelSet
from pipeline.labels.tables import SampleRows, read_all_views, read_labels_footer, write_labels
from pipeline.settings.files import load_recipe
from pipeline.sharing.transfer import pull
from pipeline.views.pairs import draw_mix, pairs_of
from trainer.evidence import audit as auditing
from trainer.evidence.audit import Audit, audit, audit_table
from trainer.evidence.audit_files import write_audit

PLAIN = load_recipe("crop-flip", {"img_size": 16, "mix_block": 8})
MIXED = load_recipe("deit", {"img_size": 16, "mix_block": 8})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Images of three classes in two tars; one of five has no class label, one is damaged."""
    return write_tars(tmp_path_factory.mktemp("data"), (13, 10), unlabelled=5, bad=(4,))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> str:
    """Images of three classes in two tars, number modulo 3."""
    return write_tars(tmp_path_factory.mktemp("clean"), (13, 10))


# --- every number, by hand --------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Return every label of a set as a dictionary, by source shard, view and row, read with pyarrow alone."""
    return {
        (path.stem, label["view"], label["row"]): label
        for path in sorted(folder.glob("labels/*/*.parquet"))
        for label in pq.read_table(path).to_pylist()
    }


def by_hand(label_set: LabelSet, views: range) -> dict[str, Any]:
    """Image by image, view by view: what the docstring of the module says, in plain Python."""
    labels, classes, topk = stored(label_set.folder), label_set.num_classes, label_set.plan.topk
    suspects, unsure, judged = [], [], Counter()
    for path in sorted((label_set.folder / "samples").glob("*.parquet")):
        shard, samples = path.stem, pq.read_table(path).to_pylist()
        keys = tuple(sample["key"] for sample in samples)
        usable = np.array([sample["row"] for sample in samples if sample["bad"] is None])
        for row in usable.tolist():
            own = samples[row]["class_label"]
            weight = against = logs = room = 0.0
            votes: defaultdict[int, float] = defaultdict(float)
            entropies = []
            for view in views:
                label = labels[shard, view, row]
                (pair,) = (pair for pair in pairs_of(label_set.recipe, keys, usable, view).rows.tolist() if row in pair)
                lam = draw_mix(label_set.recipe, keys[pair[0]], view).lam if pair[1] >= 0 else 1.0
                other = None
                if lam < 1:
                    other = samples[pair[1] if pair[0] == row else pair[0]]["class_label"]
                if topk and lam >= 0.5:
                    entropies.append(entropy(label, classes))
                if lam < 1 and other is None and lam < 0.5:
                    continue
                other = None if other == own else other
                weight += lam
                if label["hard"] not in (own, other):
                    against += lam
                    votes[label["hard"]] += lam
                if topk:
                    left = 1 - probability(label, other, classes)
                    if left > 0:
                        logs += lam * left * math.log(min(1, max(1e-4, probability(label, own, classes) / left)))
                    room += lam * left
            if entropies and min(entropies) >= 0.5:
                unsure.append((shard, row, min(entropies)))
            if own is None or weight < 0.5:
                continue
            judged[own] += 1
            if against / weight > 0.5:
                score = (1 - math.exp(logs / room) if room else 0.0) if topk else against / weight
                answer = min(votes, key=lambda c: (-votes[c], c))
                suspects.append((shard, row, own, answer, score, against / weight))
    confused = Counter((own, answer) for _, _, own, answer, _, _ in suspects)
    return {
        "judged": sum(judged.values()),
        "suspects": sorted(suspects, key=lambda s: -s[4]),
        "unsure": sorted(unsure, key=lambda u: -u[2]),
        "confused": {pair: (images, images / judged[pair[0]]) for pair, images in confused.items()},
    }


def probability(label: dict[str, Any], wanted: int | None, classes: int) -> float:
    if wanted is None:
        return 0.0
    kept = dict(zip(label["topk_index"], label["topk_prob"], strict=True))
    return float(kept[wanted]) if wanted in kept else float(label["tail_mass"]) / (classes - len(kept))


def entropy(label: dict[str, Any], classes: int) -> float:
    others = classes - len(label["topk_prob"])
    parts = [*map(float, label["topk_prob"]), *[float(label["tail_mass"]) / others for _ in range(others)]]
    return -sum(p * math.log(p) for p in parts if p > 0) / math.log(classes)


def in_numbers(found: Audit) -> dict[str, Any]:
    """Return an audit in the form of `by_hand`."""
    return {
        "judged": found.judged,
        "suspects": [
            (s.image.shard, s.image.row, s.image.class_label, s.answer, s.score, s.contradicted) for s in found.suspects
        ],
        "unsure": [(u.image.shard, u.image.row, u.entropy) for u in found.unsure],
        "confused": {(c.class_label, c.answer): (c.images, c.share) for c in found.confused},
    }


def assert_same(found: Audit, expected: dict[str, Any]) -> None:
    mine = in_numbers(found)
    for name in ("suspects", "unsure"):
        assert len(mine[name]) == len(expected[name])
        for one, other in zip(mine[name], expected[name], strict=True):
            assert one == pytest.approx(other, abs=2e-3 if name == "unsure" else 1e-9)
    assert (mine["judged"], mine["confused"]) == (expected["judged"], expected["confused"])


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (MIXED, {"topk": 2, "views": (0, 5)}),  # one class is the tail
        (MIXED, {"topk": 1, "views": (0, 5), "views_per_shard": 2}),  # two classes share it; three files
        (MIXED, {"topk": 3, "views": (2, 7)}),  # no tail; the first view is not 0
        (MIXED, {"topk": 0, "views": (0, 5)}),  # only hard labels
        (MIXED, {"topk": 2, "views": (0, 1)}),  # a single view
        (PLAIN, {"topk": 2, "views": (0, 4)}),  # no partner
        (PLAIN, {"topk": 2, "views": (0, 4), "precision": "float32"}),
    ],
)
def test_every_number_equals_plain_loops_over_the_stored_rows(data, tmp_path, recipe, settings):
    label_set = make_labels(tmp_path / "set", data, recipe=recipe, on_bad_image="skip", **settings)
    found, expected = audit(label_set), by_hand(label_set, label_set.views)
    assert_same(found, expected)
    assert expected["suspects"]  # else nothing was compared
    assert (found.images, found.labelled) == (22, 17)


def test_log8_sets_have_the_numbers_of_what_they_store(data, tmp_path, monkeypatch):
    """The tables hold codes, so the reference gets its rows through the reader."""
    label_set = make_labels(tmp_path / "set", data, recipe=MIXED, on_bad_image="skip", topk=2, precision="log8")
    labels = {}
    for shard in label_set.shards:
        for view in label_set.views:
            rows = label_set.read(shard, view)
            for at, row in enumerate(rows.row.tolist()):
                values = {name: getattr(rows, name)[at] for name in ("hard", "topk_prob", "tail_mass")}
                labels[shard, view, row] = values | {"topk_index": rows.topk_index[at].tolist()}
    monkeypatch.setitem(globals(), "stored", lambda _: labels)
    assert_same(audit(label_set), by_hand(label_set, label_set.views))


def test_some_views_of_a_set_are_audited_as_a_set_of_these_views(data, tmp_path):
    label_set = make_labels(tmp_path / "set", data, recipe=MIXED, on_bad_image="skip", views=(0, 6))
    assert_same(audit(label_set, (2, 4)), by_hand(label_set, range(2, 4)))


def test_a_pulled_part_of_a_set_is_audited(data, tmp_path):
    """One of two source shards and two of six views."""
    label_set = make_labels(tmp_path / "set", data, recipe=MIXED, on_bad_image="skip", views=(0, 6), views_per_shard=2)
    pull(str(label_set.folder), tmp_path / "part", views=(2, 4), shards=("train-000001",))
    found = audit(LabelSet.open(tmp_path / "part"))
    whole = by_hand(label_set, range(2, 4))
    expected = [suspect for suspect in whole["suspects"] if suspect[0] == "train-000001"]
    assert len(expected) == len(found.suspects) > 0
    for mine, other in zip(in_numbers(found)["suspects"], expected, strict=True):
        assert mine == pytest.approx(other)
    assert (found.images, found.views) == (10, range(2, 4))


def test_votes_that_are_added_up_in_between_give_the_same_answers(data, tmp_path, monkeypatch):
    label_set = make_labels(tmp_path / "set", data, recipe=MIXED, on_bad_image="skip", views=(0, 6))
    at_once = audit(label_set).to_dict()
    monkeypatch.setattr(auditing, "PENDING", 5)
    assert audit(label_set).to_dict() == at_once


def test_memory_does_not_grow_with_the_views(clean, tmp_path, monkeypatch):
    """The label files have four views each, and one file is in memory at a time."""
    monkeypatch.setattr("pipeline.labels.checked_files.RECENT_BYTES", 0)  # the cache of files has a limit of its own
    label_set = make_labels(tmp_path / "set", clean, views=(0, 48), views_per_shard=4)
    audit(label_set, (0, 4))  # what is loaded once
    peaks = []
    for views in ((0, 8), (0, 48)):
        tracemalloc.start()
        audit(LabelSet.open(label_set.folder), views)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


# --- planted faults ---------------------------------------------------------------------------------------------------


def rewritten(label_set: LabelSet, answer: Callable[[str, int, int, int], list[float]]) -> LabelSet:
    """Store other answers: `answer(shard, view, row, class of the image)` gives three probabilities; K is 3."""
    for path in sorted(label_set.folder.glob("labels/*/*.parquet")):
        footer = read_labels_footer(path)
        classes = label_set.samples(path.stem).class_label
        views = []
        for view, rows in enumerate(read_all_views(path), footer.view_start):
            probs = np.array([answer(path.stem, view, row, classes[row] or 0) for row in rows.row.tolist()], "f4")
            views.append(with_answers(rows, probs))
        content = footer.codec.content_xxh3(views)
        with path.open("wb") as file:
            write_labels(file, views, footer.model_copy(update={"content_xxh3": content}))
    seal_again(label_set.folder)
    return LabelSet.open(label_set.folder)


def with_answers(rows: LabelRows, prob: np.ndarray) -> LabelRows:
    index = np.argsort(-prob, axis=1, kind="stable").astype(rows.topk_index.dtype)
    kept = np.take_along_axis(prob, index.astype(int), 1).astype(rows.topk_prob.dtype)
    return dataclasses.replace(
        rows, hard=index[:, 0], topk_index=index, topk_prob=kept, tail_mass=np.zeros_like(rows.tail_mass)
    )


def sure_of(label: int, prob: float = 0.9) -> list[float]:
    return [prob if c == label % 3 else (1 - prob) / 2 for c in range(3)]


def set_of(out: Path, data: str, answer: Callable[..., list[float]], recipe=PLAIN, **settings: Any) -> LabelSet:
    return rewritten(make_labels(out, data, recipe=recipe, topk=3, **{"views": (0, 4)} | settings), answer)


def test_planted_suspects_are_found_and_ranked_and_no_other(clean, tmp_path):
    """The teacher contradicts two images in every view, a third one in half of the views."""

    def answer(shard: str, view: int, row: int, own: int) -> list[float]:
        place = (shard[-1], row)
        if place == ("0", 5):
            return sure_of(own + 1, 0.9)
        if place == ("1", 2):
            return sure_of(own + 2, 0.98)
        return sure_of(own + 1 if place == ("0", 7) and view % 2 else own)

    found = audit(set_of(tmp_path / "set", clean, answer))
    assert [(s.image.key, s.image.class_label, s.answer, s.contradicted) for s in found.suspects] == [
        ("img-0015", 0, 2, 1.0),
        ("img-0005", 2, 0, 1.0),
    ]
    assert [s.score for s in found.suspects] == pytest.approx([0.99, 0.95], abs=1e-3)
    assert [(c.class_label, c.answer, c.images, c.share) for c in found.confused] == [
        (2, 0, 1, 1 / 7),
        (0, 2, 1, 1 / 8),
    ]
    assert (found.unsure, found.duplicates, found.notes()) == ([], [], [])


def test_answers_for_the_partner_contradict_nothing(clean, tmp_path):
    """Each view is answered by the class of the partner: half of the answers would contradict if it counted."""
    label_set = make_labels(tmp_path / "set", clean, recipe=MIXED, topk=3, views=(0, 4))
    others = {}
    for shard in label_set.shards:
        samples = label_set.samples(shard)
        for view in label_set.views:
            for one, two in pairs_of(MIXED, samples.key, samples.usable, view).rows.tolist():
                others |= {(shard, view, one): samples.class_label[two if two >= 0 else one]}
                others |= {(shard, view, two): samples.class_label[one]} if two >= 0 else {}
    label_set = rewritten(label_set, lambda shard, view, row, _: sure_of(others[shard, view, row]))
    wrong = [others[shard, view, row] != label_set.samples(shard).class_label[row] for shard, view, row in others]
    assert sum(wrong) > len(wrong) / 2
    assert audit(label_set).suspects == []


def test_an_unlabelled_partner_may_explain_an_answer(tmp_path):
    """Only one image has a class label. A view that shows more of its partner does not count."""
    data = write_tars(tmp_path / "data", (8,), unlabelled=1)
    relabel(Path(data), {"img-0003": 0})
    label_set = set_of(tmp_path / "set", data, lambda *_: sure_of(1), recipe=MIXED, views=(0, 6))
    samples, shown = label_set.samples("train-000000"), 0.0
    for view in label_set.views:
        (pair,) = (p for p in pairs_of(MIXED, samples.key, samples.usable, view).rows.tolist() if 3 in p)
        lam = draw_mix(MIXED, samples.key[pair[0]], view).lam
        shown += lam if lam >= 0.5 else 0
    seen = list(auditing.seen_views(label_set, "train-000000", label_set.views))
    assert sum(view.weight[3] for view in seen) == pytest.approx(shown)
    assert shown < sum(view.shown[3] for view in seen)
    (suspect,) = audit(label_set).suspects
    assert (suspect.image.row, suspect.answer, suspect.contradicted) == (3, 1, 1.0)


def relabel(folder: Path, labels: dict[str, int]) -> None:
    """Write the tar again with a class label for these keys."""
    with TarWriter(str(folder / "train-000000.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
        for number in range(8):
            key = f"img-{number:04}"
            sample: dict[str, Any] = {"__key__": key, "jpg": encoded(photo(number))}
            tar.write(sample | ({"cls": str(labels[key]).encode()} if key in labels else {}))


def test_an_image_that_is_hardly_shown_is_not_judged(clean, tmp_path):
    """In one view with every pair mixed, many images have the smaller part."""
    label_set = set_of(tmp_path / "set", clean, lambda *_: sure_of(0), recipe=MIXED, views=(0, 1))
    found = audit(label_set)
    seen = [view for name in label_set.shards for view in auditing.seen_views(label_set, name, range(1))]
    hidden = sum(int((view.weight < 0.5).sum()) for view in seen)
    assert found.judged == 23 - hidden < 23
    assert found.notes()[0] == f"{hidden} images not judged: all views together show less than half of each."


def test_planted_unsure_images_are_found_and_one_clear_view_is_enough(clean, tmp_path):
    def answer(shard: str, view: int, row: int, own: int) -> list[float]:
        if shard[-1] == "0" and row in (4, 6):
            return [0.34, 0.33, 0.33] if row == 4 or view else sure_of(own)
        return [0.4, 0.35, 0.25] if (shard[-1], row) == ("1", 3) else sure_of(own)

    found = audit(set_of(tmp_path / "set", clean, answer))
    assert [unsure.image.key for unsure in found.unsure] == ["img-0004", "img-0016"]
    assert found.unsure[0].entropy == pytest.approx(1, abs=1e-3)


def copies_in(folder: Path) -> str:
    """Two tars: one image in both under other keys and classes, one twice under the same class, one as PNG of its pixels."""
    folder.mkdir()
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    members = [
        [("a0", photo(0), "JPEG", 0), ("a1", photo(1), "JPEG", 1), ("a2", photo(2), "JPEG", 2), ("a3", photo(1), "JPEG", 1)],
        [("b0", photo(3), "JPEG", 0), ("b1", photo(0), "JPEG", 2), ("b2", photo(2), "PNG", 2)],
    ]  # fmt: skip
    for number, tar_of in enumerate(members):
        with TarWriter(str(folder / f"train-{number}.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            for key, pixels, kind, label in tar_of:
                extension = "jpg" if kind == "JPEG" else "png"
                tar.write({"__key__": key, extension: encoded(pixels, kind), "cls": str(label).encode()})
    return str(folder)


def test_images_with_equal_bytes_are_found_across_shards_and_different_class_labels_come_first(tmp_path):
    label_set = make_labels(tmp_path / "set", copies_in(tmp_path / "data"), recipe=PLAIN)
    groups = [[(i.shard, i.key, i.class_label) for i in group] for group in audit(label_set).duplicates]
    assert groups == [
        [("train-0", "a0", 0), ("train-1", "b1", 2)],
        [("train-0", "a1", 1), ("train-0", "a3", 1)],
    ]
    assert [group["same_class_label"] for group in audit(label_set).to_dict()["duplicates"]] == [False, True]


# --- sets that lack something ------------------------------------------------------------------------------------------


def test_a_set_without_class_labels_has_no_suspects_and_says_so(tmp_path):
    label_set = make_labels(tmp_path / "set", write_tars(tmp_path / "data", (6,), unlabelled=1), recipe=PLAIN)
    found = audit(label_set).to_dict()
    assert (found["suspects"], found["confused"], found["labelled"]) == (None, None, 0)
    assert found["notes"] == ["No image has a class label, so there are no suspects and no confused classes."]
    code, output = invoke("labels", "audit", str(label_set.folder))
    assert code == 0
    assert "note           No image has a class label" in output
    assert "suspects  " not in output


def test_a_set_of_hard_labels_ranks_by_the_share_and_calls_no_image_unsure(clean, tmp_path):
    label_set = make_labels(tmp_path / "set", clean, recipe=PLAIN, topk=0)
    found = audit(label_set)
    assert found.suspects
    assert all(suspect.score == suspect.contradicted for suspect in found.suspects)
    assert (found.to_dict()["unsure"], found.score) == (None, "contradicted")
    assert "The set has only hard labels (K = 0)" in found.notes()[-1]
    assert "unsure" not in audit_table(found, 5).replace("called unsure", "")


def test_a_set_without_a_usable_image_is_refused(clean, tmp_path, monkeypatch):
    """Neither `precompute` nor `labels pull` makes such a set, but a stranger may."""
    label_set = make_labels(tmp_path / "set", clean)
    monkeypatch.setattr(SampleRows, "usable", property(lambda _: np.empty(0, np.int64)))
    monkeypatch.setattr(auditing, "seen_views", lambda *_: iter(()))
    with pytest.raises(LabelSetError, match="has no usable image to audit"):
        audit(label_set)


def test_labels_of_other_classes_are_noticed(clean, tmp_path):
    found = audit(set_of(tmp_path / "set", clean, lambda shard, view, row, own: sure_of(own + 1)))
    assert len(found.suspects) == 23
    assert found.notes() == [
        "More than half of the class labels are contradicted: are they numbered as the teacher's classes?"
    ]


# --- the command --------------------------------------------------------------------------------------------------------

REFUSED = [
    # arguments, exit code, message
    (["--views", "0:9"], 2, "--views must be START:STOP within the labelled views 0:4, got 0:9"),
    (["--views", "3:3"], 2, "--views must be START:STOP within the labelled views 0:4, got 3:3"),
    (["--data", "images"], 2, "--data names the images of the page in --out: pass --out too"),
    (["--top", "0"], 2, "0 is not in the range x>=1"),
    (["--out", "page", "--data", "nowhere"], 1, "nowhere: does not exist"),
    (["--expect-manifest", f"sha256:{'0' * 64}"], 1, "is not the pinned manifest"),
]


@pytest.fixture(scope="module")
def planted(clean, tmp_path_factory) -> LabelSet:
    """A set with three suspects, one unsure image and no duplicates."""

    def answer(shard: str, view: int, row: int, own: int) -> list[float]:
        if row == 8:
            return sure_of(own, 0.34) if shard[-1] == "0" else sure_of(own)
        suspects = (2, 5) if shard[-1] == "0" else (9,)
        return sure_of(own + 1, 0.88 + row / 100) if row in suspects else sure_of(own)

    return set_of(tmp_path_factory.mktemp("planted") / "set", clean, answer)


@pytest.mark.parametrize(("arguments", "code", "text"), REFUSED, ids=lambda each: str(each)[:30])
def test_what_cannot_be_audited_is_refused_in_words(planted, tmp_path, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    found, output = invoke("labels", "audit", str(planted.folder), *arguments)
    assert found == code, output
    assert text in output
    assert list(tmp_path.iterdir()) == []


def test_the_tables_are_aligned_and_say_how_much_they_leave_out(planted):
    lines = audit_table(audit(planted), 2).splitlines()
    assert lines[1:5] == [
        "read           views 0:4 of 23 images",
        "suspects       3 of 23 judged class labels (13.0 %)",
        "unsure         1 image (4.3 %)",
        "duplicates     0 groups of byte-equal images, 0 with different class labels",
    ]
    assert lines[6:10] == [
        "suspects: class labels that most of the answers contradict, the first 2 of 3",
        "      score  contradicted  class label  teacher's answer  key",
        "  1  0.9850       100.0 %  1 bee        2 cat             img-0022 (train-000001)",
        "  2  0.9650       100.0 %  2 cat        0 ant             img-0005 (train-000000)",
    ]


def test_json_has_everything_whatever_top_says(planted):
    code, output = invoke("labels", "audit", str(planted.folder), "--top", "1", "--json")
    found = json.loads(output[output.index("{\n") :])
    assert code == 0
    assert (found["kind"], found["version"], found["score"]) == ("audit", 1, "log_self_confidence")
    assert [s["key"] for s in found["suspects"]] == ["img-0022", "img-0005", "img-0002"]
    assert found["suspects"][0] == {
        "shard": "train-000001",
        "row": 9,
        "key": "img-0022",
        "class_label": 1,
        "class_name": "bee",
        "answer": 2,
        "answer_name": "cat",
        "score": pytest.approx(0.985, abs=1e-3),
        "contradicted": 1.0,
    }


# --- the files of --out ---------------------------------------------------------------------------------------------------


def test_the_csv_holds_every_suspect_and_audit_json_the_whole_result(planted, clean, tmp_path):
    code, output = invoke(
        "labels", "audit", str(planted.folder), "--data", clean, "--out", str(tmp_path / "out"), "--top", "1"
    )
    assert code == 0, output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "gallery.html", "suspects.csv"]
    found = json.loads((tmp_path / "out/audit.json").read_bytes())
    assert found == audit(planted).to_dict()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/suspects.csv").read_text())))
    assert rows == [{name: str(each[name]) for name in rows[0]} for each in found["suspects"]]
    assert list(rows[0]) == [
        "key",
        "class_label",
        "class_name",
        "answer",
        "answer_name",
        "score",
        "contradicted",
        "shard",
    ]


SCRIPT = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a set with suspects, unsure images and duplicates, whose class names and keys are HTML."""
    folder = tmp_path_factory.mktemp("page")
    data = folder / "data"
    data.mkdir()
    (data / "classes.txt").write_text(f"{SCRIPT}\nbee & <b>wasp\n{'a very long class name, ' * 6}\n")
    with TarWriter(str(data / "train-0.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
        for number in range(9):
            key = "<script>alert(1)" if number == 2 else f"{'long_key_' * 12}{number}"
            image = encoded(photo(min(number, 7), 300, 200))
            tar.write({"__key__": key, "jpg": image, "cls": str(number % 3).encode()})

    def answer(shard: str, view: int, row: int, own: int) -> list[float]:
        return [0.34, 0.33, 0.33] if row in (0, 1) else sure_of(own + 1) if row in (2, 3, 4) else sure_of(own)

    found = audit(set_of(folder / "set", str(data), answer))
    assert (len(found.suspects), len(found.unsure), len(found.duplicates)) == (4, 2, 1)
    write_audit(found, folder / "out", top=10)
    return folder / "out/gallery.html"


def test_class_names_and_keys_are_text_on_the_page(page):
    text = page.read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 2  # caption and alternative text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert "bee &amp; &lt;b&gt;wasp" in text


def test_the_page_needs_nothing_else_and_has_a_picture_of_each_image(page):
    text = page.read_text()
    loaded = re.findall(r"""\b(?:src|srcset|href|action|data)\s*=\s*["']?([^"'>\s]*)""", text)
    assert [value for value in loaded if not value.startswith(("data:image/jpeg;base64,", "#"))] == []
    assert not re.search(r"url\(|@import|<link|<iframe|<form", text)
    assert "http" not in text.replace("http-equiv", "")
    assert len(re.findall(r'<img src="data:image/jpeg;base64,[A-Za-z0-9+/=]+"', text)) == 4 + 2 + 2
    assert "prefers-color-scheme: dark" in text
    anchors, ids = (set(re.findall(rf'{name}="#?([a-z]+)"', text)) for name in ("href", " id"))
    assert anchors == {"suspects", "confused", "unsure", "duplicates"} <= ids


def test_a_set_whose_images_are_gone_has_a_page_without_pictures(tmp_path, caplog):
    data = write_tars(tmp_path / "data", (6,))
    label_set = make_labels(tmp_path / "set", data, recipe=PLAIN)
    shutil.move(data, tmp_path / "elsewhere")
    write_audit(audit(label_set), tmp_path / "out", top=5)
    assert "gallery.html has no pictures" in caplog.text
    text = (tmp_path / "out/gallery.html").read_text()
    assert "The images could not be opened" in text
    assert "<img" not in text
    write_audit(audit(label_set), tmp_path / "out", top=5, data=str(tmp_path / "elsewhere"))
    assert "<img" in (tmp_path / "out/gallery.html").read_text()


def test_a_picture_of_another_image_is_never_shown(planted, clean, tmp_path):
    other = Path(shutil.copytree(clean, tmp_path / "other"))
    for tar in other.glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(encoded(photo(22)), encoded(photo(22))[:-1] + b"\xd8"))
    with pytest.raises(LabelSetMismatch, match="image 'img-0022' of train-000001 has other bytes"):
        write_audit(audit(planted), tmp_path / "out", top=5, data=str(other))
    assert not (tmp_path / "out").exists()


def test_the_template_is_installed_with_the_package():
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "trainer/evidence"
    packed = {path for pattern in patterns["trainer.evidence"] for path in folder.glob(pattern)}
    assert packed >= set((folder / "templates").iterdir())


# --- the page in a browser -----------------------------------------------------------------------------------------------


def browser(page: Path, width: int, folder: Path) -> tuple[str, str]:
    """Open a page in headless Chromium; return its document and what the console said."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium is not on this machine")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--enable-logging=stderr"]
    options += [
        f"--window-size={width},900",
        "--allow-file-access-from-files",
        "--virtual-time-budget=4000",
        "--dump-dom",
    ]
    done = subprocess.run([program, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


FRAME = """<!doctype html><iframe src="{page}" style="width:{width}px;height:900px;border:0" onload="
  const root = this.contentDocument.documentElement;
  document.title = ['overflow', root.scrollWidth - root.clientWidth, 'links', root.querySelectorAll('a[href]').length].join(' ')"></iframe>
<script>{script}</script>"""


@pytest.mark.slow
def test_the_page_opens_in_a_browser_without_an_error_and_fits_a_phone(page, tmp_path):
    """A page around it says how wide it is; the page itself has no script."""
    document, said = browser(page, 1280, tmp_path / "profile")
    assert ("Duplicates (1)" in document, said) == (True, "")
    for width in (360, 1280):
        frame = tmp_path / f"{width}.html"
        frame.write_text(FRAME.format(page=page.as_uri(), width=width, script=""))
        document, said = browser(frame, 1400, tmp_path / "profile")
        assert "<title>overflow 0 links 4</title>" in document
        assert said == ""
    frame.write_text(FRAME.format(page=page.as_uri(), width=360, script="console.error('a fault')"))
    assert "a fault" in browser(frame, 1400, tmp_path / "profile")[1]  # else the silence above would say nothing


def test_bad_views_are_a_usage_error_of_the_function_too(planted):
    with pytest.raises(UsageError, match="within the labelled views 0:4, got 4:5"):
        audit(planted, (4, 5))
