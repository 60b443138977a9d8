"""Strict reading and canonical writing of JSON: the same value gives the same bytes and the same id.

An id is the SHA-256 of canonical JSON, the one text that a value has. A `Record` is what plans and manifests are made of.
"""

import hashlib
import json
import math
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from pipeline.errors import StorageError
from pipeline.storage.atomic import refusals_named
from pipeline.text import SAFE_NAME

MAX_JSON_BYTES = 64 * 2**20  # a manifest of 300,000 files; ImageNet's of 300 views has 3 MB
MAX_JSON_VALUES = 4_000_000  # a manifest of that size has fewer; 64 MiB of brackets would become 4 GB of objects
_CONTAINERS = (dict, list, tuple)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(pattern=rf"^{SAFE_NAME.pattern}$", max_length=200)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]  # may be shown on a terminal
Count = Annotated[int, Field(ge=0, lt=2**48)]
View = Annotated[int, Field(ge=0, le=2**31)]


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Record(BaseModel):
    """A frozen value that is stored as JSON; an unknown field or another type is an error."""

    model_config = ConfigDict(_STRICT, frozen=True)


RowT = TypeVar("RowT")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def row(kind: type[RowT]) -> type[RowT]:
    """Make a class a record of which there are as many as files: it takes a fifth of the memory of a `Record`, 0.3 kB."""
    made: Any = pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)(kind)
    return made


def pretty_json(value: Any) -> bytes:
    """Return JSON for files that people read too: same value, same bytes.

    The text is that of `json.dumps(value, indent=1)`, which takes half as long again and three times the memory: Python's fast encoder does not indent.
    """
    return _pretty(value, 0).encode() + b"\n"


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON text of `value`: keys sorted, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def read_json(path: Path) -> Any:
    """Read JSON strictly: UTF-8, no duplicate keys, no NaN, bounded size and depth.

    Raises:
        StorageError: the file is missing, too large, or not JSON of this kind.
    """
    return load_json(read_small(path, max_bytes=MAX_JSON_BYTES), path)


def read_small(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a small file, such as a JSON file."""
    with refusals_named(path):
        size = path.stat().st_size
        if not path.is_file():
            raise StorageError(f"{path}: a plain file must be here, not a folder, pipe or device")
        if size > max_bytes:
            raise StorageError(f"{path}: such a file may have at most {max_bytes} bytes, this one has {size}")
        return path.read_bytes()


def load_json(data: bytes, name: object, *, fix: str | None = None) -> Any:
    """Parse JSON as strictly as `read_json` does; `name` is the name of the file in errors, `fix` their way out.

    Raises:
        StorageError: the bytes are not JSON of this kind.
    """
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{name}: not valid JSON: {error}", fix=fix) from error


def parse_json(data: bytes) -> Any:
    """Parse JSON strictly; raises ValueError (or RecursionError) with the reason."""
    # Every value except the outermost follows one of these characters. Texts contain some too, but few in plans and manifests.
    if (count := sum(map(data.count, (b"[", b"{", b",")))) > MAX_JSON_VALUES:
        raise ValueError(f"it has up to {count} values, at most {MAX_JSON_VALUES} are read")
    value = json.loads(
        data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
    )
    if b"\\u" in data:
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError for a lone surrogate escape
    return value


def is_version(values: Any, name: str, version: int) -> bool:
    """Return True if a JSON object states this format and version; `true` and `1.0` do not count as version 1."""
    return (
        isinstance(values, dict)
        and values.get("format") == name
        and type(values.get("version")) is int
        and values["version"] == version
    )


def other_version(values: Any, name: str, version: int) -> tuple[str, str | None]:
    """Return a JSON object's actual format and version, and the fix if it is a later version of our format."""
    if not isinstance(values, dict):
        return f"says {type(values).__name__}; this version reads {(name, version)}", None
    found = values.get("version")
    if values.get("format") == name and type(found) is int and found > version:
        newer = f"was made by a newer deit-cli: it is of format v{found}, this one reads v{version}"
        return newer, "Upgrade: pip install --upgrade deit-cli"
    return f"says {(values.get('format'), found)}; this version reads {(name, version)}", None


def _pretty(value: Any, depth: int) -> str:
    """Return a value as indented text; an object or list without further ones in it is encoded in one call."""
    if not isinstance(value, _CONTAINERS) or not value:
        return _encoder(0).encode(value)
    first, last = "\n" + " " * (depth + 1), "\n" + " " * depth
    if not any(isinstance(item, _CONTAINERS) for item in (value.values() if isinstance(value, dict) else value)):
        text = _encoder(depth + 1).encode(value)
        return f"{text[0]}{first}{text[1:-1]}{last}{text[-1]}"
    if not isinstance(value, dict):
        return f"[{first}{f',{first}'.join([_pretty(item, depth + 1) for item in value])}{last}]"
    keys = ((_encoder(0).encode({key: 0})[1:-4], item) for key, item in sorted(value.items(), key=itemgetter(0)))
    return f"{{{first}{f',{first}'.join([f'{key}: {_pretty(item, depth + 1)}' for key, item in keys])}{last}}}"


@cache
def _encoder(indent: int) -> json.JSONEncoder:
    """Return the encoder that begins a new line, with so many spaces, between two values."""
    return json.JSONEncoder(
        sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",\n" + " " * indent, ": ")
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
