"""The mechanisms that `regard compare` runs when none are named: one or more of every family.

The three Taylor rows are one mechanism at three state sizes: the same pairs overflow the small one
and fit the large one.
"""

from __future__ import annotations

MECHANISMS = (
    "softmax,sliding_window(window=8,sinks=0),uniform,rnd_emb_qk,cca(group=4,local=8),"
    "taylor(head_dim=4),taylor(head_dim=8),taylor(head_dim=16),"
    "dma(keep=32),block_topk(block=4,keep=8)"
)
