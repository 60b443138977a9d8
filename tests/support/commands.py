"""The program's commands, called in this process."""

from click.testing import CliRunner

import cli
from pipeline.errors import DeitCliError


def invoke(*arguments: str) -> tuple[int, str]:
    """Run a command in this process, as `main` does; return exit code and what a user reads."""
    result = CliRunner().invoke(cli.commands, list(arguments))
    if isinstance(result.exception, DeitCliError):
        return result.exception.exit_code, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output
