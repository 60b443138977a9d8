"""Training from stored labels is training with the teacher online on the same views: equal losses, step by step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.builders import make_labels, small_recipe, small_teacher, write_tars

from pipeline.images.source import open_source
from pipeline.labels.encoding import LOG8_STEP
from pipeline.labels.labelset import LabelSet
from pipeline.teacher.teacher import Teacher
from trainer.config import TrainConfig
from trainer.losses import LossSettings, TeacherTarget, distillation_loss
from trainer.metrics import read_metrics
from trainer.optim import create_optimizer
from trainer.run import make_order, open_data
from trainer.stream import Batch, BatchRenderer, Catalogue, mixed_images, stream_batches
from trainer.student import Student, create_student, normalise

STEPS = 12
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CPU = torch.device("cpu")


def stored(batch: Batch, _: Teacher) -> TeacherTarget:
    assert batch.teacher is not None
    return batch.teacher


def online(batch: Batch, teacher: Teacher) -> TeacherTarget:
    """Run the teacher now, on the batch as the student sees it, and keep everything that it says."""
    with torch.no_grad():
        prob, index = teacher.logits(mixed_images(batch, CPU))[0].softmax(1).sort(dim=1, descending=True)
    return TeacherTarget(index[:, 0], index, prob, torch.zeros(len(prob)))


def losses_of(label_set: LabelSet, teacher: Teacher, target_of, **settings) -> list[float]:
    """Train a small student for some steps on replayed views, with targets from `target_of`; return the losses."""
    config = TrainConfig(labels=label_set.folder, batch_size=8, epochs=STEPS, warmup_epochs=0, **settings)
    data = open_data(config)
    order = make_order(config, data)
    renderer = BatchRenderer(Catalogue(data.source, label_set), data.recipe, order)
    torch.manual_seed(0)
    student = create_student("deit-ti", num_classes=label_set.num_classes, img_size=16, **TINY).train()
    _spread_heads(student)
    optimizer = create_optimizer(student, lr=1e-3, weight_decay=0.05, fused=False)
    losses: list[float] = []
    for batch in stream_batches(renderer, range(STEPS), workers=0):
        heads = student(normalise(mixed_images(batch, CPU), student))
        loss, _ = distillation_loss(
            heads.class_logits,
            heads.distill_logits,
            batch.classes,
            target_of(batch, teacher),
            LossSettings.of(config),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _spread_heads(student: Student) -> None:
    """DeiT's heads start at zero, where every target gives one loss; start from answers that differ."""
    for head in (student.model.head, student.model.head_dist):
        torch.nn.init.normal_(head.weight, std=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16))


@pytest.fixture(scope="module")
def teacher(data) -> Teacher:
    return small_teacher(open_source(data))


def labels(tmp_path: Path, data: str, **settings) -> LabelSet:
    return make_labels(tmp_path / "set", data, recipe=small_recipe(), **settings)


def test_hard_labels_give_exactly_the_losses_of_the_online_teacher(data, teacher, tmp_path):
    label_set = labels(tmp_path, data, topk=0)
    mine, theirs = (losses_of(label_set, teacher, t, distillation_type="hard") for t in (stored, online))
    assert mine == theirs
    assert len(set(mine)) == STEPS


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_labels_of_all_classes_give_the_losses_of_the_online_teacher_to_1e_5(data, teacher, tmp_path, tau):
    label_set = labels(tmp_path, data, topk=3, precision="float32")
    settings = {"distillation_type": "soft", "distillation_tau": tau}
    mine, theirs = (losses_of(label_set, teacher, t, **settings) for t in (stored, online))
    assert mine == pytest.approx(theirs, abs=1e-5)


def test_float16_costs_no_more_than_its_rounding(data, teacher, tmp_path):
    label_set = labels(tmp_path, data, topk=3)
    mine, theirs = (losses_of(label_set, teacher, t, distillation_type="soft") for t in (stored, online))
    assert mine == pytest.approx(theirs, abs=2e-3)


def test_log8_costs_no_more_than_half_a_step_of_each_logit(data, teacher, tmp_path):
    """All classes are kept, so any difference is that of the codes; hard labels have none."""
    label_set = labels(tmp_path, data, topk=3, precision="log8")
    mine, theirs = (losses_of(label_set, teacher, t, distillation_type="hard") for t in (stored, online))
    assert mine == theirs
    settings = {"distillation_type": "soft", "distillation_alpha": 1.0}
    mine, theirs = (losses_of(label_set, teacher, t, **settings)[0] for t in (stored, online))
    batch, logs = first_batch(label_set)
    full, kept = online(batch, teacher), stored(batch, teacher)
    p, q = (torch.zeros(len(batch.keys), 3).scatter_(1, t.topk_index, t.topk_prob) for t in (full, kept))
    ratio = (p / q).log()
    assert (
        ratio - ratio.max(1, keepdim=True).values
    ).abs().max() <= LOG8_STEP + 1e-4  # half a step up, half a step down
    entropy = [-(x * x.clamp_min(1e-30).log()).sum(1) for x in (p, q)]
    allowed = (entropy[0] - entropy[1]).abs() + (p - q).abs().sum(1) * logs.abs().max(1).values
    assert 0 < abs(mine - theirs) <= allowed.mean().item() + 1e-5


