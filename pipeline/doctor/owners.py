"""Checks of the import names `pipeline`, `trainer` and `cli`: their locations and the distributions that own them.

These are common names. Another distribution may install the same names, and a folder with such a name hides ours from
programs that are started in its parent folder.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from pipeline.doctor.findings import Section
from pipeline.doctor.probing import TIMEOUT_S

OURS = ("pipeline", "trainer", "cli")
DISTRIBUTION = "deit-cli"
_RESOLVE = """
import importlib.util, json
found = {}
for name in NAMES:
    try:
        spec = importlib.util.find_spec(name)
    except Exception:
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec else []
    found[name] = spec and (spec.origin or (places or [None])[0])
print(json.dumps(found))
"""


def examine_names(folder: Path) -> Section:
    """Return findings on the locations of our names for a new interpreter in a folder, and for one that ignores the folder.

    Args:
        folder: folder in which programs are started: the working directory.
    """
    section, installed = Section("names"), metadata.packages_distributions()
    here, elsewhere = _resolved(folder, safe=False), _resolved(folder, safe=True)
    for name in OURS:
        found = elsewhere[name] or here[name]
        several = owners_of(name, installed)
        owned_by = " and ".join(f"{owner} {metadata.version(owner)}" for owner in several) or "of no installed package"
        section.row(name, f"{found or 'nowhere'}  ({owned_by})", {"path": found, "owners": several})
        if len(several) > 1:
            section.problem(
                f"{' and '.join(several)} both own the name {name}: the one installed last has overwritten the other",
                f"Install {DISTRIBUTION} in a separate environment (python -m venv .venv), or uninstall the other and run"
                f" pip install --force-reinstall {DISTRIBUTION}",
            )
    if nowhere := [name for name in OURS if not here[name] and not elsewhere[name]]:
        section.problem(
            f"a new interpreter cannot import {', '.join(nowhere)}", f"pip install --force-reinstall {DISTRIBUTION}"
        )
    for name in OURS:
        found = elsewhere[name] or here[name]
        if found and not found.endswith(".py"):
            section.problem(
                f"{name} is the folder {found}, which has no __init__.py: it belongs to another project or an old installation",
                f"Delete or rename it, then pip install --force-reinstall {DISTRIBUTION}",
            )
    if shadowed := [name for name in OURS if elsewhere[name] and here[name] != elsewhere[name]]:
        theirs = ", ".join(sorted({str(_root(elsewhere[name] or "")) for name in shadowed}))
        # A checkout does no harm as long as its code is the installed code.
        same = all(_code(here[name]) == _code(elsewhere[name]) for name in shadowed)
        (section.warning if same else section.problem)(
            f"programs started in {folder} import {', '.join(shadowed)} from there, not from {theirs}",
            ("The files are equal today. " if same else "")
            + "Start programs in another folder, rename these files, or set PYTHONSAFEPATH=1",
        )
    if alone := [name for name in OURS if here[name] and not elsewhere[name]]:
        section.warning(f"{', '.join(alone)} can be imported only in {folder}", "pip install -e .")
    _places(section, [path for path in elsewhere.values() if path])
    return section


def _code(found: str | None) -> dict[str, bytes]:
    """Return the Python files of a module or package by name, with their bytes."""
    path = Path(found or "")
    files = path.parent.rglob("*.py") if path.name == "__init__.py" else [path] if path.is_file() else []
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def owners_of(name: str, installed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the normalised names of the distributions that have installed a top-level name.

    Args:
        name: top-level import name.
        installed: result of `metadata.packages_distributions`, which is slow.
    """
    # A damaged distribution has no name.
    return sorted({owner.lower().replace("_", "-") for owner in installed.get(name, ()) if owner})


def _places(section: Section, paths: Sequence[str]) -> None:
    """Check that our names are in one folder, and that our distribution was installed there."""
    roots, homes = {_root(path) for path in paths}, _homes()
    if len(roots) > 1:
        section.problem(
            f"{', '.join(OURS)} come from {len(roots)} folders: {', '.join(map(str, sorted(roots)))}",
            f"Another project has these names, too: install {DISTRIBUTION} in a separate environment (python -m venv .venv)",
        )
    elif roots and homes and not roots & set(homes):
        section.warning(
            f"programs import these names from {min(roots)}, but {DISTRIBUTION} is installed from {homes[0]}",
            f"Unset PYTHONPATH if it names {min(roots)}, or pip install -e it; files of an older installation there can be deleted",
        )


def _root(path: str) -> Path:
    """Return the folder of a resolved name: the parent of the package folder or of the module."""
    place = Path(path).resolve()
    return place.parent.parent if place.name == "__init__.py" else place.parent


def _resolved(folder: Path, *, safe: bool) -> dict[str, str | None]:
    """Return where a new interpreter finds our names; with `safe`, it ignores the folder in which it starts."""
    options = ["-P"] if safe else []
    code = f"NAMES = {OURS!r}{_RESOLVE}"
    try:
        done = subprocess.run(
            [sys.executable, *options, "-c", code], cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return dict.fromkeys(OURS)


def _homes() -> list[Path]:
    """Return the folders that our distribution is installed in, or the checkout of an editable installation."""
    homes: list[Path] = []
    for found in metadata.distributions(name=DISTRIBUTION):
        home = Path(str(found.locate_file("")))
        with contextlib.suppress(ValueError, TypeError, KeyError):
            told = json.loads(found.read_text("direct_url.json") or "{}")
            if told["dir_info"]["editable"]:
                home = Path(url2pathname(urlparse(told["url"]).path))
        homes.append(home.resolve())
    return homes
