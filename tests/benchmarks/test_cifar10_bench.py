"""benchmarks/cifar10.py in pieces: over interruptions, machines and budgets. Only the last test trains anything."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.builders import shared_data

from pipeline.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ("alone", "soft", "hard")


@pytest.fixture(scope="module")
def cifar10() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import cifar10
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return cifar10


class World:
    """Machines whose clock moves only when they train, label or evaluate; all share one result file."""

    def __init__(self, cifar10: ModuleType, folder: Path) -> None:
        self.cifar10, self.folder, self.out = cifar10, folder, folder / "results" / "out.json"
        self.now = 0.0
        self.trained: list[str] = []
        self.fails_at: str | None = None
        for name in ("train", "test"):
            pq.write_table(pa.table({"label": [0]}), folder / f"{name}-0.parquet")

    def go(self, machine: str = "one", **changes: Any) -> list[str]:
        """Run the script on a machine, and return what it left out."""
        settings = {"budget_s": float("inf"), "seeds": 1, "arms": TRAINED} | changes
        options = {"scale": "full", "device": "cpu", "workers": None} | settings
        self.trained.clear()
        return self.cifar10.on_budget(self.folder, self.folder / machine, self.out, **options)["left_out"]

    def results(self) -> dict[str, Any]:
        return json.loads(self.out.read_bytes())

    def train(self, config: Any, recipe: Any = None) -> Path:
        """Take 60 s for a teacher and 100 s for a student; the weights tell the machine and the seed."""
        name = config.folder.name
        if name == self.fails_at:
            raise RuntimeError("the power is gone")
        self.trained.append(name)
        self.now += 60 if name == "teacher" else 100
        (config.folder / "last").mkdir(parents=True)
        (config.folder / "last" / "model.safetensors").write_text(f"{config.folder} {config.seed}")
        return config.folder

    def train_online(self, config: Any, teacher: Any, *, same: bool) -> tuple[Path, dict[str, Any]]:
        self.now += 40
        return self.train(config), {}

    def label(self, bench: Any) -> dict[str, Any]:
        self.trained.append("labels")
        self.now += 20
        return {"seconds": 20, "views": 1, "bytes": 1}

    def evaluate(self, bench: Any, run: Path) -> dict[str, float]:
        self.now += 5
        return {"class_head": 50.0 + len(self.trained)}


@pytest.fixture
def world(cifar10, tmp_path, monkeypatch) -> World:
    made = World(cifar10, tmp_path)
    monkeypatch.setattr(cifar10, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(cifar10, "train", made.train)
    monkeypatch.setattr(cifar10, "train_online", made.train_online)
    monkeypatch.setattr(cifar10, "largest_difference", lambda run, other: 0.0)
    monkeypatch.setattr(cifar10.Bench, "load_teacher", lambda bench: None)
    monkeypatch.setattr(cifar10.Bench, "label", lambda bench: made.label(bench))
    monkeypatch.setattr(cifar10.Bench, "evaluate", lambda bench, run: made.evaluate(bench, run))
    return made


# --- interruptions and machines -------------------------------------------------------------------------------


def test_the_arms_run_seed_by_seed_and_the_online_ones_last(cifar10, world):
    assert world.go(seeds=2, arms=tuple(reversed(cifar10.ARMS))) == []
    plain = ["alone", "soft", "hard", "hard_one_head", "soft_one_head", "hard_online", "soft_online"]
    of_seeds = [f"{name}-{seed}" for seed in (0, 1) for name in plain]
    assert world.trained == ["teacher", "labels", *of_seeds, "hard_online_same-0", "soft_online_same-0"]


def test_an_interrupted_run_continues_and_repeats_nothing(world):
    world.fails_at = "hard-0"
    with pytest.raises(RuntimeError):
        world.go()
    assert [run["arm"] for run in world.results()["runs"]] == ["alone", "soft"]
    world.fails_at = None
    assert world.go() == []
    assert world.trained == ["hard-0"]
    assert len(world.results()["teachers"]) == 1
    assert world.go() == []
    assert world.trained == []


def test_where_the_labels_were_interrupted_the_teacher_is_kept(world, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(world, "label", lambda bench: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            world.go()
    assert not world.out.exists()
    assert world.go() == []
    assert world.trained == ["labels", "alone-0", "soft-0", "hard-0"]


def test_another_machine_trains_its_own_teacher_and_appends(cifar10, world):
    world.go()
    assert world.go("two", seeds=2) == []
    assert world.trained == ["teacher", "labels", "alone-1", "soft-1", "hard-1"]
    found = world.results()
    one, two = found["teachers"]
    assert (one["seed"], two["seed"]) == (0, 1)
    assert one["sha256"] != two["sha256"]
    assert [run["teacher"] for run in found["runs"]] == [one["sha256"]] * 3 + [two["sha256"]] * 3
    assert {run["device"] for run in found["runs"]} == {"cpu"}
    assert found["summary"]["hard"]["seeds"] == found["summary"]["hard"]["teachers"] == 2
    lines = list(cifar10.table(found))
    assert lines[2].startswith("| teacher, resnet18 | 2 | 2 | 51.0 (51.0 to 51.0) |")
    assert lines[4].startswith("| soft labels, token | 2 | 2 | 54.0 (54.0 to 54.0) |")


def test_a_machine_where_nothing_is_left_trains_no_teacher(world):
    world.go()
    assert world.go("two") == []
    assert world.trained == []


def test_the_same_views_are_compared_only_with_a_student_of_the_same_teacher(world):
    world.go()
    assert world.go("two", arms=("hard", "hard_online_same")) == ["hard_online_same 0"]
    assert world.trained == []  # not even a teacher
    assert world.go("two", arms=("soft", "hard_online_same"), seeds=2) == ["hard_online_same 0"]
    assert world.trained == ["teacher", "labels", "soft-1"]
    assert world.go(arms=("hard_online_same",)) == []
    assert world.trained == ["hard_online_same-0"]


# --- settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("views",), 30, r"\(views: 30, not 36\)"),
        (("student", "lr"), 0.5, r"\(student\.lr: 0\.5, not 0\.001\)"),
        (("device",), "cuda", r"\(device: cuda, not cpu\)"),
    ],
)
def test_a_file_of_other_settings_is_refused_with_the_name_of_the_field(world, where, value, said):
    world.go(arms=("alone",))
    found = world.results()
    inner = found["settings"]
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    world.out.write_text(json.dumps(found))
    with pytest.raises(UsageError, match=rf"out\.json was made with other settings {said}: choose another --out"):
        world.go()
    assert json.loads(world.out.read_bytes()) == found


def test_a_teacher_of_other_settings_is_refused_too(world):
    world.go(arms=("alone",))
    note = world.folder / "one" / "full" / "teacher.json"
    note.write_text(note.read_text().replace('"epochs": 16', '"epochs": 8'))
    with pytest.raises(UsageError, match=r"teacher\.json was made with other settings \(teacher\.epochs: 8, not 16\)"):
        world.go()


@pytest.mark.parametrize(("name", "file"), [("small", "cifar10.json"), ("medium", "cifar10_medium.json")])
def test_results_of_one_machine_can_be_read_and_continued(cifar10, name, file):
    path = ROOT / "benchmarks" / "results" / file
    found = cifar10.open_results(path, {"name": name, "device": "cpu"} | cifar10.SCALES[name].settings())
    old = json.loads(path.read_bytes())
    again = cifar10.summary(found["runs"])
    assert {arm: {head: again[arm][head] for head in heads} for arm, heads in old["summary"].items()} == old["summary"]
    assert "| teacher, test_resnet | 1 | 1 | 70.1 (70.1 to 70.1) |  |  |  |" in cifar10.table(old)


# --- budgets --------------------------------------------------------------------------------------------------


def test_an_exhausted_budget_says_what_is_left(world):
    # 60 + 5 for the teacher, 20 for labels, 105 for each student: after two of them (295 s) a third may take 126 s
    left = world.go(seeds=2, budget_s=420)
    assert left == ["hard 0", "alone 1", "soft 1", "hard 1"]
    assert [run["arm"] for run in world.results()["runs"]] == ["alone", "soft"]
    assert world.results()["summary"]["soft"]["class_head"]["mean"] == 54.0
    assert world.go(budget_s=130) == []  # teacher and labels are here
    assert world.trained == ["hard-0"]


def test_a_budget_too_small_for_teacher_and_labels_does_nothing(world, capsys):
    assert world.go(budget_s=100) == ["alone 0", "soft 0", "hard 0"]
    assert "the budget of 100 s is too small: teacher, labels and one arm take 155 s" in capsys.readouterr().out
    assert world.trained == []
    assert not world.out.exists()


def test_an_arm_with_the_teacher_online_is_given_more_time_until_one_was_measured(cifar10, world):
    arms = ("alone", "soft_online", "hard_online")
    # before an online arm, 1.5 x 1.2 x 105 s must be left: 189
    assert world.go(arms=arms, budget_s=85 + 105 + 188) == ["hard_online 0", "soft_online 0"]
    assert world.go(arms=arms, budget_s=190) == ["soft_online 0"]
    assert world.trained == ["hard_online-0"]
    options = {"data": world.folder, "work": world.folder / "one", "out": world.out, "device": "cpu", "workers": None}
    bench = cifar10.Bench(name="full", **options)
    assert bench.arm_s("soft_online") == pytest.approx(1.2 * 145)
    assert bench.arm_s("alone") == pytest.approx(1.2 * 105)
    assert bench.preparation_s() == 0
    for run in bench.results["runs"]:
        run["device"] = "another card"
    assert bench.arm_s("alone") == cifar10.SCALES["full"].arm_s


def test_the_command_ends_well_when_its_budget_is_spent(cifar10, world, monkeypatch, capsys):
    command = ["cifar10.py", "--data", str(world.folder), "--out", str(world.out), "--work", str(world.folder / "one")]
    command += ["--scale", "full", "--seeds", "1", "--arms", "alone", "hard", "--budget", "200"]
    monkeypatch.setattr("sys.argv", command)
    cifar10.main()
    assert capsys.readouterr().out.splitlines()[-1] == "left for another run: hard 0"
    monkeypatch.setattr("sys.argv", ["cifar10.py", "--table", str(world.out)])
    cifar10.main()
    assert "| student alone, class labels | 1 | 1 | 53.0 (53.0 to 53.0) |" in capsys.readouterr().out


# --- real -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_trial_trains_labels_and_compares(cifar10, tmp_path):
    options = {"scale": "trial", "device": "cpu", "workers": 0, "seeds": 1, "budget_s": 600}
    arms = ("alone", "hard", "soft_online", "hard_online_same")
    out = tmp_path / "out.json"
    found = cifar10.on_budget(shared_data("cifar10"), tmp_path / "work", out, arms=arms, **options)
    assert found["left_out"] == []
    assert found["results"] == json.loads(out.read_bytes())
    runs = {run["arm"]: run for run in found["results"]["runs"]}
    assert list(runs) == list(arms)
    assert set(runs["hard"]["top1"]) == set(cifar10.HEADS)
    assert runs["hard_online_same"]["other_hard_labels"] == 0
    assert runs["hard_online_same"]["largest_weight_difference"] == 0
    assert found["results"]["teachers"][0]["labels"]["views"] == 512


@pytest.mark.slow
def test_a_rehearsal_notes_what_it_found(cifar10, tmp_path):
    from rounds import Job

    job = Job(seconds=600, work=tmp_path / "work", out=tmp_path / "out", cifar10=shared_data("cifar10"), rehearse=True)
    cifar10.on_gpu(job)
    assert [run["arm"] for run in job.found["runs"]] == ["alone", "hard"]
    assert job.found["left_out"] == []


def test_without_images_the_gpu_program_says_that_all_is_left_out(cifar10, tmp_path):
    import rounds

    job = rounds.Job(seconds=600, work=tmp_path / "work", out=tmp_path / "out", rehearse=True)
    cifar10.on_gpu(job)
    assert job.found == {"left_out": ["everything: there is no CIFAR-10"]}
