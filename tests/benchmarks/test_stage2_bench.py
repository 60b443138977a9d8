"""`bench stage2`: a real label set and a tiny student; nothing here depends on how fast they are."""

import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.builders import keys_decoded, make_labels, small_recipe, write_tars

import cli
from pipeline.errors import BadImageError, DeitCliError, LabelSetMismatch
from pipeline.pixels import kernel
from pipeline.pixels.handover import UnrenderedViews
from trainer import bench
from trainer.bench import LoopRate, StreamParts, TrainingBench, bench_training
from trainer.config import TrainConfig

TINY = {"model": "deit-ti", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "batch_size": 12}
OPTIONS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
PARTS = ["read", "decode", "render", "plan and mix", "labels"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 15), unlabelled=5)


@pytest.fixture(scope="module")
def labels(data, tmp_path_factory) -> Path:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, topk=2).folder


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made, so that a test can see that nothing was left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.commands, ["bench", "stage2", *OPTIONS, "--seconds", "0.1", *arguments])
    if isinstance(result.exception, DeitCliError):
        return result.exception.exit_code, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_names_every_part_and_what_would_help(labels, temporary, monkeypatch):
    monkeypatch.chdir(temporary.parent)
    code, output = invoke("--labels", str(labels), "-j", "0")
    assert code == 0, output
    lines = output.splitlines()
    assert [line[:17].strip() for line in lines[1:7]] == [*PARTS, "student"]
    assert lines[5].endswith("% of a step")
    assert "read and decode are shared by the 3 views of an image" in lines
    assert [line[:18].strip() for line in lines[8:11]] == ["student alone", "stream alone", "together, measured"]
    assert "for an update of 12 views" in lines[8]
    assert lines[11].startswith("student and stream take turns in one process: ")
    assert "epochs of" not in output  # what a run says of itself
    assert [path.name for path in temporary.parent.iterdir()] == ["temporary"]
    assert not list(temporary.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "loaders", "repeats"),
    [
        (("-j", "1"), 1, 3),
        (("-j", "2", "--repeated-aug", "1", "--grad-accum-steps", "2"), 2, 1),
    ],
)
def test_loader_processes_are_measured_as_json(labels, temporary, asked, loaders, repeats):
    code, output = invoke("--labels", str(labels), *asked, "--json")
    assert code == 0, output
    found = json.loads(output)
    assert (found["loaders"], found["views_per_decode"]) == (loaders, repeats)
    assert found["views_per_update"] == 12 * (2 if "--grad-accum-steps" in asked else 1)
    for name in ("student", "stream", "reachable", "label_share"):
        assert 0 < found[name] < math.inf, name
    for name, seconds in found["parts"].items():
        assert seconds is None if name == "copy_s" else 0 < seconds < 1, name
    assert found["together"]["updates"] >= 1
    assert 0 <= found["together"]["data_wait"] <= 1
    assert found["reachable"] == min(found["student"], found["stream"])
    assert not [path for path in temporary.iterdir() if not path.name.startswith("pymp-")]  # Python's, until it ends


def test_class_labels_alone_have_no_labels_to_read(data, temporary):
    code, output = invoke("--data", data, "--distillation-type", "none", "-j", "0", "--set", "img_size=16", "--json")
    assert code == 0, output
    found = json.loads(output)
    assert (found["parts"]["labels_s"], found["label_share"]) == (None, None)


WRONG = [
    # what was passed, exit code, what a user reads
    ([], 2, "--distillation-type hard needs --labels"),
    (["--distillation-type", "none"], 2, "--distillation-type none needs --data"),
    (["--labels", "nowhere"], 1, "is not a label set"),
    (["--labels", "{labels}", "--data", "nowhere"], 1, "does not exist"),
    (["--labels", "{labels}", "--img-size", "32"], 2, "--img-size must be the size of the views, 16, got 32"),
    (["--labels", "{labels}", "--batch-size", "1"], 2, "--batch-size must be at least 6"),
    (["--labels", "{labels}", "--seconds", "0"], 2, "--seconds must be in 0.1..600, got 0.0"),
    (["--labels", "{labels}", "--device", "cuda:7"], 2, "--device 'cuda:7' cannot be used"),
    (["--labels", "{labels}", "--model", "deit-xl"], 2, "the student must be a timm model"),
    (["--labels", "{labels}", "--recipe", "none"], 1, "was made with another recipe"),
    (["--labels", "{labels}", "--output", "run"], 2, "No such option"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), WRONG, ids=range(len(WRONG)))
