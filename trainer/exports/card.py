"""The model card: README.md of an export, for people and for the Hub. What was not measured is said to be so."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.overview.card import code_span, code_spans
from pipeline.text import byte_size
from trainer.exports.answers import Answers
from trainer.exports.config import StudentExportConfig
from trainer.student import Student

CARD_NAME = "README.md"
_LIBRARIES = {"timm": "timm", "onnx": "onnx", "torch": "pytorch"}
NOT_MEASURED = "not measured"
SHOWN_CLASSES = 20  # a card writes the names of so many classes
_ABOUT = {
    "class_head": "the head of the class token",
    "distillation_head": "the head of the distillation token",
    "mean_logits": "mean of the logits of both heads",
    "sum_softmax": "sum of the probabilities of both heads",
    "concat_linear": "linear classifier of both tokens",
}


def card_text(record: Mapping[str, Any], student: Student, graph: Answers | None, config: StudentExportConfig) -> str:
    """Return the text of the card.

    Args:
        record: content of `export.json` without the files.
        student: the student.
        graph: the exported graph; None for timm.
        config: settings of the export.
    """
    source = record["source"]
    lines = [
        f"# {_title(source, config)}",
        "",
        f"An image classifier: {code_span(str(source['model']))}, {source['parameters']:,} parameters,"
        f" {source['num_classes']:,} classes, images of {student.img_size} x {student.img_size} pixels."
        " Trained and exported with deit-cli.",
        *_section("How to load it", _loading(student, graph, config)),
        *_section("Classes", _classes(record)),
        *_section("Accuracy", _accuracy(record, student)),
        *_section("Training", _training(source)),
        *_section("Data", _data(config)),
        *_section("Licence", [_licence(config)]),
        *_section("Where it comes from", _origin(record)),
    ]
    return f"---\n{_header(record, config)}\n---\n\n" + "\n".join(lines) + "\n"


def _title(source: Mapping[str, Any], config: StudentExportConfig) -> str:
    """Return the model, and its data if they are named, else the name of its run or folder."""
    name = code_span(source["name"])
    if not source["model"]:
        return name
    of = f" trained on {', '.join(map(code_span, config.dataset))}" if config.dataset else f", {name}"
    return f"{code_span(source['model'])}{of}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _header(record: Mapping[str, Any], config: StudentExportConfig) -> str:
    """Return the YAML header, as the Hub's own library writes it."""
    from huggingface_hub import ModelCardData

    source = record["source"]
    distilled = bool((source["run"] or {}).get("label_sets"))
    measured = source["scores"] or (record["check"] or {}).get("accuracy")
    return ModelCardData(
        library_name=_LIBRARIES[config.to],
        pipeline_tag="image-classification",
        license=config.license,
        license_name=config.license_name,
        license_link=config.license_link,
        datasets=list(config.dataset) or None,
        metrics=["accuracy"] if measured else None,
        tags=["image-classification", *(["knowledge-distillation"] if distilled else []), "deit", "deit-cli"],
    ).to_yaml()


# --- how to load it ---------------------------------------------------------------------------------------------------


def _loading(student: Student, graph: Answers | None, config: StudentExportConfig) -> list[str]:
    """Return the code that loads the export in its folder."""
    if graph is None:
        return _timm(student, config)
    input_ = graph.described()["input"]
    shape = "(" + ", ".join(map(str, [4, *input_["shape"][1:]])) + ")"
    names, known = ", ".join(graph.names), config.to == "onnx"
    wanted = "uint8 pixels, which the graph normalises" if config.preprocess != "none" else "normalised float32 images"
    code = [
        *(["import numpy as np", "import onnxruntime"] if known else ["import torch"]),
        "",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])'
        if known
        else 'model = torch.export.load("model.pt2").module()',
        f"images = np.zeros({shape}, np.{input_['dtype']})" if known else f"images = torch.zeros({shape}, dtype=torch.{input_['dtype']})",
        f'({names},) = session.run(None, {{"images": images}})' if known else f"({names},) = model(images)",
    ]  # fmt: skip
    return [
        f"Run this in the folder of the export. The input is {wanted}; `images` stands for any number of them."
        f" The outputs are {', '.join(f'`{name}` ({_ABOUT[name]})' for name in graph.names)}.",
        *_code(code),
        "",
        _preprocessing(student, config.preprocess),
    ]


