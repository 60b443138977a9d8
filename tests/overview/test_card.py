"""The dataset card: true, runnable, safe against names from outside, and never written over somebody's own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard
from support.builders import files_of, make_labels, write_tars
from support.commands import invoke
from support.label_sets import RECIPE, colour_teacher, make_label_set, problems_in, write_source
from support.training import TINY

from pipeline.errors import StorageError, UsageError
from pipeline.labels.labelset import LabelSet
from pipeline.overview.card import (
    NOT_STATED,
    Licence,
    code_span,
    is_untouched,
    licence_of,
    refresh_card,
    size_category,
    write_card,
)
from pipeline.storage.yaml import parse_yaml

READERS = ("pyarrow", "DuckDB", "Polars", "datasets")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A label set with its images, of two source shards and two blocks of views, alone in a folder."""
    root = tmp_path_factory.mktemp("made")
    data = write_tars(root / "data", (24, 16), unlabelled=5, bad=(3,))
    make_labels(root / "set", data, views=(0, 4), views_per_shard=2, include_images="20", on_bad_image="skip")
    shutil.rmtree(data)
    return root / "set"


def blocks(card: str) -> dict[str, str]:
    """Return the code blocks of a card by the reader that they are for."""
    return dict(re.findall(r"^\*\*(.+?)\*\*\n\n```\w+\n(.*?)```$", card, flags=re.MULTILINE | re.DOTALL))


def run_block(text: str, folder: Path, home: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", text], capture_output=True, text=True, env=environment, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_card_has_a_block_for_each_reader_of_ten_lines_at_most(made):
    found = blocks((made / "README.md").read_text())
    assert tuple(found) == (*READERS, "deit-cli")
    assert all(len(text.splitlines()) <= 10 for text in found.values())
    assert all("deit" not in found[name] for name in READERS)


def test_the_card_of_codes_decodes_them(tmp_path):
    write_source(tmp_path / "data")
    labels = make_label_set(tmp_path / "data", tmp_path / "set", topk=2, precision="log8")
    (title,) = [name for name in blocks((tmp_path / "set/README.md").read_text()) if name.startswith("NumPy")]
    text = blocks((tmp_path / "set/README.md").read_text())[title]
    assert len(text.splitlines()) <= 10
    said = np.array(run_block(text, tmp_path / "set", tmp_path).replace("[", " ").replace("]", " ").split(), float)
    rows = labels.read("train-0", 0)
    expected = np.column_stack([rows.topk_prob, rows.tail_mass])[:5]
    np.testing.assert_allclose(said.reshape(5, 3), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "float32", "log8"])
@pytest.mark.parametrize("topk", [0, 2])
@pytest.mark.parametrize("reader", READERS)
def test_what_the_card_shows_reads_the_set(reader, topk, precision, tmp_path):
    if reader != "pyarrow":
        pytest.importorskip(reader.lower())
    write_source(tmp_path / "data")
    labels = make_label_set(tmp_path / "data", tmp_path / "set", topk=topk, precision=precision)
    text = blocks((tmp_path / "set/README.md").read_text())[reader]
    said = run_block(text, tmp_path / "set", tmp_path)
    rows = labels.read("train-0", 0)
    first = labels.samples("train-0").key[int(rows.row[0])]
    assert first in said
    if reader == "datasets":
        assert said.split() == [str(4 * 9), "9", first, str(int(rows.hard[0]))]
    if reader == "DuckDB":
        assert ("topk_prob" in said) == (topk > 0 and precision == "float32")
        assert ("topk_code" in said) == (topk > 0 and precision == "log8")
        assert ("DuckDB 2.0 does not read" in (tmp_path / "set/README.md").read_text()) == (topk > 0 and precision == "float16")  # fmt: skip


def test_the_training_command_of_the_card_trains(made, tmp_path, monkeypatch):
    line = blocks((made / "README.md").read_text())["deit-cli"].strip()
    monkeypatch.chdir(made)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "model"]
    small = ["--epochs=1", "--batch-size=12", "--workers=0", "--device=cpu", "--output", str(tmp_path / "run")]
    exit_code, said = invoke(*line.split()[1:], *options, *small, "--model", TINY["model"])
    assert exit_code == 0, said
    assert (tmp_path / "run/last/model.safetensors").is_file()


def test_a_set_without_images_says_that_training_needs_them(tmp_path):
    write_source(tmp_path / "data")
    make_label_set(tmp_path / "data", tmp_path / "set")
    card = (tmp_path / "set/README.md").read_text()
    assert "--data IMAGES" in blocks(card)["deit-cli"]
    assert "training needs a copy of them" in card
    assert str(tmp_path) not in card  # where the images lay is nobody's business