@pytest.mark.parametrize("tail", ["spread", "renormalise"])
def test_a_cut_tail_costs_no_more_than_the_tail_policy_says(data, teacher, tmp_path, tail):
    """With K < C the loss differs by how far the policy's tail is from the true one.

    For a teacher p and its reconstruction q, |KL(p||s) - KL(q||s)| <= |H(p) - H(q)| + sum |p - q| * max |log s|:
    the bound is computed for every first-step batch from the full answers, with the student's own log-probabilities.
    """
    label_set = labels(tmp_path, data, topk=2, precision="float32")
    settings = {"distillation_type": "soft", "tail": tail, "distillation_alpha": 1.0}
    mine, theirs = (losses_of(label_set, teacher, t, **settings)[0] for t in (stored, online))
    batch, logs = first_batch(label_set)
    full, kept = online(batch, teacher), stored(batch, teacher)
    p = torch.zeros(len(batch.keys), 3).scatter_(1, full.topk_index, full.topk_prob)
    q = torch.zeros_like(p).scatter_(1, kept.topk_index, kept.topk_prob)
    if tail == "spread":
        q = torch.where(q == 0, kept.tail_mass[:, None], q)
    q = q / q.sum(1, keepdim=True)
    entropy = [-(x * x.clamp_min(1e-30).log()).sum(1) for x in (p, q)]
    allowed = (entropy[0] - entropy[1]).abs() + (p - q).abs().sum(1) * logs.abs().max(1).values
    assert abs(mine - theirs) <= allowed.mean().item() + 1e-5
    if tail == "spread":  # one class is left: the spread tail is the whole truth
        assert mine == pytest.approx(theirs, abs=1e-5)
    else:
        assert mine != pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("tail", ["spread", "renormalise"])
def test_ten_of_thirty_classes_cost_no_more_than_the_tail_policy_says(tmp_path, tail):
    """The same bound where the tail has many classes: K = 10 as it is stored by default, float16 too."""
    data = write_tars(tmp_path / "data", (24, 16))
    (tmp_path / "data/classes.txt").unlink()  # the source no longer says that there are three
    teacher = small_teacher(open_source(data), num_classes=30)
    label_set = labels(tmp_path, data, teacher=teacher, topk=10)
    settings = {"distillation_type": "soft", "tail": tail, "distillation_alpha": 1.0}
    mine, theirs = (losses_of(label_set, teacher, t, **settings)[0] for t in (stored, online))
    batch, logs = first_batch(label_set)
    full, kept = online(batch, teacher), stored(batch, teacher)
    p = torch.zeros_like(logs).scatter_(1, full.topk_index, full.topk_prob)
    rest = kept.tail_mass[:, None] / 20 if tail == "spread" else torch.zeros(len(logs), 1)
    q = rest.expand_as(logs).scatter(1, kept.topk_index, kept.topk_prob)
    q = q / q.sum(1, keepdim=True)
    entropy = [-(x * x.clamp_min(1e-30).log()).sum(1) for x in (p, q)]
    allowed = (entropy[0] - entropy[1]).abs() + (p - q).abs().sum(1) * logs.abs().max(1).values
    assert abs(mine - theirs) <= allowed.mean().item() + 1e-5
    assert mine != theirs


def first_batch(label_set: LabelSet) -> tuple[Batch, torch.Tensor]:
    """Return the first batch, and the untrained student's log-probabilities of its distillation head."""
    config = TrainConfig(labels=label_set.folder, batch_size=8, epochs=STEPS, warmup_epochs=0)
    data = open_data(config)
    batch = BatchRenderer(Catalogue(data.source, label_set), data.recipe, make_order(config, data)).render_here(0)
    torch.manual_seed(0)
    student = create_student("deit-ti", num_classes=label_set.num_classes, img_size=16, **TINY).train()
    _spread_heads(student)
    with torch.no_grad():
        heads = student(normalise(mixed_images(batch, CPU), student))
    assert heads.distill_logits is not None
    return batch, heads.distill_logits.log_softmax(1)


def test_the_parity_test_notices_labels_of_other_views(data, teacher, tmp_path):
    """Shift the stored labels by one view: the losses must part, or the tests above prove nothing."""
    label_set = labels(tmp_path, data, topk=0)

    def shifted(batch: Batch, _: Teacher) -> TeacherTarget:
        assert batch.teacher is not None
        return replace(batch.teacher, hard=batch.teacher.hard.roll(2))

    mine, theirs = (losses_of(label_set, teacher, t, distillation_type="hard") for t in (shifted, online))
    assert mine != theirs


def test_the_loop_itself_has_these_losses(data, teacher, tmp_path):
    """`deit-cli train` is no other computation than the one above: its first loss equals a hand-made first step."""
    from trainer.loop import train

    label_set = labels(tmp_path, data, topk=0)
    config = TrainConfig(
        labels=label_set.folder, output=tmp_path / "run", model="deit-ti", epochs=1, batch_size=8, warmup_epochs=0,
        drop_path=0.0, model_ema=False, workers=0, log_interval=1, **TINY,
    )  # fmt: skip
    train(config)
    first = next(line for line in read_metrics(config.folder) if line["kind"] == "train")
    data_ = open_data(config)
    batch = BatchRenderer(Catalogue(data_.source, label_set), data_.recipe, make_order(config, data_)).render_here(0)
    torch.manual_seed(config.seed)
    student = create_student("deit-ti", num_classes=3, img_size=16, **TINY).train()
    heads = student(normalise(mixed_images(batch, CPU), student))
    loss, _ = distillation_loss(
        heads.class_logits,
        heads.distill_logits,
        batch.classes,
        online(batch, teacher),
        LossSettings(distillation_type="hard", alpha=0.5, tau=1.0, tail="spread", reduction="batchmean", smoothing=0.1),
    )
    assert first["loss"] == pytest.approx(loss.item(), abs=1e-7)
