"""Confirmations and transfers as studies: what they run, and that asking again repeats nothing."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from bdense_core.errors import BadValue
from bdense_core.methods import Synthetic
from bdense_core.methods.base import Control
from search import derived
from search.comparison import compare
from search.errors import NothingFinished, StudyExists
from search.export import export_object
from search.noise import ranked
from search.spec import Study
from search.storage import Studies, StudyStore
from search.study_file import load_study, studies_folder
from search.transfer import SourceWorth, source_worth, transfer_tables
from tests.studies import opened, synthetic

SYNTHETIC = studies_folder() / "synthetic.yaml"
SEARCH = ("budget.trials=6", "sampler.kind=random", "pruner.kind=none")


def run(store: StudyStore) -> list[tuple[str, tuple[int, ...]]]:
    """What was claimed, each ended with the last share's distance from 0.75 as its value."""
    claims = []
    while (claim := store.trials.claim()) is not None:
        share = claim.weights[-1] / sum(claim.weights)
        store.trials.complete(claim.number, 4 + (share - 0.75) ** 2 + 0.001 * claim.seeds[0] % 7)
        claims.append((claim.role, claim.seeds))
    return claims


@pytest.fixture
def searched(database_url: str) -> StudyStore:
    store = opened(database_url, synthetic(*SEARCH, name="s"))
    run(store)
    return store


def confirmation(store: StudyStore, top: int = 2, seeds: int = 3) -> Study:
    return derived.confirmation(Studies(store.database), "s", top=top, seeds=seeds)


def test_a_confirmation_runs_the_best_trials_and_the_controls_once_on_each_fresh_seed(searched: StudyStore) -> None:
    study = confirmation(searched)
    best = sorted((row for row in searched.rows() if row.is_search), key=lambda row: (row.value, row.number))[:2]
    store = Studies(searched.database).create_or_resume(study)
    names = [f"arm:trial-{row.number}" for row in best] + ["arm:endpoint_only", "arm:uniform"]
    assert Counter(run(store)) == Counter((name, (1000 + i,)) for name in names for i in range(3))
    assert store.is_done()
    weights = {row.role: row.weights for row in store.rows()}
    assert [weights[name] for name in names[:2]] == [row.weights for row in best]


def test_none_of_the_fresh_seeds_is_one_of_the_search(searched: StudyStore) -> None:
    used = {seed for row in searched.rows() for seed in row.seeds}
    assert not used & set(confirmation(searched, seeds=100).all_seeds())


def test_each_fresh_seed_has_an_evaluation_seed_of_its_own_that_all_arms_share(searched: StudyStore) -> None:
    study = confirmation(searched)
    assert study.evaluation is None  # a known function has none; the digits do
    digits = load_study(studies_folder() / "digits.yaml")
    assert digits.evaluation is not None
    section = {
        "comparison": {"kind": "confirm", "of": "x", "arms": [], "seeds": [1000, 1001], "of_created": "", "target": "x"}
    }
    compared = digits.edited(section)
    tasks = [compared.task((1.0,) * 4, seed, cache_root=Path(), is_search=False) for seed in (1000, 1001)]
    seeds = [task.evaluation.seed for task in tasks if task.evaluation]
    assert len({*seeds, digits.evaluation.seed}) == 3


def test_asking_again_runs_nothing_and_asking_for_more_runs_what_is_missing(searched: StudyStore) -> None:
    studies = Studies(searched.database)
    first = run(studies.create_or_resume(confirmation(searched)))
    assert run(studies.create_or_resume(confirmation(searched))) == []
    more = run(studies.create_or_resume(confirmation(searched, top=3, seeds=4)))
    assert len(first) == 4 * 3
    assert len(more) == 5 * 4 - 4 * 3
    assert len(set(first + more)) == 5 * 4
    assert run(studies.create_or_resume(confirmation(searched, top=1, seeds=2))) == []


def test_several_launchers_of_a_confirmation_share_its_runs(searched: StudyStore, database_url: str) -> None:
    study = confirmation(searched)
    stores = [opened(database_url, study, owner=str(i)) for i in range(2)]
    claimed = []
    while claims := [claim for store in stores if (claim := store.trials.claim()) is not None]:
        claimed += [(claim.role, claim.seeds) for claim in claims]
    assert len(claimed) == len(set(claimed)) == 4 * 3


def test_weightings_of_equal_shares_are_confirmed_once(database_url: str) -> None:
    store = opened(database_url, synthetic(*SEARCH, "budget.trials=3", "space.a=[1.0, 1.0]", name="s"))
    run(store)  # b alone differs
    study = confirmation(store, top=3)
    assert study.spec.comparison is not None
    assert len([arm for arm in study.spec.comparison.arms if not arm.is_control]) == 1


