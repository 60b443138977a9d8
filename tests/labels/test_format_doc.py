"""The format page says what the code does: its example runs, and it names every field, column, limit and rule."""

import ast
import contextlib
import io
import re
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.labels.encoding import codec_of
from pipeline.labels.format import MAX_TOPK
from pipeline.labels.manifest import (
    EnsembleIdentity,
    FileEntry,
    Manifest,
    Plan,
    Probe,
    ReadingRecord,
    ShardRecord,
    SourceRecord,
    TeacherIdentity,
)
from pipeline.labels.replay import SAMPLED_BYTES, TOLERANCE
from pipeline.labels.sealing import MANIFEST_PROBES
from pipeline.labels.tables import SAMPLES_SCHEMA, LabelsFooter, SamplesFooter, labels_schema
from pipeline.views.draws import stream_of
from pipeline.views.recipe import Recipe

PAGE = (Path(__file__).parents[2] / "docs/format-v1.md").read_text()
GOLDEN = Path(__file__).parents[1] / "golden/v1"


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    return code


def test_the_example_reads_the_golden_set(monkeypatch):
    monkeypatch.chdir(GOLDEN)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example(), "format-v1.md", "exec"), {})
    rows = ast.literal_eval(printed.getvalue())
    assert [(row["key"], row["hard"]) for row in rows] == list(zip(("g0", "g1", "g3", "g4", "g5", "g6"), (0, 1, 0, 1, 2, 0), strict=True))  # fmt: skip
    assert rows[3]["topk_prob"] == [0.98828125, 0.007099151611328125]


def test_the_example_is_short_and_needs_pyarrow_alone():
    lines = [line for line in example().splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    imported = re.findall(r"^(?:import|from) (\w+)", example(), flags=re.MULTILINE)
    assert set(imported) == {"json", "pathlib", "pyarrow"}


FIELDS = {
    **{
        model.__name__: tuple(model.model_fields)
        for model in (Plan, Manifest, Probe, TeacherIdentity, EnsembleIdentity, Recipe)
    },
    **{kind.__name__: tuple(kind.model_fields) for kind in (SourceRecord, ReadingRecord, SamplesFooter, LabelsFooter)},
    **{kind.__name__: tuple(field.name for field in fields(kind)) for kind in (FileEntry, ShardRecord)},
    "samples table": tuple(SAMPLES_SCHEMA.names),
    "labels table": tuple(labels_schema(codec_of("float16", 10, 2)).names),
}


@pytest.mark.parametrize("what", FIELDS)
def test_every_field_is_named(what):
    assert [name for name in FIELDS[what] if f"`{name}`" not in PAGE] == []


def test_no_field_is_named_that_does_not_exist():
    known = {name for names in FIELDS.values() for name in names} | {"device", "dtype", "element"}
    first_cells = re.findall(r"^\| ((?:`[a-z_0-9]+`(?:, )?)+) \|", PAGE, flags=re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    purposes = {"crop", "flip", "randaug", "erase", "mix"}
    assert named - known - purposes == set()


@pytest.mark.parametrize(
    "text",
    [
        f"min({SAMPLED_BYTES}, H·W·3)",
        f"up to {TOLERANCE} of 255",
        f"(at most {MANIFEST_PROBES})",
        f"0..{MAX_TOPK}",
        f"`{stream_of('a', 'b').bits():#x}`",
        "renderer 1",
    ],
)
def test_numbers_of_the_page_are_those_of_the_code(text):
    assert text in PAGE
