"""Every form of an export answers like its student, in a process that has nothing of this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import photo
from support.students import CENTRE, HEIGHT, WIDTH, exported, make_student

from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.storage.place import LocalFile
from trainer.evaluate import ANSWERS, fused_logits
from trainer.evidence.linear import FILE_NAME, concatenated, load_linear
from trainer.evidence.scores import LINEAR
from trainer.exports import onnx_file
from trainer.exports.config import StudentExportConfig
from trainer.exports.export import export_student
from trainer.student import normalise

ROOT = Path(__file__).parents[2]
EVERY = (*ANSWERS, LINEAR)


def export(source: Path | str, out: Path, **settings):
    return export_student(str(source), StudentExportConfig(out=out, **settings))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Seven images, uint8 [7, 16, 16, 3]."""
    return torch.stack([torch.from_numpy(photo(i, HEIGHT, WIDTH)[CENTRE].copy()) for i in range(7)])


@pytest.fixture(scope="module")
def wanted(student, folder, pixels) -> dict[str, np.ndarray]:
    """What the student answers, by its own code."""
    images = normalise(pixels.permute(0, 3, 1, 2).float(), student)
    linear = load_linear(LocalFile(folder / FILE_NAME), student)
    assert linear is not None
    with torch.inference_mode():
        answers = fused_logits(student(images)) | {LINEAR: linear(concatenated(*student.tokens(images)))}
    return {name: answer.numpy() for name, answer in answers.items()}


