"""A walk over every command: exit codes, outputs, files and hashes, to show that a refactor changes no behaviour.

    python tests/support/walk.py run before.json          # on the old revision
    python tests/support/walk.py run after.json           # on the new one, on the same machine (PYTHONPATH names a checkout)
    python tests/support/walk.py compare before.json after.json

Every command runs in a process of its own, in a folder with the same inputs, on two threads. Files are kept as hashes;
of logs and tables the numbers that a clock made are blanked. `compare` prints what differs: text on its own, because a refactor
may change words, and codes and files, which it may not.
"""

import difflib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")
TINY = "--patch-size 8 --embed-dim 32 --depth 2 --num-heads 2"
QUICK = "--warmup-epochs 0 -b 8 -j 0 --device cpu --log-interval 1"
CPU = "-j 0 --device cpu"
RECIPE = "--set img_size=16 --set mix_block=4"
STUDENT = f"{TINY} {QUICK} --labels shards"

TOYS = '''
"""Teachers in closed form."""
import torch
from torch import nn


class Toy(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.register_buffer("weight", torch.linspace(-1, 1, 9).reshape(3, 3) + shift)

    def forward(self, images):
        return images.mean(dim=(2, 3)) @ self.weight


def first():
    return Toy(0.0).eval()


def second():
    return Toy(0.5).eval()


def wrong():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
'''