def test_the_hub_reads_the_header(made):
    card = DatasetCard.load(made / "README.md")
    header = card.data.to_dict()
    assert (header["license"], header["license_name"]) == ("other", NOT_STATED)
    assert header["size_categories"] == ["n<1K"]
    assert header["task_categories"] == ["image-classification"]
    assert [(c["config_name"], c["data_files"]) for c in header["configs"]] == [
        ("labels", [{"split": "train", "path": "labels/*/*.parquet"}]),
        ("samples", [{"split": "train", "path": "samples/*.parquet"}]),
    ]


def test_the_card_says_what_is_in_the_set(made):
    labels, card = LabelSet.open(made), (made / "README.md").read_text()
    teacher = labels.plan.teacher.members[0]
    for text in (
        f"`{teacher.name}`, 3 classes, sees 16 px, weights SHA-256 `{teacher.weights_sha256}`",
        f"**Recipe** `{labels.plan.recipe_id}`: `aa rand-m9-mstd0.5-inc1`",
        "- **Pixels** of renderer 2: defined by `docs/views-v2.md`; no library decides a pixel but the image decoder\n",
        "**Views** 0..3: 156 labels of 39 images in 2 source shards",
        "**Images**: 40, 1 of them cannot be decoded and have no labels, 8 have no class label; they are in this set",
        "`shorter side at most 20 px: Pillow bicubic, JPEG quality 95 4:2:0`",
        "K = 2 most probable classes, probabilities as float16",
        "the hard label is the class label of the image",
        f"**Label set** `{labels.plan.labelset_id}`",
        "`torch ",
    ):
        assert text in card


def test_the_card_of_a_set_of_renderer_1_names_the_versions_that_decide_its_pixels(tmp_path):
    write_source(tmp_path / "data")
    make_label_set(tmp_path / "data", tmp_path / "set", recipe=RECIPE.with_fields(renderer=1))
    card = (tmp_path / "set/README.md").read_text()
    assert (
        "- **Pixels** of renderer 1: the versions that they were made with (torch, OpenCV, the image decoder)" in card
    )
    assert "`opencv-python-headless " in card


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9999, "1K<n<10K"), (384_000_000, "100M<n<1B"), (10**12, "n>1T")],
)
def test_size_categories_are_the_hubs(rows, category):
    assert size_category(rows) == category


# --- names from outside -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("plain", "`plain`"),
        ("a`b", "``a`b``"),
        ("`x``", "``` `x`` ```"),
        ("", "`  `"),
        ("line\nbreak", "`line\N{REPLACEMENT CHARACTER}break`"),
        ("right\u202eleft", "`right\N{REPLACEMENT CHARACTER}left`"),
        ("z" * 300, f"`{'z' * 200}…`"),
        ("<!-- x -->", "`<!-- x -->`"),
    ],
)
def test_a_text_from_outside_is_one_code_span(text, span):
    assert code_span(text) == span


HOSTILE = "x --- license: mit --- # Hi ```python import os ``` <script>alert(1)</script> ](http://evil) `code` --- : [ ! & * \u2028 end"


def test_a_hostile_teacher_name_stays_a_name(tmp_path):
    write_source(tmp_path / "data")
    labels = make_label_set(tmp_path / "data", tmp_path / "set", teacher=colour_teacher(name=HOSTILE))
    card = (tmp_path / "set/README.md").read_text()
    assert is_untouched(card)
    header = DatasetCard(card).data.to_dict()
    assert header["license"] == "other"
    assert header["pretty_name"] == f"Labels of {HOSTILE}"
    body = card.split("---\n", 2)[2]
    # Without its code spans and code blocks, nothing of the name is left in the body.
    blocks_out = re.sub(r"^```\w+\n.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", blocks_out)
    assert not any(word in rest for word in ("script", "evil", "Hi", "license: mit", "import os"))
    assert tuple(blocks(card)) == (*READERS, "deit-cli")
    assert problems_in(labels) == []


# --- whose file it is -------------------------------------------------------------------------------------------


def test_a_card_follows_the_set_until_somebody_changes_it(tmp_path, caplog):
    caplog.set_level("INFO")
    data = write_tars(tmp_path / "data")
    make_labels(tmp_path / "set", data, views=(0, 2))
    path = tmp_path / "set/README.md"
    assert is_untouched(path.read_text())
    make_labels(tmp_path / "set", data, views=(2, 4))
    assert "**Views** 0..3" in path.read_text()
    mine = path.read_text().replace("The answers of a frozen", "MINE. The answers of a frozen")
    path.write_text(mine)
    make_labels(tmp_path / "set", data, views=(4, 6))
    assert path.read_text() == mine
    assert "README.md is not an unchanged card of deit-cli, so it is kept" in caplog.text
    exit_code, said = invoke("labels", "card", str(tmp_path / "set"))
    assert (exit_code, "pass --replace" in said) == (2, True)
    assert path.read_text() == mine
    assert invoke("labels", "card", str(tmp_path / "set"), "--replace")[0] == 0
    assert "**Views** 0..5" in path.read_text()


