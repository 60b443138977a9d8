"""Label and sample tables: exact types on the way in, exact checks on the way out."""

import contextlib
import dataclasses
import io
import json
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.tables import FIELDS, assert_equal, encode_rows, footer_of, write

from pipeline.errors import DeitCliError, LabelSetCorrupt, LabelSetMismatch
from pipeline.labels import parquet_guard
from pipeline.labels.encoding import LabelRows, codec_of, index_dtype
from pipeline.labels.tables import (
    FOOTER_KEY,
    SAMPLES_SCHEMA,
    LabelsFooter,
    SampleRows,
    SamplesFooter,
    labels_schema,
    read_all_views,
    read_labels_footer,
    read_samples,
    read_samples_footer,
    read_views,
    write_labels,
    write_samples,
)
from pipeline.storage.json import canonical_json


def answers(rows: int, classes: int, topk: int, seed: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Return rows, hard, index and probabilities as a teacher might answer: softmax of random logits."""
    rng = np.random.default_rng(seed)
    kept = max(topk, 1)
    index = np.stack([rng.choice(classes, kept, replace=False) for _ in range(rows)]) if rows else np.empty((0, kept))
    power = np.exp(4 * rng.standard_normal((rows, kept + 1)))
    prob = -np.sort(-power[:, :kept], axis=1) / power.sum(axis=1, keepdims=True)
    row = np.sort(rng.choice(3 * rows + 1, rows, replace=False))
    return row, index[:, 0], index[:, :topk], prob[:, :topk].astype(np.float32)


def make_views(rows=5, classes=10, topk=3, precision: Any = "float16", views=2) -> list[LabelRows]:
    return [
        encode_rows(*answers(rows, classes, topk, view), num_classes=classes, precision=precision)
        for view in range(views)
    ]


# What is written is what is read.

SHAPES = [
    # classes, K, precision, rows
    (10, 3, "float16", 5),
    (10, 0, "float16", 5),  # hard labels alone
    (10, 0, "float32", 1),
    (10, 10, "float32", 4),  # every class kept: the tail is empty
    (1, 1, "float16", 3),  # one class
    (65_536, 5, "float16", 7),  # the last that fits uint16
    (65_537, 5, "float16", 7),  # the first that needs uint32
    (100_000, 0, "float16", 3),
    (1000, 10, "float32", 300),
    (10, 3, "float16", 0),  # a shard of bad images alone
    (10, 0, "float16", 0),
]


@pytest.mark.parametrize(("classes", "topk", "precision", "rows"), SHAPES)
def test_labels_come_back_bit_for_bit(tmp_path, classes, topk, precision, rows):
    views = make_views(rows, classes, topk, precision, views=3)
    path = write(tmp_path / "a.parquet", views, footer_of(views, classes, precision, view_start=7))
    for view, expected in enumerate(views, 7):
        assert_equal(read_views(path, view, 1)[0], expected)
    for found, expected in zip(read_all_views(path), views, strict=True):
        assert_equal(found, expected)


@given(st.integers(0, 40), st.integers(1, 200), st.integers(0, 8), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_any_answers_come_back_bit_for_bit(tmp_path_factory, rows, classes, topk, seed):
    kept = min(topk, classes)
    views = [encode_rows(*answers(rows, classes, kept, seed), num_classes=classes, precision="float16")]
    path = write(tmp_path_factory.mktemp("any") / "a.parquet", views, footer_of(views, classes))
    assert_equal(read_views(path, 0, 1)[0], views[0])


def test_the_schema_is_the_page_s():
    index, prob = pa.uint16(), pa.float16()
    expected = [
        pa.field("view", pa.uint32(), nullable=False),
        pa.field("row", pa.uint32(), nullable=False),
        pa.field("hard", index, nullable=False),
        pa.field("topk_index", pa.list_(pa.field("element", index, nullable=False), 3), nullable=False),
        pa.field("topk_prob", pa.list_(pa.field("element", prob, nullable=False), 3), nullable=False),
        pa.field("tail_mass", prob, nullable=False),
    ]
    assert labels_schema(codec_of("float16", 10, 3)).equals(pa.schema(expected))
    assert labels_schema(codec_of("float16", 10, 0)).equals(pa.schema(expected[:3]))
    wide = labels_schema(codec_of("float32", 65_537, 2))
    assert [wide.field(name).type for name in ("hard", "tail_mass")] == [pa.uint32(), pa.float32()]
    assert (index_dtype(65_536), index_dtype(65_537)) == (np.uint16, np.uint32)


def test_a_row_group_is_a_view_and_other_readers_see_the_same(tmp_path):
    views = make_views(views=3)
    file = pq.ParquetFile(write(tmp_path / "a.parquet", views, footer_of(views, view_start=4)))
    assert file.metadata.num_row_groups == 3
    for group, rows in enumerate(views):
        table = file.read_row_group(group)
        assert table["view"].to_pylist() == [4 + group] * 5
        assert table["row"].to_pylist() == rows.row.tolist()
        assert table["topk_index"].to_pylist() == rows.topk_index.tolist()
        assert table["topk_prob"].to_pylist() == rows.topk_prob.tolist()
    compression = {file.metadata.row_group(0).column(i).compression for i in range(6)}
    assert compression == {"ZSTD"}


def test_the_footer_says_what_the_file_is(tmp_path):
    views = make_views()
    footer = footer_of(views)
    path = write(tmp_path / "a.parquet", views, footer)
    assert read_labels_footer(path) == footer
    raw = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY])
    assert (raw["format"], raw["version"], raw["kind"]) == ("deit-cli-labels", 1, "labels")


def test_the_content_hash_covers_every_value_in_the_order_of_the_page():
    views = make_views(views=2)
    stream = b"".join(getattr(rows, name).tobytes() for rows in views for name in FIELDS)
    assert codec_of("float16", 10, 3).content_xxh3(views) == xxhash.xxh3_128_hexdigest(stream)


@pytest.mark.parametrize("name", FIELDS)
def test_the_content_hash_changes_with_any_value(name):
    views = make_views()
    changed = getattr(views[1], name).copy()
    changed.reshape(-1)[-1] += 1
    others, codec = [views[0], dataclasses.replace(views[1], **{name: changed})], codec_of("float16", 10, 3)
    assert codec.content_xxh3(others) != codec.content_xxh3(views)


def test_an_imagenet_label_takes_about_thirty_bytes():
    """Ten of a thousand classes in float16: 44 bytes uncompressed with the hard label and the tail."""
    views = make_views(rows=1024, classes=1000, topk=10, views=4)
    file = io.BytesIO()
    write_labels(file, views, footer_of(views, 1000))
    assert 24 <= len(file.getvalue()) / (4 * 1024) <= 44
    hard = make_views(rows=1024, classes=1000, topk=0, views=4)
    file = io.BytesIO()
    write_labels(file, hard, footer_of(hard, 1000))
    assert len(file.getvalue()) / (4 * 1024) <= 4


# Encoding.


def test_rows_are_sorted_and_every_column_with_them():
    order = np.array([3, 0, 2])
    rows = encode_rows(
        order,
        hard=order + 10,
        index=np.stack([order + 10, order + 20], axis=1),
        prob=np.array([[0.5, 0.25], [0.75, 0.125], [0.5, 0.5]], np.float32),
        num_classes=100,
        precision="float16",
    )
    assert rows.row.tolist() == [0, 2, 3]
    assert rows.hard.tolist() == [10, 12, 13]
    assert rows.topk_index.tolist() == [[10, 20], [12, 22], [13, 23]]
    assert rows.topk_prob.tolist() == [[0.75, 0.125], [0.5, 0.5], [0.5, 0.25]]
    assert rows.tail_mass.tolist() == [0.125, 0, 0.25]


def test_the_tail_is_taken_before_rounding():
    """Rounded to float16 the kept probability is 1; the tail keeps what was left."""
    prob = np.array([[1 - 3e-5]], np.float32)
    rows = encode_rows(np.array([0]), np.array([0]), np.array([[0]]), prob, num_classes=5, precision="float16")
    assert rows.topk_prob.tolist() == [[1.0]]
    assert float(rows.tail_mass[0]) == pytest.approx(3e-5, rel=0.01)


def test_the_tail_is_never_negative():
    prob = np.array([[0.6, 0.40000004]], np.float32)
    rows = encode_rows(np.array([0]), np.array([0]), np.array([[0, 1]]), prob, num_classes=5, precision="float32")
    assert rows.tail_mass.tolist() == [0.0]


# What no teacher can have answered is refused.


def changed(rows: LabelRows, name: str, at: Any, value: Any) -> LabelRows:
    values = getattr(rows, name).copy()
    values[at] = value
    return dataclasses.replace(rows, **{name: values})


HOSTILE = [
    # column, place, value, what the error says
    ("row", 1, 0, "rows are not in ascending order"),
    ("row", 4, 1, "rows are not in ascending order"),
    ("hard", 0, 10, "a class is not below 10"),
    ("hard", 0, 65_535, "a class is not below 10"),
    ("topk_index", (2, 2), 10, "a class is not below 10"),
    ("topk_prob", (0, 0), 1.01, "a probability is outside 0..1"),
    ("topk_prob", (0, 2), -0.01, "a probability is outside 0..1"),
    ("topk_prob", (3, 1), np.nan, "a probability is outside 0..1"),
    ("topk_prob", (3, 1), np.inf, "a probability is outside 0..1"),
    ("tail_mass", 2, np.nan, "a probability is outside 0..1"),
    ("tail_mass", 2, -1, "a probability is outside 0..1"),
    ("topk_prob", (0, slice(None)), [0.1, 0.2, 0.3], "probabilities are not in descending order"),
    ("topk_prob", (0, slice(None)), [0.1, 0.1, 0.1], "probabilities do not add up to 1"),
    ("tail_mass", 1, 1.0, "probabilities do not add up to 1"),
    ("topk_index", (4, 0), 9, "`hard` is not the first class of top-k"),
    ("hard", 4, 9, "`hard` is not the first class of top-k"),
]


def plain_rows() -> LabelRows:
    index = np.tile(np.array([4, 1, 7]), (5, 1))
    prob = np.tile(np.array([0.5, 0.25, 0.125], np.float32), (5, 1))
    return encode_rows(np.arange(5), index[:, 0], index, prob, num_classes=10, precision="float16")


@pytest.mark.parametrize(("name", "at", "value", "problem"), HOSTILE)
def test_values_that_no_teacher_can_have_answered_are_refused(tmp_path, name, at, value, problem):
    views = [plain_rows(), changed(plain_rows(), name, at, value)]
    path = write(tmp_path / "a.parquet", views, footer_of(views))
    assert_equal(read_views(path, 0, 1)[0], views[0])
    for read in (lambda: read_views(path, 1, 1)[0], lambda: read_all_views(path)):
        with pytest.raises(LabelSetCorrupt) as caught:
            read()
        assert str(caught.value) == f"{path}: view 1: {problem}"


def test_a_class_that_stands_twice_is_refused(tmp_path):
    views = [changed(plain_rows(), "topk_index", (0, 2), 1)]
    path = write(tmp_path / "a.parquet", views, footer_of(views))
    with pytest.raises(LabelSetCorrupt, match="twice"):
        read_views(path, 0, 1)


def test_rows_that_are_not_those_of_the_footer_s_hash_are_refused(tmp_path):
    views = make_views()
    path = write(tmp_path / "a.parquet", views, footer_of(views, content_xxh3="0" * 32))
    with pytest.raises(LabelSetCorrupt, match="do not have the hash that its footer states"):
        read_all_views(path)


# Files that are not what they should be. Each case: how the table or footer is bent, error, text.


def bent(path: Path, *, table=None, groups=None, footer=None, raw: bytes | None = None) -> Path:
    """Write a label shard of two views with another table, other row groups or another footer."""
    views = [plain_rows(), plain_rows()]
    values = footer_of(views).model_dump(mode="json") | (footer or {})
    good = io.BytesIO()
    write_labels(good, views, footer_of(views))
    whole = pq.ParquetFile(good).read()
    whole = table(whole) if table else whole
    metadata = {FOOTER_KEY: json.dumps(values).encode() if raw is None else raw}
    with pq.ParquetWriter(path, whole.schema.with_metadata(metadata)) as writer:
        start = 0
        for rows in groups or (5, 5):
            writer.write_table(whole.slice(start, rows), row_group_size=max(1, rows))
            start += rows
    return path


def cast(name: str, kind: pa.DataType):
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, pa.field(name, kind, nullable=False), table[name].cast(kind))

    return change


def nullable(table: pa.Table) -> pa.Table:
    return table.cast(pa.schema([field.with_nullable(True) for field in table.schema]))


def tagged(table: pa.Table) -> pa.Table:
    """Return the table with an extension type that nobody has registered, as a hostile file would carry it."""
    at = table.schema.get_field_index("hard")
    field = table.schema.field(at).with_metadata({"ARROW:extension:name": "a.pickled.object"})
    return table.cast(table.schema.set(at, field))


SHAPE_ERRORS = [
    # name, keyword arguments of `bent`, text of the LabelSetCorrupt
    ("missing column", {"table": lambda t: t.drop_columns(["tail_mass"])}, "format v1 requires"),
    ("further column", {"table": lambda t: t.append_column("x", t["row"])}, "format v1 requires"),
    ("other order", {"table": lambda t: t.select(["row", "view", *t.column_names[2:]])}, "format v1 requires"),
    ("other name", {"table": lambda t: t.rename_columns(["v", *t.column_names[1:]])}, "format v1 requires"),
    ("wider class", {"table": cast("hard", pa.uint32())}, "with exact types"),
    ("signed class", {"table": cast("hard", pa.int16())}, "with exact types"),
    ("wider tail", {"table": cast("tail_mass", pa.float32())}, "with exact types"),
    ("nullable", {"table": nullable}, "with exact types"),
    ("other K", {"footer": {"topk": 2}}, "with exact types"),
    ("other precision", {"footer": {"precision": "float32"}}, "with exact types"),
    ("more classes", {"footer": {"num_classes": 70_000}}, "with exact types"),
    ("fewer classes", {"footer": {"num_classes": 7}}, "a class is not below 7"),
    ("uneven groups", {"groups": (4, 6)}, "not 5 for each view"),
    ("one group", {"groups": (10,)}, "not 5 for each view"),
    ("three groups", {"groups": (5, 4, 1)}, "not 5 for each view"),
    ("more views promised", {"footer": {"view_stop": 3}}, "not 5 for each view"),
    ("other views", {"footer": {"view_start": 1, "view_stop": 3}}, "must hold only view 1"),
    ("one view of two", {"table": lambda t: t.slice(5)}, "not 5 for each view"),
    ("field missing", {"raw": b'{"format": "deit-cli-labels", "version": 1}'}, "does not have the fields of a labels"),
    ("field too many", {"footer": {"exec": "import os"}}, "does not have the fields of a labels"),
    ("other kind", {"footer": {"kind": "samples"}}, "does not have the fields of a labels"),
    ("no JSON", {"raw": b"\x80pickle"}, "its footer is not valid JSON"),
    ("key twice", {"raw": b'{"format": 1, "format": 2}'}, "stands twice"),
    ("deep", {"raw": b"[" * 100_000}, "its footer is not valid JSON"),
]


@pytest.mark.parametrize(("name", "change", "text"), SHAPE_ERRORS, ids=[name for name, *_ in SHAPE_ERRORS])
def test_a_file_of_another_shape_is_refused(tmp_path, name, change, text):
    path = bent(tmp_path / "a.parquet", **change)
    with pytest.raises(LabelSetCorrupt) as caught:
        read_all_views(path)
    assert str(path) in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("read", [read_labels_footer, read_samples_footer])
def test_a_footer_without_its_kind_is_refused(tmp_path, read):
    kind = LabelsFooter if read is read_labels_footer else SamplesFooter
    views = [plain_rows()]
    values = footer_of(views).model_dump(mode="json") | {"rows": 5}
    raw = json.dumps({name: values[name] for name in kind.model_fields if name != "kind"}).encode()
    with pytest.raises(LabelSetCorrupt, match="kind"):
        read(bent(tmp_path / "a.parquet", raw=raw))


def test_the_unbent_file_is_fine(tmp_path):
    assert len(read_all_views(bent(tmp_path / "a.parquet"))) == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "a.parquet was made by a newer deit-cli: it is of format v2, this one reads v1. Upgrade"),
        ({"format": "other"}, "('other', 1); this version reads"),
        ({"version": "1"}, "('deit-cli-labels', '1'); this version reads"),
        ({"version": None}, "('deit-cli-labels', None); this version reads"),
        ({"version": True}, "('deit-cli-labels', True); this version reads"),  # equal to 1 in Python
        ({"version": 1.0}, "('deit-cli-labels', 1.0); this version reads"),
    ],
)
def test_another_version_is_refused_by_name(tmp_path, change, text):
    path = bent(tmp_path / "a.parquet", footer=change)
    with pytest.raises(LabelSetMismatch) as caught:
        read_labels_footer(path)
    assert text in str(caught.value)


WRONG_TYPES = [
    ("num_classes", "x"),
    ("rows_per_view", None),
    ("view_start", []),
    ("view_stop", "2"),
    ("view_start", -1),
    ("rows_per_view", -1),
    ("topk", 2.0),
    ("topk", True),
    ("precision", "object"),
    ("precision", "gloat16"),  # one flipped bit
    ("precision", 5),
    ("probes", "x"),
    ("environment", 4),
    ("labelset_id", 7),
    ("shard", None),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES, ids=[f"{field}={value}" for field, value in WRONG_TYPES])
def test_a_footer_value_of_another_type_is_refused_by_name(tmp_path, field, value):
    path = bent(tmp_path / "a.parquet", footer={field: value})
    with pytest.raises(LabelSetCorrupt, match=field):
        read_labels_footer(path)


@pytest.mark.parametrize(
    "claim",
    [
        {"view_stop": 2**31},  # the most that the field takes: a list of them would need 16 GiB
        {"view_stop": 2**62},
        {"rows_per_view": 2**47},
        {"rows_per_view": 2**62},
    ],
)
@pytest.mark.usefixtures("one_more_gibibyte")
def test_a_footer_that_claims_too_much_is_refused_without_allocating_it(tmp_path, claim):
    path = bent(tmp_path / "a.parquet", footer=claim)
    with pytest.raises(LabelSetCorrupt, match=r"rows, not \d+ for each view|Input should be less than"):
        read_all_views(path)


@pytest.fixture
def one_more_gibibyte():
    """Allow this process 1 GiB more than it has: what asks for more gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_an_extension_type_that_nobody_registered_is_refused(tmp_path):
    path = bent(tmp_path / "a.parquet", table=tagged)
    with pytest.raises(LabelSetCorrupt, match="extension"):
        read_views(path, 0, 1)


class Trap(pa.ExtensionType):
    """An extension type whose reading runs code, as Ray Data's pickled objects did."""

    sprung: list[bytes] = []  # noqa: RUF012
    payload = b"payload"

    def __init__(self) -> None:
        super().__init__(pa.uint16(), "test.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return type(self).payload

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        cls.sprung.append(serialized)
        return cls()


@contextlib.contextmanager
def trap_of(path: Path, payload: bytes) -> Iterator[Path]:
    """Write a label shard whose `hard` has an extension type, registered as long as the context lasts."""

    def trap(table: pa.Table) -> pa.Table:
        values = pa.ExtensionArray.from_storage(Trap(), table["hard"].combine_chunks())
        return table.set_column(2, pa.field("hard", Trap(), nullable=False), values)

    Trap.payload = payload
    pa.register_extension_type(Trap())
    try:
        yield bent(path, table=trap)
    finally:
        pa.unregister_extension_type("test.trap")


@pytest.fixture
def trapped(tmp_path):
    with trap_of(tmp_path / "a.parquet", b"payload") as path:
        yield path


def test_a_registered_extension_type_is_refused(trapped):
    for read in (read_labels_footer, read_samples_footer, read_samples, read_all_views):
        with pytest.raises(LabelSetCorrupt, match="has Arrow extension types, which may run code"):
            read(trapped)


def test_a_registered_extension_type_runs_no_code(trapped):
    Trap.sprung.clear()
    with pytest.raises(DeitCliError):
        read_views(trapped, 0, 1)
    assert Trap.sprung == []


def test_a_registered_extension_type_runs_no_code_however_long_the_schema_is(tmp_path):
    for size in (0, 4000, 8000, 20_000):
        with trap_of(tmp_path / "a.parquet", payload=bytes(size)) as path:
            Trap.sprung.clear()
            with pytest.raises(DeitCliError, match="Arrow extension types"):
                read_views(path, 0, 1)
            assert Trap.sprung == []


def test_foreign_parquet_is_refused_by_name(tmp_path):
    pq.write_table(pa.table({"row": [1]}), tmp_path / "a.parquet")
    for read in (read_labels_footer, read_all_views, read_samples):
        with pytest.raises(LabelSetMismatch, match="is Parquet, but not of a label set"):
            read(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"not parquet at all", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_not_parquet_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    for read in (read_labels_footer, read_all_views, read_samples, read_samples_footer):
        with pytest.raises(LabelSetCorrupt, match=r"a\.parquet: damaged Parquet"):
            read(tmp_path / "a.parquet")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(LabelSetCorrupt, match=r"a\.parquet (is missing|cannot be read: No such file)"):
        read_views(tmp_path / "a.parquet", 0, 1)


def test_a_view_that_the_file_does_not_hold_is_refused(tmp_path):
    views = make_views(views=2)
    path = write(tmp_path / "a.parquet", views, footer_of(views, view_start=4))
    for view in (0, 3, 6, -1):
        with pytest.raises(LabelSetCorrupt, match=rf"holds views 4\.\.5, not {view}"):
            read_views(path, view, 1)


def test_every_cut_of_a_file_is_refused(tmp_path):
    views = make_views()
    data = write(tmp_path / "a.parquet", views, footer_of(views)).read_bytes()
    for size in range(0, len(data), 97):
        (tmp_path / "b.parquet").write_bytes(data[:size])
        with pytest.raises(LabelSetCorrupt):
            read_all_views(tmp_path / "b.parquet")


# Samples files.


def samples(**changes) -> tuple[SampleRows, SamplesFooter]:
    rows = SampleRows(
        key=("n01/a", "ü", "c" * 1000),
        class_label=(4, None, 0),
        image_bytes=np.array([1, 2**32 - 1, 0], np.uint32),
        image_xxh3=(bytes(16), b"\xff" * 16, bytes(range(16))),
        height=np.array([5, 6, 0], np.uint32),
        width=np.array([7, 8, 0], np.uint32),
        bad=(None, None, "empty file"),
    )
    rows = dataclasses.replace(rows, **changes)
    return rows, SamplesFooter(labelset_id="a" * 64, source_id="d" * 64, shard="s", rows=len(rows))


def write_samples_file(path: Path, rows: SampleRows, footer: SamplesFooter) -> Path:
    with path.open("wb") as file:
        write_samples(file, rows, footer)
    return path


def test_samples_come_back_as_they_were(tmp_path):
    rows, footer = samples()
    path = write_samples_file(tmp_path / "a.parquet", rows, footer)
    assert read_samples_footer(path) == footer
    found = read_samples(path)
    for field in dataclasses.fields(SampleRows):
        a, b = getattr(found, field.name), getattr(rows, field.name)
        assert a.tolist() == b.tolist() if isinstance(b, np.ndarray) else a == b, field.name
    assert found.usable.tolist() == [0, 1]


def test_columns_of_a_samples_file_are_sequences_of_python_values(tmp_path):
    """They stay in Arrow, and are the tuples that were written to all who use them."""
    rows, footer = samples()
    found = read_samples(write_samples_file(tmp_path / "a.parquet", rows, footer))
    for name in ("key", "class_label", "image_xxh3", "bad"):
        column, expected = getattr(found, name), getattr(rows, name)
        assert column == expected
        assert expected == column
        assert column != expected[:2]
        assert column == getattr(pickle.loads(pickle.dumps(found)), name)
        assert (len(column), list(column), tuple(reversed(column))) == (3, list(expected), expected[::-1])
        assert [column[row] for row in (0, 1, 2, -1)] == [expected[row] for row in (0, 1, 2, -1)]
        assert [type(value) for value in column] == [type(value) for value in expected]
        assert (column[1:], column[::-1], repr(column)) == (expected[1:], expected[::-1], repr(expected))
        assert (column.index(expected[2]), expected[1] in column) == (2, True)
        assert hash(column) == hash(expected)
        with pytest.raises(IndexError):
            column[3]
    again = write_samples_file(tmp_path / "b.parquet", found, footer)
    assert again.read_bytes() == (tmp_path / "a.parquet").read_bytes()
    assert write_samples_file(tmp_path / "c.parquet", found.take(np.array([2, 0, 1])), footer).is_file()
    assert found.take(np.array([2, 0])).key == ("c" * 1000, "n01/a")


@pytest.mark.parametrize(
    "options",
    [{"use_dictionary": ["key"]}, {"use_dictionary": False, "column_encoding": {"key": "DELTA_BYTE_ARRAY"}}],
    ids=["dictionary", "shared prefixes"],
)
def test_a_samples_file_that_unpacks_to_too_much_is_refused_while_it_is_read(tmp_path, monkeypatch, options):
    """2,000 keys of 100 kB, stored once. Small pages are read many rows at once."""
    number = 2000
    rows, footer = samples(
        key=("k" * 100_000,) * number, class_label=(0,) * number, image_xxh3=(bytes(16),) * number, bad=(None,) * number,
        **dict.fromkeys(("image_bytes", "height", "width"), np.ones(number, np.uint32)),
    )  # fmt: skip
    table = pa.table({"row": np.arange(number), **vars(rows)}, schema=SAMPLES_SCHEMA)
    metadata = {b"deit_cli": canonical_json(footer.model_dump(mode="json"))}
    path = tmp_path / "a.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd", **options)
    assert path.stat().st_size < 1e6
    monkeypatch.setattr(parquet_guard, "MAX_SAMPLES_BYTES", 50 << 20)
    monkeypatch.setattr(parquet_guard, "MAX_PAGE_BYTES", 1 << 20)
    sizes, read = [], pq.ParquetFile.iter_batches

    def spy(file, *arguments, **keywords):
        for batch in read(file, *arguments, **keywords):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    with pytest.raises(LabelSetCorrupt, match=f"unpacks to more than {50 << 20} bytes"):
        read_samples(path)
    assert max(sizes) <= 17 << 20  # 16 rows of the largest page, as if each text were that long
    assert 50 << 20 < sum(sizes) <= 67 << 20


@pytest.mark.parametrize("name", ["key", "bad"])
def test_text_that_is_not_utf8_is_damage(tmp_path, name):
    rows, footer = samples(key=("a", "b", "c"), bad=("x", None, None))
    path = write_samples_file(tmp_path / "a.parquet", rows, footer)
    table = pq.read_table(path)
    broken = pa.array([b"\xff\xfe", b"b", b"c"]).view(pa.string())
    at = SAMPLES_SCHEMA.get_field_index(name)
    pq.write_table(table.set_column(at, SAMPLES_SCHEMA.field(name), broken), path)
    with pytest.raises(LabelSetCorrupt, match="damaged Parquet"):
        read_samples(path)


def test_no_samples_come_back_as_none(tmp_path):
    empty = np.empty(0, np.uint32)
    rows, footer = samples(key=(), class_label=(), image_bytes=empty, image_xxh3=(), height=empty, width=empty, bad=())
    found = read_samples(write_samples_file(tmp_path / "a.parquet", rows, footer))
    assert (len(found), found.usable.tolist()) == (0, [])


def test_rows_that_do_not_count_from_zero_are_refused(tmp_path):
    rows, footer = samples()
    path = write_samples_file(tmp_path / "a.parquet", rows, footer)
    table = pq.read_table(path)
    moved = table.set_column(0, SAMPLES_SCHEMA.field("row"), pa.array([0, 2, 1], pa.uint32()))
    pq.write_table(moved, path)
    with pytest.raises(LabelSetCorrupt, match=r"rows must be 0\.\.2 in order"):
        read_samples(path)


def test_fewer_rows_than_the_footer_says_are_refused(tmp_path):
    rows, footer = samples()
    path = write_samples_file(tmp_path / "a.parquet", rows, footer.model_copy(update={"rows": 4}))
    with pytest.raises(LabelSetCorrupt, match="has 3 rows, its footer says 4"):
        read_samples(path)


@pytest.mark.parametrize("claim", [2**47, 2**62])
@pytest.mark.usefixtures("one_more_gibibyte")
def test_a_footer_that_claims_a_trillion_rows_is_refused_without_allocating_them(tmp_path, claim):
    rows, footer = samples()
    path = write_samples_file(tmp_path / "a.parquet", rows, footer.model_copy(update={"rows": claim}))
    with pytest.raises(LabelSetCorrupt, match=r"has 3 rows, its footer says|rows: Input should be less than"):
        read_samples(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.drop_columns(["bad"]),
        lambda t: t.set_column(2, "class_label", t["class_label"].cast(pa.int64())),
        lambda t: t.set_column(1, "key", t["key"].cast(pa.large_string())),
        lambda t: t.rename_columns(["row", "name", *t.column_names[2:]]),
    ],
)
def test_samples_of_another_schema_are_refused(tmp_path, change):
    rows, footer = samples()
    path = write_samples_file(tmp_path / "a.parquet", rows, footer)
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(LabelSetCorrupt, match="with exact types"):
        read_samples(path)


def test_labels_and_samples_files_are_not_taken_for_each_other(tmp_path):
    views = make_views()
    labels = write(tmp_path / "labels.parquet", views, footer_of(views))
    others = write_samples_file(tmp_path / "samples.parquet", *samples())
    with pytest.raises(LabelSetCorrupt, match="does not have the fields of a samples file"):
        read_samples(labels)
    with pytest.raises(LabelSetCorrupt, match="does not have the fields of a labels file"):
        read_views(others, 0, 1)