# Each line runs as it stands, in order; the first words that are not options name the step.
STEPS = f"""
deit-cli --version
deit-cli --help
deit-cli labels
deit-cli nonsense
deit-cli precompute --data tars --teacher toys:first --out shards --views 0:4 {RECIPE} {CPU} --topk 2 --dry-run
deit-cli precompute --data tars --teacher toys:first --out shards --views 0:4 {RECIPE} {CPU} --topk 2 --views-per-shard 2
deit-cli precompute --data tars --teacher toys:first --out shards --views 0:4 {RECIPE} {CPU} --topk 2 --views-per-shard 2
deit-cli precompute --data tars --teacher toys:first --out shards --views 0:4 {RECIPE} {CPU} --topk 3
deit-cli precompute --data tars --teacher toys:second --out shards --views 0:4 {RECIPE} {CPU} --topk 2
deit-cli precompute --data tars --teacher toys:wrong --out bad {RECIPE} {CPU}
deit-cli precompute --data missing --teacher toys:first --out bad {RECIPE} {CPU}
deit-cli precompute --data tars --teacher toys:first --out bad --set scale=9 {CPU}
deit-cli precompute --data tars --teacher toys:first --out bad --set colour=9 {CPU}
deit-cli precompute --data tars --teacher toys:first --out bad --topk 0 --precision log8 {CPU}
deit-cli precompute --data tars --teacher toys:first --out bad --batch-size 0 {CPU}
deit-cli precompute --data tars --teacher toys:first --out bad {RECIPE} {CPU} --min-teacher-accuracy 100
deit-cli precompute --data broken --teacher toys:first --out bad-image {RECIPE} {CPU} --views 0:2
deit-cli precompute --data broken --teacher toys:first --out bad-image {RECIPE} {CPU} --views 0:2 --on-bad-image skip
deit-cli precompute --data folder --teacher toys:first --out workers --views 0:4 {RECIPE} -j 2 --device cpu
deit-cli precompute --data folder --teacher toys:first --out inline --views 0:4 {RECIPE} {CPU}
deit-cli precompute --data images.parquet --teacher toys:first --teacher toys:second --out log8 --views 0:2 {RECIPE} {CPU} --precision log8
deit-cli precompute --data tars --teacher toys:first --out hard --views 0:2 --recipe crop-flip --set img_size=16 {CPU} --topk 0
deit-cli precompute --data tars --teacher toys:first --out packed --views 0:2 {RECIPE} {CPU} --include-images 10
deit-cli precompute -c precompute.yaml --out from-yaml {CPU}
deit-cli labels extend shards --views 4:6 {CPU} --teacher toys:first
deit-cli labels extend shards --views 6:8 {CPU} --teacher toys:second
deit-cli labels info shards
deit-cli labels info shards --json
deit-cli labels info log8 --json
deit-cli labels info hard
deit-cli labels info missing
deit-cli labels info shards --expect-manifest sha256:00
deit-cli labels audit shards --top 3
deit-cli labels audit hard --json
deit-cli labels audit shards --views 0:2 --out audited
deit-cli labels verify shards
deit-cli labels verify shards --data tars --teacher toys:first --relabel 12 --device cpu
deit-cli labels verify shards --data tars --teacher toys:second --relabel 12 --device cpu --json
deit-cli labels verify packed --json
deit-cli labels verify inline --data folder --no-probes
deit-cli labels show shards --out sheet.png
deit-cli labels push shards pushed
deit-cli labels push shards pushed
deit-cli labels push hard pushed
deit-cli labels pull pushed part --views 0:2 --shards train-0
deit-cli labels pull pushed whole
deit-cli labels pull pushed part --views 2:4
deit-cli labels merge merged part part-b
deit-cli labels merge merged shards part
deit-cli labels card shards --license cc-by-4.0
deit-cli labels card shards --license-name none
deit-cli labels export shards exported --views 0:1 -j 0
deit-cli labels export hard originals --pixels originals -j 0
deit-cli pack tars packed-tars -j 0 --samples-per-shard 9 --dry-run
deit-cli pack tars packed-tars -j 0 --samples-per-shard 9
deit-cli pack tars packed-tars -j 0 --samples-per-shard 9
deit-cli pack tars packed-tars -j 0 --samples-per-shard 8
deit-cli pack broken packed-broken -j 0
deit-cli labels sign shards --private-key key.pem
deit-cli labels verify shards --public-key key.pub
deit-cli labels import fkd nothing fkd-labels
deit-cli train {STUDENT} --output runs/hard --epochs 7 --eval-data tars
deit-cli train {STUDENT} --output runs/hard --epochs 7
deit-cli train {STUDENT} --output runs/hard --epochs 8 --resume auto
deit-cli train {STUDENT} --output runs/soft --epochs 2 --distillation-type soft --distillation-tau 3 --repeated-aug 3
deit-cli train {STUDENT} --output runs/renormalise --epochs 2 --distillation-type soft --tail renormalise --repeated-aug 1
deit-cli train {TINY} {QUICK} --labels log8 --output runs/log8 --epochs 2 --distillation-type soft --grad-accum-steps 2
deit-cli train {TINY} {QUICK} --labels packed --output runs/packed --epochs 2 -j 2
deit-cli train {QUICK} --labels hard --model test_resnet --output runs/cnn --epochs 2
deit-cli train {TINY} {QUICK} --distillation-type none --data tars {RECIPE} --output runs/alone --epochs 2
deit-cli train -c train.yaml --output runs/from-yaml {QUICK}
deit-cli train {STUDENT} --output runs/x --distillation-alpha 2
deit-cli train {STUDENT} --output runs/x --unknown 2
deit-cli train {STUDENT} --output runs/x --data folder
deit-cli train {TINY} {QUICK} --labels missing --output runs/x
deit-cli evaluate --checkpoint runs/hard/last --data tars --labels shards {CPU} --json
deit-cli evaluate --checkpoint runs/hard/last --data tars {CPU}
deit-cli evaluate --checkpoint runs/cnn/last --data tars {CPU} --json
deit-cli evaluate --checkpoint runs/hard/last {CPU}
deit-cli train {STUDENT} --output runs/control --epochs 2 --distillation-type none --second-token class --probe-interval 1
deit-cli analyse runs/hard runs/control runs/cnn --data tars --attention 2 --out analysis {CPU}
deit-cli analyse runs/hard runs/control --labels shards {CPU} --json
deit-cli precompute --data tars --teacher runs/cnn/last --out own --views 0:2 {RECIPE} {CPU}
deit-cli estimate --data tars --teacher toys:first --views 0:4 {RECIPE} {CPU} --seconds 0.1 --json
deit-cli estimate --data tars --teacher toys:first --views 0:4 {RECIPE} {CPU} --seconds 0.1
deit-cli bench stage1 --data tars --teacher toys:first {RECIPE} {CPU} --seconds 0.1 --json
deit-cli bench stage2 --labels shards {TINY} -b 8 {CPU} --seconds 0.1 --json
deit-cli bench stage2 --labels shards {TINY} -b 8 {CPU} --seconds 0.1
deit-cli doctor --json
deit-cli doctor --out . --labels shards
break train-0
deit-cli labels info shards
deit-cli labels verify shards
deit-cli train {STUDENT} --output runs/y --epochs 1
"""
MEASURES = {"estimate", "bench stage1", "bench stage2", "doctor", "train"}  # a clock or the machine makes their numbers
CLOCK_FIELDS = re.compile(r'"(\w*_s|time|images_per_s|data_wait\w*|\w*per_s|started|eta\w*)": [-+.\de]+')


