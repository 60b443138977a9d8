"""Trackers that show the numbers of a run: TensorBoard and Weights & Biases. Both are copies of `metrics.jsonl`."""

import logging
import math
import secrets
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import StorageError, UsageError
from pipeline.storage.atomic import replace_file
from pipeline.storage.json import pretty_json, read_json
from pipeline.text import SAFE_NAME

TENSORBOARD_FOLDER = "tensorboard"
WANDB_NAME = "wandb.json"
FINISH_S = 20  # maximum wait for the network when a run ends or is stopped
_PLACE = frozenset({"epoch", "step", "images"})

log = logging.getLogger("deit_cli.train")


class Tracker(Protocol):
    """A receiver of the scalars of a run, one update at a time."""

    name: str

    def add(self, index: int, scalars: Mapping[str, float]) -> None:
        """Record scalars by name, measured after update `index`."""
        ...

    def close(self, *, failed: bool) -> None:
        """Write all buffered values."""
        ...


def check_trackers(*, tensorboard: bool, wandb: bool) -> None:
    """Check that the packages of the trackers are installed, without importing them.

    Raises:
        UsageError: a package is missing; the error has the command that installs it.
    """
    for asked, package in ((tensorboard, "tensorboard"), (wandb, "wandb")):
        if asked and find_spec(package) is None:
            raise UsageError(
                f'--log-{package} needs the package {package}: pip install "deit-cli[{package}]", or omit the option'
            )


def scalars_of(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the points of a line of `metrics.jsonl` by the name of their curve, such as `eval/student/mean_logits_top1`.

    The position (epoch, step), texts, and numbers that are not finite do not become points.
    """
    prefix = f"{kind}/{values['weights']}" if "weights" in values else kind
    return {f"{prefix}/{name}": value for name, value in _flat(values) if math.isfinite(value)}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((inner if name == "scores" else f"{name}_{inner}", number) for inner, number in _flat(value))
        elif isinstance(value, list):
            yield from _flat({f"{name}_{number}": each for number, each in enumerate(value, 1)})
        elif isinstance(value, int | float) and name not in _PLACE:
            yield name, float(value)


class TensorBoard:
    """Event files under `<run>/tensorboard`."""

    name = "TensorBoard"

    def __init__(self, folder: Path, *, next_index: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # `purge_step` hides points of an earlier start for updates that are now computed again.
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=next_index)

    def add(self, index: int, scalars: Mapping[str, float]) -> None:
        """Write the points immediately, so that after a kill the event file has the same points as metrics.jsonl."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, index)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases. Its id is kept in the folder of the run, so that a resumed run continues it.

    W&B's own process buffers rows: SIGKILL loses the last rows there, but not in `metrics.jsonl`.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, *, next_index: int, project: str | None, run_config: Mapping[str, Any]) -> None:
        """Begin or continue the run; record offline if the server does not answer.

        Raises:
            UsageError: no user is logged in.
            StorageError: the id in the run's folder cannot be read or written.
        """
        import wandb
        from wandb.errors import CommError
        from wandb.errors import UsageError as WandbUsageError

        # A start from update 0 is a new run, even if an earlier start sent rows and died before its first checkpoint.
        kept = run_id(folder) if next_index else new_run_id(folder)
        asked: dict[str, Any] = {
            "project": project,
            "dir": str(folder),
            "name": folder.resolve().name,
            "id": kept,
            "resume": "allow",
            "config": dict(run_config),
            "reinit": "create_new",
            # W&B's own capture of the console would disturb the progress bar.
            "settings": wandb.Settings(console="off", silent=True, finish_timeout=FINISH_S),
        }
        try:
            self._run = wandb.init(**asked)
        except WandbUsageError as error:
            raise UsageError(
                f"--log-wandb: {_first_line(error)}", fix="To record without a network, set WANDB_MODE=offline"
            ) from error
        except CommError as error:
            log.warning("Weights & Biases does not answer: %s", _first_line(error))
            # The run that could not start keeps the id until this process ends.
            asked |= {"id": secrets.token_hex(4), "mode": "offline"}
            self._run = wandb.init(**asked)
        if self._run.offline:
            send = f"wandb sync --id {kept} {self._run.settings.sync_dir}"
            log.info("Weights & Biases: recorded offline; to send it: %s", send)
        else:
            log.info("Weights & Biases: %s", self._run.url)

    def add(self, index: int, scalars: Mapping[str, float]) -> None:
        """Pass the points to W&B's own process, which sends them when possible."""
        # W&B already has the rows of updates that are computed again, with the same numbers.
        if index >= self._run.starting_step:
            self._run.log(dict(scalars), step=index)

    def close(self, *, failed: bool) -> None:
        """Send the remaining rows for at most FINISH_S seconds; rows not sent stay in the folder of the run."""
        self._run.finish(exit_code=int(failed))


def run_id(folder: Path) -> str:
    """Return the id stored in the folder of a run; create one if the run was not tracked before."""
    path = folder / WANDB_NAME
    if not path.is_file():
        return new_run_id(folder)
    record = read_json(path)
    found = record.get("id") if isinstance(record, dict) else None
    if not isinstance(found, str) or not SAFE_NAME.fullmatch(found):
        raise StorageError(f"{path} holds no id of a Weights & Biases run: delete it to begin a new run there")
    return found


def new_run_id(folder: Path) -> str:
    """Draw a new id, store it in the folder of the run, and return it."""
    made = secrets.token_hex(4)
    replace_file(folder / WANDB_NAME, pretty_json({"id": made}))
    return made


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
