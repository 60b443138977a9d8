"""Several label sets as one: against the dense mean of their answers, computed with loops in float64."""

import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import encoded, make_labels, photo, small_recipe, small_teacher, teacher_of, write_tars
from support.web_server import web_server
from torch import Tensor
from webdataset import TarWriter

from pipeline.errors import LabelSetMismatch, UsageError
from pipeline.images.source import open_source
from pipeline.labels.combined import Combination, CombinedLabels, open_labels, sets_of
from pipeline.labels.comparing import labelled_part
from pipeline.labels.encoding import Answers
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_replay
from pipeline.sharing.transfer import pull
from pipeline.storage.cache import Cache
from pipeline.storage.json import pretty_json
from pipeline.views.draws import stream_of
from trainer.losses import TeacherTarget, soft_distillation_loss

SIZES = (11, 7)
A, B, BOTH = "support.builders:confident_cnn", "test_resnet", ("support.builders:confident_cnn", "test_resnet")


# --- the slow reference -------------------------------------------------------------------------------------------------


def dense(index: list[int], prob: list[float], tail: float, num_classes: int, spread: bool) -> list[float]:
    """The target at temperature 1 that the loss makes of one stored row, all of its classes."""
    others = num_classes - len(index)
    target = [tail / others if spread and others else 0.0] * num_classes
    for each, value in zip(index, prob, strict=True):
        target[each] = value
    return [value / sum(target) for value in target]


def dense_rows(answers: Answers, num_classes: int, spread: bool) -> np.ndarray:
    rows = zip(answers.topk_index.tolist(), answers.topk_prob.tolist(), answers.tail_mass.tolist(), strict=True)
    return np.array([dense(*row, num_classes, spread) for row in rows])


def mean_of(sets: list[Answers], weights: tuple[float, ...], num_classes: int, spread: bool) -> np.ndarray:
    return sum(w * dense_rows(each, num_classes, spread) for w, each in zip(weights, sets, strict=True))


