"""Batches of views: every kernel gives the pixels of docs/views-v2.md, to the bit."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.defined_views import affine, render_by_definition, resize_weights
from support.random_views import random_views, together, views_of_each_op, warp_records, warps_to_whole_numbers

from pipeline.pixels import batched, torch_kernels
from pipeline.pixels.batched import render_batch
from pipeline.pixels.packed import BICUBIC, BILINEAR


def defined(images_and_views) -> np.ndarray:
    return np.stack([render_by_definition(image, view) for image, view in images_and_views])


def rendered(images_and_views, **options) -> np.ndarray:
    pixels, records = together(images_and_views)
    return render_batch(torch.from_numpy(pixels), records, **options).numpy()


def assert_same(one: np.ndarray, other: np.ndarray, images_and_views) -> None:
    different = [i for i in range(len(one)) if not np.array_equal(one[i], other[i])]
    assert not different, [(i, images_and_views[i][1]) for i in different[:3]]


# sizes: below a Sharpness, odd, and the usual one with larger images
@pytest.mark.parametrize(("size", "count", "scale"), [(1, 40, 1), (2, 40, 1), (17, 150, 1), (56, 20, 3)])
def test_torch_renders_random_views_as_defined(size, count, scale):
    views = random_views(size, count, size, scale=scale)
    assert_same(rendered(views), defined(views), views)


@pytest.mark.parametrize("size", [3, 48])
def test_torch_applies_each_operation_as_defined(size):
    views = views_of_each_op(size)
    assert_same(rendered(views), defined(views), views)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_torch_rounds_each_operation_of_a_warp(interpolation):
    image, matrices = warps_to_whole_numbers(224)
    records = warp_records(image, matrices, interpolation)
    views = render_batch(torch.from_numpy(image.reshape(-1)), records).numpy()
    for view, matrix in zip(views, matrices, strict=True):
        assert np.array_equal(view, affine(image, matrix, interpolation)), matrix


# from n to m values: larger, the same, odd, one, and so many inputs that the order of the sum decides
@pytest.mark.parametrize(("n", "m"), [(9, 33), (24, 24), (97, 31), (1, 5), (5, 1), (3001, 64), (1777, 100)])
def test_weights_are_those_of_the_definition(n, m):
    for interpolation, filter in (("bilinear", BILINEAR), ("bicubic", BICUBIC)):
        first, weights = torch_kernels.weights(n, m, filter, 0, m)
        for i in range(m):
            begin, defined_weights = resize_weights(i, n, m, interpolation)
            assert (begin, defined_weights) == (first[i], weights[i, : len(defined_weights)].tolist())
            assert not weights[i, len(defined_weights) :].any()


def test_torch_renders_in_parts_as_at_once(monkeypatch):
    views = random_views(1, 30, 24)
    at_once = rendered(views)
    monkeypatch.setattr(torch_kernels, "_chunk_bytes", lambda device: 3000)
    assert_same(rendered(views), at_once, views)


def test_renders_into_a_given_tensor_and_an_empty_batch():
    views = random_views(2, 5, 8)
    pixels, records = together(views)
    out = torch.empty(5, 8, 8, 3, dtype=torch.uint8)
    assert render_batch(torch.from_numpy(pixels), records, out) is out
    assert_same(out.numpy(), defined(views), views)
    assert render_batch(torch.from_numpy(pixels), records[:0]).shape == (0, 0, 0, 3)


# each row: a field, what it becomes, the rule
@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("offset", -1, "the image must lie inside the pixels"),
        ("offset", 2**62, "the image must lie inside the pixels"),
        ("image", (2**31 - 1, 2**31 - 1), "the image must lie inside the pixels"),
        ("crop", (0, 0, 0, 1), "the crop must lie inside the image"),
        ("crop", (2**31 - 1, 0, 1, 1), "the crop must lie inside the image"),
        ("window", (-1, 0), "the window must lie inside the resized crop"),
        ("erase", (0, 1, 8, 8), "the erased box must lie inside the view"),
        ("num_ops", 16, "num_ops must be in 0..15"),
        ("size", 7, "all views must have the same size"),
    ],
)
def test_refuses_a_record_that_would_read_other_memory(field, value, rule):
    pixels, records = together(random_views(2, 5, 8))
    records = records.copy()
    records[field][3] = value
    with pytest.raises(ValueError, match=rule) as error:
        render_batch(torch.from_numpy(pixels), records)
    assert "record 3" in str(error.value)


def test_refuses_an_out_that_does_not_fit():
    pixels, records = together(random_views(2, 5, 8))
    with pytest.raises(
        ValueError, match=r"out must be contiguous uint8 \[5, 8, 8, 3\] on cpu, got torch.uint8 \[5, 8, 8, 4\]"
    ):
        render_batch(torch.from_numpy(pixels), records, torch.empty(5, 8, 8, 4, dtype=torch.uint8))


def test_refuses_an_operation_that_is_not_defined():
    pixels, records = together(random_views(2, 5, 8))
    records = records.copy()
    records["ops"]["kind"][1, 0] = 12
    with pytest.raises(ValueError, match=r"operations must be of the kinds .*; record 1 has"):
        render_batch(torch.from_numpy(pixels), records)


# --- Triton without a GPU ---------------------------------------------------------------------------------------

# Its interpreter is switched on when the kernels are imported, so it needs a process of its own.
INTERPRETED = """
import torch
from support.random_views import random_views, together, views_of_each_op, warp_records, warps_to_whole_numbers
from pipeline.pixels import triton_kernels
from pipeline.pixels.batched import render_batch

