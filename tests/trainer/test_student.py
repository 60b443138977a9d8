"""The student against timm itself: heads, configuration, weights in and out."""

import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from pipeline.errors import CheckpointError, StorageError, UsageError
from trainer import student as student_module
from trainer.export import hub_config
from trainer.student import Heads, Student, create_student, load_weights

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def tiny(model: str = "deit-ti", num_classes: int = 10, seed: int = 0, **changes) -> Student:
    torch.manual_seed(seed)
    return create_student(model, num_classes=num_classes, **{**TINY, **changes})


def images(size: int = 32, num: int = 3) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(5))


def same_weights(a: Student, b: Student) -> bool:
    mine, theirs = a.model.state_dict(), b.model.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- the two heads --------------------------------------------------------------------------------------------

DISTILLED = [
    ("deit_tiny_distilled_patch16_224", TINY),  # a token for each head
    ("pit_ti_distilled_224", {"img_size": 64}),  # the same, with pooling between its stages
    ("levit_128s", {"img_size": 64}),  # one pooled vector for both heads
    ("efficientformerv2_s0", {"img_size": 64}),  # the same
]


@pytest.mark.parametrize(("name", "shape"), DISTILLED)
def test_both_heads_are_those_of_timm_in_training_and_their_mean_that_of_evaluation(name, shape):
    torch.manual_seed(0)
    student, batch = create_student(name, num_classes=7, **shape), images(shape["img_size"])
    if name.startswith("deit"):  # timm starts DeiT's heads at zero: a swap would not show
        nn.init.normal_(student.model.head.weight)
        nn.init.normal_(student.model.head_dist.weight)
    assert student.has_distillation_head
    with torch.no_grad():
        student.model.set_distilled_training(True)
        for training in (True, False):
            student.train(training)
            heads = student(batch)
            theirs = student.model(batch)
            assert heads.class_logits.shape == heads.distill_logits.shape == (3, 7)
            if training:
                assert torch.equal(heads.class_logits, theirs[0])
                assert torch.equal(heads.distill_logits, theirs[1])
            else:
                assert torch.equal((heads.class_logits + heads.distill_logits) / 2, theirs)
    assert not torch.equal(heads.class_logits, heads.distill_logits)


@pytest.mark.parametrize("head", ["class_logits", "distill_logits"])
def test_dropout_before_the_heads_is_kept(head):
    student = tiny()
    student.model.head_drop = nn.Dropout(0.5)
    nn.init.normal_(student.model.head.weight)
    nn.init.normal_(student.model.head_dist.weight)
    for training in (True, False):
        student.train(training)
        first, second = (getattr(student(images()), head) for _ in range(2))
        assert torch.equal(first, second) is not training


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_tiny_patch16_224", TINY),  # no second head
        ("test_resnet", {"img_size": 32}),  # a convolutional student
        ("pit_ti_224", {"img_size": 64}),  # could be distilled, is not
        ("repvit_m0_9", {"img_size": 64}),  # two heads inside its classifier: timm's average
    ],
)
def test_a_model_with_one_head_answers_as_timm_does(name, shape):
    student, batch = create_student(name, num_classes=7, **shape).eval(), images(shape["img_size"])
    with torch.no_grad():
        heads = student(batch)
        assert torch.equal(heads.class_logits, student.model(batch))
    assert heads.distill_logits is None
    assert not student.has_distillation_head


def test_the_heads_survive_torch_compile():
    student = tiny().eval()
    with torch.no_grad():
        heads = torch.compile(student, backend="eager", fullgraph=True)(images())
        plain = student(images())
    assert isinstance(heads, Heads)
    assert torch.equal(heads.class_logits, plain.class_logits)
    assert torch.equal(heads.distill_logits, plain.distill_logits)


# --- creation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short", "width"), [("deit-ti", 192), ("deit-s", 384)])
def test_short_names_are_the_distilled_models_of_the_paper(short, width):
    student = create_student(short, num_classes=5, depth=1)
    assert (student.model.embed_dim, student.img_size, student.num_classes) == (width, 224, 5)
    assert student.has_distillation_head


def test_the_short_name_of_the_base_model_is_known_to_timm():
    assert timm.is_model(student_module.SHORT_NAMES["deit-b"])


def test_normalisation_and_size_come_from_timm():
    deit = tiny()
    assert (deit.mean, deit.std, deit.img_size) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 32)
    vit = create_student("vit_tiny_patch16_224", num_classes=3, depth=1)
    assert (vit.mean, vit.std, vit.img_size) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224)


