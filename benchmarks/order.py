"""How random batches look: the windowed order of training against a full shuffle of all images.

    python benchmarks/order.py --out benchmarks/results/order.json

A source like ImageNet's is made up: 1,281 source shards of 1,000 images, 1,000 classes. Once its images are shuffled over
the shards, as ready-made tars are, and once they lie sorted by class, which is the worst that can be. For each window
(source shards that are shuffled together) the script takes an epoch's updates and measures

- the entropy of the class labels in an update, in bits, and the number of distinct classes;
- how many updates lie between two uses of an image in consecutive passes: the mean, and the share that comes again within
  a tenth of a pass;
- how many source shards one of eight ranks reads for one update, and for 20 in a row.

A full shuffle draws all images of a pass anew; every image still meets its mixup partner in the same update.
"""

import platform
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rounds import options, write_json

from trainer.order import Order, Share

SHARDS, IMAGES, CLASSES, BLOCK = 1281, 1000, 1000, 256
BATCH, RANKS, UPDATES = 1024, 8, 200


def order_of(window: int, repeats: int) -> Order:
    return Order(
        shard_units=(IMAGES // 2,) * SHARDS,
        unit_size=2,
        batch_size=BATCH,
        repeated_aug=repeats,
        views=None,
        window=window,
        seed=0,
    )


def images_of(units: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the images of units: number of the shard times 1,000 plus row."""
    return (units[:, :1] * IMAGES + pairs[units[:, 1]]).ravel()


def drawn_pairs() -> NDArray[np.int64]:
    """Pair the rows of a shard within its mix blocks, at random (in use, the pairs of each shard are others)."""
    draw = np.random.Generator(np.random.Philox(key=1))
    starts = range(0, IMAGES, BLOCK)
    return np.concatenate([draw.permutation(np.arange(s, min(s + BLOCK, IMAGES))) for s in starts]).reshape(-1, 2)


def entropy_bits(labels: NDArray[np.int64]) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())


def measure(window: int, repeats: int) -> dict[str, Any]:
    order, pairs = order_of(window, repeats), drawn_pairs()
    draw = np.random.Generator(np.random.Philox(key=2))
    number = np.arange(SHARDS * IMAGES)
    layouts = {"shuffled": draw.permutation(number) % CLASSES, "sorted": number * CLASSES // len(number)}
    steps = [images_of(order.step_units(0, step), pairs) for step in range(0, order.steps_per_epoch, 5)]
    result: dict[str, Any] = {"window": window, "repeated_aug": repeats}
    for name, label in layouts.items():
        result[f"entropy_bits_{name}"] = float(np.mean([entropy_bits(label[step]) for step in steps]))
        result[f"classes_{name}"] = float(np.mean([len(np.unique(label[step])) for step in steps]))
    result |= repeats_of(order)
    result |= shards_of_a_rank(order)
    return result


def repeats_of(order: Order) -> dict[str, float]:
    """Measure the updates between two uses of a unit, in passes (R epochs), from one pass to the next."""
    r = order.repeated_aug
    places = []
    for turn in (0, 1):
        place = np.full((SHARDS, IMAGES // 2), -1)
        for epoch in range(turn * r, turn * r + r):
            for step in range(order.steps_per_epoch):
                shard, unit = order.step_units(epoch, step).T
                place[shard, unit] = epoch * order.steps_per_epoch + step
        places.append(place)
    both = (places[0] >= 0) & (places[1] >= 0)
    apart = (places[1] - places[0])[both] / (r * order.steps_per_epoch)
    return {"repeat_mean": float(apart.mean()), "repeat_soon": float((apart < 0.1).mean())}


def shards_of_a_rank(order: Order) -> dict[str, float]:
    share = Share(3, RANKS)
    read = [set(share.cut(order.step_units(0, step), 0)[:, 0].tolist()) for step in range(UPDATES)]
    runs = [len(set().union(*read[start : start + 20])) for start in range(0, UPDATES, 20)]
    return {"rank_shards": float(np.mean([len(each) for each in read])), "rank_shards_20": float(np.mean(runs))}


def main() -> None:
    parser = options(__doc__, out_required=False)
    asked = parser.parse_args()
    cases = [(window, repeats) for repeats in (1, 3) for window in (8, 16, 64, 256, SHARDS)]
    rows = [measure(window, repeats) for window, repeats in cases]
    for row in rows:
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    versions = {"numpy": metadata.version("numpy"), "python": platform.python_version()}
    layout = {"shards": SHARDS, "images": IMAGES, "classes": CLASSES, "batch": BATCH, "ranks": RANKS}
    if asked.out:
        write_json(asked.out, {"layout": layout, "versions": versions, "windows": rows})


if __name__ == "__main__":
    main()
