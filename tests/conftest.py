"""Shared set-up: deterministic, one thread per worker."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
