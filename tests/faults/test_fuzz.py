"""Bytes that nobody wrote: the outcome is the very same labels or samples, or an error of ours; never another exception.

What is drawn is the damage to a sound file. Where a hash would refuse it at once the hash is made again, so that what lies
behind is reached: Parquet footers with magic and length kept, tar headers with their checksum repaired, plans with new ids.
"""

import functools
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.sets import plan_with
from hostile.sources import END, member, repaired
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.label_sets import coloured_png, make_label_set, read_everything, seal_again, write_source

from pipeline.errors import DeitCliError
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import parse_manifest, parse_plan
from pipeline.labels.parquet_guard import Chunk, largest_page
from pipeline.labels.tables import Contents, read_all_views, read_samples
from pipeline.overview.summary import summarise

pytestmark = pytest.mark.slow
GROWTH_MIB = 600  # of this process over all examples of a test

FIXED = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damages(draw: Any, size: int) -> list[tuple[int, int, bytes]]:
    """Return a few replacements: where, how many bytes go, and which come instead."""
    places = st.tuples(st.integers(0, size - 1), st.integers(0, 6), st.binary(max_size=6))
    return draw(st.lists(places, min_size=1, max_size=3))


def apply(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, gone, new in changes:
        data = data[:at] + new + data[at + gone :]
    return data


def same_or_refused(use: Callable[[], Any], sound: Any) -> None:
    """Run it; an exception that is not ours goes through, and so do other values."""
    try:
        found = use()
    except DeitCliError as error:
        assert str(error)
    else:
        assert found == sound


@pytest.fixture(autouse=True)
def bounded():
    """Hold the growth of this process against a bound."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < GROWTH_MIB


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_source(root / "images", (3, 2))
    make_label_set(root / "images", root / "set", views=(0, 2))
    return root / "set"


@functools.cache
def content(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_any_bytes_of_plan_and_manifest(made, name):
    data = content(made / name)

    def parse(text: bytes) -> Any:
        plan_sha256 = json.loads(content(made / "manifest.json"))["plan_sha256"]
        return parse_plan(text, name) if name == "plan.json" else parse_manifest(text, name, plan_sha256=plan_sha256)

    @FIXED
    @given(damages(len(data)))
    def run(changes):
        text = apply(data, changes)
        try:
            found = parse(text)
        except DeitCliError:
            return
        assert found == parse(data) or name == "plan.json"  # of the plan it is the manifest that knows the bytes

    run()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in pairs for place in places(inner, (*path, key)))]


def put(value: Any, path: tuple, new: Any) -> None:
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = new


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_any_value_anywhere_in_plan_and_manifest_with_every_hash_made_again(made, tmp_path, name):
    whole = json.loads(content(made / name))
    everywhere = [path for path in places(whole) if path and path[-1] != "content_sha256"]
    folder = Path(shutil.copytree(made, tmp_path / "set"))
    sound = list(read_everything(LabelSet.open(folder)))[1:]  # without the id, which follows from the plan

    @settings(FIXED, max_examples=150)
    @given(st.sampled_from(everywhere), JSON)
    def run(path, new):
        def change(values: dict[str, Any]) -> None:
            put(values, path, new)

        def use() -> Any:
            opened = LabelSet.open(folder)
            summarise(opened)
            return list(read_everything(opened))[1:]

        for part in ("plan.json", "manifest.json"):
            (folder / part).write_bytes(content(made / part))
        try:
            if name == "plan.json":
                plan_with(change)(folder)
            else:
                seal_again(folder, change)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            return  # not even an attacker can write this down
        finally:
            for file in [*made.rglob("*.parquet")]:
                (folder / file.relative_to(made)).write_bytes(content(file))
        same_or_refused(use, sound)

    run()


@pytest.mark.parametrize("kind", ["samples", "labels"])
@pytest.mark.parametrize("part", ["footer", "anywhere"])
def test_any_bytes_of_a_table(made, kind, part):
    path = next((made / kind).rglob("train-0.parquet"))
    data = content(path)
    length = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - length if part == "footer" else 0

    def read(text: bytes) -> Any:
        file = Contents(path.name, text)
        if kind == "samples":
            rows = read_samples(file)
            return (
                rows.key,
                rows.class_label,
                rows.image_xxh3,
                rows.bad,
                *(a.tolist() for a in (rows.image_bytes, rows.height, rows.width)),
            )
        return [
            [getattr(rows, name).tolist() for name in ("row", "hard", "topk_index", "topk_prob", "tail_mass")]
            for rows in read_all_views(file)
        ]

    @FIXED
    @given(damages(len(data) - 8 - start))
    def run(changes):
        text = apply(data[start:-8], changes)
        text = (
            data[:start]
            + text
            + len(text if part == "footer" else data[-8 - length : -8]).to_bytes(4, "little")
            + b"PAR1"
        )
        try:
            read(text)  # other values may come of it: it is the manifest's hash that stands before this
        except DeitCliError as error:
            assert str(error)

    run()  # fmt: skip


@FIXED
@given(st.binary(max_size=80), st.integers(-10, 90), st.integers(-10, 90))
def test_any_bytes_of_a_page_header(data, start, size):
    try:
        assert largest_page(data, [Chunk(start, size)]) >= 0
    except ValueError as error:
        assert str(error)


TAR = member("a.png", coloured_png(0)) + member("a.cls", b"1") + member("b.png", coloured_png(1)) + END
HEADERS = [at for at in range(0, len(TAR) - len(END), 512) if TAR[at + 257 : at + 262] == b"ustar"]
FIELDS = [(0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265), (265, 297), (345, 500)]


@FIXED
@given(st.sampled_from(HEADERS), st.sampled_from(FIELDS), st.binary(min_size=1, max_size=24), st.integers(0, 90))
def test_any_field_of_a_tar_header_with_its_checksum_repaired(tmp_path, header, field, new, at):
    """Names may become others, for who wrote the checksum may also name his files; what is no tar is refused."""
    start, stop = field
    block = TAR[header : header + 512]
    begin = min(start + at, stop - 1)
    changed = block[:begin] + new[: stop - begin] + block[min(stop, begin + len(new)) :]
    path = tmp_path / "t.tar"
    path.write_bytes(TAR[:header] + repaired(changed) + TAR[header + 512 :])
    pictures = {coloured_png(0), coloured_png(1)}
    try:
        samples = [sample for shard in open_source(path).shards for sample in shard]
    except DeitCliError as error:
        assert str(path) in str(error)
    else:
        assert all("\0" not in sample.key and ".." not in sample.key.split("/") for sample in samples)
        assert {sample.image for sample in samples} <= pictures or field == (124, 136)


@FIXED
@given(damages(len(TAR)))
def test_any_bytes_of_a_tar(tmp_path, changes):
    path = tmp_path / "t.tar"
    path.write_bytes(apply(TAR, changes))
    try:
        list(open_source(path).shards[0])
    except DeitCliError as error:
        assert str(path) in str(error)
