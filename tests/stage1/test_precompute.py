"""Stage 1 from images to a sealed label set."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.builders import CLASSES, encoded, files_of, make_labels, photo, small_recipe, small_teacher, write_tars
from support.label_sets import problems_in
from webdataset.writer import TarWriter

from pipeline.errors import (
    LabelSetCorrupt,
    LabelSetMismatch,
    NonFiniteTeacherError,
    SourceError,
    TeacherError,
    UsageError,
)
from pipeline.images.decode import decode
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_replay
from pipeline.machine.progress import Tick
from pipeline.pixels.render import render
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1.plan import plan_work
from pipeline.stage1.precompute import measure_accuracy, precompute
from pipeline.views.mixing import apply_mix, mix_batch
from pipeline.views.pairs import draw_mix, pairs_of
from pipeline.views.view import draw_view


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def labelled(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data)


def answers_one_by_one(data: str, view: int, shard: str) -> tuple[dict[int, int], dict[int, np.ndarray]]:
    """The slow reference: every pair rendered, mixed and answered on its own, in order of the rows."""
    source, recipe = open_source(data), small_recipe()
    teacher = small_teacher(source)
    samples = source.shard(shard)
    hard, prob = {}, {}
    for first, second in pairs_of(recipe, samples.keys, np.arange(len(samples)), view).rows.tolist():
        rows = [first] if second < 0 else [first, second]
        views = []
        for row in rows:
            image = decode(samples[row].image, key=samples[row].key)
            drawn = draw_view(recipe, samples[row].key, view, height=image.shape[0], width=image.shape[1])
            views.append(render(image, drawn))
        mixes = mix_batch([(0, 1 if second >= 0 else -1)], [draw_mix(recipe, samples.keys[first], view)], len(rows))
        mixed = apply_mix(torch.from_numpy(np.stack(views)), mixes)
        for row, image in zip(rows, mixed, strict=True):
            logits = teacher.logits(image[None])[0][0]
            hard[row], prob[row] = int(logits.argmax()), logits.softmax(0).detach().numpy()
    return hard, prob


def test_labels_are_what_the_teacher_says_of_each_mixed_view_alone(data, labelled):
    for shard in labelled.shards:
        for view in labelled.views:
            hard, prob = answers_one_by_one(data, view, shard)
            rows = labelled.read(shard, view)
            assert rows.hard.tolist() == [hard[row] for row in rows.row.tolist()]
            for at, row in enumerate(rows.row.tolist()):
                kept = prob[row][rows.topk_index[at]]
                np.testing.assert_allclose(rows.topk_prob[at].astype(float), kept, atol=1e-3)
                assert abs(float(rows.tail_mass[at]) - (1 - kept.sum())) < 1e-3


def test_the_labels_of_the_fixture_are_not_all_alike(labelled):
    hard = np.concatenate([labelled.read(shard, view).hard for shard in labelled.shards for view in labelled.views])
    assert np.bincount(hard).min() > 0.1 * len(hard)  # each of the three classes is answered often


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 1},  # another process
        {"workers": 2},  # two of them
        {"batch_size": 2},  # a pair at a time
        {"batch_size": 256},  # all of a block
    ],
    ids=str,
)
def test_files_do_not_depend_on_workers_or_batch_size(data, labelled, tmp_path, settings):
    other = make_labels(tmp_path / "set", data, **settings)
    for shard in labelled.shards:
        for view in labelled.views:
            mine, theirs = labelled.read(shard, view), other.read(shard, view)
            np.testing.assert_array_equal(mine.hard, theirs.hard)
            np.testing.assert_allclose(mine.topk_prob.astype(float), theirs.topk_prob.astype(float), atol=1e-3)
    if "workers" in settings:
        assert files_of(labelled.folder) == files_of(other.folder)


def test_running_again_changes_nothing(data, labelled, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(labelled.folder, folder)
    before = files_of(folder)
    make_labels(folder, data)
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "lost", ["labels/views-00000-00002/train-000001.parquet", "samples/train-000000.parquet", "manifest.json"]
)
def test_a_lost_file_is_made_again_to_the_byte(data, labelled, tmp_path, lost):
    folder = tmp_path / "set"
    shutil.copytree(labelled.folder, folder)
    before = files_of(folder)
    (folder / lost).unlink()
    make_labels(folder, data)
    assert files_of(folder) == before


def test_a_damaged_label_shard_is_not_taken_for_done(data, labelled, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(labelled.folder, folder)
    path = folder / "labels/views-00000-00002/train-000001.parquet"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(LabelSetCorrupt, match=r"train-000001.parquet"):
        make_labels(folder, data)


def test_more_views_are_appended_and_equal_those_made_at_once(data, labelled, tmp_path):
    grown = make_labels(tmp_path / "grown", data, views=(0, 2))
    first = files_of(grown.folder / "labels")
    grown = make_labels(tmp_path / "grown", data, views=(0, 5))
    assert grown.views == range(5)
    assert first.items() <= files_of(grown.folder / "labels").items()
    for shard in labelled.shards:
        for view in labelled.views:
            np.testing.assert_array_equal(grown.read(shard, view).hard, labelled.read(shard, view).hard)


def test_views_per_shard_cuts_the_work_and_not_the_labels(data, labelled, tmp_path):
    cut = make_labels(tmp_path / "cut", data, views_per_shard=1)
    assert len([entry for entry in cut.manifest.files if entry.kind == "labels"]) == 6
    np.testing.assert_array_equal(cut.read("train-000001", 2).topk_index, labelled.read("train-000001", 2).topk_index)


def test_another_identity_is_refused_and_nothing_is_touched(data, labelled, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(labelled.folder, folder)
    before = files_of(folder)
    with pytest.raises(LabelSetMismatch, match=r"recipe .* \(img_size: 16, not 20\)"):
        make_labels(folder, data, recipe=small_recipe(img_size=20))
    with pytest.raises(LabelSetMismatch, match="--topk 2, this run asks for 3"):
        make_labels(folder, data, topk=3)
    source = open_source(data)
    other = small_teacher(source, img_size=20)
    with pytest.raises(LabelSetMismatch, match=r"teacher .* \(img_size: 16, not 20\)"):
        make_labels(folder, data, teacher=other)
    assert files_of(folder) == before


def test_a_folder_with_other_things_in_it_is_refused(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LabelSetMismatch, match="is not empty and holds no label set"):
        make_labels(tmp_path, data)


def test_a_dry_run_counts_the_work_and_writes_nothing(data, tmp_path):
    source = open_source(data)
    config = PrecomputeConfig(data=data, out=tmp_path / "set", views=(0, 70), topk=2)
    work = plan_work(config, small_recipe(), small_teacher(source), source)
    assert (work.num_samples, work.views_to_label, work.teacher_passes) == (23, 70, 23 * 70)
    assert [len(block) for block in work.blocks] == [30, 30, 10]
    assert work.bytes_before_compression == 23 * 70 * (2 + 2 * 4 + 2)
    assert not (tmp_path / "set").exists()


def test_a_bad_image_stops_the_run_with_its_key(tmp_path):
    data = write_tars(tmp_path / "data", bad=(3, 15))
    with pytest.raises(SourceError, match=r"image 'img-0003': .*--on-bad-image skip"):
        make_labels(tmp_path / "set", data)


def test_skipped_images_have_a_reason_and_move_no_row(tmp_path, labelled):
    data = write_tars(tmp_path / "data", bad=(3, 15))
    with pytest.raises(SourceError):
        make_labels(tmp_path / "set", data)
    skipped = make_labels(tmp_path / "set", data, on_bad_image="skip")  # the stopped run goes on
    samples = skipped.samples("train-000000")
    assert (samples.bad[3] and "truncated" in samples.bad[3].lower()) or "premature" in samples.bad[3].lower()
    assert samples.usable.tolist() == [row for row in range(13) if row != 3]
    assert skipped.read("train-000000", 0).row.tolist() == samples.usable.tolist()
    assert problems_in(skipped) == []
    whole = labelled.read("train-000000", 0)  # block 1 (rows 8..12) has no bad image: its labels are the same
    np.testing.assert_array_equal(skipped.read("train-000000", 0).hard[7:], whole.hard[8:])


def test_a_teacher_with_other_classes_is_refused_with_both_numbers(data, tmp_path):
    source = open_source(data)
    with pytest.raises(TeacherError, match="has 7 classes, the source has 3"):
        make_labels(tmp_path / "set", data, teacher=small_teacher(source, num_classes=7))


def test_k_beyond_the_classes_is_refused(data, tmp_path):
    with pytest.raises(UsageError, match=r"--topk must be in 0..3 \(the teacher's classes\), got 4"):
        make_labels(tmp_path / "set", data, topk=4)


def test_an_inaccurate_teacher_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(TeacherError, match=r"has top-1 .* on 23 images, --min-teacher-accuracy requires 99 %"):
        make_labels(tmp_path / "set", data, min_teacher_accuracy=99)
    assert not (tmp_path / "set").exists()


def test_accuracy_is_that_of_centre_crops(data):
    source = open_source(data)
    teacher = small_teacher(source)
    top1, count = measure_accuracy(teacher, source, 10**6)
    right = 0
    for shard in source.shards:
        for row in range(len(shard)):
            image = Image.fromarray(decode(shard[row].image, key="x"))
            short = int(16 / teacher.crop_pct)
            width = max(short, int(short * 32 / 24))
            box = round((width - 16) / 2), round((short - 16) / 2)
            view = image.resize((width, short), Image.Resampling.BICUBIC).crop((*box, box[0] + 16, box[1] + 16))
            pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None].float()
            right += int(teacher.logits(pixels)[0].argmax()) == shard[row].class_label
    assert count == 23
    assert abs(top1 - 100 * right / 23) <= 100 / 23  # one image may flip on the last bit of the resize


def test_non_finite_answers_are_never_stored(data, tmp_path):
    source = open_source(data)
    teacher = small_teacher(source)
    torch.nn.init.constant_(teacher.networks[0].module[-1].bias, float("nan"))
    with pytest.raises(NonFiniteTeacherError, match=r"NaN or infinity .* view 0 of 'img-0\d+', .* in train-000000"):
        make_labels(tmp_path / "set", data, teacher=teacher, accuracy_samples=0)
    assert not list((tmp_path / "set").glob("labels/**/*.parquet"))


def test_k_0_stores_hard_labels_alone(data, labelled, tmp_path):
    hard = make_labels(tmp_path / "set", data, topk=0)
    rows = hard.read("train-000000", 1)
    assert rows.topk_index.shape == (13, 0)
    np.testing.assert_array_equal(rows.hard, labelled.read("train-000000", 1).hard)


def test_replay_probes_come_from_the_batches_and_replay(labelled, data):
    assert 1 <= len(labelled.manifest.probes) <= 8
    assert check_replay(labelled, open_source(data)) == 0.0


def test_source_keeps_class_names(labelled):
    assert labelled.class_names == CLASSES


def test_an_image_folder_and_its_png_copy_have_other_bytes_but_one_process(tmp_path):
    for number in range(9):
        folder = tmp_path / "images" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(photo(number), "PNG"))
    label_set = make_labels(tmp_path / "set", str(tmp_path / "images"))
    assert problems_in(label_set) == []
    assert sum(map(len, (label_set.samples(s) for s in label_set.shards))) == 9


def test_sorted_classes_are_warned_about(tmp_path, caplog):
    for number in range(24):
        with (tmp_path / f"{number}.jpg").open("wb") as file:
            file.write(encoded(photo(number)))
    data = tmp_path / "data"
    data.mkdir()
    (data / "classes.txt").write_text("\n".join(CLASSES))
    with TarWriter(str(data / "train.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
        for number in range(24):
            tar.write(
                {
                    "__key__": f"img-{number}",
                    "jpg": (tmp_path / f"{number}.jpg").read_bytes(),
                    "cls": str(number // 8).encode(),
                }
            )
    make_labels(tmp_path / "set", str(data))
    assert "neighbours have the same class" in caplog.text
    caplog.clear()
    make_labels(tmp_path / "mixed", write_tars(tmp_path / "other"))
    assert "neighbours have the same class" not in caplog.text


@pytest.mark.slow
def test_two_runs_at_once_make_one_sound_set(data, labelled, tmp_path):
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=make_labels, args=(tmp_path / "set", data)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(tmp_path / "set") == files_of(labelled.folder)


def test_precompute_reports_its_progress(data, tmp_path):
    source = open_source(data)
    seen: list[Tick] = []
    config = PrecomputeConfig(data=data, out=tmp_path / "set", views=(0, 2), topk=1, workers=0)
    precompute(config, small_recipe(), small_teacher(source), source, progress=seen.append)
    assert ("index", 2, 2) in {(tick.phase, tick.done, tick.total) for tick in seen}
    last = seen[-1]
    assert (last.phase, last.done, last.total, last.made) == ("label", 46, 46, 46)
    assert last.bytes_written == sum(path.stat().st_size for path in (tmp_path / "set/labels").rglob("*.parquet"))
    assert last.teacher_busy is not None
    assert 0 < last.teacher_busy < 1
    assert last.left_s == 0


def test_the_teacher_is_measured_and_its_accuracy_is_said(data, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="deit_cli"):
        make_labels(tmp_path / "set", data)
    assert "teacher support.builders:confident_cnn: top-1" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changed_after_indexing_is_refused_in_one_line(tmp_path, workers):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        (images / f"{number}.jpg").write_bytes(encoded(photo(number)))
    label_set = make_labels(tmp_path / "set", str(images), views=(0, 1))
    for path in label_set.folder.glob("labels/**/*.parquet"):
        path.unlink()
    (images / "4.jpg").write_bytes(encoded(photo(40)))
    with pytest.raises(LabelSetMismatch, match=r"image '4' of images-000000 has other bytes") as caught:
        make_labels(tmp_path / "set", str(images), views=(0, 1), workers=workers)
    assert "\n" not in str(caught.value)
