"""The members of a tar: which of them is the image of a sample, and which holds its class label."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.errors import SourceError
from pipeline.images.samples import (
    IMAGE_EXTENSIONS,
    MAX_LABEL,
    NO_LABELS,
    OTHER_PICTURES,
    SourceOptions,
    check_label,
    is_label_like,
)
from pipeline.repeats import warn_counted
from pipeline.storage.place import File
from pipeline.text import first_few, listed, printable

log = logging.getLogger("deit_cli.tar_members")

IMAGE_KEY = (".jpg", ".jpeg", ".png", ".webp")  # the first that a sample has is its image, as in timm's "jpg;png;webp"
LABEL_EXTENSIONS = frozenset(
    {".cls", ".cls.txt", ".label", ".label.txt", ".class", ".class.txt", ".target", ".target.txt"}
)
LABEL_FIELDS = ("label", "cls")  # of the .json member
MAX_LABEL_BYTES = 1024  # a class name; a number has ten digits
MAX_DIGITS = 32
MAX_JSON_BYTES = 16 << 20

_WRITE_NAMES = (
    "If it is the name of a class, write classes.txt beside the tars, or pass --class-order FILE: one name per line"
)
_FIELD_OF_A_SAMPLE = re.compile(r"\.[a-z_][a-z0-9_-]*(?:\.[a-z0-9_-]+)+")  # `.seg.png`, and not `.5 photo.jpg`


class Member(NamedTuple):
    """A file of a tar: header at `offset`, `size` bytes at `data`; its name is `key` + `extension`.

    The key is defined as in webdataset: the name up to the first dot of its last part. The extension is in lower case and
    includes the dot: ".jpg", ".seg.png", "" for none.
    """

    name: str
    key: str
    extension: str
    offset: int
    data: int
    size: int


class Archive:
    """An open tar, with reads of an exact length and errors that name the position."""

    def __init__(self, file: File, descriptor: int) -> None:
        self.file, self.descriptor = file, descriptor
        self.size = os.fstat(descriptor).st_size
        self.end = self.size  # offset of the end marker, once it was reached

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`. pread uses no file position, so threads and processes do not disturb each other."""
        data = os.pread(self.descriptor, size, offset)
        if len(data) != size:
            raise self.error(offset, f"the file is cut off: {size} bytes should be here, {len(data)} are")
        return data

    def error(self, offset: int, text: str, fix: str | None = None) -> SourceError:
        """Return an error for the byte at `offset` of this tar."""
        return SourceError(f"{self.file}: byte {offset}: {text}", fix=fix)

    def refusal(self, member: Member, text: str, fix: str | None = None) -> SourceError:
        """Return an error for one member of this tar."""
        return self.error(member.offset, f"member {member.name!r} {text}", fix)


@dataclass(frozen=True, kw_only=True)
class TarLayout:
    """Which members are read, the same for all tars of a source. The defaults are what is plainly meant.

    Attributes:
        image: extensions with the dot; the first that a sample has is its image.
        image_given: True if the user chose them: then no other picture is meant to be the image.
        label: extension (without the first dot) or field of the `.json` member that holds the class label, `none` for no
            class labels, or None for any of LABEL_EXTENSIONS and LABEL_FIELDS.
        numbers: number of each class that its name tells; None where nothing names the classes.
        renumbered: new number of each class number in the tars; None: they stay.
    """

    image: tuple[str, ...] = IMAGE_KEY
    image_given: bool = False
    label: str | None = None
    numbers: Mapping[str, int] | None = None
    renumbered: tuple[int, ...] | None = None


PLAIN = TarLayout()


def layout_of(
    options: SourceOptions, *, numbers: Mapping[str, int] | None, renumbered: tuple[int, ...] | None
) -> TarLayout:
    """Return the layout that the options of a source ask for.

    Raises:
        SourceError: `image_key` names no extension.
    """
    image = IMAGE_KEY if options.image_key is None else _extensions(options.image_key)
    label = NO_LABELS if options.labels_file is not None else options.label_key
    return TarLayout(
        image=image,
        image_given=options.image_key is not None,
        label=label,
        numbers=numbers,
        renumbered=renumbered,
    )


