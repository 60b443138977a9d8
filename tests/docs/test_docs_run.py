"""The documentation runs: README and each page of docs/, every command and every file that they show, in order.

Each page is walked in a folder of its own, in which lies what the text takes for granted: small images under the names that it
uses, toy networks for published teachers, and for the pages behind README the label set and the run that README makes. What
stands in the text is run as it stands, but for the substitutions below. What cannot run here is listed with its reason, and
what a page shows that is no command is compared with what was printed, numbers aside.
"""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from support.builders import CLASSES, encoded, photo, with_checkout, write_tars, write_unlabelled
from support.imports import write_fkd, write_tinyvit
from support.s3_server import BUCKET, credentials, s3_server
from support.studies import SCALE, write_study
from support.web_server import web_server

import cli
from pipeline.labels.labelset import LabelSet
from pipeline.storage.yaml import read_yaml
from trainer.studies.study import SCALE_KEYS, read_scale, read_study

ROOT = Path(__file__).parents[2]
OF_ITS_OWN = {ROOT / "docs/tutorial.md"}  # tests/docs/test_tutorial.py runs it
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in {*ROOT.glob("docs/*.md")} - OF_ITS_OWN)]

# --- what is changed in a line before it runs: a pattern, what stands in its place ------------------------------------

SUBSTITUTIONS = [
    # published weights: toys of toy.py, and a checkpoint of a small network of timm
    (r"--teacher regnety_160\b", "--teacher toy:regnety_160"),
    (r"--teacher convnext_base\.fb_in1k", "--teacher toy:convnext_base"),
    (r"--teacher hf-hub:timm/resnet50\.a1_in1k", "--teacher toy:resnet50"),
    (r"--teacher resnet50 ", "--teacher test_resnet "),
    (r"teacher: \[regnety_160, convnext_base\.fb_in1k\]", "teacher: ['toy:regnety_160', 'toy:convnext_base']"),
    (r"--model regnety_160 --pretrained", "--model test_resnet"),
    (r"-c configs/cifar10-transfer.yaml", "-c configs/cifar10-transfer.yaml --no-pretrained"),
    (r"--min-teacher-accuracy 80", "--min-teacher-accuracy 1"),
    # views: 6 stand for 300, and 3 more for the next 300
    (r"(--views|views:) 0:(300|100|30)\b", r"\1 0:6"),
    (r"--views (300:600|100:200)", "--views 6:9"),
    (r"--views 0:10\b", "--views 0:2"),
    # pixels
    (r"--teacher-img-size 384", "--teacher-img-size 32"),
    (r"--include-images 256", "--include-images 20"),
    (r"--shorter-side 256", "--shorter-side 20"),
    # servers: an S3 store and a web server on this machine
    (r"s3://bucket/", "{bucket}/"),
    (r"https://host/", "{web}/"),
    (r"\{000\.\.127\}", "{{000000..000001}}"),
    # small studies for those of configs/
    (r"compare configs/studies/\w+\.yaml", "compare small/study.yaml"),
    (r"--scale configs/scales/\w+\.yaml", "--scale small/scale.yaml"),
    (r"report studies/digits/distillation\.json", "report studies/scale/study.json"),
    # other machines' folders
    (r"/mnt/imagenet/", "imagenet/"),
    (r"/scratch/", ""),
    (r"merge shards part-a part-b", "merge shards a/part b/part"),
    (r"(?<= )/([ab])/", r"\1/"),
    (r"--nproc-per-node 8", "--nproc-per-node 2"),
    # what `labels info` printed
    (r"sha256:0123456789abcdef\w*", "{manifest}"),
]

# --- what is added to a line, so that it takes seconds ------------------------------------------------------------------

TINY = "--patch-size 8 --embed-dim 32 --depth 1 --num-heads 2"
QUICK = "--epochs 1 --warmup-epochs 0 -b 8 --grad-accum-steps 1 -j 0 --device cpu"
ADDED = {
    "precompute": "-j 0 --device cpu",
    "train": QUICK,
    "evaluate": "-j 0 --device cpu",
    "analyse": "-j 0 --device cpu",
    "estimate": "-j 0 --device cpu --seconds 0.1",
    "bench stage1": "-j 0 --device cpu --seconds 0.1",
    "bench stage2": f"{TINY} -b 8 -j 0 --device cpu --seconds 0.1",
    "report": "-j 0 --device cpu",
    "bench inference": "--device cpu --seconds 0.01",
    "labels extend": "-j 0 --device cpu",
    "labels export": "-j 0",
    "pack": "-j 0",
    "compare": "--device cpu --seed 0",
}


