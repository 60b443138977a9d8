"""The table of promises names tests that exist, and every fault of it has one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("|")]
FAULTS = {int(row[0]): row for row in ROWS if row[0].isdecimal()}
NAMED = sorted({name for row in ROWS for name in re.findall(r"`(test_[a-z0-9_]+(?:::\w+)?)`", row[-1])})


def names_in(module: str) -> list[str]:
    (path,) = (ROOT / "tests").rglob(f"{module}.py")
    return re.findall(r"^ *def (test_\w+)", path.read_text(), flags=re.MULTILINE)


def test_every_fault_has_its_row_its_promise_and_its_tests():
    assert sorted(FAULTS) == list(range(1, 25))
    for number, (_, fault, promises, tests) in FAULTS.items():
        assert fault, number
        assert re.fullmatch(r"P[1-6]( P[1-6])*", promises), number
        assert tests.startswith("`test_"), number


@pytest.mark.parametrize("name", NAMED)
def test_what_the_page_names_is_there(name):
    module, _, beginning = name.partition("::")
    assert any(test.startswith(beginning) for test in names_in(module))


def test_every_test_of_a_fault_is_on_the_page():
    modules = sorted(path.stem for path in (ROOT / "tests").rglob("test_*.py"))
    found = {(module, test) for module in modules for test in names_in(module) if re.match(r"test_fault_\d", test)}
    assert len(found) > 40
    for module, test in sorted(found):
        match = re.match(r"test_fault_(\d+)", test)
        assert match
        assert f"`{module}::test_fault_{match[1]}`" in FAULTS[int(match[1])][-1], test


def test_the_bounds_are_those_of_the_code():
    from pipeline.images import decode, samples
    from pipeline.images import parquet as parquet_source
    from pipeline.labels import manifest, parquet_guard
    from pipeline.labels import tables as labels
    from pipeline.storage import json

    for value in (labels.MAX_SHARD_SAMPLES, decode.MAX_PIXELS):
        assert f"{value:,}" in PAGE
    assert (json.MAX_JSON_BYTES, json.MAX_JSON_VALUES) == (64 << 20, 4_000_000)
    assert {
        manifest.MAX_FILE_BYTES,
        labels.MAX_VIEW_BYTES,
        parquet_guard.MAX_SAMPLES_BYTES,
        samples.MAX_IMAGE_BYTES,
    } == {1 << 30}
    assert (parquet_guard.MAX_PAGE_BYTES, manifest.MAX_PROBES, decode.MAX_SCANS) == (16 << 20, 64, 100)
    assert parquet_source.MAX_ROW_GROUP_BYTES == 2 << 30
