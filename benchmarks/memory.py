"""Peak memory of precompute, for small and large source shards, few and many views, small and large mix blocks.

    python benchmarks/memory.py --data imagenet-sample --out benchmarks/results/memory.json

Photographs of --data are repeated under new keys into one tar of 1,000 and one of 10,000 images. Each case runs in a
process of its own; twice a second the proportional set sizes of it and of all its children are added up (shared pages
count once), and the largest sum is kept. Linux only.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from rounds import machine, options, write_json
from webdataset.writer import TarWriter

CASES = [
    # images in the source shard, views of a label shard, mix block
    (1_000, 4, 256),
    (10_000, 4, 256),
    (1_000, 16, 256),
    (1_000, 4, 64),
]
RUN = """
import sys
from pathlib import Path
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.stage1.precompute import precompute
from pipeline.settings.files import load_recipe
from pipeline.images.source import open_source
from pipeline.teacher.loading import load_teacher
if __name__ == "__main__":
    data, out, views, block = sys.argv[1:]
    source = open_source(data)
    asked = TeacherConfig(teacher=("test_resnet",), pretrained=False, teacher_img_size=32, device="cpu")
    config = PrecomputeConfig(data=data, out=Path(out), views=(0, int(views)), workers=1, accuracy_samples=0)
    recipe = load_recipe("deit", {"mix_block": int(block)})
    precompute(config, recipe, load_teacher(asked, num_classes=1000), source)
"""


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of a process and of everything that it started."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    total, left = 0, [pid]
    while left:
        each = left.pop()
        left += parents.get(each, [])
        try:
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")))
    return total


def write_source(data: str, path: Path, count: int) -> None:
    with tarfile.open(next(Path(data).glob("*.tar"))) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        photos = [tar.extractfile(member).read() for member in members]  # pyright: ignore[reportOptionalMemberAccess]
    with TarWriter(str(path)) as out:
        for number in range(count):
            out.write(
                {"__key__": f"{number:06}", "jpg": photos[number % len(photos)], "cls": str(number % 1000).encode()}
            )


def peak(source: Path, out: Path, views: int, block: int) -> tuple[int, float]:
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", RUN, str(source), str(out), str(views), str(block)])
    highest = 0
    while process.poll() is None:
        highest = max(highest, pss_bytes(process.pid))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(process.returncode)
    return highest, time.monotonic() - began


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for count, views, block in CASES:
            source = Path(folder) / f"train-{count}.tar"
            if not source.exists():
                write_source(args.data, source, count)
            highest, seconds = peak(source, Path(folder) / f"set-{count}-{views}-{block}", views, block)
            cases.append(
                {"images": count, "views": views, "mix_block": block, "peak_bytes": highest, "seconds": seconds}
            )
            print(f"{count:6} images {views:3} views, mix block {block:3}: {highest / 2**20:,.0f} MiB", flush=True)
    result = {"what": "peak memory of precompute, 1 loader process, PSS", "machine": machine(), "cases": cases}
    write_json(args.out, result)


if __name__ == "__main__":
    main()
