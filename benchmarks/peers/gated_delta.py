"""Gated delta rule: ours against the chunked torch form of transformers (Qwen3-Next), in one
process.

    python benchmarks/peers/gated_delta.py [--tokens 4096] [--threads 1] [--rounds 7]

Both must agree before they are timed; rounds alternate, and the medians' ratio is printed, in CPU
seconds of the process and on the clock. transformers scales queries by 1/sqrt(D) and is laid out
(B,N,H,D); layouts are prepared outside the timing.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.delta import DeltaRule, delta, unit
from regard.core.mask import Causal

Pass = Callable[[], tuple[Tensor, ...]]


def peer() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of transformers, or an exit with what is missing."""
    name = "transformers.models.qwen3_next.modeling_qwen3_next"
    try:
        return importlib.import_module(name).torch_chunk_gated_delta_rule
    except ImportError as error:
        sys.exit(f"this comparison needs transformers (pip install transformers): {error}")


def problem(tokens: int, heads: int, width: int) -> list[Tensor]:
    """q, unit k, v (1,H,N,D), beta and log decay (1,H,N)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, tokens, width, generator=generator).unbind(0)
    beta, decay = torch.rand(2, 1, heads, tokens, generator=generator).unbind(0)
    return [q, unit(k), v, beta, -0.1 * decay]


def passes(leaves: list[Tensor], backward: bool) -> dict[str, Pass]:
    """Outputs and the last state of both, with the gradients of q, k, v, beta, g if asked for."""
    theirs, call = peer(), Call(mask=Causal())
    sides = {
        "regard": leaves,
        "transformers": [x.transpose(1, 2).contiguous() for x in leaves],
    }
    if backward:
        sides = {name: [x.clone().requires_grad_() for x in xs] for name, xs in sides.items()}

    def regard_pass() -> tuple[Tensor, ...]:
        q, k, v, beta, decay = sides["regard"]
        result = delta(q * q.shape[-1] ** -0.5, k, v, call, DeltaRule(beta, decay))
        return gradients("regard", result.output, result.state.content)

    def transformers_pass() -> tuple[Tensor, ...]:
        q, k, v, beta, decay = sides["transformers"]
        o, state = theirs(q, k, v, decay, beta, output_final_state=True)
        if state is None:
            raise RuntimeError("transformers returned no final state")
        found = gradients("transformers", o, state)
        return (found[0].transpose(1, 2), found[1], *(g.transpose(1, 2) for g in found[2:]))

    def gradients(name: str, o: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        if not backward:
            return o, state
        return o, state, *torch.autograd.grad(o.square().sum() + state.sum(), sides[name])

    return {"regard": regard_pass, "transformers": transformers_pass}


def agree(both: dict[str, Pass]) -> float:
    """Largest relative deviation over all results."""
    results = zip(*(run() for run in both.values()), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in results)


def timed(both: dict[str, Pass], rounds: int) -> dict[str, tuple[float, float]]:
    """Median (CPU seconds, seconds) of each, rounds alternating."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
    for _ in range(rounds):
        for name, run in both.items():
            cpu, clock = time.process_time(), time.perf_counter()
            run()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - clock))
    return {
        name: (statistics.median(c for c, _ in pairs), statistics.median(w for _, w in pairs))
        for name, pairs in seconds.items()
    }


def main() -> None:
    """Print agreement, then times and ratios, forward and with gradients."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    leaves = problem(options.tokens, options.heads, options.width)
    shape = f"B1 H{options.heads} N{options.tokens} D{options.width} fp32"
    sys.stdout.write(f"{shape}, {options.threads} threads\n")
    for name, backward in (("forward", False), ("forward+backward", True)):
        both = passes(leaves, backward)
        error = agree(both)
        if not error < 1e-3:
            sys.exit(f"{name}: the two disagree by {error:.1e}; nothing is timed")
        times = timed(both, options.rounds)
        (cpu, clock), (their_cpu, their_clock) = times["regard"], times["transformers"]
        sys.stdout.write(
            f"{name}: agree to {error:.0e}; CPU {cpu * 1e3:.1f} against {their_cpu * 1e3:.1f} ms,"
            f" {their_cpu / cpu:.2f}x; clock {clock * 1e3:.1f} against {their_clock * 1e3:.1f} ms,"
            f" {their_clock / clock:.2f}x\n"
        )


if __name__ == "__main__":
    main()
