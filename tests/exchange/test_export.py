"""What `labels export` writes is what the teacher saw, and trains timm's models and `datasets` with nothing of ours."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.builders import encoded, files_of, make_labels, photo, small_recipe, write_tars
from support.commands import invoke

from pipeline.errors import LabelSetMismatch, UsageError
from pipeline.exchange import export as exporting
from pipeline.exchange.export import export_labels
from pipeline.images.decode import decode
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import pair_of
from pipeline.pixels.render import render
from pipeline.settings.configs import ExportConfig
from pipeline.views.mixing import apply_mix, mix_batch
from pipeline.views.view import draw_view

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), bad=(2,))


@pytest.fixture(scope="module")
def labels(data, tmp_path_factory) -> LabelSet:
    out = tmp_path_factory.mktemp("labels") / "set"
    return make_labels(out, data, on_bad_image="skip", views=(0, 3))


def export(labels: LabelSet, out: Path, **changes) -> int:
    return export_labels(labels, labels.open_source(), out, ExportConfig(**({"workers": 0} | changes)))


def samples_in(tar: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as opened:
        for member in opened:
            key, _, extension = member.name.partition(".")
            file = opened.extractfile(member)
            assert file is not None
            found.setdefault(key, {})[extension] = file.read()
    return found


def as_the_teacher_saw_it(labels: LabelSet, shard: str, row: int, view: int) -> np.ndarray:
    """One mixed view, worked out on its own: rendered, mixed with its partner's, rounded."""
    samples, source = labels.samples(shard), labels.open_source()
    partner, mix = pair_of(labels.recipe, samples, row, view)
    pixels = []
    for each in [row] if partner is None else [row, partner]:
        sample = source.shard(shard)[each]
        image = decode(sample.image, key=sample.key)
        pixels.append(render(image, draw_view(labels.recipe, sample.key, view, height=image.shape[0], width=image.shape[1])))  # fmt: skip
    batch = torch.from_numpy(np.stack(pixels))
    mixed = apply_mix(batch, mix_batch([(0, len(pixels) - 1 if partner is not None else -1)], [mix], len(pixels)))[0]
    return mixed.permute(1, 2, 0).round().byte().numpy()


def test_each_image_is_the_view_that_the_teacher_saw_with_its_answer(labels, tmp_path):
    assert export(labels, tmp_path / "out", views=(1, 3)) == 2 * 22
    tars = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert tars == [f"train-{shard:06}-view-{view:05}.tar" for shard in (0, 1) for view in (1, 2)]
    for shard in labels.shards:
        for view in (1, 2):
            found = samples_in(tmp_path / f"out/{shard}-view-{view:05}.tar")
            samples, rows = labels.samples(shard), labels.read(shard, view)
            assert list(found) == [f"{samples.key[row]}-view-{view:05}" for row in samples.usable]
            for at, (row, files) in enumerate(zip(samples.usable.tolist(), found.values(), strict=True)):
                expected = as_the_teacher_saw_it(labels, shard, row, view)
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["png"]))), expected)
                about = json.loads(files["json"])
                assert about.pop("lam") == pytest.approx(pair_of(labels.recipe, samples, row, view)[1].lam, abs=1e-6)
                assert about == {
                    "key": samples.key[row],
                    "view": view,
                    "hard": int(rows.hard[at]),
                    "class_label": samples.class_label[row],
                    "topk_index": rows.topk_index[at].tolist(),
                    "topk_prob": rows.topk_prob[at].tolist(),
                    "tail_mass": float(rows.tail_mass[at]),
                    "labelset_id": labels.plan.labelset_id,
                }
                assert files["cls"] == b"%d" % samples.class_label[row]


def test_jpegs_are_near_the_views(labels, tmp_path):
    export(labels, tmp_path / "out", encoding="jpeg")
    (first, *_) = samples_in(tmp_path / "out/train-000000-view-00000.tar").values()
    expected = as_the_teacher_saw_it(labels, "train-000000", 0, 0)
    assert (
        np.abs(decode(first["jpg"], key="x").astype(int) - expected).mean() < 6
    )  # views of noise and hard edges, 16 px
    assert "JPEG of quality 95" in (tmp_path / "out/README.md").read_text()


