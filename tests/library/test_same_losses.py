"""Other training loops learn from a label set as `deit-cli train` does: the same loss in each of 50 updates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.builders import make_labels, write_tars
from support.training import TINY
from torch import nn
from torch.utils.data import DataLoader

from pipeline.labels.labelset import LabelSet
from trainer import (
    DistillationBatchSampler,
    DistillationDataset,
    LossSettings,
    Student,
    collate,
    create_student,
    distillation_loss,
    normalise,
    targets_of,
)
from trainer import loop as loop_module
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.optim import create_optimizer

pytestmark = pytest.mark.slow

EPOCHS, UPDATES, BATCH, RATE, SEED = 25, 50, 8, 2e-3, 7
SIZES = (9, 9)  # blocks of 8 and 1: one sample of each shard has no partner


@pytest.fixture(scope="module")
def label_set(tmp_path_factory) -> LabelSet:
    folder = tmp_path_factory.mktemp("library")
    return make_labels(folder / "set", write_tars(folder / "data", SIZES, unlabelled=5), views=(0, 4), topk=2)


@pytest.fixture(scope="module", params=["hard", "soft"])
def trained(request, label_set, tmp_path_factory) -> tuple[LossSettings, list[float], dict[str, torch.Tensor]]:
    """The settings of a run of `deit-cli train`, its losses, and its last weights."""
    config = TrainConfig(
        labels=(str(label_set.folder),),
        output=str(tmp_path_factory.mktemp("run") / "run"),
        **(TINY | {"epochs": EPOCHS, "batch_size": BATCH, "repeated_aug": 1, "seed": SEED}),
        **{"lr": RATE, "min_lr": RATE, "warmup_epochs": 0, "drop_path": 0.0, "model_ema": False},
        **{"distillation_type": request.param, "distillation_tau": 2.0, "workers": 0, "log_interval": 1},
    )
    losses: list[float] = []
    real = loop_module.batch_loss

    def noting(*arguments: Any) -> Any:
        loss, parts = real(*arguments)
        losses.append(loss.item())
        return loss, parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "batch_loss", noting)
        train(config)
    assert len(losses) == UPDATES
    logged = [line["loss"] for line in read_metrics(Path(config.output)) if line["kind"] == "train"]
    assert logged == pytest.approx(losses, rel=1e-6)
    return LossSettings.of(config), losses, load_file(Path(config.output, "last", "model.safetensors"))


class Loop:
    """What every loop here needs: data, the student with its first weights, the loss of a batch, and the losses so far."""

    def __init__(self, label_set: LabelSet, settings: LossSettings) -> None:
        self.dataset = DistillationDataset(label_set, repeated_aug=1, seed=SEED)
        self.batches = DistillationBatchSampler(self.dataset, BATCH)
        self.settings, self.losses = settings, []
        torch.manual_seed(SEED)
        self.student: Student = create_student(
            **TINY, num_classes=label_set.num_classes, img_size=label_set.recipe.img_size
        ).train()

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_sampler=self.batches, collate_fn=collate)

    def optimizer(self) -> torch.optim.Optimizer:
        return create_optimizer(self.student, lr=RATE, weight_decay=TrainConfig.weight_decay, fused=True)

    def loss(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch, divided as `train` divides it; note the mean over its views, which `train` logs."""
        heads = self.student(normalise(batch["images"], self.student))
        loss, _ = distillation_loss(heads.class_logits, heads.distill_logits, *targets_of(batch), self.settings)
        self.losses.append(loss.item())
        return loss * (len(batch["lam"]) / self.batches.views_per_update)


def plain(loop: Loop, _: Path) -> None:
    optimizer = loop.optimizer()
    loader = loop.loader()
    for epoch in range(EPOCHS):
        loop.batches.set_epoch(epoch)
        for batch in loader:
            loop.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()


def lightning(loop: Loop, folder: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = loop.student

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return loop.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return loop.optimizer()

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder, **quiet).fit(
        Module(), loop.loader()
    )


def hugging_face(loop: Loop, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = loop.student

        def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": loop.loss(batch)}

    class LabelTrainer(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return self.accelerator.prepare(loop.loader())

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, max_grad_norm=0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )  # fmt: skip
    optimizer = loop.optimizer()
    steady = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    LabelTrainer(Model(), arguments, train_dataset=loop.dataset, optimizers=(optimizer, steady)).train()


@pytest.mark.filterwarnings("ignore:The `srun` command is available on your system")  # Lightning
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # Lightning
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")  # torch, of Lightning's call
@pytest.mark.parametrize("run", [plain, lightning, hugging_face], ids=lambda run: run.__name__)
def test_another_loop_has_the_losses_and_weights_of_train(
    run: Callable[[Loop, Path], None], label_set, trained, tmp_path
):
    settings, losses, weights = trained
    loop = Loop(label_set, settings)
    run(loop, tmp_path)
    assert loop.losses == losses
    ours = loop.student.model.state_dict()
    assert ours.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(ours[name], weights[name])] == []
