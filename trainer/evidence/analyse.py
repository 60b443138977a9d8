"""`deit-cli analyse`: what the tokens of the user's own runs have learned, and where networks answer differently."""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import CheckpointError, UsageError
from pipeline.images.source import Source, open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_start
from pipeline.machine.loaders import plan_workers
from pipeline.machine.ranks import forward_dtype, resolve_device
from pipeline.storage.atomic import refusals_named, replace_file
from pipeline.storage.json import pretty_json
from pipeline.text import aligned
from trainer.config import AnalyseConfig
from trainer.evaluate import centre_recipe, chosen_class, fused_logits, replayed_batches
from trainer.evidence.networks import Network, find_networks
from trainer.evidence.tokens import TokenStatistics, draw_attention, patch_maps, token_attention
from trainer.metrics import read_metrics
from trainer.parallel import Running, World
from trainer.stream import CentreRenderer, mixed_images
from trainer.student import Student
from trainer.tokens import blocks_of, learned_tokens, run_with_tokens, token_cosines, why_no_tokens

log = logging.getLogger("deit_cli.analyse")

PUBLISHED = "timm:"
COMPARED = ("class_head", "distillation_head", "mean_logits")  # answers, as in the paper's table 4
UNKNOWN = -1  # answer of an image without a class label
Answers = dict[str, NDArray[np.int64]]  # classifier -> class of each image


@dataclass(frozen=True)
class Classes:
    """The classes of a network: its name, their number, and their names or None."""

    network: str
    number: int
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Seen:
    """Images as a student sees them: keys, float32 [B, 3, H, W] of 0..255, and known answers int64 [B] or UNKNOWN."""

    keys: tuple[str, ...]
    pixels: Tensor
    known: Tensor


class Images(Protocol):
    """The images that all networks see: centre crops, or views of a label set.

    Attributes:
        location: name of the images for messages.
        known: who gave the known answers: `class_labels` or `teacher`.
    """

    location: str
    known: str

    def batches(self, student: Student, running: Running) -> Iterator[Seen]:
        """Yield all images in the same order for every student."""
        ...