def _timm(student: Student, config: StudentExportConfig) -> list[str]:
    on_hub = f"  # on the Hub: hf-hub:{config.repository or 'USER/NAME'}"
    both = [
        "Both heads on their own:",
        *_code(["features = model.forward_features(images)", *_heads(student)]),
    ]
    return [
        "Run this in the folder of the export, with an image of yours as `image.jpg`."
        + (" timm's answer is the mean of the logits of both heads." if student.has_distillation_head else ""),
        *_code(
            [
                "import timm",
                "from PIL import Image",
                "",
                f'model = timm.create_model("local-dir:.", pretrained=True).eval(){on_hub}',
                "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
                'images = transform(Image.open("image.jpg").convert("RGB"))[None]  # a batch of one image',
                "logits = model(images)",
                f"probabilities, classes = logits.softmax(dim=1).topk({min(5, student.num_classes)})",
            ]
        ),
        *(["", *both] if student.has_two_tokens else []),
        "",
        _preprocessing(student, "none"),
    ]


def _heads(student: Student) -> list[str]:
    return ["class_head, distillation_head = model.head(features[:, 0]), model.head_dist(features[:, 1])"]


def _preprocessing(student: Student, preprocess: str) -> str:
    known = preprocessing(student)
    mean, std = (", ".join(f"{value:.4g}" for value in known[name]) for name in ("mean", "std"))
    rest = f", divide by 255, subtract the mean ({mean}) and divide by the standard deviation ({std})"
    return (
        f"An image is resized to a shorter side of {known['resize']} pixels ({known['interpolation']}); its centre of"
        f" {student.img_size} x {student.img_size} pixels is the input{'' if preprocess != 'none' else rest}."
    )


def preprocessing(student: Student) -> dict[str, Any]:
    """Return how an image becomes an input: size, crop, interpolation, and mean and std for values in 0..1."""
    config = student.model.pretrained_cfg
    crop_pct = float(config.get("crop_pct") or 0.875)
    return {
        "img_size": student.img_size,
        "crop_pct": crop_pct,
        "resize": int(student.img_size / crop_pct),
        "interpolation": config.get("interpolation") or "bicubic",
        "mean": list(student.mean),
        "std": list(student.std),
    }


def _code(lines: Sequence[str]) -> list[str]:
    return ["", "```python", *lines, "```"]


# --- what is known of it ----------------------------------------------------------------------------------------------


