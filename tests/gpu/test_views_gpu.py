"""Views that a GPU renders are those of a CPU, to the bit."""

import pytest
import torch
from support.defined_views import render_by_definition
from support.random_views import random_views, together, views_of_each_op, warp_records, warps_to_whole_numbers

from pipeline.pixels import batched
from pipeline.pixels.batched import render_batch

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["torch", "triton"])
def kernels(request, device) -> str:
    """What renders; Triton only where it would be chosen."""
    if request.param == "triton" and (device.type != "cuda" or batched._fastest(device) != "triton"):
        pytest.skip("needs a real GPU, Triton and a C compiler")
    return request.param


def assert_same_as_on_the_cpu(images_and_views, device, kernels) -> None:
    pixels, records = together(images_and_views)
    pixels = torch.from_numpy(pixels)
    views = render_batch(pixels.to(device), records, kernels=kernels).cpu()
    expected = render_batch(pixels, records, kernels="torch")
    for view, other, (_, parameters) in zip(views, expected, images_and_views, strict=True):
        assert torch.equal(view, other), parameters


# size of the views, number, how much larger than 40 x 57 the images are; the last row is of 480 x 684 and of strips of 2400 x 108
@pytest.mark.parametrize(
    ("size", "count", "scale"), [(1, 50, 1), (2, 50, 1), (33, 200, 2), (224, 60, 4), (224, 40, 12)]
)
def test_random_views_are_those_of_the_cpu(device, kernels, size, count, scale):
    count = count if device.type == "cuda" else 10
    assert_same_as_on_the_cpu(random_views(size, count, size, scale=scale), device, kernels)


@pytest.mark.parametrize("size", [31, 224])
def test_each_operation_is_that_of_the_cpu(device, kernels, size):
    step = 1 if device.type == "cuda" else 9
    assert_same_as_on_the_cpu(views_of_each_op(size)[::step], device, kernels)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_each_operation_of_a_warp_is_rounded(device, kernels, interpolation):
    image, matrices = warps_to_whole_numbers(224)
    records, pixels = warp_records(image, matrices, interpolation), torch.from_numpy(image.reshape(-1))
    views = render_batch(pixels.to(device), records, kernels=kernels).cpu()
    assert torch.equal(views, render_batch(pixels, records, kernels="torch"))


def test_views_with_all_layers_are_those_of_the_cpu(device, kernels):
    assert_same_as_on_the_cpu(random_views(7, 20, 64, layers=15), device, kernels)


def test_views_in_parts_are_those_of_the_cpu(device, kernels, monkeypatch):
    if kernels == "triton":
        from pipeline.pixels import triton_kernels

        monkeypatch.setattr(triton_kernels, "_PART_BYTES", 100_000)
    assert_same_as_on_the_cpu(random_views(8, 30, 48), device, kernels)


def test_what_is_chosen_for_the_device_renders_views_as_defined(device):
    images_and_views = random_views(9, 12, 96, scale=3)
    pixels, records = together(images_and_views)
    views = render_batch(torch.from_numpy(pixels).to(device), records).cpu().numpy()
    for view, (image, parameters) in zip(views, images_and_views, strict=True):
        assert (view == render_by_definition(image, parameters)).all(), parameters


def test_views_are_rendered_into_a_tensor_on_the_stream_in_use(gpu, kernels):
    pixels, records = together(random_views(10, 20, 64))
    pixels, stream = torch.from_numpy(pixels), torch.cuda.Stream()
    expected = render_batch(pixels, records, kernels="torch")
    on_gpu, out = pixels.to(gpu), torch.empty(20, 64, 64, 3, dtype=torch.uint8, device=gpu)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert render_batch(on_gpu, records, out, kernels=kernels) is out
    stream.synchronize()
    assert torch.equal(out.cpu(), expected)
