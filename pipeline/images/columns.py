"""Columns of a source shard as sequences: they look like tuples, and hold their values as Arrow arrays.

A million keys, labels and places as Python objects take 300 MB in each process. As Arrow arrays they take a tenth, or nothing
where the array is a part of a memory-mapped file.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import pyarrow as pa

Value = TypeVar("Value")
_AT_ONCE = 1024  # values that an iteration converts together


class Column(Sequence[Value], Generic[Value]):
    """An Arrow array as a sequence of Python values, which are made when they are asked for."""

    def __init__(self, array: pa.Array) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, position: int) -> Value: ...
    @overload
    def __getitem__(self, position: slice) -> "Column[Value]": ...
    def __getitem__(self, position: int | slice) -> "Value | Column[Value]":
        if isinstance(position, slice):
            return Column(self.array[position])
        return self.array[position].as_py()

    def __iter__(self) -> Iterator[Value]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self.array.slice(start, _AT_ONCE).to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return repr(tuple(self))


class Records(Sequence[Value], Generic[Value]):
    """Several Arrow arrays of integers as a sequence of named tuples."""

    def __init__(self, kind: type[Value], arrays: Sequence[pa.Array]) -> None:
        self.kind, self.arrays = kind, arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    @overload
    def __getitem__(self, position: int) -> Value: ...
    @overload
    def __getitem__(self, position: slice) -> "Records[Value]": ...
    def __getitem__(self, position: int | slice) -> "Value | Records[Value]":
        if isinstance(position, slice):
            return Records(self.kind, [array[position] for array in self.arrays])
        return self.kind(*(array[position].as_py() for array in self.arrays))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def records_of(kind: Any, values: Sequence[Any]) -> list[pa.Array]:
    """Return the fields of named tuples as Arrow arrays of int64."""
    return [pa.array([value[at] for value in values], pa.int64()) for at in range(len(kind._fields))]
