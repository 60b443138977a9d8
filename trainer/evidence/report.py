"""`deit-cli report`: what studies, runs and label sets show, on one page and as JSON.

`report-data.json` holds every value of the page, which is made from it alone (`page.render_page`).
"""

import base64
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import StorageError, UsageError
from pipeline.labels.format import PLAN_NAME
from pipeline.labels.labelset import LabelSet
from pipeline.overview.summary import summarise
from pipeline.storage.atomic import replace_file, sha256_file
from pipeline.storage.json import pretty_json, read_json
from pipeline.storage.urls import local_path
from trainer.config import ReportConfig
from trainer.evidence.gallery import Picture, most_apart
from trainer.evidence.networks import WEIGHTS, exported_folder, name_of_run, run_in, unique
from trainer.evidence.page import render_page
from trainer.metrics import METRICS_NAME, read_metrics
from trainer.run import CONFIG_NAME

EXPORTED = (*WEIGHTS, "last-ema")  # folders of a run with weights
KINDS = ("study", "scores", "analysis", "audit", "speed")  # of the JSON files that evidence writes
PACKAGES = ("deit-cli", "torch", "torchvision", "timm", "numpy", "pyarrow")
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what a JSON of another shape raises
SHOWN = 10  # rows of a table of the weakest, the largest or the most suspect
CURVE_POINTS = range(
    8, 37
)  # a curve has so many points, each the mean over at least LINES_OF_A_POINT lines if there are enough
LINES_OF_A_POINT = 5
COSTS = ("teacher_s", "labelling_s", "student_s")  # of a cell of a study
CURVES = {  # metric, and kind of distillation where losses of two kinds are unlike -> caption, axis
    "top1": ("Accuracy in training", "top-1, %"),
    "teacher_agreement": ("Share of the training views on which student and teacher agree", "share, 0 to 1"),
    "class_loss": ("Class loss of students that learn only class labels", "class loss, nats"),
    "distill_loss hard": ("Hard distillation loss", "loss, nats"),
    "distill_loss soft": ("Soft distillation loss", "loss, nats"),
}