def made(seed: int, size: int, topk: int, num_classes: int, kind: str = "plain") -> Answers:
    """Answers of a teacher as they are stored; `kind` says what is special about them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(size, num_classes)) * 3
    if kind == "same":  # all teachers name the same classes, with other probabilities
        logits = np.sort(logits)[:, ::-1]
    full = np.exp(logits - logits.max(1, keepdims=True))
    full /= full.sum(1, keepdims=True)
    index = np.argsort(-full, axis=1)[:, :topk]
    prob = np.take_along_axis(full, index, axis=1)
    tail = np.clip(1 - prob.sum(1), 0, 1)
    if kind == "no tail":
        tail, prob = np.zeros(size), prob / prob.sum(1, keepdims=True)
    if kind == "zeros":  # what float16 makes of tiny probabilities
        prob = np.where(np.arange(topk) < 1, 1.0, 0.0) * np.ones((size, 1))
        tail = np.zeros(size)
    return Answers(
        index[:, 0].astype(np.uint16), index.astype(np.uint16), prob.astype(np.float16), tail.astype(np.float16)
    )


def combined(sets: list[Answers], weights: tuple[float, ...], num_classes: int, spread: bool, **more) -> Answers:
    kept = tuple(each.topk_index.shape[1] for each in sets)
    rule = Combination(weights, kept, num_classes, spread=spread, **more)
    row = np.arange(len(sets[0].hard), dtype=np.uint32)
    return rule.combine(rule.store(sets, "train-0", 3, row))


TABLE = [
    # K of each set, C, kind
    ((3, 3), 12, "plain"),
    ((4, 4), 40, "same"),  # the classes of both are the same: half of the row is filled up
    ((1, 1), 9, "plain"),
    ((1, 1), 2, "same"),
    ((2, 5), 30, "plain"),
    ((5, 2, 1), 30, "same"),
    ((6, 6), 10, "plain"),  # more than C together: every class is in the row
    ((5, 5), 10, "plain"),
    ((10, 10), 10, "plain"),
    ((10, 3), 10, "plain"),  # one set keeps all classes, the other has a tail
    ((3, 3), 12, "no tail"),
    ((3, 4), 20, "zeros"),
    ((7, 7), 7, "zeros"),
]


@pytest.mark.parametrize("spread", [True, False], ids=["spread", "renormalise"])
@pytest.mark.parametrize(("kept", "num_classes", "kind"), TABLE, ids=str)
def test_the_mean_has_the_target_of_every_class(kept, num_classes, kind, spread):
    sets = [made(seed, 8, topk, num_classes, kind) for seed, topk in enumerate(kept)]
    weights = tuple(np.arange(1.0, len(kept) + 1) / sum(range(1, len(kept) + 1)))
    found = combined(sets, weights, num_classes, spread)
    width = min(num_classes, sum(kept))
    assert found.topk_index.shape == found.topk_prob.shape == (8, width)
    assert all(len(set(row)) == width for row in found.topk_index.tolist())
    assert 0 <= found.topk_index.min() <= found.topk_index.max() < num_classes
    wanted = mean_of(sets, weights, num_classes, spread)
    np.testing.assert_allclose(dense_rows(found, num_classes, spread), wanted, rtol=1e-12, atol=0)
    assert (
        found.topk_prob[np.take_along_axis(wanted, found.topk_index, 1) == 0] == 0
    ).all()  # exactly: a tau raises it


def loss_of_dense(logits: Tensor, target: np.ndarray, tau: float) -> Tensor:
    """tau² KL(target at temperature tau || student), the mean over the rows."""
    target = torch.from_numpy(target ** (1 / tau))
    target = target / target.sum(1, keepdim=True)
    student = torch.log_softmax(logits / tau, dim=1)
    return tau**2 * (torch.xlogy(target, target) - target * student).sum(1).mean()


@pytest.mark.parametrize("tau", [0.25, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("spread", [True, False], ids=["spread", "renormalise"])
@pytest.mark.parametrize(("kept", "num_classes", "kind"), TABLE, ids=str)
def test_the_loss_and_its_gradient_are_those_of_the_mean_of_dense_targets(kept, num_classes, kind, spread, tau):
    sets = [made(10 + seed, 6, topk, num_classes, kind) for seed, topk in enumerate(kept)]
    weights = (0.7, 0.3) if len(kept) == 2 else (0.5, 0.3, 0.2)
    found = combined(sets, weights, num_classes, spread)
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(6, num_classes)) * 2)
    target = TeacherTarget(
        *(torch.from_numpy(np.asarray(v).astype(t)) for v, t in zip(found, (int, int, "f4", "f4"), strict=True))
    )
    mine, reference = logits.float().requires_grad_(), logits.clone().requires_grad_()
    loss = soft_distillation_loss(
        mine, target, tau=tau, tail="spread" if spread else "renormalise", reduction="batchmean"
    )
    wanted = loss_of_dense(reference, mean_of(sets, weights, num_classes, spread), tau)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=2e-5 * tau**2)
    torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=2e-5, atol=1e-6 * max(1, tau))


@st.composite
def cases(draw):
    num_classes = draw(st.integers(1, 40))
    kept = draw(st.lists(st.integers(1, num_classes), min_size=2, max_size=4))
    kinds = [draw(st.sampled_from(["plain", "same", "no tail", "zeros"])) for _ in kept]
    shares = draw(st.lists(st.floats(0.01, 10), min_size=len(kept), max_size=len(kept)))
    return num_classes, kept, kinds, tuple(share / sum(shares) for share in shares), draw(st.booleans())


@given(cases(), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_any_sets_have_the_mean_of_their_dense_targets(case, seed):
    num_classes, kept, kinds, weights, spread = case
    sets = [made(seed + i, 3, k, num_classes, kind) for i, (k, kind) in enumerate(zip(kept, kinds, strict=True))]
    found = combined(sets, weights, num_classes, spread)
    assert all(len(set(row)) == min(num_classes, sum(kept)) for row in found.topk_index.tolist())
    wanted = mean_of(sets, weights, num_classes, spread)
    np.testing.assert_allclose(dense_rows(found, num_classes, spread), wanted, rtol=1e-11, atol=1e-15)


# --- hard labels ----------------------------------------------------------------------------------------------------------

VOTES = [
    # the sets' hard labels, weights, the label
    ((1, 1), (0.5, 0.5), 1),
    ((2, 1), (0.5, 0.5), 2),  # equal: the first set
    ((2, 1), (0.3, 0.7), 1),
    ((2, 1, 1), (0.4, 0.3, 0.3), 1),  # together they have more
    ((2, 1, 1), (0.5, 0.25, 0.25), 2),  # equal: the set with the largest weight
    ((1, 1, 2), (0.25, 0.25, 0.5), 2),
    ((2, 1, 1), (0.3 / 0.6, 0.1 / 0.6, 0.2 / 0.6), 2),  # 0.1 + 0.2 is more than 0.3 only by rounding
    ((3, 2, 1), (1 / 3, 1 / 3, 1 / 3), 3),
    ((3, 2, 2, 3), (0.25, 0.25, 0.25, 0.25), 3),
]


@pytest.mark.parametrize(("hard", "weights", "label"), VOTES)
def test_the_hard_label_is_the_one_with_the_most_weight(hard, weights, label):
    empty = np.zeros((1, 0)), np.zeros((1, 0)), np.zeros(1)
    sets = [Answers(np.array([each]), *empty) for each in hard]
    found = combined(sets, weights, 5, True)
    assert (found.hard.tolist(), found.topk_index.shape, found.tail_mass.shape) == ([label], (1, 0), (1,))


# --- random ---------------------------------------------------------------------------------------------------------------


def drawn_by_hand(weights: tuple[float, ...], row: int, *, seed: int, shard: str, view: int) -> int:
    value = (int(stream_of("label set", str(seed), shard, str(view)).raw(row + 1)[row]) >> 11) / 2**53
    below = 0.0
    for number, weight in enumerate(weights):
        below += weight
        if value < below:
            return number
    return len(weights) - 1


def test_random_takes_a_whole_row_of_one_set():
    sets = [made(seed, 40, 3, 12) for seed in range(3)]
    weights, row = (0.5, 0.3, 0.2), np.arange(5, 125, 3, dtype=np.uint32)  # not every row is usable
    rule = Combination(weights, (3, 3, 3), 12, mode="random", seed=9)
    found = rule.combine(rule.store(sets, "train-1", 4, row))
    chosen = [drawn_by_hand(weights, int(each), seed=9, shard="train-1", view=4) for each in row]
    assert len(set(chosen)) == 3
    for at, number in enumerate(chosen):
        for mine, theirs in zip(found, sets[number], strict=True):
            assert mine[at].tolist() == theirs[at].tolist()


@pytest.mark.parametrize("spread", [True, False], ids=["spread", "renormalise"])
@pytest.mark.parametrize("kept", [(2, 5), (5, 1), (3, 12)])
def test_a_drawn_row_with_fewer_classes_is_filled_up(kept, spread):
    sets = [made(seed, 30, topk, 12, "same") for seed, topk in enumerate(kept)]
    found = combined(sets, (0.5, 0.5), 12, spread, mode="random")
    assert found.topk_index.shape == (30, max(kept))
    assert all(len(set(row)) == max(kept) for row in found.topk_index.tolist())
    either = [dense_rows(each, 12, spread) for each in sets]
    chosen = [drawn_by_hand((0.5, 0.5), at, seed=0, shard="train-0", view=3) for at in range(30)]
    wanted = np.array([either[number][at] for at, number in enumerate(chosen)])
    np.testing.assert_allclose(dense_rows(found, 12, spread), wanted, rtol=1e-12, atol=0)


def test_random_follows_the_weights_and_every_name_of_a_view():
    hard = [Answers(np.full(4000, each), np.zeros((4000, 0)), np.zeros((4000, 0)), np.zeros(4000)) for each in range(2)]
    row = np.arange(4000, dtype=np.uint32)

    def taken(seed=0, shard="a", view=0):
        return Combination((0.7, 0.3), (0, 0), 5, mode="random", seed=seed).store(hard, shard, view, row).hard.tolist()

    assert Counter(taken())[1] == pytest.approx(1200, abs=4 * (4000 * 0.7 * 0.3) ** 0.5)
    assert taken() == taken()
    assert len({tuple(taken(**change)) for change in ({}, {"seed": 1}, {"shard": "b"}, {"view": 1})}) == 4


# --- label sets -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), SIZES, unlabelled=5)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """Label sets a and b of two teachers, and ab of both together, each with all three classes."""
    folder = tmp_path_factory.mktemp("sets")
    for name, teachers in {"a": (A,), "b": (B,), "ab": BOTH}.items():
        teacher = teacher_of(*teachers, num_classes=3, pretrained=False, img_size=16)
        make_labels(folder / name, data, topk=3, teacher=teacher)
    return folder


def opened(folder: Path, *names: str, **more) -> CombinedLabels:
    found = open_labels([str(folder / name) for name in names], **more)
    assert isinstance(found, CombinedLabels)
    return found


def other_teacher(data: str):
    return small_teacher(open_source(data), num_classes=3)


def full(answers: Answers) -> np.ndarray:
    """All probabilities in the order of the classes."""
    prob = np.zeros(answers.topk_index.shape)
    np.put_along_axis(prob, answers.topk_index.astype(int), answers.topk_prob.astype(float), 1)
    return prob


def test_two_sets_are_the_set_that_both_teachers_make_together(folder):
    two, together = opened(folder, "a", "b"), LabelSet.open(folder / "ab")
    assert (two.recipe, two.views, two.shards) == (together.recipe, together.views, together.shards)
    assert (two.num_classes, two.class_names, two.is_part) == (3, together.class_names, False)
    apart = []
    for shard in two.shards:
        assert two.samples(shard).key == together.samples(shard).key
        for view in two.views:
            rows, wanted = two.read(shard, view), together.read(shard, view)
            np.testing.assert_array_equal(rows.row, wanted.row)
            found = two.combination.combine(rows.answers)
            np.testing.assert_allclose(full(found), full(wanted.answers), atol=1e-3)  # each was rounded to float16
            one, other = (full(LabelSet.open(folder / name).read(shard, view).answers) for name in "ab")
            apart.append(np.abs(one - other).max())
    assert min(apart) > 0.1  # the teachers do not agree


def test_one_set_stays_what_it_is(folder):
    one = open_labels([str(folder / "a")])
    assert isinstance(one, LabelSet)
    assert sets_of(one) == (one,)


def test_combined_sets_travel_to_other_processes(folder):
    two = opened(folder, "a", "b", mode="random", seed=4)
    again = pickle.loads(pickle.dumps(two))
    shard = two.shards[0]
    assert all(
        np.array_equal(x, y) for x, y in zip(two.read(shard, 1).answers, again.read(shard, 1).answers, strict=True)
    )


def test_a_set_with_hard_labels_only_leaves_hard_labels(folder, data, tmp_path):
    make_labels(tmp_path / "hard", data, topk=0, teacher=other_teacher(data))
    for mode in ("mean", "random"):
        two = open_labels([str(folder / "a"), str(tmp_path / "hard")], mode=mode)
        assert isinstance(two, CombinedLabels)
        rows = two.read(two.shards[0], 0)
        found = two.combination.combine(rows.answers)
        assert (found.hard.shape, found.topk_index.shape, found.tail_mass.shape) == ((11,), (11, 0), (11,))


def test_sets_have_in_common_what_all_have(folder, data, tmp_path, caplog):
    make_labels(tmp_path / "more", data, topk=2, views=(1, 6), teacher=other_teacher(data))
    pull(str(tmp_path / "more"), tmp_path / "part", shards=["train-000001"])
    caplog.clear()
    two = open_labels([str(folder / "a"), str(tmp_path / "part")])
    assert (two.views, two.shards, two.is_part) == (range(1, 3), ("train-000001",), True)
    assert caplog.messages == [
        f"the label sets have 2 ({folder / 'a'}) and 1 ({tmp_path / 'part'}) source shards: the student trains on those"
        " that all have, 1",
        f"the label sets have views 0:3 ({folder / 'a'}) and 1:6 ({tmp_path / 'part'}): the student trains on those that"
        " all have, 1:3",
    ]
    caplog.clear()
    source = open_source(data)
    assert [shard.name for shard in labelled_part(two, source).shards] == ["train-000001"]
    assert check_replay(two, source) == 0.0
    assert check_replay(two, labelled_part(two, source)) == 0.0  # the images of the other source shard are not needed
    assert caplog.messages == []


def test_a_set_whose_probes_are_elsewhere_is_named(folder, data, tmp_path, caplog):
    copy = shutil.copytree(folder / "b", tmp_path / "b")
    manifest = LabelSet.open(copy).manifest
    there = tuple(probe for probe in manifest.probes if probe.shard == "train-000000")
    changed = manifest.model_copy(update={"probes": there}).to_json()
    (copy / "manifest.json").write_bytes(pretty_json(changed))
    pull(str(folder / "a"), tmp_path / "part", shards=["train-000001"])
    two = open_labels([str(tmp_path / "part"), str(copy)])
    caplog.clear()
    check_replay(two, open_source(data))
    assert caplog.messages == [
        f"no replay probe of {copy} is in a source shard that all label sets have: no pixels were compared for it"
    ]


def test_images_come_from_the_first_set_that_has_them(folder, data, tmp_path):
    make_labels(tmp_path / "own", data, teacher=other_teacher(data), include_images="original", views=(0, 1))
    two = open_labels([str(folder / "a"), str(tmp_path / "own")])
    assert two.open_source().location == str(tmp_path / "own/images")
    assert two.open_source(data).location == data
    assert opened(folder, "a", "b").open_source().location == data
    assert check_replay(two, two.open_source()) == 0.0


# --- refusals -------------------------------------------------------------------------------------------------------------


def refusal(*locations: Path, **more) -> str:
    with pytest.raises(LabelSetMismatch) as caught:
        open_labels([str(each) for each in locations], **more)
    return str(caught.value)


@pytest.mark.parametrize(
    "weights", [(0, 1), (0, 0), (-1, 2), (float("nan"), 1), (float("inf"), 1), (1e308, 1e308), (1,), (1, 1, 1)]
)
def test_weights_of_which_no_mean_is_made_are_refused(folder, weights):
    with pytest.raises(UsageError, match=r"^weights must be 2 finite numbers above 0, one for each set, got \["):
        open_labels([str(folder / "a"), str(folder / "b")], weights=weights)


def test_other_views_are_refused_with_the_field_that_differs(folder, data, tmp_path):
    a = folder / "a"
    make_labels(tmp_path / "recipe", data, recipe=small_recipe(hflip=0.25), views=(0, 1))
    assert refusal(a, tmp_path / "recipe") == (
        f"{tmp_path / 'recipe'} has no answers for the views of {a} (recipe.hflip: 0.25, not 0.5)."
        " Pass label sets that were made from the same images with the same recipe"
    )
    make_labels(tmp_path / "source", write_tars(tmp_path / "images", (11, 8)), views=(0, 1))
    assert f"{tmp_path / 'source'} has no answers for the views of {a} (source.shards.0.keys_sha256: " in refusal(
        a, tmp_path / "source"
    )
    less = write_tars(tmp_path / "less", (11,), unlabelled=5)
    make_labels(tmp_path / "shards", less, views=(0, 1))
    assert "(source.shards: 1 entries, not 2)" in refusal(a, tmp_path / "shards")


def test_other_classes_are_refused(tmp_path):
    data = write_tars(tmp_path / "data", (8,))
    (tmp_path / "data/classes.txt").unlink()
    source = open_source(data)
    four = teacher_of(B, num_classes=4, pretrained=False, img_size=16)
    three = small_teacher(source, num_classes=3)
    make_labels(tmp_path / "three", data, teacher=three, views=(0, 1))
    make_labels(tmp_path / "four", data, teacher=four, views=(0, 1))
    assert "(classes.number: 4, not 3)" in refusal(tmp_path / "three", tmp_path / "four")
    sets = []
    for name, names in {"none": None, "abc": ("a", "b", "c"), "abd": ("a", "b", "d")}.items():
        teacher = small_teacher(source, num_classes=3)
        teacher.identity = teacher.identity.model_copy(update={"class_names": names, "name": name})
        sets.append(make_labels(tmp_path / name, data, teacher=teacher, views=(0, 1)).folder)
    assert "(classes.names.2: d, not c)" in refusal(sets[1], sets[2])
    both = open_labels([str(sets[0]), str(sets[1])])
    assert both.class_names == ("a", "b", "c")  # a teacher that does not know its classes does not contradict


def test_nothing_in_common_is_refused(folder, data, tmp_path):
    make_labels(tmp_path / "later", data, views=(3, 5), teacher=other_teacher(data))
    a, later = folder / "a", tmp_path / "later"
    assert refusal(a, later) == (
        f"no view is in all label sets, which have 0:3 ({a}) and 3:5 ({later})."
        " Label more views with deit-cli labels extend"
    )
    for number, name in enumerate("ab"):
        pull(str(folder / name), tmp_path / name, shards=[f"train-00000{number}"])
    assert refusal(tmp_path / "a", tmp_path / "b") == (
        f"no source shard is in all label sets, which have 1 ({tmp_path / 'a'}) and 1 ({tmp_path / 'b'}) source shards."
        " Fetch the same source shards of each with deit-cli labels pull --shards"
    )


def test_a_set_cannot_be_passed_twice(folder, tmp_path):
    copy = shutil.copytree(folder / "a", tmp_path / "copy")
    assert refusal(folder / "a", folder / "b", copy) == (
        f"{folder / 'a'} and {copy} are the same label set, or parts of it."
        " Pass each label set once; deit-cli labels merge joins parts"
    )


@pytest.mark.parametrize("how", ["bytes", "bad"])
def test_labels_of_other_pixels_are_refused(folder, data, tmp_path, how):
    """The source has the same keys and class labels, so it has the same id."""
    other, number = tmp_path / "other", 0
    shutil.copytree(data, other)
    for shard, size in enumerate(SIZES):
        with TarWriter(str(other / f"train-{shard:06}.tar"), mtime=0) as tar:
            for _ in range(size):
                image = encoded(photo(number + (100 if number == 13 and how == "bytes" else 0)))
                image = image[: len(image) // 2] if number == 13 and how == "bad" else image
                label = {"cls": str(number % 3).encode()} if number % 5 else {}
                tar.write({"__key__": f"img-{number:04}", "jpg": image, **label})
                number += 1
    make_labels(tmp_path / "set", str(other), on_bad_image="skip", teacher=other_teacher(data))
    two = open_labels([str(folder / "a"), str(tmp_path / "set")])
    assert two.samples("train-000000").key[0] == "img-0000"
    with pytest.raises(LabelSetMismatch) as caught:
        two.samples("train-000001")
    assert str(caught.value) == (
        f"image 'img-0013' of train-000001 had other bytes for {tmp_path / 'set'} than for {folder / 'a'}, or was bad for"
        " only one of them: they have no answers for the same pixels."
        " Pass label sets that were made from the same image files"
    )


def test_pins_belong_to_the_sets_in_order(folder):
    pins = [f"sha256:{LabelSet.open(folder / name).manifest_sha256}" for name in "ab"]
    assert opened(folder, "a", "b", pins=pins).views == range(3)
    assert f"{folder / 'a'}/manifest.json is not the pinned manifest" in refusal(
        folder / "a", folder / "b", pins=pins[::-1]
    )


# --- behind a URL -----------------------------------------------------------------------------------------------------------


def test_the_remote_files_of_all_sets_are_fetched(folder, tmp_path):
    with web_server(folder) as server:
        urls = [f"{server.url}/{name}" for name in "ab"]
        two = open_labels(urls, cache=Cache(tmp_path / "cache", 10**8))
        shard = two.shards[0]
        names = [file.url for file in two.remote_files(shard, 1)]
        wanted = [f"{url}/{kind}/{shard}.parquet" for url in urls for kind in ("samples", "labels/views-00000-00002")]
        assert names == wanted
        near = opened(folder, "a", "b")
        assert near.remote_files(shard, 1) == ()
        assert all(
            np.array_equal(x, y) for x, y in zip(two.read(shard, 1).answers, near.read(shard, 1).answers, strict=True)
        )