@pytest.fixture
def tuned(database_url: str) -> StudyStore:
    grid = ("sampler.kind=grid", "sampler.grid_points=2", "space={family: slope, a: [0.0, 0.0]}")
    asked = (*SEARCH, *grid, "tune={shift: [0, 0.5], flavour: }", "budget.trials=4")
    store = opened(database_url, synthetic(*asked, name="s"))
    run(store)
    return store


def test_a_confirmation_runs_trials_and_controls_with_their_settings(tuned: StudyStore) -> None:
    """All have equal weights; one is as the control of equal weights is, in settings too, and is left out."""
    store = Studies(tuned.database).create_or_resume(confirmation(tuned, top=9))
    run(store)
    searched = {f"arm:trial-{row.number}": row.settings for row in tuned.rows() if row.is_search}
    confirmed = {row.role: row.settings for row in store.rows()}
    plain = {"shift": 0.0, "flavour": "plain"}
    assert confirmed == {name: settings for name, settings in searched.items() if settings != plain} | {
        "arm:endpoint_only": plain, "arm:uniform": plain,
    }  # fmt: skip
    assert len(confirmed) == 3 + 2


def test_trials_that_miss_a_constraint_are_not_confirmed(database_url: str) -> None:
    store = opened(database_url, synthetic(*SEARCH, "constraints.balance.max=0.4", "budget.trials=8", name="s"))
    while (claim := store.trials.claim()) is not None:
        last = claim.weights[-1] / sum(claim.weights)
        store.trials.complete(claim.number, last, metrics={"balance": 1 - last})  # the worst shares are the best
    study = confirmation(store, top=9)
    assert study.spec.comparison is not None
    arms = [arm for arm in study.spec.comparison.arms if not arm.is_control]
    assert arms and all(arm.weights[-1] / sum(arm.weights) >= 0.6 for arm in arms)
    assert len(arms) < 8, "some were left out"


def test_where_all_trials_miss_a_constraint_none_is_confirmed(database_url: str) -> None:
    store = opened(database_url, synthetic(*SEARCH, "constraints.balance.max=0.4", name="s"))
    run(store)  # without any figure
    with pytest.raises(NothingFinished, match=r"constraints \(balance\)"):
        confirmation(store)


