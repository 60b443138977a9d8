"""What a command imports: moving and reading label sets takes no network library, and help takes nothing heavy at all."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.signing import write_key

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/v1/shards"

# Libraries that take long to import, or much memory.
HEAVY = ("torch", "torchvision", "timm", "cv2", "matplotlib", "ray", "webdataset", "pyarrow", "fsspec", "aiohttp")
TABLES = {"pyarrow"}
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import cli
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("HEAVY", *(name for name in {HEAVY} if name in sys.modules))
"""

COMMANDS = [
    # command line, with SET for a label set and OUT for a new folder; the heavy libraries that it may import
    ("--help", set()),
    ("labels --help", set()),
    ("train --help", set()),
    ("precompute --help", set()),
    ("compare --help", set()),
    ("completion bash", set()),
    ("man --out OUT", set()),
    ("recipes", set()),
    ("runs SET", set()),
    ("export --help", set()),
    ("labels info SET", TABLES),
    ("labels info --json SET", TABLES),
    ("labels audit SET", TABLES),
    ("labels audit --json SET", TABLES),
    ("labels verify --no-probes SET", TABLES),
    ("labels verify SET --data IMAGES", TABLES | {"torch", "cv2"}),  # replay probes are rendered
    ("pack IMAGES OUT -j 0 --on-bad-image skip", TABLES | {"torch", "cv2"}),  # those of the loader processes
    ("labels push SET OUT", TABLES),
    ("labels pull SET OUT", TABLES),
    ("labels merge OUT SET", TABLES),
    ("labels card SET", TABLES),
    ("labels sign SET --private-key KEY", TABLES),
]


@pytest.mark.parametrize(("command", "allowed"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_command_imports_only_the_heavy_libraries_that_it_needs(tmp_path, command, allowed):
    words = {
        "SET": shutil.copytree(GOLDEN, tmp_path / "set"),
        "OUT": tmp_path / "out",
        "IMAGES": GOLDEN.parent / "images",
    }
    if "KEY" in command:
        if importlib.util.find_spec("model_signing") is None:
            pytest.skip("model_signing is not installed")
        words["KEY"], _ = write_key(tmp_path, "team")
    arguments = [str(words.get(word, word)) for word in command.split()]
    ended = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert set(ended.stdout.splitlines()[-1].split()[1:]) <= allowed