def added(line: str) -> str:
    """Return a line with what makes it quick, before any comment."""
    line = re.sub(r"\s+#.*", "", line)
    command = next((name for name in ADDED if re.search(rf"deit-cli {name}\b", line)), None)
    if command is None:
        return line
    more = [ADDED[command]]
    if command == "train" and "--model test_resnet" not in line:
        more.append(TINY)
    if command in ("precompute", "estimate", "bench stage1") and "--teacher " not in line and " -c " not in line:
        more.append("--teacher toy:regnety_160")  # what the option means where it is left out
    if command == "labels extend" and "--teacher " not in line:
        more.append(
            "--teacher toy:regnety_160"
        )  # extend loads the published one by its name; a function must be passed
    has_recipe = command in ("precompute", "estimate", "bench stage1") or (
        command == "train" and (" -c " in line or "--labels" not in line)
    )
    if has_recipe and "img_size=" not in line:
        more.append(f"--set img_size={32 if '384' in line else 16}")
    return " ".join([line, *more])


# --- what cannot run here: a pattern, the reason --------------------------------------------------------------------------

CANNOT = {
    r"^pip install": "the environment of the tests has the packages; tests/evidence/test_demo.py runs the demo",
    r"^torchrun --nnodes 4": "four machines",
    r"^deit-cli init$": "questions on a terminal; tests/trainer/test_advice.py answers them",
    r"^deit-cli analyse .*timm:": "published weights, which need the network",
    r"^#!/bin/bash\n#SBATCH": "Slurm; tests/docs/test_docs.py reads the scripts, tests/machine/test_ranks.py tests the variables",
    r"^sbatch ": "Slurm",
    r"^sky ": "SkyPilot",
    r"^ray start|--engine ray": "a Ray cluster, which tests/stage1/test_ray.py starts",
    r"^deit-cli completion ": "it writes into the user's home; tests/settings/test_completion.py runs the scripts in shells",
    r"--push hf://": "the Hub, which needs the network; tests/exports/test_card_and_push.py pushes to one on this machine",
    r"--identity-provider": "Sigstore, which needs the network and somebody's identity",
    r"^mkdir -p imagenet/train imagenet/val": "the archives of ILSVRC",
    r"^python train\.py": "timm's script is in no package; tests/exchange/test_export.py reads the export with timm",
}