def test_a_control_that_trains_nothing_is_confirmed_as_one(
    searched: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control(weights=(0.25,) * 4, settings={"flavour": "bitter"}, is_trained=False)
    monkeypatch.setattr(Synthetic, "controls", lambda _: {"teacher": control})
    store = Studies(searched.database).create_or_resume(confirmation(searched))
    run(store)
    found = {row.role: (row.settings, row.is_trained) for row in store.rows()}
    assert found["arm:teacher"] == ({"flavour": "bitter"}, False)
    assert all(is_trained for role, (_, is_trained) in found.items() if role != "arm:teacher")


def test_a_search_without_a_finished_trial_has_nothing_to_confirm(database_url: str) -> None:
    store = opened(database_url, synthetic(*SEARCH, name="s"))
    with pytest.raises(NothingFinished, match="no searched trial"):
        confirmation(store)


def test_studies_of_the_longest_names_are_confirmed_under_names_of_their_own(database_url: str) -> None:
    names = [end * 80 for end in "st"]
    confirmed = []
    for name in names:
        store = opened(database_url, synthetic(*SEARCH, name=name))
        run(store)
        studies = Studies(store.database)
        confirmed.append(studies.create_or_resume(derived.confirmation(studies, name, top=1, seeds=2)).name)
    assert len({*names, *confirmed}) == 4
    assert derived.transfer_name("t", "s", 2) == "t.s.nfe2"
    assert len({derived.transfer_name(names[0], names[1], nfe) for nfe in (2, 3)}) == 2


def test_a_confirmation_is_not_confirmed_again(searched: StudyStore) -> None:
    Studies(searched.database).create_or_resume(confirmation(searched))
    with pytest.raises(BadValue, match="comparison itself; confirm 's'"):
        derived.confirmation(Studies(searched.database), "s.confirm", top=1, seeds=2)


def test_the_confirmation_of_a_deleted_study_does_not_pass_for_that_of_a_new_one(
    searched: StudyStore, database_url: str
) -> None:
    studies = Studies(searched.database)
    studies.create_or_resume(confirmation(searched))
    studies.delete("s")
    again = opened(database_url, synthetic(*SEARCH, name="s"))  # the same proposals, by seed and number
    run(again)
    with pytest.raises(StudyExists, match=r"delete --study s\.confirm"):
        studies.create_or_resume(confirmation(again))
    assert studies.comparisons_of(again) == []


def test_a_confirmation_of_other_settings_is_not_gone_on_with(searched: StudyStore) -> None:
    studies = Studies(searched.database)
    studies.create_or_resume(confirmation(searched))
    other = confirmation(searched).edited({"method.noise": 9.0})
    with pytest.raises(StudyExists, match=r"method\.noise: stored 0\.05, now 9\.0.*delete --study s\.confirm"):
        studies.create_or_resume(other)


def test_a_narrower_question_that_was_read_before_a_wider_one_takes_nothing_away(searched: StudyStore) -> None:
    studies = Studies(searched.database)
    narrow = confirmation(searched, top=1, seeds=2)
    run(studies.create_or_resume(confirmation(searched, top=3, seeds=4)))
    store = studies.create_or_resume(narrow)
    assert store.study.spec.comparison is not None
    assert len(store.study.spec.comparison.arms) == 5
    assert len(store.study.spec.comparison.seeds) == 4
    assert [other.name for other in studies.comparisons_of(searched)] == ["s.confirm"]


def test_a_run_that_failed_for_good_is_run_again_when_it_is_asked_for_again(searched: StudyStore) -> None:
    studies = Studies(searched.database)
    store = studies.create_or_resume(confirmation(searched))
    claim = store.trials.claim()
    assert claim is not None
    store.trials.fail(claim.number, "the loss is not finite", retry=False)
    run(store)
    assert run(store) == []
    again = studies.create_or_resume(confirmation(searched))
    assert run(again) == [(claim.role, claim.seeds)]


def test_a_trial_with_a_controls_weights_takes_no_candidates_place(database_url: str) -> None:
    grid = ("sampler.kind=grid", "sampler.grid_points=2", "space.a=[0.0, 1.0]", "space.b=[-1.0, -1.0]")
    store = opened(database_url, synthetic(*SEARCH, *grid, "budget.trials=2", name="s"))
    run(store)
    study = confirmation(store, top=2)
    assert study.spec.comparison is not None
    (arm,) = [arm for arm in study.spec.comparison.arms if not arm.is_control]
    assert arm.weights[-1] > arm.weights[0]


def transfers(store: StudyStore, target: Path = SYNTHETIC, **changed: Any) -> list[Study]:
    exported = export_object(store, top=2) | changed
    return derived.transfers(exported, target, nfe=[], top=2, seeds=2, models=target.parent)


def test_a_transfer_runs_exported_candidates_beside_the_targets_own_controls(searched: StudyStore) -> None:
    (study,) = transfers(searched)
    assert study.name == "synthetic.s.nfe0"
    claims = run(Studies(searched.database).create_or_resume(study))
    assert len(claims) == len(set(claims)) == 4 * 2
    assert run(Studies(searched.database).create_or_resume(transfers(searched)[0])) == []


def test_an_arm_knows_what_it_was_worth_at_its_source(searched: StudyStore) -> None:
    (study,) = transfers(searched)
    assert study.spec.comparison is not None
    values = {row.role: row.value for row in searched.rows()}
    by_name = {arm.name: arm.source_value for arm in study.spec.comparison.arms}
    assert by_name["uniform"] == values["control:uniform"]
    assert by_name.items() >= {(f"trial-{r.number}", r.value) for r in ranked(searched.rows(), searched_only=True)[:2]}


def test_an_arm_brings_its_mean_over_fresh_seeds_if_all_that_the_source_knows_have_one(searched: StudyStore) -> None:
    studies = Studies(searched.database)
    before = studies.create_or_resume(transfers(searched)[0])
    run(before)
    (early,) = transfer_tables([compare(before.study, before.rows())])
    best = ranked(searched.rows(), searched_only=True)[:2]
    known = {row.role.removeprefix("control:"): row.value for row in searched.rows() if row.is_control}
    assert early.worth == SourceWorth(known | {f"trial-{row.number}": row.value for row in best}, is_confirmed=False)
    run(studies.create_or_resume(confirmation(searched, top=2, seeds=3)))
    after = studies.create_or_resume(transfers(searched)[0])
    assert run(after) == [], "the same runs, of which more is known now"
    (found,) = transfer_tables([compare(after.study, after.rows())])
    rerun = studies.open("s.confirm")
    means = {arm.name: arm.mean.mean for arm in compare(rerun.study, rerun.rows()).arms}
    assert found.worth == SourceWorth(means, is_confirmed=True)
    here = [next(arm.mean.mean for arm in found.comparisons[0].arms if arm.name == name) for name in means]
    order = found.correlations[0]
    assert order is not None and order.rho == pytest.approx(stats.spearmanr(list(means.values()), here).statistic)
    exported = export_object(searched, top=3)
    (of_three,) = derived.transfers(exported, SYNTHETIC, nfe=[], top=3, seeds=2, models=SYNTHETIC.parent)
    wider = studies.create_or_resume(of_three)
    assert not source_worth(compare(wider.study, wider.rows()).arms).is_confirmed, "one did not run there"


def test_a_target_that_was_edited_is_another_target(searched: StudyStore, tmp_path: Path) -> None:
    target = tmp_path / "t.yaml"
    target.write_text(f"base: {SYNTHETIC}\nname: t\nmethod: {{noise: 0.001}}\n")
    studies = Studies(searched.database)
    studies.create_or_resume(transfers(searched, target)[0])
    target.write_text(f"base: {SYNTHETIC}\nname: t\nmethod: {{noise: 0.5}}\n")
    with pytest.raises(StudyExists, match=r"method\.noise: stored 0\.001, now 0\.5"):
        studies.create_or_resume(transfers(searched, target)[0])


def test_a_transfer_runs_on_no_seed_that_chose_the_weights(searched: StudyStore) -> None:
    studies = Studies(searched.database)
    run(studies.create_or_resume(confirmation(searched, seeds=5)))
    (study,) = transfers(searched)
    seen = export_object(searched)["seeds"]
    assert not set(study.all_seeds()) & {*seen["training"], *seen["controls"], *seen["confirmation"]}
    busy = {"training": [2000], "controls": [0], "confirmation": [3050]}
    assert min(transfers(searched, seeds=busy)[0].all_seeds()) == 4000


def test_weights_for_another_number_of_terms_are_refused(searched: StudyStore) -> None:
    exported = export_object(searched, top=1)
    candidate = exported["candidates"][0] | {"weights": [0.5, 0.5], "shares": [0.5, 0.5]}
    with pytest.raises(BadValue, match="for 2 loss terms, the target 'synthetic' has 4"):
        transfers(searched, candidates=[candidate])


def test_weights_for_other_terms_are_refused(searched: StudyStore) -> None:
    with pytest.raises(BadValue, match=r"the loss terms x, an, un, im, the target 'synthetic' has branch\.1, "):
        transfers(searched, terms=["x", "an", "un", "im"])
    older = export_object(searched, top=1)
    del older["terms"]
    assert derived.transfers(older, SYNTHETIC, nfe=[], top=1, seeds=2, models=SYNTHETIC.parent)


def test_settings_go_along_to_a_target_that_has_them(tuned: StudyStore) -> None:
    (study,) = transfers(tuned)
    assert study.spec.comparison is not None
    settings = {arm.name: arm.settings for arm in study.spec.comparison.arms}
    best = ranked(tuned.rows(), searched_only=True)[:2]
    assert settings.items() >= {f"trial-{row.number}": row.settings for row in best}.items()
    assert settings["uniform"] == {}, "the target tunes nothing"
    exported = export_object(tuned, top=1)["candidates"][0] | {"settings": {"curriculum": "tirt"}}
    with pytest.raises(BadValue, match=r"settings that the target 'synthetic' cannot take: .* no setting curriculum"):
        transfers(tuned, candidates=[exported])
    with pytest.raises(BadValue, match=r"cannot take: method\.budget_kimg is nothing to search; .*: shift, flavour"):
        transfers(tuned, candidates=[exported | {"settings": {"budget_kimg": 99.0}}])
    with pytest.raises(BadValue, match=r"cannot take: method\.flavour is 'sour'; choose one of plain, bitter"):
        transfers(tuned, candidates=[exported | {"settings": {"flavour": "sour"}}])
    older = {key: value for key, value in exported.items() if key != "settings"}
    (study,) = transfers(tuned, candidates=[older])
    assert study.spec.comparison is not None and study.spec.comparison.arms[0].settings == {}


def test_an_nfe_is_refused_where_it_follows_from_other_settings(searched: StudyStore) -> None:
    with pytest.raises(BadValue, match=r"the method synthetic has no setting nfe: .* is 0 in .*; leave --nfe out"):
        derived.transfers(export_object(searched), SYNTHETIC, nfe=[2], top=1, seeds=2, models=SYNTHETIC.parent)


def test_weights_of_another_target_space_are_refused(searched: StudyStore) -> None:
    with pytest.raises(BadValue, match="losses in eps space"):
        transfers(searched, target_space="eps")