def test_originals_are_the_files_and_a_recipe_that_changes_them_is_warned_of(labels, tmp_path, caplog):
    export(labels, tmp_path / "out", pixels="originals", views=(1, 2))
    assert "the exported answers belong to view 1 of each image, not to the exported original" in caplog.text
    found = samples_in(tmp_path / "out/train-000001-view-00001.tar")
    shard = labels.open_source().shard("train-000001")
    assert {key: files["jpg"] for key, files in found.items()} == {sample.key: sample.image for sample in shard}
    assert [json.loads(files["json"])["hard"] for files in found.values()] == labels.read(
        "train-000001", 1
    ).hard.tolist()
    with pytest.raises(UsageError, match=r"--pixels originals exports one view.*Pass --views 0:1"):
        export(labels, tmp_path / "other", pixels="originals", views=(0, 2))


def test_a_recipe_that_changes_nothing_is_not_warned_of(data, tmp_path, caplog):
    from pipeline.settings.files import load_recipe

    plain = make_labels(tmp_path / "set", data, recipe=load_recipe("none", {"img_size": 16, "mix_block": 8}), on_bad_image="skip", views=(0, 1))  # fmt: skip
    export(plain, tmp_path / "out", pixels="originals")
    assert "the exported answers belong to" not in caplog.text
    assert exporting.changes_images(small_recipe())


def test_the_same_export_is_continued_and_another_is_refused(labels, tmp_path):
    export(labels, tmp_path / "once", views=(0, 2))
    export(labels, tmp_path / "out", views=(0, 2))
    for name in ("train-000001-view-00001.tar", "_info.json"):
        (tmp_path / "out" / name).unlink()
    kept = (tmp_path / "out/train-000000-view-00000.tar").stat().st_mtime_ns
    export(labels, tmp_path / "out", views=(0, 2), workers=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "once")
    assert (tmp_path / "out/train-000000-view-00000.tar").stat().st_mtime_ns == kept
    with pytest.raises(UsageError, match=r"holds another export \(encoding differ\): choose another folder"):
        export(labels, tmp_path / "out", views=(0, 2), encoding="jpeg")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no export"):
        export(labels, tmp_path / "full")
    with pytest.raises(UsageError, match="is a file: choose a folder"):
        export(labels, tmp_path / "full/mine.txt")
    with pytest.raises(UsageError, match=r"within the labelled views 0:3, got 2:4"):
        export(labels, tmp_path / "new", views=(2, 4))
    assert not (tmp_path / "new").exists()


def test_an_export_that_stops_has_no_info_and_no_half_tar(labels, tmp_path, monkeypatch):
    real, calls = exporting.encode, []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(exporting, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        export(labels, tmp_path / "out", views=(0, 3))
    assert sorted(files_of(tmp_path / "out")) == [
        "export.json",
        "train-000000-view-00000.tar",
        "train-000001-view-00000.tar",
    ]
    monkeypatch.undo()
    export(labels, tmp_path / "out", views=(0, 3))
    export(labels, tmp_path / "once", views=(0, 3))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "once")


