r"""Map distillation: a student learns to attend as a teacher does.

    loss = mean over sequences, heads and queries of KL(softmax(t_i) || softmax(s_i))

t_i, s_i (M): scaled scores of query i in the teacher's chosen layer and in the student's last one,
which must have as many heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError


def map_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss (scalar), in nats, of scores (B,H,N,M) before softmax.

    Raises:
        ArgumentError: different shapes.
    """
    if student.shape != teacher.shape:
        raise ArgumentError("student", f"{tuple(teacher.shape)} as teacher", tuple(student.shape))
    guess, target = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(guess, target, reduction="none", log_target=True).sum(-1).mean()