def elsewhere(script: str, *arguments: object) -> None:
    """Run a script in a process without our code: no PYTHONPATH, no current folder, no user site."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    check = "\nimport sys\nassert not {'trainer', 'pipeline', 'cli'} & {m.split('.')[0] for m in sys.modules}\n"
    command = [sys.executable, "-I", "-c", script + check, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr


LOAD_ONNX = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
images = np.load(sys.argv[2])
parts = [session.run(None, {"images": part}) for part in (images[:1], images[1:])]  # two sizes of batch
np.savez(sys.argv[3], **{name: np.concatenate(each) for name, each in zip(names, zip(*parts))})
"""
LOAD_TORCH = """
import sys
import numpy as np
import torch
model = torch.export.load(sys.argv[1]).module()
images = torch.from_numpy(np.load(sys.argv[2]))
parts = [model(part) for part in (images[:1], images[1:])]
np.savez(sys.argv[3], **{name: torch.cat(each).detach().numpy() for name, each in zip(sys.argv[4:], zip(*parts))})
"""
LOAD_TIMM = """
import sys
import numpy as np
import timm
import torch
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
with torch.inference_mode():
    np.savez(sys.argv[3], mean_logits=model(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "file", "script"),
    [
        ({"to": "onnx", "answer": EVERY, "preprocess": "nhwc"}, "model.onnx", LOAD_ONNX),
        ({"to": "onnx"}, "model.onnx", LOAD_ONNX),
        ({"to": "torch", "answer": EVERY, "preprocess": "nchw"}, "model.pt2", LOAD_TORCH),
        ({"to": "timm"}, "", LOAD_TIMM),
    ],
    ids=["onnx, all answers of pixels", "onnx", "torch", "timm"],
)
def test_an_export_answers_like_the_student_without_this_project(
    settings, file, script, student, folder, pixels, wanted, tmp_path
):
    export(folder, tmp_path / "out", **settings)
    names = settings.get("answer", ("mean_logits",))
    channels_first = pixels.permute(0, 3, 1, 2)
    images = {"nhwc": pixels, "nchw": channels_first}.get(
        settings.get("preprocess", "none"), normalise(channels_first.float(), student)
    )
    np.save(tmp_path / "images.npy", images.numpy())
    elsewhere(script, tmp_path / "out" / file, tmp_path / "images.npy", tmp_path / "answers.npz", *names)
    with np.load(tmp_path / "answers.npz") as answers:
        assert set(answers) == set(names)
        for name in names:
            np.testing.assert_allclose(answers[name], wanted[name], atol=1e-4 * max(1, np.abs(wanted[name]).max()))
            assert np.abs(wanted[name]).max() > 0.1


def answered(out: Path, student, pixels, **more) -> dict[str, np.ndarray]:
    """Return what an ONNX file answers here."""
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    images = normalise(pixels.permute(0, 3, 1, 2).float(), student).numpy()
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images}), strict=True))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lower_precision_is_smaller_and_close_and_says_what_it_loses(student, folder, photos, pixels, wanted, tmp_path):
    sizes, gaps = {}, {}
    for precision, more in (("float32", {}), ("float16", {}), ("int8", {"data": photos, "answer": ("class_head",)})):
        found = export(folder, tmp_path / precision, to="onnx", precision=precision, **more)
        sizes[precision] = (tmp_path / precision / "model.onnx").stat().st_size
        (name,) = found["check"]["answers"]
        gaps[precision] = np.abs(answered(tmp_path / precision, student, pixels)[name] - wanted[name]).max()
    assert sizes["int8"] < sizes["float16"] < sizes["float32"]
    assert gaps["float32"] < 1e-4 < gaps["float16"] < 0.05 < gaps["int8"] < 2
    accuracy = found["check"]["accuracy"]
    assert accuracy["images"] == 40
    assert set(accuracy["student"]) == set(accuracy["export"]) == {"class_head"}
    assert found["check"]["answers"]["class_head"]["same_class_pct"] >= 75
    assert found["quantisation"] == "dynamic"


@pytest.mark.slow
def test_int8_of_convolutions_needs_images(cnn, photos, tmp_path):
    with pytest.raises(UsageError, match=r"would quantise only 0 % of the weights.* Pass --calibration-data IMAGES"):
        export(cnn, tmp_path / "out", to="onnx", precision="int8")
    assert list(tmp_path.iterdir()) == []
    found = export(cnn, tmp_path / "out", to="onnx", precision="int8", calibration_data=photos, data=photos)
    assert found["quantisation"] == "static"
    assert found["check"]["answers"]["class_head"]["same_class_pct"] >= 75


def test_large_weights_go_into_a_file_of_their_own(student, folder, pixels, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 0)
    found = export(folder, tmp_path / "out", to="onnx")
    assert {"model.onnx", "model.onnx.data"} <= set(found["files"])
    np.testing.assert_allclose(
        answered(tmp_path / "out", student, pixels)["mean_logits"], wanted["mean_logits"], atol=1e-4
    )
    with pytest.raises(UsageError, match="--precision float16 needs weights of at most 0 bytes"):
        export(folder, tmp_path / "half", to="onnx", precision="float16")


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    # source, settings, what is said
    ("folder", {"to": "onnx", "answer": ("nobody",)}, "--answer must be one of class_head, .* got 'nobody'"),
    (
        "cnn",
        {"to": "onnx", "answer": ("sum_softmax",)},
        "--answer sum_softmax needs two heads, and test_resnet has one",
    ),
    ("cnn", {"to": "torch", "answer": (LINEAR,)}, "test_resnet has one head. Leave out --answer concat_linear"),
    ("timm:test_resnet", {"to": "onnx"}, "names weights that timm publishes"),
    ("nowhere", {"to": "timm"}, "nowhere: no such file or folder"),
]


@pytest.mark.parametrize(("source", "settings", "said"), REFUSED)
def test_a_bad_request_is_refused_on_one_line_and_writes_nothing(source, settings, said, request, tmp_path):
    location = request.getfixturevalue(source) if source in ("folder", "cnn") else source
    with pytest.raises((UsageError, CheckpointError), match=said) as refused:
        export(location, tmp_path / "out", **settings)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": "timm", "preprocess": "nhwc"}, "--preprocess is part of a graph"),
        ({"to": "torch", "precision": "int8"}, "--precision int8 is for --to onnx"),
        ({"to": "onnx", "answer": ("class_head", "class_head")}, "each --answer must be passed once"),
        ({"to": "onnx", "push": "user/name"}, "--push must be a model repository, hf://USER/NAME, got 'user/name'"),
        ({"to": "onnx", "push": "hf://datasets/name"}, "--push must be a model repository"),
        ({"to": "onnx", "labels_file": "x"}, "--labels-file says how the images at --data are read"),
        ({"to": "onnx", "crop_pct": 0.5}, "--crop-pct is the centre crop of --data"),
        ({"to": "pdf"}, "--to must be one of timm, onnx, torch, got 'pdf'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        StudentExportConfig(**settings)


def test_a_diverged_student_is_not_exported(student, tmp_path):
    broken = make_student()
    with torch.no_grad():
        broken.model.head.weight[0, 0] = float("nan")
    exported(tmp_path / "broken", broken)
    with pytest.raises(CheckpointError, match=r"broken: head.weight holds NaN or infinity: its training diverged"):
        export(tmp_path / "broken", tmp_path / "out", to="timm")
    assert not (tmp_path / "out").exists()


def test_a_run_without_weights_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match="holds no trained network"):
        export(tmp_path / "run", tmp_path / "out", to="timm")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(missing, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=rf"--to onnx needs the package {missing} .*pip install 'deit-cli\[onnx\]'"):
        export(folder, tmp_path / "out", to="onnx")


def test_an_export_that_answers_differently_is_not_published(folder, tmp_path, monkeypatch):
    opened = onnx_file.open_onnx

    def bent(graph, stage):
        answer = opened(graph, stage)
        return lambda images: {name: each + 3e-3 for name, each in answer(images).items()}

    monkeypatch.setattr(onnx_file, "open_onnx", bent)
    with pytest.raises(
        CheckpointError, match=r"the export's mean_logits differs from the student's by 0.003 on 16 gen"
    ):
        export(folder, tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_torch_cannot_trace_is_named(folder, tmp_path, monkeypatch):
    def untraceable(*_, **__):
        raise RuntimeError("data-dependent\nbranching")

    monkeypatch.setattr(torch.export, "export", untraceable)
    said = "torch cannot export deit_tiny_distilled_patch16_224 to torch .RuntimeError.: data-dependent branching"
    with pytest.raises(CheckpointError, match=said):
        export(folder, tmp_path / "out", to="torch")


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_same_command_replaces_what_it_wrote_and_nothing_else(folder, cnn, tmp_path, caplog):
    caplog.set_level("INFO", logger="deit_cli")
    out = tmp_path / "out"
    first = export(folder, out, to="timm")
    (out / "notes.txt").write_text("mine")
    assert export(folder, out, to="timm") == first
    (out / "README.md").write_text("by hand")
    again = export(cnn, out, to="timm")
    assert (out / "README.md").read_text() == "by hand"
    assert "README.md was changed, so it is kept" in caplog.text
    assert (out / "notes.txt").read_text() == "mine"
    assert again["files"]["model.safetensors"] != first["files"]["model.safetensors"]
    export(cnn, out, to="timm")
    assert (out / "README.md").read_text() == "by hand"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_file_that_an_export_no_longer_has_is_deleted(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(onnx_file, "MOST_BYTES", 0)
        export(folder, tmp_path / "out", to="onnx")
    found = export(folder, tmp_path / "out", to="onnx")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "export.json", "model.onnx"]
    assert sorted(found["files"]) == ["README.md", "model.onnx"]


def test_a_folder_of_others_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="out is not empty and holds no export"):
        export(folder, out, to="timm")
    (out / "export.json").write_text("[]")
    with pytest.raises(UsageError, match=r"export.json is not of an export"):
        export(folder, out, to="timm")
    assert (out / "model.safetensors").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="is a file"):
        export(folder, out / "export.json", to="timm")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "holds an export with preprocess nhwc, this one would have none. Pass another --out"),
        ({"preprocess": "nchw"}, "preprocess nhwc, this one would have nchw"),
        ({"preprocess": "nhwc", "precision": "float16"}, "precision float32, this one would have float16"),
        ({"preprocess": "nhwc", "answer": ("class_head",)}, "answers mean_logits, this one would have class_head"),
    ],
)
def test_an_export_never_replaces_another_kind_of_export(folder, onnx_of_pixels, settings, said):
    before = {path: path.read_bytes() for path in onnx_of_pixels.iterdir()}
    with pytest.raises(UsageError, match=said):
        export(folder, onnx_of_pixels, to="onnx", **settings)
    assert {path: path.read_bytes() for path in onnx_of_pixels.iterdir()} == before


@pytest.fixture(scope="module")
def onnx_of_pixels(folder, tmp_path_factory) -> Path:
    """An ONNX export that takes uint8 pixels."""
    out = tmp_path_factory.mktemp("pixels") / "out"
    export(folder, out, to="onnx", preprocess="nhwc")
    return out


def test_an_export_that_was_changed_or_has_another_form_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    export(folder, out, to="timm")
    with pytest.raises(UsageError, match="holds an export to timm, not to torch"):
        export(folder, out, to="torch")
    (out / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config.json is not the file that was exported"):
        export(folder, out, to="timm")
    (out / "config.json").unlink()
    record = json.loads((out / "export.json").read_text())
    del record["files"]["model.safetensors"]
    (out / "export.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"model.safetensors exists, and no export wrote it"):
        export(folder, out, to="timm")


def test_a_full_disk_is_one_line_and_leaves_no_record(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(StorageError, match=r"No space left on device\. Free some space$"):
        export(folder, tmp_path / "out", to="torch")
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize(("to", "file"), [("onnx", "model.onnx"), ("torch", "model.pt2")])
def test_an_export_has_no_paths_of_this_machine_and_no_names_of_our_code(to, file, folder, tmp_path):
    export(folder, tmp_path / "out", to=to)
    data = (tmp_path / "out" / file).read_bytes()
    for text in (str(ROOT), "site-packages", "trainer.", "/trainer/"):
        assert text.encode() not in data, text
