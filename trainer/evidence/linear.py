"""A linear classifier of both tokens concatenated: the answer `concat_linear`, fitted in one pass over labelled images.

A student's two heads are together one linear function of the concatenated tokens z: their mean M(z) = (W1 z1 + W2 z2 + b1 + b2) / 2.
The fit starts there. R(z) is the ridge regression of what M leaves, one-hot label minus softmax(M), on z, and the classifier is
a M(z) + b R(z), with a and b of the lowest log loss on rows that the regression has not seen. So this is one Newton-like
step of softmax regression, in closed form, and its softmax is calibrated. Heads of zeros give the ridge regression of one-hot labels.

On the tokens of a small student of CIFAR-10, the ridge regression of one-hot labels had 45.2 %, the best of scikit-learn's softmax
regressions 45.9 %, and this classifier 45.0 to 46.0 % (45.5 on average over six choices of the held-out rows); the log losses
were 1.59, 1.52 and 1.53. The mean of both heads had 42.6 %.

The file `concat_linear.safetensors` has the tensors `weight`, float32 [C, 2D], and `bias`, float32 [C]. Its metadata are those of
`trainer.checkpoint.pack_state`: what `Linear.facts` lists, and a SHA-256 of everything.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, UsageError
from pipeline.images.source import Source
from pipeline.machine.ranks import double_on
from pipeline.storage.place import File
from pipeline.text import count
from pipeline.views.draws import stream_of
from trainer.checkpoint import on_cpu, pack_state, tensors_sha256, unpack_state
from trainer.evaluate import answers_of, centre_crops, centre_recipe, labelled_places
from trainer.parallel import Running
from trainer.student import Student

log = logging.getLogger("deit_cli.evaluate")

FILE_NAME = "concat_linear.safetensors"
KIND, VERSION = "concat_linear", 1
LEAST_IMAGES = 10  # one is held out
MOST_ROWS = 20_000  # of held-out tokens in memory; a tenth of the images if that is less
MOST_LOGITS = 2 * 10**7  # of held-out rows; with 21,841 classes 20,000 rows would take 2 GB, several times
FEWEST_ROWS = 2_000  # unless a tenth of the images is less
RIDGES = tuple(10.0**power for power in range(-7, 3))  # times the mean eigenvalue of the tokens' scatter
_MAX_BYTES = 1 << 30
_FIX = "Fit it again with --fit-data"


@dataclass(frozen=True)
class Linear:
    """A linear classifier of concatenated tokens.

    Attributes:
        weight: float32 [C, 2D], the class token's part first.
        bias: float32 [C].
        facts: JSON values: kind, version, student_sha256 (of the weights), ridge, heads (a), step (b), images, held_out (rows),
            top1 (percent) and log_loss (nats) of the held-out rows before the last solve, location and source_id of the images,
            img_size, crop_pct.
    """

    weight: Tensor
    bias: Tensor
    facts: dict[str, Any]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return calibrated logits, float32 [B, C], of concatenated tokens, float32 [B, 2D]."""
        with torch.autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(tokens, self.weight, self.bias)

    def to(self, device: torch.device) -> "Linear":
        """Return the classifier on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))


def concatenated(class_token: Tensor, distill_token: Tensor) -> Tensor:
    """Return the features of the classifier, float32 [B, 2D]."""
    return torch.cat([class_token, distill_token], dim=1).float()


def check_two_tokens(student: Student) -> None:
    """Raise UsageError for a student that does not have two tokens with a linear head each."""
    name = student.model.pretrained_cfg.get("architecture")
    if not student.has_distillation_head:
        raise UsageError(
            f"concat_linear reads two tokens, one for each head; {name} has one head",
            fix="Leave out --fit-data, --fit-labels and --concat-linear",
        )
    heads = (student.model.head, student.model.head_dist)
    if not student.has_two_tokens or not all(isinstance(head, nn.Linear) for head in heads):
        raise UsageError(
            f"concat_linear reads two tokens, one for each head; both heads of {name} read the same pooled features",
            fix="Leave out --fit-data, --fit-labels and --concat-linear",
        )


# --- the fit ----------------------------------------------------------------------------------------------------------


class Sums:
    """Sums over rows from which every ridge regression follows; their size does not depend on the number of rows.

    Attributes:
        gram: float64 [P+1, P+1], sum of x x^T with x = (features, 1).
        cross: float64 [P+1, C], sum of x t^T for the targets t.
    """

    def __init__(self, features: int, targets: int, device: torch.device | None = None) -> None:
        self.gram = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features + 1, targets, dtype=torch.float64, device=device)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows: features float [B, P], targets float [B, C]."""
        rows = nn.functional.pad(features.double(), (0, 1), value=1.0)
        self.gram += rows.T @ rows
        self.cross += rows.T @ targets.double()


