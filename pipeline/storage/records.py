"""The strict base of everything that is read from JSON: exact types, no unknown fields, no NaN."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.text import SAFE_NAME

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(pattern=rf"^{SAFE_NAME.pattern}$", max_length=200)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]  # may be shown on a terminal
Count = Annotated[int, Field(ge=0, lt=2**48)]
View = Annotated[int, Field(ge=0, le=2**31)]


class Record(BaseModel):
    """A frozen value that JSON holds; an unknown field or another type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def is_version(values: Any, name: str, version: int) -> bool:
    """Return whether a JSON object says that it is of this format and version; `true` and `1.0` are no version 1."""
    return (
        isinstance(values, dict)
        and values.get("format") == name
        and type(values.get("version")) is int
        and values["version"] == version
    )


def other_version(values: Any, name: str, version: int) -> str:
    """Say of which format and version a JSON object is instead, and what to do where it is a later one of ours."""
    if not isinstance(values, dict):
        return f"says {type(values).__name__}; this version reads {(name, version)}"
    found = values.get("version")
    if values.get("format") == name and type(found) is int and found > version:
        return (
            f"was made by a newer deit-cli: it is of format v{found}, this one reads v{version}."
            " Upgrade: pip install --upgrade deit-cli"
        )
    return f"says {(values.get('format'), found)}; this version reads {(name, version)}"