@dataclass
class Found:
    """What the paths of a report hold.

    Attributes:
        records: kind -> content of each JSON file of this kind, with its path.
        runs: name of a run -> its folder.
        label_sets: location -> label set.
        files: every file that was read, with its hash.
        names: path of a file of `evaluate` -> name of its cell of a study.
        answers: name of a cell -> the answer by which it is compared.
    """

    records: dict[str, list[tuple[Path, dict[str, Any]]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    runs: dict[str, Path] = field(default_factory=dict)
    label_sets: dict[str, LabelSet] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    names: dict[Path, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)

    def read(self, path: Path) -> dict[str, Any]:
        """Return the content of a JSON file, and note its hash."""
        content = read_json(path)
        if not isinstance(content, dict):
            raise StorageError(f"{path} is not a file of deit-cli: it holds no object")
        self.files[str(path)] = sha256_file(path)
        return content

    @property
    def prefixes(self) -> list[str]:
        """Return what stands before the names of the cells of each study: nothing if there is only one."""
        names: list[str] = []
        for study in self.all("study"):
            names.append(unique(str(study.get("name")), names))
        return [f"{name}: " for name in names] if len(names) > 1 else [""] * len(names)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Return the contents of one kind."""
        return [content for _, content in self.records[kind]]


def write_report(config: ReportConfig, paths: Sequence[str]) -> Path:
    """Write a report of studies, runs, label sets and JSON files; return the path of the page.

    Args:
        config: settings of the report.
        paths: folders of studies, runs and label sets (also URLs of these), and JSON files of `evaluate`, `analyse`, `audit`,
            `compare` and `bench inference`. Files of these kinds in a given folder are used, too.

    Raises:
        UsageError: a path is none of these.
        StorageError: a file is damaged.
    """
    found = look_at(paths)
    if config.data is not None and not found.label_sets:
        raise UsageError("--data names the images of a label set: pass the label set too, or leave --data out")
    pictures = _gallery(config, found)
    images = {picture.entry["picture"]: _data_uri(picture.png) for picture in pictures} | _attention(found)
    try:
        report = collect(found, config.title, [picture.entry for picture in pictures])
        text = render_page(report, images, data_file=config.data_file.name)
    except _DAMAGE as error:
        raise _blamed(found, error) from error
    replace_file(config.data_file, pretty_json(report))
    replace_file(config.out, text.encode())
    return config.out


def _blamed(found: Found, error: Exception) -> Exception:
    """Return the error that names the file without which no report fails; the error itself if there is no such file."""
    for kind, records in found.records.items():
        for path, content in records:
            alone = Found()
            alone.records[kind].append((path, content))
            try:
                render_page(collect(alone, None, []), {}, data_file="")
            except _DAMAGE as its:
                what = f"it lacks {its}" if isinstance(its, KeyError) else str(its)
                return StorageError(f"{path} is damaged: {what}", fix="Make it again with the command that wrote it")
    return error


def look_at(paths: Sequence[str]) -> Found:
    """Return what the paths hold, each file once."""
    found = Found()
    for text in paths:
        path = local_path(text)
        if path is None or (path / PLAN_NAME).is_file():  # behind a URL there can only be a label set
            found.label_sets[text] = LabelSet.open(text)
        elif path.is_dir():
            _look_into(path, found)
        elif path.is_file():
            _add_record(path, found, asked=True)
        else:
            raise UsageError(f"{path}: no such file or folder")
    for (study, content), prefix in zip(list(found.records["study"]), found.prefixes, strict=True):
        _add_parts(study.parent, content, prefix, found)
    return found


def _look_into(folder: Path, found: Found) -> None:
    before = sum(map(len, found.records.values())) + len(found.runs)
    for path in sorted(folder.glob("*.json")):
        _add_record(path, found, asked=False)
    run = run_in(folder)
    if (run / METRICS_NAME).is_file() and (run / CONFIG_NAME).is_file():
        found.runs[unique(name_of_run(run), found.runs)] = run
        for path in sorted(run.glob("*.json")) if run != folder else ():
            _add_record(path, found, asked=False)
    if sum(map(len, found.records.values())) + len(found.runs) == before:
        raise UsageError(
            f"{folder} is neither a study, a run nor a label set, and has no JSON file of these",
            fix="Pass the folder that compare, train or precompute wrote, or a file of evaluate --out",
        )


def _add_record(path: Path, found: Found, *, asked: bool) -> None:
    """Add a JSON file if it is of a kind that reports show; `asked` ones must be."""
    if str(path) in found.files:
        return
    content = found.read(path)
    kind = content.get("kind")
    if kind in KINDS and content.get("version") == 1:
        found.records[kind].append((path, content))
        return
    del found.files[str(path)]
    if asked:
        raise UsageError(
            f"{path} must be a JSON file of kind {', '.join(KINDS)} and version 1, got kind {kind!r} and version"
            f" {content.get('version')!r}"
        )


def _add_parts(folder: Path, study: Mapping[str, Any], prefix: str, found: Found) -> None:
    """Add what is still there of a study: run and scores of the first seed of each cell, and the label sets."""
    known = {run.resolve() for run in found.runs.values()}  # studies in one folder share the runs of equal cells
    for cell in study.get("cells", []):
        first = next(iter(cell["seeds"]), {})
        run, scores = folder / (first.get("run") or ""), folder / (first.get("scores_file") or "")
        name = unique(f"{prefix}{cell['name']}", found.runs)
        if answer := (cell.get("top1") or {}).get("answer"):
            found.answers[name] = answer
        if first.get("run") and (run / METRICS_NAME).is_file() and run.resolve() not in known:
            found.runs[name] = run
            for path in sorted(run.glob("*.json")):
                _add_record(path, found, asked=False)
        if first.get("scores_file") and scores.is_file():
            _add_record(scores, found, asked=False)
            found.names.setdefault(scores, name)
    analysis = folder / f"{study.get('name')}-analysis" / "analysis.json"
    if analysis.is_file():
        _add_record(analysis, found, asked=False)
    for teacher in study.get("teachers", []):
        location = folder / ((teacher.get("labels") or {}).get("path") or "")
        if (location / PLAN_NAME).is_file():
            found.label_sets[str(location)] = LabelSet.open(location)


def collect(found: Found, title: str | None, gallery: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of report-data.json."""
    studies, results = found.all("study"), _results(found)
    return {
        "kind": "report",
        "version": 1,
        "title": title or next((study["title"] for study in studies), None) or _names(found),
        "headline": _headline(studies, results, _parts(found), prefix=next(iter(found.prefixes), "")),
        "results": results,
        "studies": studies,
        "runs": [_run_row(found, name, folder) for name, folder in found.runs.items()],
        "curves": _curves(found.runs),
        "scores": [
            {
                "name": name,
                "weights": _part(content),
                **_without_bulk(content, _main_answer(found, run, content.get("scores") or {})),
            }
            for name, run, content in _scores(found)
        ],
        "calibration": [
            {"name": name, "answers": content["calibration"], "ece": _column(content, "ece")}
            for name, _, content in _scores(found)
            if content.get("calibration")
        ],
        "tokens": list(_tokens(found)),
        "disagreement": [each["disagreement"] for each in found.all("analysis") if each.get("disagreement")],
        "attention": [{"run": run, "picture": name} for name, (run, _) in _drawn(found).items()],
        "audit": [_audit_head(audit) for audit in found.all("audit")],
        "speed": [row for speed in found.all("speed") for row in speed["rows"]],
        "tradeoff": _tradeoff(found),
        "costs": [row for study, prefix in zip(studies, found.prefixes, strict=True) for row in _costs(study, prefix)],
        "label_sets": [summarise(label_set) | {"location": at} for at, label_set in found.label_sets.items()],
        "gallery": gallery,
        "reproduce": list(_reproduce(found)),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "files": [{"path": path, "sha256": digest} for path, digest in sorted(found.files.items())],
    }


def _results(found: Found) -> list[dict[str, Any]]:
    """Return name, top-1 and its range of the cells and teachers of the studies, else of the runs with scores."""
    rows: list[dict[str, Any]] = []
    for study, prefix in zip(found.all("study"), found.prefixes, strict=True):
        for teacher in study.get("teachers", []):
            if teacher.get("top1") is not None:
                rows.append(
                    {"name": f"{prefix}teacher {teacher['name']}", "top1": teacher["top1"], "low": None, "high": None}
                )
        for cell in study["cells"]:
            if (top1 := cell.get("top1")) and top1["mean"] is not None:
                low, high = (top1["low"], top1["high"]) if top1["low"] != top1["high"] else (None, None)
                rows.append({"name": f"{prefix}{cell['name']}", "top1": top1["mean"], "low": low, "high": high})
    if not rows:
        for name, run, content in _scores(found):
            if content.get("scores"):
                top1 = content["scores"][_main_answer(found, run, content["scores"])]["top1"]
                rows.append({"name": name, "top1": top1, "low": None, "high": None})
    return rows


def _main_answer(found: Found, name: str, scores: Mapping[str, Any]) -> str:
    """Return the answer by which a network is compared: the mean of both heads' logits, or the only head that was trained."""
    if name in found.answers:
        return found.answers[name]
    alone = name in found.runs and _only_class_head(found.runs[name])
    return "mean_logits" if "mean_logits" in scores and not alone else "class_head"


def _only_class_head(run: Path) -> bool:
    """Return whether a run trained the class head only, so that any second head has its first random weights."""
    config = read_json(run / CONFIG_NAME)["config"]
    return config.get("distillation_type") == "none" and config.get("second_token", "distillation") != "class"


def _headline(
    studies: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    parts: Mapping[str, str | None],
    *,
    prefix: str,
) -> dict[str, Any] | None:
    """Return the values of the first sentence: the best cell of the first study, else the best network.

    Args:
        studies: the studies.
        results: the rows of `_results`.
        parts: name -> folder of the weights, see `_parts`.
        prefix: what stands before the names of the cells of the first study in `parts`.
    """
    if studies:
        cells = [cell for cell in studies[0]["cells"] if cell["top1"]["mean"] is not None]
        if not cells:
            return None
        best = max(cells, key=lambda cell: cell["top1"]["mean"])
        return {
            "name": best["name"],
            "weights": parts.get(prefix + best["name"]),
            "answer": best["top1"]["answer"],
            "top1": best["top1"]["mean"],
            "low": best["top1"]["low"],
            "high": best["top1"]["high"],
            "seeds": len(best["seeds"]),
            "among": len(cells),
            "baseline": studies[0].get("baseline"),
            "against": best.get("against_baseline"),
        }
    if not results:
        return None
    best = max(results, key=lambda row: row["top1"])
    only = {"answer": None, "low": None, "high": None, "seeds": 1}
    name = best["name"]
    return {"name": name, "weights": parts.get(name), "top1": best["top1"], "among": len(results), **only}


def _parts(found: Found) -> dict[str, str | None]:
    """Return the names of the cells of studies, else of the results -> folder of the run with the measured weights, see `_part`."""
    if found.records["study"]:
        return {found.names[path]: _part(content) for path, content in found.records["scores"] if path in found.names}
    return {name: _part(content) for name, _, content in _scores(found)}


def _part(content: Mapping[str, Any]) -> str | None:
    """Return the folder of the run with the weights that a file of `evaluate` is about: best, last or last-ema; None if unknown."""
    name = Path(str(content.get("checkpoint") or "")).name
    return name if name in EXPORTED else None


def _scores(found: Found) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield a name of its own, the name of its network and the content of each file of `evaluate`."""
    of_runs = {folder: name for name, folder in found.runs.items()}
    taken: set[str] = set()
    others: dict[Path, str] = {}  # networks that are no run of the report -> name
    for path, content in found.records["scores"]:
        checkpoint = Path(str(content.get("checkpoint") or path.stem))
        network = found.names.get(path) or of_runs.get(path.parent)
        if network is None:
            home = _home(checkpoint).resolve()
            network = others.setdefault(home, unique(home.name, others.values()))
        name = unique(network if network not in taken else f"{network}, {path.stem}", taken)
        taken.add(name)
        yield name, network, content


def _home(weights: Path) -> Path:
    """Return the folder of the run that exported some weights, or that of the weights if they belong to no run."""
    return weights.parent if weights.name in EXPORTED else weights


def _known_weights(found: Found) -> dict[Path, str]:
    """Return the names of the networks of this report by the folders of their runs or weights."""
    known = {folder.resolve(): name for name, folder in found.runs.items()}
    for _, network, content in _scores(found):
        if content.get("checkpoint"):
            known.setdefault(_home(Path(content["checkpoint"])).resolve(), network)
    return known


def _names_of(found: Found, networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names in this report of networks of one file: by their weights, else the file's own name if nothing else has it."""
    known = _known_weights(found)
    by_weights = [each.get("weights") and known.get(_home(Path(each["weights"])).resolve()) for each in networks]
    return [
        name or (each["name"] if each["name"] not in by_weights else f"{each['name']}, {each['weights']}")
        for name, each in zip(by_weights, networks, strict=True)
    ]


def _without_bulk(content: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """Return a file of `evaluate` as the page shows it: the weakest classes and largest confusions of one answer only."""
    shown = {k: v for k, v in content.items() if k not in ("per_class", "confusion", "calibration", "kind", "version")}
    classes = [row for row in content.get("per_class") or [] if row["top1"].get(answer) is not None]
    weakest = sorted(classes, key=lambda row: row["top1"][answer])[:SHOWN]
    names = {row["class"]: row["name"] for row in content.get("per_class") or []}
    rows = [{"name": r["name"], "class": r["class"], "images": r["images"], "top1": r["top1"][answer]} for r in weakest]
    confused = [
        {"name": names.get(pair["class"]), "answer_name": names.get(pair["answer"]), **pair}
        for pair in (content.get("confusion") or {}).get(answer, [])[:SHOWN]
    ]
    sizes = content.get("sizes") or []
    return shown | {"answer": answer, "weakest": rows, "confused": confused, "sizes": sizes if len(sizes) > 1 else []}


def _column(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {answer: values.get(name) for answer, values in (content.get("scores") or {}).items()}


def _run_row(found: Found, name: str, folder: Path) -> dict[str, Any]:
    """Return what a run is, and its last evaluation in training."""
    described = found.read(folder / CONFIG_NAME)
    config = described["config"]
    evaluations = [line for line in read_metrics(folder) if line["kind"] == "eval"]
    found.files[str(folder / METRICS_NAME)] = sha256_file(folder / METRICS_NAME)
    shown = ["model", "distillation_type", "epochs", "batch_size", "seed"]
    if config.get("distillation_type") != "none" or config.get("second_token") == "class":
        shown.append("distillation_alpha")
    if config.get("distillation_type") == "soft":
        shown.append("distillation_tau")
    best = max(evaluations, key=lambda line: line["top1"], default=None)
    return {
        "name": name,
        "folder": str(folder),
        **{key: config.get(key) for key in shown},
        "best_top1": best and best["top1"],
        "best_epoch": best and best["epoch"],
    }


def _curves(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Return the training curves, a plot for each number that can be compared between runs."""
    plots: dict[str, Any] = {
        name: {"caption": caption, "label": label, "lines": []} for name, (caption, label) in CURVES.items()
    }
    for name, folder in runs.items():
        lines = read_metrics(folder)
        trained = [line for line in lines if line["kind"] == "train"]
        kind = read_json(folder / CONFIG_NAME)["config"]["distillation_type"]
        wanted = ("class_loss",) if kind == "none" else ("teacher_agreement", f"distill_loss {kind}")
        for curve in wanted:
            plots[curve]["lines"] += _means(name, trained, curve.split()[0])
        scored = [line for line in lines if line["kind"] == "eval" and line["weights"] == "student"]
        if len(scored) > 1:
            last = scored[-1]["index"]
            points = {"x": [line["index"] / last for line in scored], "y": [line["top1"] for line in scored]}
            plots["top1"]["lines"].append({"name": name, **points})
    return {name: plot for name, plot in plots.items() if plot["lines"]}


def _means(name: str, lines: Sequence[Mapping[str, Any]], number: str) -> list[dict[str, Any]]:
    """Return the curve of a number in metrics.jsonl: its means over equal parts of the lines, because one batch is noisy."""
    values = [line[number] for line in lines if line.get(number) is not None]
    if not values:
        return []
    points = min(max(len(values) // LINES_OF_A_POINT, CURVE_POINTS.start), CURVE_POINTS.stop - 1)
    parts = [part for part in np.array_split(values, points) if len(part)]
    share = [(place + 1) / len(parts) for place in range(len(parts))]
    return [{"name": name, "x": share, "y": [float(part.mean()) for part in parts]}]


def _tokens(found: Found) -> Iterator[dict[str, Any]]:
    """Yield the cosines of each analysed run that has two tokens, under a name of its own."""
    taken: set[str] = set()
    for analysis in found.all("analysis"):
        for name, run in zip(_names_of(found, analysis["runs"]), analysis["runs"], strict=True):
            if run["tokens"]:
                name = unique(name, taken)
                taken.add(name)
                yield _token_row(name, run)


def _token_row(name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cosines of a run by depth: 0 is what enters the first block."""
    cosine = run["tokens"]["cosine"]
    blocks = cosine.get("blocks") or []
    return {
        "name": name,
        "depth": list(range(len(blocks) + 1)),
        "cosine": [cosine["input"], *blocks],
        "learned": cosine.get("learned"),
        "input": cosine["input"],
        "output": cosine.get("output"),
        "cka": run["tokens"].get("cka"),
        "images": run["tokens"].get("images"),
        "along_training": run["tokens"].get("along_training") or [],
    }


def _audit_head(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first rows of each table of an audit, and the number of suspects."""
    head = {name: value[:SHOWN] if isinstance(value, list) else value for name, value in audit.items()}
    return head | {"suspects_in_all": len(audit.get("suspects") or ())}


def _tradeoff(found: Found) -> list[dict[str, Any]]:
    """Return accuracy and the highest speed of each network for which both are known."""
    accuracy = {name: content["scores"] for name, _, content in _scores(found) if content.get("scores")}
    rows: list[dict[str, Any]] = []
    for speed in found.all("speed"):
        names = _names_of(found, speed["rows"])
        for name in dict.fromkeys(names):
            if name in accuracy:
                mine = [row for row, of in zip(speed["rows"], names, strict=True) if of == name]
                fastest = max(mine, key=lambda row: row["images_per_s"])
                top1 = accuracy[name][_main_answer(found, name, accuracy[name])]["top1"]
                rows.append(
                    {
                        "name": name,
                        "top1": top1,
                        **{k: fastest[k] for k in ("images_per_s", "parameters", "batch_size")},
                    }
                )
    return rows


def _costs(study: Mapping[str, Any], prefix: str) -> Iterator[dict[str, Any]]:
    """Yield seconds and accuracy of each cell: teacher and labels are counted in full, as if no other cell used them."""
    for cell in study["cells"]:
        costs = cell.get("costs") or {}
        if cell["top1"]["mean"] is not None and all(costs.get(name) is not None for name in COSTS):
            total_s = sum(costs[name] for name in COSTS)
            yield {"name": f"{prefix}{cell['name']}", "top1": cell["top1"]["mean"], "total_s": total_s, **costs}


def _reproduce(found: Found) -> Iterator[dict[str, Any]]:
    """Yield the commands that make studies and runs again."""
    for study in found.all("study"):
        if study.get("command"):
            yield {"what": f"the study {study['name']}", "command": study["command"]}
    for name, folder in found.runs.items():
        yield {"what": f"the run {name}", "command": f"deit-cli train -c {folder}/config.yaml --output {folder}-again"}


def _names(found: Found) -> str:
    names = [*found.runs, *(network for _, network, _ in _scores(found)), *found.label_sets]
    return ", ".join(dict.fromkeys(names)) or "Report"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gallery(config: ReportConfig, found: Found) -> list[Picture]:
    """Return the views on which the first distilled run and the teacher of its labels are furthest apart."""
    trained = {name: folder for name, folder in found.runs.items() if exported_folder(folder)}
    if not (config.gallery and trained and found.label_sets):
        return []
    distilled = [
        name
        for name, folder in trained.items()
        if read_json(folder / CONFIG_NAME)["config"]["distillation_type"] != "none"
    ]
    name = next(iter([*distilled, *trained]))
    run, location = found.runs[name], _labels_of(found.runs[name], found)
    pictures = most_apart(run, found.label_sets[location], config, class_head=_only_class_head(run))
    return [replace(picture, entry=picture.entry | {"run": name, "label_set": location}) for picture in pictures]


def _labels_of(run: Path, found: Found) -> str:
    """Return the location of the label set that a run was trained on, or of the first one if that is not in the report."""
    labels = read_json(run / CONFIG_NAME)["config"].get("labels") or []
    trained = {_place_of(each) for each in ([labels] if isinstance(labels, str) else labels)}
    return next((each for each in found.label_sets if _place_of(each) in trained), next(iter(found.label_sets)))


def _place_of(location: str) -> str:
    path = local_path(location)
    return location if path is None else str(path.resolve())


def _drawn(found: Found) -> dict[str, tuple[str, Path]]:
    """Return a name of its own -> run and path of each picture that analyses wrote beside their JSON."""
    drawn: dict[str, tuple[str, Path]] = {}
    for path, analysis in found.records["analysis"]:
        pictures = {each["picture"]: each["run"] for each in analysis.get("attention") or []}
        for picture, run in pictures.items():
            drawn[unique(picture, drawn)] = run, path.parent / picture
    return drawn


def _attention(found: Found) -> dict[str, str]:
    return {name: _data_uri(path.read_bytes()) for name, (_, path) in _drawn(found).items() if path.is_file()}


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
