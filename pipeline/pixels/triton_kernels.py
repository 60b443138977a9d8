"""Views of renderer 2 as Triton kernels: a few launches for a whole batch.

Launches: weights, two passes of the resize, for each layer of RandAugment one (and one before it for tables of values, where a view needs
them), and the erased boxes; 8 for the recipe `deit`. A product and a sum must not be fused: each launch has `enable_fp_fusion=False`.

Bytes of a view of `deit` from an image of 500 x 375, on average: the passes read 247 kB and 183 kB and write 183 kB and 151 kB, the one
operation reads and writes 301 kB: 1.07 MB, 0.36 us at 3 TB/s. The weights are 14 kB. The GPU computes them (28 kB more, written and read),
because the host would need about 100 us for each new pair of sizes, and would have to copy them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportOptionalSubscript=false
# (a kernel is written in Triton's language: pyright reads it as Python and finds types that do not fit)

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from pipeline.pixels import packed
from pipeline.pixels.packed import OP, RECORD
from pipeline.pixels.torch_kernels import LUMA, tap_range
from pipeline.views.noise import noise_levels
from pipeline.views.randaugment import FILL
from pipeline.views.recipe import MAX_LAYERS


def _word(name: str) -> tl.constexpr:
    """Return the position of a field in a record, in words of 4 bytes."""
    return tl.constexpr(RECORD.fields[name][1] // 4)


_RECORD_WORDS, _OP_WORDS = tl.constexpr(RECORD.itemsize // 4), tl.constexpr(OP.itemsize // 4)
_OFFSET, _IMAGE, _CROP, _RESIZE = _word("offset"), _word("image"), _word("crop"), _word("resize")
_WINDOW, _FLIP, _FILTER, _ERASE = _word("window"), _word("flip"), _word("filter"), _word("erase")
_NOISE, _OPS = _word("noise"), _word("ops")
_AUTOCONTRAST, _EQUALIZE = map(tl.constexpr, (packed.AUTOCONTRAST, packed.EQUALIZE))
_POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = map(tl.constexpr, (packed.POSTERIZE, packed.SOLARIZE, packed.SOLARIZE_ADD))
_CONTRAST, _BRIGHTNESS = map(tl.constexpr, (packed.CONTRAST, packed.BRIGHTNESS))
_AFFINE, _TURN, _COLOR, _SHARPNESS = map(tl.constexpr, (packed.AFFINE, packed.TURN, packed.COLOR, packed.SHARPNESS))
_BICUBIC = tl.constexpr(packed.BICUBIC)
_LAYERS = tl.constexpr(MAX_LAYERS)
_RED, _GREEN, _BLUE = map(tl.constexpr, LUMA)
_FILL_RED, _FILL_GREEN, _FILL_BLUE = map(tl.constexpr, FILL)

# Columns of a plan: one row for each view.
_FIRST_ROW, _NUM_ROWS, _ROWS_AT, _TAPS, _WEIGHTS_AT, _STARTS_IN_OTHER = map(tl.constexpr, (0, 1, 2, 3, 5, 7))
_PLAN_COLUMNS = tl.constexpr(8)

_MOVING = (packed.AFFINE, packed.TURN, packed.SHARPNESS)  # they read other pixels than the one that they write
_WITHOUT_TABLE = (*_MOVING, packed.COLOR)
_NO_TURN = 4
_PART_BYTES, _PART_VIEWS = 2**28, 2**12  # scratch memory of views that are rendered together
_NUMBERS = 16  # of 16 bits, for each Philox counter
_OPTIONS = {"enable_fp_fusion": False}


# --- host -----------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What the host computes for a batch.

    Attributes:
        table: int64 [B, 8]; columns are the constants above.
        scratch_bytes: bytes of all rows between the two passes.
        num_weights: words of all weights and positions.
        layers: for each layer of RandAugment the items (see `_items`) that need a table of values, and all items.
        erased: int64 [E], views with an erased box.
    """

    table: NDArray[np.int64]
    scratch_bytes: int
    num_weights: int
    layers: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    erased: NDArray[np.int64]