class Crops:
    """Centre crops of a source, each student's own size."""

    known = "class_labels"

    def __init__(self, source: Source, places: Sequence[tuple[int, int]], crop_pct: float | None) -> None:
        self.location, self._source, self._places, self._crop_pct = source.location, source, list(places), crop_pct

    @classmethod
    def spread(cls, source: Source, samples: int, crop_pct: float | None) -> "Crops":
        """Return crops of at most `samples` images, spread evenly over the source; 0: of all."""
        places = [(number, row) for number, shard in enumerate(source.shards) for row in range(len(shard.keys))]
        count = min(samples or len(places), len(places))
        return cls(source, [places[i * len(places) // count] for i in range(count)], crop_pct)

    def with_keys(self, keys: Sequence[str]) -> "Crops":
        """Return crops of the images with these keys.

        Raises:
            UsageError: the source has no such key.
        """
        places = {key: (n, row) for n, shard in enumerate(self._source.shards) for row, key in enumerate(shard.keys)}
        if missing := [key for key in keys if key not in places]:
            raise UsageError(f"--key {missing[0]}: {self.location} has no image with this key")
        return Crops(self._source, [places[key] for key in keys], self._crop_pct)

    def batches(self, student: Student, running: Running) -> Iterator[Seen]:
        """Yield all crops; class labels that do not fit the student's classes are unknown."""
        fits = _labels_fit(self._source, student)
        renderer = CentreRenderer(
            self._source, self._places, centre_recipe(student, self._crop_pct), running.batch_size, need_labels=False
        )
        keys = iter(self._source.shards[number].keys[row] for number, row in self._places)
        for batch in renderer.stream(workers=running.world.workers):
            pixels = batch.images.to(running.device).permute(0, 3, 1, 2).float()
            known = batch.class_label if fits else torch.full_like(batch.class_label, UNKNOWN)
            yield Seen(tuple(itertools.islice(keys, len(pixels))), pixels, known)


class Views:
    """Views of a label set, mixed as in training, with the teacher's stored answers."""

    known = "teacher"

    def __init__(self, label_set: LabelSet, source: Source, samples: int) -> None:
        self.location = str(label_set.place)
        self._label_set, self._source = label_set, source
        self._limit = samples or sum(len(label_set.samples(name).usable) for name in label_set.shards)

    def batches(self, student: Student, running: Running) -> Iterator[Seen]:
        """Yield the views.

        Raises:
            UsageError: the student has other classes or another image size than the label set.
        """
        for batch in replayed_batches(student, self._label_set, self._source, running, limit=self._limit):
            assert batch.teacher is not None
            yield Seen(batch.keys, mixed_images(batch, running.device), batch.teacher.hard)


def analyse(locations: Sequence[str], config: AnalyseConfig) -> dict[str, Any]:
    """Analyse the networks at these locations, see `find_networks` and `analyse_networks`."""
    return analyse_networks(find_networks(locations), config)


def analyse_networks(networks: Sequence[Network], config: AnalyseConfig) -> dict[str, Any]:
    """Analyse networks, write analysis.json and pictures to --out if it is given, and return plain JSON values.

    Raises:
        UsageError: the networks do not fit the images or each other.
        CheckpointError: the weights of a network are damaged, or its answers are NaN or infinite.
    """
    images, where = _open_images(config), resolve_device(config.device)
    world = World(0, 1, where, plan_workers(config.workers, where))
    running = Running(world=world, dtype=forward_dtype(config.amp_dtype, where), batch_size=config.batch_size)
    if config.out is not None:
        with refusals_named(config.out):
            config.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    attention: list[dict[str, Any]] = []
    answers: Answers = {}
    before: list[Classes] = []
    for network in networks:
        student = network.open(running.device)
        if images is not None:
            before.append(Classes(network.name, student.num_classes, student.class_names))
            _check_same(before[0], before[-1])
        runs.append(_describe(network, student, images, running, answers))
        if images is not None and (config.attention or config.key):
            attention += _draw(network, student, images, running, config)
    result = {
        "kind": "analysis",
        "version": 1,
        "runs": runs,
        "disagreement": None if images is None else disagreement(answers, images.location),
        "attention": attention,
    }
    if config.out is not None:
        replace_file(config.out / "analysis.json", pretty_json(result))
    return result


def disagreement(answers: Mapping[str, NDArray[np.int64]], location: str) -> dict[str, Any]:
    """Return the share of images that two classifiers answer differently, for all pairs (DeiT, table 4).

    Args:
        answers: class of each image by classifier, int64 [N]; UNKNOWN where it has none.
        location: name of the images.

    Returns:
        JSON values: the share counts the images that both classifiers answer, and is null if there are none.
    """
    columns = list(answers.values())

    def share(a: NDArray[np.int64], b: NDArray[np.int64]) -> float | None:
        both = (a != UNKNOWN) & (b != UNKNOWN)
        return float((a != b)[both].mean()) if both.any() else None

    matrix = [[share(a, b) for b in columns] for a in columns]
    return {"data": location, "images": len(columns[0]), "names": list(answers), "share": matrix}


def _open_images(config: AnalyseConfig) -> Crops | Views | None:
    if config.data is not None:
        return Crops.spread(open_source(config.data, options=config.options), config.samples, config.crop_pct)
    if config.labels is None:
        return None
    label_set = LabelSet.open(config.labels)
    source = label_set.open_source(config.labels_data, options=config.options)
    check_start(label_set, source)
    return Views(label_set, source, config.samples)


def _check_same(first: Classes, other: Classes) -> None:
    """Raise if two networks have other classes, because their answers could not be compared."""
    text = ""
    if first.number != other.number:
        text = f"{first.network} has {first.number} classes, {other.network} has {other.number}"
    elif first.names is not None and other.names is not None and first.names != other.names:
        at = next(at for at, (a, b) in enumerate(zip(first.names, other.names, strict=True)) if a != b)
        text = f"class {at} is {first.names[at]!r} for {first.network} and {other.names[at]!r} for {other.network}"
    if text:
        raise UsageError(
            f"{text}: their answers cannot be compared", fix="Analyse only networks of the same classes together"
        )


def _labels_fit(source: Source, student: Student) -> bool:
    """Return whether class labels of a source can be the student's classes; warn if not."""
    highest = source.max_label
    fits = source.num_classes in (None, student.num_classes) and (highest or 0) < student.num_classes
    if highest is not None and not fits:
        found = source.num_classes or f"labels up to {highest}"
        log.warning(
            "%s has %s classes, the networks have %d: its class labels are not compared with their answers",
            source.location, found, student.num_classes,
        )  # fmt: skip
    return fits


def _describe(
    network: Network, student: Student, images: Images | None, running: Running, answers: Answers
) -> dict[str, Any]:
    """Return what is known of one network, and add its answers for all images to `answers`."""
    why = why_no_tokens(student)
    tokens = None if why else _tokens_without_images(network, student, running)
    if images is not None:
        try:
            statistics, mine = _look(student, images, running)
        except CheckpointError as error:
            raise CheckpointError(f"{network.name}: {error.what}", fix=error.fix) from error
        if images.known in mine:
            answers.setdefault(images.known, mine[images.known])
        answers.update({f"{network.name} {name}": mine[name] for name in COMPARED if name in mine})
        if tokens is not None:
            seen = statistics.summary()
            tokens |= seen | {"cosine": tokens["cosine"] | seen["cosine"]}
    return {
        "name": network.name,
        "folder": network.location,
        "weights": network.shown,
        "model": student.model.pretrained_cfg.get("architecture"),
        "tokens": tokens,
        "no_tokens": why,
    }


def _tokens_without_images(network: Network, student: Student, running: Running) -> dict[str, Any]:
    """Return the cosine of the learned tokens, that of what enters the first block, and the probes of the training."""
    empty = torch.zeros(1, 3, student.img_size, student.img_size, device=running.device)
    _, tokens = run_with_tokens(student, empty, running)
    learned = token_cosines([learned_tokens(student)[None]]).item()
    lines = read_metrics(network.metrics) if network.metrics is not None else []
    along = [
        {"update": line["index"] + 1} | {name: line[name] for name in ("epoch", "input", "blocks", "output")}
        for line in lines
        if line["kind"] == "tokens"
    ]
    cosine = {"learned": learned, "input": token_cosines(tokens[:1]).item(), "blocks": None, "output": None}
    return {"images": 0, "cosine": cosine, "std": None, "cka": None, "along_training": along}


def _look(student: Student, images: Images, running: Running) -> tuple[TokenStatistics, Answers]:
    """Show all images to a network once; return the similarity of its tokens, its answers and the known ones."""
    statistics = TokenStatistics()
    found: dict[str, list[Tensor]] = {}
    for seen in images.batches(student, running):
        heads, tokens = run_with_tokens(student, seen.pixels, running)
        if tokens:
            statistics.add(tokens)
        chosen = {name: chosen_class(logits) for name, logits in fused_logits(heads).items()}
        for name, classes in ({images.known: seen.known} | chosen).items():
            found.setdefault(name, []).append(classes)
    answers = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    if (answers[images.known] == UNKNOWN).all():
        del answers[images.known]
    return statistics, answers


def _draw(
    network: Network, student: Student, images: Images, running: Running, config: AnalyseConfig
) -> list[dict[str, Any]]:
    """Draw the attention maps of one network for the chosen images, and return what was drawn."""
    if why := why_no_tokens(student):
        log.info("%s: no attention maps, because it has %s", network.name, why)
        return []
    depth = len(blocks_of(student))
    block = config.block or depth
    if block > depth:
        raise UsageError(f"--block must be in 1..{depth} (the blocks of {network.name}), got {block}")
    chosen = images.with_keys(config.key) if config.key and isinstance(images, Crops) else images
    keys, pixels = _first(chosen, len(config.key) or config.attention, student, running)
    rows = token_attention(student, pixels, running, block - 1)
    assert config.out is not None
    picture = f"attention-{network.name}.png"
    title = f"{network.name}: attention of block {block} of {depth}, mean over heads"
    draw_attention(config.out / picture, keys, pixels, patch_maps(rows), title)
    on_patches = rows[:, :, 2:].sum(dim=2).tolist()
    return [
        {
            "run": network.name,
            "key": key,
            "picture": picture,
            "block": block,
            "on_patches": {"class_token": a, "distillation_token": b},
        }
        for key, (a, b) in zip(keys, on_patches, strict=True)
    ]


def _first(images: Images, count: int, student: Student, running: Running) -> tuple[tuple[str, ...], Tensor]:
    """Return keys and pixels of the first images."""
    keys: tuple[str, ...] = ()
    pixels: list[Tensor] = []
    with contextlib.closing(images.batches(student, running)) as batches:  # pyright: ignore[reportArgumentType]
        for seen in batches:
            keys, pixels = keys + seen.keys, [*pixels, seen.pixels]
            if len(keys) >= count:
                break
    return keys[:count], torch.cat(pixels)[:count]


def analysis_text(result: Mapping[str, Any]) -> str:
    """Return the result of `analyse` as readable tables."""
    parts = [_token_table([run for run in result["runs"] if run["tokens"]])]
    parts += [f"{run['name']} has {run['no_tokens']}" for run in result["runs"] if not run["tokens"]]
    parts += [line for run in result["runs"] if run["tokens"] for line in _along(run)]
    if result["disagreement"]:
        parts.append(_matrix(result["disagreement"]))
    pictures = dict.fromkeys(drawn["picture"] for drawn in result["attention"])
    parts += [f"attention maps: {', '.join(pictures)}"] if pictures else []
    return "\n".join(part for part in parts if part)


def _token_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the cosines of both tokens: a line for each place, a column for each run."""
    if not runs:
        return ""
    tokens = [run["tokens"] for run in runs]
    rows = [["", *(run["name"] for run in runs)]]
    rows += [
        [f"{place} tokens" if place == "learned" else place, *(_number(each["cosine"][place]) for each in tokens)]
        for place in ("learned", "input")
    ]
    blocks = [
        list(zip(each["cosine"]["blocks"], each["std"]["blocks"], strict=True)) if each["std"] else []
        for each in tokens
    ]
    rows += [
        [f"block {number}", *(_spread(*(each or (None, None))) for each in line)]
        for number, line in enumerate(itertools.zip_longest(*blocks), 1)
    ]
    if any(each["std"] for each in tokens):
        rows.append(["output", *(_spread(each["cosine"]["output"], each["std"]["output"]) for each in tokens)])
        rows.append(["CKA of outputs", *(_number(each["cka"]) for each in tokens)])
    over = f", {tokens[0]['images']:,} images: mean ± standard deviation" if tokens[0]["images"] else ""
    return f"cosine of class token and distillation token{over}\n{aligned(rows)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(mean: float | None, deviation: float | None) -> str:
    return "-" if mean is None or deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _along(run: Mapping[str, Any]) -> list[str]:
    """Return a line on the course of the training: the first and the last probe."""
    lines = run["tokens"]["along_training"]
    if not lines:
        return []
    shown = [f"{_number(line['output'])} after {line['update']:,} updates" for line in (lines[0], lines[-1])]
    return [f"{run['name']}, cosine of the outputs along the training: {', '.join(dict.fromkeys(shown))}"]


def _matrix(found: Mapping[str, Any]) -> str:
    """Return the shares of different answers as a table whose columns have the numbers of its lines."""
    title = f"share of {found['images']:,} images of {found['data']} that two classifiers answer differently"
    numbered = [f"{number} {name}" for number, name in enumerate(found["names"], 1)]
    rows = [["", *map(str, range(1, len(numbered) + 1))]]
    rows += [[name, *map(_number, shares)] for name, shares in zip(numbered, found["share"], strict=True)]
    return f"{title}\n{aligned(rows)}"
