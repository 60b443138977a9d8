"""Replay probes: the same pixels pass, a small difference warns, anything else is refused with the measured difference."""

import base64
import hashlib
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.label_sets import RECIPE, coloured_png, make_label_set, seal_again, write_source, write_tar

from pipeline.errors import LabelSetCorrupt, LabelSetMismatch, ReplayError
from pipeline.images.decode import decode
from pipeline.images.source import open_source
from pipeline.labels import replay
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import read_probes
from pipeline.labels.replay import SAMPLED_BYTES, TOLERANCE, check_image, check_replay, make_probe, pair_of
from pipeline.labels.sealing import MANIFEST_PROBES
from pipeline.labels.tables import read_labels_footer
from pipeline.pixels import kernel
from pipeline.pixels.render import render, render_view
from pipeline.views.pairs import Mix, Pairs, draw_mix, pairs_of
from pipeline.views.recipe import RENDERERS
from pipeline.views.view import draw_view


@pytest.fixture
def checked(made, images):
    """Return the function that renders all probes of the sound set again."""
    return lambda: check_replay(LabelSet.open(made), open_source(images))


@pytest.fixture(scope="module")
def sets(images, tmp_path_factory) -> dict[int, LabelSet]:
    """Label sets of these images, by renderer."""
    folder, recipes = tmp_path_factory.mktemp("sets"), {n: RECIPE.with_fields(renderer=n) for n in RENDERERS}
    return {n: make_label_set(images, folder / str(n), recipe=recipe) for n, recipe in recipes.items()}


def with_pixels(monkeypatch, change) -> None:
    """Make every view that is replayed go through `change` first."""
    monkeypatch.setattr(replay, "render_view", lambda *view: np.ascontiguousarray(change(render_view(*view))))


# What passes.


def test_the_same_machine_renders_the_very_pixels(checked, caplog):
    with caplog.at_level(logging.WARNING):
        assert checked() == 0.0
    assert caplog.records == []


def test_a_probe_is_what_the_page_says_it_is(made, images):
    opened, source = LabelSet.open(made), open_source(images)
    assert 0 < len(opened.manifest.probes) <= MANIFEST_PROBES
    for probe in opened.manifest.probes:
        sample = source.shard(probe.shard)[probe.row]
        image = decode(sample.image, key=sample.key)
        pixels = render(image, draw_view(RECIPE, sample.key, probe.view, height=image.shape[0], width=image.shape[1]))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == probe.pixels_sha256
        assert base64.b64decode(probe.sample) == sampled(pixels)


def sampled(pixels: np.ndarray) -> bytes:
    """The sampled bytes by the words of the format page."""
    data = pixels.tobytes()
    count = min(768, len(data))
    step = (len(data) - 1) / (count - 1)
    return bytes([data[int(i * step)] for i in range(count - 1)] + [data[-1]])


@pytest.mark.parametrize("size", [1, 7, 16, 17, 32, 96, 224, 384])
def test_sampled_bytes_follow_the_page_at_every_size(size):
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    probe = make_probe(pixels, shard="s", row=0, view=0, partner=None, mix=Mix())
    assert base64.b64decode(probe.sample) == sampled(pixels)
    assert len(sampled(pixels)) == min(SAMPLED_BYTES, 3 * size * size)


def test_every_label_shard_has_the_probes_of_its_ends(made):
    opened = LabelSet.open(made)
    for entry in opened.manifest.files:
        if entry.kind == "labels":
            path = made / entry.path
            probes = read_probes(read_labels_footer(path).probes, path)
            last = opened.samples(entry.shard).usable[-1]
            assert [(p.row, p.view) for p in probes] == [(0, entry.view_start), (last, entry.view_stop - 1)]


SMALL = [
    # renderer, cause of a small difference
    (1, "rounding only"),
    (2, "another image decoder, or a damaged kernel"),
]


