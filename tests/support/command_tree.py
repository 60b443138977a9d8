"""Every command of the program, by the words that call it."""

import click

import cli


def _commands_of(group: click.Group, path: tuple[str, ...] = ()) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        words = (*path, name)
        found |= _commands_of(command, words) if isinstance(command, click.Group) else {" ".join(words): command}
    return found


COMMANDS = _commands_of(cli.commands)
