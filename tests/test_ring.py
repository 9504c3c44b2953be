"""Sequence-parallel attention: outputs and gradients of 2 and 4 processes equal those of one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.mask import Causal, Mask
from regard.core.ring import balanced_shard, ring_attend, split_keys_attend
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.masks.sinks import Sinks
from regard.masks.window import Window
from regard.testing.compare import close

LENGTH = 16
MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": Causal(),
    "window": Causal() & Window(5) | Sinks(2),
}


def whole_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, LENGTH, 6, generator=draw, dtype=torch.float64)
    k = torch.randn(2, 2, LENGTH, 6, generator=draw, dtype=torch.float64)
    v = torch.randn(2, 2, LENGTH, 5, generator=draw, dtype=torch.float64)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :3] = False
    return q, k, v, padding


def expected(mask: str) -> list[torch.Tensor]:
    q, k, v, padding = whole_input()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    positions = torch.arange(LENGTH)
    call = Call(
        mask=MASKS[mask], padding=padding, query_positions=positions, key_positions=positions
    )
    out = attend(*leaves, call, Scored(), impl="dense").output
    out.sin().sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def worker(rank: int, size: int, port: int, case: tuple[str, str], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    mask, mode = case
    q, k, v, padding = whole_input()
    own = balanced_shard(LENGTH, rank, size)
    queries = torch.arange(LENGTH) if mode == "split" else own
    leaves = [q[:, :, queries], k[:, :, own], v[:, :, own]]
    leaves = [x.clone().requires_grad_() for x in leaves]
    call = Call(
        mask=MASKS[mask],
        padding=padding[:, own],
        query_positions=queries,
        key_positions=own,
    )
    if mode == "uneven":
        uneven = [x[:, :, : x.shape[2] - rank] for x in leaves]
        try:
            ring_attend(*uneven, call, Scored())
        except ArgumentError as error:
            torch.save(str(error), f"{folder}/{rank}.pt")
        dist.destroy_process_group()
        return
    if mode == "split":
        out = split_keys_attend(*leaves, call, Scored()).output
    else:
        out = ring_attend(*leaves, call, Scored(), mode=mode).output  # type: ignore[arg-type]
    out.sin().sum().backward()
    torch.save([own, out.detach(), *(x.grad for x in leaves)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(size: int, mask: str, mode: str, folder: Path) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(size, port, (mask, mode), str(folder)), nprocs=size)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["online", "materialised", "split"])
@pytest.mark.parametrize("mask", sorted(MASKS))
def test_processes_equal_one(size: int, mode: str, mask: str, tmp_path: Path) -> None:
    wanted = expected(mask)
    for own, out, *gradients in run(size, mask, mode, tmp_path):
        rows = torch.arange(LENGTH) if mode == "split" else own
        close(out, wanted[0][:, :, rows], "output", 1e-12)
        for index, (got, whole) in enumerate(zip(gradients, wanted[1:], strict=True)):
            if mode == "split" and index == 0:
                continue
            close(got, whole[:, :, own], f"gradient {index}", 1e-11)


@pytest.mark.enable_socket
def test_two_processes_equal_one(tmp_path: Path) -> None:
    wanted = expected("causal")
    for own, out, *gradients in run(2, "causal", "online", tmp_path):
        close(out, wanted[0][:, :, own], "output", 1e-12)
        for got, whole in zip(gradients, wanted[1:], strict=True):
            close(got, whole[:, :, own], "gradient", 1e-11)


@pytest.mark.enable_socket
def test_disagreement_is_an_error_on_every_process(tmp_path: Path) -> None:
    messages = run(2, "causal", "uneven", tmp_path)
    assert len(messages) == 2
    assert all("as on process 0" in message for message in messages)


def test_balanced_shards_cover_the_sequence() -> None:
    shards = [balanced_shard(24, rank, 3) for rank in range(3)]
    assert torch.cat(shards).sort().values.equal(torch.arange(24))
    work = [int((shard + 1).sum()) for shard in shards]
    assert max(work) == min(work), "causal work is even"
    with pytest.raises(ArgumentError, match="multiple of 8"):
        balanced_shard(20, 0, 4)
