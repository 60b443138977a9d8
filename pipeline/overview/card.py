"""The dataset card: README.md of a label set, for people and for the Hugging Face Hub.

Names of teachers come from outside, so every external text is put into a code span, which neutralises Markdown and HTML, and
a YAML library writes the header. A card holds the hash of its own text, so a card that a user has changed is recognised and
is replaced only on request.
"""

import hashlib
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DeitCliError, UsageError
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import labels_path
from pipeline.overview.summary import summarise, weights_text
from pipeline.storage.atomic import publish_file, refusals_named, replace_file
from pipeline.storage.yaml import parse_yaml, to_yaml
from pipeline.text import byte_size

log = logging.getLogger("deit_cli.card")

CARD_NAME = "README.md"
MAX_CARD_BYTES = 1 << 20
MAX_CODE = 200  # characters shown of an external text
NOT_STATED = "not-stated"

_MARK = re.compile(r"^<!-- written by deit-cli; SHA-256 of all other lines: ([0-9a-f]{64}) -->\n", re.MULTILINE)
_HEADER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """The licence in the header that the Hub reads.

    Attributes:
        license: the Hub's identifier, such as `cc-by-4.0`; `other` if it has none.
        license_name: name of a licence without identifier, or None.
        license_link: address of its text, or None.
    """

    license: str = "other"
    license_name: str | None = NOT_STATED
    license_link: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", self.license):
            raise UsageError(
                f"--license must be an identifier of the Hub, such as cc-by-4.0, or other, got {self.license!r}"
            )

    @property
    def text(self) -> str:
        """The licence as a line of the card."""
        if self.license_name == NOT_STATED:
            return (
                "not stated. It depends on the licences of the teacher's weights and of the images;"
                " `deit-cli labels card FOLDER --license cc-by-4.0`, for example, writes it here"
            )
        link = "" if self.license_link is None else f", {code_span(self.license_link)}"
        return f"{code_span(self.license_name or self.license)}{link}"


def refresh_card(label_set: LabelSet) -> None:
    """Write the card of a set that was just sealed, unless its README.md was changed or is not our card.

    The set is complete without a card: if the card cannot be written, this is only logged.
    """
    try:
        if not write_card(label_set):
            log.info(
                "%s/%s is not an unchanged card of deit-cli, so it is kept. To replace it: deit-cli labels card %s --replace",
                *(label_set.place, CARD_NAME, label_set.place),
            )
    except DeitCliError as error:
        log.warning("the label set is sealed, but its card could not be written: %s", error)


def write_card(label_set: LabelSet, licence: Licence | None = None, *, replace: bool = False) -> bool:
    """Write README.md into the folder of a label set, and return whether it was written.

    Args:
        label_set: a local label set.
        licence: licence to state; None: the licence of the existing card, if any.
        replace: whether to replace a file that was changed or is not one of our cards.

    Returns:
        False if such a file exists and was kept.

    Raises:
        UsageError: the label set is behind a URL.
        StorageError: the operating system refused to write.
    """
    if label_set.place.path is None:
        raise UsageError(f"{label_set.place} is not a local folder: write the card into a local folder, and push it")
    path = label_set.folder / CARD_NAME
    there = _read(path)
    ours = there is not None and is_untouched(there)
    if there is not None and not ours and not replace:
        return False
    kept = licence_of(there) if there is not None and licence is None else None
    text = render_card(summarise(label_set), label_set, licence or kept or Licence())
    if there is None:
        return publish_file(path, text.encode())
    if there != text:
        replace_file(path, text.encode())
    return True


def render_card(summary: Mapping[str, Any], label_set: LabelSet, licence: Licence) -> str:
    """Return the text of the card; the same set and licence give the same text.

    Args:
        summary: result of `summarise`.
        label_set: the set.
        licence: the licence to state.
    """
    header = to_yaml(_header(summary, licence)).decode()
    body = "\n".join(("", *_about(summary, label_set, licence), "", *_loading(label_set)))
    rest = f"---\n{header}---\n{body}"
    mark = f"<!-- written by deit-cli; SHA-256 of all other lines: {_digest(rest)} -->\n"
    return f"---\n{header}---\n{mark}{body}"


def licence_of(text: str) -> Licence | None:
    """Return the licence in the header of a card, or None if the header states no licence in a known form."""
    header = _HEADER.match(text)
    try:
        values = parse_yaml(header[1], where=CARD_NAME) if header else None
        found = {name: str(values[name]) for name in _LICENCE if values.get(name) is not None} if values else {}
        return Licence(**{"license_name": None, **found}) if "license" in found else None
    except (DeitCliError, TypeError, AttributeError):
        return None


