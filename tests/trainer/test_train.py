"""Stage 2: the loop, its checkpoints and its refusals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from support.builders import CLASSES, before_update, files_of, interrupt, make_labels, small_recipe, write_tars
from support.training import TINY, assert_same_state, state_of

from pipeline.errors import (
    CheckpointError,
    LabelSetIncomplete,
    LabelSetMismatch,
    StoppedError,
    StorageError,
    TrainingError,
    UsageError,
)
from pipeline.labels.labelset import LabelSet
from pipeline.machine.ranks import Rank
from pipeline.storage.json import pretty_json
from trainer.checkpoint import load_state
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.parallel import device_of
from trainer.student import open_student


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16), unlabelled=5)


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, topk=2)


def config(label_set: LabelSet | None, output: Path, **changes) -> TrainConfig:
    values = {
        "output": output,
        "batch_size": 12,
        "epochs": 3,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "workers": 0,
        "log_interval": 1,
    }
    return TrainConfig(**(values | TINY | ({"labels": label_set.folder} if label_set else {}) | changes))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_falls(label_set, tmp_path, kind):
    train(config(label_set, tmp_path / "run", distillation_type=kind, epochs=30, drop_path=0.0, lr=3e-3))
    losses = [line["distill_loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_the_same_command_gives_the_same_run_to_the_bit(label_set, tmp_path):
    for name, workers in (("a", 0), ("b", 0), ("c", 1)):
        train(config(label_set, tmp_path / name, workers=workers))
    assert_same_state(tmp_path / "a", tmp_path / "b")
    assert_same_state(tmp_path / "a", tmp_path / "c")
    assert files_of(tmp_path / "a" / "last") == files_of(tmp_path / "c" / "last")


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one_at_any_step(label_set, tmp_path, stop_after):
    settings = {"recovery_interval": 1, "repeated_aug": 1, "drop_path": 0.2, "clip_grad": 1.0}
    train(config(label_set, tmp_path / "whole", **settings))
    with before_update(stop_after, interrupt), pytest.raises(KeyboardInterrupt):
        train(config(label_set, tmp_path / "cut", **settings))
    train(config(label_set, tmp_path / "cut", resume="auto", **settings))
    assert_same_state(tmp_path / "whole", tmp_path / "cut")

    def comparable(folder):
        drop = {"images_per_s", "data_wait"}
        return [{k: v for k, v in line.items() if k not in drop} for line in read_metrics(folder)]

    assert comparable(tmp_path / "whole") == comparable(tmp_path / "cut")


def test_gradient_accumulation_is_the_larger_batch(label_set, tmp_path):
    """Two batches of half the size, accumulated, move the weights as one batch of the full size does."""
    settings = {"drop_path": 0.0, "epochs": 2, "repeated_aug": 1, "model_ema": False, "warmup_epochs": 0}
    train(config(label_set, tmp_path / "one", batch_size=20, **settings))
    train(config(label_set, tmp_path / "two", batch_size=10, grad_accum_steps=2, **settings))
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    worst = max(float((one[name] - two[name]).abs().max()) for name in one if name.startswith("model."))
    assert worst < 2e-4  # AdamW turns rounding of tiny gradients into parts of a step of 1e-3


def test_the_ema_is_evaluated_and_exported(label_set, data, tmp_path):
    train(config(label_set, tmp_path / "run", eval_data=data, model_ema_decay=0.5))
    kinds = {line["weights"] for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"}
    assert kinds == {"student", "ema"}
    plain, averaged = (open_student(tmp_path / "run" / name) for name in ("last", "last-ema"))
    assert not torch.equal(plain.model.head.weight, averaged.model.head.weight)


def test_an_export_loads_in_timm_and_answers_alike(label_set, tmp_path):
    run = train(config(label_set, tmp_path / "run", epochs=1))
    student = open_student(run / "last").eval()
    x = torch.randn(2, 3, 16, 16)
    hub = timm.create_model(f"local-dir:{run / 'last'}", pretrained=True).eval()
    sizes = {name: TINY[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    by_name = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=16,
        num_classes=3,
        checkpoint_path=str(run / "last/model.safetensors"),
        **sizes,
    ).eval()
    heads = student(x)
    assert heads.distill_logits is not None
    mean = (heads.class_logits + heads.distill_logits) / 2
    assert torch.equal(hub(x), mean)
    assert torch.equal(by_name(x), mean)
    assert student.class_names == CLASSES


def test_a_run_starts_from_another_runs_weights(label_set, tmp_path):
    first = train(config(label_set, tmp_path / "first", epochs=1))
    train(
        config(
            label_set,
            tmp_path / "second",
            epochs=1,
            lr=0.0,
            warmup_lr=0.0,
            min_lr=0.0,
            init=first / "last/model.safetensors",
        )
    )
    assert files_of(first / "last")["model.safetensors"] == files_of(tmp_path / "second" / "last")["model.safetensors"]


def test_class_labels_alone_train_any_classifier(data, tmp_path):
    run = train(
        config(
            None,
            tmp_path / "run",
            data=data,
            distillation_type="none",
            epochs=2,
            **dict.fromkeys(TINY) | {"model": "test_resnet"},
            drop_path=0.0,
        ),
        small_recipe(),
    )
    assert open_student(run / "last").has_distillation_head is False
    assert all("distill_loss" not in line for line in read_metrics(run))


def test_a_student_without_token_learns_from_the_labels_too(label_set, tmp_path):
    train(config(label_set, tmp_path / "run", model="deit_tiny_patch16_224", epochs=1))
    assert "distill_loss" in read_metrics(tmp_path / "run")[0]


@pytest.mark.slow
def test_stage_2_runs_with_the_teachers_modules_unimportable(label_set, tmp_path):
    script = f"""
