"""Image Parquet files, and what is read of a source."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.images.source import Source


def write_parquet(
    path: Path, rows: Sequence[tuple[bytes | None, str | None]], labels=None, *, names=None, **options
) -> Path:
    columns = {"image": pa.array([{"bytes": data, "path": name} for data, name in rows], IMAGE_TYPE)}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    features = {"image": {"_type": "Image"}} | ({"label": {"names": names, "_type": "ClassLabel"}} if names else {})
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def image(number: int) -> bytes:
    """Return a small JPEG; another number, other bytes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def labels(source: Source) -> list[int | None]:
    return [label for shard in source.shards for label in shard.class_labels]


def write_table(path: Path, columns: dict[str, Any], class_labels: Sequence[str] = (), **metadata: str) -> None:
    features = {name: {"names": ["x", "y"], "_type": "ClassLabel"} for name in class_labels}
    huggingface = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.array([{"bytes": IMAGE, "path": "a.jpg"}], IMAGE_TYPE)
    pq.write_table(pa.table({"image": image, **columns}).replace_schema_metadata(huggingface | metadata), path)


IMAGE = image(0)
