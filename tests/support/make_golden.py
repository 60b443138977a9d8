"""Make the golden label sets of format v1 in `tests/golden`: run once, committed, and read by every later version.

    python tests/support/make_golden.py

Later versions of Parquet, Pillow or torch may write other bytes for the same labels, so the files are not made again:
a change of the format is a new version and a new folder.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import torch

from pipeline.images.source import open_source
from pipeline.labels.encoding import LabelRows
from pipeline.labels.format import MANIFEST_NAME, PLAN_NAME
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import TeacherIdentity, read_manifest, read_plan
from pipeline.stage1.precompute import precompute
from pipeline.storage.atomic import replace_file, sha256_file
from pipeline.storage.json import pretty_json
from pipeline.teacher.loading import weights_sha256
from pipeline.teacher.teacher import Teacher
from pipeline.views.recipe import Recipe
from support.builders import teacher_from
from support.label_sets import CLASSES, MeanColour, config_of, write_tar

ROOT = Path(__file__).parents[2]
DATA = Path("tests/golden/v1/images")
LABELS = {"float16": Path("tests/golden/v1/shards"), "log8": Path("tests/golden/v1-log8/shards")}
# With this seed no two classes of any view come near each other (by 0.59 at least), and the probes show both mixes.
RECIPE = Recipe(img_size=16, mix_block=4, seed=225)
GAIN = 24.0  # logits from 0 to 24
BROKEN = 2  # a row whose image cannot be decoded: it has no labels
UNLABELLED = 5  # a row without a class label


def png(pixels: np.ndarray) -> bytes:
    """Return an uncompressed PNG of uint8 [H, W, 3]: the same bytes whatever library versions are installed."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )


def image(row: int) -> bytes:
    """Return a 12 x 12 image: a ramp in each channel, and the channel of its class brighter."""
    y, x = np.mgrid[0:12, 0:12]
    pixels = np.stack([20 + 5 * x, 10 + 6 * y, 90 - 3 * x - 4 * y], axis=-1) + 7 * row
    pixels[..., row % 3] += 110
    return png(pixels.astype(np.uint8))


def write_images() -> None:
    """Write one tar of seven samples, and the class names."""
    DATA.mkdir(parents=True)
    (DATA / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    members: list[tuple[str, bytes]] = []
    for row in range(7):
        encoded = image(row)
        members.append((f"g{row}.png", encoded[:60] if row == BROKEN else encoded))
        members += [] if row == UNLABELLED else [(f"g{row}.cls", b"%d" % (row % 3))]
    write_tar(DATA / "golden-000000.tar", members)


def golden_teacher() -> Teacher:
    """Return the teacher: logit c is GAIN times the mean of channel c, of pixels in 0..1."""
    module = MeanColour(GAIN)
    identity = TeacherIdentity(
        name="mean-colour",
        weights_sha256=weights_sha256(module),
        img_size=RECIPE.img_size,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        num_classes=3,
        class_names=CLASSES,
    )
    return teacher_from(module, identity)


def forget_the_machine(folder: Path) -> None:
    """Write the location of the images as seen from the repository: no id covers it, and nobody has ours."""
    plan, manifest = read_plan(folder), read_manifest(folder)
    plan = plan.model_copy(update={"source": plan.source.model_copy(update={"location": str(DATA)})})
    replace_file(folder / PLAN_NAME, lambda file: file.write(pretty_json(plan.model_dump(mode="json"))))
    manifest = manifest.model_copy(update={"plan_sha256": sha256_file(folder / PLAN_NAME)})
    replace_file(folder / MANIFEST_NAME, lambda file: file.write(pretty_json(manifest.to_json())))


def least_margin(label_set: LabelSet) -> float:
    """Return the smallest difference between the two most probable classes of any stored label."""

    def margin(rows: LabelRows) -> float:
        return float((rows.topk_prob[:, 0] - rows.topk_prob[:, 1]).min())

    return min(margin(label_set.read(shard, view)) for shard in label_set.shards for view in label_set.views)


if __name__ == "__main__":
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if not DATA.exists():
        write_images()
    for precision, folder in LABELS.items():
        if not folder.exists():
            config = config_of(DATA, folder, views=(0, 3), views_per_shard=3, on_bad_image="skip", precision=precision)
            precompute(config, RECIPE, golden_teacher(), open_source(str(DATA)))
            (folder / "README.md").unlink()  # the card is none of the set's files
            forget_the_machine(folder)
            made = LabelSet.open(folder)
            print(f"{made.folder}: label set {made.plan.labelset_id}, least margin {least_margin(made):.3f}")
