import importlib
import logging
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.builders import CLASSES, small_recipe, small_teacher, teacher_of, write_tars
from torch import nn

from pipeline.errors import NonFiniteTeacherError, TeacherError, UsageError
from pipeline.images.source import open_source
from pipeline.stage1.precompute import measure_accuracy
from pipeline.teacher.loading import DEIT_TEACHERS, weights_sha256
from pipeline.teacher.teacher import Answer, Teacher, check_classes, one_thread
from pipeline.views.mixing import MixBatch, apply_mix, mix_batch
from pipeline.views.pairs import draw_mix


def network(num_classes: int = 3, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=num_classes)


def ask(teacher: Teacher, images: torch.Tensor, topk: int) -> Answer:
    """The answer for whole levels, float [B, 3, H, W], that are not mixed."""
    views = images.byte().permute(0, 2, 3, 1).contiguous()
    return teacher.ask(views, mix_batch([], [], len(views)), topk).result()


def test_deits_short_name_means_deits_weights():
    """timm's own untagged default is another network, trained on other data."""
    assert DEIT_TEACHERS["regnety_160"] == "regnety_160.deit_in1k"
    assert timm.get_pretrained_cfg("regnety_160").tag != "deit_in1k"
    config = timm.get_pretrained_cfg("regnety_160.deit_in1k")
    assert config is not None
    assert (config.num_classes, config.input_size) == (1000, (3, 224, 224))


def test_random_weights_are_the_same_every_time_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    ids = {teacher_of("test_resnet", pretrained=False, num_classes=5, img_size=16).identity.id for _ in range(2)}
    assert len(ids) == 1
    assert torch.equal(before, torch.get_rng_state())


def test_identity_changes_with_weights_normalisation_size_and_classes():
    base = teacher_of("test_resnet", pretrained=False, num_classes=5, img_size=16).identity
    changed = [
        teacher_of("test_resnet", pretrained=False, num_classes=6, img_size=16).identity,
        teacher_of("test_resnet", pretrained=False, num_classes=5, img_size=24).identity,
        base.model_copy(update={"mean": (0.4, 0.5, 0.5)}),
        base.model_copy(update={"class_names": ("a", "b", "c", "d", "e")}),
        base.model_copy(update={"weights_sha256": "0" * 64}),
    ]
    assert len({base.id, *(identity.id for identity in changed)}) == 6


def test_one_changed_weight_is_another_teacher():
    one, other = network(), network()
    assert weights_sha256(one) == weights_sha256(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    assert weights_sha256(one) != weights_sha256(other)


CHECKPOINTS = [
    # how it is saved
    lambda state, path: save_file(state, path.with_suffix(".safetensors")),
    lambda state, path: torch.save(state, path),
    lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),  # timm
    lambda state, path: torch.save({"model": state}, path),  # DeiT
    lambda state, path: torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path),  # DDP
    lambda state, path: torch.save({"model": state, "best": np.float64(81.2)}, path),  # a training loop of one's own
]


@pytest.mark.parametrize("save", CHECKPOINTS, ids=range(len(CHECKPOINTS)))
def test_a_checkpoint_brings_its_weights_and_its_number_of_classes(tmp_path, save):
    trained = network(num_classes=7).eval()
    save(trained.state_dict(), tmp_path / "weights.pth")
    path = next(tmp_path.iterdir())
    teacher = teacher_of("test_resnet", checkpoint=path, img_size=16)
    assert teacher.identity.num_classes == 7
    assert teacher.identity.weights_sha256 == weights_sha256(trained)
    assert teacher.identity.name == "test_resnet"


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (importlib.import_module, ("this",))

    torch.save({"state_dict": Hostile()}, tmp_path / "weights.pth")
    with pytest.raises(TeacherError) as caught:
        teacher_of("test_resnet", checkpoint=tmp_path / "weights.pth", img_size=16)
    assert str(caught.value) == (
        f"{tmp_path}/weights.pth cannot be read as plain tensors: it holds importlib.import_module, which needs code to load."
        " Load it where you trust it, and save the state dict alone, best as safetensors"
    )


BAD_TEACHERS = [
    # name, options, error, text
    ("zzzzzzzzzzzz", {}, UsageError, r"timm has no model 'zzzzzzzzzzzz'. deit-cli models --teachers lists"),
    (
        "teacher/lst",
        {},
        UsageError,
        r"--teacher teacher/lst: is no folder, and timm has no model of this name\. Pass a fol",
    ),
    ("regnety_16", {}, UsageError, "timm has no model 'regnety_16'. Did you mean regnety_1"),
    ("support.builders:nothing", {}, UsageError, "must be a function that can be imported"),
    ("no_such_module:f", {}, UsageError, "must be a function that can be imported"),
    ("support.builders:photo_count", {}, UsageError, "must be a function that can be imported"),
]


