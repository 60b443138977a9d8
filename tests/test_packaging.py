"""What surrounds the code: one version everywhere, dependencies with a reason, files that GitHub reads, and what the sdist and the wheel contain."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.commands import invoke

from pipeline.doctor.packages import Package
from pipeline.storage.yaml import read_yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[0-9]-*.yml"))
NOT_IMPORTED = {"torchvision"}  # timm imports it


# --- version ----------------------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert metadata.version("deit-cli") == version, 'an older installation: run pip install -e ".[test]" again'
    code, said = invoke("--version")
    assert (code, said.split()[-2:]) == (0, ["version", version])
    assert read_yaml(ROOT / "CITATION.cff")["version"] == version
    assert re.search(rf"^## (Unreleased|{re.escape(version)})\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


# --- dependencies -----------------------------------------------------------------------------------------------------


def imported() -> set[str]:
    """Return the top-level names that the package imports."""
    found = set()
    for path in (ROOT / "cli.py", *ROOT.glob("pipeline/**/*.py"), *ROOT.glob("trainer/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found |= {
                    arg.value.split(".")[0]
                    for arg in node.args
                    if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
                }
    return found


def test_every_package_that_is_required_is_imported():
    names = {Requirement(line).name for line in PROJECT["dependencies"]} - NOT_IMPORTED
    modules = {Package(name, name, None, True).module for name in names}
    assert modules - imported() == set()


def test_every_requirement_has_a_lowest_version_and_a_reason():
    lines = re.findall(
        r'^    "([\w.-]+(?:\[[^]]*\])?)(.*?)",(.*)$', TEXT.partition("[project.scripts]")[0], re.MULTILINE
    )
    required = [each for each in lines if re.match("[>;]", each[1])]
    assert {name.lower() for name, _, _ in required} >= {Requirement(x).name.lower() for x in PROJECT["dependencies"]}
    for name, bound, reason in required:
        assert bound.startswith(">="), name
        assert reason.startswith("  # ") or name == "pytest", name


# --- GitHub -----------------------------------------------------------------------------------------------------------


def steps() -> list[dict[str, Any]]:
    return [step for job in read_yaml(WORKFLOW)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", [WORKFLOW]),
        ("custom.github-workflows-require-timeout", [WORKFLOW]),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [ROOT / ".github/ISSUE_TEMPLATE/config.yml"]),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_have_their_schema(schema, files):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_may_only_read_and_its_actions_are_pinned():
    assert read_yaml(WORKFLOW)["permissions"] == {"contents": "read"}
    actions = [step["uses"] for step in steps() if "uses" in step]
    assert len(actions) >= 4
    assert [each for each in actions if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", each)] == []
    lines = re.findall(r"uses: .*", WORKFLOW.read_text())
    assert all(re.search(r" # v\d+\.\d+\.\d+$", line) for line in lines)


def test_the_workflow_tries_every_python_and_the_lowest_torch():
    matrix = read_yaml(WORKFLOW)["jobs"]["tests"]["strategy"]["matrix"]
    named = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert matrix["python"] == named
    assert f">={named[0]}" == PROJECT["requires-python"]
    (torch,) = (Requirement(line) for line in PROJECT["dependencies"] if Requirement(line).name == "torch")
    assert f">={matrix['torch'][0]}" == str(torch.specifier)


def test_the_workflow_calls_scripts_that_run():
    called = {word for step in steps() for word in step.get("run", "").split() if word.startswith(".ci/")}
    assert called == {".ci/run", ".ci/lowest", ".ci/package"}
    for script in (ROOT / name for name in called):
        subprocess.run(["bash", "-n", script], check=True)
        if script.name != "run":
            assert script.stat().st_mode & 0o111
    tests = re.findall(r"tests/[\w/.]+", (ROOT / ".ci/lowest").read_text())
    assert len(tests) > 10
    assert [each for each in tests if not (ROOT / each).exists()] == []


# --- sdist and wheel --------------------------------------------------------------------------------------------------


def built(kind: str, tree: Path, out: Path) -> Path:
    """Build an sdist or a wheel of a folder with the installed setuptools; nothing is compiled."""
    code = f"from setuptools import build_meta; import sys; print(build_meta.build_{kind}(sys.argv[1]))"
    no_compiler = {"PATH": "/usr/bin:/bin", "CC": "false"}  # the kernel is optional
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tree, env=no_compiler, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> tuple[Path, list[str]]:
    """Return a copy of the files that git tracks, and their names."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a checkout of git")
    folder = tmp_path_factory.mktemp("package") / "tree"
    names = sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder, names


@pytest.fixture(scope="module")
def sdist(tracked) -> Path:
    """Return the unpacked sdist."""
    folder, _ = tracked
    archive = built("sdist", folder, folder.parent)
    with tarfile.open(archive) as tar:
        tar.extractall(folder.parent / "unpacked", filter="data")
    return folder.parent / "unpacked" / archive.name.removesuffix(".tar.gz")


@pytest.mark.slow
def test_the_sdist_is_the_checkout(tracked, sdist):
    found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in found if name.startswith("deit_cli.egg-info/"))}
    assert sorted(found - made) == tracked[1]


@pytest.mark.slow
def test_the_wheel_of_the_sdist_has_the_code_and_nothing_else(tracked, sdist, tmp_path):
    wheel = zipfile.ZipFile(built("wheel", sdist, tmp_path))
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = {name for name in tracked[1] if re.fullmatch(r"cli\.py|(pipeline|trainer)/.*(?<!\.c)(?<!\.h)", name)}
    assert found == code
    assert {"trainer/evidence/templates/report.html", "cli.py"} <= found
    said = wheel.read(f"deit_cli-{PROJECT['version']}.dist-info/METADATA").decode()
    assert f"\nVersion: {PROJECT['version']}\n" in said
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_page_of_the_command_line_has_every_extra():
    _, _, below = (ROOT / "docs/cli.md").read_text().partition("\n## Extras\n")
    rows = [line.split("|")[1] for line in below.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(PROJECT["optional-dependencies"])
