"""`deit-cli export`: takes a student away, in a form that needs nothing of this project.

The export is made and checked in a temporary folder beside its own. Its files are then published one after the other, and
`export.json`, which lists them with their hashes, last.
"""

import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, DeitCliError, UsageError
from pipeline.overview.card import Licence
from pipeline.storage.atomic import make_folder, refusals_named, replace_file, sha256_file
from pipeline.storage.json import pretty_json, read_json
from pipeline.storage.place import open_file
from pipeline.text import aligned, count
from trainer.evaluate import ANSWERS, fused_logits, primary_head
from trainer.evidence.linear import FILE_NAME as LINEAR_NAME
from trainer.evidence.linear import Linear, load_linear
from trainer.evidence.scores import LINEAR
from trainer.export import export_model, hub_config
from trainer.exports import onnx_file, program
from trainer.exports.answers import Answers, chosen_answers
from trainer.exports.card import CARD_NAME, card_text, preprocessing, sizes
from trainer.exports.checking import Answering, checking_images, compare
from trainer.exports.config import StudentExportConfig
from trainer.exports.origin import KIND, RECORD_NAME, VERSION, Origin, open_origin
from trainer.exports.push import push_folder
from trainer.student import Student

log = logging.getLogger("deit_cli.export")

OURS = ("model.safetensors", "config.json", onnx_file.FILE_NAME, onnx_file.WEIGHTS_NAME, program.FILE_NAME, CARD_NAME)


def export_student(location: str, config: StudentExportConfig) -> dict[str, Any]:
    """Export the student at a location, and return the content of `export.json` with `folder`, and `pushed` if it was uploaded.

    Raises:
        UsageError: the student, the folder or an option does not fit the others.
        CheckpointError: there is no student, its weights are damaged, or the export answers differently.
        StorageError: a file cannot be written, or the upload failed.
    """
    if config.license is not None:
        Licence(config.license)
    if config.to == "onnx":
        onnx_file.check_extra()
    origin = open_origin(location)
    folder = config.out or Path(f"{origin.network.name}-{config.to}")
    earlier = _earlier(folder, config, origin.student)
    with _staged(folder) as stage:
        record = _make(origin, stage, config)
        record = _publish(stage, folder, record, earlier)
    result = record | {"folder": str(folder)}
    if config.repository is not None:
        names = sorted({*record["files"], CARD_NAME, RECORD_NAME})  # a card that was changed by hand too
        message = f"Export {origin.network.name} to {config.to}"
        address = push_folder(folder, names, config.repository, private=config.private, message=message)
        result["pushed"] = address
    return result


# --- making -----------------------------------------------------------------------------------------------------------


def _make(origin: Origin, stage: Path, config: StudentExportConfig) -> dict[str, Any]:
    """Write the export and its card into a folder, check it, and return the record without its files."""
    student = origin.student
    every = ANSWERS if student.has_distillation_head else ANSWERS[:1]
    names = every if config.to == "timm" else chosen_answers(config.answer, student)
    linear = _linear(origin, config) if LINEAR in names else None
    graph = Answers(student, names, preprocess=config.preprocess, linear=linear)
    known: dict[str, Any] = {} if config.to == "timm" else {"graph": graph.described()}
    if config.precision == "int8":
        known["quantisation"] = _quantisation(config)
    versions = _versions() | _write(graph, stage, config)
    found = compare(graph, _open(graph, stage, config), *checking_images(config, student))
    if config.precision == "float32":
        found.check_equal()
    record: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "to": config.to,
        "precision": config.precision,
        "preprocess": config.preprocess,
        **known,
        "preprocessing": preprocessing(student),
        "class_names": None if student.class_names is None else list(student.class_names),
        "source": origin.record,
        "check": found.to_dict(),
        "versions": versions,
    }
    text = card_text(record, student, None if config.to == "timm" else graph, config)
    (stage / CARD_NAME).write_text(text, encoding="utf-8")
    return record


def _write(graph: Answers, stage: Path, config: StudentExportConfig) -> dict[str, Any]:
    """Write the files of the export, and return the versions that made them."""
    student = graph.student
    if config.to == "timm":
        export_model(stage, student.model.state_dict(), hub_config=hub_config(student))
        return {}
    try:
        return (
            onnx_file.write_onnx(graph, stage, config) if config.to == "onnx" else program.write_program(graph, stage)
        )
    except DeitCliError:
        raise
    except Exception as error:  # a network that torch cannot trace, in one of many ways
        model, why = student.model.pretrained_cfg.get("architecture"), " ".join(str(error).split())[:300]
        raise CheckpointError(f"torch cannot export {model} to {config.to} ({type(error).__name__}): {why}") from error


def _open(graph: Answers, stage: Path, config: StudentExportConfig) -> Answering:
    """Return the export as a function, opened as its users open it."""
    if config.to == "onnx":
        return onnx_file.open_onnx(graph, stage)
    if config.to == "torch":
        return program.open_program(graph, stage)
    loaded = Student(timm.create_model(f"local-dir:{stage}", pretrained=True), img_size=graph.student.img_size).eval()

    def answer(images: Tensor) -> Mapping[str, Tensor]:
        with torch.inference_mode():
            answers = fused_logits(loaded(images))
            return answers | {primary_head(answers): loaded.model(images)}  # timm's own answer

    return answer


def _linear(origin: Origin, config: StudentExportConfig) -> Linear:
    """Return the fitted classifier of both tokens.

    Raises:
        CheckpointError: there is none, or it belongs to other weights.
    """
    file = open_file(config.concat_linear or str(origin.folder / LINEAR_NAME))
    found = load_linear(file, origin.student)
    if found is None:
        raise CheckpointError(
            f"{file}: no such file",
            fix="Fit it with `deit-cli evaluate --fit-data`, or leave out --answer concat_linear",
        )
    return found


