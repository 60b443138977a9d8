"""Every option of every command, and every choice, once through the real program: it does what it says, or is refused in words.

The lists below are held against the command line itself: an option without a trial of another value than its default, or a
choice that no trial takes, fails `test_no_option_is_left_out`.
"""

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import timm
import torch
from click.core import ParameterSource
from click.testing import CliRunner
from safetensors.torch import save_file
from support.builders import encoded, make_labels, photo, small_teacher, with_checkout, write_tars, write_unlabelled
from support.command_tree import COMMANDS
from support.imports import write_fkd, write_tinyvit
from support.signing import write_key
from support.studies import SCALE, STUDY, write_study

import cli
from pipeline.errors import DeitCliError
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.views.recipe import PRESETS, Recipe
from trainer.evidence.demo import TITLES


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        output: stdout.
        said: messages on stderr.
        settings: what the command made of its options.
        folder: in which it ran, which is empty before.
        out: what it was to write, by default.
        compiled: how many networks it compiled.
    """

    output: str
    said: str
    settings: dict[str, Any]
    folder: Path
    out: Path
    compiled: int


@dataclass(frozen=True)
class Trial:
    """One call of a command.

    Attributes:
        args: behind those that all trials of the command begin with. {names} are those of `world`.
        refused: what the refusal says; empty: it succeeds.
        seen: what shows an effect that the settings do not show.
    """

    args: str = ""
    refused: str = ""
    seen: Callable[[Outcome], bool] = lambda _: True


TINY = "--model deit-ti --patch-size 8 --embed-dim 32 --depth 1 --num-heads 2 -b 12 -j 0 --device cpu"
SMALL_TEACHER = (
    "--teacher test_resnet --no-pretrained --teacher-img-size 16 --set img_size=16 --set mix_block=8 -j 0 --device cpu"
)
MINE = "--teacher support.builders:confident_cnn"  # a function must be passed again
BEGIN = {
    "train": f"--labels {{labels}} --output out {TINY} --epochs 1 --log-interval 1",
    "precompute": f"--data {{data}} --out out --views 2 {SMALL_TEACHER}",
    "estimate": f"--data {{data}} {SMALL_TEACHER} --model deit-ti --seconds 0.1",
    "bench stage1": f"--data {{data}} {SMALL_TEACHER} --seconds 0.1",
    "bench stage2": f"--labels {{labels}} {TINY} --seconds 0.1",
    "evaluate": "--checkpoint {run}/last --data {data} -j 0",
    "report": "{run} {labels} -j 0",
    "export": "{run} --to onnx --out out",
    "bench inference": "{run} --seconds 0.01",
    "analyse": "{run} -j 0",
    "labels info": "{labels}",
    "labels verify": "{labels}",
    "labels sign": "{mine}",
    "labels audit": "{labels}",
    "labels show": "{labels}",
    "labels push": "{labels} out",
    "labels pull": "{labels} out",
    "labels merge": "out {labels}",
    "labels extend": "{mine} --views 3:4 -j 0 --device cpu",
    "labels import": "",
    "labels card": "{mine}",
    "labels export": "{labels} out -j 0",
    "pack": "{data} out -j 0",
    "doctor": "",
    "index": "{copy}",
    "models": "",
    "recipes": "",
    "init": f"mine --data {{data}} --teacher {MINE.removeprefix('--teacher ')} --yes",
    "runs": "{run}",
    "compare": "{study} --out out",
    "demo": "",
    "completion": "",
    "man": "--out out",
}
READING = (  # every option for reading images: what it says is how {data} and {copy} are anyway
    "--image-key jpg --label-key cls --image-root {folder} --class-depth 1 --class-order {data}/classes.txt"
    " --labels-file {folder}/labels.csv"
)
UNREAD = Trial("--label-key cls", "--label-key says how the images at --data are read: pass that too")
OFFLINE = "Hub|published weights"  # the tests have no network


def saved(name: str, value: Any) -> Callable[[Outcome], bool]:
    """Return a look at what a training run has saved."""
    return lambda got: json.loads((got.out / "config.json").read_text())["config"][name] == value


def plan(path: str, value: Any) -> Callable[[Outcome], bool]:
    """Return a look at the plan of the label set that was made."""

    def look(got: Outcome) -> bool:
        found = json.loads((got.out / "plan.json").read_text())
        for part in path.split("."):
            found = found[int(part) if part.isdecimal() else part]
        return found == value

    return look


def plan_has(got: Outcome, name: str) -> bool:
    """Whether the plan says of the source how it is read in this respect."""
    return name in json.loads((got.out / "plan.json").read_text())["source"]["reading"]


def exists(*names: str) -> Callable[[Outcome], bool]:
    return lambda got: all((got.folder / name).exists() for name in names)


def metrics(got: Outcome, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (got.out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def study(name: str, value: Any) -> Callable[[Outcome], bool]:
    """Return a look at what a study has come to."""
    return lambda got: json.loads((got.out / "study.json").read_text())[name] == value


def is_json(got: Outcome) -> bool:
    return isinstance(json.loads(got.output), dict)


def said(**fields: Any) -> Callable[[Outcome], bool]:
    """Return a look at the JSON that a command printed, and nothing beside it."""
    return lambda got: json.loads(got.output).items() >= fields.items()


FIELDS = {
    # each field of a recipe, as YAML: a value that is not its default
    "img_size": "24",
    "crop": "center",
    "scale": "[0.4, 1.0]",
    "ratio": "[0.9, 1.1]",
    "crop_pct": "0.5",
    "interpolation": "bilinear",
    "hflip": "0",
    "aa": "null",
    "reprob": "1e-1",
    "mixup": "0",
    "cutmix": "0.5",
    "mixup_prob": "0.5",
    "mixup_switch_prob": "0.25",
    "mix_block": "4",
    "views_per_pairing": "1",
    "seed": "7",
}

MEASURED = [
    Trial("-c {folder}/labels.yaml --dtype auto --workers 1"),
    Trial("--data {copy} --views 5 --topk 1 --precision log8 --views-per-shard 2 --batch-size 8 --processes 1"),
    Trial("--precision float16 --dtype float32 --recipe none --seconds 0.11"),
    Trial("--precision float32 --dtype bfloat16 --teacher test_efficientnet --teacher-img-size 24"),
    Trial("--dtype float16 --teacher-checkpoint {folder}/teacher.safetensors"),
    Trial("--pretrained", OFFLINE),
    Trial("--compile", seen=lambda got: got.compiled == 1),
    Trial("--render cpu"),
    Trial("--render auto"),
    Trial("--render gpu", "--render gpu: it needs a CUDA device, this run uses cpu"),
    Trial(f"--data {{copy}} {READING}"),
]

TRIALS: dict[str, list[Trial]] = {
    "train": [
        Trial("-c {folder}/train.yaml", seen=saved("weight_decay", 0.25)),
        Trial("--expect-manifest {manifest}", seen=lambda got: saved("expect_manifest", got.settings["expect_manifest"][0])(got)),
        Trial(
            "--labels {second} --label-weights 0.7,0.3 --label-mode mean --distillation-type soft",
            seen=lambda got: "teachers support.builders:confident_cnn (0.7) and test_resnet (0.3), averaged" in got.said,
        ),
        Trial("--labels {second} --label-mode random", seen=lambda got: "(0.5), one drawn for each view" in got.said),
        Trial("--render cpu", seen=saved("render", "cpu")),
        Trial("--render auto", seen=saved("render", "auto")),
        Trial("--render gpu", "--render gpu: it needs a CUDA device, this run uses cpu"),
        Trial("--labels {second} --label-weights 1", "must have one value for each of the 2 --labels"),
        Trial("--labels {second} --label-weights much", "'much' are not numbers with commas between them"),
        Trial("--labels {second} --expect-manifest {manifest}", "must have one value for each of the 2 --labels"),
        Trial(f"--expect-manifest sha256:{'0' * 64}", "is not the pinned manifest"),
        Trial("--data {copy}"),
        Trial(f"--data {{copy}} {READING}"),
        UNREAD,
        Trial("--labels-file {folder}/labels.csv --eval-data {data}", "--labels-file has the class labels of --data"),
        Trial("--eval-labels-file {folder}/labels.csv", "--eval-labels-file has the class labels of --eval-data"),
        Trial("--eval-data {images} --eval-labels-file {folder}/labels.csv --class-order {data}/classes.txt",
              seen=lambda got: metrics(got, "eval")[0]["images"] == 23),
        Trial("--eval-data {images}", "no class labels"),
        Trial("--cache-dir cache --cache-size 1GB --min-rate 1kB"),
        Trial("--cache-size much", "--cache-size"),
        Trial("--min-rate slow", "--min-rate"),
        Trial("--output elsewhere", seen=exists("elsewhere/last")),
        Trial("--model deit-s", seen=lambda got: "student deit-s" in got.said),
        Trial("--img-size 16"),
        Trial("--img-size 24", "must be the size of the views, 16, got 24"),
        Trial("--patch-size 4 --embed-dim 48 --depth 2 --num-heads 4"),
        Trial("--init {run}/last", seen=lambda got: "all weights as they are" in got.said),
        Trial("--linear-probe --init {run}/last", seen=lambda got: "linear probe" in got.said),
        Trial("--linear-probe", "pass --init or --pretrained too"),
        Trial("--pretrained", OFFLINE),
        Trial("--distillation-type none", seen=lambda got: "distill_loss" not in metrics(got)[0]),
        Trial("--distillation-type none --second-token class", seen=lambda got: "second_class_loss" in metrics(got)[0]),
        Trial("--second-token class", "--second-token class needs --distillation-type none"),
        Trial("--second-token distillation --probe-interval 1", seen=lambda got: "output" in metrics(got, "tokens")[0]),
        Trial("--distillation-type hard --distillation-alpha 0.25"),
        Trial("--distillation-type soft --distillation-tau 3 --tail spread --soft-reduction batchmean"),
        Trial("--distillation-type soft --tail renormalise --soft-reduction deit --smoothing 0.2"),
        Trial("--epochs 2 --warmup-epochs 1.5", seen=lambda got: metrics(got)[-1]["epoch"] == 1),
        Trial("-b 6 --grad-accum-steps 2", seen=lambda got: "2 passes" in got.said),
        Trial("--lr 3e-3", seen=lambda got: "lr 0.003" in got.said),
        Trial("--lr-base 0.1", seen=lambda got: "lr 0.00234" in got.said),
        Trial("--warmup-lr 1e-5 --min-lr 1e-6"),
        Trial("--weight-decay 0 --drop-path 0 --clip-grad 1", seen=lambda got: "grad_norm" in metrics(got)[0]),
        Trial("--repeated-aug 1 --shuffle-window 1 --seed 3"),
        Trial("--views 1:3"),
        Trial("--views 1:9", "--views must be START:STOP within the labelled views"),
        Trial("--labelled-fraction 0.5"),
        Trial("--labelled-fraction 0", "--labelled-fraction must be in"),
        Trial("--view-policy cycle --eval-interval 2"),
        Trial("--view-policy random"),
        Trial("--view-policy once"),
        Trial("--no-model-ema", seen=lambda got: not (got.out / "last-ema").exists()),
        Trial("--model-ema-decay 0.9 --model-ema-warmup", seen=exists("out/last-ema")),
        Trial("--eval-data {data} --crop-pct 1", seen=lambda got: metrics(got, "eval")[0]["images"] == 23),
        Trial("--resume", seen=exists("out/last")),
        Trial("--resume auto --recovery-interval 1 --checkpoint-interval 3", seen=exists("out/state.safetensors")),
        Trial("--resume never --log-interval 2"),
        Trial("--log-tensorboard", seen=exists("out/tensorboard")),
        Trial("--log-wandb --wandb-project trials", seen=exists("out/wandb.json")),
        Trial("--workers 1"),
        Trial("--compile --amp-dtype auto", seen=lambda got: got.compiled == 1),
        Trial("--amp-dtype bfloat16"),
        Trial("--amp-dtype float32 --deterministic"),
        Trial("--recipe deit --set img_size=16 --set mix_block=8"),
        Trial("--recipe none", "made with another recipe"),
        Trial("--set scale=[0.4,1.0]", "made with another recipe"),
        Trial("--log-json log.json", seen=exists("log.json")),
        Trial("--json", seen=said(path="out", updates=2, exported=["last", "last-ema"], best=None)),
    ],
    "precompute": [
        Trial("-c {folder}/labels.yaml", seen=plan("topk", 1)),
        Trial("--data {copy} --out elsewhere", seen=exists("elsewhere/manifest.json")),
        Trial(READING, seen=lambda got: plan("source.reading.image_key", "jpg")(got) and not plan_has(got, "label_key")),
        Trial("--data {images} --labels-file {folder}/labels.csv", seen=lambda got: "of 23 labelled images" in got.said),
        Trial("--label-key cls --class-order natural", seen=plan("source.reading", {"class_order": "natural", "label_key": "cls"})),
        Trial("--data {digits} --set mix_block=2", "the order of the classes of .* is open: as text 0, 1, 10, 11 and 8 more, by numbers 0, 1, 2, 3"),
        Trial("--data {digits} --set mix_block=2 --class-order natural", seen=plan("source.class_names", [str(n) for n in range(12)])),
        Trial("--views 1:3 --views-per-shard 1", seen=exists("out/labels/views-00002-00002")),
        Trial("--topk 2 --precision float16", seen=plan("topk", 2)),
        Trial("--topk 0 --precision float32", seen=plan("precision", "float32")),
        Trial("--precision log8", seen=plan("precision", "log8")),
        Trial("--batch-size 8 --workers 1"),
        Trial("--batch-size auto --engine local --address head:6379", "pass --engine ray as well"),
        Trial("--engine ray --address 127.0.0.1:1", "no Ray cluster answers"),
        Trial("--engine local --processes 2"),
        Trial("--on-bad-image fail"),
        Trial("--on-bad-image skip --data {bad}", seen=lambda got: "1 of 23 images cannot be decoded" in got.said),
        Trial("--include-images", seen=exists("out/images/train-000000.tar")),
        Trial("--include-images 12", seen=exists("out/images/train-000000.tar")),
        Trial("--min-teacher-accuracy 1 --accuracy-samples 10", seen=lambda got: "of 10 labelled images" in got.said),
        Trial("--teacher test_resnet --teacher test_efficientnet", seen=lambda got: "teacher test_efficientnet" in got.said),
        Trial("--teacher-checkpoint {folder}/teacher.safetensors"),
        Trial("--teacher support.builders:confident_cnn", seen=plan("teacher.members.1.name", "support.builders:confident_cnn")),
        Trial("--pretrained", OFFLINE),
        Trial("--teacher-img-size 24", seen=lambda got: "sees 24 px" in got.said),
        Trial("--device cpu --dtype auto"),
        Trial("--dtype float32"),
        Trial("--dtype bfloat16"),
        Trial("--dtype float16"),
        Trial("--device cuda:7", "--device 'cuda:7' cannot be used"),
        Trial("--compile", seen=lambda got: got.compiled == 1),
        Trial("--render cpu"),
        Trial("--render auto", seen=lambda got: "views are rendered on the CPU: it needs a CUDA device" in got.said),
        Trial("--render gpu", "--render gpu: it needs a CUDA device, this run uses cpu"),
        Trial("--dry-run", seen=lambda got: "teacher passes 46" in got.output and not got.out.exists()),
        Trial("--dry-run --json", seen=said(images=23, blocks=[[0, 2]], teacher_passes=46)),
        Trial("--json", seen=said(path="out", sealed=True, views=[0, 2], images=23)),
        Trial("--log-json log.json", seen=exists("log.json")),
        Trial("--recipe {folder}/recipe.yaml", seen=plan("recipe.scale", [0.4, 1.0])),
        *(Trial(f"--recipe {name}", seen=plan("recipe.hflip", preset.hflip)) for name, preset in PRESETS.items()),
        *(
            Trial(f"--set '{name}={text}'", seen=plan(f"recipe.{name}", text if name in ("crop", "interpolation") else json.loads(text)))
            for name, text in FIELDS.items()
        ),
        Trial("--set renderer=1", seen=plan("recipe.renderer", 1)),
        Trial("--set renderer=3", "this version renders recipes of renderer 1 and 2, the recipe asks for 3"),
    ],
    "estimate": [
        *MEASURED,
        Trial("--images 1000 --students 3 --epochs 10 --model deit-s --json", seen=is_json),
        Trial("--patch-size 4 --embed-dim 48 --depth 2 --num-heads 4", seen=lambda got: "(deit-ti, patch_size 4, embed_dim 48, depth 2, num_heads 4, by" in got.output),
    ],
    "bench stage1": [*MEASURED, Trial("--images 10 --json", seen=is_json)],
    "bench stage2": [
        Trial("-c {folder}/train.yaml --json", seen=is_json),
        Trial("--expect-manifest {manifest} --data {copy} --cache-dir cache --cache-size 1GB --min-rate 1B --model deit-s --img-size 16"),
        Trial("--patch-size 4 --embed-dim 48 --depth 2 --num-heads 4 --drop-path 0 --clip-grad 1 --seconds 0.2"),
        Trial("--init {run}/last --linear-probe --distillation-type hard --amp-dtype auto"),
        Trial("--distillation-type none --views 1:3 --repeated-aug 1 --shuffle-window 1 --workers 1"),
        Trial("--distillation-type soft --tail spread --soft-reduction batchmean --amp-dtype float32 --deterministic"),
        Trial("--distillation-type soft --tail renormalise --soft-reduction deit --amp-dtype bfloat16 --no-model-ema"),
        Trial("-b 6 --grad-accum-steps 2 --recipe deit --set img_size=16 --set mix_block=8 --render auto"),
        Trial("--render gpu", "--render gpu: it needs a CUDA device, this run uses cpu"),
        Trial("--render cpu"),
        Trial("--labels {second} --label-mode mean"),
        Trial("--labels {second} --label-mode random"),
        Trial(f"--data {{copy}} {READING}"),
        Trial("--pretrained", OFFLINE),
        Trial("--compile", seen=lambda got: got.compiled > 0),
    ],
    "evaluate": [
        Trial("-c {folder}/evaluate.yaml", seen=lambda got: got.settings["crop_pct"] == 0.5),
        Trial("--checkpoint {folder}/teacher.safetensors --model test_resnet --num-classes 3 --crop-pct 1 --batch-size 4"),
        Trial("--labels {labels} --labels-data {copy} --expect-manifest {manifest} --agreement-samples 6 --workers 1"),
        Trial("--data {copy} --device cpu --amp-dtype auto --json", seen=is_json),
        Trial(READING),
        Trial("--data {images} --labels-file {folder}/labels.csv --class-order {data}/classes.txt --json",
              seen=lambda got: json.loads(got.output)["images"] == 23),
        Trial("--amp-dtype float32"),
        Trial("--amp-dtype bfloat16"),
        Trial("--pretrained", "--checkpoint and --pretrained exclude each other"),
        Trial("--model deit-ti", "names its own architecture"),
        Trial("--num-classes 3", "--num-classes is only for a file of weights"),
        Trial("--fit-data {data} --concat-linear fit.safetensors", seen=lambda got: "concat_linear " in got.output and exists("fit.safetensors")(got)),
        Trial("--fit-labels {labels} --concat-linear fit.safetensors --json", seen=lambda got: json.loads(got.output)["concat_linear"]["images"] == 23),
        Trial("--fit-data {data} --fit-labels {labels}", "on --fit-data or on --fit-labels, not on both"),
        Trial("--concat-linear nothing.safetensors", "nothing.safetensors: no such file"),
        Trial("--out scores.json --csv classes.csv --predictions images.parquet", seen=exists("scores.json", "classes.csv", "images.parquet")),
        Trial("--img-size 24 --img-size 32", seen=lambda got: "32 pixels" in got.output),
        Trial("--img-size 20", "--img-size must be a multiple of the patch size 8, got 20"),
        Trial("--img-size 0", "--img-size must be in 1..4096, got 0"),
        Trial("--flip", seen=lambda got: "each with its mirror image" in got.output),
    ],
    "report": [
        Trial("-c {folder}/report.yaml", seen=lambda got: "A report" in (got.folder / "report.html").read_text()),
        Trial(
            "--out sub/page.html --title Mine --data {copy} --gallery 2 --gallery-views 8 --batch-size 4 --workers 1 --device cpu",
            seen=lambda got: (got.folder / "sub/page.html").read_text().count('alt="View') == 2,
        ),
        *(Trial(f"--gallery-views 4 --amp-dtype {dtype}") for dtype in ("auto", "float32", "bfloat16")),
        Trial(f"--data {{copy}} {READING} --gallery-views 4"),
        UNREAD,
        Trial("--gallery 0 --json", seen=said(path="report.html", data="report-data.json")),
        Trial("--out page", "--out must be a page, FILE.html, got page"),
    ],
    "export": [
        Trial("-c {folder}/export.yaml", seen=lambda got: "class_head" in got.output),
        Trial("--to timm --license apache-2.0 --dataset imagenet-1k", seen=exists("out/model.safetensors", "out/README.md")),
        Trial("--to torch --out here --preprocess nchw --json", seen=is_json),
        Trial("--to torch --precision float16", "--precision float16 is for --to onnx"),
        Trial("--answer sum_softmax --answer class_head --preprocess nhwc", seen=lambda got: "uint8 [batch, 16, 16, 3]" in got.output),
        Trial("--to timm --preprocess none --answer class_head", "--answer is part of a graph"),
        Trial("--answer nobody", "--answer must be one of class_head, distillation_head"),
        Trial("--precision float32 --data {data} --samples 10 --crop-pct 0.5 -j 1", seen=lambda got: "10 images" in got.output),
        Trial(f"--data {{copy}} {READING}", seen=lambda got: "with a class label" in got.output),
        UNREAD,
        Trial("--precision int8 --calibration-data {data} --calibration-samples 4", seen=exists("out/model.onnx")),
        Trial("--calibration-data {data}", "--calibration-data sets the ranges of --precision int8"),
        Trial("--answer concat_linear --concat-linear {folder}/none.safetensors", "no such file"),
        Trial("--concat-linear {folder}/none.safetensors", "is the classifier of --answer concat_linear"),
        Trial("--license other --license-name Ours --license-link https://example.org/licence", seen=exists("out/README.md")),
        Trial("--license-name Ours", "pass --license other too"),
        Trial("--push hf://user/name --private", "hf://user/name: "),
        Trial("--push hf://datasets/user/name", "--push must be a model repository"),
        Trial("--private", "--private is about the repository of --push"),
    ],
    "bench inference": [
        Trial("-c {folder}/speed.yaml", seen=lambda got: got.settings["batch_size"] == (3,)),
        Trial(
            "--batch-size 2 --out speed.json --device cpu --compile --json",
            seen=lambda got: is_json(got) and got.compiled == 1 and (got.folder / "speed.json").is_file(),
        ),
        Trial("--largest", "--largest looks for the limit of a GPU's memory; here is none"),
        *(Trial(f"-b 1 --amp-dtype {dtype}") for dtype in ("auto", "float32", "bfloat16")),
    ],
    "analyse": [
        Trial(seen=lambda got: "learned tokens" in got.output and "block 1" not in got.output),
        Trial("{run}/last timm:resnet18", OFFLINE),
        Trial("nothing", "nothing: no such file or folder"),
        Trial("--data {copy} --samples 9 -b 4 --json", seen=lambda got: json.loads(got.output)["disagreement"]["images"] == 9),
        Trial("--data {data} --attention 2 --block 1 --out here", seen=exists("here/analysis.json", "here/attention-run.png")),
        Trial("--data {data} --key img-0007 --out here", seen=lambda got: "attention maps: attention-run.png" in got.output),
        Trial("--labels {labels} --labels-data {copy} --workers 1", seen=lambda got: "1 teacher" in got.output),
        Trial("--data {data} --labels {labels}", "pass --data or --labels, not both"),
        Trial(f"--data {{data}} {READING}"),
        UNREAD,
        Trial("--data {data} --crop-pct 1 --device cpu --amp-dtype auto"),
        Trial("-c {folder}/evaluate.yaml --data {data} --amp-dtype float32", seen=lambda got: got.settings["crop_pct"] == 0.5),
        Trial("--data {data} --amp-dtype bfloat16"),
    ],
    "labels info": [
        Trial(seen=lambda got: "views" in got.output),
        Trial("--expect-manifest {manifest} --json", seen=is_json),
    ],
    "labels verify": [
        Trial(f"--data {{copy}} {READING}", seen=lambda got: "23 images" in got.output),
        UNREAD,
        Trial("--data {copy} --threads 1", seen=lambda got: "23 images" in got.output),
        Trial("--no-probes --expect-manifest {manifest} --json", seen=is_json),
        Trial("--public-key {folder}/team.pub", "1 problem"),
        Trial("--identity a@b.c --identity-provider https://accounts.google.com", "1 problem"),
        Trial("--teacher support.builders:confident_cnn --teacher-img-size 16 --relabel 7 --relabel-seed 3 --device cpu --dtype auto"),
        *(
            Trial(f"--teacher support.builders:confident_cnn --teacher-img-size 16 --relabel 3 --dtype {dtype}")
            for dtype in ("float32", "bfloat16", "float16")
        ),
        Trial(
            "--teacher test_resnet --no-pretrained --teacher-checkpoint {folder}/teacher.safetensors --teacher-img-size 16",
            "1 problem (1 teacher)",
        ),
    ],
    "labels sign": [
        Trial("--private-key {folder}/team.pem", seen=lambda got: got.output.strip().endswith("manifest.json.sig")),
        Trial("--private-key {folder}/team.pem --json", seen=lambda got: json.loads(got.output)["path"].endswith("manifest.json.sig")),
        Trial("--identity-token nonsense", "cannot be signed"),
    ],
    "labels audit": [
        Trial("--views 1:3 --top 2", seen=lambda got: "views 1:3 of 23 images" in got.output and "the first 2 of" in got.output),
        Trial("--out out --data {copy} --expect-manifest {manifest}", seen=exists("out/audit.json", "out/suspects.csv", "out/gallery.html")),
        Trial("--data {copy}", "pass --out too"),
        Trial(f"--data {{copy}} --out out {READING}", seen=exists("out/gallery.html")),
        UNREAD,
        Trial("--views 1:9", "--views must be START:STOP within the labelled views 0:3, got 1:9"),
        Trial("--json", seen=is_json),
    ],
    "labels show": [
        Trial("--data {copy} --out sheet.png --samples 2 --views 1", seen=exists("sheet.png")),
        Trial(f"--data {{copy}} {READING}", seen=exists("labels.png")),
        Trial("--samples 1 --views 1 --json", seen=said(path="labels.png")),
        UNREAD,
    ],
    "labels push": [
        Trial("--workers 2", seen=exists("out/manifest.json")),
        Trial("--json", seen=said(path="out", sealed=True, views=[0, 3], images=23, files_before=0)),
    ],
    "labels pull": [
        Trial("--workers 2 --expect-manifest {manifest}", seen=exists("out/manifest.json")),
        Trial("--views 0:1 --shards 'train-000000'", seen=lambda got: LabelSet.open(got.out).shards == ("train-000000",)),
        Trial("--views 0:1 --json", seen=said(path="out", sealed=True, images=23, files_before=0)),
    ],
    "labels merge": [
        Trial(seen=exists("out/manifest.json")),
        Trial("--json", seen=said(path="out", sealed=True, views=[0, 3], images=23, missing=[])),
    ],
    "labels extend": [
        Trial(f"{MINE} --data {{copy}} --batch-size 8 --workers 1 --engine local --accuracy-samples 7 --dtype auto --log-json log.json",
              seen=exists("log.json")),
        Trial(f"{MINE} --teacher-img-size 16 --processes 1 --min-teacher-accuracy 1 --dtype float32"),
        Trial(f"{MINE} --engine ray --address 127.0.0.1:1", "no Ray cluster answers"),
        Trial(f"{MINE} --on-bad-image skip --dtype bfloat16 --render auto"),
        Trial(f"{MINE} --render cpu --json", seen=said(sealed=True, views=[0, 4], images=23)),
        Trial(f"{MINE} --render gpu", "--render gpu: it needs a CUDA device, this run uses cpu"),
        Trial(f"{MINE} --data {{copy}} {READING}"),
        Trial(f"{MINE} {UNREAD.args}", UNREAD.refused),
        Trial(f"{MINE} --on-bad-image fail --dtype float16 --compile", seen=lambda got: got.compiled == 1),
        Trial("--teacher test_resnet --no-pretrained --teacher-checkpoint {folder}/teacher.safetensors", "teacher"),
    ],
    "labels import": [
        Trial("fkd {fkd} out --num-classes 100 --topk 3", seen=exists("out/import.json")),
        Trial("tinyvit {tinyvit} out --num-classes 100", seen=exists("out/import.json")),
        Trial("fkd {fkd} out --num-classes 100 --json", seen=is_json),
    ],
    "labels card": [
        Trial("--license cc-by-4.0"),
        Trial("--json", seen=lambda got: json.loads(got.output)["path"].endswith("mine/README.md")),
        Trial("--license other --license-name Ours --license-link https://example.org/licence --replace"),
        Trial("--license-name Ours", "pass --license other as well"),
    ],
    "labels export": [
        Trial("--data {copy} --views 1:2 --pixels views --encoding png --format webdataset", seen=exists("out/_info.json")),
        Trial("--encoding jpeg --workers 1", seen=exists("out/_info.json")),
        Trial(f"--data {{copy}} {READING}", seen=exists("out/_info.json")),
        UNREAD,
        Trial("--json", seen=said(path="out", images=23, format="webdataset")),
        Trial("--pixels originals", seen=lambda got: "the recipe crops, changes or mixes images" in got.said),
    ],
    "index": [
        Trial("--json --log-json log.jsonl", seen=is_json),
        Trial("--image-key jpg --label-key cls --image-root nowhere --class-order text"),
    ],
    "pack": [
        Trial(
            "--samples-per-shard 8 --prefix val --seed 1 --prefix-keys --replace-dots --on-bad-image fail --workers 1",
            seen=exists("out/val-000002.tar"),
        ),
        Trial("--shorter-side 20 --quality 80 --on-bad-image skip", seen=exists("out/SHA256SUMS")),
        Trial(f"{READING} --on-bad-image fail", seen=exists("out/SHA256SUMS")),
        Trial("--quality 80", "--quality is that of the images that --shorter-side shrinks"),
        Trial("--on-bad-image keep --log-json log.json", seen=exists("out/SHA256SUMS", "log.json")),
        Trial("--dry-run --json", seen=is_json),
    ],
    "doctor": [
        Trial("--out here --labels {labels} --data {copy} --json", seen=is_json),
        Trial(f"--labels {{labels}} --data {{copy}} {READING}", seen=lambda got: "every pixel equal" in got.output),
        Trial("--labels {labels} --label-key cls", UNREAD.refused),
    ],
    "compare": [
        Trial("--device cpu --engine local", seen=study("steps", {"all": 10, "done": 0, "failed": 0})),
        Trial("--scale {folder}/studies/other.yaml", seen=study("scale", "other")),
        Trial("--data {copy} --eval-data {data}", "are the same images"),
        Trial("--data {copy}", "no evaluation images belong to"),
        Trial("--out elsewhere", seen=exists("elsewhere/study.json")),
        Trial("--no-report"),
        Trial("--seed 3 --seed 4", seen=study("seeds", [3, 4])),
        Trial("--seed 3 --seed 3", "each --seed must be another whole number"),
        Trial("--cell alone", seen=study("steps", {"all": 4, "done": 0, "failed": 0})),
        Trial("--cell nobody", "there is no cell 'nobody'"),
        Trial("--jobs 2"),
        Trial("--launcher 'torchrun --nproc-per-node 2 --no-python'"),
        Trial("--launcher 'torchrun --nproc-per-node 5'", "cannot be divided among 5 ranks"),
        Trial("--engine ray"),
        Trial("--dry-run", seen=lambda got: "0 of 10 steps done" in got.output and not got.out.exists()),
        Trial("--json", seen=is_json),
    ],
    "models": [
        Trial("test_resnet --json", seen=is_json),
        Trial("regnety_160 --teachers", seen=lambda got: "DeiT's own teacher" in got.output),
    ],
    "recipes": [
        Trial("deit none --json", seen=is_json),
        Trial("deit --yaml", seen=lambda got: "img_size: 224" in got.output),
    ],
    "init": [
        Trial("--eval-data {copy}", "has the images to learn from"),
        Trial("--model deit-s --epochs 3 --views 2 --overwrite", seen=exists("mine/train.yaml")),
        Trial("--teacher resnet18", seen=exists("mine/teacher.yaml")),
        Trial("--teacher resnet18 --no-pretrained", seen=lambda got: "pretrained: false" in (got.folder / "mine/teacher.yaml").read_text()),
        Trial("--json", seen=is_json),
        Trial("--yes", seen=exists("mine/precompute.yaml")),
        Trial(f"--data {{copy}} {READING}", seen=lambda got: "class_depth: 1" in (got.folder / "mine/precompute.yaml").read_text()),
    ],
    "runs": [
        *(Trial(f"--sort {order}") for order in ("name", "written", "state", "progress", "top1", "loss", "speed")),
        Trial("{labels} --json", seen=is_json),
    ],
    "demo": [
        Trial("--out here --seed 7", seen=lambda got: "Report: here, seed 7" in got.output),
        Trial("--json", seen=is_json),
    ],
    "completion": [
        *(Trial(shell, seen=lambda got: "_DEIT_CLI_COMPLETE" in got.output) for shell in ("bash", "zsh", "fish")),
        Trial("tcsh", "'tcsh' is not one of"),
    ],
    "man": [
        Trial("--out pages", seen=exists("pages/deit-cli-labels-info.1")),
        Trial("--json", seen=lambda got: "deit-cli-man.1" in json.loads(got.output)["files"]),
    ],
}  # fmt: skip


class Anything(dict[str, str]):
    """Names of the world, before there is one."""

    def __missing__(self, name: str) -> str:
        return f"sha256:{'0' * 64}" if name == "manifest" else name


def arguments_of(command: str, trial: Trial, world: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return what all trials of a command begin with, and what this one adds."""
    return tuple(shlex.split(text.format_map(world)) for text in (BEGIN[command], trial.args))  # pyright: ignore