def is_untouched(text: str) -> bool:
    """Return whether a text is one of our cards, without changes by others."""
    marks = _MARK.findall(text)
    return len(marks) == 1 and marks[0] == _digest(_MARK.sub("", text))


def size_category(rows: int) -> str:
    """Return the Hub's size category for a number of rows."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    for power, (name, following) in enumerate(itertools.pairwise(names), start=3):
        if 10**power <= rows < 10 ** (power + 1):
            return f"{name}<n<{following}"
    return "n<1K" if rows < 1000 else "n>1T"


def code_span(text: str) -> str:
    """Return an external text as a Markdown code span that shows it literally, on one line, of bounded length."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[: MAX_CODE + 1])
    shown = shown if len(shown) <= MAX_CODE else shown[:MAX_CODE] + "…"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    room = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{fence}{room}{shown}{room}{fence}"


def code_spans(values: Mapping[str, Any]) -> str:
    """Return names and values, sorted by name, as code spans."""
    return ", ".join(code_span(f"{name} {value}") for name, value in sorted(values.items()))


def _header(summary: Mapping[str, Any], licence: Licence) -> dict[str, Any]:
    stated = {name: value for name in _LICENCE if (value := getattr(licence, name)) is not None}
    files = {"labels": "labels/*/*.parquet", "samples": "samples/*.parquet"}
    return stated | {
        "pretty_name": f"Labels of {summary['teacher_name']}",
        "task_categories": ["image-classification"],
        "tags": ["knowledge-distillation", "soft-labels", "deit", "deit-cli"],
        "size_categories": [size_category(summary["labels"])],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": path}]}
            | ({"default": True} if name == "labels" else {})
            for name, path in files.items()
        ],
    }


def _about(summary: Mapping[str, Any], label_set: LabelSet, licence: Licence) -> list[str]:
    source, teacher, (start, stop) = summary["source"], summary["teacher"], summary["views"]
    members = teacher.get("members", [teacher])
    per_view = summary["labels"] and summary["label_bytes"] / summary["labels"]
    agreement = summary["hard_is_class_label_pct"]
    return [
        f"# Labels of {code_span(summary['teacher_name'])}",
        "",
        "The answers of a frozen teacher for numbered, reproducible views of images, as Parquet files for any reader."
        " A view is a pure function of recipe, sample key and number, so training renders exactly the pixels that the"
        " teacher saw. Written by deit-cli; its `docs/format-v1.md` specifies every field.",
        "",
        f"- **Licence**: {licence.text}",
        *(
            f"- **Teacher**: {code_span(each['name'])}, {each['num_classes']:,} classes, sees {each['img_size']} px,"
            f" {weights_text(each, whole=True)}"
            for each in members
        ),
        *(["- Their probabilities are averaged with equal weight."] if len(members) > 1 else []),
        f"- **Recipe** `{summary['recipe_id']}`: {code_spans(summary['recipe'])}",
        f"- **Pixels** of {summary['pixels'].replace('docs/views-v2.md', '`docs/views-v2.md`')}",
        f"- **Views** {start}..{stop - 1}: {summary['labels']:,} labels of {source['images'] - len(source['bad']):,} images"
        f" in {source['shards']:,} source shards",
        f"- **Images**: {source['images']:,}, {len(source['bad']):,} of them cannot be decoded and have no labels,"
        f" {source['unlabelled']:,} have no class label; {_images(summary, label_set)}",
        f"- **Stored**: K = {summary['topk']} most probable classes, probabilities as {summary['precision']};"
        f" {byte_size(summary['label_bytes'])} of labels, {per_view:.1f} bytes each",
        *(
            [f"- **Agreement**: in {agreement:.1f} % of the first {summary['labels_looked_at']:,} labels, the"
             " hard label is the class label of the image with the larger part of the view"]
            if agreement is not None
            else []
        ),
        f"- **Label set** `{summary['labelset_id']}`",
        *(f"- **Made with** {code_spans(each)}" for each in summary["environments"]),
    ]  # fmt: skip


def _images(summary: Mapping[str, Any], label_set: LabelSet) -> str:
    if not label_set.has_images:
        return "they are not in this set: training needs a copy of them"
    made = {each["images"] for each in summary["environments"] if "images" in each}
    how = f" ({', '.join(map(code_span, sorted(made)))})" if made else " (the original files)"
    return f"they are in this set, `images/*.tar`{how}: sharing the set publishes them"


