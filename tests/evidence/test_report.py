"""Reports: every number can be looked up, nothing is loaded from elsewhere, and bad input is refused in words."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.evidence import analysis, audit, scores, speed, study
from support.pages import Page, check_numbers, data_of
from support.training import TINY

from pipeline.errors import DeitCliError, StorageError, UsageError
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import pair_of, rendered_view
from pipeline.overview.summary import summarise
from pipeline.storage.json import pretty_json
from pipeline.views.mixing import apply_mix, mix_batch
from trainer.config import ReportConfig, TrainConfig
from trainer.evidence.gallery import dense, most_apart
from trainer.evidence.plots import bars, frontier, frontier_of, lines
from trainer.evidence.report import write_report
from trainer.loop import train
from trainer.losses import TeacherTarget
from trainer.student import normalise, open_student

KINDS = {"study": study, "scores": scores, "analysis": analysis, "speed": speed, "audit": audit}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(made, tmp_path_factory) -> Path:
    """A run of a tiny student on the label set."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = TrainConfig(
        labels=str(made), output=str(out), distillation_type="soft", epochs=2, batch_size=8, repeated_aug=1,
        warmup_epochs=0, log_interval=1, workers=0, device="cpu", model_ema=False, **TINY,
    )  # fmt: skip
    return train(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    paths = {kind: folder / f"{kind}.json" for kind in KINDS}
    for kind, path in paths.items():
        path.write_bytes(pretty_json(KINDS[kind]()))
    return paths


@pytest.fixture(scope="module")
def written(run, made, files, tmp_path_factory) -> Path:
    """The report of all of them."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(config(out), [str(run), str(made), *map(str, files.values())])


def config(out: Path, **changes: Any) -> ReportConfig:
    return ReportConfig(out=out, workers=0, device="cpu", **changes)


def test_every_number_of_the_page_is_in_the_json_beside_it(written):
    assert check_numbers(written) > 150


def test_the_json_beside_the_page_has_the_values_of_the_files(written, files):
    report = json.loads(data_of(written).read_bytes())
    assert report["studies"] == [study()]
    assert report["speed"] == speed()["rows"]
    assert report["disagreement"] == [analysis()["disagreement"]]
    assert report["scores"][0]["scores"] == scores()["scores"]
    assert {Path(each["path"]).name for each in report["files"]} >= {path.name for path in files.values()}


def test_no_digit_with_a_fraction_stands_outside_of_a_number(written):
    """Sections have no numbers that were typed in: but for the paper's cosines, which the text cites."""
    text = written.read_text()
    body = re.sub(r"<(svg|style|pre|head)\b.*?</\1>|<data .*?</data>|<code>.*?</code>", "", text, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", " ", body)
    versions = body[body.index("deit-cli 0") :]
    found = re.findall(r"\d+\.\d+", body.replace(versions, ""))
    assert sorted(set(found)) == ["0.06", "0.93", "0.999"]


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script(written):
    text, page = written.read_text(), Page(written.read_text())
    assert [a for a in page.addresses if not a.startswith(("#", "data:image/"))] == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert re.findall(r"url\((?!#)", text) == []
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;b&gt;k0" in text


def test_the_names_of_rows_stay_in_sight_when_a_table_is_scrolled(written):
    assert "tr > :first-child { position: sticky; left: 0;" in written.read_text()


def test_every_anchor_has_its_section_and_no_id_comes_twice(written):
    page = Page(written.read_text())
    assert len(page.ids) == len(set(page.ids))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)


def test_the_first_sentence_gives_the_best_cell_with_its_spread(written):
    text = re.sub(r"<[^>]*>", "", written.read_text())
    wanted = "Best of 2: soft, 61.2 % top-1 (60.0 to 62.5 over 3 seeds), +10.2 points against alone (paired t-test over 3 seeds: p = 0.0031)."
    assert wanted in text
    assert "soft against alone: +10.2 points (p = 0.0031)." in text  # a pair that the study chose


def test_every_section_has_its_chart(written):
    text = written.read_text()
    # results, four curves at most of one soft run (agreement, loss), tokens twice, calibration, speed, costs
    assert text.count("<svg") == 8
    for heading in (
        "Results",
        "Training",
        "Answers",
        "Tokens",
        "Disagreement",
        "Calibration",
        "Speed and accuracy",
        "Costs",
        "Label set",
        "Audit",
        "Gallery",
    ):
        assert f">{heading}</h2>" in text


def test_the_same_report_has_the_same_bytes(written, run, made, files, tmp_path):
    again = write_report(config(tmp_path / "report.html"), [str(run), str(made), *map(str, files.values())])
    assert again.read_bytes() == written.read_bytes()
    assert data_of(again).read_bytes() == data_of(written).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_alone_makes_a_report(files, tmp_path, kind):
    page = write_report(config(tmp_path / "one.html"), [str(files[kind])])
    assert Page(page.read_text()).numbers


def test_the_similarity_of_the_tokens_is_a_table(written):
    text = re.sub(r"<[^>]*>", "|", written.read_text())
    assert "CKA of the outputs" in text
    assert re.search(r"\|soft\|+0\.050\|+0\.930\|+0\.800\|", text)


@pytest.mark.parametrize("known", [True, False])
def test_a_column_without_any_value_is_left_out(tmp_path, known):
    path = tmp_path / "scores.json"
    content = {name: value for name, value in scores().items() if known or not name.startswith("agreement")}
    path.write_bytes(pretty_json(content))
    text = write_report(config(tmp_path / "report.html"), [str(path)]).read_text()
    assert ("agrees with the teacher" in text) == known


@pytest.mark.parametrize(
    ("checkpoint", "part"), [("runs/soft/best", "best"), ("runs/soft/last", "last"), ("runs/soft", None)]
)
def test_the_page_says_whose_weights_a_number_is_of(tmp_path, checkpoint, part):
    path = tmp_path / "scores.json"
    path.write_bytes(pretty_json(scores(checkpoint)))
    page = write_report(config(tmp_path / "report.html"), [str(path)])
    report = json.loads(data_of(page).read_bytes())
    assert report["headline"]["weights"] == report["scores"][0]["weights"] == part
    (lead,) = re.findall('<p class="lead">.*', page.read_text())
    assert (f"top-1 (weights: {part})" in lead) == (f"Weights: {part}." in page.read_text()) == (part is not None)


@pytest.mark.parametrize("unlabelled", [0, 4])
def test_only_images_without_a_class_label_are_counted(made, tmp_path, monkeypatch, unlabelled):
    def told(label_set: LabelSet) -> dict[str, Any]:
        found = summarise(label_set)
        return found | {"source": found["source"] | {"unlabelled": unlabelled}}

    monkeypatch.setattr("trainer.evidence.report.summarise", told)
    text = write_report(config(tmp_path / "report.html"), [str(made)]).read_text()
    assert ("without a class label" in text) == (unlabelled > 0)


@pytest.mark.parametrize("evaluations", [0, 2])
def test_the_best_accuracy_in_training_is_a_column_if_there_was_an_evaluation(run, tmp_path, evaluations):
    copy = shutil.copytree(run, tmp_path / "run")
    with (copy / "metrics.jsonl").open("a") as file:
        for number in range(evaluations):
            line = {"kind": "eval", "index": number + 1, "epoch": number, "weights": "student", "top1": 51.25 - number}
            file.write(json.dumps(line) + "\n")
    text = write_report(config(tmp_path / "report.html", gallery=0), [str(copy)]).read_text()
    assert (
        ("best top-1 in training, %" in text)
        == ("Accuracy in training" in text)
        == (">51.25<" in text)
        == bool(evaluations)
    )


def test_a_report_beside_a_file_of_its_name_leaves_it_alone(tmp_path):
    (tmp_path / "study.json").write_bytes(pretty_json(study()))
    write_report(config(tmp_path / "study.html"), [str(tmp_path)])
    assert json.loads((tmp_path / "study.json").read_bytes()) == study()
    again = write_report(config(tmp_path / "study.html"), [str(tmp_path)])  # its own data are no input
    assert json.loads(data_of(again).read_bytes())["studies"] == [study()]


def test_a_folder_of_runs_uses_the_files_that_lie_in_it(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "scores.json").write_bytes(pretty_json(scores()))
    report = json.loads(data_of(write_report(config(tmp_path / "r.html"), [str(folder)])).read_bytes())
    assert [each["name"] for each in report["scores"]] == ["run"]
    assert [each["name"] for each in report["runs"]] == ["run"]


def test_the_gallery_shows_the_views_that_are_furthest_apart(run, made):
    """Against every view of the first block, rendered and answered one at a time, in float64."""
    label_set = LabelSet.open(made)
    source, student = label_set.open_source(), open_student(run / "last").eval()
    apart = {}
    for name in label_set.shards:
        samples, rows = label_set.samples(name), label_set.read(name, 0)
        for at, row in enumerate(rows.row.tolist()):
            partner, mix = pair_of(label_set.recipe, samples, row, 0)
            both = [row] if partner is None else [row, partner]
            pixels = torch.from_numpy(np.stack([rendered_view(label_set, source, name, samples, r, 0) for r in both]))
            mixed = apply_mix(pixels, mix_batch([(0, 1 if partner is not None else -1)], [mix], len(both)))[:1]
            with torch.inference_mode():
                heads = student(normalise(mixed, student))
            prob = ((heads.class_logits + heads.distill_logits) / 2).double().softmax(1)[0].numpy()
            teacher = np.full(3, float(rows.tail_mass[at]) / max(1, 3 - rows.topk_index.shape[1]))
            teacher[rows.topk_index[at]] = rows.topk_prob[at]
            apart[samples.key[row]] = 0.5 * np.abs(teacher / teacher.sum() - prob).sum()
    wanted = sorted(apart, key=lambda key: -apart[key])
    found = most_apart(run, label_set, config(Path("r.html"), gallery=4))
    assert [each.entry["key"] for each in found] == wanted[:4]
    assert [each.entry["apart"] for each in found] == pytest.approx([apart[key] for key in wanted[:4]], abs=1e-3)


@pytest.mark.parametrize("kind", ["none", "soft"])
def test_the_gallery_shows_the_answer_of_the_heads_that_were_trained(run, made, tmp_path, kind):
    """The second head of a student without a teacher has its first random weights."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    described = json.loads((folder / "config.json").read_bytes())
    described["config"]["distillation_type"] = kind
    (folder / "config.json").write_bytes(pretty_json(described))
    page = write_report(config(tmp_path / "r.html", gallery=3), [str(folder), str(made)])
    found = json.loads(data_of(page).read_bytes())["gallery"]
    expected = most_apart(run, LabelSet.open(made), config(Path("r.html"), gallery=3), class_head=kind == "none")
    assert [each["apart"] for each in found] == [each.entry["apart"] for each in expected]
    other = most_apart(run, LabelSet.open(made), config(Path("r.html"), gallery=3), class_head=kind != "none")
    assert [each["apart"] for each in found] != [each.entry["apart"] for each in other]


@pytest.mark.parametrize("name", ["a$b$c", "$x_{$"])
def test_a_dollar_sign_in_a_name_is_a_dollar_sign(name):
    for svg in (
        lines({name: ([1, 2], [3, 4])}, x="x", y="y"),
        bars([name], [1.0], [None], label="top-1"),
        frontier([name], [1.0], [2.0], label="images/s", more=True),
    ):
        assert f">{name}</" in svg


def write(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pretty_json(content))
    return str(path)


def reported(folder: Path, *paths: str) -> dict[str, Any]:
    return json.loads(data_of(write_report(config(folder / "report.html", gallery=0), list(paths))).read_bytes())


def evaluated(path: Path, checkpoint: Path, top1: float) -> str:
    return write(path, scores(str(checkpoint), scores={"class_head": {"top1": top1, "top5": 90.0, "ece": 2.5}}))


def test_runs_of_different_length_have_tables_of_their_own(run, tmp_path):
    """The numbers of a shorter run must not stand beside the progress of a longer one."""
    long, short, same = (Path(shutil.copytree(run, tmp_path / name)) for name in ("long", "short", "same"))
    line = {"kind": "train", "teacher_agreement": 0.25, "distill_loss": 0.5}
    for folder, count in ((long, 100), (same, 100), (short, 9)):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"index": n}) + "\n" for n in range(count)))
    page = write_report(config(tmp_path / "report.html", gallery=0), [str(long), str(short), str(same)])
    text = page.read_text()
    assert check_numbers(page)
    assert text.count("<tr><th>progress</th><th>long</th><th>same</th></tr>") == 2
    assert text.count("<tr><th>progress</th><th>short</th></tr>") == 2
    curve = json.loads(data_of(page).read_bytes())["curves"]["teacher_agreement"]["lines"]
    assert [len(each["x"]) for each in curve] == [20, 8, 20]
    table = text[text.index("<tr><th>progress</th><th>short</th></tr>") :]
    assert table[: table.index("</table>")].count("<tr>") == 1 + 8


def test_speed_and_accuracy_are_those_of_the_same_weights_whatever_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [
        evaluated(Path(folder, "net/scores.json"), Path(folder, "net/last"), top1)
        for folder, top1 in (("b", 20.0), ("a", 10.0))
    ]
    rows = [{**speed()["rows"][0], "name": name, "weights": weights, "images_per_s": rate} for name, weights, rate in (
        ("net", "a/net/best", 100.0), ("net-2", f"{tmp_path}/b/net/last", 200.0))]  # fmt: skip
    found = reported(tmp_path, *files, write(Path("speed.json"), speed(rows=rows)))["tradeoff"]
    assert {each["images_per_s"]: each["top1"] for each in found} == {100.0: 10.0, 200.0: 20.0}


def test_a_step_of_a_study_that_was_timed_is_its_cell(run, tmp_path):
    content = study()
    step = tmp_path / "students/soft-seed0-abc"
    shutil.copytree(run, step / "run")
    where = {"run": "students/soft-seed0-abc/run", "scores_file": "students/soft-seed0-abc/scores.json"}
    content["cells"][1]["seeds"][0] |= where
    write(step / "scores.json", scores(str(step / "run/last")))
    rows = [speed()["rows"][0] | {"name": "soft-seed0", "weights": str(step / "run/last")}]
    found = reported(tmp_path, write(tmp_path / "s.json", content), write(tmp_path / "t.json", speed(rows=rows)))
    assert [each["name"] for each in found["tradeoff"]] == ["soft"]


def test_two_studies_on_a_page_name_their_cells_apart(run, tmp_path):
    shutil.copytree(run, tmp_path / "students/soft-0")
    files = [write(tmp_path / f"{name}.json", study(name=name)) for name in ("token", "sizes")]
    found = reported(tmp_path, *files)
    names = ["token: teacher cnn", "token: alone", "token: soft", "sizes: teacher cnn", "sizes: alone", "sizes: soft"]
    assert [each["name"] for each in found["results"]] == names
    assert [each["name"] for each in found["costs"]] == [name for name in names if "teacher" not in name]
    assert [each["name"] for each in found["runs"]] == ["token: soft"]  # both studies have the same run
    same = [write(tmp_path / scale / "token.json", study()) for scale in ("digits", "cifar10")]
    assert reported(tmp_path, *same)["results"][3]["name"] == "token-2: teacher cnn"


def test_two_evaluations_of_a_run_are_named_by_their_files(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "net"))
    for name in ("scores", "mirrored"):
        write(folder / f"{name}.json", scores(f"{folder}/last"))
    found = reported(tmp_path, str(folder))
    assert [each["name"] for each in found["scores"]] == ["net", "net, scores"]
    assert found["title"] == "net"


def test_pictures_of_the_same_name_are_those_of_their_analyses(tmp_path):
    paths = []
    for number in range(2):
        folder = tmp_path / str(number)
        drawn = [{"run": "soft", "key": "k", "picture": "attention-soft.png"}]
        paths.append(write(folder / "analysis.json", analysis(attention=drawn)))
        (folder / "attention-soft.png").write_bytes(b"picture %d" % number)
    page = write_report(config(tmp_path / "report.html"), paths)
    assert [
        base64.b64decode(a.partition(",")[2]) for a in Page(page.read_text()).addresses if a.startswith("data:")
    ] == [
        b"picture 0",
        b"picture 1",
    ]
    assert [each["name"] for each in json.loads(data_of(page).read_bytes())["tokens"]] == ["soft", "soft-2"]


def test_an_audit_without_a_suspect_has_no_empty_table(tmp_path):
    text = write_report(
        config(tmp_path / "r.html"), [write(tmp_path / "audit.json", audit(suspects=[], judged=5))]
    ).read_text()
    assert "more than half of their views" in text
    assert "Suspects" not in text
    assert "The table has the first" not in text


@pytest.mark.parametrize("name", ["_hidden", "#010203", 'id="b_1"', "font-family: x;", "xlink:href"])
def test_a_name_in_a_chart_is_shown_as_it_is(name):
    for svg in (
        lines({name: ([1, 2], [3, 4])}, x="x", y="y"),
        bars([name], [1.0], [None], label="top-1"),
        frontier([name], [1.0], [2.0], label="images/s", more=True),
    ):
        assert f">{name}</" in html.unescape(svg).replace("\N{ZERO WIDTH SPACE}", "")


def test_a_long_name_keeps_its_ends_and_leaves_room_for_the_chart():
    name = f"first-{'x' * 300}-last"
    for svg in (
        lines({name: ([1, 2], [3, 4])}, x="x", y="y"),
        bars([name], [1.0], [None], label="top-1"),
        frontier([name], [1.0], [2.0], label="images/s", more=True),
    ):
        text = re.sub(r"<[^>]*>|\s", "", svg)
        assert f"first-{'x' * 16}…{'x' * 17}-last" in text
        assert len(text) < 400


def test_networks_beyond_the_eighth_differ_by_more_than_their_colour():
    names = [f"n{number}" for number in range(20)]
    values = [50.0 + number for number in range(20)]
    drawn = lines({name: ([0.0, 1.0], [0.0, value]) for name, value in zip(names, values, strict=True)}, x="x", y="y")
    looks = re.findall(r'style="fill: none;( stroke-dasharray: [^;]*;)?[^"]*stroke: (var\(--c\d\))', drawn)
    assert len(set(looks)) == 20
    hatched = bars(names, values, [None] * 20, label="top-1, %")
    fills = re.findall(r'style="fill: (url\(#\w+\)|var\(--c\d\))', hatched)
    assert len({*fills}) >= 20
    patterns = re.findall(r'<pattern id="(\w+)".*?</pattern>', hatched, flags=re.DOTALL)
    assert {f"url(#{name})" for name in patterns} <= set(fills)
    assert frontier(names, values, values, label="x", more=True).count("<use") >= 20


def test_the_gallery_is_of_the_label_set_that_the_student_learned_from(run, made, tmp_path):
    other = shutil.copytree(made, tmp_path / "other")
    page = write_report(config(tmp_path / "r.html", gallery=2), [str(other), str(made), str(run)])
    found = json.loads(data_of(page).read_bytes())["gallery"]
    assert {each["label_set"] for each in found} == {str(made)}
    assert f"and the teacher of {made} differ most" in page.read_text()


def test_a_run_without_weights_yet_shows_its_curves(run, made, tmp_path):
    killed = shutil.copytree(run, tmp_path / "killed")
    for part in ("last", "best"):
        shutil.rmtree(killed / part, ignore_errors=True)
    found = json.loads(data_of(write_report(config(tmp_path / "r.html"), [str(killed), str(made)])).read_bytes())
    assert found["gallery"] == []
    assert found["curves"]
    both = json.loads(
        data_of(write_report(config(tmp_path / "r.html"), [str(killed), str(run), str(made)])).read_bytes()
    )
    assert {each["run"] for each in both["gallery"]} == {run.name}


def test_a_study_brings_the_analysis_that_compare_wrote_beside_it(tmp_path):
    write(tmp_path / "token-analysis/analysis.json", analysis())
    found = reported(tmp_path, write(tmp_path / "token.json", study()))
    assert [each["name"] for each in found["tokens"]] == ["soft"]
    assert len(found["disagreement"]) == 1
    again = reported(tmp_path, str(tmp_path / "token.json"), str(tmp_path / "token-analysis"))
    assert len(again["disagreement"]) == 1


def test_images_without_a_label_set_are_refused(files, tmp_path):
    with pytest.raises(UsageError, match="--data names the images of a label set: pass the label set too"):
        write_report(config(tmp_path / "r.html", data="images"), [str(files["scores"])])


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_dense_spreads_the_tail_over_the_classes_that_were_not_kept(kept):
    prob = torch.tensor([[0.5, 0.3, 0.2]])[:, :kept]
    target = TeacherTarget(torch.tensor([2]), torch.tensor([[2, 0, 1]])[:, :kept], prob, 1 - prob.sum(1))
    wanted = [0.0, 0.0, 0.0]
    for place, index in enumerate((2, 0, 1)):
        wanted[index] = prob[0, place].item() if place < kept else (1 - prob.sum().item()) / max(1, 3 - kept)
    if kept == 0:
        wanted = [0.0, 0.0, 1.0]
    assert dense(target, 3)[0].tolist() == pytest.approx(wanted)


def test_the_frontier_has_the_networks_that_no_other_beats():
    speed_of, top1 = [100.0, 100.0, 50.0, 200.0, 60.0], [70.0, 71.0, 71.0, 60.0, 75.0]
    wanted = []
    for i in range(5):
        beaten = False
        for j in range(5):
            as_good = speed_of[j] >= speed_of[i] and top1[j] >= top1[i]
            beaten |= as_good and (speed_of[j], top1[j]) != (speed_of[i], top1[i])
        wanted += [] if beaten else [i]
    assert frontier_of(speed_of, top1) == wanted == [1, 3, 4]
    assert frontier_of([1.0, 1.0], [2.0, 2.0]) == [0, 1]  # equals do not beat each other


@pytest.mark.parametrize(
    ("path", "refusal"),
    [
        ("nowhere", r"nowhere: no such file or folder"),
        (
            "empty",
            r"empty is neither a study, a run nor a label set, .*\. Pass the folder that compare, train or precompute wrote",
        ),
        ("other.json", r"other\.json must be a JSON file of kind study, .* and version 1, got kind 'x' and version 1"),
        ("newer.json", r"newer\.json must be .* got kind 'study' and version 2"),
        ("list.json", r"list\.json is not a file of deit-cli: it holds no object"),
        ("broken.json", r"broken\.json"),
    ],
)
def test_a_path_that_shows_nothing_is_refused(tmp_path, path, refusal):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"kind": "x", "version": 1}')
    (tmp_path / "newer.json").write_text('{"kind": "study", "version": 2}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text('{"kind": ')
    with pytest.raises((UsageError, StorageError), match=refusal):
        write_report(config(tmp_path / "r.html"), [str(tmp_path / path)])
    assert not (tmp_path / "r.html").exists()


def test_a_file_that_lacks_a_value_is_refused_by_its_name(tmp_path):
    content = study()
    del content["cells"]
    (tmp_path / "study.json").write_bytes(pretty_json(content))
    with pytest.raises(DeitCliError, match=r"study\.json.*cells"):
        write_report(config(tmp_path / "r.html"), [str(tmp_path / "study.json")])


def test_the_page_must_be_called_html(tmp_path):
    with pytest.raises(
        UsageError, match=r"--out must be a page, FILE\.html, got report\.json\. Pass --out report\.json\.html"
    ):
        config(Path("report.json"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_opens_the_page_without_an_error(written, tmp_path, width):
    """No message on the console, and nothing wider than the screen."""
    probe = tmp_path / "probe.html"
    script = "<script>document.title = document.documentElement.scrollWidth + ' ' + document.querySelectorAll('svg').length</script>"
    probe.write_text(written.read_text().replace("</body>", script + "</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--window-size={width},900",
    ]
    done = subprocess.run([*command, f"--user-data-dir={tmp_path}/profile", "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120)  # fmt: skip
    assert "CONSOLE" not in done.stderr
    (shown,) = re.findall(r"<title>(\d+) 8</title>", done.stdout)
    assert int(shown) <= max(width, 500)  # a headless window is at least 500 pixels wide
