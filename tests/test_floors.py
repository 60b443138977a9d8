"""The house: a room imports only the rooms that this table gives it, and third parties stand only where they belong."""

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

GROUND = {"errors", "repeats", "crash", "text"}  # modules that every room may import
# What each room may import, from the ground up: docs/architecture.md has a line on each.
ROOMS = {
    "errors": set(),
    "repeats": set(),
    "crash": set(),
    "text": {"errors"},
    "storage": GROUND,
    "machine": GROUND,
    "weights": GROUND | {"storage"},
    "images": GROUND | {"storage", "machine"},
    "views": GROUND | {"storage", "images"},
    "pixels": GROUND | {"images", "views"},
    "labels": GROUND | {"storage", "images", "views", "pixels"},
    "overview": GROUND | {"storage", "images", "views", "labels"},
    "settings": GROUND | {"storage", "images", "views", "labels"},
    "sharing": GROUND | {"storage", "machine", "labels", "overview"},
    "doctor": GROUND | {"storage", "images", "views", "pixels", "labels"},
    "teacher": GROUND | {"weights", "machine", "views", "pixels", "labels", "settings"},
    "stage1": GROUND | {"storage", "machine", "images", "views", "pixels", "labels", "overview", "settings", "teacher"},
    "verify": GROUND | {"storage", "machine", "images", "views", "labels", "settings", "sharing", "teacher"},
    "exchange": GROUND | {"storage", "machine", "images", "views", "labels", "overview", "settings", "stage1"},
    "cost": GROUND | {"machine", "images", "views", "pixels", "labels", "settings", "teacher", "stage1"},
    "pipeline": {"labels", "views", "pixels", "images", "stage1"},  # the public names
    "trainer": GROUND | {"storage", "machine", "weights", "images", "views", "pixels", "labels", "settings"},
    "evidence": GROUND
    | {"storage", "machine", "weights", "images", "views", "pixels", "labels", "overview", "settings", "trainer"},
    "studies": GROUND | {"storage", "machine", "images", "views", "labels", "settings", "trainer", "evidence"},
    "exports": GROUND | {"storage", "images", "overview", "settings", "trainer", "evidence"},
}
MOST_MODULES = 13  # in a room; evidence has most

# Third parties, and the only rooms or modules that may import them.
KEEPERS = {
    "click": {"cli", "pipeline.settings", "trainer.console"},
    "rich": {"trainer.console", "pipeline.text"},
    "timm": {"pipeline.weights", "pipeline.teacher", "trainer.student", "trainer.weights", "trainer.optim", "trainer.run", "trainer.export", "trainer.exports.export"},
    "pyarrow": {"pipeline.labels.tables", "pipeline.labels.parquet_guard", "pipeline.exchange.imports", "pipeline.images.parquet", "pipeline.images.index", "pipeline.images.columns", "pipeline.images.labels_file", "pipeline.images.samples", "trainer.evidence.scores", "trainer.studies.images"},
    "pydantic": {"pipeline.exchange.import_record", "pipeline.storage.json", "pipeline.views.recipe", "pipeline.teacher.loading", "pipeline.labels.tables", "pipeline.labels.manifest", "pipeline.labels.comparing"},
    "yaml": {"pipeline.storage.yaml"},
    "fsspec": {"pipeline.storage.remote", "pipeline.storage.stores"},
    "aiohttp": {"pipeline.storage.stores"},
    "huggingface_hub": {"pipeline.storage.stores", "trainer.exports.card", "trainer.exports.push"},
    "onnx": {"trainer.exports.onnx_file"},
    "onnxruntime": {"trainer.exports.onnx_file"},
    "matplotlib": {"pipeline.overview.sheet", "trainer.evidence.demo", "trainer.evidence.plots", "trainer.evidence.tokens"},
    "jinja2": {"trainer.evidence.page"},
    "markupsafe": {"trainer.evidence.page"},
    "PIL": {"pipeline.images.decode", "pipeline.doctor.probing", "trainer.evidence.demo", "trainer.evidence.audit_files"},
    "cv2": {"pipeline.pixels.renderer1"},
    "ray": {"pipeline.stage1.ray", "trainer.studies.running"},
    "model_signing": {"pipeline.sharing.signing"},
    "webdataset": {"pipeline.exchange.export", "trainer.evidence.demo"},
    "scipy": {"trainer.studies.results", "pipeline.images.labels_file"},
    "sklearn": {"trainer.evidence.demo"},
}  # fmt: skip
NO_TORCH = {"storage", "images", "settings", "sharing", "doctor"}  # rooms; pixels and networks are elsewhere
NO_TORCH_MODULES = {
    "cli", "trainer.config", "trainer.order", "trainer.evidence.audit", "trainer.studies.study", "trainer.studies.images", "trainer.studies.steps", "trainer.studies.keeper", "trainer.exports.config", "pipeline.views.draws", "pipeline.views.exact", "pipeline.views.noise", "pipeline.views.recipe", "pipeline.views.randaugment", "pipeline.views.view", "pipeline.views.pairs", "pipeline.pixels.packed", "pipeline.pixels.kernel", "pipeline.pixels.render",
    "pipeline.labels.format", "pipeline.labels.encoding", "pipeline.labels.tables", "pipeline.labels.manifest",
    "pipeline.labels.labelset", "pipeline.labels.checked_files", "pipeline.labels.sealing", "pipeline.labels.comparing", "pipeline.overview.summary",
    "pipeline.overview.card", "pipeline.labels.combined", "pipeline.overview.recipes", "trainer.folders",
}  # fmt: skip