@pytest.mark.parametrize(("renderer", "cause"), SMALL)
def test_the_last_bit_of_some_pixels_warns_and_passes(sets, images, monkeypatch, caplog, renderer, cause):
    """Renderer 1: another processor or version of a library would round so. Nothing rounds in renderer 2 but a decoder."""

    def rounded(pixels):
        moved = np.random.default_rng(0).random(pixels.shape) < 0.02
        return pixels - (moved & (pixels > 0))

    with_pixels(monkeypatch, rounded)
    with caplog.at_level(logging.WARNING, logger="deit_cli.replay"):
        difference = check_replay(sets[renderer], open_source(images))
    assert 0.01 < difference < 0.04
    (record,) = caplog.records
    assert record.getMessage().endswith(f"by up to {difference:.3f} of 255 on average: {cause}")


def test_a_change_that_the_sampled_bytes_miss_still_warns(monkeypatch, images, tmp_path, caplog):
    """At 24 pixels a side only every other byte is sampled; the hash sees them all."""
    recipe = RECIPE.with_fields(img_size=24)
    opened = make_label_set(images, tmp_path / "set", recipe=recipe)

    def one_byte(pixels):
        pixels.reshape(-1)[1] ^= 1
        return pixels

    assert sampled(one_byte(np.zeros((24, 24, 3), np.uint8))) == bytes(768)
    with_pixels(monkeypatch, one_byte)
    with caplog.at_level(logging.WARNING, logger="deit_cli.replay"):
        assert check_replay(opened, open_source(images)) == 1e-3
    assert len([record for record in caplog.records if record.name == "deit_cli.replay"]) == 1


# What is refused, and with which number.

PIPELINES = [
    # name, change to the pixels, smallest difference to expect
    ("brighter by two levels", lambda p: np.clip(p.astype(int) + 2, 0, 255).astype(np.uint8), 1.0),
    ("shifted by a pixel", lambda p: np.roll(p, 1, axis=1), 1.0),
    ("mirrored", lambda p: p[:, ::-1], 1.0),
    ("BGR", lambda p: p[..., ::-1], 1.0),
    ("black", np.zeros_like, 50.0),
]


@pytest.mark.parametrize(("name", "change", "least"), PIPELINES, ids=[name for name, *_ in PIPELINES])
def test_other_pixels_are_refused_with_the_measured_difference(checked, monkeypatch, name, change, least):
    with_pixels(monkeypatch, change)
    with pytest.raises(ReplayError, match=r"view 0 of 'n000' differs from the labelled pixels by [\d.]+ of 255 on average") as caught:  # fmt: skip
        checked()
    assert float(str(caught.value).split("by ")[1].split()[0]) >= least
    assert str(caught.value.what).endswith("): the labels do not fit")


LARGE = [
    # renderer, what is accepted, way out
    (1, f"at most {TOLERANCE} is rounding", "Compare the installed versions with those in `deit-cli labels info`"),
    (
        2,
        f"at most {TOLERANCE} may be another image decoder",
        "Run deit-cli doctor, which tries the image decoders and the kernel, and compare the versions of simplejpeg and Pillow with"
        " those in `deit-cli labels info`",
    ),
]


@pytest.mark.parametrize(("renderer", "limit", "fix"), LARGE)
def test_a_refusal_names_what_could_differ(sets, images, monkeypatch, renderer, limit, fix):
    with_pixels(monkeypatch, np.zeros_like)
    with pytest.raises(ReplayError) as caught:
        check_replay(sets[renderer], open_source(images))
    assert f" of 255 on average ({limit}): the labels do not fit" in caught.value.what
    assert caught.value.fix == fix


def test_every_renderer_has_words_for_a_difference():
    assert {renderer for renderer, _ in SMALL} == {renderer for renderer, *_ in LARGE} == {*RENDERERS}


def with_kernel(monkeypatch, change):
    """Let the kernel render another image or other views: `change(image, views)` returns both."""
    if not kernel.is_compiled():
        pytest.skip("the kernel was not compiled")
    render_views = kernel.render_views
    monkeypatch.setattr(kernel, "render_views", lambda image, views, out: render_views(*change(image, views), out))


