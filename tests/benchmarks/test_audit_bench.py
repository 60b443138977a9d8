"""benchmarks/audit.py: its measures against slow ones, and a run of toy size."""

import json
import math
import sys
from itertools import permutations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.builders import shared_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script by its path: its folder has modules of its own, and `audit` is a common name."""
    from importlib.util import module_from_spec, spec_from_file_location

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = spec_from_file_location("audit_bench", ROOT / "benchmarks/audit.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def test_precision_is_the_mean_over_all_orders_of_equal_scores(bench):
    score, true = np.array([3.0, 2, 2, 2, 1]), np.array([True, False, True, False, True])
    for number in range(1, 6):
        orders = [sorted(order, key=lambda i: -score[i]) for order in permutations(range(5))]
        expected = sum(sum(true[order[:number]]) / number for order in orders) / math.factorial(5)
        assert bench.precision_at(score, true, number) == pytest.approx(100 * expected)


def test_copies_are_counted_by_a_search_over_all_pairs(bench):
    """Forty patterns and four copies with noise, some far from their originals."""
    random = np.random.default_rng(0)
    originals = random.random((40, 5))
    copied = np.array([3, 8, 20, 39])
    noise = np.array([0.01, 0.05, 0.3, 1.0])[:, None]
    pattern = np.vstack([originals, originals[copied] + noise * random.random((4, 5))])
    unit = [each / np.linalg.norm(each) for each in pattern]
    true = [float(unit[40 + n] @ unit[c]) for n, c in enumerate(copied)]
    others = sorted((float(unit[a] @ unit[b]) for a in range(40) for b in range(a + 1, 40)), reverse=True)
    nearest = sum(
        true[n] > max(float(unit[40 + n] @ unit[i]) for i in range(44) if i not in (c, 40 + n))
        for n, c in enumerate(copied)
    )
    assert bench.pairs_found(pattern, copied) == {
        "nearest": 25 * nearest,
        "found_even": 25 * sum(each > others[3] for each in true),
        "found_certain": 25 * sum(each > others[0] for each in true),
    }


@pytest.mark.slow
def test_a_toy_run_writes_every_number_and_continues(bench, tmp_path, monkeypatch, capsys):
    changes = {
        "IMAGES": 96,
        "COPIES": 8,
        "VIEWS": (1, 2),
        "TEACHERS": {"1 epoch": (1, bench.CROP_FLIP)},
        "SWAPPED": 0.1,
    }
    for name, value in changes.items():
        monkeypatch.setattr(bench, name, value)
    out = tmp_path / "out.json"
    asked = ["audit.py", "--data", str(shared_data("cifar10")), "--out", str(out), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", asked)
    bench.main()
    found = json.loads(out.read_bytes())
    assert [(run["teacher"], run["recipe"]) for run in found["runs"]] == [
        ("1 epoch", "crop-flip"),
        ("1 epoch", "half-mixed"),
    ]
    for run in found["runs"]:
        assert len(run["scores"]) == 2 * 4 * 2
        assert all(0 <= each["precision"] <= 100 for each in run["scores"])
    plain = {(s["score"], s["views"]): s["precision"] for s in found["runs"][0]["scores"] if s["mixed"] == "plain"}
    mixed = {(s["score"], s["views"]): s["precision"] for s in found["runs"][0]["scores"] if s["mixed"] == "weighted"}
    assert plain == mixed  # no view is mixed
    monkeypatch.setattr(bench, "train_teacher", None)  # nothing is done again
    bench.main()
    assert json.loads(out.read_bytes()) == found
    assert "| 1 epoch | half-mixed | margin | weighted |" in capsys.readouterr().out
