"""Small files of every kind that a report shows, as the commands write them."""

from typing import Any

ANSWERS = ("class_head", "distillation_head", "mean_logits")


def study(**changes: Any) -> dict[str, Any]:
    """Return a study of two cells and three seeds."""
    tops = {"alone": (50.0, 52.0, 51.0), "soft": (60.0, 61.0, 62.5)}
    cells = []
    for name, top1 in tops.items():
        seeds = [
            {"seed": n, "run": f"students/{name}-{n}", "top1": each, "scores": {}, "seconds": 3.0}
            for n, each in enumerate(top1)
        ]
        middle = {"answer": "mean_logits", "mean": sum(top1) / 3, "low": min(top1), "high": max(top1), "std": 1.0}
        against = {"difference": 10.166, "p": 0.0031, "pairs": 3} if name == "soft" else None
        costs = {"teacher_s": 9.0 if against else 0.0, "labelling_s": 2.5 if against else 0.0, "student_s": 3.0}
        cells.append(
            {"name": name, "settings": {}, "seeds": seeds, "top1": middle, "against_baseline": against, "costs": costs}
        )
    content = {"kind": "study", "version": 1, "name": "token", "title": "Does the token help?", "baseline": "alone"}
    content |= {"command": "deit-cli compare token.yaml", "versions": {}, "cells": cells}
    content["comparisons"] = [
        {"cell": "soft", "other": "alone", "difference": 10.166, "p": 0.0031, "pairs": 3, "why": None}
    ]
    return content | {"teachers": [{"name": "cnn", "top1": 70.25, "seconds": 9.0}]} | changes


def scores(checkpoint: str = "runs/soft/best", **changes: Any) -> dict[str, Any]:
    """Return the accuracy of a student with three answers."""
    bins = [
        {"low": 0.0, "high": 0.5, "images": 40, "confidence": 0.41, "accuracy": 0.375},
        {"low": 0.5, "high": 1.0, "images": 60, "confidence": 0.83, "accuracy": 0.8},
    ]
    content = {"kind": "scores", "version": 1, "checkpoint": checkpoint, "model": "deit_tiny", "parameters": 5_500_000}
    content |= {"num_classes": 3, "data": "val", "images": 100, "img_size": 16, "crop_pct": 1.0, "flip": False}
    content["scores"] = {name: {"top1": 60.0 + n, "top5": 90.0, "ece": 2.5} for n, name in enumerate(ANSWERS)}
    content["calibration"] = {name: bins for name in ANSWERS}
    content["per_class"] = [
        {"class": n, "name": name, "images": 33, "top1": {each: 50.0 + n for each in ANSWERS}}
        for n, name in enumerate(("red", "<script>alert(1)</script>", "blue"))
    ]
    content["confusion"] = {name: [{"class": 0, "answer": 1, "images": 7}] for name in ANSWERS}
    content["sizes"] = [{"img_size": size, "scores": content["scores"]} for size in (16, 32)]
    return content | {"agreement": {name: 77.0 for name in ANSWERS}, "agreement_views": 50} | changes


def analysis(**changes: Any) -> dict[str, Any]:
    """Return the tokens of a student, and how often three networks disagree."""
    along = [{"update": n, "epoch": 0, "input": 0.1, "blocks": [0.2, 0.3], "output": 0.2 + n / 100} for n in (10, 20)]
    cosine = {"learned": 0.05, "input": 0.06, "blocks": [0.4, 0.7], "output": 0.93}
    tokens = {"images": 100, "cosine": cosine, "along_training": along, "cka": 0.8}
    share = [[0.0, 0.1, 0.25], [0.1, 0.0, 0.2], [0.25, 0.2, 0.0]]
    names = ["teacher", "soft class head", "alone"]
    content = {"kind": "analysis", "version": 1, "runs": [{"name": "soft", "folder": "runs/soft", "tokens": tokens}]}
    content["disagreement"] = {"data": "val", "images": 100, "names": names, "share": share}
    return content | {"attention": []} | changes


def speed(**changes: Any) -> dict[str, Any]:
    """Return the speed of two networks."""
    rows = [
        {"name": name, "model": name, "parameters": size, "img_size": 16, "batch_size": batch, "dtype": "float32",
         "compiled": False, "images_per_s": rate, "batch_ms": 1000 * batch / rate}
        for name, size, batch, rate in (("soft", 5_500_000, 1, 100.0), ("soft", 5_500_000, 64, 400.0), ("alone", 5_400_000, 64, 410.0))
    ]  # fmt: skip
    return {
        "kind": "speed",
        "version": 1,
        "device": "cpu",
        "gpu": None,
        "threads": 1,
        "torch": "2",
        "rows": rows,
    } | changes


def audit(**changes: Any) -> dict[str, Any]:
    """Return an audit with two suspects."""
    suspects = [
        {
            "key": f"<b>k{n}</b>",
            "class_label": 0,
            "class_name": "red",
            "answer": 2,
            "answer_name": "blue",
            "score": 0.9 - n / 10,
        }
        for n in range(2)
    ]
    return {"kind": "audit", "version": 1, "suspects": suspects} | changes
