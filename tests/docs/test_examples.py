"""The examples: their tables are those of the studies' JSON files, their pages are whole, and their cells are those of the ready studies."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.pages import Page, check_numbers, data_of

from trainer.studies.study import read_study

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs/examples"
STUDIES = sorted(path for path in EXAMPLES.glob("*/*.json") if not path.name.endswith("-data.json"))
PAGES = sorted(EXAMPLES.glob("*/*.html"))


def table_of(study: dict[str, Any]) -> str:
    """Return the result of a study as a Markdown table."""
    head = ["cell", "top-1, %", "lowest to highest", f"against {study['baseline']}", "p"]
    rows = [head, ["---", "--:", "--:", "--:", "--:"]]
    for cell in study["cells"]:
        top1, other = cell["top1"], cell["against_baseline"]
        difference = "" if other is None else f"{other['difference']:+.1f}"
        p = "" if other is None else f"{other['p']:.2g}"
        rows.append([cell["name"], f"{top1['mean']:.1f}", f"{top1['low']:.1f} to {top1['high']:.1f}", difference, p])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def of_path(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


@pytest.mark.parametrize("path", STUDIES, ids=of_path)
def test_the_table_of_a_study_is_that_of_its_json_file(path):
    text = (EXAMPLES / "README.md").read_text()
    linked = re.search(rf"\]\({re.escape(of_path(path))}\)", text)
    assert linked, f"README.md has no link to {of_path(path)}"
    assert table_of(json.loads(path.read_bytes())) in text[linked.start() :].split("\n#")[0]


@pytest.mark.parametrize("path", STUDIES, ids=of_path)
def test_a_study_has_the_cells_and_the_seeds_of_the_ready_one(path):
    result = json.loads(path.read_bytes())
    ready = read_study(ROOT / f"configs/studies/{path.stem}.yaml", ROOT / f"configs/scales/{path.parent.name}.yaml")
    assert {name for cell in result["cells"] for name in (cell["name"], *cell["also"])} == {
        name for cell in ready.cells for name in (cell.name, *cell.also)
    }
    assert (result["title"], result["baseline"]) == (ready.title, ready.baseline)
    assert tuple(result["seeds"]) == ready.scale.seeds
    assert result["steps"]["done"] == result["steps"]["all"]
    assert not result["failed"]


@pytest.mark.parametrize("path", PAGES, ids=of_path)
def test_a_page_needs_nothing_else_and_its_numbers_are_those_of_the_json_beside_it(path):
    assert check_numbers(path) > 150
    assert all(address.startswith(("#", "data:")) for address in Page(path.read_text()).addresses)
    assert json.loads(data_of(path).read_bytes())["studies"] == [json.loads(path.with_suffix(".json").read_bytes())]


@pytest.mark.parametrize("path", sorted(path for path in EXAMPLES.glob("*/*") if path.is_file()), ids=of_path)
def test_an_example_names_no_folder_of_the_machine_that_made_it(path):
    assert not re.findall(r"(?<![\w.:/-])/(?:home|tmp|root|work|usr|mnt|Users)/", path.read_text())