def test_another_resize_is_refused(checked, monkeypatch):
    """Bilinear instead of bicubic: the picture looks the same to a person."""
    with_kernel(monkeypatch, lambda image, views: (image, [replace(view, interpolation="bilinear") for view in views]))
    with pytest.raises(ReplayError, match="differs from the labelled pixels"):
        checked()


def test_a_crop_that_is_a_pixel_off_is_refused(checked, monkeypatch):
    with_kernel(monkeypatch, lambda image, views: (np.roll(image, 1, axis=0), views))
    with pytest.raises(ReplayError, match="differs from the labelled pixels"):
        checked()


def test_pixels_of_another_size_are_refused(checked, monkeypatch):
    with_pixels(monkeypatch, lambda pixels: pixels[:8])
    with pytest.raises(ReplayError, match=r"by 255\.00 of 255"):
        checked()


@pytest.mark.parametrize(
    "mixed",
    [
        lambda mix, partner: (partner, Mix(lam=mix.lam - 1e-6, box=mix.box)),
        lambda mix, partner: (partner, Mix(lam=mix.lam, box=(0, 0, 1, 1))),
        lambda mix, partner: (None, mix),
        lambda mix, partner: (partner, Mix()),
    ],
)
def test_another_mix_is_refused_with_both_mixes(checked, monkeypatch, mixed):
    def pair(recipe, samples, row, view):
        partner, mix = pair_of(recipe, samples, row, view)
        return mixed(mix, partner)[0], mixed(mix, partner)[1]

    monkeypatch.setattr(replay, "pair_of", pair)
    with pytest.raises(ReplayError, match=r"view 0 of row 0 of train-0 was mixed as \(partner 1, .*this version mixes it as \(partner"):  # fmt: skip
        checked()


def test_other_partners_are_refused(checked, monkeypatch):
    def neighbours(recipe, keys, usable, view):
        rows = np.array([[0, 1], [2, 3], [4, -1]]) if len(keys) == 5 else np.array([[0, 1], [2, 3]])
        return Pairs(recipe, keys, rows)

    monkeypatch.setattr(replay, "pairs_of", neighbours)
    with pytest.raises(ReplayError, match="was mixed as"):
        checked()


# Other images.


def source_with(folder: Path, key: str, image: bytes) -> Path:
    """Write the images again with another first sample."""
    write_source(folder)
    members = [(f"{key}.png", image), (f"{key}.cls", b"0")]
    for number in range(1, 5):
        members += [(f"n{number:03}.png", coloured_png(number)), (f"n{number:03}.cls", b"%d" % (number % 3))]
    write_tar(folder / "train-0.tar", members)
    return folder


def test_another_image_under_the_same_key_is_refused(made, tmp_path):
    other = source_with(tmp_path / "other", "n000", coloured_png(99))
    with pytest.raises(LabelSetMismatch, match=r"image 'n000' of train-0 has other bytes than the one that was labelled \(512 bytes with XXH3 \w{8}…, labelled: 512 bytes with \w{8}…\)"):  # fmt: skip
        check_replay(LabelSet.open(made), open_source(other))


def test_the_same_pixels_encoded_again_are_refused_too(made, tmp_path):
    """Decoders agree today; nobody promises that for another encoding."""
    pixels = decode(coloured_png(0), key="n000")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    encoded = buffer.getvalue()
    assert (decode(encoded, key="n000") == pixels).all()
    other = source_with(tmp_path / "other", "n000", encoded)
    with pytest.raises(LabelSetMismatch, match="has other bytes"):
        check_replay(LabelSet.open(made), open_source(other))


def test_another_key_is_refused(made, tmp_path):
    other = source_with(tmp_path / "other", "zebra", coloured_png(0))
    with pytest.raises(LabelSetMismatch, match="missing: 'n000' of train-0; 1 sample is new: 'zebra' of train-0"):
        check_replay(LabelSet.open(made), open_source(other))


