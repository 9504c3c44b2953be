"""The mechanisms that `regard compare` runs when none are named: one or more of every family."""

from __future__ import annotations

MECHANISMS = "softmax,sliding_window(window=8,sinks=0),uniform"
