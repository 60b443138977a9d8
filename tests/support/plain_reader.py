"""Read a label set with pyarrow alone, written by following docs/format-v1.md: python plain_reader.py FOLDER."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def refuse_unless(holds, what):
    if not holds:
        raise SystemExit(f"refused: {what}")


def decode(codes, num_classes):
    fallen = np.exp(-np.cumsum(np.where(codes == 255, np.inf, codes), axis=1) / 10)
    fallen[:, -1] *= num_classes - codes.shape[1]
    values = np.column_stack([np.ones(len(fallen)), fallen])
    return values / values.sum(axis=1, keepdims=True)


def read(folder):
    """Yield key, view, hard label, classes, and their probabilities with the tail behind them."""
    plan_bytes, manifest = (folder / "plan.json").read_bytes(), json.loads((folder / "manifest.json").read_bytes())
    plan, stated = json.loads(plan_bytes), manifest.pop("content_sha256")
    for part in (plan, manifest):
        refuse_unless((part["format"], part["version"]) == ("deit-cli-labels", 1), "another format or version")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    refuse_unless(sha256(canonical) == stated, "manifest.json was changed")
    refuse_unless(sha256(plan_bytes) == manifest["plan_sha256"] and manifest["sealed"], "another plan, or not sealed")
    keys = {}
    for entry in manifest["files"]:
        name = f"{entry['shard']}.parquet"
        block = f"views-{entry['view_start']:05d}-{entry['view_stop'] - 1:05d}"
        if entry["kind"] == "images":
            continue
        path = {"samples": f"samples/{name}", "labels": f"labels/{block}/{name}"}[entry["kind"]]
        data = (folder / path).read_bytes()
        refuse_unless(len(data) == entry["bytes"] and sha256(data) == entry["sha256"], f"{path} is damaged")
        table = pq.read_table(folder / path)
        if entry["kind"] == "samples":
            keys[entry["shard"]] = table["key"].to_pylist()
        rows = table.to_pydict() if entry["kind"] == "labels" else {"row": []}
        values = [[*p, t] for p, t in zip(rows.get("topk_prob", []), rows.get("tail_mass", []), strict=True)]
        if "topk_code" in rows:
            values = decode(np.array(rows["topk_code"]), plan["teacher"]["num_classes"]).tolist()
        for i, row in enumerate(rows["row"]):
            classes = rows["topk_index"][i] if "topk_index" in rows else [rows["hard"][i]]
            yield keys[entry["shard"]][row], rows["view"][i], classes[0], classes, values[i] if values else []


if __name__ == "__main__":
    print(json.dumps(list(read(Path(sys.argv[1])))))
