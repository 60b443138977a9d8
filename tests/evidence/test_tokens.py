"""The two tokens of a student: their similarity at each block, what they look at, and the control experiment."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from support.builders import make_labels, small_recipe, write_tars
from support.training import TINY, assert_same_state
from torch import Tensor

from pipeline.errors import CheckpointError, UsageError
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.stage1.precompute import precompute
from pipeline.teacher.loading import load_teacher
from trainer.checkpoint import load_state, save_state
from trainer.config import AnalyseConfig, TrainConfig
from trainer.evidence.analyse import analyse, analysis_text
from trainer.evidence.demo import RECIPE, STUDENT, TEACHER, write_digits
from trainer.evidence.tokens import LinearCKA, TokenStatistics, patch_maps, token_attention
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.parallel import Running, World
from trainer.student import Student, create_student
from trainer.tokens import learned_tokens, probe_tokens, run_with_tokens, token_cosines, why_no_tokens
from trainer.trackers import scalars_of

HERE = Running(world=World(0, 1, torch.device("cpu"), 0), dtype=torch.float32, batch_size=8)


def exact(name: str, **settings: Any) -> Student:
    """Return a student in float64 whose every parameter is random, so that none of them hides behind a zero or a one."""
    torch.manual_seed(0)
    student = create_student(name, num_classes=5, **settings).double()
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return student.train()


def pictures(size: int, count: int = 3) -> Tensor:
    return 255 * torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- the same networks, written apart ---------------------------------------------------------------------------------


def plain_attention(block: Any, x: Tensor) -> Tensor:
    """Return softmax(q k' / sqrt d) of a block, [B, heads, N, N], with one loop over heads."""
    normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
    q, k, _ = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
    heads = block.attn.num_heads
    width = x.shape[-1] // heads
    rows = []
    for head in range(heads):
        of = slice(head * width, (head + 1) * width)
        scores = torch.einsum("bnd,bmd->bnm", q[..., of], k[..., of]) / width**0.5
        rows.append(scores.exp() / scores.exp().sum(dim=-1, keepdim=True))
    return torch.stack(rows, dim=1)


def plain_block(block: Any, x: Tensor) -> Tensor:
    rows = plain_attention(block, x)
    normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
    v = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)[2]
    parts = v.chunk(block.attn.num_heads, dim=-1)
    mixed = torch.cat([rows[:, head] @ part for head, part in enumerate(parts)], dim=-1)
    x = x + mixed @ block.attn.proj.weight.T + block.attn.proj.bias
    normed = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
    hidden = F.gelu(normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def normalised(student: Student, images: Tensor) -> Tensor:
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (student.mean, student.std))
    return (images - mean) / std


def plain_deit(student: Student, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return all tokens at the input, after each block and after the norm; and the attention of each block."""
    model = student.model
    patches = F.conv2d(
        normalised(student, images), model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.patch_embed.proj.stride
    )  # fmt: skip
    one = torch.ones(len(images), 1, 1, dtype=torch.float64)
    x = torch.cat([one * model.cls_token, one * model.dist_token, patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + model.pos_embed
    places, attention = [x], []
    for block in model.blocks:
        attention.append(plain_attention(block, x))
        x = plain_block(block, x)
        places.append(x)
    return [*places, F.layer_norm(x, x.shape[-1:], model.norm.weight, model.norm.bias, model.norm.eps)], attention


def plain_pit(student: Student, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the same of a PiT: three stages, between which tokens and patches change their width."""
    model = student.model
    x = F.conv2d(normalised(student, images), model.patch_embed.conv.weight, model.patch_embed.conv.bias, model.patch_embed.conv.stride)  # fmt: skip
    x, tokens = x + model.pos_embed, model.cls_token.expand(len(images), -1, -1)
    places, attention = [], []
    for number, stage in enumerate(model.transformers):
        if number:
            conv = stage.pool.conv
            x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
            tokens = tokens @ stage.pool.fc.weight.T + stage.pool.fc.bias
        shape = x.shape
        all_of_them = torch.cat([tokens, x.flatten(2).transpose(1, 2)], dim=1)
        places += [] if number else [all_of_them]
        for block in stage.blocks:
            attention.append(plain_attention(block, all_of_them))
            all_of_them = plain_block(block, all_of_them)
            places.append(all_of_them)
        tokens, x = all_of_them[:, :2], all_of_them[:, 2:].transpose(1, 2).reshape(shape)
    return [*places, F.layer_norm(tokens, tokens.shape[-1:], model.norm.weight, model.norm.bias, model.norm.eps)], attention  # fmt: skip


DEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "drop_path": 0.5}
STUDENTS = [("deit-ti", DEIT, plain_deit, 32), ("pit_ti_distilled_224", {"drop_path": 0.5}, plain_pit, 224)]