def test_images_that_were_not_labelled_are_not_exported(labels, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    tar = other / "train-000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"\xff\xd9", b"\xff\xd8", 1))  # the first image of it ends otherwise
    with pytest.raises(LabelSetMismatch, match=r"image 'img-00\d\d' of train-000001 has other bytes"):
        export_labels(labels, open_source(other), tmp_path / "out", ExportConfig(workers=0))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_without_all_class_labels_there_is_none(tmp_path):
    partly = make_labels(tmp_path / "set", write_tars(tmp_path / "data", unlabelled=2), views=(0, 1))
    export(partly, tmp_path / "out")
    files = samples_in(tmp_path / "out/train-000000-view-00000.tar")
    assert {extension for sample in files.values() for extension in sample} == {"png", "json"}
    assert not any("class_label" in json.loads(sample["json"]) for sample in files.values())


TIMM = """
import json, sys, warnings
import torch
from timm import create_model
from timm.data import create_dataset, create_loader

root, key = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else None)
dataset = create_dataset("wds/labels", root, split="train", is_training=True, batch_size=8, target_key=key)
loader = create_loader(dataset, input_size=(3, 16, 16), batch_size=8, is_training=True, no_aug=True, num_workers=1,
                       use_prefetcher=False, device=torch.device("cpu"), persistent_workers=False)
model = create_model("test_resnet", num_classes=3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
seen, losses = [], []
for images, target in loader:
    loss = torch.nn.functional.cross_entropy(model(images), target)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    seen += target.tolist(); losses.append(loss.item())
plain = create_dataset("wds/labels", root, split="train", is_training=False, batch_size=1, target_key=key)
print(json.dumps({"length": len(dataset), "seen": len(seen), "targets": [int(t) for _, t in plain], "losses": losses}))
"""

DATASETS = """
import json, sys
from datasets import load_dataset

root = sys.argv[1]
by_folder = load_dataset(root, split="train")
by_kind = load_dataset("webdataset", data_files={"train": root + "/*.tar"}, split="train")
streamed = load_dataset(root, split="train", streaming=True)
rows = [list(each) for each in (by_folder, by_kind, streamed)]
print(json.dumps([[(r["json"]["key"], r["json"]["view"], r["json"]["hard"], r["png"].size) for r in sorted(each, key=lambda r: r["__key__"])] for each in rows]))
"""


def script(code: str, *arguments: str, home: Path) -> str:
    """Run Python that knows nothing of this project, offline."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["hard", None])
def test_stock_timm_trains_on_the_hard_labels(labels, tmp_path, key):
    """With --target-key, and without: `_info.json` says where the labels are."""
    count = export(labels, tmp_path / "out", views=(0, 2))
    found = json.loads(script(TIMM, str(tmp_path / "out"), *([key] if key else []), home=tmp_path))
    expected = [int(c) for view in (0, 1) for shard in labels.shards for c in labels.read(shard, view).hard]
    assert found["targets"] == expected
    assert found["length"] >= count
    assert found["seen"] >= count - 7
    assert np.isfinite(found["losses"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("unlabelled", [0, 2])
def test_datasets_reads_the_hard_labels(tmp_path, unlabelled):
    pytest.importorskip("datasets")
    labels = make_labels(tmp_path / "set", write_tars(tmp_path / "data", unlabelled=unlabelled), views=(0, 2))
    export(labels, tmp_path / "out", views=(0, 2))
    expected = sorted(
        (f"{key}-view-{view:05}", [key, view, int(hard), [16, 16]])
        for view in (0, 1)
        for shard in labels.shards
        for key, hard in zip(labels.samples(shard).key, labels.read(shard, view).hard, strict=True)
    )
    for found in json.loads(script(DATASETS, str(tmp_path / "out"), home=tmp_path)):
        assert found == [values for _, values in expected]


@pytest.mark.slow
def test_the_example_of_the_page_runs(labels, tmp_path):
    pytest.importorskip("datasets")
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), flags=re.DOTALL)
    export(labels, tmp_path / "exported")
    assert script(text, home=tmp_path) == f"{labels.read('train-000000', 0).hard[0]} (16, 16)"


def test_the_page_names_every_field_of_the_json(labels, tmp_path):
    export(labels, tmp_path / "out")
    (first, *_) = samples_in(tmp_path / "out/train-000000-view-00000.tar").values()
    page = (ROOT / "docs/export.md").read_text().split("| field of `.json`")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in page.splitlines()[2:]))) == {
        *json.loads(first["json"])
    }


def test_the_command_exports_a_moved_self_contained_set(tmp_path):
    make_labels(tmp_path / "set", write_tars(tmp_path / "data"), include_images="20", views=(0, 2))
    shutil.rmtree(tmp_path / "data")
    code, said = invoke("labels", "export", str(tmp_path / "set"), str(tmp_path / "out"), "--views", "0:2", "-j", "0")
    assert (code, f"{tmp_path / 'out'}: 46 images in webdataset tars" in said) == (0, True), said
    assert json.loads((tmp_path / "out/_info.json").read_text())["splits"]["train"]["num_samples"] == 46


def test_names_from_outside_stay_in_their_place(tmp_path):
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("a b", "x'y`z")):
        (tmp_path / f"data/{name}.jpg").write_bytes(encoded(photo(number)))
    labels = make_labels(tmp_path / "set", str(tmp_path / "data"), views=(0, 1))
    export(labels, tmp_path / "out")
    keys = [json.loads(sample["json"])["key"] for sample in samples_in(tmp_path / "out/images-000000-view-00000.tar").values()]  # fmt: skip
    assert sorted(keys) == ["a b", "x'y`z"]
