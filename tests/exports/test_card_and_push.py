"""The model card and the record of an export, and its way to the Hub."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from PIL import Image
from support.builders import photo
from support.web_server import FailingServer

import cli
from pipeline.errors import RemoteFileRefused, StorageError
from pipeline.storage.atomic import sha256_file
from trainer.evaluate import ANSWERS
from trainer.evidence.networks import exported_folder
from trainer.exports.card import NOT_MEASURED, _classes, _without_effect
from trainer.exports.config import StudentExportConfig
from trainer.exports.export import export_student


def export(source: Path | str, out: Path, **settings):
    return export_student(str(source), StudentExportConfig(out=out, **settings))


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def cells_of(card: str) -> dict[str, list[str]]:
    """Return the table of accuracies: answer -> cells."""
    rows = re.findall(r"^\| `(\w+)`: [^|]+\|(.*)\|$", card, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


# --- the card ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "settings", "names"),
    [
        ("folder", {"to": "timm"}, ["logits", "class_head", "distillation_head"]),
        ("cnn", {"to": "timm"}, ["logits"]),
        ("folder", {"to": "onnx", "answer": ("class_head", "concat_linear"), "preprocess": "nhwc"}, ["class_head", "concat_linear"]),
        ("cnn", {"to": "onnx"}, ["class_head"]),
        ("folder", {"to": "torch", "preprocess": "nchw"}, ["mean_logits"]),
        ("cnn", {"to": "torch"}, ["class_head"]),
    ],
)  # fmt: skip
def test_every_line_of_code_in_a_card_runs(source, settings, names, request, tmp_path, monkeypatch):
    export(request.getfixturevalue(source), tmp_path / "out", **settings)
    card = (tmp_path / "out/README.md").read_text()
    monkeypatch.chdir(tmp_path / "out")
    Image.fromarray(photo(1)).save("image.jpg")
    known: dict[str, Any] = {}
    blocks = code_of(card)
    assert card.count("```") == 2 * len(blocks) > 0
    for block in blocks:
        exec(block, known)
    images = 1 if settings["to"] == "timm" else 4
    for name in names:
        assert tuple(known[name].shape) == (images, 8)
    if settings["to"] == "timm":
        assert known["images"].abs().max() > 0.1  # the image, normalised
        assert known["classes"][0, 0] == known["logits"].argmax()


def test_a_card_says_what_the_run_measured_and_what_it_did_not(run, tmp_path):
    found = export(run, tmp_path / "out", to="timm", license="apache-2.0", dataset=("imagenet-1k",))
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.text.lstrip().startswith(f"# `{found['source']['model']}` trained on `imagenet-1k`\n")
    assert card.data.to_dict() == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": "apache-2.0",
        "datasets": ["imagenet-1k"],
        "metrics": ["accuracy"],
        "tags": ["image-classification", "knowledge-distillation", "deit", "deit-cli"],
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    best = max(evals, key=lambda line: line["top1"])
    assert found["source"]["scores"] == {name: best[name] for name in ("weights", "epoch", "images", "scores")}
    wanted = {name: [f"{best['scores'][name]['top1']:.2f}", NOT_MEASURED] for name in ANSWERS}
    assert cells_of(card.text) == wanted
    config = json.loads((run / "config.json").read_text())
    for text in (config["labelset_id"], config["recipe_id"], config["teacher"]["weights_sha256"], "`imagenet-1k`"):
        assert text in card.text
    assert str(run.parent) not in card.content + (tmp_path / "out/export.json").read_text()


def test_a_card_has_what_the_training_used_and_nothing_else(run, tmp_path):
    found = export(run, tmp_path / "out", to="timm")
    card = (tmp_path / "out/README.md").read_text()
    (settings,) = re.findall(r"^- \*\*Settings\*\*: (.*)$", card, flags=re.MULTILINE)
    assert found["source"]["run"]["settings"]["distillation_tau"] == 1.0  # the record has all
    for name in ("distillation_alpha", "batch_size", "model_ema_decay", "lr_base"):
        assert f"{name} " in settings, name
    for name in ("distillation_tau", "tail", "soft_reduction", "label_mode"):
        assert name not in settings
    assert "- **Views**: 0:3, 12 in each update" in card
    assert f"after epoch {found['source']['scores']['epoch']} (counted from 0)" in card
    assert card.splitlines()[card.splitlines().index("## Classes") + 2].startswith("From class 0 on: `")
    assert f"\n# `{found['source']['model']}`, `tiny`\n" in card


def test_which_settings_had_no_effect():
    soft = {
        "distillation_type": "soft",
        "distillation_tau": 3,
        "tail": "spread",
        "model_ema": True,
        "model_ema_decay": 0.9,
    }
    assert not _without_effect(soft).intersection(soft)
    none = {"distillation_type": "none", "second_token": "distillation", "distillation_alpha": 0.5, "model_ema": False}
    assert _without_effect(none) >= {"distillation_alpha", "distillation_tau", "model_ema_decay"}
    assert "distillation_alpha" not in _without_effect(none | {"second_token": "class"})
    assert "lr_base" in _without_effect({"lr": 1e-3})


@pytest.mark.parametrize(
    ("to", "number", "said"),
    [
        ("timm", 2, "From class 0 on: `c0`, `c1`."),
        ("timm", 1000, "The names of the 1,000 classes are in `config.json`, `label_names`, from class 0 on."),
        ("torch", 21, "The names of the 21 classes are in `export.json`, `class_names`, from class 0 on."),
        ("onnx", None, "The classes have numbers only: those of the training images."),
    ],
)
def test_classes_are_named_or_it_is_said_where_the_names_are(to, number, said):
    names = None if number is None else [f"c{each}" for each in range(number)]
    assert _classes({"class_names": names, "to": to}) == [said]


def test_the_last_weights_have_the_scores_of_the_last_evaluation_of_a_run_that_ended(run, tmp_path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["kind"] == "eval" and line["epoch"] == 1 and line["weights"] == "student"]
    assert export(run / "last", tmp_path / "last", to="timm")["source"]["scores"]["scores"] == last["scores"]
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "last").symlink_to(run / "last")
    kept = [line for line in lines if line.get("epoch") == 0]
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (stopped / "config.json").write_bytes((run / "config.json").read_bytes())
    assert export(run / "last", tmp_path / "again", to="timm")["source"]["scores"] is not None
    export(stopped, tmp_path / "out", to="timm")
    cells = cells_of((tmp_path / "out/README.md").read_text())
    assert list(cells) == list(ANSWERS)
    assert {cell for row in cells.values() for cell in row} == {NOT_MEASURED}


def test_a_card_without_a_run_invents_nothing(folder, photos, tmp_path):
    found = export(folder, tmp_path / "out", to="torch", data=photos)
    card = (tmp_path / "out/README.md").read_text()
    top1 = f"{found['check']['accuracy']['student']['mean_logits']['top1']:.2f}"
    assert cells_of(card)["mean_logits"] == [NOT_MEASURED, top1, top1]
    assert cells_of(card)["class_head"] == [NOT_MEASURED] * 3
    assert "Nothing is known of the training" in card
    assert "Not stated. It depends on the licences" in card
    assert ModelCard.load(tmp_path / "out/README.md").data.license is None


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_record_names_the_run_and_every_file(run, tmp_path):
    found = export(run, tmp_path / "out", to="timm")
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert found == record | {"folder": str(tmp_path / "out")}
    weights = exported_folder(run)
    assert weights is not None
    source = record["source"]
    assert (source["name"], source["weights"]) == (run.name, weights.name)
    assert source["weights_sha256"] == sha256_file(weights / "model.safetensors")
    for name, entry in record["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert {*record["files"], "export.json"} == {path.name for path in (tmp_path / "out").iterdir()}


def test_an_export_of_an_export_still_knows_the_run(run, tmp_path):
    first = export(run, tmp_path / "timm", to="timm")["source"]
    second = export(tmp_path / "timm", tmp_path / "torch", to="torch")["source"]
    assert second["run"] == first["run"] is not None
    assert second["scores"] == first["scores"]
    assert second["student_sha256"] == first["student_sha256"]


def test_the_command_prints_json_and_takes_the_name_of_the_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.commands, ["export", str(run), "--to", "torch", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["folder"] == f"{run.name}-torch"
    assert torch.export.load(tmp_path / f"{run.name}-torch" / "model.pt2") is not None


# --- the Hub ----------------------------------------------------------------------------------------------------------


class Hub(FailingServer):
    """A stand-in for the Hub that takes one commit after the other.

    Attributes:
        commits: files of each commit, by name.
        created: what was asked to be created.
        status: status of every answer, if not 200.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.commits: list[dict[str, bytes]] = []
        self.messages: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.status = 200


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.requests[f"GET {self.path}"] += 1
        self._answer({"id": "user/name", "sha": "0" * 40, "siblings": []}, self.server.status)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests[f"POST {self.path}"] += 1
        if self.server.status != 200:
            return self._answer({"error": "no"}, self.server.status)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"{self.server.url}/user/name"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        assert "/commit/" in self.path, self.path
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
        files = [line["value"] for line in lines if line["key"] == "file"]
        self.server.commits.append({f["path"]: base64.b64decode(f["content"]) for f in files})
        return self._answer(
            {"commitUrl": f"{self.server.url}/user/name/commit/1", "commitOid": "1" * 40, "success": True}
        )


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A Hub on this machine, and a token for it."""
    with Hub().running() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
        yield server


def test_a_push_is_one_commit_of_the_files_of_the_export(hub, folder, tmp_path):
    out = tmp_path / "out"
    found = export(folder, out, to="timm", push="hf://user/name", private=True)
    assert found["pushed"] == f"{hub.url}/user/name"
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("user", "name")
    assert created.get("private") is True or created.get("visibility") == "private"
    (commit,) = hub.commits
    assert commit == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.messages == ["Export two to timm"]
    assert "hf-hub:user/name" in commit["README.md"].decode()
    (out / "notes.txt").write_text("mine")
    export(folder, out, to="timm", push="hf://user/name")
    assert "notes.txt" not in hub.commits[-1]
    assert not hub.created[-1].get("private")
    assert hub.created[-1].get("visibility") != "private"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_push_says_how_to_log_in_and_keeps_the_export(status, hub, folder, tmp_path):
    hub.status = status
    with pytest.raises(
        RemoteFileRefused, match=rf"hf://user/name: access is refused \({status}\)\. Run `hf auth login`"
    ) as e:
        export(folder, tmp_path / "out", to="timm", push="hf://user/name")
    assert "\n" not in str(e.value)
    assert f"the export is complete in {tmp_path / 'out'}" in str(e.value)
    assert (tmp_path / "out/export.json").is_file()


def test_a_push_without_a_hub_or_with_an_impossible_name_is_one_line(hub, folder, tmp_path):
    hub.status = 400
    with pytest.raises(StorageError, match="hf://user/name: the Hub answers 400: ") as refused:
        export(folder, tmp_path / "out", to="timm", push="hf://user/name")
    assert "\n" not in str(refused.value)
    with pytest.raises(StorageError, match=r"hf://user/\.\.name: .*The export is complete in"):
        export(folder, tmp_path / "out", to="timm", push="hf://user/..name")


def test_a_push_without_a_network_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=r"hf://user/name: .*offline.*The export is complete in") as refused:
        export(folder, tmp_path / "out", to="timm", push="hf://user/name")
    assert "\n" not in str(refused.value)
