"""What an atlas costs: its time against a plain forward of the same model, and its peak memory.

    python benchmarks/atlas_cost.py                                   # Llama-shaped, 16 384 tokens
    python benchmarks/atlas_cost.py --model pocket --length 100000 --rounds 0

The ratio is the median over rounds in which forward and atlas take turns in one process, in seconds
of the wall and of the processor. The peaks are the largest resident memory of a process that makes
one atlas, and of one that runs one forward: everything counts, libraries and weights included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regard.atlases.survey import atlas

GIB = 2**30
SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2**17,
}


def subject(name: str, length: int) -> tuple[Any, dict[str, Any]]:
    """A model and the arguments of one forward, which gives no more logits than it must."""
    torch.manual_seed(0)
    if name == "pocket":
        import regard

        model = regard.pocket.language()[0]
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    ids = torch.randint(1, model.config.vocab_size, (1, length))
    return model, {"input_ids": ids, "logits_to_keep": 1}


def works(name: str, length: int) -> dict[str, Callable[[], Any]]:
    """A plain forward, and an atlas of all readings."""
    model, inputs = subject(name, length)

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    return {"forward": forward, "atlas": lambda: atlas(model, [inputs])}


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the wall and of the processor."""
    wall, own = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - own


def ratios(name: str, length: int, rounds: int) -> dict[str, float]:
    """Atlas over forward, in turn."""
    both = works(name, length)
    both["forward"]()
    found = [{key: timed(work) for key, work in both.items()} for _ in range(rounds)]
    wall, own = (
        statistics.median(r["atlas"][i] / r["forward"][i] for r in found) for i in range(2)
    )
    seconds = {
        f"{key}_seconds": round(statistics.median(r[key][0] for r in found), 2) for key in both
    }
    return {"ratio_wall": round(wall, 2), "ratio_processor": round(own, 2), **seconds}


def peak(which: str, name: str, length: int) -> float:
    """Largest resident memory of this process after one forward or atlas, in GiB. Where the system
    tells it (Linux), without what its parent held when it was started, which rusage counts too.
    """
    works(name, length)[which]()
    status = Path("/proc/self/status")
    if status.exists():
        told = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(told["VmHWM"].split()[0]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def peaks(options: argparse.Namespace) -> dict[str, float]:
    """The same of fresh processes."""
    found = {}
    for which in ("forward", "atlas"):
        arguments = ["--model", options.model, "--length", str(options.length), "--peak", which]
        command = [sys.executable, __file__, *arguments, "--threads", str(options.threads)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{which}_peak_gib"] = round(json.loads(run.stdout)["peak"], 3)
    return found


def main() -> None:
    """Measure what is asked for, and print it as JSON."""
    parser = argparse.ArgumentParser(description="What an atlas costs.")
    parser.add_argument("--model", choices=("llama", "pocket"), default="llama")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=("forward", "atlas"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        found: dict[str, Any] = {"peak": peak(options.peak, options.model, options.length)}
    else:
        found = {"model": options.model, "length": options.length, "threads": options.threads}
        if options.rounds:
            found |= ratios(options.model, options.length, options.rounds)
        found |= peaks(options)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