def test_what_a_user_gets_wrong_is_one_clear_line(labels, temporary, arguments, code, text):
    found, output = invoke(*(argument.format(labels=labels) for argument in arguments))
    assert (found, text in output) == (code, True), output
    assert not list(temporary.iterdir())


def test_the_file_of_a_run_serves(labels, tmp_path):
    """Settings that say nothing of speed are passed over."""
    path = tmp_path / "run.yaml"
    path.write_text(f"labels: {labels}\nepochs: 7\nmodel: deit-s\nlr: 0.1\noutput: somewhere\n")
    context = cli.bench.commands["stage2"].make_context("stage2", ["-c", str(path)])
    assert context.params["model"] == "deit-s"
    assert "epochs" not in context.params


# --- what is measured -----------------------------------------------------------------------------------------


def config(labels: Path, **changes) -> TrainConfig:
    return TrainConfig(**({"labels": labels, "workers": 0, "output": Path("nowhere")} | TINY | changes))


def test_a_run_that_would_end_soon_evaluate_and_save_does_none_of_it(labels, data, temporary, monkeypatch):
    """One epoch, each view once, a checkpoint every update: none of it is what the loop is measured with."""
    saved = []
    monkeypatch.setattr("trainer.loop.save_state", lambda *arguments: saved.append(arguments))
    monkeypatch.setattr("trainer.loop.evaluate", lambda *arguments, **_: saved.append(arguments))
    asked = config(labels, epochs=1, view_policy="once", recovery_interval=1, eval_data=data)
    found = bench_training(asked, seconds=0.1)
    assert found.together.updates > 3  # an epoch has three
    assert saved == []
    assert not Path("nowhere").exists()


def test_updates_of_the_student_alone_are_those_of_the_loop(labels):
    """From the same batch the same weights: the loop's first update and the one that is timed."""
    states = []
    for alone in (True, False):
        with bench.opened_run(config(labels, grad_accum_steps=2)) as run:
            batches = bench.batches_in_memory(run) if alone else next(iter(run._updates(1)))[1]
            bench.update_on(run, batches)()
            states.append({name: value.clone() for name, value in run.state.student.state_dict().items()})
            assert [len(batch.keys) for batch in batches] == [12, 12]
    for name, value in states[0].items():
        assert value.equal(states[1][name]), name


def test_choosing_views_and_finding_labels_is_timed_without_decoding_and_rendering(labels, monkeypatch):
    decoded = keys_decoded(monkeypatch)
    with bench.opened_run(config(labels)) as run:
        decoded.clear()  # the replay probes
        plan_s, find_s = bench._planning_s(run, 0.01)
    assert min(plan_s, find_s) > 0
    assert decoded == []


def test_views_that_a_gpu_renders_are_measured_as_such(labels, monkeypatch):
    """The loader processes only hand them over; the CPU plays the GPU."""
    monkeypatch.setattr("trainer.loop.renders_on_gpu", lambda *_: True)
    rendered_here, handed_over = [], []
    real, add = kernel.render_views, UnrenderedViews.add
    monkeypatch.setattr(
        kernel, "render_views", lambda *args, **options: rendered_here.append(args) or real(*args, **options)
    )
    monkeypatch.setattr(UnrenderedViews, "add", lambda batch, *args: handed_over.append(args) or add(batch, *args))
    with bench.opened_run(config(labels)) as run:
        rendered_here.clear()  # the replay probes
        for measure in (
            lambda: bench.measure_parts(run, least_s=0.02),
            lambda: bench.measure_stream(run, seconds=0.02),
            lambda: bench.measure_loop(run, seconds=0.02),
        ):
            handed_over.clear()
            measure()
            assert handed_over
        assert rendered_here == []
    found = bench_training(config(labels), seconds=0.02)
    assert found.on_gpu
    assert found.stream > 0


def test_the_loop_can_be_measured_again_and_its_messages_come_back(labels):
    log = logging.getLogger("deit_cli.train")
    before = log.level
    with bench.opened_run(config(labels)) as run:
        first, second = (bench.measure_loop(run, seconds=0.05) for _ in range(2))
        assert run.state.next_update > first.updates
    assert second.updates >= 1
    assert log.level == before