def ridge_regressions(sums: Sums, factors: Sequence[float]) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Solve a ridge regression with an intercept, which is not penalised, for each ridge; one eigendecomposition serves all.

    Args:
        sums: sums over at least one row.
        factors: ridges, as multiples of the mean eigenvalue of the centred features' scatter matrix.

    Yields:
        the ridge itself; float64 weight [C, P] and bias [C].
    """
    count, width = sums.gram[-1, -1], len(sums.gram) - 1
    mean, target = sums.gram[-1, :-1] / count, sums.cross[-1] / count
    values, vectors = torch.linalg.eigh(sums.gram[:-1, :-1] - count * torch.outer(mean, mean))
    values = values.clamp(min=0)
    rotated = vectors.T @ (sums.cross[:-1] - count * torch.outer(mean, target))
    unit = max(float(values.sum()) / width, 1e-12)  # above zero if all rows are the same, too
    for factor in factors:
        weight = (vectors @ (rotated / (values + factor * unit)[:, None])).T
        yield factor * unit, weight, target - weight @ mean


def best_scales(parts: Sequence[Tensor], class_label: Tensor) -> tuple[list[float], float]:
    """Return the coefficients of a sum of logits with the lowest log loss, and this mean log loss in nats.

    The function is convex in the coefficients. A weak prior (standard deviation 10, for logits of standard deviation 1) keeps
    them finite where every row is right. Logits that are all the same number say nothing, and get the coefficient 0.

    Args:
        parts: logits, float32 [N, C] each.
        class_label: int64 [N].
    """
    stds = [
        std if (std := float(part.std(correction=0))) > 1e-6 * float(part.abs().max()) else math.inf for part in parts
    ]
    at = torch.ones(len(parts), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([at], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")
    losses: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.stack([c / std * part for c, std, part in zip(at, stds, parts, strict=True)]).sum(0)
        losses.append(nn.functional.cross_entropy(logits, class_label))
        total = losses[-1] + at.square().sum().to(logits) / (200 * len(class_label))
        total.backward()
        return total

    optimizer.step(closure)
    closure()
    return [c / std for c, std in zip(at.tolist(), stds, strict=True)], float(losses[-1].detach())


@dataclass(frozen=True)
class _Choice:
    """A ridge as a multiple of the mean eigenvalue, the two coefficients that go with it, and what held-out rows say of them."""

    factor: float
    scales: list[float]
    right: int
    log_loss: float


def _choose(sums: Sums, rows: Tensor, class_label: Tensor, mean_of_heads: Callable[[Tensor], Tensor]) -> _Choice:
    """Return the best ridge for held-out rows.

    Among the ridges whose top-1 is within one standard error of the best, that of the lowest log loss is chosen: with few rows
    the best top-1 is mostly luck.
    """
    start, found = mean_of_heads(rows), []
    for factor, (_, weight, bias) in zip(RIDGES, ridge_regressions(sums, RIDGES), strict=True):
        step = rows @ weight.T.float() + bias.float()
        scales, log_loss = best_scales([start, step], class_label)
        logits = scales[0] * start + scales[1] * step
        found.append(_Choice(factor, scales, int((logits.argmax(1) == class_label).sum()), log_loss))
    most = max(each.right for each in found)
    error = math.sqrt(most * (len(rows) - most) / len(rows))
    return min((each for each in found if each.right >= most - error), key=lambda each: each.log_loss)


def _held_out(keys: Sequence[str], num_classes: int) -> Tensor:
    """Return which samples are held out, bool [N]: those of the lowest random number, which depends on the key alone."""
    number = min(len(keys) // 10, MOST_ROWS, max(FEWEST_ROWS, MOST_LOGITS // num_classes))
    draws = torch.tensor([stream_of("concat_linear", key).uniform() for key in keys], dtype=torch.float64)
    mask = torch.zeros(len(keys), dtype=torch.bool)
    mask[draws.argsort(stable=True)[:number]] = True
    return mask


def fit_linear(
    student: Student,
    source: Source,
    running: Running,
    *,
    crop_pct: float | None = None,
    places: Sequence[tuple[int, int]] | None = None,
) -> Linear:
    """Fit the classifier in one pass over centre crops of labelled images.

    Args:
        student: model with two tokens, which is not changed.
        source: labelled images.
        running: settings for running the student, in one process.
        crop_pct: as in `evaluate`.
        places: shard and row of each image to use; None: all that have a class label.

    Raises:
        UsageError: the student has no two tokens, or the images do not fit it or are too few.
        CheckpointError: a token is NaN or infinite.
    """
    check_two_tokens(student)
    places = labelled_places(source, student, why="fit concat_linear on") if places is None else places
    _check_images(student, source, places)
    log.info("fitting concat_linear on %s images of %s", f"{len(places):,}", source.location)
    where = double_on(running.device)
    start = tuple(each.to(where) for each in _heads_as_one(student))

    def mean_of_heads(tokens: Tensor) -> Tensor:
        return nn.functional.linear(tokens, *start)

    keys = [source.shards[shard].keys[row] for shard, row in places]
    batches = _tokens(student, centre_crops(student, source, places, running, crop_pct=crop_pct), running)
    sums = Sums(start[0].shape[1], student.num_classes, where)
    rows, labels = _add_all_but(_held_out(keys, student.num_classes), sums, batches, mean_of_heads)
    choice = _choose(sums, rows, labels, mean_of_heads)
    sums.add(rows, _residual(mean_of_heads(rows), labels))
    ((ridge, weight, bias),) = ridge_regressions(sums, [choice.factor])
    heads, step = choice.scales
    return Linear(
        weight=(heads * start[0].double() + step * weight).float().cpu(),
        bias=(heads * start[1].double() + step * bias).float().cpu(),
        facts={
            "kind": KIND,
            "version": VERSION,
            "student_sha256": student_sha256(student),
            "ridge": ridge,
            "heads": heads,
            "step": step,
            "images": len(places),
            "held_out": len(rows),
            "top1": 100 * choice.right / len(rows),
            "log_loss": choice.log_loss,
            "location": source.location,
            "source_id": source.source_id,
            "img_size": student.img_size,
            "crop_pct": centre_recipe(student, crop_pct).crop_pct,
        },
    )


def _tokens(
    student: Student, crops: Iterable[tuple[Tensor, Tensor]], running: Running
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield concatenated tokens, float32 [B, 2D], and class labels, int64 [B], of batches of images, where sums in float64 are kept."""
    for images, class_label in crops:
        tokens = answers_of(student, images, running, _finite_tokens)["tokens"].to(double_on(running.device))
        yield tokens, class_label.to(tokens.device)


