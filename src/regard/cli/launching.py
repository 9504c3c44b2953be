"""The options --launcher and --workers of verbs that run trials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from regard.bench.launching import Launcher

Launch = Annotated[
    str, typer.Option(help="where trials run: here, local (processes) or ray (a cluster; extra)")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="trials at a time [local: all cores, ray: all of it]")
]


def launched(name: str, workers: int | None, threads: int | None) -> Launcher:
    """The launcher, and so many processor threads for each trial. Where no number is given, the
    workers of one machine share its cores, and every worker of a cluster has one.
    """
    import torch

    from regard.bench.launchers import launcher
    from regard.bench.local import Local
    from regard.bench.machine import cores
    from regard.bench.on_ray import OnRay

    found = launcher(name, workers)
    if threads is None and isinstance(found, Local):
        threads = max(1, cores() // found.workers)
    elif threads is None and isinstance(found, OnRay):
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    return found