@pytest.mark.parametrize(("name", "options", "error", "text"), BAD_TEACHERS, ids=range(len(BAD_TEACHERS)))
def test_teachers_that_do_not_exist(name, options, error, text):
    with pytest.raises(error, match=text):
        teacher_of(name, **options)


@pytest.mark.parametrize("exported", [("last",), ("best", "last")])
def test_the_folder_of_a_run_is_refused_with_the_folders_in_it(tmp_path, exported):
    run = tmp_path / "run"
    for part in exported:
        (run / part).mkdir(parents=True)
        (run / part / "model.safetensors").write_bytes(b"")
    (run / "config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        teacher_of(str(run))
    ways = " or ".join(f"{run}/{part}" for part in exported)
    assert str(caught.value) == f"--teacher {run} is the folder of a run. Pass {ways}"


class AnswersTwice(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1), images.flatten(1)


class NeedsContiguous(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.view(len(images), -1)


class KeepsMore(nn.Flatten):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, _: int) -> None: ...


def tall(**about) -> tuple[nn.Module, dict]:
    """A network of 12 classes for images of 2 pixels, and what is said of it."""
    return nn.Flatten(), {"input_size": (3, 2, 2)} | about


A_MODULE = "must return a torch.nn.Module, or a torch.nn.Module and a dict, got"
RETURNED_WRONGLY = [
    # what the function returns, what is said
    (3, f"{A_MODULE} int"),
    ({"input_size": (3, 2, 2)}, f"{A_MODULE} dict"),
    ((nn.Flatten(), None), f"{A_MODULE} Flatten, NoneType"),
    ((nn.Flatten(), {}, 1), f"{A_MODULE} Flatten, dict, int"),
    (tall(means=(0, 0, 0)), "the dict may have only the keys input_size, mean, std, crop_pct, class_names; got 'means'"),
    (tall(input_size=2), "input_size must be (3, H, H) with H in 1..4096 pixels, got 2"),
    (tall(input_size=(2, 2, 3)), "input_size must be (3, H, H) with H in 1..4096 pixels, got (2, 2, 3)"),
    (tall(input_size=(3, 2, 4)), "input_size must be (3, H, H) with H in 1..4096 pixels, got (3, 2, 4)"),
    (tall(mean=0.5), "mean must be three numbers in 0..1 (for pixels in 0..1, not 0..255), got 0.5"),
    (tall(mean=(123.7, 116.3, 103.5)), "mean must be three numbers in 0..1 (for pixels in 0..1, not 0..255), got (123.7"),
    (tall(std=(0, 1, 1)), "std must be three numbers above 0 and at most 1 (for pixels in 0..1, not 0..255), got (0, 1, 1)"),
    (tall(crop_pct=87.5), "crop_pct must be in 0.01..1 (a share, not a percentage), got 87.5"),
    (tall(class_names="abc"), "class_names must be a list of strings, got 'abc'"),
    (tall(class_names=["a", "b"]), "2 class names for 12 classes"),
    (tall(class_names=["\x1b"] * 12), "class_names.0: String should match pattern"),
    ((AnswersTwice(), tall()[1]), "must answer 2 images with logits [2, C], got tuple"),
    ((nn.Identity(), tall()[1]), "must answer 2 images with logits [2, C], got [2, 3, 2, 2]"),
    ((nn.Flatten(0), tall()[1]), "must answer 2 images with logits [2, C], got [24]"),
    ((NeedsContiguous(), tall()[1]), "Use .reshape(...) instead. The network must take float32 images [B, 3, H, W] in channels-last"),
    ((nn.Sequential(nn.Flatten(), nn.Linear(12, 3).half()), tall()[1]), "does not take images of 2 pixels: mat1 and mat2"),
    ((KeepsMore(), tall()[1]), "the teacher's state_dict must hold only tensors, _extra_state is int"),
]  # fmt: skip


def given() -> object:
    """What tests put in its place."""


@pytest.mark.parametrize(("result", "text"), RETURNED_WRONGLY, ids=[text[:40] for _, text in RETURNED_WRONGLY])
def test_what_a_function_returns_wrongly_is_said_in_one_line(monkeypatch, result, text):
    monkeypatch.setattr(importlib.import_module("test_teacher"), "given", lambda: result)
    with pytest.raises(TeacherError) as caught:
        teacher_of("test_teacher:given")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_function_need_not_say_anything_and_timms_configuration_speaks_for_it(monkeypatch):
    module = importlib.import_module("test_teacher")
    monkeypatch.setattr(module, "given", lambda: tall(input_size=[3, 2, 2], class_names=list("abcdefghijkl")))
    said = teacher_of("test_teacher:given").identity.members[0]
    assert (said.img_size, said.class_names) == (2, tuple("abcdefghijkl"))
    monkeypatch.setattr(module, "given", lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    silent = teacher_of("test_teacher:given")
    assert silent.identity.members[0].mean == (0.485, 0.456, 0.406)
    assert (silent.img_size, silent.crop_pct, silent.identity.class_names) == (224, 0.875, None)
    timms = network()
    timms.pretrained_cfg |= {"input_size": (3, 48, 48), "crop_pct": 0.9, "mean": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(module, "given", lambda: timms)
    teacher = teacher_of("test_teacher:given")
    assert (teacher.img_size, teacher.crop_pct, teacher.identity.members[0].mean) == (48, 0.9, (0.5, 0.5, 0.5))


FAILING = [
    # text of the module, error, what is said
    ("def f(:", UsageError, r"must be a function that can be imported: SyntaxError: .*\. Pass module:function, with the module in the current"),
    ("1 / 0", UsageError, "must be a function that can be imported: ZeroDivisionError: division by zero"),
    ("raise SystemExit('bye')", UsageError, "must be a function that can be imported: SystemExit: bye"),
    ("import no_such_package", UsageError, "ModuleNotFoundError: No module named 'no_such_package'"),
    ("f = 3", UsageError, "must name a function, got int"),
    ("def f(x): pass", TeacherError, r"failed: TypeError: f\(\) missing 1 required positional argument"),
    ("def f():\n  open('none.pth')", TeacherError, r"failed at line 2 of .*failing\.py: FileNotFoundError: .*'none\.pth'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "error", "said"), FAILING, ids=[text for text, *_ in FAILING])
def test_a_function_that_fails_is_said_in_one_line(tmp_path, monkeypatch, text, error, said):
    (tmp_path / "failing.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the current folder is added to it
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(error, match=said) as caught:
        teacher_of("failing:f")
    assert "\n" not in str(caught.value)
    sys.modules.pop("failing", None)


def test_a_checkpoint_for_a_function_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"which is a function\. Let the function load it"):
        teacher_of("support.builders:confident_cnn", checkpoint=tmp_path / "w.pth")


def test_a_missing_checkpoint_and_one_of_another_network_are_named(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        teacher_of("test_resnet", checkpoint=tmp_path / "nothing.pth")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(TeacherError, match=r"cannot load .* into teacher test_resnet") as caught:
        teacher_of("test_resnet", checkpoint=tmp_path / "other.safetensors")
    assert caught.value.fix == "Pass the --teacher that it was saved from"


def test_weights_that_cannot_be_fetched_are_one_line_with_a_fix(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError, match=r"cannot load teacher test_resnet.*--teacher-checkpoint") as caught:
        teacher_of("test_resnet")
    assert "\n" not in str(caught.value)


def test_any_function_can_give_a_teacher(tmp_path):
    teacher = small_teacher(open_source(write_tars(tmp_path / "data")))
    assert teacher.identity.name == "support.builders:confident_cnn"
    assert (teacher.identity.num_classes, teacher.identity.mean) == (3, (0.5, 0.5, 0.5))


def test_the_teacher_sees_its_own_size_and_normalisation():
    teacher = teacher_of("test_resnet", pretrained=False, num_classes=4, img_size=24)
    images = torch.randint(0, 256, (2, 3, 16, 16)).float()
    identity = teacher.identity
    larger = torch.nn.functional.interpolate(images, size=24, mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (identity.mean, identity.std))
    with torch.no_grad():
        expected = teacher.networks[0].module((larger - mean) / std)
    torch.testing.assert_close(teacher.logits(images)[0], expected, rtol=1e-5, atol=1e-5)


def test_answers_are_the_probabilities_at_temperature_1_most_probable_first():
    teacher = teacher_of("test_resnet", pretrained=False, num_classes=6, img_size=16)
    images = torch.randint(0, 256, (5, 3, 16, 16)).float()
    prob = teacher.logits(images)[0].softmax(1).detach().numpy()
    answer = ask(teacher, images, 4)
    np.testing.assert_array_equal(answer.hard, prob.argmax(1))
    np.testing.assert_array_equal(answer.topk_index, np.argsort(-prob, axis=1)[:, :4])
    np.testing.assert_allclose(answer.topk_prob, -np.sort(-prob, axis=1)[:, :4], atol=1e-7)
    assert ask(teacher, images, 0).topk_prob.shape == (5, 0)


class Overflows(nn.Module):
    """Infinite where it is asked in less than float32, or where a pixel is black."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        low = torch.is_autocast_enabled("cpu")
        logits = images.flatten(1)[:, :3].float()
        infinite = (logits[:, :1] > 0) if low else (logits[:, :1] < -2)
        return torch.where(infinite, torch.inf, logits)


def make_overflowing():
    return Overflows(), {"input_size": (3, 2, 2), "mean": (0.5,) * 3, "std": (0.1,) * 3}


def test_rows_that_overflow_are_computed_again_in_float32(caplog):
    teacher = teacher_of("test_teacher:make_overflowing", img_size=2, dtype="bfloat16")
    images = torch.full((2, 3, 2, 2), 120.0)
    images[1] = 200.0
    with caplog.at_level(logging.WARNING, logger="deit_cli"):
        answer = ask(teacher, images, 1)
    assert np.isfinite(answer.topk_prob).all()
    assert "1 views gave non-finite outputs in torch.bfloat16: computing them again in float32" in caplog.text


def test_rows_that_overflow_in_float32_too_are_an_error():
    teacher = teacher_of("test_teacher:make_overflowing", img_size=2, dtype="float32")
    with pytest.raises(NonFiniteTeacherError, match="answered NaN or infinity in float32"):
        ask(teacher, torch.stack([torch.full((3, 2, 2), 120.0), torch.zeros(3, 2, 2)]), 1)


def test_classes_must_fit():
    identity = teacher_of("test_resnet", pretrained=False, num_classes=3, img_size=16).identity
    check_classes(identity, CLASSES, 2)
    check_classes(identity, None, None)
    named = identity.model_copy(update={"class_names": ("ant", "cat", "bee")})
    for names, highest, teacher, text in [
        (CLASSES[:2], None, identity, "has 3 classes, the source has 2"),
        (None, 3, identity, "has 3 classes, the source has class labels up to 3"),
        (CLASSES, 2, named, "class 1 is 'bee' in the source and 'cat' for teacher test_resnet"),
    ]:
        with pytest.raises(TeacherError, match=text):
            check_classes(teacher, names, highest)


def mixed_batch(size: int, seed: int = 0) -> tuple[torch.Tensor, MixBatch]:
    """Random views, uint8 [size, 16, 16, 3], mixed pair by pair as in a run."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 16, 16, 3), dtype=torch.uint8, generator=rng)
    pairs = [(at, at + 1) for at in range(0, size, 2)]
    mixes = [draw_mix(small_recipe(), f"img-{at:04}", 0) for at, _ in pairs]
    return images, mix_batch(pairs, mixes, size)


def same_bits(one: Answer, other: Answer) -> bool:
    columns = ("hard", "topk_index", "topk_prob")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)


def test_answers_do_not_depend_on_the_batch_size_that_is_asked_or_on_the_number_of_threads():
    """Bit for bit: a run on two cores continues one on eight."""
    images, mix = mixed_batch(70)
    answers = []
    for threads, size in ((1, 2**16), (2, 2**16), (3, 8), (1, 2)):
        teacher = teacher_of("test_resnet", pretrained=False, num_classes=6, img_size=16)
        teacher.limit_threads(threads)
        teacher.limit_batch(size)
        with one_thread(teacher.device):
            answers.append(teacher.ask(images, mix, 4).result())
    assert len(np.unique(answers[0].hard)) > 1  # or the comparison would say little
    assert all(same_bits(answers[0], answer) for answer in answers[1:])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_teacher_on_a_cpu_never_answers_with_several_threads_an_operation(two_threads):
    teacher = teacher_of("test_resnet", pretrained=False, num_classes=6, img_size=16)
    with pytest.raises(RuntimeError, match="inside `with one_thread"):
        teacher.ask(*mixed_batch(4), 3)


def test_threads_that_begin_while_the_accuracy_is_measured_use_one_thread_an_operation(tmp_path, two_threads):
    """They stay for the labels, and with two they would split sums in another way than the threads that begin later."""
    teacher = teacher_of("test_resnet", pretrained=False, num_classes=6, img_size=16)
    measure_accuracy(teacher, open_source(write_tars(tmp_path / "data", (12,))), 64)
    assert teacher._pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2


def test_answers_come_in_the_order_of_the_views_however_many_are_on_their_way():
    teacher = teacher_of("test_resnet", pretrained=False, num_classes=6, img_size=16)
    alone = [teacher.ask(*mixed_batch(40, seed), 3).result() for seed in range(4)]
    teacher.limit_threads(4)
    pending = [teacher.ask(*mixed_batch(40, seed), 3) for seed in range(4)]
    for expected, waiting in zip(alone, reversed([each.result() for each in reversed(pending)]), strict=True):
        assert same_bits(expected, waiting)
    assert not same_bits(alone[0], alone[1])


@pytest.mark.parametrize("size", [64, 16, 6])
def test_the_path_of_a_gpu_gives_the_answers_of_the_pool(size):
    """What a GPU runs, on CPU tensors: no pool, passes of any size that are launched one after the other."""
    images, mix = mixed_batch(64)
    pool, direct = (teacher_of("test_resnet", pretrained=False, num_classes=6, img_size=16) for _ in range(2))
    direct._pool, direct.batch_size = None, size
    expected, found = (teacher.ask(images, mix, 4).result() for teacher in (pool, direct))
    np.testing.assert_allclose(found.topk_prob, expected.topk_prob, atol=1e-5)
    np.testing.assert_array_equal(found.hard, expected.hard)
    assert direct.busy_s > 0


@pytest.mark.parametrize(
    "no_memory",
    [
        torch.OutOfMemoryError("out of memory\nand a stack"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 MiB, max allowed: 7.93 GiB)"),
    ],
)
def test_a_pass_that_does_not_fit_is_halved_and_no_view_is_lost(caplog, no_memory):
    images, mix = mixed_batch(64)
    teacher = teacher_of("test_resnet", pretrained=False, num_classes=6, img_size=16)
    expected = teacher.ask(images, mix, 4).result()
    teacher._pool, teacher.batch_size = None, 64
    compute, sizes = teacher._compute, []

    def small_memory(images: torch.Tensor, *arguments):
        sizes.append(len(images))
        if len(images) > 20:
            raise no_memory
        return compute(images, *arguments)

    teacher._compute = small_memory
    with caplog.at_level(logging.WARNING, logger="deit_cli"):
        found = teacher.ask(images, mix, 4).result()
    assert sizes == [64, 32, 16, 16, 16, 16]
    assert "continuing with 16 views per forward pass" in caplog.text
    np.testing.assert_allclose(found.topk_prob, expected.topk_prob, atol=1e-5)


def test_several_teachers_answer_with_the_mean_of_their_probabilities():
    names = ("test_resnet", "support.builders:confident_cnn")
    single = [teacher_of(name, pretrained=False, num_classes=3, img_size=16) for name in names]
    both = teacher_of(*names, pretrained=False, num_classes=3, img_size=16)
    images, mix = mixed_batch(20)
    mixed = apply_mix(images, mix)
    prob = sum(teacher.logits(mixed)[0].detach().softmax(1).numpy() for teacher in single) / 2
    answer = both.ask(images, mix, 3).result()
    np.testing.assert_allclose(answer.topk_prob, -np.sort(-prob, axis=1), atol=1e-6)
    np.testing.assert_array_equal(answer.hard, prob.argmax(1))
    assert not np.array_equal(answer.hard, single[0].ask(images, mix, 3).result().hard)  # the other one is heard too


def test_the_identity_of_several_teachers_names_all_in_their_order():
    names = ("test_resnet", "support.builders:confident_cnn")
    options = {"pretrained": False, "num_classes": 3, "img_size": 16}
    both, turned, one = (teacher_of(*each, **options).identity for each in (names, names[::-1], names[:1]))
    assert [member.name for member in both.members] == list(names)
    assert all(name in both.name for name in names)
    assert both.members[0] == one
    assert len({both.id, one.id, turned.id}) == 3


def test_teachers_of_different_classes_are_refused():
    with pytest.raises(TeacherError, match="classes") as caught:
        teacher_of("test_resnet", "support.builders:confident_cnn", pretrained=False, num_classes=5, img_size=16)
    assert "\n" not in str(caught.value)
