"""Time and memory of the losses: ours against dense targets, against plain operations, and against the hard loss.

    python benchmarks/losses.py --out benchmarks/results/losses.json

All get the same logits [256, C] in float32 and the same stored labels of K = 10; values and gradients are compared before
anything is timed. The forms:

    dense      the target [B, C] is built (from top-k and spread tail, or by timm's mixup_target), then KL or cross-entropy as timm
               and DeiT compute it
    gather     log_softmax, then a gather and a sum of it, left to autograd
    logsumexp  the logits themselves are gathered and summed, less their logsumexp, left to autograd
    ours       trainer/losses.py: keeps the logits, makes one gradient
    hard       torch's cross-entropy to the teacher's argmax, for comparison

Rounds alternate between the forms. Memory is counted in arrays of [B, C] float32, beyond the logits: the peak of forward and
backward, which ends with the gradient (1), and what is kept between the two. On the CPU torch's profiler says what was
allocated, on CUDA its allocator. One thread on the CPU.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rounds import Job, machine, options, write_json
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trainer.losses import (
    ClassTarget,
    TeacherTarget,
    _tempered_teacher,
    class_loss,
    hard_distillation_loss,
    soft_distillation_loss,
)

BATCH, KEPT, SMOOTHING, LAM = 256, 10, 0.1, 0.3
Loss = Callable[[Tensor], Tensor]


# --- soft distillation ------------------------------------------------------------------------------------------


def soft_dense(logits: Tensor, target: TeacherTarget, tau: float) -> Tensor:
    spread = target.tail_mass[:, None] / (logits.shape[1] - KEPT)
    teacher = spread.expand_as(logits).scatter(1, target.topk_index, target.topk_prob) ** (1 / tau)
    teacher = teacher / teacher.sum(dim=-1, keepdim=True)
    return F.kl_div(F.log_softmax(logits / tau, dim=-1), teacher, reduction="batchmean") * tau**2


def soft_gather(logits: Tensor, target: TeacherTarget, tau: float) -> Tensor:
    num_rest = logits.shape[1] - KEPT
    prob, rest_prob = _tempered_teacher(target, tau=tau, num_rest=num_rest)
    log_prob = F.log_softmax(logits / tau, dim=-1)
    kept = log_prob.gather(1, target.topk_index)
    rest = log_prob.sum(dim=-1) - kept.sum(dim=-1)
    divergence = (torch.xlogy(prob, prob) - prob * kept).sum(dim=-1)
    divergence = divergence + num_rest * torch.xlogy(rest_prob, rest_prob) - rest_prob * rest
    return divergence.sum() * (tau**2 / len(logits))


def soft_logsumexp(logits: Tensor, target: TeacherTarget, tau: float) -> Tensor:
    num_rest = logits.shape[1] - KEPT
    prob, rest_prob = _tempered_teacher(target, tau=tau, num_rest=num_rest)
    tempered = logits if tau == 1 else logits / tau
    known = ((prob - rest_prob[:, None]) * tempered.gather(1, target.topk_index)).sum(dim=-1)
    crossed = tempered.logsumexp(dim=-1) - known - rest_prob * tempered.sum(dim=-1)
    entropy = torch.xlogy(prob, prob).sum(dim=-1) + num_rest * torch.xlogy(rest_prob, rest_prob)
    return (entropy + crossed).sum() * (tau**2 / len(logits))


def soft_ours(logits: Tensor, target: TeacherTarget, tau: float) -> Tensor:
    return soft_distillation_loss(logits, target, tau=tau, tail="spread", reduction="batchmean")


# --- class labels, mixed as timm's batch mode does and smoothed -------------------------------------------------


def class_dense(logits: Tensor, target: ClassTarget) -> Tensor:
    dense = mixup_target(target.class_label, logits.shape[1], lam=LAM, smoothing=SMOOTHING)
    return SoftTargetCrossEntropy()(logits, dense)


def class_gather(logits: Tensor, target: ClassTarget) -> Tensor:
    log_prob = F.log_softmax(logits, dim=-1)
    own = log_prob.gather(1, target.class_label[:, None])[:, 0]
    other = log_prob.gather(1, target.class_label[target.partner][:, None])[:, 0]
    mixed = target.lam * own + (1 - target.lam) * other
    return -((1 - SMOOTHING) * mixed + SMOOTHING * log_prob.mean(dim=-1)).mean()


def class_ours(logits: Tensor, target: ClassTarget) -> Tensor:
    return class_loss(logits, target, smoothing=SMOOTHING)


# --- measuring --------------------------------------------------------------------------------------------------


def cases(device: torch.device, num_classes: int, batch: int) -> tuple[Tensor, dict[str, dict[str, Loss]]]:
    """Return logits, and for each loss its forms; the first is what the others must agree with."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(batch, num_classes, generator=generator)).to(device).requires_grad_()
    top = (4 * torch.randn(batch, num_classes, generator=generator)).softmax(dim=-1).to(device).topk(KEPT, dim=-1)
    teacher = TeacherTarget(top.indices[:, 0], top.indices, top.values, 1 - top.values.sum(dim=-1))
    target = ClassTarget(
        class_label=torch.randint(num_classes, (batch,), generator=generator).to(device),
        labelled=torch.ones(batch, dtype=torch.bool, device=device),
        partner=torch.arange(batch, device=device).flip(0),
        lam=torch.full((batch,), LAM, device=device),
    )
    forms: dict[str, dict[str, Loss]] = {}
    for tau in (1.0, 3.0):
        soft = {"dense": soft_dense, "gather": soft_gather, "logsumexp": soft_logsumexp, "ours": soft_ours}
        forms[f"soft, tau {tau:g}"] = {
            name: lambda logits, form=form, tau=tau: form(logits, teacher, tau) for name, form in soft.items()
        }
    classes = {"dense": class_dense, "gather": class_gather, "ours": class_ours}
    forms["class"] = {name: lambda logits, form=form: form(logits, target) for name, form in classes.items()}
    forms["hard"] = {"hard": lambda logits: hard_distillation_loss(logits, teacher.hard)}
    return logits, forms