def test_a_sample_is_known_by_key_and_bytes(made, images):
    samples, shard = LabelSet.open(made).samples("train-0"), open_source(images).shard("train-0")
    check_image(shard[1], samples, 1, shard="train-0")
    with pytest.raises(
        LabelSetMismatch, match="train-0: the label belongs to 'n000', the source has 'n001' in this row"
    ):
        check_image(shard[1], samples, 0, shard="train-0")


def test_pair_of_agrees_with_the_pairs_of_the_shard(made):
    opened = LabelSet.open(made)
    samples = opened.samples("train-0")
    for view in opened.views:
        pairs = pairs_of(opened.recipe, samples.key, samples.usable, view).rows.tolist()
        for first, second in pairs:
            expected = draw_mix(opened.recipe, samples.key[first], view) if second >= 0 else Mix()
            assert pair_of(opened.recipe, samples, first, view) == (second if second >= 0 else None, expected)
            if second >= 0:
                assert pair_of(opened.recipe, samples, second, view) == (first, expected)
    with pytest.raises(ReplayError, match="row 77 is not a usable sample"):
        pair_of(opened.recipe, samples, 77, 0)


# Hostile probes.


HOSTILE = [
    # what the first probe says, error, text
    ({"shard": "nowhere"}, LabelSetCorrupt, "the manifest lists no samples of 'nowhere'"),
    ({"row": 77}, LabelSetCorrupt, "a replay probe names row 77 of train-0, which has 5 rows"),
    ({"row": 2**47}, LabelSetCorrupt, f"a replay probe names row {2**47} of train-0"),
    ({"row": 2**48}, LabelSetCorrupt, "probes.0.row: Input should be less than"),
    ({"view": 77}, ReplayError, "view 77 of "),
    ({"view": 2**31}, ReplayError, f"view {2**31} of "),
    ({"view": 2**47}, LabelSetCorrupt, "probes.0.view: Input should be less than"),
    ({"partner": 3}, ReplayError, "was mixed as (partner 3, "),
    ({"lam": 0.5}, ReplayError, "was mixed as (partner 1, 0.5, "),
    ({"box": [0, 0, 0, 0]}, ReplayError, "(0, 0, 0, 0)), this version mixes it as"),
    ({"sample": "", "pixels_sha256": "0" * 64}, ReplayError, "by 255.00 of 255 on average"),
    (
        {"sample": "????", "pixels_sha256": "0" * 64},
        LabelSetCorrupt,
        "the replay probe of row 0 of train-0 is not base64",
    ),
    (
        {"sample": "AAA", "pixels_sha256": "0" * 64},
        LabelSetCorrupt,
        "the replay probe of row 0 of train-0 is not base64",
    ),
    ({"sample": "é", "pixels_sha256": "0" * 64}, LabelSetCorrupt, "the replay probe of row 0 of train-0 is not base64"),
]


@pytest.mark.parametrize(("values", "error", "text"), HOSTILE, ids=[str(values)[:30] for values, *_ in HOSTILE])
def test_a_probe_that_cannot_be_is_refused_by_name(copied, images, values, error, text):
    seal_again(copied, lambda manifest: manifest["probes"][0].update(values))
    with pytest.raises(error, match=re.escape(text)):
        check_replay(LabelSet.open(copied), open_source(images))


def test_a_set_without_probes_proves_nothing_and_is_refused(copied, images):
    seal_again(copied, lambda manifest: manifest.update(probes=[]))
    with pytest.raises(LabelSetCorrupt, match="has no replay probes, so its labels cannot be checked against pixels"):
        check_replay(LabelSet.open(copied), open_source(images))


def test_a_probe_with_another_hash_but_the_same_sample_only_warns(copied, images):
    """The hash alone cannot tell rounding from damage; the sampled pixels are what refuses."""
    seal_again(copied, lambda manifest: manifest["probes"][0].update(pixels_sha256="0" * 64))
    assert check_replay(LabelSet.open(copied), open_source(images)) == 1e-3
    assert json.loads((copied / "manifest.json").read_text())["probes"][0]["pixels_sha256"] == "0" * 64