import sys
for name in ("pipeline.teacher.teacher", "pipeline.stage1.precompute", "pipeline.stage1.drafts", "pipeline.stage1.indexing"):
    sys.modules[name] = None      # importing it raises ImportError
from pathlib import Path
from trainer.config import TrainConfig
from trainer.loop import train
train(TrainConfig(labels=Path({str(label_set.folder)!r}), output=Path({str(tmp_path / "run")!r}), epochs=1, batch_size=12,
                  warmup_epochs=0, workers=0, **{TINY!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/last/model.safetensors").is_file()


def test_views_that_repeat_are_said(label_set, tmp_path, caplog):
    train(config(label_set, tmp_path / "run", epochs=4))
    assert "the labels have 3 views of each image: from epoch 3 on they repeat" in caplog.text


def test_the_config_and_what_it_came_to_are_saved(label_set, tmp_path):
    train(config(label_set, tmp_path / "run", epochs=1))
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["config"]["lr"] == 1e-3
    assert saved["labelset_id"] == label_set.plan.labelset_id
    assert saved["teacher"]["name"] == "support.builders:confident_cnn"


def test_a_run_is_never_overwritten_unasked(label_set, tmp_path):
    train(config(label_set, tmp_path / "run", epochs=1))
    with pytest.raises(UsageError, match=r"already holds a run\. Continue it with --resume"):
        train(config(label_set, tmp_path / "run", epochs=1))


def test_a_continuation_with_other_settings_is_refused_with_the_difference(label_set, tmp_path):
    train(config(label_set, tmp_path / "run", epochs=1))
    with pytest.raises(CheckpointError, match=r"other settings \(--weight-decay: 0.05, not 0.3\)"):
        train(config(label_set, tmp_path / "run", epochs=1, weight_decay=0.3, resume="auto"))


def test_another_recipe_is_refused(label_set, tmp_path):
    with pytest.raises(LabelSetMismatch, match=r"made with another recipe \(reprob: 0.25, not 0.5\)"):
        train(config(label_set, tmp_path / "run"), small_recipe(reprob=0.5))
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_size_than_the_views_is_refused(label_set, tmp_path):
    with pytest.raises(UsageError, match="--img-size must be the size of the views, 16, got 24"):
        train(config(label_set, tmp_path / "run", img_size=24))


def test_labels_of_other_images_are_refused(label_set, tmp_path):
    other = write_tars(tmp_path / "other", (24, 15), unlabelled=5)
    with pytest.raises(LabelSetMismatch, match=r"1 sample is missing: 'img-0039' of train-000001"):
        train(config(label_set, tmp_path / "run", data=other))


def test_an_unsealed_set_is_refused(data, tmp_path):
    label_set = make_labels(tmp_path / "set", data)
    opened = label_set.manifest.model_copy(update={"sealed": False})
    (label_set.folder / "manifest.json").write_bytes(pretty_json(opened.to_json()))
    with pytest.raises(LabelSetIncomplete, match="is not sealed"):
        train(config(label_set, tmp_path / "run"))


@pytest.mark.parametrize("passes", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_and_saves_its_views(label_set, tmp_path, passes):
    wild = {"lr": 1e3, "epochs": 50, "warmup_epochs": 0, "min_lr": 1e3, "smoothing": 0.0, "batch_size": 12 // passes}
    with pytest.raises(TrainingError, match=r"the loss of update \d+ is (nan|inf)"):
        train(config(label_set, tmp_path / "run", grad_accum_steps=passes, **wild))
    record = json.loads((tmp_path / "run/nonfinite-rank0.json").read_text())
    assert [len(batch["keys"]) for batch in record["batches"]] == [12 // passes] * passes
    tensors, meta = load_state(tmp_path / "run/nonfinite-rank0.safetensors")
    assert meta == record
    assert tensors["0.images"].shape == (12 // passes, 16, 16, 3)
    assert tensors["0.hard"].shape == (12 // passes,)


def test_a_state_that_is_no_number_never_replaces_a_sound_one(label_set, tmp_path, monkeypatch):
    import trainer.loop as loop

    real, calls = loop.update_weights, []

    def spoils(*args):
        calls.append(1)
        if len(calls) == 4:  # after a finite loss: the next would show it, but a checkpoint comes first
            next(args[1].student.parameters()).grad.fill_(float("nan"))
        return real(*args)

    monkeypatch.setattr(loop, "update_weights", spoils)
    with pytest.raises(TrainingError, match=r"became NaN or infinite|the loss of update 4 is nan"):
        train(config(label_set, tmp_path / "run", recovery_interval=1, repeated_aug=1))
    assert load_state(tmp_path / "run/state.safetensors")[1]["next_update"] == 3


def test_a_checkpoint_that_cannot_be_written_stops_the_run(label_set, tmp_path, monkeypatch):
    import trainer.loop as loop

    def full(*_: object) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setattr(loop, "save_state", full)
    with pytest.raises(StorageError, match="No space left"):
        train(config(label_set, tmp_path / "run"))


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ranks = [Rank(8 + local, 12, local, 4) for local in range(4)]
    assert [device_of(asked, rank) for rank in ranks] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert device_of("cuda:2", ranks[0]) == "cuda:2"
    assert device_of("cpu", ranks[3]) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("cuda", ranks[1]) == "cuda"  # which is then an error, and not a run on the CPU


def test_views_may_be_used_once_only(label_set, tmp_path, caplog):
    with pytest.raises(
        UsageError, match=r"--view-policy once allows one epoch per view: the labels have 3 views, --epochs is"
    ):
        train(config(label_set, tmp_path / "run", view_policy="once", epochs=4))
    train(config(label_set, tmp_path / "run", view_policy="once"))
    assert "repeat" not in caplog.text


def test_views_in_a_drawn_order_are_the_same_in_a_continuation(label_set, tmp_path):
    for name, resume in (("whole", "never"), ("cut", "never"), ("cut", "auto")):
        epochs = {"epochs": 6, "view_policy": "random", "repeated_aug": 1}
        if (name, resume) == ("cut", "never"):
            with (
                before_update(7, lambda: os.kill(os.getpid(), signal.SIGTERM)),
                pytest.raises(StoppedError, match=r"stopped by SIGTERM after update 8, which is saved"),
            ):
                train(config(label_set, tmp_path / name, **epochs))
        else:
            train(config(label_set, tmp_path / name, resume=resume, **epochs))
    assert_same_state(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_compiled_student_learns_what_the_plain_one_does(label_set, tmp_path):
    for compiled in (False, True):
        train(config(label_set, tmp_path / str(compiled), compile=compiled, drop_path=0.0, epochs=2, warmup_epochs=0))
    plain, fast = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("False", "True"))
    assert fast == pytest.approx(plain, abs=1e-4)
    assert load_state(tmp_path / "True/state.safetensors")[0].keys() == state_of(tmp_path / "False").keys()


def test_a_deterministic_run_uses_deterministic_algorithms_only_and_puts_everything_back(
    label_set, tmp_path, monkeypatch
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen: list[tuple[bool, bool, bool, str | None]] = []

    def state() -> tuple[bool, bool, bool, str | None]:
        exact, warn_only = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        return exact, warn_only, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    before = state()
    with before_update(0, lambda: seen.append(state())):
        train(config(label_set, tmp_path / "run", epochs=1, deterministic=True, device="cpu"))
    with before_update(0, lambda: seen.append(state())):
        train(config(label_set, tmp_path / "other", epochs=1, device="cpu"))
    assert seen == [(True, False, False, ":4096:8"), before]
    assert state() == before == (False, False, True, None)
    assert_same_state(tmp_path / "run", tmp_path / "other")  # on a CPU there is nothing to choose


def test_a_workspace_that_the_user_chose_stays(label_set, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    seen: list[str | None] = []
    with before_update(0, lambda: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))):
        train(config(label_set, tmp_path / "run", epochs=1, deterministic=True, device="cpu"))
    assert [*seen, os.environ["CUBLAS_WORKSPACE_CONFIG"]] == [":16:8"] * 2


def test_an_operation_without_a_deterministic_algorithm_is_refused_by_name(label_set, tmp_path):
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))

    with (
        before_update(0, put),
        pytest.raises(
            UsageError, match=r"--deterministic: put_ does not have .*Train without --deterministic"
        ) as caught,
    ):
        train(config(label_set, tmp_path / "run", deterministic=True, device="cpu"))
    assert "\n" not in str(caught.value)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_cublas_that_was_used_too_early_is_named_with_the_way_out(label_set, tmp_path):
    def as_torch_says() -> None:
        raise RuntimeError(
            "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or another call, but this"
            " operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior"
            " in this case, you must set an environment variable: CUBLAS_WORKSPACE_CONFIG=:4096:8"
        )

    with (
        before_update(0, as_torch_says),
        pytest.raises(UsageError, match="Set CUBLAS_WORKSPACE_CONFIG=:4096:8 before it starts"),
    ):
        train(config(label_set, tmp_path / "run", deterministic=True, device="cpu"))


def test_other_errors_of_a_deterministic_run_stay_what_they_are(label_set, tmp_path):
    def breaks() -> None:
        raise RuntimeError("a defect")

    with before_update(0, breaks), pytest.raises(RuntimeError, match="a defect"):
        train(config(label_set, tmp_path / "run", deterministic=True, device="cpu"))


def test_a_run_may_go_on_with_deterministic_algorithms(label_set, tmp_path):
    settings = {"recovery_interval": 1, "repeated_aug": 1}
    with before_update(2, interrupt), pytest.raises(KeyboardInterrupt):
        train(config(label_set, tmp_path / "run", device="cpu", **settings))
    train(config(label_set, tmp_path / "run", resume="auto", deterministic=True, device="cpu", **settings))


def test_soft_labels_from_a_hard_set_are_refused(data, tmp_path):
    label_set = make_labels(tmp_path / "set", data, topk=0)
    with pytest.raises(UsageError, match="hard"):
        train(config(label_set, tmp_path / "run", distillation_type="soft"))


BAD_SETTINGS = [
    ({"batch_size": 0}, "--batch-size must be in 1"),
    ({"distillation_alpha": 1.5}, "--distillation-alpha must be in 0..1, got 1.5"),
    ({"epochs": 2, "warmup_epochs": 3}, r"--warmup-epochs must be at most --epochs \(2\), got 3"),
    ({"labels": None}, "--distillation-type hard needs --labels"),
    ({"labels": None, "distillation_type": "none"}, "--distillation-type none needs --data"),
    ({"distillation_type": "loud"}, "--distillation-type must be one of none, soft, hard, got 'loud'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=range(len(BAD_SETTINGS)))
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**({"labels": Path("x")} | changes))
