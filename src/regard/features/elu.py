r"""ELU feature map: positive features that grow with the input, without parameters.

phi(x) = elu(x) + 1 = x + 1 for x > 0, e^x otherwise        (…,D) -> (…,D)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """Positive features of any tensor, element by element (Katharopoulos et al., eq. 7)."""
    return F.elu(x) + 1.0
