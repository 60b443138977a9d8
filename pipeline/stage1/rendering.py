"""Render mix blocks into batches: each image is decoded once, and each batch is one view of the whole block."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images.decode import decode
from pipeline.images.source import Source
from pipeline.labels.replay import check_image
from pipeline.labels.tables import SampleRows
from pipeline.machine.loaders import Note, SlotStream
from pipeline.pixels.handover import begin_batch, slot_shape
from pipeline.pixels.render import draw_decoded, draw_encoded, render_views
from pipeline.views.mixing import MixBatch, lay_out
from pipeline.views.pairs import mix_blocks, pairs_of
from pipeline.views.recipe import Recipe

# Maximum memory of one process for a block between its views: decoded images, or their views if these are smaller. A block
# of 256 images of ImageNet decodes to about 150 MB; a block of 12-megapixel photographs is rendered eight views at a time.
HELD_BYTES = 320 * 2**20


@dataclass(frozen=True)
class Block:
    """A mix block of one label shard, with the views to make from one decode.

    Attributes:
        shard: name of the source shard.
        views: the label shard's block of views.
        chunk: the views to make, part of `views`.
        rows: int64 [N], usable rows of the mix block.
        samples: samples of these rows, N samples.
    """

    shard: str
    views: range
    chunk: range
    rows: NDArray[np.int64]
    samples: SampleRows

    @property
    def name(self) -> tuple[str, int, int]:
        """The key of the block, unique in a label set."""
        return self.shard, int(self.rows[0]), self.chunk.start


Unit = tuple[Block, int]  # one view of a block: the unit of work of a loader process


@dataclass(frozen=True)
class ViewBatch:
    """A view of one mix block, ready for the teacher.

    Attributes:
        shard: name of the source shard.
        views: the label shard's block of views.
        view: view number.
        rows: int64 [B], samples' rows; the two samples of a pair are adjacent, pairs start at even positions.
        images: uint8 [B, H, W, 3], or [N] before a device has rendered them (`pipeline.pixels.handover.rendered`).
        mix: partners and mixes, by position in the batch.
    """

    shard: str
    views: range
    view: int
    rows: Tensor
    images: Tensor
    mix: MixBatch


class BlockRenderer:
    """Renderer called in loader processes: `renderer((block, view), out, note)` renders one view and puts its images into `out`.

    It holds the images of the last requested block: a caller that requests all views of a block in a row (see `deal`) needs
    only one decode. Images of which a block has a single view are not held.
    """

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self._source, self._recipe = source, recipe
        self._name: tuple[str, int, int] | None = None
        self._held: list[NDArray[np.uint8]] = []

    def __call__(self, unit: Unit, out: Tensor, note: Note) -> ViewBatch:
        """Render one view of a block into `out`, uint8 [at least B, H, W, 3], or hand it over there, uint8 [N].

        Raises:
            DeitCliError: an image is not the one that was indexed, or cannot be read.
        """
        block, view = unit
        if self._name != block.name:
            self._name, self._held = None, []  # free the old images before loading the new ones
            if len(block.chunk) > 1:
                self._held = [self._hold(block, position, note) for position in range(len(block.rows))]
            self._name = block.name
        recipe, keys = self._recipe, block.samples.key
        layout = lay_out(pairs_of(recipe, keys, np.arange(len(keys)), view), range(view, view + 1))
        batch = begin_batch(out, len(layout.rows), recipe.img_size)
        positions: list[int] = layout.rows.tolist()
        for at, position in enumerate(positions):
            if not self._held:
                image = self._read(block, position, note)
                draw_encoded(image, recipe, keys[position], block.chunk, partial(batch.add, [at]))
            elif (held := self._held[position]).ndim == 4:
                batch.add_rendered(at, held[view - block.chunk.start])
            else:
                draw_decoded(held, recipe, keys[position], range(view, view + 1), partial(batch.add, [at]))
        rows = torch.from_numpy(block.rows[layout.rows])
        return ViewBatch(block.shard, block.views, view, rows, batch.images, layout.mix)

    def _read(self, block: Block, position: int, note: Note) -> bytes:
        """Return the encoded image of a sample, which is the one that was indexed."""
        note(f"image {block.samples.key[position]!r} of {block.shard}")
        sample = self._source.shard(block.shard)[int(block.rows[position])]
        check_image(sample, block.samples, position, shard=block.shard)
        return sample.image

    def _hold(self, block: Block, position: int, note: Note) -> NDArray[np.uint8]:
        """Return the decoded image [H, W, 3], or all its views [V, size, size, 3] if they take less memory."""
        key = block.samples.key[position]
        image = decode(self._read(block, position, note), key=key)
        if image.nbytes <= len(block.chunk) * self._recipe.img_size**2 * 3:
            return image
        return render_views(image, self._recipe, key, block.chunk)


def stream_views(
    renderer: BlockRenderer,
    blocks: Iterable[Block],
    *,
    img_size: int,
    most: int,
    workers: int,
    held: int,
    device: torch.device | None = None,
    unrendered: bool = False,
) -> SlotStream[ViewBatch]:
    """Return a stream of every view of each block, rendered in loader processes.

    Args:
        renderer: renderer of the views.
        blocks: blocks to render, taken when they are needed.
        img_size: height and width of the views.
        most: maximum number of samples in a block.
        workers: number of loader processes; 0: render in this process.
        held: number of batches that the caller may hold while it requests another one.
        device: device to which the caller copies batches; None: no copies.
        unrendered: True: the caller renders the views on that device.
    """
    shape = slot_shape(most, img_size, unrendered=unrendered)
    return SlotStream(renderer, deal(blocks, workers), shape, workers=workers, held=held, device=device)


def blocks_of(shard: str, views: range, samples: SampleRows, recipe: Recipe) -> Iterator[Block]:
    """Yield the mix blocks of one label shard, with as many views at a time as HELD_BYTES allows."""
    for rows in mix_blocks(recipe, samples.usable):
        part = samples.take(rows)
        step = views_at_once(part, recipe.img_size, len(views))
        for start in range(views.start, views.stop, step):
            yield Block(shard, views, range(start, min(start + step, views.stop)), rows, part)


def views_at_once(samples: SampleRows, img_size: int, num_views: int) -> int:
    """Return how many views of these samples, 1 to num_views, can be made at a time within HELD_BYTES."""
    decoded = samples.height.astype(np.int64) * samples.width * 3
    for views in range(num_views, 1, -1):
        if np.minimum(decoded, views * img_size**2 * 3).sum() <= HELD_BYTES:
            return views
    return 1


def deal(blocks: Iterable[Block], workers: int) -> Iterator[Unit | None]:
    """Yield the views of as many blocks as there are workers, in turn.

    A loader gives its items to its workers in turn, so each worker gets all views of a block, and decodes it once.
    None takes the turn of a worker for which no block is left. Blocks are taken only when they are needed.
    """
    blocks = iter(blocks)
    lanes: list[Iterator[Unit]] = [iter(()) for _ in range(max(1, workers))]
    more = True
    while more:
        more = False
        for i, lane in enumerate(lanes):
            unit = next(lane, None)
            if unit is None and (block := next(blocks, None)) is not None:
                lanes[i] = lane = zip(itertools.repeat(block), block.chunk)
                unit = next(lane)
            more = more or unit is not None
            yield unit
