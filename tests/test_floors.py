"""The house: a module imports only what stands before it in this list, and third parties only where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. `trainer` never imports the names in TEACHER_SIDE.
ORDER = [
    "pipeline.errors", "pipeline.repeats", "pipeline.crash", "pipeline.storage.ids", "pipeline.text", "pipeline.labels.remedies", "pipeline.labels.pins", "pipeline.labels.comparing", "pipeline.storage.urls",
    "pipeline.storage.staging", "pipeline.views.draws", "pipeline.storage.yaml", "pipeline.views.recipe", "pipeline.settings.configs", "pipeline.settings.files",
    "pipeline.settings.options",
    "pipeline.storage.atomic", "pipeline.storage.remote", "pipeline.weights", "pipeline.storage.uploads", "pipeline.storage.downloads", "pipeline.storage.mirror",
    "pipeline.storage.cache",
    "pipeline.storage.records", "pipeline.images.turbojpeg", "pipeline.images.decode", "pipeline.labels.parquet_guard", "pipeline.labels.encoding", "pipeline.labels.tables",
    "pipeline.exchange.imported", "pipeline.labels.manifest",
    "pipeline.images.samples", "pipeline.images.tar_archive", "pipeline.images.tars", "pipeline.images.parquet", "pipeline.images.source",
    "pipeline.machine.devices", "pipeline.tensors", "pipeline.views.randaugment", "pipeline.views.view", "pipeline.views.mixing", "pipeline.labels.labelset",
    "pipeline.labels.replay",
    "pipeline.machine.loaders", "pipeline.machine.timing", "pipeline.machine.ranks", "pipeline.stage1.rendering", "pipeline.teacher.teacher", "pipeline.teacher.loading",
    "pipeline.machine.progress", "pipeline.machine.threads",
    "pipeline.exchange.fkd", "pipeline.exchange.tinyvit", "pipeline.exchange.importing",
    "pipeline.stage1.drafts", "pipeline.stage1.indexing", "pipeline.labels.sealing", "pipeline.stage1.outputs", "pipeline.stage1.packing", "pipeline.stage1.loop",
    "pipeline.labels.summary", "pipeline.labels.card", "pipeline.sharing.merging",
    "pipeline.sharing.subsets", "pipeline.sharing.unions", "pipeline.storage.place", "pipeline.sharing.transfer",
    "pipeline.stage1.dispatch", "pipeline.stage1.engines", "pipeline.stage1.ray", "pipeline.stage1.precompute", "pipeline.stage1.extending", "pipeline.cost.measuring",
    "pipeline.cost.estimate", "pipeline.exchange.export", "pipeline.sharing.signing", "pipeline.verify.relabel", "pipeline.verify.report", "pipeline.verify.images",
    "pipeline.verify.verify", "pipeline.tables",
    "pipeline.doctor.findings", "pipeline.doctor.machine", "pipeline.doctor.places", "pipeline.doctor.buckets", "pipeline.doctor.probing",
    "pipeline.doctor.owners", "pipeline.doctor.packages", "pipeline.doctor.examine", "pipeline.doctor",
    "pipeline",
    "trainer.config", "trainer.order", "trainer.batch", "trainer.stream", "trainer.student", "trainer.starts", "trainer.parallel",
    "trainer.losses", "trainer.optim",
    "trainer.checkpoint", "trainer.trackers", "trainer.metrics", "trainer.pace", "trainer.console", "trainer.stopping", "trainer.evaluate",
    "trainer.run", "trainer.loop", "trainer.measuring", "trainer.demo", "trainer",
    "cli",
]  # fmt: skip
TEACHER_SIDE = {
    "pipeline.teacher.teacher",
    "pipeline.teacher.loading",
    "pipeline.stage1.loop",
    "pipeline.stage1.dispatch",
    "pipeline.stage1.engines",
    "pipeline.stage1.ray",
    "pipeline.stage1.precompute",
    "pipeline.stage1.drafts",
    "pipeline.stage1.indexing",
    "pipeline.stage1.packing",
    "pipeline.stage1.outputs",
    "pipeline.labels.summary",
    "pipeline.labels.card",
    "pipeline.exchange.export",
    "pipeline.cost.measuring",
    "pipeline.cost.estimate",
    "pipeline.tables",
    "pipeline.verify.relabel",
    "pipeline.verify.report",
    "pipeline.verify.images",
    "pipeline.verify.verify",
}

# Third parties, and the only modules that may import them.
KEEPERS = {
    "click": {"cli", "pipeline.settings.options", "trainer.console"},
    "rich": {"trainer.console"},
    "timm": {
        "pipeline.tensors",
        "pipeline.teacher.loading",
        "trainer.student",
        "trainer.starts",
        "trainer.optim",
        "trainer.run",
    },
    "pyarrow": {"pipeline.labels.tables", "pipeline.exchange.imported", "pipeline.images.parquet"},
    "pydantic": {
        "pipeline.teacher.loading",
        "pipeline.storage.records",
        "pipeline.labels.tables",
        "pipeline.exchange.imported",
        "pipeline.labels.manifest",
        "pipeline.labels.labelset",
    },
    "yaml": {"pipeline.storage.yaml"},
    "fsspec": {"pipeline.storage.remote"},
    "aiohttp": {"pipeline.storage.remote"},
    "huggingface_hub": {"pipeline.storage.uploads"},
    "matplotlib": {"pipeline.labels.summary", "trainer.demo"},
    "PIL": {"pipeline.images.decode", "pipeline.doctor.probing", "trainer.demo"},
    "cv2": {"pipeline.views.randaugment", "pipeline.machine.loaders"},
    "ray": {"pipeline.stage1.ray"},
    "model_signing": {"pipeline.sharing.signing"},
    "webdataset": {"trainer.demo"},
    "sklearn": {"trainer.demo"},
}
NO_TORCH = set(ORDER[: ORDER.index("pipeline.machine.devices")]) | {"trainer.config", "trainer.order", "cli"}


def modules() -> dict[str, Path]:
    paths = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("trainer/**/*.py"), ROOT / "cli.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(path: Path) -> set[str]:
    """Return every dotted name that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_place_in_the_order():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_before_it(name):
    ours = imports(modules()[name]) & set(ORDER) - {"pipeline", "pipeline.doctor", "trainer"}
    assert {other for other in ours if ORDER.index(other) >= ORDER.index(name)} == set()


