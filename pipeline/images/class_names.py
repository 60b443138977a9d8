"""The names of the classes and their order: as text, by the numbers in the names, or from a file with one name per line."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.errors import RemoteFileRefused, SourceError
from pipeline.images.samples import SourceOptions, reading
from pipeline.repeats import warn_counted
from pipeline.storage.place import File, open_file
from pipeline.text import check_name, first_few

log = logging.getLogger("deit_cli.class_names")

MAX_NAMES_BYTES = 16 << 20  # enough for half a million classes
ORDERS = ("text", "natural")  # any other order is the name of a file


def ordered_class_names(names: Iterable[str], options: SourceOptions, *, where: object) -> tuple[str, ...]:
    """Return the names of all classes in the order of their numbers.

    A file of names decides alone: it may name classes of which the source has no image. Without an order the names are sorted
    as text, as torchvision does, with a warning where timm, which sorts by the numbers in them, has another order.

    Args:
        names: names that the source uses, each a valid name.
        options: `class_order` chooses the order.
        where: source, for the messages.

    Raises:
        SourceError: the file of names is missing or damaged, or lacks a name of the source, or has it twice.
    """
    if (known := names_of_order(options)) is not None:
        numbers = class_numbers(known)
        if missing := sorted(name for name in set(names) if name not in numbers):
            twice = " once" if set(missing) & set(known) else ""
            raise SourceError(
                f"{where}: {options.class_order} does not name the class {first_few([repr(m) for m in missing], 3)}{twice}",
                fix="--class-order FILE needs one line for each class",
            )
        return known
    text = tuple(sorted(set(names)))
    natural = tuple(sorted(text, key=natural_key))
    if options.class_order is None and text != natural:
        _warn_of_order(text, natural, where)
    return natural if options.class_order == "natural" else text


def reordered(
    names: Sequence[str], options: SourceOptions, *, where: object
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return class names that a source numbers itself in the order of the options, and the new number of each class.

    Raises:
        SourceError: as in `ordered_class_names`, or two classes have the same name.
    """
    ordered = ordered_class_names(names, options, where=where)
    if len(set(names)) < len(names):
        raise SourceError(f"{where}: two classes have the same name, so --class-order cannot change their order")
    numbers = {name: number for number, name in enumerate(ordered)}
    return ordered, tuple(numbers[name] for name in names)


def names_of_order(options: SourceOptions) -> tuple[str, ...] | None:
    """Return the names in the file that `class_order` names; None if it names no file."""
    if options.class_order is None or options.class_order in ORDERS:
        return None
    file = open_file(options.class_order)
    names = read_class_names(file)
    if names is None:
        raise SourceError(
            f"{file}: does not exist", fix="--class-order takes text, natural, or a file with one class name per line"
        )
    return names


def class_numbers(class_names: Sequence[str]) -> dict[str, int]:
    """Return the number of each class that its name tells; ImageNet has two classes `crane`, which are left out."""
    counts = Counter(class_names)
    return {name: number for number, name in enumerate(class_names) if counts[name] == 1}


def read_class_names(file: File) -> tuple[str, ...] | None:
    """Return the class names in a file, one per line, the first for label 0; None if the file does not exist.

    Names may repeat: ImageNet has two cranes.
    """
    with reading(file):
        content = _read_if_there(file)
    if content is None:
        return None
    try:
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise SourceError(f"{file}: class names must be valid UTF-8") from None
    names = (line.removesuffix("\r") for line in lines)
    return tuple(check_name(name, f"{file}: line {number}: class name") for number, name in enumerate(names, start=1))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names as timm does: without regard to case, and by the numbers in them.

    The name itself decides between equal ones (`a1`, `A01`), which timm leaves to chance.
    """
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def _read_if_there(file: File) -> bytes | None:
    if file.path is not None and file.path.exists() and not file.path.is_file():
        raise SourceError(f"{file}: class names must be a plain file")
    try:
        return file.read(max_bytes=MAX_NAMES_BYTES)
    except RemoteFileRefused:  # without permission to list, S3 answers 403 for missing files
        return None


def _warn_of_order(text: Sequence[str], natural: Sequence[str], where: object) -> None:
    number = next(number for number, name in enumerate(text) if name != natural[number])
    warn_counted(
        log,
        "sources whose classes have another natural order",
        "%s: class %d is %r: the classes are sorted as text, as torchvision does; sorted by the numbers in their names, as timm"
        " does, it would be %r. Say --class-order text or --class-order natural, whichever the teacher was trained with",
        where,
        number,
        text[number],
        natural[number],
    )