class _Batch(NamedTuple):
    """What all kernels read and write, on the device.

    Attributes:
        longs: int64, the records.
        words: int32, the records.
        plan: int64, the plan's table.
        todo: int64, the plan's lists, one after the other.
        out: uint8 [B, S, S, 3].
        other: uint8 [B, S, S, 3], where a view is after every second operation that moves pixels.
    """

    longs: Tensor
    words: Tensor
    plan: Tensor
    todo: Tensor
    out: Tensor
    other: Tensor


def render_batch(pixels: Tensor, records: NDArray, out: Tensor) -> None:
    """Render views into `out`, uint8 [B, S, S, 3]; see `pipeline.pixels.batched.render_batch`."""
    with torch.cuda.device_of(pixels):
        for part in _parts(records):
            _render_part(pixels, records[part], out[part])


def _parts(records: NDArray) -> Iterator[slice]:
    """Split a batch so that the scratch memory of a part stays below _PART_BYTES, but for a single view."""
    plan = _planned(records)
    ends = np.append(
        plan.table[1:, [_ROWS_AT.value, _WEIGHTS_AT.value]], [[plan.scratch_bytes, plan.num_weights]], axis=0
    )
    used = ends @ (1, 4)  # bytes until the end of each view
    begin = 0
    while begin < len(records):
        before = used[begin - 1] if begin else 0
        end = int(np.searchsorted(used, before + _PART_BYTES, side="right"))
        end = min(max(end, begin + 1), begin + _PART_VIEWS)
        yield slice(begin, end)
        begin = end


def _planned(records: NDArray) -> _Plan:
    size = records["size"]
    table = np.zeros((len(records), _PLAN_COLUMNS.value), np.int64)
    filters, windows = records["filter"][:, None], records["window"]
    scale = records["crop"][:, 2:] / records["resize"]
    support = np.where(filters == packed.BICUBIC, 2, 1) * np.maximum(scale, 1)
    taps = np.ceil(support).astype(np.int64) * 2 + 1  # vertical, horizontal
    edges = np.stack([windows[:, 0], windows[:, 0] + size - 1], axis=1)
    first, end = tap_range(edges, records["crop"][:, 2:3], records["resize"][:, :1], filters)
    table[:, _FIRST_ROW.value], table[:, _NUM_ROWS.value] = first[:, 0], end[:, 1] - first[:, 0]
    table[:, _TAPS.value : _TAPS.value + 2] = taps
    rows_bytes, words = table[:, _NUM_ROWS.value] * size * 3, (taps + 1) * size[:, None]
    table[:, _ROWS_AT.value] = np.cumsum(rows_bytes) - rows_bytes
    table[:, _WEIGHTS_AT.value : _WEIGHTS_AT.value + 2] = (np.cumsum(words) - words.ravel()).reshape(-1, 2)
    layers, starts = _items(records)
    table[:, _STARTS_IN_OTHER.value] = starts
    return _Plan(table, int(rows_bytes.sum()), int(words.sum()), layers, np.flatnonzero(records["erase"][:, 2:].all(1)))


def _items(records: NDArray) -> tuple[list[tuple[NDArray[np.int64], NDArray[np.int64]]], NDArray[np.int64]]:
    """Return the plan's `layers`, and which views start in the other buffer (1), so that they end in `out`.

    An operation that moves pixels takes its view from one buffer to the other. An item is (view * MAX_LAYERS + layer) * 2, plus 1 if the
    view is in the other buffer before the operation.
    """
    kinds = records["ops"]["kind"]
    applied = np.arange(MAX_LAYERS) < records["num_ops"][:, None]
    applied &= ~((kinds == packed.TURN) & (records["ops"]["number"] == _NO_TURN))
    moves = applied & np.isin(kinds, _MOVING)
    left = np.flip(np.cumsum(np.flip(moves, 1), 1), 1)  # moves from this layer on
    items = (np.arange(len(records))[:, None] * MAX_LAYERS + np.arange(MAX_LAYERS)) * 2 + left % 2
    with_table = applied & ~np.isin(kinds, _WITHOUT_TABLE)
    layers = [(items[with_table[:, k], k], items[applied[:, k], k]) for k in np.flatnonzero(applied.any(0))]
    return layers, left[:, 0] % 2


def _render_part(pixels: Tensor, records: NDArray, out: Tensor) -> None:
    plan = _planned(records)
    batch = _on_device(plan, records, out)
    _resize(pixels, plan, batch)
    _operate(plan, batch)
    if len(plan.erased):
        _erase(plan, batch, records)


