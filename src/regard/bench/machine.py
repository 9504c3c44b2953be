"""What a result was made with: versions, hardware and command, in terms that name no one's machine:
no host, no kernel build, no folder outside the working one.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import regard
from regard.bench.record import Record

MEMORY_SHARE = 0.75


class Versions(Record):
    """Versions of what can change a number."""

    regard: str
    torch: str
    python: str
    numpy: str


class Hardware(Record):
    """The machine: its family of systems and of processors, `cores` it offers this process, main
    memory, `threads` torch uses, `device` that trained.
    """

    system: str
    machine: str
    processor: str
    cores: int
    memory_gib: int | None
    threads: int
    device: str


def versions() -> Versions:
    """Versions in this process."""
    import numpy
    import torch

    return Versions(
        regard=regard.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        numpy=numpy.__version__,
    )


def hardware(device: str = "cpu") -> Hardware:
    """The machine this process runs on."""
    import torch

    total = memory()
    return Hardware(
        system=platform.system(),
        machine=platform.machine(),
        processor=_processor(),
        cores=cores(),
        memory_gib=None if total is None else round(total / 2**30),
        threads=torch.get_num_threads(),
        device=device,
    )


def command(arguments: Sequence[str]) -> str:
    """The command `regard …` with these arguments, as it is told: absolute paths below the working
    folder are relative to it, of others the last part remains.
    """
    return shlex.join(["regard", *(_told(argument) for argument in arguments)])


def _told(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    here = Path.cwd()
    return option + equals + str(path.relative_to(here) if path.is_relative_to(here) else path.name)


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of main memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def load() -> float | None:
    """Processes that wanted to run in the last minute, on average; None where unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def memory_limit(share: float = MEMORY_SHARE) -> int | None:
    """Bytes of main memory that a measurement may use, None where the system does not tell."""
    total = memory()
    return None if total is None else int(share * total)


@contextmanager
def memory_limited(share: float = MEMORY_SHARE) -> Iterator[None]:
    """Inside, asking for more than a share of the main memory raises an error, where the system
    can say so, instead of ending the process.
    """
    wanted = memory_limit(share)
    try:
        import resource
    except ImportError:
        resource = None
    if resource is None or wanted is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    hard = before[1]
    resource.setrlimit(
        resource.RLIMIT_DATA,
        (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard),
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def cache_bytes() -> int | None:
    """Bytes of the processor's last-level cache, None where the system does not tell."""
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(1024 * int(text[:-1]))
    return max(sizes, default=None)


def _processor() -> str:
    """The processor's name; Linux keeps it in a file, others know it themselves."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