def test_drop_path_reaches_the_blocks_only_when_asked_for():
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in tiny(drop_path=0.2, depth=3).model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    create_student("dla46_c", num_classes=2, drop_path=0.0)  # an architecture that has none


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("deit_tiny_distiled_patch16_224", {}, "Did you mean deit_tiny_distilled_patch16_224"),
        ("deit-t", {}, "Did you mean .*deit-ti"),
        (
            "zzzzzzzzzzzz",
            {},
            r"one of deit-ti, deit-s, deit-b, got 'zzzzzzzzzzzz'\. deit-cli models PATTERN lists names",
        ),
        ("deit_tiny_distilled_patch16_224.nosuch", {}, r"Invalid pretrained tag \(nosuch\)"),
        ("test_resnet", {"patch_size": 4}, "timm cannot build test_resnet with patch_size=4: .* 'patch_size'"),
        ("test_resnet", {"depth": 4, "num_heads": 2}, "test_resnet with depth=4, num_heads=2: "),
        ("dla46_c", {"drop_path": 0.1}, "dla46_c with drop_path_rate=0.1: "),
        ("deit-ti", {"num_heads": 5}, "num_heads=5: dim should be divisible by num_heads"),
        ("deit-ti", {"img_size": 225, "depth": 1}, "image size must be a multiple of the patch size 16, got 225"),
        ("deit-ti", {"class_names": ["a", "b"]}, "one name for each of the 3 classes, got 2 names"),
        ("deit-ti", {"pretrained": True, "init_checkpoint": Path("w.pth")}, "not both: got w.pth"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(model, values, message):
    with pytest.raises(UsageError, match=message) as caught:
        create_student(model, num_classes=3, **values)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_are_a_storage_error(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(student_module.timm, "create_model", unreachable)
    with pytest.raises(
        StorageError, match=r"cannot fetch the published weights of deit_tiny.*: no route to host\. Without .*--init"
    ):
        create_student("deit-ti", num_classes=1000, pretrained=True)


# --- configuration and timm -----------------------------------------------------------------------------------


def exported(student: Student, folder: Path) -> Path:
    safetensors.torch.save_file(student.model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hub_config(student)))
    return folder


def test_timm_rebuilds_the_student_from_its_folder(tmp_path):
    student = tiny(class_names=[f"class {i}" for i in range(10)], drop_path=0.1).eval()
    nn.init.normal_(student.model.head.weight)
    rebuilt = timm.create_model(f"local-dir:{exported(student, tmp_path)}", pretrained=True).eval()
    with torch.no_grad():
        heads = student(images())
        assert torch.equal(rebuilt(images()), (heads.class_logits + heads.distill_logits) / 2)
    assert rebuilt.pretrained_cfg["label_names"] == list(student.class_names)
    assert (tuple(rebuilt.pretrained_cfg["mean"]), tuple(rebuilt.pretrained_cfg["std"])) == (student.mean, student.std)


def test_timm_loads_the_weights_as_a_plain_checkpoint(tmp_path):
    student = tiny(seed=3).eval()
    exported(student, tmp_path)
    loaded = timm.create_model(
        student_module.SHORT_NAMES["deit-ti"],
        checkpoint_path=str(tmp_path / "model.safetensors"),
        num_classes=10,
        **TINY,
    ).eval()
    with torch.no_grad():
        heads = student(images())
        assert torch.equal(loaded(images()), (heads.class_logits + heads.distill_logits) / 2)


def test_the_configuration_says_what_was_built():
    config = hub_config(tiny(class_names="abcdefghij"))
    assert config["architecture"] == "deit_tiny_distilled_patch16_224"
    assert (config["num_classes"], config["num_features"], config["global_pool"]) == (10, 32, "token")
    assert config["label_names"] == list("abcdefghij")
    assert config["model_args"] == TINY | {
        "img_size": [32, 32],
        "num_classes": 10,
        "in_chans": 3,
        "global_pool": "token",
    }
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    # These weights are nobody's published ones.
    assert not {"tag", "license", "hf_hub_id", "url"} & config["pretrained_cfg"].keys()


def test_without_class_names_the_configuration_has_none():
    assert "label_names" not in hub_config(tiny())


def test_a_student_for_any_size_remembers_the_size_it_was_trained_at(tmp_path):
    student = create_student("test_resnet", num_classes=4, img_size=48)
    assert student.img_size == 48
    assert hub_config(student)["pretrained_cfg"]["input_size"] == [3, 48, 48]
    rebuilt = timm.create_model(f"local-dir:{exported(student, tmp_path)}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(rebuilt(images(48)), student.eval()(images(48)).class_logits)


# --- weights in -----------------------------------------------------------------------------------------------


def deit_published(state, path):
    torch.save({"model": state}, path)


LAYOUTS = [
    ("model.safetensors", safetensors.torch.save_file),
    ("plain.pth", torch.save),
    ("checkpoint.pth", deit_published),
    ("last.pth.tar", lambda state, path: torch.save({"state_dict": state, "epoch": 3, "arch": "deit"}, path)),
    ("ddp.pt", lambda state, path: torch.save({f"module.{name}": value for name, value in state.items()}, path)),
    (
        "compiled.pt",
        lambda state, path: torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, path),
    ),
    ("old.pth", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
]


@pytest.mark.parametrize(("file", "save"), LAYOUTS, ids=[file for file, _ in LAYOUTS])
def test_weights_load_from_every_usual_layout(tmp_path, file, save):
    source, target = tiny(seed=1), tiny(seed=2)
    assert not same_weights(source, target)
    save(source.model.state_dict(), tmp_path / file)
    load_weights(target, tmp_path / file)
    assert same_weights(source, target)


def test_the_published_layout_of_deit_fits_the_tiny_student(tmp_path):
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    names = {"cls_token", "dist_token", "pos_embed", "head.weight", "head_dist.weight", "blocks.1.attn.qkv.weight"}
    assert names <= model.state_dict().keys()
    deit_published(model.state_dict(), tmp_path / "deit.pth")
    student = create_student("deit-ti", num_classes=1000, depth=2, init_checkpoint=tmp_path / "deit.pth")
    assert torch.equal(student.model.dist_token, model.dist_token)


def changed(state: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    renamed = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (state | renamed).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dist_token": None}, r"w\.pt lacks dist_token: it belongs to another architecture"),
        ({"dist_token": None, "norm__bias": None}, r"w\.pt lacks dist_token and 1 more"),
        ({"extra": torch.zeros(1)}, r"w\.pt has an unknown tensor extra: "),
        ({"pos_embed": torch.zeros(1, 38, 32)}, r"pos_embed has shape \[1, 38, 32\], this model needs \[1, 18, 32\]"),
        ({"head__weight": torch.zeros(1000, 32)}, "its head has 1000 classes, this run needs 10"),
        ({"head_dist__weight": torch.zeros(12, 32)}, "its head_dist has 12 classes, this run needs 10"),
        ({"norm__bias": 3}, r"w\.pt holds no state dict: norm\.bias is not a tensor"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path, changes, message):
    student, before = tiny(seed=2), tiny(seed=2)
    torch.save(changed(tiny(seed=1).model.state_dict(), **changes), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(student, tmp_path / "w.pt")
    assert str(tmp_path) in str(caught.value)
    assert same_weights(student, before)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"model": tiny().model.state_dict(), "args": Payload(mark)}, tmp_path / "w.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload(mark)))
    for name in ("w.pth", "bare.pth"):
        with pytest.raises(CheckpointError, match="cannot be read as plain tensors") as caught:
            load_weights(tiny(), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not mark.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)  # the payload does work where it is let
    assert mark.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.pth.tar", "w.npz"])
@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"not weights at all", b"PK\x03\x04broken", b"\x80\x04N."])
def test_bytes_that_are_no_checkpoint_are_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path / name))} cannot be read as plain tensors"):
        load_weights(tiny(), tmp_path / name)


@pytest.mark.parametrize(("file", "save"), LAYOUTS[:3], ids=[file for file, _ in LAYOUTS[:3]])
def test_a_cut_checkpoint_is_refused(tmp_path, file, save):
    save(tiny().model.state_dict(), tmp_path / file)
    data = (tmp_path / file).read_bytes()
    for length in (7, len(data) // 2, len(data) - 1):
        (tmp_path / file).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
            load_weights(tiny(), tmp_path / file)


def test_an_empty_state_dict_and_a_missing_file_are_named(tmp_path):
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match=r"empty\.pt holds no state dict: it is empty"):
        load_weights(tiny(), tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match=r"none\.pt: there is no such checkpoint file"):
        load_weights(tiny(), tmp_path / "none.pt")
