"""The Triton kernels without a GPU: in Triton's interpreter, through the compiler for a GPU that
need not be there, and the errors where neither runs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import UnsupportedError
from regard.core.mask import Causal
from regard.operators.lightning import lightning
from regard.operators.sigmoid import Sigmoid

TESTS = Path(__file__).parent
CAUSAL = Call(mask=Causal())
SM90_SHARED_MEMORY = 227 * 1024
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: no kernel is tested (install the extra `triton`)",
)

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets in this process"
)


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    file = str(TESTS / "kernels_interpreted.py")
    run = python("-m", "pytest", *options, file, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout + run.stderr


def test_triton_is_imported_on_demand_and_may_be_missing() -> None:
    code = (
        "import sys, torch\n"
        "from regard import Call\n"
        "from regard.core.errors import UnsupportedError\n"
        "from regard.operators.sigmoid import Sigmoid\n"
        "import regard.operators.lightning\n"
        "assert 'triton' not in sys.modules\n"
        "sys.modules['triton'] = None\n"
        "x = torch.zeros(1, 2, 5, 16)\n"
        "try:\n"
        "    Sigmoid(2, 16, impl='triton')(x, x, x, Call())\n"
        "except UnsupportedError as error:\n"
        "    assert 'not installed' in str(error)\n"
        "else:\n"
        "    raise AssertionError('accepted')\n"
    )
    run = python("-c", code)
    assert run.returncode == 0, run.stderr


@needs_triton
@needs_compiler
def test_a_machine_without_device_is_refused() -> None:
    x = torch.zeros(1, 2, 5, 16)
    with pytest.raises(UnsupportedError, match="needs a CUDA device, not cpu"):
        Sigmoid(2, 16, impl="triton")(x, x, x, CAUSAL)
    with pytest.raises(UnsupportedError, match="needs a CUDA device, not cpu"):
        lightning(x, x, x, CAUSAL, form="triton")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels are compiled for sm_90 where they would be launched; the list collects them."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from regard.core.kernels import tiles

    launched: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver = mock.Mock(spec=["get_current_target", "get_current_device", "get_current_stream"])
    driver.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    driver.get_current_device.return_value = 0
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(tiles, "INTERPRETED", True)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return launched


@needs_triton
@needs_compiler
@pytest.mark.parametrize("width", [16, 256])
def test_kernels_compile_for_a_gpu(width: int, compiled: list[Any]) -> None:
    """The compiler takes less than the interpreter does, and shared memory is finite."""
    shape = {"dtype": torch.bfloat16, "requires_grad": True}
    q = torch.zeros(1, 4, 70, width, **shape)
    k, v = (torch.zeros(1, 2, 70, width, **shape) for _ in range(2))
    outputs: list[Tensor] = [Sigmoid(4, width, impl="triton")(q, k, v, CAUSAL).output]
    outputs.append(lightning(q, k, v, CAUSAL, form="triton").output)
    torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])
    assert len(compiled) == 3 + 7
    for kernel in compiled:
        assert kernel.metadata.shared <= SM90_SHARED_MEMORY, kernel.metadata.name