def modules() -> dict[str, Path]:
    paths = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("trainer/**/*.py"), ROOT / "cli.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


MODULES = modules()


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Return every dotted name that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def ours(name: str) -> set[str]:
    """Return the modules of this project that a module imports; packages hold nothing that could be imported."""
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    return (imports(MODULES[name]) & set(MODULES)) - packages


def room_of(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "trainer" and len(parts) > 1 and parts[1] in ("evidence", "studies", "exports"):
        return parts[1]
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else parts[0]


def test_every_module_lives_in_a_room_and_no_room_is_crowded():
    assert {room_of(name) for name in MODULES} == set(ROOMS) | {"cli"}
    for room in ROOMS.keys() - {"trainer", "pipeline"}:
        inside = [name for name in MODULES if room_of(name) == room and MODULES[name].name != "__init__.py"]
        assert len(inside) <= MOST_MODULES, room


def test_the_rooms_stand_on_floors():
    TopologicalSorter(ROOMS).prepare()  # raises where two rooms need each other


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_the_rooms_that_it_may(room):
    used = {(name, other) for name in MODULES if room_of(name) == room for other in ours(name)}
    assert {(a, b) for a, b in used if room_of(b) not in ROOMS[room] | {room}} == set()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_modules_of_a_room_stand_on_floors(room):
    inside = {name for name in MODULES if room_of(name) == room}
    TopologicalSorter({name: ours(name) & inside for name in inside}).prepare()


@pytest.mark.parametrize("party", sorted(KEEPERS))
def test_third_parties_stand_only_where_they_belong(party):
    users = {name for name in MODULES if party in {other.split(".")[0] for other in imports(MODULES[name])}}
    assert {user for user in users if not {user, user.rpartition(".")[0]} & KEEPERS[party]} == set()


def test_torch_stands_where_pixels_or_networks_are():
    users = {name for name in MODULES if {o.split(".")[0] for o in imports(MODULES[name])} & {"torch", "torchvision"}}
    assert {user for user in users if room_of(user) in NO_TORCH or user in NO_TORCH_MODULES} == set()


def test_no_module_draws_from_a_global_random_state():
    allowed = {
        "trainer.run",
        "trainer.loop",
        "pipeline.teacher.loading",
    }  # torch.manual_seed: weights, stochastic depth
    for name, path in MODULES.items():
        assert "random" not in imports(path), name
        text = path.read_text()
        assert "np.random.default_rng" not in text, name
        assert "np.random.seed" not in text, name
        assert name in allowed or "manual_seed" not in text, name


def test_only_storage_asks_whether_a_location_is_a_url():
    """Others open it, and get a place or file that knows."""
    users = {name for name in MODULES if "is_url" in MODULES[name].read_text()}
    assert {name for name in users if room_of(name) != "storage"} == set()
    users = {
        name
        for name in MODULES
        if re.search(r"isinstance\([^)]*\b(RemoteFile|LocalFile|Place)\b", MODULES[name].read_text())
    }
    assert users == set()


def test_only_a_label_set_opens_the_location_in_its_plan():
    """Its own images go before it, and a URL that a stranger wrote into a plan is not opened unasked."""
    for name, path in MODULES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        opened = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith("open_source")]
        assert not [call for call in opened if "source.location" in call], name
