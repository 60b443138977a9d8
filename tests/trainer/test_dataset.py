"""The dataset for other training loops: its items, its batches, its order, worker processes, and what it refuses."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import make_labels, small_recipe, write_tars
from torch.utils.data import DataLoader

from pipeline.errors import DeitCliError, LabelSetCorrupt, LabelSetMismatch, ReplayError, SourceError, UsageError
from pipeline.images.source import open_source
from pipeline.labels.combined import open_labels
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import rendered_view
from trainer import (
    DistillationBatchSampler,
    DistillationDataset,
    collate,
    collate_views,
    distillation_loss,
    targets_of,
)
from trainer import stream as stream_module
from trainer.config import TrainConfig
from trainer.losses import LossSettings
from trainer.order import Share
from trainer.run import make_order, open_data
from trainer.stream import Batch, BatchRenderer, Catalogue, mixed_images

SIZES = (13, 10)  # blocks of 8, 5, 8 and 2: one sample of each view has no partner


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), SIZES, unlabelled=5)


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, views=(0, 6), views_per_shard=3)


@pytest.fixture(scope="module")
def dataset(label_set) -> DistillationDataset:
    return DistillationDataset(label_set, repeated_aug=1)


def batches_of_train(label_set: LabelSet, epoch: int, share: Share = Share(), **settings: Any) -> list[Batch]:
    """Return what `deit-cli train` trains on in one epoch."""
    config = TrainConfig(labels=(str(label_set.folder),), grad_accum_steps=share.passes, **settings)
    data = open_data(config)
    order = make_order(config, data, share)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order, share)
    each = order.steps_per_epoch * share.passes
    return [renderer.render_here(index) for index in range(epoch * each, (epoch + 1) * each)]


def assert_same(batch: dict[str, torch.Tensor], trained: Batch) -> None:
    assert trained.teacher is not None
    wanted = {"images": mixed_images(trained, torch.device("cpu")), **vars(trained.classes), **vars(trained.teacher)}
    assert batch.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert batch[name].dtype == tensor.dtype, name
        assert torch.equal(batch[name], tensor), name


# --- items ------------------------------------------------------------------------------------------------------------


def test_an_item_has_the_labelled_pixels_of_partners_and_their_answers(label_set, dataset):
    source, seen = open_source(label_set.images_location()), []
    for number, item in enumerate(dataset):
        keys = dataset.keys_of(number)
        seen += keys
        for at, key in enumerate(keys):
            shard = next(name for name in label_set.shards if key in label_set.samples(name).key)
            samples, rows = label_set.samples(shard), label_set.read(shard, 0)
            row = list(samples.key).index(key)
            pixels = rendered_view(label_set, source, shard, samples, row, 0)
            assert torch.equal(item["images"][at], torch.from_numpy(pixels))
            assert item["hard"][at] == rows.hard[list(rows.row).index(row)]
            assert item["labelled"][at] == (samples.class_label[row] is not None)
    assert sorted(seen) == sorted(key for shard in label_set.shards for key in label_set.samples(shard).key)


def test_views_follow_the_epoch_and_an_index_may_name_it(dataset):
    dataset.set_epoch(2)
    third = dataset[1]
    dataset.set_epoch(0)
    assert torch.equal(dataset[2, 1]["images"], third["images"])
    assert not torch.equal(dataset[1]["images"], third["images"])
    assert torch.equal(dataset[8, 1]["images"], third["images"])  # six views: they repeat


def test_random_epochs_use_every_view_once_in_a_round(label_set):
    dataset = DistillationDataset(label_set, repeated_aug=1, view_policy="random", seed=3)
    first = [dataset.order.views_of_epoch(epoch).start for epoch in range(6)]
    assert sorted(first) == list(range(6))
    assert first != list(range(6))


def test_views_can_be_chosen(label_set):
    dataset = DistillationDataset(label_set, views=range(3, 6))
    assert dataset[0]["images"].shape == (6, 16, 16, 3)  # R is 3, as `train` chooses it
    assert [dataset.order.views_of_epoch(epoch) for epoch in (0, 5)] == [range(3, 6)] * 2


def test_a_batch_has_partners_at_their_new_places(dataset):
    items = [dataset[number] for number in range(len(dataset))]
    batch = collate_views(items)
    keys = [key for number in range(len(dataset)) for key in dataset.keys_of(number)]
    start = 0
    for number, item in enumerate(items):
        for at, partner in enumerate(item["partner"].tolist()):
            assert keys[batch["partner"][start + at]] == dataset.keys_of(number)[partner]
        start += len(item["lam"])
    assert (batch["partner"] != torch.arange(len(keys))).sum() > 10


# --- the batches of train ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeated_aug", [None, 1])
@pytest.mark.parametrize("epoch", [0, 4])
def test_the_sampler_gives_the_batches_of_train(label_set, repeated_aug, epoch):
    dataset = DistillationDataset(label_set, repeated_aug=repeated_aug, seed=5)
    sampler = DistillationBatchSampler(dataset, 12)
    sampler.set_epoch(epoch)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate))
    trained = batches_of_train(label_set, epoch, batch_size=12, seed=5, repeated_aug=repeated_aug)
    assert len(batches) == len(trained) == len(sampler) > 0
    for batch, wanted in zip(batches, trained, strict=True):
        assert_same(batch, wanted)


def test_ranks_and_passes_have_the_parts_of_train(label_set):
    dataset = DistillationDataset(label_set, repeated_aug=1)
    for rank in range(2):
        sampler = DistillationBatchSampler(dataset, 4, grad_accum_steps=2, rank=rank, num_replicas=2)
        batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate))
        trained = batches_of_train(label_set, 0, Share(rank, 2, 2), batch_size=4, repeated_aug=1)
        assert sampler.views_per_update == 16
        for batch, wanted in zip(batches, trained, strict=True):
            assert_same(batch, wanted)


def test_several_label_sets_are_combined_as_in_train(label_set, data, tmp_path):
    other = make_labels(tmp_path / "other", data, views=(0, 6), views_per_shard=3, topk=1)
    folders = (str(label_set.folder), str(other.folder))
    labels = open_labels(folders)
    dataset = DistillationDataset(labels, repeated_aug=1)
    (item,) = DataLoader(dataset, batch_sampler=[[(0, 0), (0, 3)]], collate_fn=collate)
    combined = open_data(TrainConfig(labels=folders)).label_set
    assert combined is not None
    assert item["topk_index"].shape == (4, 3)  # of three classes
    renderer = BatchRenderer(Catalogue(dataset.source, combined), combined.recipe, dataset.order)
    first = renderer.render_units(dataset_units(dataset, 0), range(1), torch.empty(2, 16, 16, 3, dtype=torch.uint8))
    assert first.teacher is not None
    assert torch.equal(item["topk_prob"][:2], first.teacher.topk_prob)


def dataset_units(dataset: DistillationDataset, number: int):
    return torch.tensor([[0, number]]).numpy()


# --- worker processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context", ["fork", *(pytest.param(each, marks=pytest.mark.slow) for each in ("spawn", "forkserver"))]
)
def test_worker_processes_give_the_same_batches_in_every_epoch(dataset, context):
    """They stay from epoch to epoch, and learn of the new one."""
    settings: dict[str, Any] = {"batch_size": 5, "collate_fn": collate_views}
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True, multiprocessing_context=context, **settings)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        here = list(DataLoader(dataset, **settings))
        there = list(loader)
        for one, other in zip(here, there, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    dataset.set_epoch(0)


def test_a_pickled_dataset_is_small_and_the_same(dataset):
    _ = [dataset[number] for number in range(len(dataset))]
    data = pickle.dumps(dataset)
    assert len(data) < 20_000  # without what it keeps in memory
    assert torch.equal(pickle.loads(data)[3]["images"], dataset[3]["images"])


def test_an_error_in_a_worker_process_keeps_its_type_and_its_line(data, label_set, tmp_path):
    folder = Path(shutil.copytree(data, tmp_path / "images"))
    dataset = DistillationDataset(label_set, folder)
    change_an_image(folder / "train-000001.tar")
    loader = DataLoader(dataset, batch_size=len(dataset), num_workers=1, collate_fn=collate)
    with pytest.raises(LabelSetMismatch, match=r"has other bytes than the one that was labelled .*Pass the --data"):
        list(loader)


def test_an_image_that_no_longer_decodes_is_named_by_a_worker_process(dataset, monkeypatch):
    from pipeline.errors import BadImageError

    def refuse(*_: Any) -> None:
        raise BadImageError("img-0000", "another decoder")

    monkeypatch.setattr(stream_module, "draw_encoded", refuse)
    with pytest.raises(BadImageError, match="another decoder"):
        dataset[0]
    with pytest.raises(SourceError, match="image 'img-0000': another decoder"):
        list(DataLoader(dataset, num_workers=1, collate_fn=collate))


def change_an_image(tar: Path) -> None:
    """Change a byte of the last image; its name and length stay."""
    data = bytearray(tar.read_bytes())
    at = data.rindex(b"\xff\xd9")  # the end of the last JPEG
    data[at - 4] ^= 0x55
    tar.write_bytes(data)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [12, -13, (0, 12)])
def test_an_index_out_of_range(dataset, index):
    with pytest.raises(UsageError, match=r"an item must be one of the 12 units, 0 to 11, got -?\d+$"):
        dataset[index]
    with pytest.raises(IndexError):
        dataset[index]


def test_the_last_unit_is_also_number_minus_1(dataset):
    assert torch.equal(dataset[-1]["images"], dataset[11]["images"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": range(0, 9)}, r"views must be a range within the labelled views, 0:6, got range\(0, 9\)"),
        ({"views": range(0)}, r"got range\(0, 0\)"),
        ({"views": range(0, 6, 2)}, r"got range\(0, 6, 2\)"),
        ({"view_policy": "once"}, "view_policy must be one of cycle, random, got 'once'"),
        ({"views": (0, 3)}, r"views must be a range, such as range\(0, 30\), got \(0, 3\)"),
        ({"views": 3}, r"views must be a range, such as range\(0, 30\), got 3"),
        ({"repeated_aug": 0}, "repeated_aug must be at least 1, got 0"),
        ({"repeated_aug": -1}, "repeated_aug must be at least 1, got -1"),
        ({"repeated_aug": 1.5}, "repeated_aug must be a whole number, got 1.5"),
        ({"repeated_aug": 4}, "--repeated-aug 4 needs partners that stay the same for 4 views"),
    ],
)
def test_arguments_that_do_not_fit(label_set, arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        DistillationDataset(label_set, **arguments)
    assert "\n" not in str(error.value)


def test_the_path_of_a_label_set_is_not_an_open_one(label_set):
    with pytest.raises(UsageError, match=r"labels must be an open label set, got .*Pass LabelSet\.open of it"):
        DistillationDataset(label_set.folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4, "window": 0}, "window must be at least 1, got 0"),
        ({"batch_size": 4, "rank": 2, "num_replicas": 2}, "rank must be in 0..num_replicas - 1, got rank 2 of 2"),
        ({"batch_size": 4, "num_replicas": 20}, "cannot be split into 20 forward passes"),
    ],
)
def test_batches_that_cannot_be(dataset, arguments, message):
    with pytest.raises(UsageError, match=message):
        DistillationBatchSampler(dataset, **arguments)


@pytest.mark.parametrize("set_epoch", ["dataset", "sampler"])
def test_an_epoch_before_the_first(dataset, set_epoch):
    owner = dataset if set_epoch == "dataset" else DistillationBatchSampler(dataset, 4)
    with pytest.raises(UsageError, match="epoch must be at least 0, got -1"):
        owner.set_epoch(-1)
    with pytest.raises(UsageError, match=r"epoch must be a whole number, got 1\.5"):
        owner.set_epoch(1.5)


def test_an_index_with_half_an_epoch(dataset):
    with pytest.raises(UsageError, match=r"epoch must be a whole number, got 1\.5"):
        dataset[1.5, 0]


def test_the_images_of_another_source(label_set, tmp_path):
    other = write_tars(tmp_path / "other", (13, 11), unlabelled=5)
    with pytest.raises(LabelSetMismatch, match=r"was made from source .* is another: .*1 sample is new: 'img-0023'"):
        DistillationDataset(label_set, other)


def test_a_source_without_images(label_set, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeitCliError) as error:
        DistillationDataset(label_set, tmp_path / "empty")
    assert str(tmp_path / "empty") in str(error.value)
    assert "\n" not in str(error.value)


def test_pixels_that_this_machine_renders_differently(label_set, tmp_path):
    folder = Path(shutil.copytree(label_set.folder, tmp_path / "set"))
    labels = LabelSet.open(folder)
    probe = labels.manifest.probes[0]
    wrong = probe.model_copy(update={"pixels_sha256": "0" * 64, "sample": "AAAA" * 256})
    labels.manifest = labels.manifest.model_copy(update={"probes": (wrong,)})
    with pytest.raises(ReplayError, match="differs from the labelled pixels by"):
        DistillationDataset(labels)


def test_a_label_set_with_a_missing_file(label_set, tmp_path):
    folder = Path(shutil.copytree(label_set.folder, tmp_path / "set"))
    dataset = DistillationDataset(LabelSet.open(folder))
    (file,) = folder.glob("labels/views-00003-00005/train-000001*")
    file.unlink()
    with pytest.raises(LabelSetCorrupt, match=r"views-00003-00005.train-000001"):
        dataset[3, -1]
    with pytest.raises(LabelSetCorrupt, match=r"views-00003-00005.train-000001"):
        LabelSet.open(folder)


def test_hard_labels_alone_teach_no_probabilities(data, tmp_path):
    labels = make_labels(tmp_path / "hard", data, topk=0)
    batch = collate([DistillationDataset(labels)[0]])
    logits = torch.zeros(len(batch["lam"]), 3)
    loss, _ = distillation_loss(logits, logits, *targets_of(batch), LossSettings(distillation_type="hard"))
    assert loss > 0
    with pytest.raises(UsageError, match="this label set holds only hard labels"):
        distillation_loss(logits, logits, *targets_of(batch), LossSettings(distillation_type="soft"))


def test_the_defaults_of_the_loss_are_those_of_train(label_set):
    assert LossSettings() == LossSettings.of(TrainConfig(labels=(str(label_set.folder),)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_type": "sofft"}, "--distillation-type must be one of none, soft, hard, got 'sofft'"),
        ({"tau": 0}, r"--distillation-tau must be in 0\.01\.\.1000, got 0"),
        ({"alpha": 2}, r"--distillation-alpha must be in 0\.\.1, got 2"),
        ({"smoothing": -0.1}, r"--smoothing must be in 0\.\.0\.999, got -0\.1"),
        ({"tail": "x"}, "--tail must be one of spread, renormalise, got 'x'"),
        ({"reduction": "mean"}, "--soft-reduction must be one of batchmean, deit, got 'mean'"),
        ({"second_token": "none"}, "--second-token must be one of distillation, class, got 'none'"),
    ],
)
def test_settings_of_the_loss_that_train_refuses(settings, message):
    with pytest.raises(UsageError, match=message):
        LossSettings(**settings)


def test_a_recipe_without_mixing_has_single_samples(data, tmp_path):
    labels = make_labels(tmp_path / "plain", data, recipe=small_recipe(mixup=0.0, cutmix=0.0))
    dataset = DistillationDataset(labels)
    assert len(dataset) == sum(SIZES)
    batch = collate([dataset[0], dataset[5]])
    assert torch.equal(batch["partner"], torch.arange(len(batch["lam"])))
    assert torch.equal(batch["images"], collate_views([dataset[0], dataset[5]])["images"].permute(0, 3, 1, 2).float())