def _versions() -> dict[str, Any]:
    named = {"timm": timm.__version__, "torch": torch.__version__}
    try:
        return {"deit-cli": importlib.metadata.version("deit-cli"), **named}
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return named


# --- publishing -------------------------------------------------------------------------------------------------------


def _earlier(folder: Path, config: StudentExportConfig, student: Student) -> dict[str, Any]:
    """Return the files that an earlier export wrote to the folder and that are unchanged; {} if it is new or empty.

    Raises:
        UsageError: it holds something else or another form of export, or the files were changed.
    """
    with refusals_named(folder):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file", fix="Pass another --out")
        if not folder.exists() or not any(folder.iterdir()):
            return {}
    if not (folder / RECORD_NAME).is_file():
        raise UsageError(f"{folder} is not empty and holds no export", fix="Pass a new folder as --out")
    record = read_json(folder / RECORD_NAME)
    if not isinstance(record, dict) or record.get("kind") != KIND or not isinstance(record.get("files"), dict):
        raise UsageError(f"{folder}/{RECORD_NAME} is not of an export", fix="Pass a new folder as --out")
    if record.get("to") != config.to:
        raise UsageError(
            f"{folder} holds an export to {record.get('to')}, not to {config.to}", fix="Pass another --out"
        )
    for what, (held, asked) in _forms(record, config, student).items():
        if held != asked:
            raise UsageError(
                f"{folder} holds an export with {what} {held}, this one would have {asked}", fix="Pass another --out"
            )
    there = {name: sha256_file(folder / name) for name in OURS if name in record["files"] and (folder / name).is_file()}
    same = {name: sha for name, sha in there.items() if record["files"][name].get("sha256") == sha}
    if changed := [name for name in there if name not in same and name != CARD_NAME]:
        raise UsageError(
            f"{folder / changed[0]} is not the file that was exported: it was changed, or an export was interrupted",
            fix="Delete it, or pass another --out",
        )
    return same


def _forms(record: Mapping[str, Any], config: StudentExportConfig, student: Student) -> dict[str, tuple[str, str]]:
    """Return what an export must have in common with the one that it replaces: name -> as it is there, as it is asked for."""
    forms = {name: (str(record.get(name)), str(getattr(config, name))) for name in ("precision", "preprocess")}
    if config.precision == "int8":
        forms["quantisation"] = (str(record.get("quantisation")), _quantisation(config))
    if config.to != "timm":
        forms["answers"] = (", ".join(_answers_of(record)), ", ".join(chosen_answers(config.answer, student)))
    return forms


def _answers_of(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the outputs in the record of an export; none if it has no graph as an export writes it."""
    graph = record.get("graph")
    outputs = graph.get("outputs") if isinstance(graph, dict) else None
    return [str(each.get("name")) for each in outputs or [] if isinstance(each, dict)]


def _quantisation(config: StudentExportConfig) -> str:
    return "dynamic" if config.calibration_data is None else "static"


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give a new folder beside another one, which is deleted in the end."""
    parent = folder.absolute().parent
    with refusals_named(parent):
        make_folder(parent)
        stage = Path(tempfile.mkdtemp(prefix=".tmp-export-", dir=parent))
    try:
        with refusals_named(folder):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, folder: Path, record: dict[str, Any], earlier: Mapping[str, str]) -> dict[str, Any]:
    """Move the files of a stage into the folder, the record last; return the record with the files.

    Of the folder's files, only those of `earlier` are replaced or deleted.
    """
    names = sorted(path.name for path in stage.iterdir())
    for name in names:
        if (folder / name).exists() and name not in earlier and name != CARD_NAME:
            raise UsageError(f"{folder / name} exists, and no export wrote it", fix="Pass another --out")
    if (folder / CARD_NAME).exists() and CARD_NAME not in earlier:
        log.info("%s was changed, so it is kept; delete it to have it written again", folder / CARD_NAME)
        names.remove(CARD_NAME)
    for name in names:
        with (stage / name).open("rb") as file:
            replace_file(folder / name, lambda out, file=file: shutil.copyfileobj(file, out))
    for name in earlier.keys() - set(names):
        (folder / name).unlink()
    files = {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    record = record | {"files": files}
    replace_file(folder / RECORD_NAME, pretty_json(record))
    return record


# --- the result as text -----------------------------------------------------------------------------------------------


def export_table(result: Mapping[str, Any]) -> str:
    """Return the result of `export_student` as readable lines."""
    check = result["check"]
    lines = [f"{result['folder']}: {sizes(result['files'])}"]
    if graph := result.get("graph"):
        shape = ", ".join(map(str, graph["input"]["shape"]))
        lines.append(f"input {graph['input']['name']}: {graph['input']['dtype']} [{shape}]")
    accuracy = check["accuracy"] or {}
    rows = [["", "largest difference", "same class, %", "student, top-1 %", "export, top-1 %"]]
    for name, each in check["answers"].items():
        top1 = [f"{accuracy[who][name]['top1']:.2f}" if accuracy else "-" for who in ("student", "export")]
        rows.append([name, f"{each['max_difference']:.2g}", f"{each['same_class_pct']:.2f}", *top1])
    measured = f", accuracy on the {accuracy['images']:,} with a class label" if accuracy else ""
    lines += [aligned(rows), f"compared on {count(check['images'], 'image')} ({check['images_from']}){measured}"]
    return "\n".join(lines + ([f"pushed to {result['pushed']}"] if "pushed" in result else []))
