"""A launch that is tracked, read back with the tracker's own reader."""

import pytest

from search.study_file import studies_folder
from tests.e2e.conftest import User

pytestmark = pytest.mark.e2e


@pytest.mark.long
def test_a_tracked_launch_leaves_one_run_for_each_trial_and_a_second_launch_adds_only_its_own(user: User) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    command = (
        str(studies_folder() / "synthetic.yaml"), "--study", "tracked", "--no-dashboard", "--tracker", "tensorboard",
        "--set", "method.seconds=0", "--set", "pruner.kind=none", "--set", "seeds.control_repeats=2",
    )  # fmt: skip
    folder = user.home / "trackers" / "tensorboard"
    for trials in ("1", "2"):
        done = user.launch(*command, "--trials", trials)
        assert done.returncode == 0, done.stderr
        assert f"tracker tensorboard: {folder / 'tracked-'}" in done.stderr
    rows = [trial for trial in user.show("tracked")["trials"] if trial["state"] == "COMPLETE"]
    (study,) = folder.iterdir()
    files = list(study.glob("trial-*/events.out.tfevents.*"))
    assert len(files) == len(rows) == len({file.parent for file in files}), "no trial ran in both launches"
    found = EventMultiplexer().AddRunsFromDirectory(str(study)).Reload()
    tracked = {name: found.GetAccumulator(name).Scalars("value")[-1].value for name in found.Runs()}
    assert tracked == pytest.approx({f"trial-{trial['number']}": trial["value"] for trial in rows}, rel=1e-6)
