"""Labels of views in other formats: the rows that readers yield, and checks for impossible answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TALLEST_SUM = 1.01  # as for label sets: rounding to float16 may increase the sum to this


@dataclass(frozen=True)
class ForeignRows:
    """Labels of views in another format.

    Attributes:
        key: sample keys, N strings.
        view: uint32 [N], number of the crop or the epoch.
        hard: int [N], argmax class.
        topk_index: int [N, K], most probable first; K may be 0.
        topk_prob: float16 or float32 [N, K].
        more: other recorded columns by name, each [N].
        table: stem of the names of their tables.
    """

    key: Sequence[str]
    view: NDArray[np.uint32]
    hard: NDArray[Any]
    topk_index: NDArray[Any]
    topk_prob: NDArray[np.floating]
    more: dict[str, NDArray[Any]]
    table: str = "part"

    def __len__(self) -> int:
        return len(self.key)

    def first(self, count: int) -> "ForeignRows":
        """Return the rows with at most `count` classes each."""
        index, prob = self.topk_index[:, :count], self.topk_prob[:, :count]
        return replace(self, topk_index=index, topk_prob=prob)


def check_answers(index: NDArray[Any], prob: NDArray[np.floating], num_classes: int) -> tuple[int, str] | None:
    """Return the first row that cannot be a teacher's answer, and the reason; None if all rows are valid.

    Args:
        index: int [N, K], K >= 1.
        prob: floating [N, K].
        num_classes: C.
    """
    wide = prob.astype(np.float32)
    ordered = np.sort(index, axis=1)
    problems = [
        (~np.isfinite(wide).all(1), "a probability is NaN or infinite"),
        (((index < 0) | (index >= num_classes)).any(1), f"a class is not in 0..{num_classes - 1}"),
        ((ordered[:, 1:] == ordered[:, :-1]).any(1), "a class occurs twice"),
        (((wide < 0) | (wide > 1.001)).any(1), "a probability is not in 0..1"),
        ((wide[:, 1:] > wide[:, :-1]).any(1), "probabilities are not in descending order"),
        (wide.sum(1) > _TALLEST_SUM, "probabilities add up to more than 1"),
    ]
    with np.errstate(invalid="ignore"):
        for found, why in problems:
            if found.any():
                row = int(found.argmax())
                return row, f"{why}: classes {index[row][:5].tolist()}, probabilities {wide[row][:5].tolist()}"
    return None
