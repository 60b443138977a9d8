"""Views of renderer 2 in plain torch operations, on any device: what is used where no kernel was compiled, and the double in tests.

Every operation is a torch operation of its own over integers, float64 or float32, so nothing fuses a product and a sum. Weights of the resize
are computed with NumPy. The steps are those of docs/views-v2.md, section 3.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.pixels.packed import (
    AFFINE,
    AUTOCONTRAST,
    BICUBIC,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    INVERT,
    POSTERIZE,
    SHARPNESS,
    SOLARIZE,
    TURN,
)
from pipeline.views.noise import noise_levels
from pipeline.views.randaugment import FILL

LUMA = (19595, 38470, 7471)
_FULL_TURN = 4


def render_batch(pixels: Tensor, records: NDArray, out: Tensor) -> None:
    """Render views into `out`, uint8 [B, S, S, 3]; see `pipeline.pixels.batched.render_batch`."""
    for record, view in zip(records, out, strict=True):
        view.copy_(_resized(pixels, record))
    for layer in range(records["num_ops"].max(initial=0)):
        active = np.flatnonzero(records["num_ops"] > layer)
        _apply_layer(out, active, records["ops"][active, layer])
    for record, view in zip(records, out, strict=True):
        if record["erase"][2]:
            _erase(view, record)


# --- resize ---------------------------------------------------------------------------------------------------


def tap_range(i: NDArray, n: NDArray | int, m: NDArray | int, filters: NDArray | int) -> tuple[NDArray, NDArray]:
    """Return the first input of each output of a pass, and the end (the last one, plus 1), int64 like `i`.

    Args:
        i: positions of outputs, integers.
        n: number of inputs.
        m: number of outputs.
        filters: BILINEAR or BICUBIC.
    """
    scale = np.asarray(n, np.float64) / m
    support = np.where(np.equal(filters, BICUBIC), 2.0, 1.0) * np.maximum(scale, 1.0)
    centre = (i + 0.5) * scale
    first = np.maximum(np.trunc(centre - support + 0.5), 0)
    return first.astype(np.int64), np.minimum(np.trunc(centre + support + 0.5), n).astype(np.int64)


@lru_cache(2**8)
def weights(n: int, m: int, filter: int, top: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the inputs and weights of a pass from n to m values, for outputs top .. top + count - 1.

    Returns:
        first int64 [count], position of the first input; weights int32 [count, T] in units of 2**-22, zeros behind the last one.
    """
    i = np.arange(top, top + count)
    first, end = tap_range(i, n, m, filter)
    taps = np.arange((end - first).max())
    scale = n / m
    centre, narrow = (i + 0.5) * scale, 1.0 / max(scale, 1.0)
    x = np.abs((first[:, None] + taps - centre[:, None] + 0.5) * narrow)
    weight = np.where(first[:, None] + taps < end[:, None], _kernel(x, filter), 0.0)
    total = np.add.accumulate(weight, axis=1)[:, -1:]  # one after the other: np.sum adds in pairs
    weight = np.divide(weight, total, where=total != 0, out=weight)
    return first, np.trunc(weight * 2.0**22 + np.where(weight < 0, -0.5, 0.5)).astype(np.int32)


def _kernel(x: NDArray[np.float64], filter: int) -> NDArray[np.float64]:
    if filter != BICUBIC:
        return np.where(x < 1, 1 - x, 0.0)
    near = ((1.5 * x - 2.5) * x) * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _resized(pixels: Tensor, record: np.void) -> Tensor:
    """Return crop, resize, window and flip of one view, uint8 [S, S, 3]."""
    (height, width), size, filter = record["image"].tolist(), int(record["size"]), int(record["filter"])
    top, left, crop_height, crop_width = record["crop"].tolist()
    begin = int(record["offset"])
    image = pixels[begin : begin + height * width * 3].view(height, width, 3)
    first, of_rows = weights(crop_height, int(record["resize"][0]), filter, int(record["window"][0]), size)
    columns = weights(crop_width, int(record["resize"][1]), filter, int(record["window"][1]), size)
    begin, end = int(first[0]), min(int(first[-1]) + of_rows.shape[1], crop_height)  # only rows that are needed
    crop = image[top + begin : top + end, left : left + crop_width]
    view = _pass(_pass(crop, *columns), first - begin, of_rows)
    return view.flip(1) if record["flip"] else view


