"""`deit-cli init`, from the questions to the files."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.settings.questions import Questions
from pipeline.storage.atomic import publish_file, replace_file
from trainer.advice.answers import Machine
from trainer.advice.asking import ClassesOf, ask
from trainer.advice.commands import later_commands, next_commands, work
from trainer.advice.files import settings_files
from trainer.config import InitConfig


def set_up(
    config: InitConfig,
    folder: Path,
    *,
    questions: Questions,
    classes_of: ClassesOf,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Ask for what is missing, and write the settings files; return them and the next commands, as plain JSON values.

    Args:
        config: what the user has passed.
        folder: folder of the files; created if missing.
        questions: asks the user.
        classes_of: resolves the name of a teacher.
        overwrite: whether files that exist are replaced.
        say: called with what was found.

    Raises:
        UsageError: a file exists, or an answer is missing.
        SourceError: the images cannot be read.
    """
    names = ("precompute.yaml", "train.yaml", "teacher.yaml")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", fix="Choose another FOLDER")
    if not overwrite and (kept := [name for name in names if os.path.lexists(folder / name)]):
        raise UsageError(f"{folder / kept[0]} exists", fix="Choose another FOLDER, or pass --overwrite to replace it")
    asked = {"--data": config.data, "--eval-data": config.eval_data, "--model": config.model}
    questions.check_askable(asked | {"--teacher": config.teacher, "--epochs": config.epochs, "--views": config.views})
    machine = Machine.here()
    say(f"this machine: {machine.line}")
    answers = ask(config, questions, classes_of, machine, say)
    files = {name: text for name, text in settings_files(answers, folder, machine).items() if text}
    for name, text in files.items():
        (replace_file if overwrite else publish_file)(folder / name, text.encode())
    return {
        "files": [str(folder / name) for name in files],
        "images": answers.images.samples,
        "classes": answers.images.classes,
        "machine": machine.line,
        "next": list(next_commands(answers, folder, machine)),
        "after": list(later_commands(answers, folder)),
        "slow": [] if machine.gpus else list(work(answers)),
    }


def set_up_text(made: Mapping[str, Any]) -> str:
    """Return the result of `set_up` as text for people."""
    text = [f"wrote {', '.join(made['files'])}; read them, then run", *(f"    {line}" for line in made["next"])]
    text += ["then look at the results, and take the student with you:", *(f"    {line}" for line in made["after"])]
    if made["slow"]:
        text.append("this machine has no GPU, so this work is slow; half the epochs or views take half the time:")
        text += [f"    {line}" for line in made["slow"]]
    return "\n".join(text)