def given(command: str, arguments: list[str]) -> dict[str, Any]:
    """Return the value of each parameter that these arguments give."""
    known = {flag: option for option in COMMANDS[command].params for flag in (*option.opts, *option.secondary_opts)}
    kept = [a for a in arguments if a not in ("-c", "--config")]  # a file that is not there yet
    kept = [
        a
        for a in kept
        if not a.endswith(("train.yaml", "labels.yaml", "evaluate.yaml", "report.yaml", "speed.yaml", "export.yaml"))
    ]
    context = COMMANDS[command].make_context(command, kept, resilient_parsing=True)
    values = {n: v for n, v in context.params.items() if context.get_parameter_source(n) is ParameterSource.COMMANDLINE}
    return values | {known[a].name or "": a for a in arguments if a in ("-c", "--config")}


def taken(command: str) -> dict[str, list[Any]]:
    """Return the values that the trials of a command give to each of its parameters."""
    found: dict[str, list[Any]] = {}
    for trial in TRIALS[command]:
        begin, more = arguments_of(command, trial, Anything())
        for name, value in given(command, [*begin, *more]).items():
            found.setdefault(name, []).append(value)
    return found


def is_another(value: Any, parameter: click.Parameter) -> bool:
    """Whether a value is not the default, in whatever form click has it."""
    return str(value) not in (str(parameter.default), str((parameter.default,)))


