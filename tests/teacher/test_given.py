"""Teachers that are objects: what is known of them is recorded, and what they answer wrongly is said."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.builders import confident_cnn
from torch import Tensor, nn

from pipeline.errors import DeitCliError, TeacherError, UsageError
from pipeline.labels.format import NO_WEIGHTS
from pipeline.settings.configs import TeacherConfig
from pipeline.teacher.given import given_teacher, packed
from pipeline.teacher.loading import load_teacher, weights_sha256
from pipeline.teacher.teacher import Teacher

ABOUT: dict[str, Any] = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def loaded(answer: Any, about: dict[str, Any] = ABOUT, **more: Any) -> Teacher:
    naming = {key: more.pop(key) for key in ("name", "version") if key in more}
    naming = naming if isinstance(answer, nn.Module) else {"name": "own", "version": "1"} | naming
    return load_given(answer, about, naming, **more)


def load_given(answer: Any, about: dict[str, Any], naming: dict[str, Any], **more: Any) -> Teacher:
    given = given_teacher(answer, about=about, **naming)
    return load_teacher(TeacherConfig(teacher=(given.name,), **more), device="cpu", given=given)


def first_pixels(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :3] * 2


def test_a_network_is_known_by_its_class_and_the_hash_of_its_weights():
    network, _ = confident_cnn()
    (identity,) = loaded(network).identity.members
    assert (identity.name, identity.num_classes, identity.img_size) == ("module/Sequential", 3, 16)
    assert identity.weights_sha256 == weights_sha256(network)
    assert loaded(network, name="ants", version="2").identity.name == "module/ants@2"


def test_of_a_function_no_weights_are_claimed_and_its_version_is_part_of_its_identity():
    one, same, other = (loaded(first_pixels, version=version).identity for version in ("1", "1", "2"))
    assert one.name == "callable/own@1"
    assert one.members[0].weights_sha256 == NO_WEIGHTS == weights_sha256(nn.Module())
    assert one.id == same.id != other.id


def test_the_network_that_was_passed_is_left_as_it_was():
    network, _ = confident_cnn()
    network.train()
    before = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    teacher = loaded(network)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == before
    assert not teacher.networks[0].module.training


def test_what_timm_says_of_a_network_counts_unless_the_program_says_otherwise():
    network, _ = confident_cnn()
    network.pretrained_cfg = {"input_size": (3, 20, 20), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}  # pyright: ignore
    identity = loaded(network, {"mean": (0.4, 0.4, 0.4)}).identity.members[0]
    assert (identity.img_size, identity.mean, identity.std) == (20, (0.4, 0.4, 0.4), (0.5, 0.5, 0.5))


def test_a_function_runs_in_float32_and_a_network_as_asked():
    assert loaded(first_pixels).config.dtype == "float32"
    assert loaded(first_pixels, dtype="bfloat16").dtype == torch.bfloat16
    assert loaded(confident_cnn()[0]).config.dtype == "auto"
    with pytest.raises(UsageError, match="compile is for networks, and teacher callable/own@1 is a function"):
        loaded(first_pixels, compile=True)


def trained_in_half() -> nn.Module:
    return confident_cnn()[0].half()


class Drops(nn.Module):
    """A network with dropout that is on in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * 16 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner(images.flatten(1)), training=True)


