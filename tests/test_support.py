"""The support table: which model families plans reach, by trying. `make support` prints it and
writes docs/support.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from families import CALLERS, DECODERS, ENCODERS, Built
from packaging.version import Version
from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.core.hosting import host_of
from regard.core.incoming import Chosen
from regard.core.moment import Moment, Site
from regard.core.treatment import Treatment
from regard.plan import Plan, Step

WHOLE = Version("5.20")
"""From here on every family must be reached; older versions of transformers lack some."""
BOTH = frozenset(("prefill", "decode"))


@dataclass(frozen=True)
class NoBias(Treatment):
    """Changes nothing, but takes attention through our own kernels."""

    def bias(self, at: Moment) -> Tensor:
        return at.q.new_zeros(1, 1, 1, 1)


@dataclass(frozen=True)
class Half(Treatment):
    """Halves the output."""

    def output(self, output: Tensor, at: Moment) -> Tensor:
        return output * 0.5


@dataclass
class Table:
    """Rows of the support table: family -> cells."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)

    def text(self) -> str:
        """The table in markdown."""
        names = ["family", "attention reached", "heads", "plans", "cache", "not reached"]
        lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
        for family, cells in self.rows.items():
            shown = [family, *(cells.get(name, "–") for name in names[1:])]
            lines.append("| " + " | ".join(shown) + " |")
        return "\n".join(lines)


TABLE = Table()


HEAD = """# Models that plans reach

Written by a test run (`make support`), on tiny models with random weights. *plans*: our kernels
give what its own give, a head can be changed, and the model is restored bit for bit. *cache*:
generating with keys evicted gives what it gives with the same keys hidden. Encoders have no cache.

"""


def everywhere(sites: Sequence[Site], treatment: Treatment) -> dict[str, list[Chosen]]:
    return {s.name: [Chosen(0, treatment, tuple(range(s.heads)), BOTH)] for s in sites}


def outputs(built: Built) -> list[Tensor]:
    model, inputs = built
    with torch.no_grad():
        found = model(**inputs)
    found = [found] if isinstance(found, Tensor) else found.values()
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def furthest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def examine(family: str, built: Built) -> list[Site]:
    """Reached, equal through our own kernels, changed where it is told to, restored."""
    model = built[0]
    host = host_of(model)
    sites = host.sites(model)
    assert sites
    before = outputs(built)
    with host.run(model, everywhere(sites, NoBias())):
        same = outputs(built)
    one = {name: [steps[0]] for name, steps in everywhere(sites, Half()).items()}
    with host.run(model, one):
        changed = outputs(built)
    assert furthest(before, same) < 1e-5
    assert furthest(before, changed) > 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(built), strict=True))
    missing = host.unreached(model)
    TABLE.rows[family] = {
        "attention reached": "<br>".join(f"`{t}`" for t in dict.fromkeys(s.tower for s in sites)),
        "heads": "<br>".join(
            dict.fromkeys(
                f"{s.heads}" if s.group == 1 else f"{s.heads} over {s.kv_heads}" for s in sites
            )
        ),
        "plans": "yes",
        "not reached": "<br>".join(f"`{name}`" for name in missing) or "–",
    }
    return sites


def check_cache(family: str, built: Built) -> None:
    """Evicting keys while generating is hiding them, and makes a difference."""
    model, inputs = built
    inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    plan = Plan(steps=(Step(treatment="stream", options={"sinks": 1, "recent": 5}),))

    def generated(masked_only: bool | None) -> Tensor:
        settings: dict[str, Any] = {
            "max_new_tokens": 10,
            "min_new_tokens": 10,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            "pad_token_id": 0,
        }
        if masked_only is None:
            return torch.stack(model.generate(**inputs, **settings).logits)
        with plan.applied(model, masked_only=masked_only) as run:
            found = model.generate(**inputs, **settings)
            assert run.report()["budget"] < 1 or masked_only
        return torch.stack(found.logits)

    dropped = generated(False)
    assert torch.allclose(dropped, generated(True), atol=1e-5, rtol=0)
    assert not torch.allclose(dropped, generated(None), atol=1e-4, rtol=0)
    TABLE.rows[family]["cache"] = "yes"


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.filterwarnings("ignore")  # the library's own, about its defaults
def test_decoder(family: str) -> None:
    pytest.importorskip("transformers")
    built = DECODERS[family]()
    old = Version(pytest.importorskip("transformers").__version__) < WHOLE
    if old and not host_of(built[0]).sites(built[0]):
        pytest.skip("this version of transformers does not let it be reached")
    examine(family, built)
    check_cache(family, built)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.filterwarnings("ignore")
def test_encoder(family: str) -> None:
    library = pytest.importorskip("transformers")
    try:
        examine(family, ENCODERS[family]())
    except UnsupportedError as error:
        if Version(library.__version__) >= WHOLE:
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("family", CALLERS)
@pytest.mark.filterwarnings("ignore")
def test_caller_of_the_fused_kernel(family: str, torchvision_schemas: None) -> None:
    needs, build = CALLERS[family]
    try:
        importlib.import_module(needs)
    except ImportError:
        pytest.skip(f"{needs} is not installed")
    examine(family, build())
