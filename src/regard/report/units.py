"""Quantities as a reader writes them: percent, bytes, operations, durations."""

from __future__ import annotations

import math

NARROW_SPACE = "\u202f"
BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
DECIMAL = ("", "k", "M", "G", "T", "P", "E")
TIMES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as percent: 0.994 becomes "99.4 %"."""
    return f"{100 * fraction:.{digits}f}{NARROW_SPACE}%"


def short_percent(fraction: float) -> str:
    """As `percent`, without a decimal that is zero: 0.1 becomes "10 %", 0.125 "12.5 %"."""
    return percent(fraction, 0 if round(1000 * fraction) % 10 == 0 else 1)


def byte_size(count: float) -> str:
    """Bytes to three digits with a binary prefix: 4096 becomes "4 KiB"."""
    power = _power(count, 1024, len(BINARY))
    return f"{_three_digits(count / 1024**power)}{NARROW_SPACE}{BINARY[power]}"


def amount(count: float) -> str:
    """A count to three digits with a decimal prefix: 1.31e12 becomes "1.31 T"."""
    power = _power(count, 1000, len(DECIMAL))
    return f"{_three_digits(count / 1000**power)}{NARROW_SPACE}{DECIMAL[power]}".rstrip()


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 252 becomes "4 min 12 s"."""
    if seconds < 60:
        return f"{_three_digits(seconds)}{NARROW_SPACE}s"
    left, parts = round(seconds), []
    for length, name in TIMES:
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count}{NARROW_SPACE}{name}")
    return " ".join(parts[:2])


def short(value: float) -> str:
    """A number to three digits, a dash where there is none."""
    return "–" if math.isnan(value) else minus(f"{value:.3g}")


def minus(text: str) -> str:
    """A number's text with a true minus sign."""
    return text.replace("-", "\u2212")


def _power(count: float, base: int, prefixes: int) -> int:
    """Largest power of `base` not above `count` for which there is a prefix."""
    power = 0
    while power + 1 < prefixes and round(abs(count) / base**power, 2) >= base:
        power += 1
    return power


def _three_digits(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
