"""Change anything: an error of ours says so.

Parquet alone notices a tenth of single flipped bits. Here every file is covered: samples, label shards and plan by the
SHA-256 in the manifest, the manifest by the SHA-256 of its own content and by the one text that this content has.
"""

import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.label_sets import (
    colour_teacher,
    coloured_png,
    files_of,
    make_label_set,
    problems_in,
    read_everything,
    seal_again,
    write_source,
    write_tar,
)

from pipeline.errors import (
    DeitCliError,
    LabelSetCorrupt,
    LabelSetError,
    StorageError,
    UsageError,
)
from pipeline.labels.labelset import LabelSet
from pipeline.labels.tables import (
    read_all_views,
    read_labels_footer,
    read_samples,
    read_samples_footer,
    write_labels,
    write_samples,
)
from pipeline.storage.json import read_json
from trainer.config import TrainConfig
from trainer.loop import make_order, open_data, train
from trainer.stream import BatchRenderer, Catalogue

FIRST = "labels/views-00000-00001/train-0.parquet"
LATER = "labels/views-00002-00003/train-0.parquet"
GOLDEN = Path(__file__).parent / "golden/v1/shards"


def promised(folder: Path) -> list[Path]:
    """Return the files of a set; its card, README.md, is for people and none of them."""
    return [path for path in files_of(folder) if path.suffix in (".json", ".parquet")]


def use(folder: Path) -> list[tuple]:
    """Open, read and verify all of a set; the problems that verify lists count as an error."""
    opened = LabelSet.open(folder)
    everything = list(read_everything(opened))
    if problems := problems_in(opened):
        raise LabelSetError("; ".join(problems))
    return everything


def outcome(folder: Path, sound: list[tuple]) -> str:
    """Return what became of a changed set: `refused`, `same labels` or `WRONG`; another exception goes through."""
    try:
        return "same labels" if use(folder) == sound else "WRONG"
    except DeitCliError:
        return "refused"