@pytest.mark.parametrize("name", [name for name in ORDER if name.startswith("trainer")])
def test_the_trainer_never_imports_the_teachers_side(name):
    assert imports(modules()[name]) & TEACHER_SIDE == set()


@pytest.mark.parametrize("name", [name for name in ORDER if name.startswith("pipeline")])
def test_the_pipeline_never_imports_the_trainer(name):
    assert not any(other.split(".")[0] == "trainer" for other in imports(modules()[name]))


@pytest.mark.parametrize("name", ORDER)
def test_third_parties_stand_only_where_they_belong(name):
    roots = {other.split(".")[0] for other in imports(modules()[name])}
    assert {party for party in roots & set(KEEPERS) if name not in KEEPERS[party]} == set()
    assert not (name in NO_TORCH and roots & {"torch", "torchvision"})


def test_no_module_draws_from_a_global_random_state():
    allowed = {
        "trainer.run",
        "trainer.loop",
        "pipeline.teacher.loading",
    }  # torch.manual_seed: initial weights and stochastic depth
    for name, path in modules().items():
        assert "random" not in imports(path), name
        text = path.read_text()
        assert "np.random.default_rng" not in text, name
        assert "np.random.seed" not in text, name
        assert name in allowed or "manual_seed" not in text, name


def test_only_a_label_set_opens_the_location_in_its_plan():
    """Its own images go before it, and a URL that a stranger wrote into a plan is not opened unasked."""
    for name, path in modules().items():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        opened = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith("open_source")]
        assert not [call for call in opened if "source.location" in call], name