SHARED = {"config", "quiet", "verbose"}  # every command has them: tests/settings/test_program.py tries them


def left_out(command: str) -> Iterable[str]:
    """Yield what no trial of a command tries."""
    found = taken(command)
    for parameter in (each for each in COMMANDS[command].params if each.name not in SHARED):
        values = found.get(parameter.name or "", [])
        only = isinstance(parameter.type, click.Choice) and len(parameter.type.choices) == 1
        if not only and not any(is_another(value, parameter) for value in values):
            yield f"{parameter.name}: no trial gives it a value that is not its default"
        if isinstance(parameter.type, click.Choice):
            yield from (
                f"{parameter.name}: no trial of {choice}" for choice in set(parameter.type.choices) - set(values)
            )


def test_every_command_has_trials():
    assert sorted(TRIALS) == sorted(BEGIN) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_left_out(command):
    assert list(left_out(command)) == []


def test_no_field_of_a_recipe_is_left_out():
    assert {*FIELDS, "renderer"} == set(Recipe.model_fields)
    for name, text in FIELDS.items():
        assert Recipe(**{name: text if name in ("crop", "interpolation") else json.loads(text)}) != Recipe()


def test_an_option_without_a_trial_is_found():
    command = COMMANDS["labels show"]
    command.params.append(click.Option(["--frame"], type=click.Choice(["thin", "thick"]), default="thin"))
    try:
        assert sorted(left_out("labels show")) == [
            "frame: no trial gives it a value that is not its default",
            "frame: no trial of thick",
            "frame: no trial of thin",
        ]
    finally:
        command.params.pop()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """What the trials name: sources, a label set, a run, keys, files of settings."""
    folder = tmp_path_factory.mktemp("world")
    data = write_tars(folder / "data")
    labels = make_labels(folder / "labels", data)
    second = make_labels(folder / "second", data, teacher=small_teacher(open_source(data), num_classes=3))
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=3)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    (folder / "train.yaml").write_text("weight_decay: 0.25\nclip_grad: null\n")
    (folder / "labels.yaml").write_text("topk: 1\nset: {scale: [0.5, 1.0]}\n")
    (folder / "evaluate.yaml").write_text("crop_pct: 0.5\n")
    (folder / "report.yaml").write_text("title: A report\ngallery: 0\n")
    (folder / "export.yaml").write_text("answer: [class_head]\n")
    (folder / "speed.yaml").write_text("batch_size: [3]\n")
    (folder / "recipe.yaml").write_text("preset: deit\nimg_size: 16\nscale: [0.4, 1.0]\n")
    write_key(folder, "team")  # team.pem and team.pub
    write_unlabelled(folder / "images", folder / "labels.csv")
    for number in range(12):
        (folder / "digits" / str(number)).mkdir(parents=True)
        (folder / "digits" / str(number) / "1.jpg").write_bytes(encoded(photo(number)))
    scale = {**SCALE, "data": data, "eval_data": write_tars(folder / "val", (12,)), "seeds": [0, 1]}
    study = {**STUDY, "cells": {**STUDY["cells"], "hard": {**STUDY["cells"]["hard"], "teacher": "published"}}}
    write_study(folder / "studies", study, scale)
    shutil.copy(folder / "studies/scale.yaml", folder / "studies/other.yaml")
    write_fkd(folder / "fkd")
    write_tinyvit(folder / "tinyvit")
    names = {
        "folder": str(folder),
        "data": data,
        "copy": str(shutil.copytree(data, folder / "copy")),
        "images": str(folder / "images"),
        "digits": str(folder / "digits"),
        "bad": write_tars(folder / "bad", bad=(4,)),
        "labels": str(labels.folder),
        "second": str(second.folder),
        "manifest": f"sha256:{labels.manifest_sha256}",
        "run": str(folder / "run"),
        "study": str(folder / "studies/study.yaml"),
        "fkd": str(folder / "fkd"),
        "tinyvit": str(folder / "tinyvit"),
    }
    begin = shlex.split(BEGIN["train"].format_map(names))
    CliRunner().invoke(cli.commands, ["train", *begin, "--output", names["run"]], catch_exceptions=False)
    return names