def _loading(label_set: LabelSet) -> list[str]:
    shard, block = label_set.shards[0], label_set.manifest.blocks[0]
    labels, start = str(labels_path(shard, block)), block.start
    samples = f"samples/{shard}.parquet"
    codec = label_set.plan.codec
    stored = [name for name in codec.columns if name != "tail_mass"]
    columns = ", ".join(f'"{name}"' for name in stored)
    # DuckDB 2.0 cannot read byte-split float16, the encoding that compresses best.
    readable = [name for name in stored if codec.record[name].base != np.float16]
    first = '["hard"]' if "hard" in stored else '["topk_index"][0]'
    data = "" if label_set.has_images else " --data IMAGES"
    return [
        "## How to load it",
        "",
        "Run these in the folder of the set. `row` joins labels and samples of one source shard, whose files have the same name;"
        " row group i of a labels file is its i-th view. These readers do not check hashes; deit-cli does.",
        *_block(
            "pyarrow",
            "python",
            "import pyarrow.parquet as pq",
            f'labels = pq.read_table("{labels}", filters=[("view", "==", {start})])',
            f'keys = pq.read_table("{samples}")["key"].take(labels["row"])',
            f'print(labels.append_column("key", keys).select(["key", {columns}]).slice(0, 5).to_pylist())',
        ),
        *(_decoding(labels, codec.numpy_lines()) if "topk_code" in stored else ()),
        *_block(
            "DuckDB",
            "python",
            "import duckdb",
            'print(duckdb.sql("""',
            f"    SELECT key, view, {', '.join(readable)} FROM read_parquet('labels/*/*.parquet', filename = true) AS l",
            "    JOIN read_parquet('samples/*.parquet', filename = true) AS s",
            "    ON l.row = s.row AND parse_filename(l.filename) = parse_filename(s.filename)",
            f"    WHERE view = {start} ORDER BY key LIMIT 5",
            '"""))',
        ),
        *(
            ["", "(DuckDB 2.0 does not read the float16 columns `topk_prob` and `tail_mass`.)"]
            if readable != stored
            else []
        ),
        *_block(
            "Polars",
            "python",
            "import polars as pl",
            r'shard = pl.col("file").str.extract(r"([^/\\]+)\.parquet$")',
            'labels = pl.scan_parquet("labels/*/*.parquet", include_file_paths="file").with_columns(shard=shard)',
            'samples = pl.scan_parquet("samples/*.parquet", include_file_paths="file").with_columns(shard=shard)',
            f'joined = labels.filter(pl.col("view") == {start}).join(samples, on=["shard", "row"])',
            f'print(joined.select("key", {columns}).sort("key").head(5).collect())',  # a join does not keep the order
        ),
        *_block(
            "datasets",
            "python",
            "import os",
            "from datasets import load_dataset",
            "folder = os.getcwd()  # or the name of the set on the Hub",
            'labels = load_dataset(folder, "labels", split="train")',
            'samples = load_dataset(folder, "samples", split="train")',
            f'files = {{"labels": "{labels}", "samples": "{samples}"}}  # of one source shard',
            'shard = {kind: load_dataset("parquet", data_files=file, split="train") for kind, file in files.items()}',
            'first = shard["labels"][0]',
            f'print(len(labels), len(samples), shard["samples"][first["row"]]["key"], first{first})',
        ),
        *_block("deit-cli", "bash", f"deit-cli train --labels .{data} --model deit-s --output ../deit-s"),
        "",
    ]


def _decoding(labels: str, lines: Sequence[str]) -> list[str]:
    """Return the block that turns the codes of a label shard into probabilities."""
    return _block(
        "NumPy, probabilities of the codes",
        "python",
        "import numpy as np",
        "import pyarrow.parquet as pq",
        f'code = np.stack(pq.read_table("{labels}")["topk_code"].to_numpy())',
        *lines,
        "print(values[:5])  # K probabilities, most probable first, and the tail mass",
    )


def _block(title: str, language: str, *lines: str) -> list[str]:
    return ["", f"**{title}**", "", f"```{language}", *lines, "```"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> str | None:
    """Return an existing card, or only its first part if it is too large to be one of our cards."""
    with refusals_named(path):
        if not path.exists() and not path.is_symlink():
            return None
        with path.open("rb") as file:
            return file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
