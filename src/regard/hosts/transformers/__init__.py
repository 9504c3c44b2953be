"""Host for transformers models, through its documented seams alone: an attention function and a
mask function registered under one name, cache layers of our own, forward hooks.

Nothing is registered at import and nothing is patched. While a plan is in force its model calls the
function `regard`, which hands every call of a treated layer to the runner and every other call to
the implementation the model had before; a thread without a plan of its own sees the model as it
was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from regard.core.incoming import Chosen
from regard.core.moment import Site
from regard.hosts.parts import Parts
from regard.hosts.transformers.sites import is_model, sites_of, unreached_by

if TYPE_CHECKING:
    from regard.hosts.transformers.run import Run


class TransformersHost(Parts):
    """What plans need to know of transformers."""

    name = "transformers"

    def claims(self, model: object) -> bool:
        return is_model(model)

    def sites(self, model: Any) -> list[Site]:
        return sites_of(model)

    def unreached(self, model: Any) -> Mapping[str, str]:
        return unreached_by(model)

    def in_force(self, model: Any) -> bool:
        from regard.hosts.transformers.run import RUNS

        return any(run.model is model for run in RUNS.get())

    @contextmanager
    def run(
        self,
        model: Any,
        steps: Mapping[str, Sequence[Chosen]],
        *,
        masked_only: bool = False,
        storage: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Iterator[Run]:
        from regard.hosts.transformers.adopt import adopt, release
        from regard.hosts.transformers.bypass import bypassed
        from regard.hosts.transformers.run import RUNS, Run

        run = Run(model, steps, masked_only, storage or {})
        modules = [m for m in model.modules() if is_model(m)]
        handles: list[Any] = []
        token = RUNS.set((*RUNS.get(), run))
        try:
            adopt(model)
            try:
                for module in modules:
                    handles.append(module.register_forward_pre_hook(run.enter, with_kwargs=True))
                    handles.append(module.register_forward_hook(run.leave, always_call=True))
                with bypassed(run):
                    yield run
                run.check_reached()
            finally:
                for handle in handles:
                    handle.remove()
                release(model)
        finally:
            RUNS.reset(token)


HOST = TransformersHost()