def demonstrated(out: Path, *, seed: int, **_: Any) -> dict[str, Any]:
    """Return what a demo returns, in no time."""
    networks = {name: {"class_head": {"top1": 90.0}} for name in TITLES}
    return {"images": 797, "scores": networks, "report": f"{out}, seed {seed}", "pictures": ["results.png"]}


def tried(command: str, trial: Trial, world: dict[str, str], folder: Path, monkeypatch, caplog) -> Outcome | str:
    """Run a trial in an empty folder; return what it came to, or how it was refused."""
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: (compiled.append(module), module)[1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("trainer.evidence.demo.run_demo", demonstrated)
    monkeypatch.setattr("trainer.studies.running.Session.run", lambda _: None)  # a study takes minutes
    monkeypatch.setattr("trainer.studies.compare.RayEngine", lambda: None)
    monkeypatch.setattr("trainer.studies.forecast.measured", lambda *_: None)
    for name, value in {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    caplog.set_level(logging.INFO, logger="deit_cli")
    mine = str(shutil.copytree(world["labels"], folder / "mine")) if "{mine}" in BEGIN[command] else ""
    begin, more = arguments_of(command, trial, world | {"mine": mine})
    settings: dict[str, Any] = {}
    result = CliRunner().invoke(cli.commands, [*command.split(), *begin, *more], obj=settings)
    if isinstance(result.exception, DeitCliError):
        return str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    if result.exit_code != 0 and not (command == "doctor" and result.exit_code == 1):
        return result.output
    return Outcome(result.stdout, caplog.text, settings, folder, folder / "out", len(compiled))


CASES = [(command, trial) for command, trials in TRIALS.items() for trial in trials]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "trial"), CASES, ids=[f"{c} {t.args}".replace("{", "").replace("}", "") for c, t in CASES]
)
def test_an_option_does_what_it_says_or_is_refused(command, trial, world, tmp_path, monkeypatch, caplog):
    outcome = tried(command, trial, world, tmp_path, monkeypatch, caplog)
    if trial.refused:
        assert isinstance(outcome, str), "it was not refused"
        assert trial.refused in outcome or re.search(trial.refused, outcome)
        assert "\n" not in outcome.strip() or outcome.startswith("Usage")
        return
    assert isinstance(outcome, Outcome), outcome
    begin, more = arguments_of(command, trial, world | {"mine": str(tmp_path / "mine")})
    everything = given(command, [*begin, *more])
    for name in set(given(command, more)) - {"config"}:
        assert outcome.settings[name] == everything[name], name
    assert trial.seen(outcome)


