"""Who proposes and who stops: a study file's sampler and pruner, as Optuna's."""

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from bdense_core.files import sha256_of
from search.spec import Study


class DeclaredSpace(optuna.samplers.BaseSampler):
    """A sampler that searches the study file's space instead of inferring one from the trials so far.

    Controls outside the space carry no parameters; inference would take that for an empty space.
    """

    def __init__(self, inner: optuna.samplers.BaseSampler, axes: dict[str, tuple[float, float]]) -> None:
        self._inner = inner
        self._space: dict[str, BaseDistribution] = {
            name: FloatDistribution(low, high) for name, (low, high) in axes.items()
        }

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: axis for name, axis in self._space.items() if not axis.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._inner.after_trial(study, trial, state, values)


def make_sampler(study: Study, num_rows: int) -> optuna.samplers.BaseSampler:
    """The study file's sampler, seeded by the study's seed and the number of trials before this one.

    So a resumed study does not repeat its random proposals.
    """
    section = study.spec.sampler
    seed = int(sha256_of([section.seed, num_rows])[:8], 16)
    inner: optuna.samplers.BaseSampler
    if section.kind == "random":
        inner = optuna.samplers.RandomSampler(seed=seed)
    else:
        inner = optuna.samplers.TPESampler(
            n_startup_trials=section.startup_trials, multivariate=True, constant_liar=True, seed=seed
        )
    return DeclaredSpace(inner, study.spec.space.axes())


def make_pruner(study: Study) -> optuna.pruners.BasePruner:
    """The study file's pruner."""
    section = study.spec.pruner
    if section.kind == "none":
        return optuna.pruners.NopPruner()
    percentile = 50.0 if section.kind == "median" else section.percentile
    return optuna.pruners.PercentilePruner(
        percentile, n_startup_trials=section.startup_trials, n_warmup_steps=section.warmup_kimg
    )
