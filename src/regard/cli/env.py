"""`regard env`: what this installation consists of and runs on."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from regard.bench.machine import hardware, versions
from regard.cli.output import console

OPTIONAL = ("matplotlib", "scikit-learn")


def env(
    json_wanted: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Tell versions and hardware, for bug reports.

    Example: regard env
    """
    found = {**versions().plain(), **_extras(), **hardware().plain(), **_torch()}
    if json_wanted:
        typer.echo(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        console().print(f"{name:<{width}}  {value}")


def _extras() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in OPTIONAL:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _torch() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    kernels = torch.backends.cuda
    fused = {
        "flash": kernels.flash_sdp_enabled(),
        "efficient": cuda and kernels.mem_efficient_sdp_enabled(),
        "cudnn": cuda and kernels.cudnn_sdp_enabled(),
        "math": kernels.math_sdp_enabled(),
    }
    return {
        "platform": platform.platform(),
        "blas": _blas(),
        "cuda": torch.cuda.get_device_name() if cuda else "no",
        "sdpa": ", ".join(name for name, there in fused.items() if there),
    }


def _blas() -> str:
    """The linear algebra library that torch was built with, and oneDNN where it is used."""
    import torch

    setting = torch.__config__.show().partition("BLAS_INFO=")[2]
    name = setting.partition(",")[0] or "unknown"
    return f"{name} with oneDNN" if torch.backends.mkldnn.is_available() else name