@pytest.mark.parametrize(("name", "settings", "plain", "size"), STUDENTS, ids=["deit", "pit"])
def test_both_tokens_are_those_of_a_forward_pass_written_apart(name, settings, plain, size):
    student, images = exact(name, **settings), pictures(size, 2)
    heads, tokens = run_with_tokens(student, images, HERE)
    with torch.no_grad():
        places, _ = plain(student, images)
    assert len(tokens) == len(places)
    for mine, theirs in zip(tokens, places, strict=True):
        torch.testing.assert_close(mine, theirs[:, :2], rtol=1e-9, atol=1e-9)
    expected = [
        [float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()) for a, b in (both for both in place[:, :2])] for place in places
    ]
    torch.testing.assert_close(token_cosines(tokens).T, torch.tensor(expected, dtype=torch.float64))
    last = places[-1]
    torch.testing.assert_close(heads.class_logits, last[:, 0] @ student.model.head.weight.T + student.model.head.bias)
    assert heads.distill_logits is not None
    torch.testing.assert_close(
        heads.distill_logits, last[:, 1] @ student.model.head_dist.weight.T + student.model.head_dist.bias
    )


@pytest.mark.parametrize(("name", "settings", "plain", "size"), STUDENTS, ids=["deit", "pit"])
def test_attention_is_the_mean_over_heads_of_the_softmax_of_queries_and_keys(name, settings, plain, size):
    student, images = exact(name, **settings), pictures(size, 2)
    with torch.no_grad():
        _, attention = plain(student, images)
    for block, expected in enumerate(attention):
        rows = token_attention(student, images, HERE, block)
        torch.testing.assert_close(rows.sum(dim=2), torch.ones(2, 2), rtol=0, atol=1e-6)
        torch.testing.assert_close(rows, expected[:, :, :2].mean(dim=1).float(), rtol=1e-5, atol=1e-7)


def test_a_look_at_a_student_leaves_it_as_it_was():
    student, images = exact("deit-ti", **DEIT), pictures(32)
    fused = [block.attn.fused_attn for block in student.model.blocks]
    before, state = {n: t.clone() for n, t in student.state_dict().items()}, torch.get_rng_state()
    token_attention(student, images, HERE, 2)
    probe_tokens(student, images, HERE)
    assert student.training
    assert torch.equal(state, torch.get_rng_state())
    assert [block.attn.fused_attn for block in student.model.blocks] == fused
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_maps_are_attention_by_row_of_patches_without_both_tokens():
    rows = torch.arange(2 * 2 * 11.0).reshape(2, 2, 11)
    maps = patch_maps(rows)
    assert maps.shape == (2, 2, 3, 3)
    assert [maps[1, 0, y, x] for y in range(3) for x in range(3)] == rows[1, 0, 2:].tolist()
    with pytest.raises(UsageError, match="square grids of patches, this block has 12 patches"):
        patch_maps(torch.zeros(1, 2, 14))


def test_learned_tokens_are_the_parameters_without_positions():
    deit, pit = exact("deit-ti", **DEIT), exact("pit_ti_distilled_224")
    assert torch.equal(learned_tokens(deit), torch.stack([deit.model.cls_token[0, 0], deit.model.dist_token[0, 0]]))
    assert torch.equal(learned_tokens(pit), pit.model.cls_token[0])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deit-ti", None),
        ("pit_ti_distilled_224", None),
        ("levit_128s", "same pooled features"),
        ("efficientformerv2_s0", "same pooled features"),
        ("swiftformer_xs", "same pooled features"),
        ("deit_tiny_patch16_224", "one head"),
        ("test_resnet", "one head"),
        ("repvit_m0_9", "one head"),  # timm averages its two heads inside the classifier
    ],
)
def test_a_student_without_a_second_token_says_why(name, why):
    student = create_student(name, num_classes=3)
    assert (why_no_tokens(student) is None) if why is None else (why in (why_no_tokens(student) or ""))


