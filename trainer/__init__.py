"""Stage 2: render the labelled views again, and train and evaluate a student on the stored labels. No teacher is loaded.

`loop` uses the other modules in this order:

    run           open the data, build the student, resume
    order         choose the views of each update
    stream        render these views in loader processes, and read their labels
    student       compute the answers of both heads
    losses        compare the answers with the class labels and the teacher's labels
    optim         set the learning rate, update the weights and their moving average
    evaluate      measure the accuracy of both heads and their fusions
    checkpoint    save the state of the run
    export        write the student as a folder that timm loads

The public API trains in a loop of one's own, on the same views and labels:

    from pipeline import LabelSet
    from trainer import DistillationBatchSampler, DistillationDataset, collate
    dataset = DistillationDataset(LabelSet.open("shards/"))
    loader = DataLoader(dataset, batch_sampler=DistillationBatchSampler(dataset, 256), collate_fn=collate)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.dataset import (
        DistillationBatchSampler,
        DistillationDataset,
        collate,
        collate_views,
        mix_views,
        targets_of,
    )
    from trainer.evaluate import fused_logits
    from trainer.losses import (
        ClassTarget,
        LossSettings,
        TeacherTarget,
        class_loss,
        distillation_loss,
        hard_distillation_loss,
        soft_distillation_loss,
    )
    from trainer.student import Heads, Student, create_student, normalise, open_student

__all__ = [
    "ClassTarget",
    "DistillationBatchSampler",
    "DistillationDataset",
    "Heads",
    "LossSettings",
    "Student",
    "TeacherTarget",
    "class_loss",
    "collate",
    "collate_views",
    "create_student",
    "distillation_loss",
    "fused_logits",
    "hard_distillation_loss",
    "mix_views",
    "normalise",
    "open_student",
    "soft_distillation_loss",
    "targets_of",
]

_HOMES = {
    "ClassTarget": "trainer.losses",
    "DistillationBatchSampler": "trainer.dataset",
    "DistillationDataset": "trainer.dataset",
    "Heads": "trainer.student",
    "LossSettings": "trainer.losses",
    "Student": "trainer.student",
    "TeacherTarget": "trainer.losses",
    "class_loss": "trainer.losses",
    "collate": "trainer.dataset",
    "collate_views": "trainer.dataset",
    "create_student": "trainer.student",
    "distillation_loss": "trainer.losses",
    "fused_logits": "trainer.evaluate",
    "hard_distillation_loss": "trainer.losses",
    "mix_views": "trainer.dataset",
    "normalise": "trainer.student",
    "open_student": "trainer.student",
    "soft_distillation_loss": "trainer.losses",
    "targets_of": "trainer.dataset",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `deit-cli --help` must not wait for torch and timm."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the names of this package, with those that are not imported yet."""
    return sorted({*globals(), *__all__})
