"""The dataset in loaders that others make: timm's `create_loader`, and the one of Hugging Face's `Trainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import make_labels, write_tars
from torch import nn

from trainer import DistillationDataset, collate

SIZES = (8, 8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DistillationDataset:
    folder = tmp_path_factory.mktemp("loaders")
    return DistillationDataset(make_labels(folder / "set", write_tars(folder / "data", SIZES)), repeated_aug=1)


def sorted_views(batches: list[Any]) -> list[bytes]:
    """Return the pixels of every view, in an order of their own: a shuffle does not matter."""
    return sorted(image.contiguous().numpy().tobytes() for batch in batches for image in batch["images"])


@pytest.mark.parametrize("workers", [0, 1])
def test_timms_loader_gives_the_views_of_each_epoch(dataset, workers):
    """Its loader processes stay from epoch to epoch; the transform that it sets changes nothing."""
    from timm.data import create_loader

    loader = create_loader(
        dataset,
        input_size=(3, 16, 16),
        batch_size=2,
        is_training=True,
        use_prefetcher=False,
        collate_fn=collate,
        num_workers=workers,
    )
    seen = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        found = sorted_views(list(loader))
        assert found == sorted_views([collate([dataset[number]]) for number in range(len(dataset))])
        seen.append(found)
    assert seen[0] != seen[1]


@pytest.mark.slow
def test_the_loader_of_trainer_sets_the_epoch_and_uses_every_unit(dataset, tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.seen: list[Any] = []

        def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
            self.seen.append(batch)
            return {"loss": self.weight**2}

    model = Model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=dataset, data_collator=collate).train()
    assert len(model.seen) == 8
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        wanted = sorted_views([collate([dataset[number]]) for number in range(len(dataset))])
        assert sorted_views(model.seen[4 * epoch : 4 * epoch + 4]) == wanted
