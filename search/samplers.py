"""Who proposes and who stops: a study file's sampler and pruner as Optuna's, and which axis mattered."""

import copy
import heapq
import itertools
import math
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from bdense_core.files import sha256_of
from bdense_core.methods.base import Axis
from search import tuning
from search.records import SEARCH, Params
from search.sections import SamplerSection
from search.spec import Study

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_MOST_POINTS = 500
"""A Gaussian process takes time with the cube of its points."""
_MOST_KERNELS, _BEST, _NEWEST = 1000, 25, 25
"""TPE's time is linear in its points. It takes at most 25 for good, and the newest 25 count in full."""
_FEWEST_FINISHED = 4
"""Below it, importances are not worth a number."""


class DeclaredSpace(BaseSampler):
    """An inner sampler on the study file's space, for trials that are asked for by any number of processes.

    The space is declared instead of inferred from the trials so far: controls outside of it carry no parameters, and
    inference would take that for an empty space. Each trial gets an inner sampler of its own, seeded by the study's
    seed and the trial's number: nothing is repeated, after a restart or by another launcher. Nothing is proposed for
    rows that need no proposal: controls, retries, people's own points.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, space: dict[str, BaseDistribution]) -> None:
        self._make = make
        self._seed = seed
        self._space = space

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner = self._make(_seed(self._seed, trial.number))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        given = {**trial.params, **trial.system_attrs.get("fixed_params", {})}
        return self._space if _is_searched(trial) and not self._space.keys() <= given.keys() else {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space) if search_space else {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)


class TreeParzen(TPESampler):
    """Optuna's multivariate TPE with a constant liar for running trials, on a bounded number of ended ones.

    Of many ended trials it sees the best, which are all that its density of good points is made of, the newest, which
    count most, and an even selection of the others in their order, of which its density of bad points is made.
    """

    def __init__(self, startup_trials: int, seed: int, ended: "Ended") -> None:
        super().__init__(n_startup_trials=startup_trials, multivariate=True, constant_liar=True, seed=seed)
        self._ended = ended

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        view: Any = _View(study, self._ended.thinned(study.get_trials(deepcopy=False)))
        return super().sample_relative(view, trial, search_space)


class Ended:
    """The ended trials of a study as TPE needs them: read once each, since a launcher asks at every claim."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._settled = 0
        """So many of the study's first trials are ended: none of them changes any more."""
        self._last: FrozenTrial | None = None
        self._of_value: list[FrozenTrial] = []
        self._best: list[FrozenTrial] = []

    def thinned(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """All open trials and at most `_MOST_KERNELS` ended ones, by number; `trials` themselves if they are few."""
        if self._last is not None and trials[self._settled - 1 : self._settled] != [self._last]:
            self._forget()  # under Hyperband it is asked for the trials of one bracket, then of another
        new = list(itertools.takewhile(lambda t: t.state.is_finished(), trials[self._settled :]))
        self._settled += len(new)
        self._last = trials[self._settled - 1] if self._settled else None
        rest = trials[self._settled :]
        self._of_value += _with_value(new)
        self._best = _best_of([*self._best, *_with_value(new)])
        ended = self._of_value + _with_value(rest)
        if len(ended) <= _MOST_KERNELS:
            return trials
        best = {t.number: t for t in _best_of([*self._best, *_with_value(rest)])}
        even = np.linspace(0, len(ended) - _NEWEST - 1, _MOST_KERNELS - _NEWEST - len(best), dtype=int)
        kept = best | {ended[i].number: ended[i] for i in even} | {t.number: t for t in ended[-_NEWEST:]}
        kept |= {t.number: t for t in rest if not t.state.is_finished()}
        return [kept[number] for number in sorted(kept)]


def _with_value(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.state in _ENDED and t.value is not None]


def _best_of(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The best few as TPE ranks them: pruned trials below the finished ones, by how far they came; below all of them
    those that miss a constraint, by how far they miss it."""

    def rank(trial: FrozenTrial) -> tuple[float, float, float]:
        if excess := _excess(trial):
            return excess, 0.0, 0.0
        progress = -math.inf if trial.state == TrialState.COMPLETE else -(trial.last_step or 0)
        return 0.0, progress, trial.value or 0.0

    return heapq.nsmallest(_BEST, trials, key=rank)


def _excess(trial: FrozenTrial) -> float:
    """By how much a trial misses its study's constraints, together; pruned trials have none."""
    return sum(excess for excess in trial.constraints.values() if excess > 0)


class _View:
    """A study that shows other trials than it has, as Optuna's Hyperband has one of a bracket."""

    def __init__(self, study: optuna.Study, trials: list[FrozenTrial]) -> None:
        self._study = study
        self._trials = trials

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [t for t in self._trials if states is None or t.state in states]

    get_trials = _get_trials
    """The name for users, which pruners take."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


class GaussianProcess(RandomSampler):
    """Optuna's GPSampler on a copy of what it can learn from; random until there is enough.

    By itself it knows running trials, but fails on controls without parameters, and forgets pruned trials: it would
    propose the same hopeless point again. Here a pruned trial counts with its last value, at most the worst finished
    one's; with the latter where early scores are of other samples, and so no values to compare. Of many ended trials
    the best stay, and an even selection of the others. Of constraints a pruned trial says nothing: it counts with the
    mean of the others' values, which is what the process expects where it knows nothing.
    """

    def __init__(self, startup_trials: int, seed: int, *, early_is_other: bool) -> None:
        super().__init__(seed=seed)
        self._early_is_other = early_is_other
        self._gp = GPSampler(n_startup_trials=max(1, startup_trials), seed=seed)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        known = [t for t in _all_trials(study) if _is_inside(t, search_space)]
        values = _values_of_ended(known, early_is_other=self._early_is_other)
        selected = _selection(known, values)
        middle = _mean_constraints(selected)
        points = [_point(t, search_space, values[t.number], constraints=t.constraints or middle) for t in selected]
        running = [_point(t, search_space, None) for t in known if t.state == TrialState.RUNNING]
        view = _study_of([*points, *running, create_trial(state=TrialState.RUNNING)])
        return self._gp.sample_relative(view, view.get_trials(deepcopy=False)[-1], search_space)


class NumbersAlone(CmaEsSampler):
    """Optuna's CMA-ES on the axes that are numbers; choices are drawn at random."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        numbers = {name: axis for name, axis in search_space.items() if not isinstance(axis, CategoricalDistribution)}
        return super().sample_relative(study, trial, numbers)


class Grid(RandomSampler):
    """Each point of an even grid once, in an order shuffled by the study's seed.

    A point is taken by any searched row with its parameters, so a lost trial that is queued again keeps its own. A
    point comes twice only where nothing else is left and its trial failed for good. (Optuna's GridSampler counts
    such points as done, and calls `Study.stop`, which works inside of `optimize` alone.)
    """

    def __init__(self, along: dict[str, list[tuning.Setting]], seed: int) -> None:
        """
        Args:
            along: the points of each axis.
        """
        super().__init__(seed=seed)
        self._along = along
        self._order = random.Random(seed)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        rows: dict[tuple[Any, ...], list[bool]] = defaultdict(list)
        for t in _all_trials(study):
            if _is_searched(t) and _is_inside(t, search_space):
                rows[tuple(t.params[name] for name in self._along)].append(t.state != TrialState.FAIL)
        points = list(itertools.product(*self._along.values()))
        self._order.shuffle(points)
        chosen = min(points, key=lambda point: (any(rows[point]), len(rows[point])))
        return dict(zip(self._along, chosen, strict=True))


def make_sampler(study: Study) -> BaseSampler:
    """The study file's sampler. What it knows is in the study: keeping it saves time and changes nothing."""
    ended, seed = Ended(), study.spec.sampler.seed
    return DeclaredSpace(lambda own: _inner(study, own, ended), seed, _declared(study))


def _inner(study: Study, seed: int, ended: Ended) -> BaseSampler:
    """The sampler of one trial; `seed` is that trial's own, the section's the whole study's."""
    section: SamplerSection = study.spec.sampler
    startup, early_is_other = section.startup_trials, study.early_is_other
    match section.kind:
        case "tpe":  # it needs not know of other samples: it ranks pruned trials below all finished ones
            return TreeParzen(startup, seed, ended)
        case "gp":
            return GaussianProcess(startup, seed, early_is_other=early_is_other)
        case "cmaes":
            return NumbersAlone(
                n_startup_trials=startup, consider_pruned_trials=not early_is_other, seed=seed,
                warn_independent_sampling=False,
            )  # fmt: skip
        case "qmc":  # one sequence, scrambled alike for all trials; Optuna counts its points in the study
            return QMCSampler(qmc_type="sobol", scramble=True, seed=_seed(section.seed))
        case "grid":
            along = {name: tuning.grid(axis, section.grid_points) for name, axis in study.spec.searched.items()}
            return Grid(along, section.seed)
        case "random":
            return RandomSampler(seed=seed)


def make_pruner(study: Study) -> BasePruner:
    """The study file's pruner; its steps are kimg."""
    pruner = _pruner(study)
    pruner = OnSurrogate(pruner) if study.spec.pruner.by == "surrogate" else pruner
    is_blind = study.spec.pruner.kind == "hyperband"  # it reads a bracket's trials from the storage
    return AmongFeasible(pruner) if study.spec.constraints and not is_blind else pruner


class AmongFeasible(BasePruner):
    """Another pruner, to which trials that miss a constraint are nothing to be as good as.

    Where a constraint binds they have the better scores, and would stop all that keeps it.
    """

    def __init__(self, inner: BasePruner) -> None:
        self._inner = inner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        view: Any = _View(study, [t for t in study.get_trials(deepcopy=False) if not _excess(t)])
        return self._inner.prune(view, trial)


class OnSurrogate(BasePruner):
    """Another pruner, for which a trial's scores are its `surrogate`s: the attribute {kimg: value}, lower is better.

    A trial that lacks the last one goes on. Under Hyperband samplers see all trials here, and not a bracket's alone.
    """

    def __init__(self, inner: BasePruner) -> None:
        self._inner = inner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        judged = _by_surrogate(trial)
        if judged.last_step is None or judged.last_step != trial.last_step:
            return False
        view: Any = _View(study, [_by_surrogate(t) for t in study.get_trials(deepcopy=False)])
        return self._inner.prune(view, judged)


def _by_surrogate(trial: FrozenTrial) -> FrozenTrial:
    judged = copy.copy(trial)
    judged.intermediate_values = {int(step): value for step, value in trial.user_attrs.get("surrogate", {}).items()}
    return judged


def _pruner(study: Study) -> BasePruner:
    section = study.spec.pruner
    match section.kind:
        case "median" | "percentile":
            return optuna.pruners.PercentilePruner(
                50.0 if section.kind == "median" else section.percentile,
                n_startup_trials=section.startup_trials,
                n_warmup_steps=section.warmup_kimg,
            )
        case "successive_halving":
            return optuna.pruners.SuccessiveHalvingPruner(
                min_resource=section.min_resource_kimg, reduction_factor=section.reduction_factor
            )
        case "hyperband":
            return optuna.pruners.HyperbandPruner(
                min_resource=section.min_resource_kimg,
                max_resource=study.steps[-1],
                reduction_factor=section.reduction_factor,
            )
        case "none":
            return optuna.pruners.NopPruner()


def importances(optuna_study: optuna.Study, study: Study) -> dict[str, float]:
    """What each searched axis had to do with a trial being among the best tenth; the most important first, sum 1.

    By Optuna's own evaluator (PED-ANOVA) on the searched trials that finished and keep the constraints. Empty where a
    single axis is searched, or fewer than four of them have.
    """
    space = _declared(study)
    complete = optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finished = [t for t in complete if _is_searched(t) and _is_inside(t, space) and not _excess(t)]
    if len(space) < 2 or len(finished) < _FEWEST_FINISHED:
        return {}
    view = _study_of([_point(t, space, t.value) for t in finished])
    with warnings.catch_warnings():  # that equal values make all axes equal
        warnings.simplefilter("ignore", UserWarning)
        found = optuna.importance.get_param_importances(view, params=list(space))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def suggest(trial: Trial, study: Study) -> Params:
    """A proposal's parameters: of the weights, single points among them, and of the settings that are tuned."""
    weights = {name: trial.suggest_float(name, low, high) for name, (low, high) in study.spec.axes.items()}
    return {**weights, **{name: _suggested(trial, name, axis) for name, axis in study.spec.tuned.items()}}


def _suggested(trial: Trial, name: str, axis: Axis) -> tuning.Setting:
    if axis.choices:
        chosen: tuning.Setting = trial.suggest_categorical(name, axis.choices)  # type: ignore[assignment]
        return chosen
    if axis.integer:
        return trial.suggest_int(name, int(axis.low), int(axis.high), log=axis.log)
    return trial.suggest_float(name, axis.low, axis.high, log=axis.log)


def _declared(study: Study) -> dict[str, BaseDistribution]:
    """The searched axes of a study; one that is a single point is nothing to search."""
    return {name: _distribution(axis) for name, axis in study.spec.searched.items()}


def _distribution(axis: Axis) -> BaseDistribution:
    """As `suggest` asks for it: Optuna wants the very same of a parameter in all trials."""
    if axis.choices:
        return CategoricalDistribution(axis.choices)
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _is_searched(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get("role", SEARCH) == SEARCH)


def _is_inside(trial: FrozenTrial, space: dict[str, BaseDistribution]) -> bool:
    """Controls may have no parameters, and people's own proposals may lie outside of the ranges."""
    return all(name in trial.params and _contains(axis, trial.params[name]) for name, axis in space.items())


def _contains(axis: BaseDistribution, value: Any) -> bool:
    try:
        return axis._contains(axis.to_internal_repr(value))
    except ValueError:
        return False  # no such choice


def _seed(*numbers: int) -> int:
    return int(sha256_of(list(numbers))[:8], 16)


def _all_trials(study: optuna.Study) -> list[FrozenTrial]:
    """From the storage, as Optuna's own samplers do: under Hyperband a study shows the trials of one bracket only."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def _values_of_ended(trials: Sequence[FrozenTrial], *, early_is_other: bool) -> dict[int, float]:
    """The value of each ended trial by its number; no pruned one is worse than the worst finished one.

    With `early_is_other` they are all as bad as that one; before it, they stand among themselves.
    """
    ended = {t.number: t.value for t in trials if t.state in _ENDED and t.value is not None}
    finished = {t.number for t in trials if t.state == TrialState.COMPLETE} & ended.keys()
    worst = max((ended[number] for number in finished), default=None)
    if worst is None:
        return ended
    if early_is_other:
        return {number: value if number in finished else worst for number, value in ended.items()}
    return {number: min(value, worst) for number, value in ended.items()}


def _selection(trials: Sequence[FrozenTrial], values: dict[int, float]) -> list[FrozenTrial]:
    """The ended trials, or where there are too many, the best and an even selection of the others."""
    ended = sorted((t for t in trials if t.number in values), key=lambda t: values[t.number])
    if len(ended) <= _MOST_POINTS:
        return ended
    half = _MOST_POINTS // 2
    return ended[:half] + [ended[i] for i in np.linspace(half, len(ended) - 1, half, dtype=int)]


def _mean_constraints(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """The mean of each constraint's values over the trials that have them."""
    known = [t.constraints for t in trials if t.constraints]
    return {key: fmean(constraints[key] for constraints in known) for key in (known[0] if known else ())}


def _point(
    trial: FrozenTrial,
    space: dict[str, BaseDistribution],
    value: float | None,
    *,
    constraints: dict[str, float] | None = None,
) -> FrozenTrial:
    """A trial's parameters with a value; without one, a running trial."""
    state = TrialState.RUNNING if value is None else TrialState.COMPLETE
    return create_trial(
        state=state, value=value, params={name: trial.params[name] for name in space}, distributions=space,
        constraints=constraints or None,
    )  # fmt: skip


def _study_of(trials: Sequence[FrozenTrial]) -> optuna.Study:
    """A study in memory."""
    study = optuna.create_study()
    study.add_trials(trials)
    return study
