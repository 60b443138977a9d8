"""Files of strangers: each gives an error of ours that says what is wrong, in little memory and time, and writes nothing.

Every use runs in a process of its own that may take 1 GiB more than its libraries had, and a minute. What other tests refuse
already in passing (test_tampering, test_labels, test_manifest, test_sources, test_decode) is here for those two bounds.
"""

import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hostile import jail, uses
from hostile.sets import SETS
from hostile.sources import IMAGES, SOURCES
from hostile.weights import BESIDE, EXPORTS, STATES, WEIGHTS, beside
from support.label_sets import make_label_set, write_source

from pipeline.errors import CheckpointError
from trainer.checkpoint import save_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with images and the label set of them."""
    root = tmp_path_factory.mktemp("made")
    write_source(root / "images")
    make_label_set(root / "images", root / "set")
    return root


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of the set with its images beside it."""
    shutil.copytree(made / "images", tmp_path / "images")
    return Path(shutil.copytree(made / "set", tmp_path / "set"))


def refused(use, path: Path, text: str, error: str = "") -> None:
    """Use a file, and check the error, and that nothing was written beside it, which is the working folder too."""
    before = jail.listing(path.parent)
    outcome = jail.used(use, path)
    assert outcome.error.startswith("DeitCliError"), outcome
    assert outcome.error.endswith(error), outcome
    assert re.search(text, outcome.text), outcome
    assert "\n" not in outcome.text
    assert "\x1b" not in outcome.text
    assert jail.listing(path.parent) == before


@pytest.mark.parametrize(("name", "change", "text"), SETS, ids=[name for name, *_ in SETS])
def test_a_label_set_that_lies_is_refused_by_reading_verifying_and_training(folder, name, change, text):
    change(folder)
    refused(uses.read_set, folder, text)
    refused(uses.verify_set, folder, ".")
    refused(uses.train_on_set, folder, ".")


@pytest.mark.parametrize("use", [uses.read_set, uses.verify_set, uses.train_on_set])
def test_the_sound_set_is_fine(made, use):
    """What the tests of label sets rest on."""
    outcome = jail.used(use, made / "set")
    assert outcome.error == "fine", outcome


@pytest.mark.parametrize("part", ["labels", "samples"])
def test_nothing_is_written_through_a_folder_that_is_a_link(folder, part):
    outside = folder.parent / "elsewhere"
    (folder / part).rename(outside)
    (folder / part).symlink_to(outside)
    refused(uses.extend_set, folder, "points outside the label set")


@pytest.mark.parametrize(("name", "build", "error", "text"), SOURCES, ids=[name for name, *_ in SOURCES])
def test_a_source_that_lies_is_refused(tmp_path, name, build, error, text):
    (
        tmp_path / "data"
    ).mkdir()  # some return the folder itself: what other tests left running may write beside tmp_path
    path = build(tmp_path / "data")
    if error is not None:
        return refused(uses.read_source, path, text, error)
    before = jail.listing(tmp_path)
    assert jail.used(uses.read_source, path).error == "fine"  # what lies in it is not looked at
    assert jail.listing(tmp_path) == before


@pytest.mark.parametrize(("name", "data", "text"), IMAGES, ids=[name for name, *_ in IMAGES])
def test_an_image_that_unpacks_without_end_is_refused(tmp_path, name, data, text):
    path = tmp_path / "a.jpg"
    path.write_bytes(data())
    assert path.stat().st_size < 1 << 20
    refused(uses.read_image, path, text, "BadImageError")


@pytest.mark.parametrize(("name", "build", "text"), WEIGHTS, ids=[name for name, *_ in WEIGHTS])
def test_weights_that_lie_are_refused_as_start_and_as_teacher(tmp_path, name, build, text):
    path = build(tmp_path)
    refused(uses.start, path, text, "CheckpointError")
    refused(uses.teach, path, ".", "TeacherError")
    assert not (tmp_path / "pwned").exists()


@pytest.fixture(scope="module")
def sound_mib(tmp_path_factory) -> int:
    """What the same weights take with nothing beside them, the libraries' own first use included."""
    return jail.used(uses.start, beside(None)(tmp_path_factory.mktemp("sound"))).mib


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("name", "value"), BESIDE, ids=[name for name, _ in BESIDE])
def test_numpy_values_that_lie_beside_sound_weights_are_ignored(tmp_path, name, value, legacy, sound_mib):
    path = beside(value, legacy=legacy)(tmp_path)
    outcome = jail.used(uses.start, path)
    assert (outcome.error, outcome.text) == ("fine", "")
    assert outcome.mib < sound_mib + 32
    refused(uses.teach, path, "Pass the --teacher that it was saved from", "TeacherError")  # after the same reading


@pytest.mark.parametrize(("name", "build", "text"), EXPORTS, ids=[name for name, *_ in EXPORTS])
def test_an_exported_folder_that_lies_is_refused(tmp_path, name, build, text):
    path = build(tmp_path)
    refused(uses.evaluate, path, text, "CheckpointError")
    refused(uses.teach_from_folder, path, ".", "TeacherError")


@pytest.mark.parametrize(("name", "data"), STATES, ids=[name for name, _ in STATES])
def test_a_state_that_lies_is_refused(tmp_path, name, data):
    path = tmp_path / "state.safetensors"
    path.write_bytes(data())
    refused(uses.state, path, "not a complete checkpoint|is damaged|not the state of a run", "CheckpointError")


def test_the_sound_weights_are_fine(tmp_path):
    student = uses.small_student()
    safetensors.torch.save_file(student.model.state_dict(), tmp_path / "w.safetensors")
    torch.save(student.model.state_dict(), tmp_path / "w.pth")
    save_state(tmp_path / "state.safetensors", {"x": torch.zeros(2)}, {"next_update": 0})
    for use, name in ((uses.start, "w.safetensors"), (uses.start, "w.pth"), (uses.state, "state.safetensors")):
        assert jail.used(use, tmp_path / name).error == "fine"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        uses.start(tmp_path / "none.pth")
