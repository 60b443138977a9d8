"""Loader processes import what they use: no networks, no compiler, no library of a hub.

The commands run as users run them, in processes of their own. An audit hook, which Python calls for every import, notes
what each process imports; forked processes inherit it.
"""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from support.label_sets import write_source

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/v1"

# Importing timm imports torchvision, which imports torch's compiler, and this sympy: together longer than torch itself.
NETWORKS = {"timm", "torchvision", "torch._dynamo", "torch._inductor", "sympy", "huggingface_hub", "wandb"}
HOOK = f"""
import os, sys

def note(event, arguments):
    if event == "import" and arguments[0] in {sorted({*NETWORKS, "torch", "cv2"})}:
        with open(os.environ["NOTED_IMPORTS"], "a") as file:
            file.write(f"{{os.getpid()}} {{arguments[0]}}\\n")

sys.addaudithook(note)
"""
SMALL = "--patch-size 8 --embed-dim 32 --depth 2 --num-heads 2 --warmup-epochs 0 -b 8 --epochs 1 --log-interval 1"
COMMANDS = [
    "precompute --data IMAGES --teacher test_resnet --no-pretrained --out OUT --views 0:2 --on-bad-image skip --set img_size=32 -j 2",
    f"train --labels SET --data IMAGES --eval-data SOUND --output OUT {SMALL} -j 2",
]


def run(command: str, folder: Path) -> dict[int, set[str]]:
    """Run a command; return the modules that each process has imported, of those that are noted. The command is process 0."""
    (folder / "hook").mkdir()
    (folder / "hook/sitecustomize.py").write_text(HOOK)
    noted = folder / "noted"
    sound = write_source(folder / "sound", (4,))  # one of the golden images is bad
    words = {
        "SOUND": str(sound),
        "IMAGES": str(GOLDEN / "images"),
        "SET": str(GOLDEN / "shards"),
        "OUT": str(folder / "out"),
    }
    environment = os.environ | {
        "PYTHONPATH": f"{folder / 'hook'}:{ROOT}",
        "NOTED_IMPORTS": str(noted),
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = [sys.executable, str(ROOT / "cli.py"), *(words.get(word, word) for word in command.split())]
    process = subprocess.Popen(
        arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said, _ = process.communicate()
    assert process.returncode == 0, said
    found: defaultdict[int, set[str]] = defaultdict(set)
    for line in noted.read_text().splitlines():
        pid, name = line.split()
        found[0 if int(pid) == process.pid else int(pid)].add(name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=[command.split()[0] for command in COMMANDS])
def test_loader_processes_import_no_networks(tmp_path, command):
    found = run(command, tmp_path)
    assert found.pop(0) >= {"timm", "torch"}  # the hook works, and the command itself needs both
    assert any("torch" in names for names in found.values())  # the process from which loaders are forked
    everywhere = {name for names in found.values() for name in names}
    assert everywhere & NETWORKS == set()
    assert ("cv2" in everywhere) == command.startswith(
        "train"
    )  # its labels are of renderer 1, whose pixels are OpenCV's