def test_every_network_of_timm_with_two_heads_is_known():
    """A new family of networks with a second head needs a look at `why_no_tokens` and `blocks_of`."""
    entries = ((name, timm.get_pretrained_cfg(name)) for name in timm.list_models())
    heads = {name: entry.classifier for name, entry in entries if entry is not None}
    names = [
        n for n, parts in heads.items() if isinstance(parts, tuple) and any(p.startswith("head_dist") for p in parts)
    ]
    families = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in names}
    assert families == {"deit", "pit", "levit", "efficientformer", "efficientformer_v2", "swiftformer"}


# --- CKA --------------------------------------------------------------------------------------------------------------


def textbook_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of linear kernels, from matrices of all pairs of images."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return float(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))


def test_cka_in_batches_is_the_formula_on_whole_matrices():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (40, 6))
    y = x @ rng.normal(size=(6, 6)) + rng.normal(-2, 2, (40, 6))
    cka = LinearCKA()
    for start, stop in ((0, 1), (1, 20), (20, 40)):
        cka.add(torch.from_numpy(x[start:stop]), torch.from_numpy(y[start:stop]))
    assert cka.value() == pytest.approx(textbook_cka(x, y), abs=1e-12)
    assert 0.1 < textbook_cka(x, y) < 0.95


def test_cka_is_one_for_rotated_features_and_none_for_constant_ones():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(30, 5)))
    rotation = torch.from_numpy(np.linalg.qr(rng.normal(size=(5, 5)))[0])
    rotated, constant = LinearCKA(), LinearCKA()
    rotated.add(x, 3 * x @ rotation + 7)
    constant.add(x, torch.full((30, 5), 0.1, dtype=torch.float64))
    assert rotated.value() == pytest.approx(1)
    assert constant.value() is None


def test_means_and_deviations_are_over_all_images_of_all_batches():
    tokens = [torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    statistics = TokenStatistics()
    for part in (slice(0, 4), slice(4, 7)):
        statistics.add([place[part] for place in tokens])
    found = statistics.summary()
    cosines = np.array([[np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in p.numpy()] for p in tokens])
    means, deviations = cosines.mean(axis=1), cosines.std(axis=1)
    assert found["images"] == 7
    assert [found["cosine"]["input"], *found["cosine"]["blocks"], found["cosine"]["output"]] == pytest.approx(means, abs=1e-6)  # fmt: skip
    assert [*found["std"]["blocks"], found["std"]["output"]] == pytest.approx(deviations[1:], abs=1e-6)


# --- in a training run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16))


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data)


def config(output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"batch_size": 12, "epochs": 3, "warmup_epochs": 1, "lr": 1e-3, "workers": 0}
    return TrainConfig(output=str(output), **(values | {"log_interval": 1} | TINY | changes))


CONTROL = {"distillation_type": "none", "second_token": "class"}


def test_a_probe_does_not_change_the_training(label_set, tmp_path):
    settings = {"labels": str(label_set.folder), "drop_path": 0.3, "repeated_aug": 1}
    plain = train(config(tmp_path / "plain", **settings))
    probed = train(config(tmp_path / "probed", **settings, probe_interval=2))
    assert_same_state(plain, probed)
    lines = read_metrics(probed)
    assert [line["index"] for line in lines if line["kind"] == "tokens"] == [1, 3, 5, 7]
    assert [line["index"] for line in lines if line["kind"] == "train"] == list(range(9))
    for line in lines:
        if line["kind"] == "tokens":
            assert len(line["blocks"]) == TINY["depth"]
            assert all(-1 <= each <= 1 for each in (line["input"], *line["blocks"], line["output"]))
            assert line["images"] == 12
    assert not [line for line in read_metrics(plain) if line["kind"] == "tokens"]


def test_a_probe_is_a_point_of_a_curve_for_each_place(label_set, tmp_path):
    values = {"epoch": 0, "step": 3, "images": 12, "input": 0.1, "blocks": [0.2, 0.3], "output": 0.4}
    assert scalars_of("tokens", values) == {
        "tokens/input": 0.1,
        "tokens/blocks_1": 0.2,
        "tokens/blocks_2": 0.3,
        "tokens/output": 0.4,
    }