# Values that belong to no option, or to few: each must be taken, or refused on one line.
ODD = ("-1", "99999999999999999999", "nan", "1e999", "[1,2", "a\nb", "x:y", "../..")
TAKES_SECONDS = {"doctor", "estimate", "bench stage1", "bench stage2"}  # these have the options of precompute and train


def options_with_values() -> Iterable[tuple[str, str]]:
    for command in sorted(set(COMMANDS) - TAKES_SECONDS):
        for option in COMMANDS[command].params:
            if isinstance(option, click.Option) and not option.is_flag and option.name not in ("log_wandb", "engine"):
                yield command, option.opts[0]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), list(options_with_values()), ids=lambda each: each)
def test_no_value_of_an_option_ends_in_a_traceback(command, option, world, tmp_path, monkeypatch, caplog):
    for number, value in enumerate(ODD):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = tried(command, Trial(shlex.join([option, value])), world, folder, monkeypatch, caplog)
        if isinstance(outcome, str) and not outcome.startswith("Usage"):
            assert "\n" not in outcome.replace(value, "").strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "trial"),
    [
        ("precompute", Trial("--recipe {folder}/recipe.yaml --set ratio=[0.9,1.1]")),
        ("train", Trial("-c {folder}/train.yaml --distillation-type soft")),
        ("evaluate", Trial("--json")),
        ("labels verify", Trial("--no-probes")),
    ],
    ids=lambda each: each if isinstance(each, str) else each.args,
)
def test_the_program_itself_does_the_same(command, trial, world, tmp_path):
    begin, more = arguments_of(command, trial, world)
    called = [sys.executable, "-c", "import cli; cli.main()", *command.split(), *begin, *more]
    done = subprocess.run(called, cwd=tmp_path, env=with_checkout(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