def test_the_rate_of_the_loop_is_its_images_over_its_time_without_the_start(tmp_path):
    data = write_tars(tmp_path / "data", (24,))  # every image has a partner, every update twelve views
    whole = make_labels(tmp_path / "set", data).folder
    with bench.opened_run(config(whole)) as run:
        found = bench.measure_loop(run, seconds=0.05)
        assert found.images_per_s * found.elapsed_s == pytest.approx(12 * found.updates)
        assert found.elapsed_s > 0.05
        assert run.state.next_update == found.updates + 1  # the first one does not count


def test_an_image_that_cannot_be_decoded_stops_a_measurement_as_it_stops_a_run(tmp_path):
    data = write_tars(tmp_path / "data", (24,), bad=(3,))
    asked = TrainConfig(**(TINY | {"data": data, "distillation_type": "none", "workers": 0, "batch_size": 24}))
    with pytest.raises(BadImageError, match="image 'img-0003'"):
        bench_training(asked, small_recipe(), seconds=0.1)


def test_labels_of_another_source_are_refused(labels, tmp_path):
    other = write_tars(tmp_path / "other", (24, 16))
    with pytest.raises(LabelSetMismatch, match="Pass the --data that was labelled"):
        bench_training(config(labels, data=other), seconds=0.1)


# --- what follows from it -------------------------------------------------------------------------------------

FOUND = TrainingBench(
    model="deit-s",
    device="cuda",
    threads=None,
    cores=16,
    loaders=15,
    views_per_update=1024,
    views_per_decode=3,
    on_gpu=False,
    student=2500.0,
    stream=12000.0,
    parts=StreamParts(read_s=1e-5, decode_s=4e-4, render_s=6e-4, plan_s=1e-5, labels_s=3e-5, copy_s=2e-5),
    together=LoopRate(images_per_s=2450.0, data_wait=0.01, updates=24, elapsed_s=10.0),
)


@pytest.mark.parametrize(
    ("changes", "reachable", "enough", "verdict"),
    [
        ({}, 2500, 4, "the student is the limit: the stream could feed 4.80 times as much; 4 loader processes would be enough"),
        ({"loaders": 1, "stream": 800.0}, 800, 4, "the stream is the limit: the student could take 3.12 times as much; 4 loader processes would be enough"),
        # more than the machine has
        ({"cores": 2, "loaders": 1, "stream": 800.0}, 800, 4, "4 loader processes would be enough; this machine has 2 cores"),
        ({"loaders": 2, "stream": 5000.0}, 2500, 1, "could feed 2.00 times as much; 1 loader process would be enough"),
        ({"loaders": 0, "stream": 2500.0}, 1250, 1, "student and stream take turns in one process: 1 loader process would be enough (--workers) to keep the student busy"),
    ],
)  # fmt: skip
def test_the_limit_and_what_would_be_enough(changes, reachable, enough, verdict):
    found = replace(FOUND, **changes)
    assert found.reachable == pytest.approx(reachable)
    assert found.loaders_enough == enough
    assert verdict in found.table()


def test_the_table_of_a_gpu():
    assert FOUND.table().splitlines() == [
        "                    us a view     views/s  on",
        "read                     10.0   100,000.0  one core",
        "decode                  400.0     2,500.0  one core",
        "render                  600.0     1,666.7  one core",
        "plan and mix             10.0   100,000.0  one core",
        "labels                   30.0    33,333.3  one core, 0.5 % of a step",
        "copy                     20.0    50,000.0  to cuda, while it computes",
        "student                 400.0     2,500.0  cuda",
        "read and decode are shared by the 3 views of an image",
        "student alone                     2,500.0  cuda, 409.6 ms for an update of 1,024 views",
        "stream alone                     12,000.0  15 loader processes",
        "together, measured                2,450.0  98 % of the slower of these, waiting for data 1 % of the time",
        "the student is the limit: the stream could feed 4.80 times as much; 4 loader processes would be enough",
    ]
    lines = replace(FOUND, on_gpu=True).table().splitlines()
    assert lines[3] == "hand over               600.0     1,666.7  one core"
    assert lines[6] == "copy and render          20.0    50,000.0  on cuda, while it computes"
    slow = replace(FOUND, together=replace(FOUND.together, images_per_s=900.0))
    assert slow.table().endswith("Try longer --seconds")


def test_plain_values_hold_what_follows():
    found = FOUND.to_dict()
    assert found["parts"] == asdict(FOUND.parts)
    assert (found["limit"], found["reachable"], found["loaders_enough"]) == ("student", 2500.0, 4)
    assert found["label_share"] == pytest.approx(3e-5 * 2500 / 15)
    assert json.loads(json.dumps(found)) == found
