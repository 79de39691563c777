"""Published tables as data, to stand beside ours. FID on 50,000 samples, lower is better.

B-DENSE, arXiv 2602.15971, Tables 1 to 4: one run each. Table 4's SFD baseline on ImageNet-64 (10.57) differs from
Table 3's (10.25); the paper does not say why. DASH, arXiv 2606.00798, main table: three sampling seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bdense_core.weights import Weights, log_linear, shares
from search.spec import Study

CIFAR10, CIFAR100, IMAGENET64 = "cifar10", "cifar100", "imagenet64"
N_SAMPLES = 50_000
_NUM_BRANCHES = 4
_SAME_SHARES = 2e-4
"""Table 4 gives a to three decimals, which leaves the shares uncertain by less."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One column of Table 1, 2 or 3: a data set and an NFE."""

    table: int
    dataset: str
    nfe: int
    plain: float
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
        return _are_one(self.shares, others)


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row of DASH's main table: FID and rho (the guidance gap's mean size over the teacher's) by data set."""

    name: str
    fid: dict[str, float]
    rho: dict[str, float]
    weights: Weights = ()
    """Of an, un, im, where a study can run it; else empty."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def is_run_by(self, others: Weights, settings: Mapping[str, Any]) -> bool:
        """Whether shares and settings that differ from the study's own are this model's."""
        return bool(self.weights) and self.settings == settings and _are_one(shares(self.weights), others)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What a paper reports of one method."""

    source: str
    plain: str = ""
    """What its tables call the method with the primary term alone."""
    dense_control: str = ""
    """The control with the paper's own weights."""
    columns: tuple[Published, ...] = ()
    pairs: tuple[TopPair, ...] = ()
    models: tuple[Model, ...] = ()


def _are_one(one: Weights, other: Weights) -> bool:
    return len(one) == len(other) and all(abs(u - v) < _SAME_SHARES for u, v in zip(one, other, strict=True))


def _columns(table: int, dataset: str, *values: tuple[int, float, float]) -> tuple[Published, ...]:
    return tuple(
        Published(table=table, dataset=dataset, nfe=nfe, plain=plain, dense=dense) for nfe, plain, dense in values
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

_MODELS = tuple(
    Model(
        name=name, fid={CIFAR10: fid, CIFAR100: fid_100}, weights=weights, settings=settings,
        rho={} if rho is None else {CIFAR10: rho[0], CIFAR100: rho[1]},
    )
    for name, fid, fid_100, rho, weights, settings in (
        ("teacher", 5.47, 6.80, (1.0, 1.0), (), {}),
        ("scratch", 20.47, 26.14, None, (0.0, 0.0, 1.0), {"objective": "scratch"}),
        ("conditional only", 22.31, 27.83, (0.09, 0.08), (0.1, 0.0, 1.0), {}),
        ("composite", 13.84, 20.84, (0.68, 0.65), (0.0, 0.0, 1.0), {"objective": "composite"}),
        ("multi-w composite", 13.67, 19.13, (0.75, 0.71), (), {}),
        ("FitNets", 12.84, 19.47, (0.63, 0.61), (), {}),
        ("gap match", 11.42, 18.46, (0.81, 0.78), (), {}),
        ("magnitude pruning", 18.04, 24.48, (0.71, 0.66), (), {}),
        ("single head, no guidance", 16.78, 23.50, None, (), {}),
        ("DASH", 8.87, 10.47, (0.91, 0.89), (0.1, 1.0, 1.0), {}),
    )
)  # fmt: skip

_DENSE = "The paper's FIDs (arXiv 2602.15971) are of one run each, on 50,000 samples, with no repeated seeds."
SHEETS = {
    "sfd": Sheet(
        source=_DENSE, plain="SFD", dense_control="paper", pairs=TABLE_4,
        columns=(
            *_columns(2, CIFAR10, (2, 4.53, 4.40), (3, 3.58, 3.52), (4, 3.24, 3.21), (5, 3.06, 3.01)),
            *_columns(3, IMAGENET64, (2, 10.25, 9.57), (3, 6.35, 6.54), (4, 4.99, 5.97), (5, 4.33, 5.91)),
        ),
    ),
    "pd": Sheet(
        source=_DENSE, plain="PD", dense_control="uniform",
        columns=_columns(1, CIFAR10, (512, 11.96, 8.92), (256, 21.52, 12.04), (128, 39.66, 20.81)),
    ),
    "dash": Sheet(
        source="The paper's FIDs (arXiv 2606.00798) are of one training run each, on 50,000 samples, the mean over "
        "three sampling seeds.",
        models=_MODELS,
    ),
}  # fmt: skip
"""By the method's kind."""
MODELS_NFE = 100
"""Of DASH's main table: 50 steps with two calls each."""


def is_like(study: Study, method: str, dataset: str, nfe: int) -> bool:
    """Whether a study's values may stand beside a paper's: the same method, data, NFE, metric and number of samples."""
    evaluation = study.evaluation
    return (
        (study.spec.method.kind, study.spec.dataset, study.spec.method.nfe) == (method, dataset, nfe)
        and evaluation is not None
        and study.metric == "fid"
        and evaluation.n_samples == N_SAMPLES
    )
