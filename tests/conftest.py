"""Shared set-up: one thread per worker, and random numbers that are the same in every run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def torchvision_schemas() -> None:
    """Let timm and diffusers be imported from the folder that REGARD_VISION names, which holds them
    and a torchvision without compiled operators: their schemas are all it takes.
    """
    folder = os.environ.get("REGARD_VISION")
    if folder is None or folder in sys.path:
        return
    sys.path.append(folder)
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


KEPT: list[torch.library.Library] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the support table, and write it to the file that REGARD_SUPPORT names."""
    support = sys.modules.get("test_support")
    if support is None or not support.TABLE.rows:
        return
    terminalreporter.write_line(support.TABLE.text())
    path = os.environ.get("REGARD_SUPPORT")
    if path:
        Path(path).write_text(f"{support.HEAD}{support.TABLE.text()}\n", encoding="utf-8")