def _classes(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes if they are few, else where they are."""
    names = record["class_names"]
    if names is None:
        return ["The classes have numbers only: those of the training images."]
    if len(names) <= SHOWN_CLASSES:
        return [f"From class 0 on: {', '.join(map(code_span, names))}."]
    where = "`config.json`, `label_names`" if record["to"] == "timm" else "`export.json`, `class_names`"
    return [f"The names of the {len(names):,} classes are in {where}, from class 0 on."]


def _accuracy(record: Mapping[str, Any], student: Student) -> list[str]:
    """Return the table of all answers: in training, and at the export of the student and of the exported file."""
    check, trained = record["check"], record["source"]["scores"]
    at_export = (check or {}).get("accuracy") or {}
    columns = {"in training": (trained or {}).get("scores", {}), "student, at export": at_export.get("student", {})}
    if record["to"] != "timm":
        columns[f"this file ({record['precision']})"] = at_export.get("export", {})
    answers = list(_ABOUT)[: 4 if student.has_distillation_head else 1]
    answers += [name for name in at_export.get("student", {}) if name not in answers]
    rows = [
        "| answer | " + " | ".join(f"top-1, %: {name}" for name in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in answers:
        cells = [f"{scores[name]['top1']:.2f}" if name in scores else NOT_MEASURED for scores in columns.values()]
        rows.append(f"| `{name}`: {_ABOUT[name]} | " + " | ".join(cells) + " |")
    notes = []
    if trained:
        notes.append(f"In training: after epoch {trained['epoch']} (counted from 0), on {trained['images']:,} images.")
    if at_export:
        notes.append(f"At export: on {at_export['images']:,} {code_span(check['images_from'])}.")
    if check:
        worst = max(check["answers"].values(), key=lambda each: each["max_difference"])
        same = min(each["same_class_pct"] for each in check["answers"].values())
        notes.append(
            f"On {check['images']:,} images ({code_span(check['images_from'])}) this export and the student differ by at most"
            f" {worst['max_difference']:.2g}, and choose the same class for {same:.2f} %."
        )
    return [*rows, *([""] if notes else []), *notes]


def _training(source: Mapping[str, Any]) -> list[str]:
    run = source["run"]
    if run is None:
        return ["Nothing is known of the training: the weights did not lie in the folder of a run."]
    sets = run["label_sets"]
    lines = [
        f"- **Teacher**: {code_span(str(each['teacher'].get('name')))}, weights SHA-256"
        f" {code_span(str(each['teacher'].get('weights_sha256')))}; its stored answers are label set `{each['labelset_id']}`"
        for each in sets
    ] or ["- **Teacher**: none"]
    if len(sets) > 1:
        lines.append(f"- **Combined**: weights {run['label_weights']}, {run['label_mode']}")
    recipe = run["recipe"] or {}
    settings = {name: value for name, value in run["settings"].items() if value is not None}
    settings = {name: value for name, value in settings.items() if name not in _without_effect(settings)}
    views = run.get("views") or []
    if per_update := run.get("views_per_update"):
        lines.append(f"- **Views**: {':'.join(map(str, views)) + ', ' if views else ''}{per_update:,} in each update")
    return [
        *lines,
        f"- **Recipe** `{run['recipe_id']}`: {code_spans(recipe)}",
        f"- **Settings**: {code_spans(settings)}",
    ]


def _without_effect(settings: Mapping[str, Any]) -> set[str]:
    """Return the names of settings that a training did not use, or that the card says elsewhere."""
    idle = {"label_weights", "label_mode"}  # they are beside the teachers, if there are several
    if settings.get("distillation_type") != "soft":
        idle |= {"distillation_tau", "tail", "soft_reduction"}
    if settings.get("distillation_type") == "none" and settings.get("second_token") != "class":
        idle |= {"distillation_alpha", "second_token"}
    if not settings.get("model_ema"):
        idle |= {"model_ema_decay", "model_ema_warmup"}
    if "lr" in settings:
        idle.add("lr_base")
    return idle


def _data(config: StudentExportConfig) -> list[str]:
    if not config.dataset:
        return ["The training images are not named."]
    return [f"Training images: {', '.join(map(code_span, config.dataset))}."]


def _licence(config: StudentExportConfig) -> str:
    if config.license is None:
        return "Not stated. It depends on the licences of the images and of the teacher's weights."
    link = "" if config.license_link is None else f", {code_span(config.license_link)}"
    return f"{code_span(config.license_name or config.license)}{link}"


def _origin(record: Mapping[str, Any]) -> list[str]:
    source = record["source"]
    return [
        f"- Run {code_span(source['name'])}, its folder `{source['weights']}/`"
        if source["weights"]
        else f"- Folder {code_span(source['name'])}",
        f"- SHA-256 of the `model.safetensors` that was exported: `{source['weights_sha256']}`",
        f"- SHA-256 of its tensors: `{source['student_sha256']}`",
        f"- Made with {code_spans(record['versions'])}",
        "- `export.json` has all of this for programs.",
    ]


def sizes(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return names and sizes of files as text."""
    return ", ".join(f"{name} ({byte_size(each['bytes'])})" for name, each in files.items())