def _on_device(plan: _Plan, records: NDArray, out: Tensor) -> _Batch:
    lists = [items for layer in plan.layers for items in layer] + [plan.erased]
    host = np.concatenate([np.ascontiguousarray(records).view(np.int64), plan.table.ravel(), *lists])
    device = torch.from_numpy(host).to(out.device)  # one copy
    fields, table, todo = device.split([records.nbytes // 8, plan.table.size, sum(map(len, lists))])
    return _Batch(fields, fields.view(torch.int32), table, todo, out, torch.empty_like(out))


def _resize(pixels: Tensor, plan: _Plan, batch: _Batch) -> None:
    count, size = batch.out.shape[:2]
    weights, rows = batch.words.new_empty(plan.num_weights), pixels.new_empty(plan.scratch_bytes)
    grid = (_tiles(size, 64), count, 2)
    _weights_kernel[grid](batch.words, batch.plan, weights, size, BLOCK=64, num_warps=2, **_OPTIONS)
    of_views = (batch.words, batch.plan, weights, rows)
    grid = (_tiles(int(plan.table[:, _NUM_ROWS.value].max()), 8), count, _tiles(size * 3, 128))
    _rows_kernel[grid](*of_views, pixels, batch.longs, size, ROWS=8, BLOCK=128, **_OPTIONS)
    grid = (_tiles(size, 8), count, _tiles(size * 3, 128))
    _columns_kernel[grid](*of_views, batch.out, batch.other, size, ROWS=8, BLOCK=128, **_OPTIONS)


def _operate(plan: _Plan, batch: _Batch) -> None:
    count, size = batch.out.shape[:2]
    floats, doubles = batch.longs.view(torch.float32), batch.longs.view(torch.float64)
    tables = batch.out.new_empty(count * 3 * 256)
    of_views = (batch.words, floats, batch.out, batch.other, tables, batch.todo)
    begin = 0
    for with_table, items in plan.layers:
        if len(with_table):
            _tables_kernel[(len(with_table),)](*of_views, begin, size, BLOCK=2048, num_warps=8, **_OPTIONS)
        begin += len(with_table)
        grid = (_tiles(size * size, 256), len(items))
        _operations_kernel[grid](*of_views, begin, doubles, size, BLOCK=256, **_OPTIONS)
        begin += len(items)


def _erase(plan: _Plan, batch: _Batch, records: NDArray) -> None:
    counters = _tiles(int(records["erase"][:, 2:].prod(1, dtype=np.int64).max()) * 3, _NUMBERS)
    begin, size = len(batch.todo) - len(plan.erased), batch.out.shape[1]
    erased = (batch.words, batch.longs, batch.out, _levels(batch.out.device), batch.todo)
    _erase_kernel[(_tiles(counters, 128), len(plan.erased))](*erased, begin, size, BLOCK=128, **_OPTIONS)


def _tiles(count: int, block: int) -> int:
    return -(-count // block)


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(noise_levels(), device=device)


# --- resize ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["size"])
def _weights_kernel(words, plan, weights, size, BLOCK: tl.constexpr):
    """Write the first input of each output of a pass, then its weights: int32 [1 + taps, size]. Axis 0 is vertical, 1 horizontal."""
    view, axis = tl.program_id(1).to(tl.int64), tl.program_id(2)
    record, plan = words + view * _RECORD_WORDS, plan + view * _PLAN_COLUMNS
    n, m = tl.load(record + _CROP + 2 + axis), tl.load(record + _RESIZE + axis)
    bicubic = tl.load(record + _FILTER) == _BICUBIC
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = n.to(tl.float64) / m.to(tl.float64)
    f = tl.maximum(scale, 1.0)
    support = tl.where(bicubic, 2.0, 1.0).to(tl.float64) * f
    centre = ((i + tl.load(record + _WINDOW + axis)).to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((centre + support + 0.5).to(tl.int32), n)
    taps = tl.load(plan + _TAPS + axis).to(tl.int32)
    narrow = 1.0 / f
    total = tl.zeros([BLOCK], tl.float64)
    for tap in range(taps):
        total += _weight(first + tap, end, centre, narrow, bicubic)
    total = tl.where(total != 0.0, total, 1.0)
    row = weights + tl.load(plan + _WEIGHTS_AT + axis) + i
    tl.store(row, first, mask=i < size)
    for tap in range(taps):
        weight = _weight(first + tap, end, centre, narrow, bicubic) / total
        units = weight * 4194304.0 + tl.where(weight < 0.0, -0.5, 0.5).to(tl.float64)  # 2**22
        row += size
        tl.store(row, units.to(tl.int32), mask=i < size)


@triton.jit
def _weight(j, end, centre, narrow, bicubic):
    """Return the weight of input j before it is divided by the sum; 0 from `end` on."""
    x = tl.abs((j.to(tl.float64) - centre + 0.5) * narrow)
    near = ((1.5 * x - 2.5) * x) * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    linear = tl.where(x < 1.0, 1.0 - x, 0.0)
    weight = tl.where(bicubic, tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0)), linear)
    return tl.where(j < end, weight, 0.0)


@triton.jit(do_not_specialize=["size"])
def _rows_kernel(words, plan, weights, rows, pixels, longs, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Resize the rows of all crops: ROWS of them, BLOCK values of each."""
    view = tl.program_id(1).to(tl.int64)
    record, plan = words + view * _RECORD_WORDS, plan + view * _PLAN_COLUMNS
    num_rows, begin = tl.load(plan + _NUM_ROWS), tl.program_id(0) * ROWS
    if begin < num_rows:
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        value = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        column, channel = value // 3, value % 3
        inside = value < size * 3
        taps = tl.load(plan + _TAPS + 1).to(tl.int32)
        weight_row = weights + tl.load(plan + _WEIGHTS_AT + 1) + column
        first = tl.load(weight_row, mask=inside, other=0)
        width = tl.load(record + _CROP + 3)
        image = pixels + tl.load(longs + view * (_RECORD_WORDS // 2) + _OFFSET // 2) + tl.load(record + _CROP + 1) * 3
        above = tl.load(record + _CROP) + tl.load(plan + _FIRST_ROW)
        source = image + (above + row)[:, None] * tl.load(record + _IMAGE + 1) * 3 + (first * 3 + channel)[None, :]
        mask = (row < num_rows)[:, None] & inside[None, :]
        total = tl.full([ROWS, BLOCK], 2097152, tl.int32)  # 2**21
        for tap in range(taps):
            weight_row += size
            weight = tl.load(weight_row, mask=inside, other=0)
            level = tl.load(source + tap * 3, mask=mask & (first + tap < width)[None, :], other=0)
            total += weight[None, :] * level.to(tl.int32)
        result = rows + tl.load(plan + _ROWS_AT) + row[:, None] * (size * 3) + value[None, :]
        tl.store(result, _clipped(total >> 22), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _columns_kernel(words, plan, weights, rows, out, other, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Resize the columns of all views, which are now rows of `size` pixels, and mirror them where the record says so."""
    view = tl.program_id(1).to(tl.int64)
    record, plan = words + view * _RECORD_WORDS, plan + view * _PLAN_COLUMNS
    y = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = y < size
    mask = inside[:, None] & (value < size * 3)[None, :]
    taps, num_rows = tl.load(plan + _TAPS).to(tl.int32), tl.load(plan + _NUM_ROWS)
    weight_row = weights + tl.load(plan + _WEIGHTS_AT) + y
    first = tl.load(weight_row, mask=inside, other=0) - tl.load(plan + _FIRST_ROW)
    source = rows + tl.load(plan + _ROWS_AT) + first[:, None] * (size * 3) + value[None, :]
    total = tl.full([ROWS, BLOCK], 2097152, tl.int32)  # 2**21
    for tap in range(taps):
        weight_row += size
        weight = tl.load(weight_row, mask=inside, other=0)
        level = tl.load(source, mask=mask & (first + tap < num_rows)[:, None], other=0)
        total += weight[:, None] * level.to(tl.int32)
        source += size * 3
    x = value // 3
    x = tl.where(tl.load(record + _FLIP) != 0, size - 1 - x, x)
    target = _buffer(out, other, tl.load(plan + _STARTS_IN_OTHER), view, size)
    tl.store(target + y[:, None] * (size * 3) + (x * 3 + value % 3)[None, :], _clipped(total >> 22), mask=mask)


@triton.jit
def _clipped(value):
    return tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8)


@triton.jit
def _buffer(out, other, in_other, view, size):
    """Return where a view is: in `out` or in the other buffer."""
    buffer = other if in_other != 0 else out
    return buffer + view * size * size * 3


# --- tables of 256 values -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["begin", "size"])
def _tables_kernel(words, floats, out, other, tables, todo, begin, size, BLOCK: tl.constexpr):
    """Write what becomes of each value of each channel of a view: uint8 [3, 256]. One program for each item."""
    item = tl.load(todo + begin + tl.program_id(0))
    view = item // (2 * _LAYERS)
    at = view * _RECORD_WORDS + _OPS + item // 2 % _LAYERS * _OP_WORDS
    kind, number, factor = tl.load(words + at), tl.load(words + at + 2), tl.load(floats + at + 3)
    image = _buffer(out, other, item % 2, view, size)
    table = tables + view * 768
    v = tl.arange(0, 256)
    if (kind == _AUTOCONTRAST) | (kind == _EQUALIZE):
        for channel in tl.static_range(3):
            count = _histogram(image + channel, size * size, BLOCK)
            low, high = tl.min(tl.where(count > 0, v, 255)), tl.max(tl.where(count > 0, v, 0))
            result = _autocontrast(v, low, high) if kind == _AUTOCONTRAST else _equalize(v, count, high)
            tl.store(table + channel * 256 + v, result.to(tl.uint8))
    else:
        result = 255 - v
        if kind == _POSTERIZE:
            result = v & number
        elif kind == _SOLARIZE:
            result = tl.where(v < number, v, 255 - v)
        elif kind == _SOLARIZE_ADD:
            result = tl.where(v < 128, tl.minimum(v + number, 255), v)
        elif kind == _BRIGHTNESS:
            result = _blend(tl.zeros_like(v), v, factor)
        elif kind == _CONTRAST:
            result = _blend(tl.zeros_like(v) + _mean_luma(image, size * size, BLOCK), v, factor)
        for channel in tl.static_range(3):
            tl.store(table + channel * 256 + v, result.to(tl.uint8))


@triton.jit
def _histogram(channel, count, BLOCK: tl.constexpr):
    """Return how often each value of a channel occurs, int32 [256]."""
    total = tl.zeros([256], tl.int32)
    for begin in range(0, count, BLOCK):
        pixel = begin + tl.arange(0, BLOCK)
        total += tl.histogram(tl.load(channel + pixel * 3, mask=pixel < count, other=0).to(tl.int32), 256)
    beyond = (count + BLOCK - 1) // BLOCK * BLOCK - count  # they were counted as zeros
    return total - tl.where(tl.arange(0, 256) == 0, beyond, 0)


@triton.jit
def _autocontrast(v, low, high):
    scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
    stretched = v.to(tl.float64) * scale + (-low).to(tl.float64) * scale
    return tl.where(high > low, tl.minimum(tl.maximum(stretched.to(tl.int32), 0), 255), v)


@triton.jit
def _equalize(v, count, high):
    upto = tl.cumsum(count, 0)
    step = (tl.sum(count) - tl.sum(tl.where(v == high, count, 0))) // 255
    equal = (step // 2 + upto - count) // tl.maximum(step, 1)
    return tl.where(step > 0, tl.minimum(equal, 255), v)  # one value only: step is 0


@triton.jit
def _mean_luma(image, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, count, BLOCK):
        pixel = begin + tl.arange(0, BLOCK)
        total += tl.where(pixel < count, _luma(image + pixel * 3, pixel < count), 0)
    return ((2 * tl.sum(total) + count) // (2 * count.to(tl.int64))).to(tl.int32)


@triton.jit
def _luma(pixel, mask):
    """Return the luma of pixels, int32."""
    red, green, blue = (
        tl.load(pixel, mask=mask, other=0).to(tl.int32),
        tl.load(pixel + 1, mask=mask, other=0).to(tl.int32),
        tl.load(pixel + 2, mask=mask, other=0).to(tl.int32),
    )
    return (_RED * red + _GREEN * green + _BLUE * blue + 32768) >> 16


@triton.jit
def _blend(base, value, factor):
    """Return the blend of whole numbers, int32."""
    blended = base.to(tl.float32) + factor * (value - base).to(tl.float32)
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


# --- operations -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["begin", "size"])
def _operations_kernel(words, floats, out, other, tables, todo, begin, doubles, size, BLOCK: tl.constexpr):
    """Apply an operation to BLOCK pixels of a view: in place, or from one buffer to the other if it moves pixels."""
    item = tl.load(todo + begin + tl.program_id(1))
    view, in_other = item // (2 * _LAYERS), item % 2
    at = view * _RECORD_WORDS + _OPS + item // 2 % _LAYERS * _OP_WORDS
    kind, number, factor = tl.load(words + at), tl.load(words + at + 2), tl.load(floats + at + 3)
    source = _buffer(out, other, in_other, view, size)
    target = _buffer(out, other, 1 - in_other, view, size)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < size * size
    x, y = pixel % size, pixel // size
    if kind == _AFFINE:
        bicubic = tl.load(words + at + 1) == _BICUBIC
        _affine(source, target + pixel * 3, doubles + at // 2 + 2, bicubic, x, y, size, mask)
    elif kind == _TURN:
        _turn(source, target + pixel * 3, number, x, y, size, mask)
    elif kind == _SHARPNESS:
        _sharpness(source, target, factor, pixel, x, y, size, mask)
    elif kind == _COLOR:
        base = _luma(source + pixel * 3, mask)
        for channel in tl.static_range(3):
            value = tl.load(source + pixel * 3 + channel, mask=mask, other=0).to(tl.int32)
            tl.store(source + pixel * 3 + channel, _blend(base, value, factor).to(tl.uint8), mask=mask)
    else:
        for channel in tl.static_range(3):
            value = tl.load(source + pixel * 3 + channel, mask=mask, other=0).to(tl.int32)
            result = tl.load(tables + view * 768 + channel * 256 + value, mask=mask, other=0)
            tl.store(source + pixel * 3 + channel, result, mask=mask)


@triton.jit
def _turn(source, target, turns, x, y, size, mask):
    """Turn by so many quarters, anticlockwise."""
    end = size - 1
    from_x = tl.where(turns == 1, end - y, tl.where(turns == 2, end - x, y))
    from_y = tl.where(turns == 1, x, tl.where(turns == 2, end - y, end - x))
    for channel in tl.static_range(3):
        value = tl.load(source + (from_y * size + from_x) * 3 + channel, mask=mask, other=0)
        tl.store(target + channel, value, mask=mask)


@triton.jit
def _sharpness(source, target, factor, pixel, x, y, size, mask):
    """Blend with a blurred copy; the outermost pixels stay as they are."""
    inner = (x > 0) & (x < size - 1) & (y > 0) & (y < size - 1)
    for channel in tl.static_range(3):
        middle = source + pixel * 3 + channel
        value = tl.load(middle, mask=mask, other=0).to(tl.int32)
        total = 4 * value
        for down in tl.static_range(-1, 2):
            for right in tl.static_range(-1, 2):
                total += tl.load(middle + (down * size + right) * 3, mask=mask & inner, other=0).to(tl.int32)
        base = tl.where(inner, (2 * total + 13) // 26, value)
        tl.store(target + pixel * 3 + channel, _blend(base, value, factor).to(tl.uint8), mask=mask)


@triton.jit
def _affine(source, target, matrix, bicubic, x, y, size, mask):
    """Warp; FILL is for pixels from outside."""
    a, b, c = tl.load(matrix), tl.load(matrix + 1), tl.load(matrix + 2)
    d, e, f = tl.load(matrix + 3), tl.load(matrix + 4), tl.load(matrix + 5)
    x, y, side = x.to(tl.float64) + 0.5, y.to(tl.float64) + 0.5, size.to(tl.float64)
    u, v = a * x + b * y + c, d * x + e * y + f
    inside = (u >= 0.0) & (u < side) & (v >= 0.0) & (v < side) & mask
    u, v = u - 0.5, v - 0.5
    left, above = tl.floor(u), tl.floor(v)
    p, q = u - left, v - above
    column, row = left.to(tl.int32), above.to(tl.int32)
    for channel in tl.static_range(3):
        image = source + channel
        if bicubic:
            value = _k(
                _cubic_row(image, row - 1, column, p, size, inside),
                _cubic_row(image, row, column, p, size, inside),
                _cubic_row(image, row + 1, column, p, size, inside),
                _cubic_row(image, row + 2, column, p, size, inside),
                q,
            )
            value = tl.minimum(tl.maximum(value, 0.0), 255.0)
        else:
            first = _linear_row(image, row, column, p, size, inside)
            second = _linear_row(image, row + 1, column, p, size, inside)
            value = first + (second - first) * q
        fill = _FILL_RED if channel == 0 else (_FILL_GREEN if channel == 1 else _FILL_BLUE)
        tl.store(target + channel, tl.where(inside, value.to(tl.int32), fill).to(tl.uint8), mask=mask)


@triton.jit
def _cubic_row(image, row, column, p, size, mask):
    return _k(
        _level(image, row, column - 1, size, mask),
        _level(image, row, column, size, mask),
        _level(image, row, column + 1, size, mask),
        _level(image, row, column + 2, size, mask),
        p,
    )


@triton.jit
def _linear_row(image, row, column, p, size, mask):
    first = _level(image, row, column, size, mask)
    return first + (_level(image, row, column + 1, size, mask) - first) * p


@triton.jit
def _k(g, h, i, j, t):
    third = ((2.0 * (g - h)) + i) - j
    fourth = ((h - g) - i) + j
    return h + t * ((i - g) + t * (third + t * fourth))


@triton.jit
def _level(image, row, column, size, mask):
    """Return a channel's value; beyond the edge that of the edge, which is the page's rule for further rows, too."""
    row, column = tl.minimum(tl.maximum(row, 0), size - 1), tl.minimum(tl.maximum(column, 0), size - 1)
    return tl.load(image + (row * size + column) * 3, mask=mask, other=0).to(tl.float64)


# --- the erased box -------------------------------------------------------------------------------------------

_MULTIPLY_0, _MULTIPLY_2 = tl.constexpr(0xD2E7470EE14C6C93), tl.constexpr(0xCA5A826395121157)
_BUMP_0, _BUMP_1 = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBB67AE8584CAA73B)


@triton.jit(do_not_specialize=["begin", "size"])
def _erase_kernel(words, longs, out, levels, todo, begin, size, BLOCK: tl.constexpr):
    """Fill erased boxes with noise: BLOCK counters of Philox4x64-10, 16 numbers of each."""
    view = tl.load(todo + begin + tl.program_id(1))
    record = words + view * _RECORD_WORDS + _ERASE
    top, left = tl.load(record), tl.load(record + 1)
    height, width = tl.load(record + 2), tl.load(record + 3)
    noise = longs + view * (_RECORD_WORDS // 2) + _NOISE // 2
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = out + view * size * size * 3
    w0, w1, w2, w3 = _philox(
        group + 1, tl.load(noise).to(tl.uint64, bitcast=True), tl.load(noise + 1).to(tl.uint64, bitcast=True)
    )
    for part in tl.static_range(16):
        word = w0 if part < 4 else (w1 if part < 8 else (w2 if part < 12 else w3))
        number = ((word >> (part % 4 * 16)) & 0xFFFF).to(tl.int32)
        index = group * 16 + part
        channel, rest = index // (height * width), index % (height * width)
        mask = channel < 3
        level = tl.load(levels + channel * 65536 + number, mask=mask, other=0)
        pixel = (top + rest // width) * size + left + rest % width
        tl.store(image + pixel * 3 + channel, level, mask=mask)


@triton.jit
def _philox(counter, k0, k1):
    """Return the four words of counters (counter, 0, 0, 0)."""
    c0 = counter.to(tl.uint64)
    c1, c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0), tl.zeros_like(c0)
    m0, m2 = tl.full(c0.shape, _MULTIPLY_0, tl.uint64), tl.full(c0.shape, _MULTIPLY_2, tl.uint64)
    for _ in tl.static_range(10):
        high0, high2 = tl.umulhi(m0, c0), tl.umulhi(m2, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, m2 * c2, high0 ^ c3 ^ k1, m0 * c0
        k0, k1 = k0 + _BUMP_0, k1 + _BUMP_1
    return c0, c1, c2, c3