@dataclass
class Page:
    """A page that is walked: its folder, what its commands printed, and what was not run."""

    name: str
    folder: Path
    names: dict[str, str]
    printed: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)

    def run(self, line: str) -> None:
        """Run a line as the page shows it, and keep what it prints."""
        for pattern, instead in SUBSTITUTIONS:
            line = re.sub(pattern, instead, line)
        line = (
            re.sub(r"\{(bucket|web|manifest)\}", lambda name: self.names[name[1]], added(line))
            .replace("{{", "{")
            .replace("}}", "}")
        )
        words = shlex.split(line, comments=True)
        if words[0] == "deit-cli" and not set(words) & {"&&", "|", ">"}:
            code, printed = self._here(words[1:])
        else:
            code, printed = self._in_a_shell(line)
        self.printed.append(printed)
        assert code == 0, f"{self.name}: {line}\n{printed[-3000:]}"
        assert "Traceback" not in printed

    def _here(self, arguments: list[str]) -> tuple[int, str]:
        messages: list[str] = []
        keeper = logging.NullHandler()
        keeper.handle = lambda record: bool(messages.append(record.getMessage()))
        logging.getLogger("deit_cli").addHandler(keeper)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                patch.syspath_prepend(str(self.folder))
                result = CliRunner().invoke(cli.commands, arguments)
        finally:
            logging.getLogger("deit_cli").removeHandler(keeper)
        said = "\n".join([*messages, result.output, str(result.exception or "")])
        return (result.exit_code if isinstance(result.exit_code, int) else 1), said

    def _in_a_shell(self, line: str) -> tuple[int, str]:
        environment = with_checkout(OMP_NUM_THREADS="1", PATH=f"{self.folder}/bin:{os.environ['PATH']}")
        done = subprocess.run(
            ["bash", "-ec", line],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout


# --- what a page shows that is no command -----------------------------------------------------------------------------


def printed_somewhere(page: Page, lines: list[str]) -> None:
    """The line was printed by a command of the page, numbers and hashes aside."""
    pattern = re.sub(r"(?:\\ )+", r"\\s+", re.escape(lines[0].split("…")[0]))
    pattern = re.sub(r"(?<=sha256:)\w+", r"\\w+", pattern)
    pattern = re.sub(r"(?<![a-z0-9])\d+(\\s\+[a-z]+)s\b", r"\\d+\1s?", pattern)  # one shard, two shards
    pattern = re.sub(r"(?<![a-z0-9])\d+", r"\\d+", pattern)
    assert any(re.search(pattern, text) for text in page.printed), f"{page.name}: nothing printed {lines[0]!r}"


def table_of_the_demo(page: Page, lines: list[str]) -> None:
    """The demo's table has these titles in these places."""
    from trainer.evaluate import ANSWERS
    from trainer.evidence.demo import demo_table

    heads = {head: {"top1": 10.0} for head in ANSWERS}
    one = {"class_head": {"top1": 10.0}}
    scores = {"teacher": one, "hard": heads, "soft": heads, "alone": one}
    table = demo_table({"scores": scores, "images": 797, "report": "x", "pictures": []}).splitlines()
    assert [re.sub(r"\d+\.\d", "N", line) for line in lines] == [
        re.sub(r"\d+\.\d", "N", line) for line in table[: len(lines)]
    ]


def recipe_file(page: Page, lines: list[str]) -> None:
    (page.folder / "recipe.yaml").write_text("\n".join(lines))
    page.run(
        "deit-cli precompute --data imagenet/train --teacher regnety_160 --out with-recipe --views 0:2 --recipe recipe.yaml"
    )


def settings_file(page: Page, lines: list[str]) -> None:
    text = "\n".join(lines)
    for pattern, instead in SUBSTITUTIONS:
        text = re.sub(pattern, instead, text)
    (page.folder / "labels.yaml").write_text(text)
    page.run("deit-cli precompute -c labels.yaml --dry-run --out elsewhere")


def line_of_train_yaml(page: Page, lines: list[str]) -> None:
    """`init` has written a file for `train` that sets these."""
    written = read_yaml(page.folder / "mine/train.yaml")
    assert {line.split(":")[0] for line in lines} <= set(written)


def manifest_then_pinned(page: Page, lines: list[str]) -> None:
    page.run("deit-cli labels info shards")
    printed_somewhere(page, lines[:1])
    page.names["manifest"] = f"sha256:{LabelSet.open(page.folder / 'shards').manifest_sha256}"
    page.run(lines[-1])


def study_file(page: Page, lines: list[str]) -> None:
    """The example is a study at the scale that it names."""
    (page.folder / "scales").symlink_to(ROOT / "configs/scales")
    (page.folder / "studies-of-mine").mkdir()
    path = page.folder / "studies-of-mine/tokens.yaml"
    path.write_text("\n".join(lines))
    assert len(read_study(path).cells) == 9


def scale_file(page: Page, lines: list[str]) -> None:
    """The example is a scale."""
    path = page.folder / "example.yaml"
    path.write_text("\n".join(lines))
    scale = read_scale(path)
    assert set(scale.teachers) == {"cnn", "published"}
    assert scale.images == 16384


def scale_of_ones_own(page: Page, lines: list[str]) -> None:
    """The example is a complete scale; smaller networks and images stand for its own when a study is run with it."""
    path = page.folder / "flowers.yaml"
    path.write_text("\n".join(lines))
    read_scale(path)
    values: Any = read_yaml(path)
    assert set(values) < set(SCALE_KEYS)
    for part in ("labels", "teachers", "students", "train"):
        values[part] = {**values[part], **SCALE[part]}
    path.write_text(json.dumps({**values, "evaluate": SCALE["evaluate"]}))


def files_made(page: Page, lines: list[str]) -> None:
    """The folder holds the files of this tree."""
    folder = page.folder / lines[0].strip()
    for line in lines[1:]:
        assert (folder / line.split()[0]).exists(), line


def number_of_the_page(page: Page, lines: list[str]) -> None:
    """The report has this number, whatever its value."""
    pattern = re.sub(r"\d+\.\d+(?=[\"<])", r"[\\d.]+", re.escape(lines[0].strip()).replace(r"\.", "."))
    assert re.search(pattern, (page.folder / "report.html").read_text()), pattern


def error_of_a_run_that_exists(page: Page, lines: list[str]) -> None:
    """Training into the folder of a run ends with this line."""
    code, printed = page._here(["train", "--labels", "shards", "--model", "deit-s", "--output", "runs/deit-s"])
    assert code != 0
    assert f"error: {printed.splitlines()[-1]}" == lines[0]


def checked_elsewhere(page: Page, lines: list[str]) -> None:
    """tests/docs/test_architecture.py reads it."""


SHOWN: dict[tuple[str, str], Callable[[Page, list[str]], None]] = {
    # page, beginning of the first line
    ("README.md", "top-1, %"): table_of_the_demo,
    ("docs/data.md", "photos: folder"): printed_somewhere,
    ("docs/init.md", "batch_size: 16"): line_of_train_yaml,
    ("docs/init.md", "teacher  "): printed_somewhere,
    ("docs/init.md", "recipe  "): printed_somewhere,
    ("docs/init.md", "run  "): printed_somewhere,
    ("docs/labelling.md", "preset: deit"): recipe_file,
    ("docs/architecture.md", "cli.py  "): checked_elsewhere,
    ("docs/architecture.md", "image -> decode"): checked_elsewhere,
    ("docs/report.md", "<data value"): number_of_the_page,
    ("docs/recipes.md", "starting from"): printed_somewhere,
    ("docs/recipes.md", "data: imagenet/train"): settings_file,
    ("docs/import.md", "fkd-labels/"): files_made,
    ("docs/troubleshooting.md", "error: runs/deit-s"): error_of_a_run_that_exists,
    ("docs/trust.md", "pixels  "): printed_somewhere,
    ("docs/trust.md", "manifest  "): manifest_then_pinned,
    ("docs/studies.md", "title: "): study_file,
    ("docs/studies.md", "data: cifar10"): scale_file,
    ("docs/studies.md", "data: flowers"): scale_of_ones_own,
    ("docs/studies.md", "cell  "): printed_somewhere,
}
LATER = {printed_somewhere}  # a page may say what is printed before it shows the command
FILES = {"docs/teachers.md": "my_teacher.py"}  # pages whose Python is a file that the text names


# --- the walk ---------------------------------------------------------------------------------------------------------

COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:deit-cli|torchrun|pip|python|openssl|ray|sbatch|sky|model_signing) |from \w+ import |import "
)