def test_a_probe_of_a_student_that_diverged_is_null(tmp_path):
    from trainer.metrics import open_recorder

    student = create_student("deit-ti", num_classes=3, **(DEIT | {"drop_path": 0.0}))
    student.model.blocks[1].mlp.fc2.bias.data.fill_(float("nan"))
    with open_recorder(tmp_path, next_index=0) as recorder:
        recorder.add("tokens", 0, **probe_tokens(student, pictures(32).float(), HERE))
    (line,) = read_metrics(tmp_path)
    assert (line["blocks"][0] is None, line["blocks"][1:], line["output"]) == (False, [None, None], None)


def test_the_control_trains_both_heads_on_the_class_labels(data, tmp_path, caplog):
    caplog.set_level("INFO", logger="deit_cli")
    settings = CONTROL | {"data": data, "eval_data": data, "drop_path": 0.0}
    run = train(config(tmp_path / "run", **settings), small_recipe())
    assert "the second head of deit-ti learns the class labels too" in caplog.text
    assert "stays untrained" not in caplog.text
    lines = read_metrics(run)
    for line in (line for line in lines if line["kind"] == "train"):
        assert line["loss"] == pytest.approx((line["class_loss"] + line["second_class_loss"]) / 2, rel=1e-5)
        assert "teacher_agreement" not in line
    for line in (line for line in lines if line["kind"] == "eval"):
        assert line["top1"] == line["scores"]["mean_logits"]["top1"]
    first = create_student("deit-ti", num_classes=3, img_size=16, **{k: v for k, v in TINY.items() if k != "model"})
    torch.manual_seed(0)
    first = create_student("deit-ti", num_classes=3, img_size=16, **{k: v for k, v in TINY.items() if k != "model"})
    after = load_state(run / "state.safetensors")[0]
    for name in ("head.weight", "head_dist.weight", "dist_token", "cls_token"):
        assert not torch.equal(after[f"model.{name}"], first.model.state_dict()[name]), name


def test_without_the_control_the_second_head_stays_as_it_was(data, tmp_path, caplog):
    run = train(config(tmp_path / "run", distillation_type="none", data=data, eval_data=data), small_recipe())
    assert "stays untrained" in caplog.text
    torch.manual_seed(0)
    first = create_student("deit-ti", num_classes=3, img_size=16, **{k: v for k, v in TINY.items() if k != "model"})
    after = load_state(run / "state.safetensors")[0]
    assert torch.equal(after["model.head_dist.bias"], first.model.state_dict()["head_dist.bias"])
    for line in (line for line in read_metrics(run) if line["kind"] == "eval"):
        assert line["top1"] == line["scores"]["class_head"]["top1"]


def test_the_control_on_a_label_set_sees_its_views_and_not_its_answers(label_set, tmp_path):
    run = train(config(tmp_path / "run", labels=str(label_set.folder), **CONTROL, epochs=1))
    assert {"class_loss", "second_class_loss"} <= read_metrics(run)[0].keys()
    assert "distill_loss" not in read_metrics(run)[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"second_token": "class"}, "--second-token class needs --distillation-type none: both heads then learn the"),
        ({"second_token": "classes"}, "--second-token must be one of distillation, class, got 'classes'"),
        (CONTROL | {"model": "deit_tiny_patch16_224"}, "needs a student with two heads, deit_tiny_patch16_224 has one"),
        ({"probe_interval": 1, "model": "deit_tiny_patch16_224"}, "--probe-interval compares two tokens, and"),
    ],
)
def test_what_the_control_and_the_probe_need_is_said(label_set, tmp_path, changes, text):
    with pytest.raises(UsageError, match=text) as refused:
        train(config(tmp_path / "run", labels=str(label_set.folder), **changes))
    assert "leave out" in str(refused.value) or "must be one of" in str(refused.value)


def test_a_state_from_before_the_control_continues_and_does_not_become_one(data, tmp_path):
    settings = {"data": data, "distillation_type": "none"}
    run = train(config(tmp_path / "run", **settings), small_recipe())
    tensors, meta = load_state(run / "state.safetensors")
    del meta["config"]["second_token"]
    save_state(run / "state.safetensors", tensors, meta)
    train(config(run, **settings, resume="auto"), small_recipe())
    with pytest.raises(CheckpointError, match=r"belongs to a run with other settings.*--second-token"):
        train(config(run, **settings, resume="auto", second_token="class"), small_recipe())


# --- the command ------------------------------------------------------------------------------------------------------


