"""torch.compile changes the order of sums and where values are rounded, and no answer beyond that."""

import os
import shutil

import numpy as np
import pytest
import torch
from on_gpu import CNN, columns, labels_of, load, losses_of, run_config, state_of

from trainer.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))),
        reason="torch.compile needs a C compiler, and there is none",
    ),
]


@pytest.fixture(autouse=True)
def _fresh():
    """Forget what earlier tests have compiled."""
    torch.compiler.reset()


# The student comes first: with torch 2.11 on a CPU its backward pass crashes in a process that has compiled a teacher.
def test_a_compiled_student_learns_what_the_plain_one_does(device, label_set, tmp_path):
    """Twelve updates in the dtype of a run, whose losses fall by more than 0.1. Those of bfloat16 are 0.001 from those of float32
    here, so two ways of rounding to it stay within 0.01."""
    for compiled in (False, True):
        config = run_config(
            label_set,
            tmp_path / str(compiled),
            device,
            compile=compiled,
            depth=1,
            drop_path=0.0,
            epochs=4,
            warmup_epochs=0,
            lr=5e-3,
            model_ema=False,
        )
        train(config)
    plain, fast = (losses_of(tmp_path / name) for name in ("False", "True"))
    assert fast == pytest.approx(plain, rel=0, abs=0.01)
    assert min(plain) < plain[0] - 0.1
    assert state_of(tmp_path / "True").keys() == state_of(tmp_path / "False").keys()


def test_a_compiled_student_learns_from_views_that_a_gpu_renders(gpu, label_set, tmp_path):
    """Its kernels and those of the views are compiled in one process, and run on two streams; see above for the limit."""
    for way in ("cpu", "gpu"):
        train(run_config(label_set, tmp_path / way, gpu, compile=True, depth=1, render=way))
    assert losses_of(tmp_path / "gpu") == pytest.approx(losses_of(tmp_path / "cpu"), rel=0, abs=0.01)


def test_a_compiled_teacher_gives_the_labels_of_the_plain_one(device, data, tmp_path):
    """In the dtype of a run. On this small network bfloat16 moves a probability by 0.007, so two ways of rounding may be twice
    that apart: a view whose two best classes are nearer than 0.02 may change its class."""
    plain, compiled = (
        labels_of(load(CNN, device, dtype="auto", compile=each), tmp_path / str(each), data, precision="float32")
        for each in (False, True)
    )
    assert compiled.manifest.environments[0]["dtype"].endswith("compiled")
    prob = columns(plain, "topk_prob")
    flips = columns(plain, "hard") != columns(compiled, "hard")
    assert (prob[flips, 0] - prob[flips, 1] < 0.02).all()
    assert flips.mean() < 0.05
    by_class = [np.take_along_axis(columns(s, "topk_prob"), columns(s, "topk_index").argsort(1), 1) for s in (plain, compiled)]  # fmt: skip
    assert np.abs(by_class[0] - by_class[1]).max() < 0.02
    assert len(np.unique(columns(plain, "hard"))) == 3