def blocks(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the kind (a fence's language, or `text`) and the lines of each block of a page, continued lines joined."""
    lines = re.sub(r" *\\\n\s*", " ", (ROOT / page).read_text()).splitlines()
    at, after_blank = 0, True
    while at < len(lines):
        if lines[at].startswith("```"):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].startswith("```"))
            yield lines[at][3:], lines[at + 1 : end]
            at, after_blank = end + 1, False
        elif lines[at].startswith("    ") and after_blank:
            end = next(
                (i for i in range(at, len(lines)) if lines[i].strip() and not lines[i].startswith("    ")), len(lines)
            )
            yield "text", [line[4:] for line in lines[at:end]]
            at, after_blank = end, False
        else:
            at, after_blank = at + 1, not lines[at].strip()


def walk(page: Page) -> None:
    """Do what the page shows, block by block."""
    later: list[tuple[Callable[[Page, list[str]], None], list[str]]] = []
    for kind, lines in blocks(page.name):
        while lines and not lines[-1].strip():
            lines.pop()
        shown = next(
            (do for (name, begin), do in SHOWN.items() if name == page.name and lines[0].startswith(begin)), None
        )
        if shown is not None and shown in LATER:
            later.append((shown, lines))
        elif shown is not None:
            shown(page, lines)
        elif kind == "python" or lines[0].startswith(("from ", "import ")):
            _run_python(page, lines)
        elif kind == "bash":
            _run_line(page, "\n".join(lines))
        else:
            for line in lines:
                assert COMMAND.match(line), f"{page.name} shows {line!r}, and nothing says what to do with it"
                _run_line(page, line)
    for shown, lines in later:
        shown(page, lines)