class FromAList(nn.Module):
    """A network that hides its weights from state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(3 * 16 * 16, 3)]

    def forward(self, images: Tensor) -> Tensor:
        return self.hidden[0](images.flatten(1))


def of(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda images: change(first_pixels(images))


ANSWERED_WRONGLY = [
    # the teacher, what is said
    (
        of(lambda x: (x, x)),
        r"must answer 2 images with one tensor of logits \[2, C\], got tuple of Tensor, Tensor\. Return the",
    ),
    (of(lambda x: {"logits": x}), r"one tensor of logits \[2, C\], got dict\."),
    (of(lambda x: x.numpy()), r"got ndarray\. Return the logits alone, as a torch\.Tensor"),
    (of(lambda x: x[0]), r"logits \[2, C\], got \[3\]"),
    (of(lambda x: x[:1]), r"logits \[2, C\], got \[1, 3\]"),
    (of(lambda x: x.argmax(1)), r"logits \[2, C\], got \[2\]"),
    (of(lambda x: x.long()), r"floating-point logits, got torch\.int64"),
    (of(lambda x: x.half()), r"float32 logits, got torch\.float16: the label set records the precision"),
    (
        of(lambda x: x.to("meta")),
        r"on the device of the images, cpu, got logits on meta\. Return logits\.to\(images\.device\)",
    ),
    (of(lambda x: x * torch.nan), "answered NaN or infinity for a trial image"),
    (
        of(lambda x: x.softmax(1)),
        "must answer with logits, got probabilities: none is negative, and each row sums to 1",
    ),
    (of(lambda x: x @ x), r"does not answer float32 images \[2, 3, 16, 16\] on cpu: "),
    (of(lambda x: x + torch.rand(3)), "answered the same images twice with other logits"),
    (Drops(), "twice with other logits.*Switch the network to evaluation mode"),
    (trained_in_half(), r"does not answer float32 images .*Its weights are torch\.float16: pass network\.float\(\)"),
    (nn.DataParallel(confident_cnn()[0]), "is wrapped by DataParallel. Pass the network inside it"),
    (torch.compile(confident_cnn()[0]), "is wrapped by OptimizedModule.*compile=True"),
]


@pytest.mark.parametrize(("answer", "text"), ANSWERED_WRONGLY, ids=range(len(ANSWERED_WRONGLY)))
def test_a_wrong_answer_is_said_before_anything_is_labelled(answer, text):
    with pytest.raises(TeacherError, match=text) as caught:
        loaded(answer)
    assert "\n" not in str(caught.value)


def test_log_probabilities_are_logits():
    """The way out that the error for probabilities names: their softmax is the same."""
    assert loaded(of(lambda x: x.softmax(1).log())).identity.num_classes == 3


def test_an_answer_with_another_number_of_classes_later_is_refused():
    def by_batch(images: Tensor) -> Tensor:
        return images.flatten(1)[:, : 3 if len(images) == 2 else 4] * 2

    teacher = loaded(by_batch)
    with pytest.raises(TeacherError, match=r"must answer 5 images with one tensor of logits \[5, 3\], got \[5, 4\]"):
        teacher.logits(torch.zeros(5, 3, 16, 16))


def test_autocast_may_answer_in_half_precision():
    assert loaded(confident_cnn()[0], dtype="bfloat16").logits(torch.zeros(2, 3, 16, 16))[0].dtype == torch.float32


SAID_WRONGLY = [
    # the teacher, naming, what is said of it, what is said
    (first_pixels, {}, {}, r"no weights of a function can be seen .* pass name= and version=, got name=None and version=None"),
    (first_pixels, {"name": "a"}, {}, r"got name='a' and version=None"),
    (FromAList(), {"name": "a"}, {}, r"no weights of FromAList can be seen .*got version=None"),
    (first_pixels, {"name": "a b", "version": "1"}, {}, r"name must be up to 200 letters.*got 'a b'"),
    (first_pixels, {"name": "a", "version": 1}, {}, r"version must be up to 200 letters.*got 1"),
    (nn.Linear, {}, {}, r"got the class Linear: pass an object of it"),
    (3, {}, {}, r"must be a name, a torch\.nn\.Module or a function from images to logits, got int"),
    (confident_cnn()[0], {}, {"mean": 0.5}, r"mean must be three numbers in 0\.\.1"),
    (confident_cnn()[0], {}, {"std": (58, 57, 57)}, r"std must be three numbers above 0 and at most 1"),
    (confident_cnn()[0], {}, {"crop_pct": 87.5}, r"crop_pct must be in 0\.01\.\.1"),
    (confident_cnn()[0], {}, {"class_names": ["a", "b"]}, r"2 class names for 3 classes"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "naming", "about", "text"), SAID_WRONGLY, ids=range(len(SAID_WRONGLY)))
def test_what_is_said_of_a_teacher_is_checked(answer, naming, about, text):
    with pytest.raises(DeitCliError, match=text):
        load_given(answer, ABOUT | about, naming)


def test_a_packed_teacher_is_the_same_teacher():
    given = given_teacher(confident_cnn()[0], about=ABOUT)
    config = TeacherConfig(teacher=(given.name,))
    one, other = (load_teacher(config, device="cpu", given=each) for each in (given, pickle.loads(packed(given))))
    assert one.identity == other.identity


def test_what_cannot_be_sent_to_other_processes_is_said(monkeypatch):
    with pytest.raises(UsageError, match=r"callable/own@1 cannot be sent to several .*lambda.*or pass processes=1"):
        packed(given_teacher(lambda images: images, name="own", version="1", about=ABOUT))
    monkeypatch.setattr(first_pixels, "__module__", "__main__")
    monkeypatch.delattr("__main__.__file__", raising=False)  # as in a notebook
    with pytest.raises(UsageError, match="first_pixels is defined in a notebook or an interactive session"):
        packed(given_teacher(first_pixels, name="own", version="1", about=ABOUT))