def _extensions(image_key: str) -> tuple[str, ...]:
    extensions = tuple("." + part.strip().lower().lstrip(".") for part in image_key.split(";") if part.strip(" ."))
    if not extensions:
        raise SourceError(
            f"--image-key must name extensions of the images in the tars, such as jpg;png, got {image_key!r}"
        )
    return extensions


def find_image(archive: Archive, files: Mapping[str, Member], layout: TarLayout) -> Member | None:
    """Return the image of a sample, or None if it has no picture at all.

    Args:
        archive: the tar.
        files: members of the sample by extension.
        layout: which extensions are images.

    Raises:
        SourceError: a picture that is not the image may be an image of its own: nothing is dropped in silence.
    """
    image = None
    for extension in layout.image:
        if (image := files.get(extension)) is not None:
            break
    if len(files) == 1 and image is not None:
        return image
    for extension, member in files.items():
        if extension.rfind(".") > 0:
            if image is not None and (layout.image_given or _FIELD_OF_A_SAMPLE.fullmatch(extension)):
                continue  # another file of a sample that has its image
            if "." + extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                raise _dotted(archive, member, layout)
        elif image is None and extension in IMAGE_EXTENSIONS:
            key = ";".join(each[1:] for each in layout.image)
            raise archive.refusal(
                member,
                f"is not the image of its sample by --image-key {key}, and the sample has no other",
                f"Pass --image-key {key};{extension[1:]} to read it, too",
            )
    return image


def _dotted(archive: Archive, member: Member, layout: TarLayout) -> SourceError:
    """Return the error for `v1.5_img.jpg` or `a.left.jpg`, which may be an image with a dot in its name or a field."""
    extension = member.extension[1:]
    return archive.refusal(
        member,
        f"has a dot in its key: webdataset reads it as key {member.key!r} with extension {extension!r}",
        printable(f"Rename it; or pass --image-key {extension} if every sample has its image there"),
    )


