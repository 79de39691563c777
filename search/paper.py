"""The paper's tables as data, to stand beside ours: arXiv 2602.15971, Tables 2 to 4. FID, 50,000 samples, one run each.

Table 4's SFD baseline on ImageNet-64 (10.57) differs from Table 3's (10.25); the paper does not say why.
"""

from dataclasses import dataclass

from bdense_core.weights import Weights, log_linear, shares
from search.spec import Study

CIFAR10, IMAGENET64 = "cifar10", "imagenet64"
N_SAMPLES = 50_000
_NUM_BRANCHES = 4
_SAME_SHARES = 2e-4
"""Table 4 gives a to three decimals, which leaves the shares uncertain by less."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One column of Table 2 or 3: a data set and an NFE."""

    table: int
    dataset: str
    nfe: int
    sfd: float
    dense: float


@dataclass(frozen=True, kw_only=True)
class TopPair:
    """One row of Table 4, all at NFE 2. Without (a, b): plain SFD, whose branches but the last have no weight."""

    a: float | None
    b: float | None
    imagenet64: float
    cifar10: float

    @property
    def shares(self) -> Weights:
        """Shares of the four branches, which are what Adam sees of (a, b)."""
        if self.a is None or self.b is None:
            return (0.0, 0.0, 0.0, 1.0)
        return shares(log_linear(self.a, self.b, _NUM_BRANCHES))

    def has_shares(self, others: Weights) -> bool:
        """Whether a weighting is this one up to a common factor."""
        mine = self.shares
        return len(mine) == len(others) and all(
            abs(share - other) < _SAME_SHARES for share, other in zip(mine, others, strict=True)
        )


TABLES = tuple(
    Published(table=table, dataset=dataset, nfe=nfe, sfd=sfd, dense=dense)
    for table, dataset, columns in (
        (2, CIFAR10, ((2, 4.53, 4.40), (3, 3.58, 3.52), (4, 3.24, 3.21), (5, 3.06, 3.01))),
        (3, IMAGENET64, ((2, 10.25, 9.57), (3, 6.35, 6.54), (4, 4.99, 5.97), (5, 4.33, 5.91))),
    )
    for nfe, sfd, dense in columns
)

TABLE_4 = tuple(
    TopPair(a=a, b=b, imagenet64=imagenet64, cifar10=cifar10)
    for a, b, imagenet64, cifar10 in (
        (1.386, -4.274, 9.57, 4.40),
        (1.337, -4.195, 9.72, 4.40),
        (1.230, -4.085, 9.84, 4.40),
        (1.278, -4.137, 9.72, 4.41),
        (1.277, -4.207, 9.64, 4.41),
        (None, None, 10.57, 4.53),
    )
)


def is_like(study: Study, dataset: str, nfe: int) -> bool:
    """Whether a study's values may stand beside the paper's: SFD, the same data, NFE, metric and number of samples."""
    method, evaluation = study.spec.method, study.evaluation
    return (
        method.kind == "sfd"
        and (study.spec.dataset, method.nfe) == (dataset, nfe)
        and evaluation is not None
        and study.metric == "fid"
        and evaluation.n_samples == N_SAMPLES
    )