def _add_all_but(
    held_out: Tensor,
    sums: Sums,
    batches: Iterable[tuple[Tensor, Tensor]],
    mean_of_heads: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Add all rows but the held-out ones (bool [N]) to the sums; return the tokens and class labels of the held-out ones."""
    rows, labels, at = [], [], 0
    for tokens, label in batches:
        out = held_out[at : at + len(tokens)].to(tokens.device)
        at += len(tokens)
        sums.add(tokens[~out], _residual(mean_of_heads(tokens[~out]), label[~out]))
        rows.append(tokens[out])
        labels.append(label[out])
    return torch.cat(rows), torch.cat(labels)


def _check_images(student: Student, source: Source, places: Sequence[tuple[int, int]]) -> None:
    """Raise UsageError if there are too few images; warn if some class has none."""
    if len(places) < LEAST_IMAGES:
        raise UsageError(
            f"concat_linear needs at least {LEAST_IMAGES} images with class labels to fit on,"
            f" {source.location} has {len(places)}"
        )
    present = {source.shards[shard].class_labels[row] for shard, row in places}
    if lacking := student.num_classes - len(present):
        without = count(lacking, "class", "es")
        log.warning("%s has no image of %s, which concat_linear will hardly answer", source.location, without)


def _heads_as_one(student: Student) -> tuple[Tensor, Tensor]:
    """Return weight, float32 [C, 2D], and bias, float32 [C], with which one linear layer gives the mean of both heads' logits."""
    first, second = student.model.head, student.model.head_dist
    weight = torch.cat([first.weight, second.weight], dim=1).detach().float() / 2
    biases = [head.bias for head in (first, second) if head.bias is not None]
    bias = torch.stack([*biases, torch.zeros_like(weight[:, 0])]).detach().float().sum(0) / 2
    return weight, bias


def _residual(logits: Tensor, class_label: Tensor) -> Tensor:
    """Return one-hot labels minus the softmax of logits, float32 [B, C]."""
    residual = -logits.softmax(dim=1)
    residual[torch.arange(len(class_label), device=logits.device), class_label] += 1
    return residual


def _finite_tokens(student: Student, images: Tensor) -> dict[str, Tensor]:
    """Return both tokens of normalised images, concatenated; raise CheckpointError if one is NaN or infinite."""
    tokens = concatenated(*student.tokens(images))
    if not torch.isfinite(tokens).all():
        raise CheckpointError(
            "the student's tokens are NaN or infinite for some images",
            fix="Try --amp-dtype float32, or another checkpoint",
        )
    return {"tokens": tokens}


# --- the file ---------------------------------------------------------------------------------------------------------


def student_sha256(student: Student) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of the student's weights."""
    return tensors_sha256(on_cpu(student.model.state_dict()))


def save_linear(linear: Linear, file: File) -> None:
    """Write a classifier, replacing an older one; readers see one or the other."""
    file.put(pack_state({"weight": linear.weight, "bias": linear.bias}, linear.facts), replace=True)


def load_linear(file: File, student: Student) -> Linear | None:
    """Read and check the classifier of a student; None if there is no file.

    Raises:
        CheckpointError: the file is damaged, or belongs to another student.
        StorageError: the file cannot be read.
    """
    data = file.read(max_bytes=_MAX_BYTES)
    if data is None:
        return None
    tensors, facts = unpack_state(data, file, what="linear classifier", fix=_FIX)
    if not isinstance(facts, dict) or (facts.get("kind"), facts.get("version")) != (KIND, VERSION):
        raise CheckpointError(f"{file}: this is not a linear classifier of version {VERSION}", fix=_FIX)
    if facts.get("student_sha256") != student_sha256(student):
        raise OtherStudent(f"{file} belongs to other weights than this student's, so it is not used", fix=_FIX)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    classes, width = student.num_classes, 2 * student.model.head.in_features
    if shapes != {"weight": (torch.float32, (classes, width)), "bias": (torch.float32, (classes,))}:
        raise CheckpointError(f"{file}: its tensors must be weight [{classes}, {width}] and bias [{classes}]", fix=_FIX)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise CheckpointError(f"{file}: a weight is NaN or infinite", fix=_FIX)
    return Linear(tensors["weight"], tensors["bias"], facts)


class OtherStudent(CheckpointError):
    """A linear classifier that was fitted to other weights than those of the student."""