def _pass(image: Tensor, first: NDArray[np.int64], weights: NDArray[np.int32]) -> Tensor:
    """Return every row of uint8 [H, W, 3] resized to m values, transposed: uint8 [m, H, 3]."""
    device, width = image.device, image.shape[1]
    starts, taps = torch.from_numpy(first).to(device), torch.from_numpy(weights).to(device)
    rows = max(1, _chunk_bytes(device) // (12 * width))
    parts = []
    for part in image.split(rows):
        columns = part.transpose(0, 1).to(torch.int32, memory_format=torch.contiguous_format).view(width, -1)
        total = columns.new_full((len(first), columns.shape[1]), 1 << 21)
        for tap in range(taps.shape[1]):
            inputs = columns.index_select(0, (starts + tap).clamp_(max=width - 1))
            total.addcmul_(inputs, taps[:, tap, None])  # integers: exact, fused or not
        parts.append((total >> 22).clamp_(0, 255).to(torch.uint8).view(len(first), -1, 3))
    return torch.cat(parts, 1)


# --- operations -----------------------------------------------------------------------------------------------


def _apply_layer(views: Tensor, active: NDArray[np.int64], ops: NDArray) -> None:
    """Apply one operation to each of the active views, in place.

    Args:
        views: uint8 [B, S, S, 3].
        active: int64 [A], positions of views.
        ops: OP [A], their operations.
    """
    for apply, members in _groups(ops):
        for chunk in _chunks(members, views):
            where = torch.from_numpy(active[chunk]).to(views.device)
            views[where] = apply(views[where], ops[chunk])


def _groups(ops: NDArray) -> Iterator[tuple[Callable[[Tensor, NDArray], Tensor], NDArray[np.int64]]]:
    """Return the functions that these operations need, each with the positions of its operations."""
    kinds = ops["kind"]
    for function, chosen in (
        (_affine, kinds == AFFINE),
        (_turned, kinds == TURN),
        (_colour, kinds == COLOR),
        (_sharpness, kinds == SHARPNESS),
        (_looked_up, ~np.isin(kinds, (AFFINE, TURN, COLOR, SHARPNESS))),
    ):
        if chosen.any():
            yield function, np.flatnonzero(chosen)


def _chunks(members: NDArray[np.int64], views: Tensor) -> list[NDArray[np.int64]]:
    """Split positions so that a float64 tensor of the views of one part is not too large."""
    at_once = max(1, _chunk_bytes(views.device) // (8 * views[0].numel()))
    return np.split(members, range(at_once, len(members), at_once))


def _looked_up(views: Tensor, ops: NDArray) -> Tensor:
    """Apply operations in which a value of a channel decides the new one: by tables of 256 values."""
    tables = torch.stack([_table(view, op) for view, op in zip(views, ops, strict=True)])
    index = views.movedim(3, 1).reshape(len(views), 3, -1).long()
    return tables.gather(2, index).view(len(views), 3, *views.shape[1:3]).movedim(1, 3)


def _table(view: Tensor, op: np.void) -> Tensor:
    """Return what becomes of each value of each channel of uint8 [S, S, 3], uint8 [3, 256]."""
    v = torch.arange(256, device=view.device)
    number, kind = int(op["number"]), int(op["kind"])
    if kind == AUTOCONTRAST:
        return _autocontrast(view, v)
    if kind == EQUALIZE:
        return _equalize(view, v)
    if kind == CONTRAST:
        sum, count = _luma(view).sum(), view.shape[0] * view.shape[1]
        table = _blend((2 * sum + count) // (2 * count), v, op["factor"])
    elif kind == BRIGHTNESS:
        table = _blend(torch.zeros_like(v), v, op["factor"])
    elif kind == INVERT:
        table = 255 - v
    elif kind == POSTERIZE:
        table = v & number
    elif kind == SOLARIZE:
        table = torch.where(v < number, v, 255 - v)
    else:  # SOLARIZE_ADD
        table = torch.where(v < 128, (v + number).clamp_(max=255), v)
    return table.to(torch.uint8).expand(3, -1)


def _autocontrast(view: Tensor, v: Tensor) -> Tensor:
    low, high = view.amin((0, 1)).double()[:, None], view.amax((0, 1)).double()[:, None]
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # 255 / x would be 255 times 1 / x
    shift = -low * scale
    stretched = (v * scale + shift).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, v.double()).to(torch.uint8)


def _equalize(view: Tensor, v: Tensor) -> Tensor:
    histogram = torch.zeros(3, 256, dtype=torch.int64, device=view.device)
    values = view.reshape(-1, 3).t().long()
    histogram.scatter_add_(1, values, torch.ones_like(values))
    upto = histogram.cumsum(1)
    count = upto[:, -1:]
    highest = histogram.gather(1, view.amax((0, 1)).long()[:, None])
    step = (count - highest) // 255
    equal = (step // 2 + upto - histogram) // step.clamp(min=1)
    return torch.where(step > 0, equal.clamp(max=255), v).to(torch.uint8)  # one value only: step is 0


def _blend(base: Tensor, values: Tensor, factor: np.ndarray | np.float32) -> Tensor:
    """Return the blend of a base and values with factors (float32, one or [G]), float32 of whole numbers."""
    factors = torch.tensor(factor, device=values.device)
    base = base.float()
    product = (values.float() - base) * factors.view(-1, *[1] * (values.ndim - 1))
    return (base + product).clamp_(0, 255).trunc_()


def _luma(views: Tensor) -> Tensor:
    """Return the luma of uint8 [..., 3], int32 [...]."""
    red, green, blue = views.int().unbind(-1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 2**15) >> 16


def _colour(views: Tensor, ops: NDArray) -> Tensor:
    return _blend(_luma(views)[..., None], views, ops["factor"]).to(torch.uint8)


def _sharpness(views: Tensor, ops: NDArray) -> Tensor:
    """Blend with a blurred copy; the outermost pixels stay as they are."""
    size = views.shape[1]
    if size < 3:
        return views
    levels = views.int()
    rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    inner = levels[:, 1:-1, 1:-1]
    nine = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    base = (2 * (nine + 4 * inner) + 13) // 26
    sharp = views.clone()
    sharp[:, 1:-1, 1:-1] = _blend(base, inner, ops["factor"]).to(torch.uint8)
    return sharp


def _turned(views: Tensor, ops: NDArray) -> Tensor:
    turned = [view.rot90(int(op["number"]) % _FULL_TURN) for view, op in zip(views, ops, strict=True)]
    return torch.stack(turned)


# --- warps ----------------------------------------------------------------------------------------------------


def _affine(views: Tensor, ops: NDArray) -> Tensor:
    """Warp each view with its own matrix and filter."""
    warped = torch.empty_like(views)
    for filter in np.unique(ops["filter"]):
        members = np.flatnonzero(ops["filter"] == filter)
        where = torch.from_numpy(members).to(views.device)
        warped[where] = _warped(views[where], ops["matrix"][members], _cubic if filter == BICUBIC else _linear)
    return warped


def _warped(views: Tensor, matrices: NDArray, interpolate: Callable[..., Tensor]) -> Tensor:
    """Warp views of one filter.

    Args:
        views: uint8 [G, S, S, 3].
        matrices: float64 [G, 6].
        interpolate: `_cubic` or `_linear`.
    """
    device, (count, size) = views.device, views.shape[:2]
    a, b, c, d, e, f = torch.from_numpy(np.ascontiguousarray(matrices)).to(device).t()[..., None, None]
    x = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    y = x[:, None]
    u, v = a * x + b * y + c, d * x + e * y + f  # [G, S, S]; the products are [G, 1, S] or [G, S, 1]
    outside = (u < 0) | (u >= size) | (v < 0) | (v >= size)
    u, v = u - 0.5, v - 0.5
    column, row = u.floor(), v.floor()
    planes = views.movedim(3, 1).reshape(count, 3, -1).double()
    columns, rows = column.long(), row.long()

    def pixel(down: int, right: int) -> Tensor:
        """Return the pixels so many rows and columns from (row, column), float64 [G, 3, S, S]."""
        # A row beyond the edge is the row of the edge: this is the page's rule for further rows, too.
        index = (rows + down).clamp_(0, size - 1).mul_(size).add_((columns + right).clamp_(0, size - 1))
        return planes.gather(2, index.view(count, 1, -1).expand(-1, 3, -1)).view(count, 3, size, size)

    levels = interpolate(pixel, (u - column)[:, None], (v - row)[:, None]).to(torch.uint8)
    fill = torch.tensor(FILL, dtype=torch.uint8, device=device)
    return torch.where(outside[..., None], fill, levels.movedim(1, 3))


def _cubic(pixel: Callable[[int, int], Tensor], p: Tensor, q: Tensor) -> Tensor:
    def row(down: int) -> Tensor:
        return _k(pixel(down, -1), pixel(down, 0), pixel(down, 1), pixel(down, 2), p)

    return _k(row(-1), row(0), row(1), row(2), q).clamp_(0, 255)


def _k(g: Tensor, h: Tensor, i: Tensor, j: Tensor, t: Tensor) -> Tensor:
    third = (g - h).mul_(2).add_(i).sub_(j)
    fourth = (h - g).sub_(i).add_(j)
    return fourth.mul_(t).add_(third).mul_(t).add_(i - g).mul_(t).add_(h)


def _linear(pixel: Callable[[int, int], Tensor], p: Tensor, q: Tensor) -> Tensor:
    first, second = (_l(pixel(down, 0), pixel(down, 1), p) for down in (0, 1))
    return _l(first, second, q)


def _l(g: Tensor, h: Tensor, t: Tensor) -> Tensor:
    return (h - g).mul_(t).add_(g)


# --- the erased box -------------------------------------------------------------------------------------------


def _erase(view: Tensor, record: np.void) -> None:
    """Fill the erased box of uint8 [S, S, 3] with noise, in place."""
    top, left, height, width = record["erase"].tolist()
    count = height * width * 3
    key = int(record["noise"][0]) | int(record["noise"][1]) << 64
    words = np.random.Philox(key=key).random_raw(-(-count // 4))
    numbers = words.astype("<u8", copy=False).view("<u2")[:count].reshape(3, height, width)
    levels = np.take_along_axis(noise_levels()[:, None], numbers.reshape(3, 1, -1), axis=2).reshape(3, height, width)
    view[top : top + height, left : left + width] = torch.from_numpy(levels).to(view.device).movedim(0, 2)


def _chunk_bytes(device: torch.device) -> int:
    """Return the size of the largest tensor of a step: on a CPU it should stay in the cache, on a GPU launches should be few."""
    return 2**21 if device.type == "cpu" else 2**28
