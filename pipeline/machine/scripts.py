"""The user's script, which Python imports again in each process that it starts: refuses one that would run itself again."""

import ast
import multiprocessing
import os
import sys
from pathlib import Path

from pipeline.errors import UsageError

IMPORTED_AGAIN = 79  # exit code of a process in which the script ran itself again


def refuse_unguarded_script() -> None:
    """Check that the running script has an `if __name__ == "__main__":`, before it starts other processes.

    Raises:
        UsageError: it has none, so each process would run the whole script; or it has no file.
    """
    script = _imported_in_processes()
    if script is None:
        return
    if script.name == "<stdin>":
        raise UsageError(
            "a script from standard input cannot start other processes: Python looks for its file in each of them",
            fix='Save it as a file with the call below `if __name__ == "__main__":`; or pass workers=0 and processes=1',
        )
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):  # no source; `end_if_imported_again` still stops its processes
        return
    tests = (node.test for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp)))
    if not any(isinstance(name, ast.Name) and name.id == "__name__" for test in tests for name in ast.walk(test)):
        raise unguarded(str(script))


def end_if_imported_again() -> None:
    """End this process at once if it is importing the script of its parent, and so runs what the script should run only once."""
    # What multiprocessing itself asks before it starts a process, to raise its own error of twelve lines in each of them.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(IMPORTED_AGAIN)


def unguarded(script: str | None = None) -> UsageError:
    """Return the error for a script that runs itself again in each process.

    Args:
        script: its path; None: the running script.
    """
    name = script or str(getattr(sys.modules["__main__"], "__file__", "the script"))
    return UsageError(
        f'{name} starts other processes outside an `if __name__ == "__main__":`, and Python imports it again in each of'
        " them, so each would run all of it",
        fix='Put the call, and what it needs only once, below `if __name__ == "__main__":`; or pass workers=0 and processes=1',
    )


def _imported_in_processes() -> Path | None:
    """Return the file that Python imports again in each process; None in a notebook, for `python -c` and for a package's __main__.py."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if file is None or (spec is not None and spec.name.rpartition(".")[2] == "__main__"):
        return None
    return Path(file)
