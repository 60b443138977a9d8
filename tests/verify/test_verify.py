"""`labels verify` names everything that is wrong, with what repairs it, whatever is damaged; and nothing that is right."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.label_sets import (
    CLASSES,
    coloured_png,
    files_of,
    make_label_set,
    seal_again,
    write_source,
    write_tar,
)
from support.web_server import web_server

import cli
from pipeline.errors import LabelSetError, UsageError
from pipeline.labels.comparing import check_source
from pipeline.labels.labelset import LabelSet
from pipeline.settings.configs import VerifyConfig
from pipeline.storage import remote
from pipeline.storage.json import pretty_json
from pipeline.storage.place import open_place
from pipeline.verify.report import Report
from pipeline.verify.verify import verify

SAMPLES = "samples/train-0.parquet"
FIRST = "labels/views-00000-00001/train-0.parquet"
LATER = "labels/views-00002-00003/train-0.parquet"
SECOND = "labels/views-00000-00001/train-1.parquet"
PULL = "Fetch it again with deit-cli labels pull; if you made the set, delete it and run the same deit-cli precompute again"
NO_PROBES = VerifyConfig(probes=False)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def found(report: Report) -> list[tuple[str, str]]:
    return [(problem.file, problem.rule) for problem in report.problems]


def run(*arguments: str) -> tuple[int, str, str]:
    """Return exit code, what a user reads on stdout, and the error."""
    result = CliRunner().invoke(cli.commands, ["labels", "verify", *arguments])
    return result.exit_code, result.stdout, str(result.exception or "")


def test_a_sound_set_has_no_problem_and_says_what_was_looked_at(made):
    report = verify(str(made), VerifyConfig())
    assert report.problems == report.notes == []
    assert (report.files, report.bytes) == (6, sum(p.stat().st_size for p in files_of(made) if p.suffix == ".parquet"))
    assert report.pixels == 0
    assert report.manifest_sha256 == LabelSet.open(made).manifest_sha256


def test_every_damaged_file_is_named_with_its_rule_and_what_repairs_it(copied):
    flip(copied / FIRST)
    (copied / LATER).unlink()
    (copied / SECOND).write_bytes((copied / SECOND).read_bytes()[:-1])
    flip(copied / "samples/train-1.parquet")
    report = verify(str(copied), NO_PROBES)
    assert sorted(found(report)) == sorted(
        [(FIRST, "sha256"), (LATER, "present"), (SECOND, "length"), ("samples/train-1.parquet", "sha256")]
    )
    texts = {problem.file: str(problem) for problem in report.problems}
    assert texts[FIRST].startswith(f"{copied / FIRST} has SHA-256 ")
    assert texts[FIRST].endswith(f"it is damaged. {PULL} (--views 0:2)")
    assert f"{copied / LATER} is missing, but the manifest promises it. Fetch it with" in texts[LATER]
    assert texts[LATER].endswith("run the same deit-cli precompute again (--views 2:4)")
    assert "bytes, the manifest says" in texts[SECOND]
    assert texts["samples/train-1.parquet"].endswith(PULL)


def test_a_damaged_samples_file_does_not_hide_what_is_wrong_with_its_labels(copied):
    flip(copied / SAMPLES)
    flip(copied / FIRST)
    assert found(verify(str(copied), NO_PROBES)) == [(SAMPLES, "sha256"), (FIRST, "sha256")]


def test_the_order_of_problems_is_that_of_the_manifest_for_any_number_of_threads(copied):
    for path in files_of(copied):
        if path.suffix == ".parquet":
            flip(path)
    reports = [found(verify(str(copied), dataclasses.replace(NO_PROBES, threads=threads))) for threads in (1, 2, 7)]
    assert reports[0] == reports[1] == reports[2]
    assert [file for file, _ in reports[0]] == [
        str(entry.path) for entry in LabelSet(open_place(copied)).manifest.files
    ]


def test_files_that_no_manifest_lists_are_noted_and_no_problem(copied):
    (copied / "labels/views-00004-00005").mkdir()
    shutil.copy(copied / FIRST, copied / "labels/views-00004-00005/train-0.parquet")
    (copied / "samples/.tmp-host-1-0123456789abcdef").write_bytes(b"x")
    (copied / "README.md").write_text("a card")
    report = verify(str(copied), NO_PROBES)
    assert report.problems == []
    assert report.notes == [
        "1 file is not in the manifest, so no reader uses it: labels/views-00004-00005/train-0.parquet. It may belong to a run"
        " that has not sealed it yet; otherwise delete it",
        "1 temporary file of running or killed writers: samples/.tmp-host-1-0123456789abcdef",
    ]


def test_a_file_outside_the_folder_is_named(copied, tmp_path):
    shutil.move(copied / FIRST, tmp_path / "elsewhere.parquet")
    (copied / FIRST).symlink_to(tmp_path / "elsewhere.parquet")
    (problem,) = verify(str(copied), NO_PROBES).problems
    assert "points outside the label set" in str(problem)


# Plan and manifest


def test_with_a_damaged_manifest_files_are_held_against_the_plan(copied):
    """Each file says what it is and states a hash of its rows, so much is found; more, with the manifest, is not."""
    flip(copied / "manifest.json")
    data = bytearray((copied / FIRST).read_bytes())
    data[100] ^= 1  # in the first page
    (copied / FIRST).write_bytes(bytes(data))
    report = verify(str(copied), NO_PROBES)
    assert found(report) == [("manifest.json", "manifest"), (FIRST, "content")]
    assert report.files == 6
    assert report.notes == []  # nobody can say which files are none of the set
    text = str(report.problems[0])
    assert text.startswith(f"{copied / 'manifest.json'}: ")
    assert text.endswith("with --views for all views of the set: it checks every file and seals the set again")


def test_with_a_damaged_plan_files_are_held_against_the_manifest(copied):
    flip(copied / "plan.json")
    flip(copied / FIRST)
    report = verify(str(copied), NO_PROBES)
    assert found(report) == [("plan.json", "plan"), (FIRST, "sha256")]
    assert str(report.problems[0]).endswith("the same deit-cli precompute with an empty --out to make it again")


@pytest.mark.parametrize(("name", "rule"), [("plan.json", "plan"), ("manifest.json", "manifest")])
def test_a_missing_plan_or_manifest_is_one_problem(copied, name, rule):
    (copied / name).unlink()
    report = verify(str(copied), NO_PROBES)
    assert found(report) == [(name, rule)]
    assert str(report.problems[0]).startswith(f"{copied / name} is missing. Fetch it again")
    assert report.files == 6


def test_a_plan_of_another_set_is_named_though_it_is_sound(copied):
    plan = json.loads((copied / "plan.json").read_text())
    plan["source"]["location"] = "/elsewhere"  # no part of any id, but of the bytes
    (copied / "plan.json").write_bytes(pretty_json(plan))
    (problem,) = verify(str(copied), NO_PROBES).problems
    assert (problem.file, problem.rule) == ("plan.json", "plan")
    assert "belongs to another plan.json" in str(problem)


def test_both_damaged_are_two_problems(copied):
    (copied / "plan.json").write_bytes(b"{")
    (copied / "manifest.json").write_bytes(b"")
    assert found(verify(str(copied), NO_PROBES)) == [("plan.json", "plan"), ("manifest.json", "manifest")]


def test_a_set_that_was_not_sealed_is_looked_at_as_far_as_it_is_there(copied):
    seal_again(copied, lambda manifest: manifest.update(sealed=False, files=[], probes=[], environments=[]))
    (copied / FIRST).write_bytes((copied / FIRST).read_bytes()[:100])
    report = verify(str(copied), NO_PROBES)
    assert found(report) == [("manifest.json", "sealed"), (FIRST, "content")]
    assert "is not sealed" in str(report.problems[0])


def test_a_manifest_that_leaves_a_file_out_is_named(copied):
    seal_again(copied, lambda manifest: manifest["files"].pop())
    report = verify(str(copied), NO_PROBES)
    assert found(report) == [("manifest.json", "sealed")]
    assert "lacks labels file of 'train-1'" in str(report.problems[0])
    assert len(report.notes) == 1


def test_a_newer_version_says_so_whichever_file_it_is(copied):
    for name in ("plan.json", "manifest.json"):
        values = json.loads((copied / name).read_text()) | {"version": 2}
        (copied / name).write_bytes(pretty_json(values))
    problems = verify(str(copied), NO_PROBES).problems
    assert [problem.rule for problem in problems] == ["plan", "manifest"]
    assert all("was made by a newer deit-cli: it is of format v2, this one reads v1" in str(p) for p in problems)
    assert not any("precompute" in str(problem) for problem in problems)


def test_what_is_no_label_set_is_an_error(tmp_path):
    with pytest.raises(LabelSetError, match="is not a label set: it has no plan"):
        verify(str(tmp_path), VerifyConfig())
    assert run(str(tmp_path))[0] == 1


def test_a_wrong_pin_is_a_problem_beside_others(copied):
    flip(copied / FIRST)
    report = verify(str(copied), dataclasses.replace(NO_PROBES, expect_manifest="sha256:" + "0" * 64))
    assert found(report) == [("manifest.json", "pin"), (FIRST, "sha256")]


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_any_file_goes_unnoticed(copied, count):
    """The card, README.md, is for people and no part of the set."""
    rng, names = random.Random(count), [path for path in files_of(copied) if path.suffix in (".json", ".parquet")]
    for path in rng.choices(names, [path.stat().st_size for path in names], k=count):
        good = path.read_bytes()
        data = bytearray(good)
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        problems = verify(str(copied), NO_PROBES).problems
        path.write_bytes(good)
        assert any(path.name in problem.file for problem in problems), (path, bit)


# Remote sets


def test_a_remote_set_is_read_anew_and_all_problems_are_named(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01,))
    with web_server(copied) as server:
        assert verify(server.url, NO_PROBES).problems == []
        flip(copied / FIRST)
        (copied / LATER).unlink()
        (copied / SECOND).write_bytes(b"short")
        server.faults[SAMPLES] = [503]
        report = verify(server.url, NO_PROBES)
        assert sorted(found(report)) == [(FIRST, "sha256"), (SECOND, "length"), (LATER, "present")]
        assert all(str(problem).startswith(server.url) for problem in report.problems)
        assert all("deit-cli labels push" in str(problem) for problem in report.problems)
    assert not (tmp_path / "cache").exists()


# Images


def copy_of(folder: Path, change: str) -> Path:
    """Write the images again with something changed in them."""
    write_source(folder, classes=("green", "red", "blue") if change == "classes" else CLASSES)
    members = [((f"n{n:03}.png", coloured_png(n)), (f"n{n:03}.cls", b"%d" % (n % 3))) for n in range(5)]
    if change == "image":
        members[3] = (("n003.png", coloured_png(103)), members[3][1])
    if change == "order":
        members = members[::-1]
    if change == "key":
        members[1] = (("zebra.png", coloured_png(1)), ("zebra.cls", b"1"))
    if change == "class label":
        members[2] = (members[2][0], ("n002.cls", b"0"))
    write_tar(folder / "train-0.tar", [member for pair in members for member in pair])
    if change == "cut":
        path = folder / "train-0.tar"
        path.write_bytes(path.read_bytes()[:2000])
    return folder


COPIES = [
    # what was changed, the rule, what is said
    ("image", "images", "1 sample is with other image bytes: 'n003' of train-0"),
    (
        "order",
        "images",
        "4 samples are in another place (same keys, other order): 'n000' of train-0, 'n001' of train-0",
    ),
    ("key", "images", "1 sample is missing: 'n001' of train-0"),
    ("class label", "images", "1 sample is with another class label: 'n002' of train-0 (class 0, labelled as class 2)"),
    ("classes", "source", "the classes are in another order: number 0 is 'green', labelled as 'red'"),
    ("cut", "images", "train-0.tar"),
]


@pytest.mark.parametrize(("change", "rule", "text"), COPIES, ids=[change for change, *_ in COPIES])
def test_another_copy_of_the_images_is_compared_by_name(made, tmp_path, change, rule, text):
    report = verify(str(made), VerifyConfig(data=str(copy_of(tmp_path / "copy", change)), probes=False))
    assert {problem.rule for problem in report.problems} == {rule}
    assert any(text in str(problem) for problem in report.problems)
    assert "Pass the --data that was labelled, or repair this copy" in str(report.problems[0])


def test_an_equal_copy_is_said_to_be_one(made, tmp_path):
    code, stdout, _ = run(str(made), "--data", str(copy_of(tmp_path / "copy", "nothing")))
    assert code == 0
    assert "9 images compared: keys, class labels and bytes are those of the labelled images" in stdout


def test_one_changed_image_is_refused_in_training_with_the_way_to_find_all(made, tmp_path):
    from pipeline.errors import LabelSetMismatch
    from pipeline.images.source import open_source
    from pipeline.labels.replay import check_image

    source = open_source(copy_of(tmp_path / "copy", "image"))
    label_set = LabelSet.open(made)
    check_source(label_set, source)  # all keys are the same
    with pytest.raises(
        LabelSetMismatch, match=r"image 'n003' of train-0 has other bytes.*labels verify --data lists all"
    ):
        check_image(source.shard("train-0")[3], label_set.samples("train-0"), 3, shard="train-0")


def test_without_data_other_images_in_the_recorded_place_are_found_by_keys_and_probes(tmp_path):
    source = write_source(tmp_path / "tars")
    folder = make_label_set(source, tmp_path / "set").folder
    shutil.rmtree(source)
    copy_of(source, "key")
    assert found(verify(str(folder), VerifyConfig())) == [(str(source), "source")]
    shutil.rmtree(source)
    (problem,) = verify(str(folder), VerifyConfig()).problems
    assert "Pass --data, or --no-probes" in str(problem)
    assert verify(str(folder), NO_PROBES).problems == []


def test_every_probe_that_does_not_replay_is_named(copied):
    def lie(manifest):
        for probe in manifest["probes"][:2]:
            probe["lam"] = 0.123

    seal_again(copied, lie)
    report = verify(str(copied), VerifyConfig())
    assert [problem.rule for problem in report.problems] == ["probe", "probe"]
    assert "was mixed as" in str(report.problems[0])


# The command line


def test_problems_are_lines_and_the_last_word_is_a_summary(copied):
    flip(copied / FIRST)
    (copied / LATER).unlink()
    code, stdout, error = run(str(copied), "--no-probes")
    assert code == 1
    lines = stdout.splitlines()
    assert lines[0].startswith(f"sha256: {copied / FIRST} has SHA-256")
    assert lines[1].startswith(f"present: {copied / LATER} is missing")
    assert error == f"{copied}: 2 problems (1 sha256, 1 present)"


def test_json_is_for_machines_and_the_exit_code_stays(copied, tmp_path):
    data = str(copy_of(tmp_path / "copy", "image"))
    flip(copied / LATER)
    code, stdout, _ = run(str(copied), "--data", data, "--json")
    report = json.loads(stdout)
    assert (code, report["sound"], report["files"]) == (1, False, 6)
    assert [problem["rule"] for problem in report["problems"]] == ["sha256", "images"]
    assert set(report["problems"][0]) == {"file", "rule", "text", "way_out"}
    assert report["images"]["changed"] == ["'n003' of train-0"]
    assert report["manifest"] == "sha256:" + LabelSet(open_place(copied)).manifest_sha256


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threads": 0}, "--threads must be in 1..256, got 0"),
        ({"relabel": 0}, "--relabel must be in 1.."),
        ({"expect_manifest": "x"}, "--expect-manifest must be sha256:"),
        ({"identity": "x"}, "--identity and --identity-provider belong together"),
    ],
)
def test_settings_out_of_range_are_a_misuse(options, text):
    with pytest.raises(UsageError, match=text):
        VerifyConfig(**options)
