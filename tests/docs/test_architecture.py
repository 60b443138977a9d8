"""docs/architecture.md is true: its tree, its floors, every path that it names, and the ten changes."""

import re
import runpy
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
(TREE,) = re.findall(r"## The tree\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL)
FLOORS = runpy.run_path(str(ROOT / "tests/test_floors.py"))
CHANGES = 10


def lines_of_the_tree() -> list[tuple[str, str]]:
    """Return path (a package ends with /) and line of everything in the tree, in its order."""
    found: list[tuple[str, str]] = []
    folders: list[str] = []
    for line in TREE.splitlines():
        indent = len(line) - len(line.lstrip())
        name, _, what = line.strip().partition(" ")
        del folders[indent // 2 :]
        found.append(("".join([*folders, name]), what.strip()))
        if name.endswith("/"):
            folders.append(name)
    return found


def rows_under(title: str) -> list[list[str]]:
    """Return the cells of the tables under a heading, without their first two lines."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_tree_names_every_module_once_with_a_line():
    named = [path for path, _ in lines_of_the_tree()]
    sources = [path for folder in ("pipeline", "trainer") for path in (ROOT / folder).rglob("*.*")]
    there = [path.relative_to(ROOT) for path in sources if path.suffix in (".py", ".c", ".h")]
    modules = [path.as_posix() for path in there if path.name != "__init__.py"]
    packages = [f"{path.parent.as_posix()}/" for path in there if path.name == "__init__.py"]
    wanted = {*modules, *packages, "cli.py"}
    assert (wanted - set(named), set(named) - wanted) == (set(), set())
    assert len(named) == len(set(named))
    assert [path for path, what in lines_of_the_tree() if not what] == []


def test_the_tree_lists_rooms_from_the_ground_up():
    """So a module never needs one of a room further down the page."""
    rooms = [path.split("/")[1] for path, _ in lines_of_the_tree() if re.fullmatch(r"pipeline/\w+/", path)]
    assert rooms == [room for room in FLOORS["ROOMS"] if (ROOT / "pipeline" / room).is_dir()]


def test_the_floors_are_those_of_the_test():
    rooms: dict[str, set[str]] = FLOORS["ROOMS"]
    ground: set[str] = FLOORS["GROUND"]

    @cache
    def floor_of(room: str) -> int:
        return 1 + max(map(floor_of, rooms[room]), default=-1)

    shown: dict[str, tuple[int, set[str]]] = {}
    for floor, room, may_import in rows_under("The floors"):
        names = set(may_import.split(", ")) - {""}
        shown[room] = int(floor), (names - {"ground"}) | (ground if "ground" in names else set())
    assert shown == {room: (floor_of(room), allowed) for room, allowed in rooms.items()}
    (sentence,) = re.findall(r"The \*ground\* is (.*?)\.", PAGE, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == ground


def test_every_path_that_the_page_names_exists():
    paths = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|toml))`", PAGE))
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_there_is_a_function_or_class_for_each_name_beside_a_module():
    """A row that says where something happens names it as it is called there."""
    for row in [*rows_under("The way of the data"), *rows_under("Where to go for ten typical changes")]:
        texts = [(ROOT / path).read_text() for path in re.findall(r"`((?:\w+/)*\w+\.py)`", row[-2])]
        if texts:
            for name in re.findall(r"`(\w+)`", row[-1]):
                assert any(re.search(rf"\b{name}\b", text) for text in texts), (row[-2], name)


def test_ten_changes_name_code_and_a_test_or_a_page():
    changes: list[str] = []
    for change, files, _ in rows_under("Where to go for ten typical changes"):
        changes += [files] if change else []
        changes[-1] += "" if change else f", {files}"
    assert len(changes) == CHANGES
    for files in changes:
        assert re.search(r"`(pipeline|trainer)/", files)
        assert re.search(r"`(tests|docs)/", files) or "trainer/evaluate.py" in files