def compare(pixels, records):
    pixels = torch.from_numpy(pixels)
    one, other = (render_batch(pixels, records, kernels=kernels) for kernels in ("torch", "triton"))
    for number, record in enumerate(records):
        assert torch.equal(one[number], other[number]), record

views = views_of_each_op(8)
compare(*together(views[:-16:5] + views[-16:]))
compare(*together(random_views(1, 15, 17, layers=4)))
image, matrices = warps_to_whole_numbers(32)
for interpolation in ("bilinear", "bicubic"):
    compare(image.reshape(-1), warp_records(image, matrices[::3], interpolation))
triton_kernels._PART_BYTES = 5000
compare(*together(random_views(2, 12, 5)))
compare(*together(random_views(3, 5, 1)))
"""


def test_triton_renders_as_torch_in_its_interpreter():
    pytest.importorskip("triton", minversion="3.7")  # the interpreter of 3.6 does not work with NumPy 2.4
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


class Recorder:
    """Takes the place of a Triton kernel, and keeps its launches."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *values, **options: self.launches.append((values, options))

    def compiled(self, *, fused: bool = False) -> str:
        """Return the PTX of the first launch for a GPU with compute capability 9.0."""
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        values, options = self.launches[0]
        names = self.kernel.arg_names
        constants = {name: options[name] for name in names[len(values) :]}
        signature = dict.fromkeys(constants, "constexpr") | dict(zip(names, map(type_name, values), strict=False))
        source = ASTSource(self.kernel, {name: signature[name] for name in names}, constexprs=constants)
        options = {name: value for name, value in options.items() if name not in constants}
        options["enable_fp_fusion"] |= fused
        return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def type_name(value: Any) -> str:
    types = {
        torch.uint8: "*u8",
        torch.int32: "*i32",
        torch.int64: "*i64",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
    }
    return types[value.dtype] if isinstance(value, torch.Tensor) else "i32"


@pytest.fixture
def launched(monkeypatch, tmp_path) -> dict[str, Recorder]:
    """Return all kernels with their launches for a batch, in the order of the launches."""
    pytest.importorskip("triton")
    from pipeline.pixels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ("weights", "rows", "columns", "tables", "operations", "erase")
    kernels = {name: Recorder(getattr(triton_kernels, f"_{name}_kernel")) for name in names}
    for name, recorder in kernels.items():
        monkeypatch.setattr(triton_kernels, f"_{name}_kernel", recorder)
    pixels, records = together(random_views(1, 20, 17, layers=2))
    render_batch(torch.from_numpy(pixels), records, kernels="triton")
    return kernels


def test_triton_needs_eight_launches_for_two_layers_of_operations(launched):
    counts = {name: len(kernel.launches) for name, kernel in launched.items()}
    assert counts == {"weights": 1, "rows": 1, "columns": 1, "tables": 2, "operations": 2, "erase": 1}


# f32 and f64 without `.rn` may be fused by the assembler; `div.rn.f64` is one rounded operation
FUSED = re.compile(r"\b(?:fma|mad)[.\w]*\.f(?:32|64)\b|\b(?:mul|add|sub)\.f(?:32|64)\b")
APPROXIMATE = re.compile(r"\.(?:approx|full|ftz)\b")


@pytest.mark.parametrize("name", ["weights", "rows", "columns", "tables", "operations", "erase"])
def test_triton_kernels_compile_for_a_gpu_and_fuse_no_product_with_a_sum(launched, name):
    ptx = launched[name].compiled()
    assert not FUSED.findall(ptx)
    assert not APPROXIMATE.findall(ptx)
    assert bool(FUSED.findall(launched[name].compiled(fused=True))) == (name in ("weights", "tables", "operations"))


def test_triton_is_used_on_a_cuda_device_where_it_is_installed_and_finds_a_compiler(monkeypatch):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(batched, "find_spec", lambda name: name)
    assert batched._fastest(torch.device("cuda")) == "triton"
    assert batched._fastest(torch.device("cpu")) == "torch"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert batched._fastest(torch.device("cuda")) == "torch"
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(batched, "find_spec", lambda name: None)
    assert batched._fastest(torch.device("cuda")) == "torch"
