"""The public names: tests/public_api.txt has each of them with its signature, so that none changes unnoticed.

After an intended change, write it again with `python tests/test_public_api.py`, and name the change in CHANGELOG.md.
"""

import ast
import inspect
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_name("public_api.txt")
Definition = ast.FunctionDef | ast.ClassDef


def packages() -> tuple[ModuleType, ...]:
    import pipeline
    import trainer

    return pipeline, trainer


class Values(ast.NodeTransformer):
    """Puts the value in the place of a name such as `TrainConfig.seed`, so that a changed default is a changed signature."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        value = eval(ast.unparse(node), self._names)
        return ast.Constant(value) if isinstance(value, str | int | float | None) else node


def definition_of(thing: Any) -> Definition:
    """Return the source of a class or function; its defaults are values."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(node, Definition)
    values = Values(vars(sys.modules[thing.__module__]))
    for each in (node, *node.body):
        if isinstance(each, ast.FunctionDef):
            each.args.defaults = [values.visit(default) for default in each.args.defaults]
            each.args.kw_defaults = [default and values.visit(default) for default in each.args.kw_defaults]
        elif isinstance(each, ast.AnnAssign) and each.value is not None and isinstance(node, ast.ClassDef):
            each.value = values.visit(each.value)
    return node


def signature(node: ast.FunctionDef) -> str:
    """Return the arguments and the result of a function as they are written."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def members(node: ast.ClassDef) -> Iterator[tuple[str, str, ast.AST]]:
    """Yield name, signature and node of each public attribute, property and method of a class, and of its constructor."""
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.target.id[0] != "_":
            default = f" = {ast.unparse(each.value)}" if each.value else ""
            kind = (
                each.annotation
            )  # of Annotated only the type: the limits of a recipe's fields have tests of their own
            if (
                isinstance(kind, ast.Subscript)
                and isinstance(kind.slice, ast.Tuple)
                and ast.unparse(kind.value) == "Annotated"
            ):
                kind = kind.slice.elts[0]
            yield each.target.id, f": {ast.unparse(kind)}{default}", each
        if isinstance(each, ast.FunctionDef) and (each.name[0] != "_" or each.name in ("__init__", "__getitem__")):
            kinds = [ast.unparse(kind) for kind in each.decorator_list]
            yield each.name, f"{signature(each)}{''.join(f' @{kind}' for kind in kinds)}", each


def table() -> str:
    lines: list[str] = []
    for package in packages():
        for name in package.__all__:
            node = definition_of(getattr(package, name))
            lines.append(f"{package.__name__}.{name}{signature(node) if isinstance(node, ast.FunctionDef) else ''}")
            if isinstance(node, ast.ClassDef):
                lines += [f"    {member}{text}" for member, text, _ in members(node)]
    return "\n".join(lines) + "\n"


def test_no_public_name_changes_unnoticed():
    assert table() == TABLE.read_text(), "after an intended change: python tests/test_public_api.py"


def test_every_public_name_and_member_says_what_it_is():
    for package in packages():
        for name in package.__all__:
            node = definition_of(getattr(package, name))
            assert first_line(node).endswith((".", ":")), (name, first_line(node))
            for member, _, of_member in members(node) if isinstance(node, ast.ClassDef) else ():
                if isinstance(of_member, ast.FunctionDef) and member != "__init__":  # its class may say it all
                    assert first_line(of_member).endswith((".", ":")), (name, member)


def first_line(node: Definition) -> str:
    return (ast.get_docstring(node) or "").split("\n\n")[0].strip()


def test_names_are_sorted_and_are_where_a_checker_of_types_looks():
    for package in packages():
        assert [*package.__all__] == sorted(package.__all__)
        assert set(package.__all__) == set(package._HOMES)
        assert set(package.__all__) <= set(dir(package))
        (block,) = [node for node in ast.parse(inspect.getsource(package)).body if isinstance(node, ast.If)]
        imported = {
            alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert imported == package._HOMES


def test_a_name_that_there_is_not():
    for package in packages():
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing


def test_the_packages_import_nothing_heavy_until_a_name_is_used():
    code = (
        "import sys, pipeline, trainer; heavy = {'torch', 'timm', 'pyarrow', 'pydantic', 'numpy'};"
        " print(sorted(heavy & set(sys.modules))); trainer.create_student; print('timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


def test_both_packages_are_typed_when_they_are_installed():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("pipeline", "trainer"):
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in data[package]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TABLE.write_text(table())