def test_an_analysis_has_the_course_of_the_training_and_the_cosines_at_its_end(label_set, data, tmp_path):
    run = train(config(tmp_path / "run", labels=str(label_set.folder), probe_interval=3))
    result = analyse([str(run)], AnalyseConfig(data=data, workers=0, batch_size=16, out=tmp_path / "out", attention=2))
    (entry,) = result["runs"]
    tokens = entry["tokens"]
    probes = [line for line in read_metrics(run) if line["kind"] == "tokens"]
    assert tokens["along_training"] == [
        {"update": line["index"] + 1, **{n: line[n] for n in ("epoch", "input", "blocks", "output")}} for line in probes
    ]
    assert (tokens["images"], len(tokens["cosine"]["blocks"]), len(tokens["std"]["blocks"])) == (40, 2, 2)
    assert tokens["cosine"]["input"] == pytest.approx(probes[-1]["input"], abs=1e-6)  # probed after the last update
    assert json.loads((tmp_path / "out/analysis.json").read_text()) == json.loads(json.dumps(result))
    assert (result["kind"], result["version"]) == ("analysis", 1)
    assert [drawn["picture"] for drawn in result["attention"]] == ["attention-run.png"] * 2
    assert (tmp_path / "out/attention-run.png").read_bytes().startswith(b"\x89PNG")
    text = analysis_text(result)
    assert "block 2" in text
    assert "cosine of the outputs along the training" in text


def test_without_images_an_analysis_shows_what_needs_none(label_set, tmp_path):
    run = train(config(tmp_path / "run", labels=str(label_set.folder), epochs=1))
    result = analyse([str(run)], AnalyseConfig())
    (entry,) = result["runs"]
    assert (result["disagreement"], result["attention"]) == (None, [])
    assert entry["tokens"]["cosine"]["blocks"] is None
    assert -1 <= entry["tokens"]["cosine"]["learned"] <= 1
    assert "learned tokens" in analysis_text(result)
    assert "block 1" not in analysis_text(result)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, LabelSet]:
    """797 digits with class labels, and the answers of a CNN that learned for 20 epochs from 100 others: seven of ten agree."""
    folder = tmp_path_factory.mktemp("digits")
    torch.set_num_threads(1)
    images, recipe = write_digits(folder / "data"), load_recipe("deit", RECIPE)
    settings: dict[str, Any] = TEACHER | {"epochs": 20, "warmup_epochs": 1, "model_ema": False, "workers": 0}
    teacher = train(TrainConfig(output=str(folder / "teacher"), data=str(images["labelled"]), distillation_type="none", **settings), recipe)  # fmt: skip
    source = open_source(images["evaluation"])
    loaded = load_teacher(TeacherConfig(teacher=(str(teacher / "last"),), device="cpu"))
    asked = PrecomputeConfig(data=str(images["evaluation"]), out=str(folder / "labels"), views=(0, 10), workers=0)
    label_set = precompute(asked, recipe, loaded, source)
    assert label_set is not None
    torch.set_num_threads(1)
    return images["evaluation"], label_set


@pytest.mark.slow
def test_two_class_tokens_become_the_same_and_a_distillation_token_does_not(digits, tmp_path):
    """The control of DeiT's section 4, small: 990 updates instead of 375,000. There: 0.999 and 0.93.

    With seeds 0 to 3 the control came to 0.993 to 0.999, and with seeds 0 to 2 the distilled student to 0.969 to 0.981. After
    396 updates it is too early: with seeds 0 and 2 the control was at 0.57 and 0.46.
    """
    data, label_set = digits
    common: dict[str, Any] = STUDENT | {"labels": str(label_set.folder), "model": "deit-ti", "epochs": 30, "model_ema": False, "workers": 0}  # fmt: skip
    runs = [
        train(TrainConfig(output=str(tmp_path / name), **common, **more))
        for name, more in (("control", CONTROL), ("hard", {}))
    ]
    result = analyse([str(run) for run in runs], AnalyseConfig(data=str(data), workers=0, crop_pct=1.0))
    control, hard = (entry["tokens"]["cosine"]["output"] for entry in result["runs"])
    assert control > 0.99 > hard
    ckas = [entry["tokens"]["cka"] for entry in result["runs"]]
    assert ckas[0] > ckas[1]
    names, share = result["disagreement"]["names"], result["disagreement"]["share"]
    differ = {name: dict(zip(names, row, strict=True)) for name, row in zip(names, share, strict=True)}
    assert (
        differ["control class_head"]["control distillation_head"] < differ["hard class_head"]["hard distillation_head"]
    )
