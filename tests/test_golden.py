"""The committed label set of format v1: every later version must read it, to these very values."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.label_sets import problems_in

from pipeline.images.decode import decode
from pipeline.images.source import open_source
from pipeline.labels.comparing import check_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import SAMPLED_BYTES, TOLERANCE, check_replay
from pipeline.labels.tables import read_labels_footer, read_samples_footer
from pipeline.pixels.render import render
from pipeline.views.draws import stream_of
from pipeline.views.pairs import Mix, draw_mix, pairs_of
from pipeline.views.view import draw_view

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden/v1"
SHARD = "golden-000000"
PAGE = ROOT / "docs/format-v1.md"

SHA256 = {
    "images/classes.txt": "9fec8b87d457cdab76088586670cbcc3b6f5f39ef95b320c07f4ec2b539c2be4",
    "images/golden-000000.tar": "5049dd1385c45794d5d962ca0138d0050e420fc5dba0b27186712a4c2234ee3c",
    "shards/plan.json": "8b2fcb41168bebb38094c54a58a0ba1af6b2e062eec96e1635ea95ca38cfd5ae",
    "shards/manifest.json": "dfa70dbc941d9b649810474e18eeaf8a4edb81a55d8e5f29633ff04577eb9ce9",
    "shards/samples/golden-000000.parquet": "698bad1ac0ec564da5e112af2ca4c5e19fb7b239e14c3284a41316c1137a32d3",
    "shards/labels/views-00000-00002/golden-000000.parquet": "15f7cc07f73f62b4bb5c9742d0c38652f11e21731f44615c5420206d5ee60658",
}
FILES = (f"samples/{SHARD}.parquet", f"labels/views-00000-00002/{SHARD}.parquet")
IDS = {
    "labelset_id": "85cc453c83ef30a1e9d1d54b30731e715b7d1aaca9d6c06b2c99375351421c8f",
    "recipe_id": "b3259b0141dffeddbc7071c18ac43818f705aa171e2071673c83e06428729242",
    "teacher_id": "6e998383f87b7272bb611e56fe564235444c270a1973b3e07362da403f5b9b56",
    "source_id": "e8db99edcce95a2217fb5805340ad5f362f7a6205f67a2bea38ab3c5fa1b4b31",
}
KEYS = ("g0", "g1", "g2", "g3", "g4", "g5", "g6")
CLASS_LABELS = (0, 1, 2, 0, 1, None, 0)
ROWS = [0, 1, 3, 4, 5, 6]  # row 2 is a bad image
# For each view: K = 2 classes, their probabilities and the tail mass of every row. A float16 has four digits: these name it.
INDEX = [
    [[0, 2], [1, 0], [0, 2], [1, 0], [2, 0], [0, 1]],
    [[0, 1], [1, 0], [0, 1], [1, 0], [2, 0], [0, 2]],
    [[0, 2], [1, 2], [0, 2], [0, 1], [2, 0], [0, 1]],
]
SECOND = [
    [
        2.753734588623e-05,
        0.061798095703125,
        6.312131881714e-05,
        0.0288543701171875,
        0.000177741050720,
        0.000413417816162,
    ],
    [
        1.442432403564e-05,
        3.504753112793e-05,
        7.396936416626e-05,
        0.007099151611328,
        8.171796798706e-05,
        0.002759933471680,
    ],
    [0.000236153602600, 1.990795135498e-05, 5.942583084106e-05, 0.005516052246094, 0.142822265625, 0.049560546875],
]
FIRST = [
    [1.0, 0.9013671875, 1.0, 0.96826171875, 1.0, 0.9990234375],
    [1.0, 1.0, 1.0, 0.98828125, 1.0, 0.99658203125],
    [0.99951171875, 1.0, 1.0, 0.9921875, 0.734375, 0.93603515625],
]
TAIL = [
    [
        1.513957977295e-05,
        0.03704833984375,
        7.092952728271e-06,
        0.003042221069336,
        2.992153167725e-05,
        0.000336647033691,
    ],
    [
        1.025199890137e-05,
        2.408027648926e-05,
        2.878904342651e-05,
        0.004661560058594,
        7.802248001099e-05,
        0.000545501708984,
    ],
    [
        8.106231689453e-05,
        1.645088195801e-05,
        7.688999176025e-06,
        0.002391815185547,
        0.12268066406250,
        0.014511108398438,
    ],
]
PROBES = [  # row, view, partner, lam, box, SHA-256 of the pixels
    (0, 0, 3, 0.859375, (10, 2, 6, 6), "d456e63891bf84f45392f59cea653ff92d3abb0fb3d88338989a50793f5f94f0"),
    (6, 2, 4, 0.40474975453472284, None, "9d34246ba67ffff19fe0ba0b59dc2369b6e883f222c65abf3dfaa00cbd52e5fe"),
]


def label_set() -> LabelSet:
    return LabelSet.open(GOLDEN / "shards")


def source():
    return open_source(GOLDEN / "images")


def test_the_folder_holds_exactly_the_committed_files():
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert {str(p.relative_to(GOLDEN)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files} == SHA256


def test_it_opens_and_verifies():
    opened = label_set()
    assert problems_in(opened) == []
    assert (opened.shards, opened.views, opened.num_classes) == ((SHARD,), range(3), 3)
    assert opened.class_names == ("red", "green", "blue")


def test_samples_are_the_pinned_ones():
    samples = label_set().samples(SHARD)
    assert samples.key == KEYS
    assert samples.class_label == CLASS_LABELS
    assert samples.image_bytes.tolist() == [512, 512, 60, 512, 512, 512, 512]
    assert samples.height.tolist() == samples.width.tolist() == [12, 12, 0, 12, 12, 12, 12]
    assert [reason is None for reason in samples.bad] == [row in ROWS for row in range(7)]
    assert samples.image_xxh3[0].hex() == "d103d3d454b416e98b0bdba46a4046f9"
    assert samples.usable.tolist() == ROWS


@pytest.mark.parametrize("view", range(3))
def test_labels_are_the_pinned_ones_to_the_last_bit(view):
    rows = label_set().read(SHARD, view)
    assert rows.row.tolist() == ROWS
    assert rows.hard.tolist() == [pair[0] for pair in INDEX[view]]
    assert rows.topk_index.tolist() == INDEX[view]
    prob = np.array([FIRST[view], SECOND[view]], np.float16).T
    assert rows.topk_prob.tolist() == prob.tolist()
    assert rows.tail_mass.tolist() == np.array(TAIL[view], np.float16).tolist()
    kinds = (rows.row, rows.hard, rows.topk_index, rows.topk_prob, rows.tail_mass)
    assert [array.dtype.name for array in kinds] == ["uint32", "uint16", "uint16", "float16", "float16"]


def test_footers_are_the_pinned_ones():
    shard = read_labels_footer(GOLDEN / "shards/labels/views-00000-00002" / f"{SHARD}.parquet")
    assert {name: getattr(shard, name) for name in IDS} == IDS
    assert (shard.shard, shard.view_start, shard.view_stop, shard.rows_per_view) == (SHARD, 0, 3, 6)
    assert (shard.num_classes, shard.topk, shard.precision, shard.version) == (3, 2, "float16", 1)
    samples = read_samples_footer(GOLDEN / "shards/samples" / f"{SHARD}.parquet")
    assert (samples.labelset_id, samples.source_id) == (IDS["labelset_id"], IDS["source_id"])
    assert (samples.shard, samples.rows, samples.version) == (SHARD, 7, 1)


def digest(value) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def test_ids_follow_from_the_plan_by_the_rules_of_the_format_page():
    """Worked out from plan.json and the standard library alone."""
    plan = json.loads((GOLDEN / "shards/plan.json").read_text())
    named = {name: plan["source"][name] for name in ("class_names", "shards")}
    ids = {"recipe_id": digest(plan["recipe"]), "teacher_id": digest(plan["teacher"]), "source_id": digest(named)}
    whole = ids | {name: plan[name] for name in ("format", "version", "topk", "precision")}
    assert ids | {"labelset_id": digest(whole)} == {name: plan[name] for name in IDS} == IDS
    lines = "".join(f"[{json.dumps(key)},{json.dumps(label)}]\n" for key, label in zip(KEYS, CLASS_LABELS, strict=True))
    assert plan["source"]["shards"][0]["keys_sha256"] == hashlib.sha256(lines.encode()).hexdigest()


def test_the_manifest_s_hashes_follow_by_the_rules_of_the_format_page():
    manifest = json.loads((GOLDEN / "shards/manifest.json").read_text())
    assert manifest.pop("content_sha256") == digest(manifest)
    assert manifest["plan_sha256"] == SHA256["shards/plan.json"]
    assert [entry["sha256"] for entry in manifest["files"]] == [SHA256[f"shards/{name}"] for name in FILES]


def test_today_s_source_has_the_pinned_id():
    check_source(label_set(), source())
    assert source().source_id == IDS["source_id"]


def test_draws_and_pairs_are_the_pinned_ones():
    """Integers and exact arithmetic only: these may not move on any machine."""
    opened = label_set()
    samples = opened.samples(SHARD)
    for view in opened.views:
        pairs = pairs_of(opened.recipe, samples.key, samples.usable, view).rows
        assert pairs.tolist() == [[0, 3], [1, -1], [6, 4], [5, -1]]
    assert stream_of("a", "b").bits() == 0x4F5F52C470219B2D
    assert stream_of(IDS["recipe_id"], "g0", "0", "crop").bits() == 0xDC72651C612A4D87
    drawn = draw_view(opened.recipe, "g0", 0, height=12, width=12)
    assert (drawn.crop, drawn.flip, drawn.ops, drawn.erase) == ((1, 0, 11, 12), False, (), None)


def test_probes_are_the_pinned_ones_and_render_within_rounding():
    opened = label_set()
    found = [(p.row, p.view, p.partner, p.lam, p.box, p.pixels_sha256) for p in opened.manifest.probes]
    assert found == PROBES
    assert check_replay(opened, source()) <= TOLERANCE


def test_stored_labels_are_the_closed_form_of_the_replayed_views():
    """The teacher again in NumPy, over views mixed by hand: catches a label of another row, view or partner."""
    opened, shard = label_set(), source().shard(SHARD)
    samples = opened.samples(SHARD)

    def view_of(row: int, view: int) -> np.ndarray:
        image = decode(shard[row].image, key=KEYS[row])
        drawn = draw_view(opened.recipe, KEYS[row], view, height=12, width=12)
        return render(image, drawn).astype(np.float64)

    for view in opened.views:
        rows = opened.read(SHARD, view)
        for first, second in pairs_of(opened.recipe, samples.key, samples.usable, view).rows.tolist():
            mix = draw_mix(opened.recipe, KEYS[first], view) if second >= 0 else Mix()
            for own, other in ((first, second), (second, first)):
                if own < 0:
                    continue
                pixels = view_of(own, view)
                if mix.box is not None:
                    top, left, height, width = mix.box
                    box = slice(top, top + height), slice(left, left + width)
                    pixels[box] = view_of(other, view)[box]
                elif mix.lam < 1:
                    pixels = mix.lam * pixels + (1 - mix.lam) * view_of(other, view)
                power = np.exp(24 * pixels.mean(axis=(0, 1)) / 255)
                prob = power / power.sum()
                at = ROWS.index(own)
                assert rows.topk_index[at].tolist() == np.argsort(-prob)[:2].tolist()
                np.testing.assert_allclose(rows.topk_prob[at], np.sort(prob)[:0:-1], rtol=0.02, atol=2e-7)
                np.testing.assert_allclose(rows.tail_mass[at], prob.min(), rtol=0.02, atol=2e-7)


def test_the_sampled_bytes_of_a_probe_are_evenly_spaced_over_the_pixels():
    opened, shard = label_set(), source().shard(SHARD)
    probe = opened.manifest.probes[0]
    image = decode(shard[probe.row].image, key=KEYS[probe.row])
    drawn = draw_view(opened.recipe, KEYS[probe.row], probe.view, height=12, width=12)
    flat = render(image, drawn).reshape(-1)
    count = min(SAMPLED_BYTES, len(flat))
    places = [i * (len(flat) - 1) // (count - 1) for i in range(count)]
    stored = np.frombuffer(base64.b64decode(probe.sample), np.uint8).astype(int)
    assert np.abs(flat[places].astype(int) - stored).mean() <= TOLERANCE


def test_the_format_page_shows_the_ids_of_this_set():
    page = PAGE.read_text()
    shown = set(re.findall(r"\b[0-9a-f]{64}\b", page))
    assert set(IDS.values()) <= shown, "the page must quote the ids of the golden set as its worked example"


# The same labels with `--precision log8`

LOG8 = Path(__file__).parent / "golden/v1-log8"
LOG8_SHA256 = {
    "shards/labels/views-00000-00002/golden-000000.parquet": "1ee9bd26cdf46c099cbafa5471cd93ea4b03e1170cf92f3a98a1409d46298b5f",
    "shards/manifest.json": "b776f885fc0cdd8785727f14b0b07e3411a1ed7fb0b3c4a1774c8723d1caa6aa",
    "shards/plan.json": "706b55a5adc1acb92da4bf49f2f3fb83516ba43920991864e5a95c64f24ea680",
    "shards/samples/golden-000000.parquet": "85ec1104e60cfd48d6205ebc431719fa34dd4b7bc15ccd7403e777ee9ebfa5e6",
}
CODES = [
    [[105, 6], [27, 5], [97, 22], [35, 23], [86, 18], [78, 2]],
    [[111, 4], [103, 3], [95, 10], [49, 5], [94, 1], [59, 16]],
    [[84, 10], [108, 2], [97, 21], [52, 8], [16, 2], [29, 13]],
]


def test_the_golden_codes_lie_as_they_were_committed():
    found = {
        path.relative_to(LOG8).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in LOG8.rglob("*")
        if path.is_file()
    }
    assert found == LOG8_SHA256


def test_the_golden_codes_still_read():
    coded, exact = LabelSet.open(LOG8 / "shards"), LabelSet.open(GOLDEN / "shards")
    assert problems_in(coded) == []
    assert coded.plan.precision == "log8"
    for view in range(3):
        rows, floats = coded.read(SHARD, view), exact.read(SHARD, view)
        assert rows.topk_code is not None
        assert rows.topk_code.tolist() == CODES[view]
        assert rows.row.tolist() == ROWS
        assert rows.topk_index.tolist() == floats.topk_index.tolist() == INDEX[view]
        assert rows.hard.tolist() == floats.hard.tolist()
        ratio = rows.topk_prob[:, 1] / rows.topk_prob[:, 0]
        np.testing.assert_allclose(ratio, np.exp(-0.1 * rows.topk_code[:, 0].astype(float)), rtol=1e-6)
        np.testing.assert_allclose(rows.topk_prob, floats.topk_prob, rtol=0.06)


def test_the_golden_codes_replay():
    source = open_source(str(GOLDEN / "images"))
    assert check_replay(LabelSet.open(LOG8 / "shards"), source) <= TOLERANCE
