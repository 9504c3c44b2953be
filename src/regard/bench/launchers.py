"""The launchers by name."""

from __future__ import annotations

from regard.bench.launching import Here, Launcher
from regard.bench.local import Local
from regard.bench.machine import cores
from regard.core.errors import ArgumentError, UnknownNameError

LAUNCHERS = ("here", "local", "ray")


def launcher(name: str = "here", workers: int | None = None) -> Launcher:
    """The launcher of that name. workers: how many at once; by default one per processor core, and
    as many as a cluster holds with "ray".

    Raises:
        UnknownNameError: no such launcher.
        ArgumentError: workers that do not make sense.
        UnsupportedError: "ray" without the extra.
    """
    if name not in LAUNCHERS:
        raise UnknownNameError("launcher", name, list(LAUNCHERS))
    if workers is not None and workers < 1:
        raise ArgumentError("workers", "at least 1", workers)
    if name == "local":
        return Local(workers or cores())
    if name == "ray":
        from regard.bench.on_ray import OnRay

        return OnRay(workers)
    if workers is not None:
        raise ArgumentError("workers", "a launcher other than here", workers)
    return Here()
