"""Label sets that lie: every hash agrees, as an attacker would have it."""

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.label_sets import seal_again

from pipeline.images.samples import keys_sha256
from pipeline.labels.format import PLAN_NAME
from pipeline.labels.tables import (
    FOOTER_KEY,
    LabelRows,
    SampleRows,
    read_all_views,
    read_labels_footer,
    read_samples,
    read_samples_footer,
    write_labels,
    write_samples,
)
from pipeline.storage.json import pretty_json, sha256_json

Change = Callable[[Path], Any]
SAMPLES, LABELS = "samples/train-0.parquet", "labels/views-00000-00001/train-0.parquet"


def manifest_bytes(change: Callable[[bytes], bytes]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_bytes(change(path.read_bytes()))

    return apply


def manifest_with(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda folder: seal_again(folder, change)


def plan_with(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the plan, and make its ids and the manifest agree."""

    def apply(folder: Path) -> None:
        plan = json.loads((folder / PLAN_NAME).read_bytes())
        change(plan)
        plan["teacher_id"] = sha256_json(plan["teacher"])
        plan["source_id"] = sha256_json({name: plan["source"][name] for name in ("class_names", "shards")})
        plan["recipe_id"] = sha256_json(plan["recipe"])
        ids = {
            name: plan[name]
            for name in ("recipe_id", "teacher_id", "source_id", "format", "version", "topk", "precision")
        }
        plan["labelset_id"] = sha256_json(ids)
        (folder / PLAN_NAME).write_bytes(pretty_json(plan))
        seal_again(folder, lambda manifest: manifest.update(labelset_id=plan["labelset_id"]))
        for path in [*folder.glob("samples/*"), *folder.glob("labels/*/*")]:
            footer_with(
                path, **{name: plan[name] for name in ids if name.endswith("_id")}, labelset_id=plan["labelset_id"]
            )
        seal_again(folder)

    return apply  # fmt: skip


def footer_with(path: Path, **changes: Any) -> None:
    """Write a file again with another footer of ours, those fields alone that it has."""
    file = pq.ParquetFile(path)
    footer = json.loads(file.metadata.metadata[FOOTER_KEY])
    footer |= {name: value for name, value in changes.items() if name in footer}
    metadata = {FOOTER_KEY: json.dumps(footer).encode()}
    groups = [file.read_row_group(group) for group in range(file.metadata.num_row_groups)]
    with pq.ParquetWriter(path, groups[0].schema.with_metadata(metadata)) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=max(1, len(group)))


def samples_with(change: Callable[[SampleRows], SampleRows]) -> Change:
    """Write other samples, and make plan, ids and hashes agree with them."""

    def apply(folder: Path) -> None:
        path = folder / SAMPLES
        rows, footer = change(read_samples(path)), read_samples_footer(path)
        with path.open("wb") as file:
            write_samples(file, rows, footer)
        agree = {"num_samples": len(rows), "keys_sha256": keys_sha256(rows.key, rows.class_label)}
        plan_with(lambda plan: plan["source"]["shards"][0].update(agree))(folder)

    return apply


def labels_with(change: Callable[[LabelRows], LabelRows]) -> Change:
    """Write other labels with the hash of their own, and make the manifest agree."""

    def apply(folder: Path) -> None:
        path = folder / LABELS
        views, footer = [change(rows) for rows in read_all_views(path)], read_labels_footer(path)
        with path.open("wb") as file:
            write_labels(file, views, footer.model_copy(update={"content_xxh3": footer.codec.content_xxh3(views)}))
        seal_again(folder)

    return apply


def resealed(change: Change) -> Change:
    def apply(folder: Path) -> None:
        change(folder)
        seal_again(folder)

    return apply


def set_value(name: str, at: Any, value: Any) -> Callable[[LabelRows], LabelRows]:
    def change(rows: LabelRows) -> LabelRows:
        values = getattr(rows, name).copy()
        values[at] = value
        return replace(rows, **{name: values})

    return change


def bomb(path: Path, column: str, text: bytes, **options: Any) -> None:
    """Write one column of a samples file as the same long text in every row, which a dictionary stores once."""
    file = pq.ParquetFile(path)
    table = file.read()
    metadata = file.schema_arrow.metadata
    values = pa.array([text.decode()] * len(table), pa.string())
    at = table.schema.get_field_index(column)
    table = table.set_column(at, table.schema.field(at), values)
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd", **options)


def long_page(path: Path) -> None:
    """Make the first page of a label shard say that it unpacks to 256 MiB."""
    data = path.read_bytes()
    file = pq.ParquetFile(io.BytesIO(data))
    column = file.metadata.row_group(0).column(0)
    start, size = column.data_page_offset, column.total_compressed_size
    # Fields 1 to 3 of the page header, as zigzag: a data page, unpacked size, packed size. The rest stays as it is.
    header = b"\x15\x00\x15" + varint(2 << 28) + b"\x15" + varint(2 * (size - 30))
    path.write_bytes(data[:start] + header + data[start + len(header) :])


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def outside(name: str) -> Change:
    """Move a part of the set out of it, and leave a link to it."""

    def apply(folder: Path) -> None:
        moved = folder.parent / "elsewhere"
        (folder / name).rename(moved)
        (folder / name).symlink_to(moved)

    return apply


def pipe_as(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def hole_as(name: str, size: int) -> Change:
    """Replace a file by a hole of that many bytes, which the manifest names."""

    def apply(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for entry in manifest["files"]:
            if name == path_of(entry):
                entry.update(bytes=size, sha256="0" * 64)
        manifest["content_sha256"] = sha256_json({k: v for k, v in manifest.items() if k != "content_sha256"})
        (folder / "manifest.json").write_bytes(pretty_json(manifest))

    return apply  # fmt: skip


def path_of(entry: dict[str, Any]) -> str:
    if entry["kind"] == "samples":
        return f"samples/{entry['shard']}.parquet"
    return f"labels/views-{entry['view_start']:05d}-{entry['view_stop'] - 1:05d}/{entry['shard']}.parquet"


def many_shards(manifest_blocks: int, shards: int) -> Change:
    """Two long lists, whose product no memory holds."""

    def apply(folder: Path) -> None:
        record = {"num_samples": 0, "keys_sha256": "0" * 64}
        plan_with(lambda plan: plan["source"].update(shards=[{"name": f"s{n}"} | record for n in range(shards)]))(
            folder
        )
        blocks = [[n, n + 1] for n in range(manifest_blocks)]
        seal_again(folder, lambda manifest: manifest.update(view_blocks=blocks))

    return apply


def names(bad: str) -> Change:
    return manifest_with(lambda manifest: manifest["files"][0].update(shard=bad))


NAMES = [
    "../../etc/x",
    "/etc/passwd",
    "C:\\x",
    "a/../b",
    "a\0b",
    "a\nb",
    "a b",
    "․․",
    "ａ",
    "pipe:touch pwned",
    "s3://b/x",
    "~",
    "a" * 201,
]
SETS = [
    # name, what is done to a sound set, text of the error
    *[(f"name {ascii(name)[:20]}", names(name), "files.0.shard: String should") for name in NAMES],
    ("BOM", manifest_bytes(lambda data: b"\xef\xbb\xbf" + data), "BOM"),
    ("CRLF", manifest_bytes(lambda data: data.replace(b"\n", b"\r\n")), "in other bytes"),
    ("UTF-16", manifest_bytes(lambda data: data.decode().encode("utf-16")), "not valid JSON"),
    ("NaN", manifest_bytes(lambda data: data.replace(b'"version": 1', b'"version": NaN')), "NaN is not a JSON number"),
    ("two of a key", manifest_bytes(lambda data: data.replace(b'"version": 1', b'"version": 1, "version": 1')), "stands twice"),
    ("deep", manifest_bytes(lambda data: b"[" * 200_000), "not valid JSON"),
    ("of brackets", manifest_bytes(lambda data: b"[" + b"[]," * (20 << 20) + b"0]"), "not valid JSON: it has up to"),
    ("65 MiB", manifest_bytes(lambda data: data + b" " * (65 << 20)), "may have at most"),
    ("a number of a million digits", manifest_bytes(lambda data: data.replace(b'"version": 1', b'"version": ' + b"1" * 10**6)), "not valid JSON"),
    ("unknown field", manifest_with(lambda m: m.update(exec="import os")), "exec: Extra inputs"),
    ("version 2", manifest_with(lambda m: m.update(version=2)), "is of format v2, this one reads v1"),
    ("rows 2^47", manifest_with(lambda m: m["files"][0].update(rows=2**47)), "rows"),
    ("negative rows", manifest_with(lambda m: m["files"][0].update(rows=-1)), "files.0.rows"),
    ("bytes 2^47", manifest_with(lambda m: m["files"][0].update(bytes=2**47)), "files.0: .* has at most 1073741824 bytes"),
    ("views to 2^31", manifest_with(lambda m: m.update(view_blocks=[[0, 2**31]])), "the sealed manifest"),
    ("a million views", manifest_with(lambda m: m.update(view_blocks=[[n, n + 1] for n in range(10**5)])), "the sealed manifest lists"),
    ("a billion files to expect", many_shards(30_000, 30_000), "files, 30000 source shards and 30000 blocks"),
    ("10,000 probes", manifest_with(lambda m: m.update(probes=m["probes"] * 5000)), "probes: Tuple should have at most 64"),
    ("ESC in a device", manifest_with(lambda m: m["environments"][0].update(device="\x1b[2J")), "environments.0.device"),
    ("num_samples 2^47", plan_with(lambda p: p["source"]["shards"][0].update(num_samples=2**47)), "num_samples"),
    ("topk 10^9", plan_with(lambda p: p.update(topk=10**9)), "topk"),
    ("topk beyond what is stored", plan_with(lambda p: p.update(topk=3)), "its path and the plan say"),
    ("ESC in the teacher's name", plan_with(lambda p: p["teacher"].update(name="\x1b]0;pwned\x07")), "teacher.name"),
    ("ESC in the location", plan_with(lambda p: p["source"].update(location="\x1b[2J")), "source.location"),
    ("RandAugment of a billion operations", plan_with(lambda p: p["recipe"].update(aa="rand-m9-n1000000000")), "section 'n1000000000'"),
    ("class label beyond C", samples_with(lambda s: replace(s, class_label=(7, *s.class_label[1:]))), "class label must be in 0..2, got 7"),
    ("negative class label", samples_with(lambda s: replace(s, class_label=(-1, *s.class_label[1:]))), "class label must be in 0..2, got -1"),
    ("key twice", samples_with(lambda s: replace(s, key=(s.key[1], *s.key[1:]))), "occurs twice"),
    ("ESC in a key", samples_with(lambda s: replace(s, key=("\x1b[2J", *s.key[1:]))), "must not contain control characters"),
    ("key of 2 kB", samples_with(lambda s: replace(s, key=("k" * 2000, *s.key[1:]))), "must have 1 to 1024 bytes"),
    ("empty key", samples_with(lambda s: replace(s, key=("", *s.key[1:]))), "must have 1 to 1024 bytes, got 0"),
    ("NaN in a probability", labels_with(set_value("topk_prob", (0, 1), np.nan)), "a probability is outside 0..1"),
    ("infinite tail", labels_with(set_value("tail_mass", 0, np.inf)), "a probability is outside 0..1"),
    ("negative probability", labels_with(set_value("topk_prob", (0, 1), -0.25)), "a probability is outside 0..1"),
    ("probabilities that rise", labels_with(set_value("topk_prob", (0,), [0.25, 0.5])), "probabilities are not in descending order"),
    ("class past C", labels_with(set_value("topk_index", (0, 1), 60_000)), "a class is not below 3"),
    ("a class twice", labels_with(lambda rows: replace(rows, topk_index=np.repeat(rows.topk_index[:, :1], 2, axis=1))), "a class occurs twice"),
    ("rows that fall", labels_with(lambda rows: replace(rows, row=rows.row[::-1].copy())), "rows are not in ascending order"),
    ("rows 2^32 - 1", labels_with(set_value("row", -1, 2**32 - 1)), "usable rows|row"),
    ("footer of 2^47 rows", resealed(lambda folder: footer_with(folder / LABELS, rows_per_view=2**47)), "rows"),
    ("footer of 2^31 views", resealed(lambda folder: footer_with(folder / LABELS, view_stop=2**31)), "its path and the plan say"),
    ("samples footer of 2^47 rows", resealed(lambda folder: footer_with(folder / SAMPLES, rows=2**47)), "rows"),
    ("a page of 256 MiB", resealed(lambda folder: long_page(folder / LABELS)), "a page in it unpacks to 268435456 bytes"),
    ("keys of 20 MB", resealed(lambda folder: bomb(folder / SAMPLES, "key", b"k" * (20 << 20))), "unpacks to 209715|unpacks to 20971"),
    ("keys of 10 MB each in a dictionary", resealed(lambda folder: bomb(folder / SAMPLES, "key", b"k" * (10 << 20))), "keys and class labels do not match the plan"),
    ("samples that lie outside", outside("samples"), "points outside the label set"),
    ("labels that lie outside", outside("labels"), "points outside the label set"),
    ("one file that lies outside", outside(LABELS), "points outside the label set"),
    ("a pipe as label shard", pipe_as(LABELS), "is missing|points outside|bytes"),
    ("a pipe as manifest", pipe_as("manifest.json"), "has no manifest.json|plain file"),
    ("a hole of 1 TB", hole_as(LABELS, 10**12), r"files\.\d+: .* has at most 1073741824 bytes, got 1000000000000"),
    ("a hole of 1 GB", hole_as(LABELS, 2**30), "not enough memory|SHA-256"),
]  # fmt: skip