def _run_line(page: Page, line: str) -> None:
    reason = next((pattern for pattern in CANNOT if re.search(pattern, line)), None)
    if reason is None:
        page.run(line)
    else:
        page.left_out.add(reason)


def _run_python(page: Page, lines: list[str]) -> None:
    script = page.folder / FILES.get(page.name, "example.py")
    script.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, script.name], cwd=page.folder, env=with_checkout(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{page.name}: {done.stderr}"
    page.printed.append(done.stdout)


# --- the world --------------------------------------------------------------------------------------------------------

TOY = '''
"""Small networks that stand for published teachers."""

import timm
import torch


def _toy(seed, classes=3):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=classes), {"input_size": (3, 32, 32)}


def regnety_160():
    return _toy(1)


def convnext_base():
    return _toy(2)


def resnet50():
    return _toy(3)
'''
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGES = {
    "imagenet/val": (CLASSES, 2),
    "flowers/train": (("rose", "tulip"), 6),
    "flowers/test": (("rose", "tulip"), 2),
    "cifar10/train": (CIFAR, 2),
    "cifar10/test": (CIFAR, 1),
}


def write_images(folder: Path, classes: tuple[str, ...], number: int) -> None:
    """Write an image folder of photo-like images, so many of each class."""
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for each in range(number):
            (folder / name / f"{name}_{each}.jpg").write_bytes(encoded(photo(100 * index + each, 40, 48)))


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[tuple[str, str, Path]]:
    """An S3 store and a web server: their addresses, and the folder that the latter serves."""
    served = tmp_path_factory.mktemp("served")
    with ExitStack() as stack:
        store = stack.enter_context(s3_server(tmp_path_factory.mktemp("s3")))
        yield store, stack.enter_context(web_server(served)).url, served


@pytest.fixture(scope="module")
def world(tmp_path_factory, servers) -> Iterator[Path]:
    """The folder that every page begins in."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "bin").mkdir()
    program = folder / "bin/deit-cli"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import cli; cli.main()' \"$@\"\n")
    program.chmod(0o755)
    (folder / "toy.py").write_text(TOY)
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, (classes, number) in IMAGES.items():
        write_images(folder / name, classes, number)
    write_tars(folder / "imagenet/train", (12, 12))
    for machine in ("a", "b"):
        shutil.copytree(folder / "imagenet", folder / machine / "imagenet")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3)
    torch.save(network.state_dict(), folder / "resnet50.pth")
    torch.save({"model": network.state_dict()}, folder / "checkpoint.pth")
    with pytest.MonkeyPatch.context() as patch:
        credentials(patch, servers[0])
        for name, value in {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }.items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="module")
def after_readme(world, tmp_path_factory) -> Path:
    """What README's main job leaves."""
    folder = copied(world, tmp_path_factory.mktemp("after") / "readme")
    page = Page("README.md", folder, {})
    page.run("deit-cli precompute --data imagenet/train --teacher regnety_160 --out shards --views 0:300")
    page.run("deit-cli train --labels shards --model deit-s --eval-data imagenet/val --output runs/deit-s")
    return folder


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, symlinks=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs(name, world, servers, tmp_path, request):
    folder = copied(world if name == "README.md" else request.getfixturevalue("after_readme"), tmp_path / "here")
    bucket = f"s3://{BUCKET}/{re.sub(r'[^a-z0-9]', '-', name.lower())}"
    page = Page(name, folder, {"web": servers[1], "bucket": bucket})
    if name in GIVEN:
        GIVEN[name](page, servers[2])
    page.printed.clear()
    walk(page)


# What the text of a page takes for granted, beside what README made.


def before_sharing(page: Page, served: Path) -> None:
    """Two machines labelled, and a web server has the set."""
    for machine in "ab":
        page.run(
            f"deit-cli precompute --data imagenet/train --teacher regnety_160 --out machine-{machine}/shards --views 0:300"
        )
    shutil.copytree(page.folder / "shards", served / "shards", dirs_exist_ok=True)


def before_recipes(page: Page, _: Path) -> None:
    shutil.rmtree(page.folder / "runs")  # the page trains them
    for model, name in (
        ("deit-b", "deit-b"),
        ("deit-b", "deit-b-distilled"),
        ("deit-s", "deit-s"),
        ("deit-s", "deit-s-distilled"),
    ):
        page.run(f"deit-cli train --distillation-type none --data imagenet/train --model {model} --output runs/{name}")


def before_imagenet(page: Page, _: Path) -> None:
    """The student that the page fine-tunes."""
    page.run(
        "deit-cli train --distillation-type none --data imagenet/train --model deit-b --output runs/deit-b-distilled"
    )


def before_training(page: Page, _: Path) -> None:
    shutil.rmtree(page.folder / "runs")


def before_teachers(page: Page, _: Path) -> None:
    page.run("deit-cli train --distillation-type none --data flowers/train --model test_resnet --output runs/teacher")


def before_data(page: Page, _: Path) -> None:
    """Images without class folders, their classes by name, and the names of all classes; and tars."""
    write_unlabelled(page.folder / "photos", page.folder / "numbers.csv")
    rows = "".join(f"img-{number:04}.jpg,{CLASSES[number % 3]}\n" for number in range(23))
    (page.folder / "labels.csv").write_text(rows)
    (page.folder / "names.txt").write_text("".join(f"{name}\n" for name in sorted(CLASSES)))
    write_tars(page.folder / "imagenet-tars", (12, 12))


def before_trust(page: Page, _: Path) -> None:
    page.run("deit-cli labels push shards s3://bucket/shards")


def before_import(page: Page, _: Path) -> None:
    write_fkd(page.folder / "FKD_soft_label/imagenet/train")
    write_tinyvit(page.folder / "teacher_logits")


def before_format(page: Page, _: Path) -> None:
    shutil.rmtree(page.folder / "shards")
    shutil.copytree(ROOT / "tests/golden/v1/shards", page.folder / "shards")


def before_remote(page: Page, served: Path) -> None:
    """Tars and their labels lie on the web server and in the bucket."""
    shutil.rmtree(page.folder / "runs")
    shutil.rmtree(served / "shards", ignore_errors=True)
    write_tars(served, (12, 12))
    page.run(f"deit-cli precompute --data {served} --teacher regnety_160 --out {served}/shards --views 0:300")
    page.run(f"deit-cli labels push {served}/shards s3://bucket/shards")
    import fsspec

    store = fsspec.filesystem("s3")
    for file in served.glob("*.t*"):
        store.put_file(str(file), f"{page.names['bucket']}/tars/{file.name}")


def before_studies(page: Page, _: Path) -> None:
    """Small studies, of the images that README names."""
    scale = {**SCALE, "data": str(page.folder / "imagenet/train"), "eval_data": str(page.folder / "imagenet/val")}
    write_study(page.folder / "small", scale=scale)


def before_studies_page(page: Page, served: Path) -> None:
    """Two runs that somebody has already."""
    before_studies(page, served)
    for name in "ab":
        page.run(f"deit-cli train --labels shards --model deit-s --output runs/{name}")


GIVEN: dict[str, Callable[[Page, Path], None]] = {
    "README.md": before_studies,
    "docs/data.md": before_data,
    "docs/imagenet.md": before_imagenet,
    "docs/recipes.md": before_recipes,
    "docs/training.md": before_training,
    "docs/studies.md": before_studies_page,
    "docs/teachers.md": before_teachers,
    "docs/sharing.md": before_sharing,
    "docs/import.md": before_import,
    "docs/trust.md": before_trust,
    "docs/format-v1.md": before_format,
    "docs/remote.md": before_remote,
}


def test_what_cannot_run_is_shown_somewhere():
    """A reason that no page needs any more is a line that hides the next one."""
    shown = ["\n".join(lines) for page in PAGES for _, lines in blocks(page)]
    for pattern in CANNOT:
        assert any(
            re.search(pattern, line) or re.search(pattern, block) for block in shown for line in block.splitlines()
        ), pattern
    for page, begin in SHOWN:
        assert any(lines[0].startswith(begin) for _, lines in blocks(page)), (page, begin)
