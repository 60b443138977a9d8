"""Training state: bit-exact round trips, damage found, training continued as if never stopped."""

import json
import random
import re
import struct
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, StorageError
from trainer.checkpoint import load_state, pack_training, save_state, unpack_training
from trainer.export import export_model, hub_config
from trainer.optim import create_ema, create_optimizer, learning_rate, set_learning_rate
from trainer.student import Student, create_student

META = {"epoch": 3, "update": 1200, "best": 0.1 + 0.2, "name": "né", "seen": [1, None, True], "nested": {"a": {}}}


def some_tensors() -> dict[str, Tensor]:
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45])
    return {
        "float32": base.clone(),
        "bfloat16": base.bfloat16(),
        "float16": base.half(),
        "float64": base.double(),
        "int64": torch.tensor([-(2**63), 2**63 - 1, 0]),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "bool": base > 0,
        "special": special,
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "transposed": base.clone().T,
        "strided": base.clone()[::2, ::3],
        "expanded": torch.tensor([[1.5]]).expand(4, 3),
        "parameter": torch.nn.Parameter(base.clone()),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


# --- one file -------------------------------------------------------------------------------------------------


def test_every_kind_of_tensor_and_the_metadata_come_back_to_the_bit(tmp_path):
    save_state(tmp_path / "state.safetensors", some_tensors(), META)
    tensors, meta = load_state(tmp_path / "state.safetensors")
    assert_same(tensors, some_tensors())
    assert meta == META


def test_a_state_without_tensors_is_a_state(tmp_path):
    save_state(tmp_path / "s", {}, {"update": 0})
    assert load_state(tmp_path / "s") == ({}, {"update": 0})


def test_metadata_comes_back_as_json_has_it(tmp_path):
    save_state(tmp_path / "s", {}, {"by_step": {9: 1, 10: 2}, "pair": (1, 2)})
    assert load_state(tmp_path / "s")[1] == {"by_step": {"9": 1, "10": 2}, "pair": [1, 2]}


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name, meta in [("a", META), ("b", dict(reversed(META.items()))), ("c", META)]:
        save_state(tmp_path / name, some_tensors(), meta)
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1


def test_the_file_is_plain_safetensors(tmp_path):
    save_state(tmp_path / "s", some_tensors(), META)
    assert_same(safetensors.torch.load_file(tmp_path / "s"), some_tensors())
    with safetensors.safe_open(tmp_path / "s", "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["deit_cli"]
    assert json.loads(metadata["deit_cli"])["meta"] == META


def test_nan_in_the_metadata_is_refused_and_the_old_file_stays(tmp_path):
    save_state(tmp_path / "s", {}, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_state(tmp_path / "s", {}, {"loss": float("nan")})
    assert load_state(tmp_path / "s")[1] == {"loss": 1.0}


def test_a_save_replaces_the_old_file_and_leaves_no_other(tmp_path):
    for update in (1, 2):
        save_state(tmp_path / "s", {"x": torch.tensor(update)}, {"update": update})
    assert load_state(tmp_path / "s") == ({"x": torch.tensor(2)}, {"update": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_save_that_fails_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        save_state(tmp_path / "file" / "s", {}, {})


# --- damage ---------------------------------------------------------------------------------------------------


def is_found(path: Path, damaged: bytes, tensors: dict[str, Tensor], meta: dict) -> bool:
    """Whether the damage is an error that names the file; if there is none, everything read must be as saved."""
    path.write_bytes(damaged)
    try:
        found, found_meta = load_state(path)
    except CheckpointError as error:
        return str(path) in str(error)
    assert_same(found, tensors)
    assert found_meta == meta
    return False


def test_any_flipped_byte_is_found(tmp_path):
    path, tensors = tmp_path / "s", some_tensors()
    save_state(path, tensors, META)
    data, draw = path.read_bytes(), random.Random(1)
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    # Half of the flips in the header, a fifth of the file; all 8 bytes of its length.
    places = [*range(8), *draw.choices(range(8, header_end), k=300), *draw.choices(range(header_end, len(data)), k=300)]
    harmless = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= draw.randrange(1, 256)
        harmless += not is_found(path, bytes(damaged), tensors, META)
    assert harmless == 0


def test_any_cut_or_addition_is_found(tmp_path):
    path, tensors = tmp_path / "s", some_tensors()
    save_state(path, tensors, META)
    data, draw = path.read_bytes(), random.Random(2)
    for length in [0, 1, 7, 8, len(data) - 1, *draw.choices(range(len(data)), k=100)]:
        assert is_found(path, data[:length], tensors, META)
    assert is_found(path, data + b"\0", tensors, META)
    assert is_found(path, data + data, tensors, META)


def rewritten(path: Path, change) -> None:
    """Put other tensors under an untouched header text."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}
    path.write_bytes(safetensors.torch.save(change(tensors), metadata))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {"a": t["b"], "b": t["a"]},  # two tensors of one shape changed places
        lambda t: {"a": t["a"]},  # one is gone
        lambda t: t | {"c": torch.zeros(1)},  # one came
        lambda t: t | {"a": t["a"].reshape(3, 2)},  # the same bytes in another shape
        lambda t: t | {"a": t["a"].view(torch.int32)},  # the same bytes as another type
    ],
)
def test_a_sound_file_with_other_tensors_is_found(tmp_path, change):
    save_state(tmp_path / "s", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, 3)}, META)
    rewritten(tmp_path / "s", dict)
    load_state(tmp_path / "s")  # rewriting alone does no harm
    rewritten(tmp_path / "s", change)
    with pytest.raises(
        CheckpointError,
        match=r"s: this checkpoint is damaged: its SHA-256 is [0-9a-f]{64}, but its metadata says [0-9a-f]{64}\. Replace",
    ):
        load_state(tmp_path / "s")


@pytest.mark.parametrize(
    "metadata",
    [
        None,  # another program's safetensors
        {"format": "pt"},  # the same
        {"deit_cli": "not JSON"},
        {"deit_cli": "[1, 2]"},
        {"deit_cli": '{"meta": {}}'},
        {"deit_cli": '{"meta": {}, "meta": {}, "sha256": ""}'},
        {"deit_cli": "[" * 100_000},
    ],
)
def test_a_file_that_is_not_ours_is_named(tmp_path, metadata):
    (tmp_path / "s").write_bytes(safetensors.torch.save({"x": torch.zeros(2)}, metadata))
    with pytest.raises(CheckpointError, match=r"s: this is not a complete checkpoint of deit-cli \("):
        load_state(tmp_path / "s")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none: cannot read this checkpoint: No such file or directory"):
        load_state(tmp_path / "none")


# --- training state -------------------------------------------------------------------------------------------


class Training:
    """A tiny run: student, AdamW and EMA, stepped on data that is a function of the update."""

    def __init__(self, *, seed: int, ema: bool = True, fused: bool = False, model: str = "deit-ti", width: int = 16):
        torch.manual_seed(seed)
        shape = {"patch_size": 8, "embed_dim": width, "depth": 1, "num_heads": 2} if model == "deit-ti" else {}
        self.student = create_student(model, num_classes=4, img_size=16, **shape)
        self.optimizer = create_optimizer(self.student, lr=1.0, weight_decay=0.05, fused=fused)
        self.ema = create_ema(self.student, 0.9, warmup=True) if ema else None

    def run(self, updates: range, heads: int = 2) -> None:
        for update in updates:
            draw = torch.Generator().manual_seed(update)
            images, labels = torch.randn(8, 3, 16, 16, generator=draw), torch.randint(4, (8,), generator=draw)
            answer = self.student(images)
            loss = sum(
                torch.nn.functional.cross_entropy(logits, labels)
                for logits in (answer.class_logits, answer.distill_logits)[:heads]
                if logits is not None
            )
            rate = learning_rate(update, updates_total=10, updates_warmup=2, lr=1e-2, warmup_lr=1e-4, min_lr=1e-5)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.student, step=update)

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: value.detach().clone()
            for name, value in pack_training(self.student, self.optimizer, self.ema).items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        unpack_training(tensors, self.student, self.optimizer, self.ema)


@pytest.mark.parametrize(
    "options",
    [
        {"ema": False},
        {"ema": True},
        {"fused": True},
        {"model": "test_resnet"},  # batch norm: buffers, and integers among them
    ],
    ids=str,
)
def test_training_continues_to_the_bit_from_a_saved_state(tmp_path, options):
    whole = Training(seed=1, **options)
    whole.run(range(10))
    half = Training(seed=1, **options)
    half.run(range(5))
    save_state(tmp_path / "s", pack_training(half.student, half.optimizer, half.ema), {"update": 5})
    resumed = Training(seed=2, **options)
    tensors, meta = load_state(tmp_path / "s")
    resumed.restore(tensors)
    resumed.run(range(meta["update"], 10))
    assert_same(resumed.tensors(), whole.tensors())
    # The comparison is not empty: half-way was another state.
    assert bits(tensors["optim.0.exp_avg"]) != bits(whole.tensors()["optim.0.exp_avg"])


def test_a_state_before_the_first_update_restores_too():
    fresh, other = Training(seed=1), Training(seed=2)
    assert not any(name.startswith("optim.") for name in fresh.tensors())
    other.restore(fresh.tensors())
    fresh.run(range(3))
    other.run(range(3))
    assert_same(other.tensors(), fresh.tensors())


def test_a_head_that_never_learned_has_no_optimizer_state_and_restores():
    half, resumed = Training(seed=1), Training(seed=2)
    half.run(range(2), heads=1)
    steps = [name for name in half.tensors() if name.endswith(".step")]
    assert 0 < len(steps) < len(list(half.student.parameters()))
    resumed.restore(half.tensors())
    half.run(range(2, 4), heads=2)
    resumed.run(range(2, 4), heads=2)
    assert_same(resumed.tensors(), half.tensors())


def test_restoring_keeps_the_rate_and_takes_copies():
    half, resumed = Training(seed=1), Training(seed=2)
    half.run(range(2))
    tensors = half.tensors()
    before = {name: value.clone() for name, value in tensors.items()}
    resumed.restore(tensors)
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [1.0, 1.0]
    resumed.run(range(2, 3))
    assert_same(tensors, before)


def test_names_are_those_of_timm_under_their_owner():
    names = Training(seed=0).tensors().keys()
    assert {"model.dist_token", "ema.dist_token", "model.head_dist.weight"} <= names
    trained = Training(seed=0)
    trained.run(range(1))
    assert {"optim.0.step", "optim.0.exp_avg", "optim.0.exp_avg_sq"} <= trained.tensors().keys()


def without(*names: str):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.cls_token"), r"the checkpoint lacks model\.cls_token: it was made with another config"),
        (without("ema.cls_token", "ema.pos_embed"), r"lacks ema\.cls_token and 1 more"),
        (without("optim.3.exp_avg"), r"lacks optim\.3\.exp_avg:"),
        (without("optim.3.step"), r"has an unknown tensor optim\.3\.exp_avg and 1 more"),
        (lambda t: t | {"model.extra": torch.zeros(1)}, r"has an unknown tensor model\.extra"),
        (lambda t: t | {"other": torch.zeros(1)}, r"has an unknown tensor other"),
        (lambda t: t | {"optim.999.step": torch.zeros(())}, r"has an unknown tensor optim\.999\.step"),
        (lambda t: t | {"optim.x": torch.zeros(())}, r"has an unknown tensor optim\.x"),
        (
            lambda t: t | {"model.head.bias": torch.zeros(9)},
            r"model\.head\.bias is torch\.float32 \[9\], this run needs torch\.float32 \[4\]",
        ),
        (lambda t: t | {"ema.head.bias": torch.zeros(4).half()}, r"ema\.head\.bias is torch\.float16 \[4\], this run"),
        (lambda t: t | {"optim.0.step": torch.zeros(2)}, r"optim\.0\.step is torch\.float32 \[2\]"),
        (lambda t: t | {"optim.0.exp_avg_sq": torch.zeros(1)}, r"optim\.0\.exp_avg_sq is torch\.float32 \[1\]"),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(change, message):
    source, target = Training(seed=1), Training(seed=2)
    source.run(range(2))
    target.run(range(1))
    before = target.tensors()
    with pytest.raises(CheckpointError, match=message):
        target.restore(change(source.tensors()))
    assert_same(target.tensors(), before)


def test_a_run_without_an_average_refuses_a_state_with_one_and_the_reverse():
    with_ema, without_ema = Training(seed=1), Training(seed=1, ema=False)
    with pytest.raises(CheckpointError, match=r"has an unknown tensor ema\.blocks"):
        without_ema.restore(with_ema.tensors())
    with pytest.raises(CheckpointError, match=r"lacks ema\.blocks"):
        with_ema.restore(without_ema.tensors())


# --- export ---------------------------------------------------------------------------------------------------


def answer(student: Student, images: Tensor) -> Tensor:
    with torch.no_grad():
        heads = student.eval()(images)
        return (heads.class_logits + heads.distill_logits) / 2


def test_an_exported_folder_loads_in_timm_and_answers_the_same(tmp_path):
    training, images = Training(seed=1), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    training.run(range(3))
    for name, student in (("student", training.student), ("ema", training.ema.module)):
        export_model(tmp_path / name, student.model.state_dict(), hub_config=hub_config(student))
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["config.json", "model.safetensors"]
        rebuilt = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(rebuilt(images), answer(student, images))
    assert not torch.equal(answer(training.student, images), answer(training.ema.module, images))


def test_exporting_again_replaces_both_files_and_the_bytes_repeat(tmp_path):
    first, second = Training(seed=1).student, Training(seed=2).student
    export_model(tmp_path, second.model.state_dict(), hub_config={"of": "second"})
    export_model(tmp_path, first.model.state_dict(), hub_config={"of": "first"})
    data = (tmp_path / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == {"of": "first"}
    assert torch.equal(safetensors.torch.load(data)["dist_token"], first.model.dist_token)
    export_model(tmp_path / "again", first.model.state_dict(), hub_config={"of": "first"})
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == data


def test_an_export_that_fails_names_the_file(tmp_path):
    (tmp_path / "f").write_text("in the way")
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "f"))):
        export_model(tmp_path / "f", Training(seed=1).student.model.state_dict(), hub_config={})
