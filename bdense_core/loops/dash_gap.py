"""The guidance gap: what a network's prediction changes when it is told the class, and how well a student keeps it."""

import torch
from torch import Tensor

from bdense_core.loops.dash import Predictions, pixel_mse


def gap_rows(student: Predictions, teacher: Predictions) -> Tensor:
    """Of each sample, with D = eps(y) - eps(null): ||D_S||, ||D_T||, their cosine, and the pixel mean of
    (D_S - D_T)^2; [B, 4]."""
    assert student.cond is not None and student.null is not None
    assert teacher.cond is not None and teacher.null is not None
    mine, theirs = (student.cond - student.null).flatten(1), (teacher.cond - teacher.null).flatten(1)
    sizes = mine.norm(dim=1), theirs.norm(dim=1)
    cosine = (mine * theirs).sum(1) / (sizes[0] * sizes[1] + 1e-8)
    return torch.stack([*sizes, cosine, pixel_mse(mine, theirs)], dim=1)


def gap_metrics(rows: Tensor) -> dict[str, float]:
    """How well a student keeps the guidance gap, from the `gap_rows` of all samples, [N, 4].

    rho = mean ||D_S|| / (mean ||D_T|| + 1e-8), a ratio of means (spec/methods.md 3).
    """
    student, teacher, cosine, mse = rows.double().mean(0).tolist()
    return {"rho": student / (teacher + 1e-8), "cos": cosine, "gap_mse": mse}