@dataclass
class LabelReader:
    """Reads the class labels of one tar, and remembers what looked like a label and gave none.

    Attributes:
        num_classes: number of class names, None if there are none.
        num_labels: samples that have a label.
        unread: for each kind of member or field that looked like a label and gave none, an example; filled until the first label.
    """

    archive: Archive
    layout: TarLayout
    num_classes: int | None
    num_labels: int = 0
    unread: dict[str, str] = field(default_factory=dict)
    _captions: int = 0  # .txt members of samples without another label
    _number_captions: int = 0  # those that hold a number
    _name_captions: int = 0  # those that hold the name of a class
    _others: set[str] = field(default_factory=set)  # names that are not like a label, or were noted
    _num_like: int = 0
    _last_json: tuple[int, dict[str, Any]] = (-1, {})

    def label(self, files: Mapping[str, Member], *, of_image: bool) -> int | None:
        """Return the class label of a sample, None if it has none.

        Args:
            files: members of the sample by extension.
            of_image: True if the sample has an image; what looks like a label without one is no question.

        Raises:
            SourceError: there are several labels that differ, or a label that is not one.
        """
        key = self.layout.label
        if key == NO_LABELS:
            return None
        found = self._plain(files, of_image) if key is None else self._chosen(files, key)
        if not found:
            if of_image and not self.num_labels:
                self._note_unread(files)
            self._num_like += of_image and any(self._is_like(member) for member in files.values())
            return None
        self.num_labels += 1
        labels = list(found.values())
        if labels.count(labels[0]) < len(labels):
            raise self._several(files, found)
        return labels[0]

    def check(self) -> None:
        """Raise SourceError if no sample of the tar has a label although the user chose one, or something looks like one."""
        key, file = self.layout.label, self.archive.file
        if self.num_labels and self._num_like:
            warn_counted(
                log,
                "tars in which images with members like labels have no class label",
                "%s: %s no class label, although members or fields beside look like one: --label-key chooses it",
                file,
                "1 image has" if self._num_like == 1 else f"{self._num_like:,} images have",
            )
        if self.num_labels or key == NO_LABELS:
            return
        if key is not None:
            raise SourceError(
                f"{file}: no sample has a member .{key.lstrip('.')}, or a field {key!r} in its .json member",
                fix=f"--label-key takes the extension of a member or the name of a field; this tar has {self._seen()}",
            )
        if 0 < self._number_captions == self._captions:
            self.unread["txt"] = "members '.txt' that hold only numbers"
        if self.unread:
            key = printable(next(iter(self.unread)))
            raise SourceError(
                f"{file}: no sample has a class label that can be read, but there are {'; '.join(self.unread.values())}",
                fix=f"Choose one, such as --label-key {key}, or pass --label-key {NO_LABELS} to read the images alone",
            )

    def _seen(self) -> str:
        return printable(first_few(list(self.unread), 5)) or "nothing like a label"

    def _plain(self, files: Mapping[str, Member], of_image: bool) -> dict[str, int]:
        """Return the label in each member or field whose name says that it is the label."""
        found: dict[str, int] = {}
        unknown: list[SourceError] = []
        for extension, member in files.items():
            if extension in LABEL_EXTENSIONS:
                if (label := self._member_label(member, unknown)) is not None:
                    found[extension[1:]] = label
            elif extension == ".json":
                found |= self._field_labels(member, LABEL_FIELDS, unknown)
        if not found:
            if unknown:
                raise unknown[0]
            found = self._caption_label(files) if of_image else {}
        return found

    def _chosen(self, files: Mapping[str, Member], key: str) -> dict[str, int]:
        """Return the label in the member that the user chose, or else in the field of that name."""
        found: dict[str, int] = {}
        unknown: list[SourceError] = []
        member = files.get("." + key.lstrip(".").lower())
        if member is not None and member.extension != ".json":
            label = self._member_label(member, unknown)
            found = {} if label is None else {member.extension[1:]: label}
        else:
            for extension, member in files.items():
                if extension.endswith(".json"):
                    found |= self._field_labels(member, (key,), unknown)
        if unknown:
            raise unknown[0]
        return found

    def _member_label(self, member: Member, unknown: list[SourceError]) -> int | None:
        """Return the label in a member that holds nothing else; None, and a refusal in `unknown`, if it holds no label."""
        text = self.archive.read(member.data, min(member.size, MAX_LABEL_BYTES + 1)).strip()
        if member.size <= MAX_LABEL_BYTES:
            if text.isdigit() and len(text) <= MAX_DIGITS:
                return self._number(int(text), member, text.decode(), named=member.extension != ".cls")
            if (number := self._by_name(text.decode(errors="surrogateescape"))) is not None:
                return number
        what = f"must hold one class number, 0 or more, got {text[:MAX_DIGITS]!r}{self._no_name()}"
        unknown.append(self.archive.refusal(member, what, _WRITE_NAMES if self.layout.numbers is None else None))
        return None

    def _field_labels(self, member: Member, fields: Iterable[str], unknown: list[SourceError]) -> dict[str, int]:
        """Return the labels in fields of a JSON member by their place; a field that holds no label adds to `unknown`."""
        content = self._json(member)
        found: dict[str, int] = {}
        for name in fields:
            value = content.get(name)
            if value is None:
                continue
            if type(value) is int:  # isinstance would accept True as an int
                label = self._number(value, member)
            elif not isinstance(value, str):
                label = None
            elif re.fullmatch("[0-9]{1,32}", value, re.ASCII):
                label = self._number(int(value), member, value, named=True)
            else:
                label = self._by_name(value.strip())
            if label is not None:
                found[f"{member.extension[1:]} {name}"] = label
                continue
            what = f"must have an integer label, got {value!r:.100}"
            if isinstance(value, str):
                fix = _WRITE_NAMES if self.layout.numbers is None else None
                unknown.append(self.archive.refusal(member, what + self._no_name(), fix))
            else:
                unknown.append(self.archive.refusal(member, what))
        return found

    def _json(self, member: Member) -> dict[str, Any]:
        if self._last_json[0] != member.offset:
            self._last_json = (member.offset, read_json(self.archive, member))
        return self._last_json[1]

    def _no_name(self) -> str:
        return "" if self.layout.numbers is None else f", which names none of the {self.num_classes} classes"

    def _number(self, label: int, member: Member, text: str = "", *, named: bool = False) -> int:
        """Return a label that is in range. Names such as `0`, `1`, `10` make a number in a text ambiguous."""
        renumbered = self.layout.renumbered
        classes = self.num_classes if renumbered is None else len(renumbered)
        if not 0 <= label < (MAX_LABEL + 1 if classes is None else classes):
            check_label(label, classes, f"{self.archive.file}: byte {member.offset}: member {member.name!r}")
        if renumbered is not None:
            label = renumbered[label]
        if named and self.layout.numbers is not None and self.layout.numbers.get(text, label) != label:
            raise self.archive.refusal(
                member,
                f"holds {text!r}, which is both the number of a class and the name of class {self.layout.numbers[text]}",
            )
        return label

    def _by_name(self, name: str) -> int | None:
        return None if self.layout.numbers is None else self.layout.numbers.get(name)

    def _caption_label(self, files: Mapping[str, Member]) -> dict[str, int]:
        """Return the label in a `.txt` member that holds the name of a class. Other texts are captions.

        Raises:
            SourceError: the `.txt` members of some samples are names of classes, and this one is not.
        """
        member = files.get(".txt")
        if member is None or (self.layout.numbers is None and self.num_labels):
            return {}
        self._captions += 1
        if member.size > (MAX_DIGITS if self.layout.numbers is None else MAX_LABEL_BYTES):
            text, number = b"", None
        else:
            text = self.archive.read(member.data, member.size).strip()
            number = self._by_name(text.decode(errors="surrogateescape"))
            self._number_captions += text.isdigit()
            self._name_captions += number is not None
        if 0 < self._name_captions < self._captions:
            raise self.archive.refusal(
                member,
                f"holds {text[:MAX_DIGITS]!r}: some '.txt' members of this tar are names of classes, and others are not",
                f"Pass --label-key txt to read them as labels, or --label-key {NO_LABELS} to read the images alone",
            )
        return {} if number is None else {"txt": number}

    def _is_like(self, member: Member) -> bool:
        """Return whether a member, or a field of it, looks like a class label that is not read."""
        if member.extension.endswith(".json"):
            fields = self._json(member).items()
            return any(is_label_like(n) and v is not None and not isinstance(v, dict) for n, v in fields)
        return is_label_like(member.extension) and member.extension not in LABEL_EXTENSIONS

    def _note_unread(self, files: Mapping[str, Member]) -> None:
        """Note what looks like a label; a name that was looked at does not count again."""
        for extension, member in files.items():
            if extension.endswith(".json"):
                for name, value in self._json(member).items():
                    if name in self._others:
                        continue
                    if not is_label_like(name):
                        self._others.add(name)
                    elif value is not None and not isinstance(value, dict):
                        self.unread.setdefault(name, f"a field {name!r} in {member.name!r}")
            elif extension not in self._others:
                if is_label_like(extension) and extension not in LABEL_EXTENSIONS:
                    self.unread.setdefault(extension[1:], f"members {extension!r}, such as {member.name!r}")
                self._others.add(extension)

    def _several(self, files: Mapping[str, Member], found: Mapping[str, int]) -> SourceError:
        values = ", ".join(map(str, sorted(set(found.values()))))
        told = ", ".join(f"{label} in {place}" for place, label in found.items())
        key = next(iter(found)).rpartition(" ")[2]
        return self.archive.refusal(
            next(iter(files.values())), f"has several class labels: {values} ({told})", f"Choose one: --label-key {key}"
        )


def read_json(archive: Archive, member: Member) -> dict[str, Any]:
    """Return the fields of a `.json` member; empty if it holds no object."""
    if member.size > MAX_JSON_BYTES:
        raise archive.refusal(member, f"must be at most {MAX_JSON_BYTES} bytes, got {member.size}")
    try:
        content = json.loads(archive.read(member.data, member.size).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise archive.refusal(member, f"is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a field stands twice")
    return content


def no_image(file: File, others: Counter[str], layout: TarLayout) -> SourceError:
    """Return the error for a tar without an image.

    Args:
        file: the tar.
        others: how many members there are of each extension.
        layout: the extensions that are images.
    """
    told = ", ".join(f".{extension.lstrip('.')} ({count:,})" for extension, count in others.most_common(4))
    read = listed(layout.image)
    fix = None
    if others[".tar"]:
        fix = f"It holds tars: unpack it with  tar -xf {file}  and pass the folder"
    elif others:
        fix = "Pass --image-key, if one of these is the image" + (
            "; TIFF, GIF and the like must be converted" if OTHER_PICTURES & set(others) else ""
        )
    return SourceError(
        f"{file}: no image in this tar ({read} members are read{f'; it has {printable(told)}' if told else ''})",
        fix=fix,
    )
