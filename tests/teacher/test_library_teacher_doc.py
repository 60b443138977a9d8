"""Every example of docs/library-teacher.md is a whole program, and runs as it stands."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.labels.format import NO_WEIGHTS
from pipeline.labels.labelset import LabelSet

PAGE = (Path(__file__).parents[2] / "docs/library-teacher.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
MADE = [("shards-own", "module/SmallNet", False), ("shards-both-ways", "callable/linear-flipped@1", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("example", "made"), list(zip(EXAMPLES, MADE, strict=True)), ids=[name for name, *_ in MADE])
def test_an_example_makes_the_label_set_that_it_names(tmp_path, monkeypatch, capsys, example, made):
    out, teacher, unseen = made
    rng = np.random.default_rng(0)
    for number in range(10):
        folder = tmp_path / f"cifar10/train/{number}"
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "0.png")
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")  # the loaders import it, too
    assert teacher in capsys.readouterr().out
    labels = LabelSet.open(out)
    (identity,) = labels.plan.teacher.members
    assert (identity.name, identity.img_size, identity.num_classes) == (teacher, 32, 10)
    assert (identity.weights_sha256 == NO_WEIGHTS) == unseen
    assert sum(len(labels.read(shard, view).row) for shard in labels.shards for view in labels.views) == 20