def make_inputs(folder: Path) -> None:
    """Write images in each layout, teachers, settings files and a key: the same bytes every time."""
    rng = np.random.default_rng(0)
    images = [_jpeg(rng, number) for number in range(20)]
    (folder / "tars").mkdir()
    (folder / "broken").mkdir()
    for place in ("tars", "broken"):
        (folder / place / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for shard in range(2):
        members = [
            (f"n{n:03}.{ending}", data)
            for n in range(shard * 10, shard * 10 + 10)
            for ending, data in (("jpg", images[n]), ("cls", b"%d" % (n % 3)))
        ]
        _write_tar(folder / "tars" / f"train-{shard}.tar", members)
    _write_tar(folder / "broken" / "train-0.tar", [*members, ("z.jpg", b"no image"), ("z.cls", b"0")])
    for number, image in enumerate(images):
        path = folder / "folder" / CLASSES[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    _write_parquet(folder / "images.parquet", images)
    (folder / "toys.py").write_text(TOYS)
    (folder / "precompute.yaml").write_text(
        "data: tars\nteacher: toys:first\nviews: 0:2\nrecipe: deit\nset:\n  img_size: 16\n  mix_block: 4\n"
    )
    (folder / "train.yaml").write_text(
        "labels: shards\nmodel: deit-ti\nepochs: 1\npatch_size: 8\nembed_dim: 32\ndepth: 1\nnum_heads: 2\n"
    )
    for command in (
        "openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        "openssl ec -in key.pem -pubout -out key.pub",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


def _jpeg(rng: np.random.Generator, number: int) -> bytes:
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    small[..., number % 3] //= 3
    buffer = io.BytesIO()
    Image.fromarray(small).resize((48 + number, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _write_parquet(path: Path, images: list[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": data, "path": f"{n}.jpg"}, "label": n % 3} for n, data in enumerate(images)]
    feature = {"label": {"_type": "ClassLabel", "names": list(CLASSES)}, "image": {"_type": "Image"}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": feature}})}
    )
    pq.write_table(table, path, row_group_size=8)


def walk(folder: Path) -> dict[str, Any]:
    """Take every step in a folder; return what each printed and returned, and the files at the end."""
    make_inputs(folder)
    environment = os.environ | {
        "OMP_NUM_THREADS": "2",
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DEIT_CLI_CACHE": str(folder / "cache"),
    }
    steps = []
    for line in STEPS.strip().splitlines():
        print(line, file=sys.stderr, flush=True)
        if line.startswith("break "):
            _flip_a_bit(next((folder / "shards" / "labels").glob(f"*/{line.removeprefix('break ')}.parquet")))
            continue
        done = subprocess.run(line.split(), cwd=folder, env=environment, capture_output=True, text=True)
        measures = any(line.startswith(f"deit-cli {name}") for name in MEASURES)
        steps.append(
            {
                "line": line,
                "code": done.returncode,
                "stdout": _blanked(done.stdout, folder, every=measures),
                "stderr": _blanked(done.stderr, folder, every=True),
                "files": _files(folder),
            }
        )
    for before, after in reversed(list(itertools.pairwise(steps))):  # only what a step changed
        after["files"] = {
            name: after["files"].get(name, "gone")
            for name in before["files"].keys() | after["files"].keys()
            if before["files"].get(name) != after["files"].get(name)
        }
    return {"steps": steps, "final": _files(folder)}


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _blanked(text: str, folder: Path, *, every: bool) -> str:
    """Return a text without the folder's name; with `every`, without numbers and the bars of a progress line too."""
    text = text.replace(str(folder), "FOLDER")
    if not every:
        return text
    return re.sub(r" {2,}", " ", re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?", "#", text))


def _files(folder: Path) -> dict[str, str]:
    """Return the hash of each file; of JSON that holds times, the hash of the rest."""
    inputs = {"tars", "broken", "folder", "key.pem", "key.pub", "cache", "__pycache__"}
    return {
        str(path.relative_to(folder)): hashlib.sha256(_without_times(path)).hexdigest()[:16]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in inputs and "__pycache__" not in path.parts
    }


def _without_times(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name.endswith((".json", ".jsonl")) and "runs" in path.parts:
        return CLOCK_FIELDS.sub(r'"\1": 0', data.decode()).encode()
    if path.suffix == ".sig":
        return b"a signature is random"
    return data


@click.group()
def commands() -> None:
    """Walk over every command, and compare two walks."""


@commands.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the folder that was walked.")
def run(out: Path, keep: Path | None) -> None:
    """Walk; write what happened to OUT."""
    folder = Path(tempfile.gettempdir()) / "deit-cli-walk"  # always the same: a plan holds where its source lies
    folder.mkdir()
    try:
        out.write_text(json.dumps(walk(folder), indent=1, sort_keys=True))
        if keep:
            shutil.copytree(folder, keep)
    finally:
        shutil.rmtree(folder)


@commands.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--text/--no-text", default=True, help="Also print where the texts differ.")
def compare(before: Path, after: Path, text: bool) -> None:
    """Print what differs; exit with 1 where a code or a file does."""
    old, new = (json.loads(path.read_text())["steps"] for path in (before, after))
    serious = 0
    if [step["line"] for step in old] != [step["line"] for step in new]:
        raise click.ClickException("the two walks took different steps")
    for one, other in zip(old, new, strict=True):
        for name in ("code", "files"):
            if one[name] != other[name]:
                serious += 1
                click.echo(f"{name.upper()} {one['line']}\n  before {one[name]}\n  after  {other[name]}")
        for name in ("stdout", "stderr") if text else ():
            lines = difflib.unified_diff(one[name].splitlines(), other[name].splitlines(), lineterm="", n=0)
            if shown := [line for line in lines if not line.startswith(("---", "+++", "@@"))]:
                click.echo(f"{name} {one['line']}\n  " + "\n  ".join(shown))
    click.echo(f"{len(old)} steps, {serious} codes or file lists differ")
    sys.exit(1 if serious else 0)


if __name__ == "__main__":
    commands()
