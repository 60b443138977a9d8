"""Small real things for tests: photo-like images, sources, label sets, teachers."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from webdataset.writer import TarWriter

from pipeline.images.source import Source, open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import TeacherIdentity
from pipeline.pixels import render
from pipeline.pixels.render import render_views
from pipeline.settings.configs import Dtype, PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.stage1 import rendering
from pipeline.stage1.precompute import precompute
from pipeline.teacher.loading import load_teacher
from pipeline.teacher.teacher import Network, Teacher
from pipeline.views.recipe import Recipe

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")
SMALL = {"img_size": 16, "mix_block": 8}


def photo(seed: int, height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    """A smooth random image with an edge: what cameras make, and JPEG keeps."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()
    pixels[:, int(rng.integers(4, width)) :] //= 2
    return pixels


def encoded(pixels: NDArray[np.uint8], kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_tars(
    folder: Path, sizes: tuple[int, ...] = (13, 10), *, unlabelled: int = 0, bad: tuple[int, ...] = ()
) -> str:
    """Write tars of photos, three classes in turn, and return the folder's path as a source.

    Args:
        folder: created.
        sizes: samples of each tar.
        unlabelled: every so many samples one has no class label; 0: none.
        bad: numbers of samples whose image is cut in half.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    number = 0
    for shard, size in enumerate(sizes):
        with TarWriter(str(folder / f"train-{shard:06}.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            for _ in range(size):
                image = encoded(photo(number))
                sample: dict[str, Any] = {
                    "__key__": f"img-{number:04}",
                    "jpg": image[: len(image) // 2] if number in bad else image,
                }
                if not unlabelled or number % unlabelled:
                    sample["cls"] = str(number % len(CLASSES)).encode()
                tar.write(sample)
                number += 1
    return str(folder)


def write_unlabelled(folder: Path, labels: Path, number: int = 23) -> str:
    """Write the photos of `write_tars` as files without class folders, and their classes to a labels file with numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in range(number):
        (folder / f"img-{each:04}.jpg").write_bytes(encoded(photo(each)))
    rows = "".join(f"img-{each:04}.jpg,{each % len(CLASSES)}\n" for each in range(number))
    labels.write_text(f"path,cls\n{rows}")
    return str(folder)


def small_recipe(**changes: Any) -> Recipe:
    return load_recipe("deit", SMALL | changes)


def confident_cnn() -> tuple[nn.Module, dict[str, Any]]:
    """A small CNN with random weights of a fixed seed, made to give its three answers about equally often to views."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(16 * 4, len(CLASSES))
        network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), head)
    recipe = small_recipe()
    views = np.concatenate([render_views(photo(seed), recipe, f"img-{seed:04}", range(2)) for seed in range(40)])
    with torch.inference_mode():
        logits = network(torch.from_numpy(views).permute(0, 3, 1, 2) / 127.5 - 1)
    with torch.no_grad():
        head.bias -= logits.mean(0)
        head.weight.mul_(4 / logits.std())
        head.bias.mul_(4 / logits.std())
    return network, {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def changing_cnn() -> tuple[nn.Module, dict[str, Any]]:
    """The confident CNN with other weights in every process."""
    network, config = confident_cnn()
    with torch.no_grad():
        next(network.parameters()).add_(os.getpid() * 1e-6)
    return network, config


def teacher_of(
    *names: str,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> Teacher:
    """Load a teacher with what differs from the defaults."""
    checkpoints = () if checkpoint is None else (checkpoint,)
    config = TeacherConfig(teacher=names, teacher_checkpoint=checkpoints, teacher_img_size=img_size, **options)
    return load_teacher(config, num_classes=num_classes, device="cpu")


def teacher_from(module: nn.Module, identity: TeacherIdentity, *, dtype: Dtype = "float32") -> Teacher:
    """A network of a test as a teacher on the CPU."""
    config = TeacherConfig(teacher=(identity.name,), dtype=dtype)
    return Teacher([Network(module, identity, crop_pct=1.0)], identity, config, device=torch.device("cpu"))


def small_teacher(source: Source, **options: Any) -> Teacher:
    """The confident CNN; with `num_classes`, timm's as it is."""
    name = "test_resnet" if "num_classes" in options else "support.builders:confident_cnn"
    return teacher_of(name, **({"pretrained": False, "img_size": 16} | options))


def make_labels(
    out: Path, data: str, *, recipe: Recipe | None = None, teacher: Teacher | None = None, **settings: Any
) -> LabelSet:
    torch.set_num_threads(1)
    source = open_source(data)
    config = PrecomputeConfig(
        data=data, out=out, **({"views": (0, 3), "topk": 2, "workers": 0, "batch_size": 8} | settings)
    )
    label_set = precompute(config, recipe or small_recipe(), teacher or small_teacher(source), source)
    assert label_set is not None
    return label_set


def with_checkout(*folders: Path | str, **variables: str) -> dict[str, str]:
    """Return the environment of a subprocess that imports this checkout, then from `folders`, then what this one does."""
    paths = [ROOT, ROOT / "tests", *folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | variables


def shared_data(name: str) -> Path:
    """Return a folder of the real images, or skip the test by name."""
    root = os.environ.get("DEIT_CLI_DATA")
    if not root or not (Path(root) / name).exists():
        pytest.skip(f"DEIT_CLI_DATA names no folder with {name}")
    return Path(root) / name


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def named_files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder but temporary ones, with its bytes: what a reader looks at."""
    return {name: content for name, content in files_of(folder).items() if ".tmp-" not in name}


def keys_decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by a key whenever the renderers of either stage decode its image."""
    from trainer import stream  # not above: some tests run without the trainer, others without the teacher

    keys: list[str] = []
    for module, name in ((rendering, "decode"), (render, "decode"), (render, "decode_for"), (stream, "decode")):
        function = getattr(module, name)

        def noting(*args: Any, key: str, function: Any = function) -> Any:
            keys.append(key)
            return function(*args, key=key)

        monkeypatch.setattr(module, name, noting)
    return keys


@contextmanager
def before_update(number: int, do: Callable[[], object]) -> Iterator[None]:
    """Make the training loop do something else before it moves the weights for the `number`-th time, counted from 0."""
    from trainer import loop  # not above: some tests run without the trainer

    real, calls = loop.update_weights, []

    def step(*args: Any) -> Any:
        if len(calls) == number:
            do()
        calls.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update_weights", step)
        yield


def interrupt() -> None:
    raise KeyboardInterrupt