def test_a_readme_that_was_there_before_stays(tmp_path):
    data = write_tars(tmp_path / "data")
    make_labels(tmp_path / "set", data, views=(0, 1))
    for content in (b"# mine\n", b"", b"\xff\xfe not text", b"x" * (2 << 20)):
        (tmp_path / "set/README.md").write_bytes(content)
        make_labels(tmp_path / "set", data, views=(0, 1))
        assert (tmp_path / "set/README.md").read_bytes() == content


def test_the_same_set_has_the_same_card_and_sealing_again_writes_nothing(tmp_path):
    data = write_tars(tmp_path / "data")
    for name in ("a", "b"):
        make_labels(tmp_path / name, data)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    before = (tmp_path / "a/README.md").stat()
    make_labels(tmp_path / "a", data)
    assert (tmp_path / "a/README.md").stat().st_ino == before.st_ino


def test_a_licence_that_was_written_is_kept(tmp_path):
    data = write_tars(tmp_path / "data")
    make_labels(tmp_path / "set", data, views=(0, 1))
    path = tmp_path / "set/README.md"
    assert licence_of(path.read_text()) == Licence()
    assert invoke("labels", "card", str(tmp_path / "set"), "--license", "cc-by-4.0")[0] == 0
    make_labels(tmp_path / "set", data, views=(1, 2))
    assert licence_of(path.read_text()) == Licence("cc-by-4.0", None, None)
    assert "**Licence**: `cc-by-4.0`" in path.read_text()
    other = ("--license", "other", "--license-name", "ours: no `tricks`\n---", "--license-link", "https://x/y")
    assert invoke("labels", "card", str(tmp_path / "set"), *other)[0] == 0
    make_labels(tmp_path / "set", data, views=(2, 3))
    assert licence_of(path.read_text()) == Licence("other", "ours: no `tricks`\n---", "https://x/y")
    header = parse_yaml(path.read_text().split("---\n")[1], where="card")
    assert header["license"] == "other"


def test_a_part_that_is_pulled_has_a_card_of_its_own_and_its_licence(tmp_path):
    data = write_tars(tmp_path / "data")
    make_labels(tmp_path / "set", data, views=(0, 4), views_per_shard=2, include_images="20")
    assert invoke("labels", "card", str(tmp_path / "set"), "--license", "cc-by-4.0")[0] == 0
    shutil.rmtree(data)
    place, part, copy = (str(tmp_path / name) for name in ("pushed", "part", "copy"))
    assert invoke("labels", "push", str(tmp_path / "set"), place)[0] == 0
    assert files_of(tmp_path / "pushed") == files_of(tmp_path / "set")
    assert invoke("labels", "pull", place, part, "--views", "2:4")[0] == 0
    card = (tmp_path / "part/README.md").read_text()
    assert is_untouched(card)
    assert "**Views** 2..3: 46 labels" in card
    assert licence_of(card) == Licence("cc-by-4.0", None, None)
    assert invoke("labels", "pull", place, copy)[0] == 0
    make_labels(tmp_path / "copy", f"{copy}/images", views=(4, 6))  # the images of a copy are a source
    assert "**Views** 0..5" in (tmp_path / "copy/README.md").read_text()


@pytest.mark.parametrize("identifier", ["MIT License", "", "-x", "a\nb"])
def test_a_licence_that_is_no_identifier_is_refused(identifier):
    with pytest.raises(UsageError, match=r"--license must be an identifier of the Hub, such as cc-by-4\.0"):
        Licence(identifier)


def test_a_licence_name_needs_a_licence(made):
    exit_code, said = invoke("labels", "card", str(made), "--license-name", "x")
    assert (exit_code, "pass --license other as well" in said) == (2, True)


@pytest.mark.parametrize("text", ["", "---\n---\n", "---\nlicense: [a]\n---\n", "---\n- a\n---\n", "---\nlicense: *a\n---\n", "---\nlicense: X Y\n---\n"])  # fmt: skip
def test_a_header_without_a_licence_has_none(text):
    assert licence_of(text) is None


def test_a_set_is_sealed_even_where_its_card_cannot_be_written(tmp_path, caplog):
    data = write_tars(tmp_path / "data")
    labels = make_labels(tmp_path / "set", data)
    (tmp_path / "set/README.md").unlink()
    (tmp_path / "set/README.md").mkdir()
    with pytest.raises(StorageError, match=r"README\.md: Is a directory"):
        write_card(labels)
    refresh_card(labels)
    assert "the label set is sealed, but its card could not be written" in caplog.text
    assert problems_in(tmp_path / "set") == []