def compare(logits: Tensor, forms: dict[str, Loss]) -> dict[str, float]:
    """Return the largest differences from the first form in value and gradient, relative to the largest; assert them."""
    seen = {}
    for name, form in forms.items():
        loss = form(logits)
        seen[name] = loss.item(), torch.autograd.grad(loss, logits)[0]
    value, gradient = next(iter(seen.values()))
    worst = {
        "value": max(abs(each - value) / abs(value) for each, _ in seen.values()),
        "gradient": max(float((each - gradient).abs().max() / gradient.abs().max()) for _, each in seen.values()),
    }
    assert worst["value"] < 1e-5, worst
    assert worst["gradient"] < 5e-5, worst
    return worst


def timed(form: Loss, logits: Tensor, times: int) -> dict[str, float]:
    """Return milliseconds of the forward pass, and of both."""
    forward = both = 0.0
    for _ in range(times):
        marks = [now(logits)]
        loss = form(logits)
        marks.append(now(logits))
        gradient = torch.autograd.grad(loss, logits)
        marks.append(now(logits))
        forward, both = forward + marks[1] - marks[0], both + marks[2] - marks[0]
        del loss, gradient
    return {"forward_ms": 1e3 * forward / times, "both_ms": 1e3 * both / times}


def now(logits: Tensor) -> float:
    if logits.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(form: Loss, logits: Tensor) -> dict[str, float]:
    """Return the peak of forward and backward, and what is kept between them, in arrays of the logits' size."""
    unit = logits.numel() * logits.element_size()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = form(logits)
    kept.pop(logits.untyped_storage().data_ptr(), None)
    del loss
    peak = (peak_on_cuda if logits.device.type == "cuda" else peak_on_cpu)(
        lambda: torch.autograd.grad(form(logits), logits)
    )
    return {"peak": round(peak / unit, 2), "kept": round(sum(kept.values()) / unit, 2), "peak_mib": round(peak / 2**20)}


def peak_on_cuda(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = work()
    del result
    events = seen.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    used = most = 0
    for _, size in sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"):
        used += size
        most = max(most, used)
    return most


def measure(device: torch.device, num_classes: int, rounds: int, batch: int = BATCH) -> dict[str, Any]:
    logits, losses = cases(device, num_classes, batch)
    agreement = {loss: compare(logits, forms) for loss, forms in losses.items()}
    each_form = {(loss, name): form for loss, forms in losses.items() for name, form in forms.items()}
    times = max(3, 20_000 // num_classes)
    for form in each_form.values():
        timed(form, logits, 3)
    seen = [{key: timed(form, logits, times) for key, form in each_form.items()} for _ in range(rounds)]
    result: dict[str, Any] = {}
    for loss, name in each_form:
        of_round = [round_[loss, name] for round_ in seen]
        row: dict[str, Any] = {
            key: round(statistics.median(each[key] for each in of_round), 3) for key in ("forward_ms", "both_ms")
        }
        if (loss, "dense") in each_form:
            ratios = (round_[loss, "dense"]["both_ms"] / round_[loss, name]["both_ms"] for round_ in seen)
            row["times_as_fast_as_dense"] = round(statistics.median(ratios), 2)
        row |= memory(each_form[loss, name], logits)
        row["rounds"] = [{key: round(value, 4) for key, value in each.items()} for each in of_round]
        result.setdefault(loss, {})[name] = row
        print(
            device, num_classes, loss, name, {key: value for key, value in row.items() if key != "rounds"}, flush=True
        )
    return {"array_mib": round(logits.numel() * 4 / 2**20, 1), "largest_difference": agreement, "losses": result}


def on_gpu(job: Job) -> None:
    """Measure the losses of usual and large numbers of classes, and of usual and large batches."""
    sizes = ((8, 100),) if job.rehearse else ((256, 1000), (1024, 1000), (256, 21841), (1024, 21841))
    for batch, num_classes in sizes:
        found = measure(job.device, num_classes, 2 if job.rehearse else 7, batch)
        for rows in found["losses"].values():
            for row in rows.values():
                del row["rounds"]
        job.note(f"B = {batch}, C = {num_classes}", found)


def main() -> None:
    parser = options(__doc__, rounds=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    result = {
        "what": f"milliseconds and arrays of [B, C] of a loss, B = {BATCH}, K = {KEPT}, float32",
        "machine": args.machine or machine(),
        "devices": {
            device: {str(classes): measure(torch.device(device), classes, args.rounds) for classes in (1000, 21841)}
            for device in devices
        },
    }
    write_json(args.out, result)


if __name__ == "__main__":
    main()