def flips(files: list[Path], count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """Yield random bits of the whole set, each of equal chance."""
    rng = random.Random(seed)
    sizes = [path.stat().st_size * 8 for path in files]
    for path in rng.choices(files, sizes, k=count):
        yield path, rng.randrange(path.stat().st_size * 8)


def tried(path: Path, content: bytes, folder: Path, sound: list[tuple]) -> str:
    """Return the outcome with another content of one file, and put the old one back."""
    old = path.read_bytes()
    path.write_bytes(content)
    try:
        return outcome(folder, sound)
    finally:
        path.write_bytes(old)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_flipped_bit_changes_a_label_unnoticed(copied, count):
    sound, found = use(copied), Counter()
    for path, bit in flips(promised(copied), count, seed=count):
        changed = flipped(path.read_bytes(), bit)
        result = tried(path, changed, copied, sound)
        found[path.suffix, result] += 1
        assert result == "refused", (path, bit)
    print(dict(found))
    assert found.total() == count
    assert found[".parquet", "refused"] > count / 2


@pytest.mark.parametrize("step", [89, pytest.param(1, marks=pytest.mark.slow)])  # 89: each bit of a byte in turn
@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_every_flipped_bit_of_plan_and_manifest_is_refused(tmp_path, name, step):
    """All of them, of the golden set: white space too, and the last digit of a number that would read as the same."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "set"))
    data, accepted = (folder / name).read_bytes(), []
    for bit in range(0, len(data) * 8, step):
        (folder / name).write_bytes(flipped(data, bit))
        try:
            LabelSet.open(folder)
        except (LabelSetError, StorageError):
            continue
        accepted.append(flipped(data, bit))
    assert accepted == []


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_cut_file_is_read(copied, count):
    sound, rng, found = use(copied), random.Random(count), Counter()
    files = promised(copied)
    for number in range(count):
        path = files[number % len(files)]
        data = path.read_bytes()
        found[tried(path, data[: rng.randrange(len(data) - 1)], copied, sound)] += 1
    assert found == {"refused": count}


def test_no_overwritten_run_of_bytes_changes_a_label_unnoticed(copied):
    """Zeros, as a disk gives for a lost block; and bytes of another file, as a mixed-up copy does."""
    sound, rng, found = use(copied), random.Random(5), Counter()
    files = promised(copied)
    for number in range(60):
        path = files[number % len(files)]
        data, other = path.read_bytes(), rng.choice(files).read_bytes()
        at, size = rng.randrange(len(data)), rng.randrange(1, 200)
        filling = (bytes(size), other[:size])[number % 2][: len(data) - at]
        content = data[:at] + filling + data[at + len(filling) :]
        if content != data:
            found[tried(path, content, copied, sound)] += 1
    assert found["refused"] > 50
    assert found.keys() == {"refused"}


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_json_that_says_the_same_in_other_bytes_is_refused(copied, name):
    """A checkout that turned line ends, say. Of the plan the manifest knows the bytes, of itself it has one text."""
    data = (copied / name).read_bytes()
    text = "belongs to another plan.json" if name == "plan.json" else "its content is the same, in other bytes"
    spaced = json.dumps(json.loads(data), indent=7, ensure_ascii=True).encode()
    for other in (data.replace(b"\n", b"\r\n"), data + b"\n", data[:-1], b" " + data, spaced):
        (copied / name).write_bytes(other)
        with pytest.raises(LabelSetError, match=text):
            LabelSet.open(copied)


def test_another_text_of_the_plan_is_fine_where_the_manifest_names_it(copied):
    sound, plan = use(copied), copied / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_bytes()), indent=7))
    seal_again(copied)
    assert use(copied) == sound


@pytest.mark.parametrize("count", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_a_resealed_shard_is_an_error_of_ours(copied, count):
    """Hashes that agree help an attacker past the first gate; what is behind it must name its errors too."""
    sound, found, leaked = use(copied), Counter(), []
    path, manifest = copied / FIRST, copied / "manifest.json"
    good, listed = path.read_bytes(), manifest.read_bytes()
    for _, bit in flips([path], count, seed=3):
        path.write_bytes(flipped(good, bit))
        seal_again(copied)
        try:
            found[outcome(copied, sound)] += 1
        except Exception as error:  # counted: any of them would end a run with a traceback
            leaked.append(f"{type(error).__name__}: {error}")
        path.write_bytes(good)
        manifest.write_bytes(listed)
    print(dict(found))
    assert leaked == []
    assert found["WRONG"] == 0


# Training


def settings(labels: Path, output: Path, **changes) -> TrainConfig:
    values = {
        "model": "deit_tiny_distilled_patch16_224",
        "patch_size": 8,
        "embed_dim": 12,
        "depth": 1,
        "num_heads": 2,
        "epochs": 4,
        "batch_size": 4,
        "warmup_epochs": 0,
        "repeated_aug": 1,
        "workers": 0,
        "device": "cpu",
        "model_ema": False,
    }
    return TrainConfig(labels=labels, output=output, **(values | changes))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


BEFORE_TRAINING: list[tuple[str, Callable[[Path], object]]] = [
    # Found when the set is opened, or when the probes are rendered: before a batch exists.
    ("label shard cut", lambda folder: (folder / LATER).write_bytes((folder / LATER).read_bytes()[:-1])),
    ("label shard missing", lambda folder: (folder / LATER).unlink()),
    ("samples changed", lambda folder: flip_middle(folder / "samples/train-0.parquet")),
    ("manifest changed", lambda folder: edit(folder / "manifest.json", ("environments", 0), {"device": "abacus"})),
    ("manifest forged", lambda folder: seal_again(folder, lambda m: m["files"][0].update(rows=4))),
    ("manifest not sealed", lambda folder: seal_again(folder, lambda m: m.update(sealed=False))),
    ("another teacher", lambda folder: edit(folder / "plan.json", ("teacher", "weights_sha256"), "0" * 64)),
    ("another location", lambda folder: edit(folder / "plan.json", ("source", "location"), "/elsewhere")),
    ("another recipe", lambda folder: edit(folder / "plan.json", ("recipe", "hflip"), 0.4)),
    ("another view in a probe", lambda folder: seal_again(folder, lambda m: m["probes"][0].update(view=1))),
]


def flip_middle(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) * 4))


def edit(path: Path, place: tuple[str, str | int], value: object) -> None:
    content = json.loads(path.read_text())
    content[place[0]][place[1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("what", "damage"), BEFORE_TRAINING, ids=[what for what, _ in BEFORE_TRAINING])
def test_training_refuses_before_the_student_exists(copied, tmp_path, what, damage):
    damage(copied)
    with pytest.raises(LabelSetError):
        train(settings(copied, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_changed_label_byte_stops_the_batch_that_would_use_it(copied, tmp_path):
    """The length is right, so the set opens; the SHA-256 is checked when the shard is first used."""
    flip_middle(copied / LATER)
    config = settings(copied, tmp_path / "run")
    data = open_data(config)
    order = make_order(config, data)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    for index in range(4 * order.steps_per_epoch):
        epoch, step = order.position(index)
        uses_it = epoch >= 2 and 0 in order.step_units(epoch, step)[:, 0]
        if uses_it:
            with pytest.raises(LabelSetCorrupt, match=f"{LATER} has SHA-256"):
                renderer.render_here(index)
        else:
            renderer.render_here(index)


def test_training_takes_no_step_on_a_changed_label_byte(copied, tmp_path, threads):
    for path in (copied / "labels").rglob("*.parquet"):
        flip_middle(path)
    config = settings(copied, tmp_path / "run", log_interval=1)
    with pytest.raises(LabelSetCorrupt, match="has SHA-256"):
        train(config)
    metrics = tmp_path / "run/metrics.jsonl"
    assert not metrics.exists() or '"loss"' not in metrics.read_text()
    assert not (tmp_path / "run/state.safetensors").exists()


def by_train(folder: Path, output: Path) -> int:
    """Do what `train` does before and while it trains, up to every batch of an epoch for each view; return their number."""
    config = settings(folder, output)
    data = open_data(config)
    order = make_order(config, data)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    for index in range(4 * order.steps_per_epoch):
        renderer.render_here(index)
    return 4 * order.steps_per_epoch


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_flipped_bit_or_cut_gets_past_what_training_reads(copied, tmp_path, count):
    """Of the whole set; ten times as many are in benchmarks/bitrot.py."""
    assert by_train(copied, tmp_path / "run") > 0
    rng = random.Random(count)
    listed = [path for path in files_of(copied) if path.suffix in (".json", ".parquet")]
    for path, bit in flips(listed, count, seed=count):
        data = path.read_bytes()
        for content in (flipped(data, bit), data[: rng.randrange(len(data))]):
            path.write_bytes(content)
            with pytest.raises(DeitCliError):
                by_train(copied, tmp_path / "run")
        path.write_bytes(data)
    assert by_train(copied, tmp_path / "run") > 0


@pytest.mark.slow
def test_no_flipped_bit_gets_through_a_whole_training(copied, tmp_path, threads):
    """The command's own loop from start to end, with student, optimizer and checkpoints."""
    listed = [path for path in files_of(copied) if path.suffix in (".json", ".parquet")]
    for number, (path, bit) in enumerate(flips(listed, 30, seed=30)):
        data = path.read_bytes()
        path.write_bytes(flipped(data, bit))
        with pytest.raises(DeitCliError):
            train(settings(copied, tmp_path / f"run{number}"))
        path.write_bytes(data)


def test_training_on_the_sound_set_does_take_steps(copied, tmp_path, threads):
    """What the tests above rest on."""
    train(settings(copied, tmp_path / "run", epochs=1, log_interval=1))
    assert (tmp_path / "run/state.safetensors").is_file()


# Continuing a run believes no file because of its name.


def opened_again(folder: Path) -> Path:
    """Undo the seal, as if the run had been killed just before it."""
    (folder / "manifest.json").unlink()
    return folder


def test_a_damaged_label_shard_is_not_continued_from(copied, images):
    flip_page(copied / FIRST)
    with pytest.raises(LabelSetCorrupt, match=FIRST):
        make_label_set(images, opened_again(copied))


def flip_page(path: Path) -> None:
    """Flip a bit inside the first data page, which Parquet's own checksum covers."""
    path.write_bytes(flipped(path.read_bytes(), 100 * 8))


def test_a_label_shard_of_another_set_is_not_continued_from(copied, images, tmp_path):
    other = make_label_set(images, tmp_path / "other", teacher=colour_teacher(2.0))
    shutil.copy(other.folder / FIRST, copied / FIRST)
    with pytest.raises(LabelSetError, match=f"{FIRST} belongs to 'train-0' of label set"):
        make_label_set(images, opened_again(copied))


def test_a_label_shard_of_other_views_is_not_continued_from(copied, images):
    shutil.copy(copied / LATER, copied / FIRST)
    with pytest.raises(LabelSetError, match=FIRST):
        make_label_set(images, opened_again(copied))


def test_samples_files_that_were_exchanged_are_not_continued_from(copied, images):
    a, b = copied / "samples/train-0.parquet", copied / "samples/train-1.parquet"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    shutil.rmtree(copied / "labels")
    with pytest.raises(DeitCliError):
        make_label_set(images, opened_again(copied))


def test_samples_with_other_class_labels_are_not_continued_from(copied, images):
    path = copied / "samples/train-0.parquet"
    samples = dataclasses.replace(read_samples(path), class_label=(2, 2, 2, 2, 2))
    footer = read_samples_footer(path)
    with path.open("wb") as file:
        write_samples(file, samples, footer)
    with pytest.raises(LabelSetError, match=r"samples/train-0\.parquet"):
        make_label_set(images, opened_again(copied))


@pytest.mark.parametrize("views", [(4, 6), (0, 6), (0, 4), (2, 4)])
def test_a_run_does_not_vouch_for_a_label_shard_that_was_damaged_since(copied, images, views):
    flip_page(copied / FIRST)
    listed = (copied / "manifest.json").read_bytes()
    with pytest.raises(LabelSetCorrupt, match=FIRST):
        make_label_set(images, copied, views=views)
    assert (copied / "manifest.json").read_bytes() == listed


FORGED = [
    # what is changed, --views of the next run
    ("labels", (4, 6)),
    ("labels", (0, 4)),
    ("labels", (0, 6)),
    ("height", (4, 6)),
    ("height", (0, 4)),
    ("image_xxh3", (4, 6)),  # the new views are made of that image
    ("image_xxh3", (0, 4)),
    ("bad", (4, 6)),
    ("bad", (0, 4)),
]


@pytest.mark.parametrize(("what", "views"), FORGED)
def test_a_run_does_not_vouch_for_a_sound_file_that_is_not_the_sealed_one(copied, images, what, views):
    """Its own hashes agree, only the manifest's do not: the next manifest must not take it over."""
    forge_labels(copied / FIRST) if what == "labels" else forge_samples(copied / "samples/train-0.parquet", what)
    listed = (copied / "manifest.json").read_bytes()
    with pytest.raises(LabelSetError):
        make_label_set(images, copied, views=views)
    assert (copied / "manifest.json").read_bytes() == listed


def forge_labels(path: Path) -> None:
    """Move every class of a label shard by one."""
    footer, rows = read_labels_footer(path), read_all_views(path)
    rows = [dataclasses.replace(r, hard=(r.hard + 1) % 3, topk_index=(r.topk_index + 1) % 3) for r in rows]
    with path.open("wb") as file:
        write_labels(file, rows, footer.model_copy(update={"content_xxh3": footer.codec.content_xxh3(rows)}))


def forge_samples(path: Path, what: str) -> None:
    """Change what a samples file says of the image in row 1, which no probe shows."""
    footer, rows = read_samples_footer(path), read_samples(path)
    values = list(getattr(rows, what))
    values[1] = {"height": 9, "image_xxh3": bytes(16), "bad": "not to be read"}[what]
    column = np.array(values, np.uint32) if what == "height" else tuple(values)
    with path.open("wb") as file:
        write_samples(file, dataclasses.replace(rows, **{what: column}), footer)


def test_other_images_do_not_come_in_where_a_samples_file_was_deleted(copied, tmp_path):
    """Keys and class labels are the same, so it is the same source; the older labels are those of other pictures."""
    other = write_source(tmp_path / "other")
    members = [(f"n{n:03}.png", coloured_png(n if n in (0, 4) else 60 + n)) for n in range(5)]
    labels = [(f"n{n:03}.cls", b"%d" % (n % 3)) for n in range(5)]
    write_tar(other / "train-0.tar", [member for pair in zip(members, labels, strict=True) for member in pair])
    (copied / "samples/train-0.parquet").unlink()
    with pytest.raises(LabelSetError):
        make_label_set(other, copied, views=(4, 6))


@pytest.mark.parametrize("name", [FIRST, "samples/train-0.parquet"])
def test_a_sealed_file_that_was_deleted_is_made_again_to_the_byte(copied, images, name):
    data = (copied / name).read_bytes()
    (copied / name).unlink()
    assert problems_in(make_label_set(images, copied)) == []
    assert (copied / name).read_bytes() == data


def test_a_missing_older_file_is_found_before_the_teacher_is_asked(copied, images):
    (copied / FIRST).unlink()
    with pytest.raises(LabelSetCorrupt, match=rf"{FIRST} is missing: run with --views 0:2"):
        make_label_set(images, copied, views=(4, 6))
    assert not (copied / "labels/views-00004-00005").exists()


def test_views_that_would_leave_a_gap_are_refused_and_the_set_still_opens(copied, images):
    with pytest.raises(UsageError, match="--views 6:8 would leave a gap: the set holds 0:4"):
        make_label_set(images, copied, views=(6, 8))
    assert LabelSet.open(copied).views == range(4)
    assert not (copied / "labels/views-00006-00007").exists()


def test_a_run_that_was_killed_before_its_plan_was_there_can_be_run_again(images, tmp_path):
    (tmp_path / "set").mkdir()
    stray = tmp_path / "set/.tmp-host-99999-0123456789abcdef"  # of another host: nobody here may delete it
    stray.write_bytes(b"{")
    assert problems_in(make_label_set(images, tmp_path / "set")) == []
    assert stray.read_bytes() == b"{"


def test_a_file_in_place_of_the_folder_is_an_error_of_ours(images, tmp_path):
    (tmp_path / "set").write_text("a file")
    with pytest.raises(UsageError, match="is a file: choose a folder"):
        make_label_set(images, tmp_path / "set")


def test_a_view_number_that_the_format_cannot_hold_is_refused(images, tmp_path):
    with pytest.raises(UsageError, match=r"--views must be START:STOP with 0 <= START < STOP <= 1048576"):
        make_label_set(images, tmp_path / "set", views=(2**32, 2**32 + 1))


def test_what_a_killed_run_left_is_continued_to_the_same_labels(copied, images, made):
    """The other side of all this: nothing sound is thrown away."""
    before = (copied / LATER).stat().st_mtime_ns
    (copied / FIRST).unlink()
    make_label_set(images, opened_again(copied))
    assert (copied / LATER).stat().st_mtime_ns == before
    assert use(copied) == use(made)
    assert read_json(copied / "manifest.json")["sealed"] is True
    assert read_labels_footer(copied / FIRST).view_start == 0
    assert len(read_samples(copied / "samples/train-0.parquet")) == 5
