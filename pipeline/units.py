"""Numbers as a person reads them."""


def count(number: int, what: str, plural: str = "s") -> str:
    """Return `1 view`, `2,000 views`."""
    return f"{number:,} {what}{'' if number == 1 else plural}"


def duration(hours: float) -> str:
    """Return hours in the unit that a person would choose."""
    if hours < 1 / 30:
        return f"{3600 * hours:.3g} s"
    return f"{60 * hours:.3g} min" if hours < 2 else f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"


def byte_size(number: float) -> str:
    """Return bytes in decimal units."""
    unit = next(
        (unit for unit in ("B", "kB", "MB", "GB") if abs(number) < 1000 or (number := number / 1000) is None), "TB"
    )
    return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
