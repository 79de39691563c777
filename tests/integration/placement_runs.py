"""Runs of Ray Tune for test_placement.py, each in a process of its own: `placement_runs.py NAME FOLDER`.

Each prints what happened as one JSON object. The conductor's part is played by `Script`: trials by number, and what
becomes of them.
"""

import gc
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil

from search import ray_environment

ray_environment.prepare(None)

import ray  # noqa: E402
from ray.tune.experiment import Trial  # noqa: E402
from ray.tune.schedulers import FIFOScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from search import placement  # noqa: E402
from search.errors import ClusterError  # noqa: E402
from search.sections import ResourcesSection  # noqa: E402

Results = Generator[dict[str, Any], None, None]


class Script:
    """Hands out so many trials as there is room for them, and notes what Ray tells of them."""

    def __init__(self, resources: ResourcesSection, descriptions: list[dict[str, Any]]) -> None:
        self.places = placement.Places(resources)
        self.descriptions = descriptions
        self.numbers: dict[str, int] = {}
        self.ours: set[str] = set()
        self.results: list[dict[str, Any]] = []
        self.lost: list[int] = []
        self.most_waiting = 0
        self.most_kept = 0
        self.on_result: Callable[[str, dict[str, Any]], str] = lambda tune_id, result: FIFOScheduler.CONTINUE
        self.each_step: Callable[[], None] = lambda: None
        self.stop_asked = False

    def next(self, tune_id: str) -> Any:
        if len(self.numbers) == len(self.descriptions) or self.stop_asked:
            return Searcher.FINISHED
        if self.places.left(len(self.ours)) < 1:
            return None
        number = self.numbers[tune_id] = len(self.numbers)
        self.ours.add(tune_id)
        return {"trial": self.descriptions[number] | {"number": number}, "threads": 1}

    def note(self, result: dict[str, Any]) -> None:
        noted = {key: result[key] for key in ("number", "pid", "n") if key in result}
        if noted not in self.results[-1:]:
            self.results.append(noted)

    def ended(self, tune_id: str) -> None:
        self.ours.discard(tune_id)

    def run(self, folder: Path) -> None:
        placement.run_all(
            _Asks(self), _Tells(self), self.places._room._resources, folder=folder,
            stop_asked=lambda: self.stop_asked, tick=self.tick, on_loss=lambda: os._exit(9),
        )  # fmt: skip

    def tick(self) -> None:
        self.most_waiting = max(self.most_waiting, len(self.places.waiting()))
        self.each_step()


class _Kept:
    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class _Asks(_Kept, Searcher):
    def __init__(self, script: Script) -> None:
        super().__init__(metric=None, mode=None)
        self.script = script

    def suggest(self, trial_id: str) -> Any:
        return self.script.next(trial_id)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.script.ended(trial_id)

    def save(self, checkpoint_path: str) -> None: ...
    def restore(self, checkpoint_path: str) -> None: ...


class _Tells(_Kept, FIFOScheduler):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        self.script.places.attach(tune_controller)
        self.script.most_kept = max(self.script.most_kept, len(tune_controller.get_trials()))
        return self.script.places.next_to_start()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.script.note(result)
        return self.script.on_result(trial.trial_id, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.script.note(result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.script.lost.append(self.script.numbers[trial.trial_id])


def _counting(description: dict[str, Any]) -> Results:
    """A trial that reports `steps` times, once in `seconds`, and takes `goodbye` seconds to end when it is stopped."""
    try:
        for n in range(1, description["steps"] + 1):
            time.sleep(description.get("seconds", 0.0))
            yield {"number": description["number"], "n": n, "done": n == description["steps"]}
    except GeneratorExit:
        time.sleep(description.get("goodbye", 0.0))
        if "note" in description:
            Path(description["note"]).write_text("written")
        raise ArithmeticError("an error while it ends") from None


def a_frozen_worker(folder: Path) -> dict[str, Any]:
    """The only place is held by a process that no longer runs; the trial after it needs that place."""
    script = Script(ResourcesSection(cpus=1), [{"steps": 20, "seconds": 0.1}, {"steps": 3}, {"steps": 3}])
    frozen: dict[str, Any] = {}

    def freeze(tune_id: str, result: dict[str, Any]) -> str:
        if not frozen and result["n"] == 2:
            os.kill(result["pid"], signal.SIGSTOP)
            frozen.update(tune_id=tune_id, pid=result["pid"], at=time.monotonic())
        return FIFOScheduler.CONTINUE

    def lose_lease() -> None:
        if frozen and "killed" not in frozen and time.monotonic() - frozen["at"] > 1:
            frozen["killed"] = True
            script.ended(frozen["tune_id"])
            script.places.kill(frozen["tune_id"])
            script.places.kill("no such trial")
        elif "killed" in frozen:
            script.places.kill(frozen["tune_id"])  # it is gone already

    script.on_result, script.each_step = freeze, lose_lease
    with placement.cluster(None, num_cpus=1):
        script.run(folder)
        gone = _gone(frozen["pid"])
    return {"results": script.results, "lost": script.lost, "frozen": frozen["pid"], "gone": gone}


def stopped_trials(folder: Path) -> dict[str, Any]:
    """Each trial but the last is stopped at its first result, and raises an error as it is closed."""
    script = Script(ResourcesSection(cpus=1), [{"steps": 5}] * 6)
    script.on_result = lambda tune_id, result: FIFOScheduler.STOP if result["number"] < 5 else FIFOScheduler.CONTINUE
    with placement.cluster(None, num_cpus=1):
        script.run(folder)
    return {"results": script.results, "lost": script.lost, "most_waiting": script.most_waiting}


def an_interrupt(folder: Path) -> dict[str, Any]:
    """One worker in a long step and then slow to write, one slow to write, and one that is frozen."""
    notes = [folder / "long-step", folder / "slow-end"]
    descriptions = [
        {"steps": 3, "seconds": 9, "goodbye": 3, "note": str(notes[0])},
        {"steps": 1000, "seconds": 0.1, "goodbye": 11, "note": str(notes[1])},
        {"steps": 1000, "seconds": 0.1},
    ]
    placement.STOP_WITHIN_S = 16  # the frozen one is waited for so long
    script = Script(ResourcesSection(cpus=1), descriptions)

    def freeze_and_interrupt(tune_id: str, result: dict[str, Any]) -> str:
        if result["number"] == 2 and result["n"] == 10:
            os.kill(result["pid"], signal.SIGSTOP)
            script.stop_asked = True
        return FIFOScheduler.CONTINUE

    script.on_result = freeze_and_interrupt
    with placement.cluster(None, num_cpus=3):
        started = time.monotonic()
        script.run(folder)
        print(f"took {time.monotonic() - started:.1f} s", file=sys.stderr)
        written = [note.exists() for note in notes]
    return {"written": written}


def a_hanging_start(folder: Path) -> dict[str, Any]:
    """The process of the first trial hangs before it says a word, and the trial's lease is lost."""
    started = folder / "started"

    def hang(description: dict[str, Any]) -> Results:
        if description["number"] == 0:
            started.write_text(str(os.getpid()))
            time.sleep(3600)
        return counting(description)

    counting, placement.run_trial = placement.run_trial, hang
    script = Script(ResourcesSection(cpus=1), [{"steps": 1}, {"steps": 2}])
    was_starting: list[bool] = []

    def lose_lease() -> None:
        if not was_starting and started.exists():
            (tune_id,) = script.numbers
            was_starting.append(tune_id in script.places.starting())
            script.ended(tune_id)
            script.places.kill(tune_id)

    script.each_step = lose_lease
    with placement.cluster(None, num_cpus=1):
        script.run(folder)
        gone = _gone(int(started.read_text()))
    return {"results": script.results, "lost": script.lost, "was_starting": was_starting, "gone": gone}


def a_disk_that_takes_nothing(folder: Path) -> dict[str, Any]:
    """Ray Tune's own folder cannot be written to any more, when it makes that of the second trial."""
    return _with_a_broken_disk(folder, kill=False)


def a_disk_that_takes_no_report(folder: Path) -> dict[str, Any]:
    """As before, when it writes down why a trial was lost."""
    return _with_a_broken_disk(folder, kill=True)


def _with_a_broken_disk(folder: Path, *, kill: bool) -> dict[str, Any]:
    script = Script(ResourcesSection(cpus=1), [{"steps": 2}] * 3)

    def break_disk(tune_id: str, result: dict[str, Any]) -> str:
        if result["n"] == 1 and result["number"] == 0:
            artifacts = Path(script.places._controller._storage.experiment_driver_staging_path)
            shutil.rmtree(artifacts)
            artifacts.write_text("a file in the way")
            if kill:
                os.kill(result["pid"], signal.SIGKILL)
        return FIFOScheduler.CONTINUE

    script.on_result = break_disk
    with placement.cluster(None, num_cpus=1):
        try:
            script.run(folder)
        except ClusterError as error:
            return {"error": str(error), "left": [path.name for path in folder.iterdir()]}
    return {"error": None}


def many_at_once(folder: Path) -> dict[str, Any]:
    """A node of 8 places, and 6 trials that wait for each other: they end only if all of them run."""
    gate = folder / "gate"
    gate.mkdir(parents=True)

    def wait_for_all(description: dict[str, Any]) -> Results:
        (gate / str(description["number"])).touch()
        while len(list(gate.iterdir())) < 6:
            time.sleep(0.05)
        yield {"number": description["number"], "n": 1, "done": True}

    placement.run_trial = wait_for_all
    script = Script(ResourcesSection(cpus=0.25), [{}] * 6)
    with placement.cluster(None, num_cpus=2):
        total = script.places.total()
        script.run(folder)
    return {"total": total, "results": script.results}


def short_trials(folder: Path) -> dict[str, Any]:
    """A node of 8 places, where a process takes longer to start than a trial to run; Ray Tune is to keep few trials."""
    placement._MOST_TRIALS = 20
    script = Script(ResourcesSection(cpus=0.25), [{"steps": 1, "seconds": 0.5}] * 100)
    alive: list[int] = []

    def count() -> None:
        if len(script.numbers) == 100 and not alive:
            alive.append(sum(type(thing) is Trial for thing in gc.get_objects()))

    script.each_step = count
    with placement.cluster(None, num_cpus=2):
        script.run(folder)
    return {"results": script.results, "lost": script.lost, "most_kept": script.most_kept, "alive": alive[0]}


def one_after_the_other(folder: Path) -> dict[str, Any]:
    """Two launches of one process, as a transfer to two NFEs is."""
    numbers = []
    for name in ("first", "second"):
        ray_environment.prepare(None)
        script = Script(ResourcesSection(cpus=1), [{"steps": 1}])
        with placement.cluster(None, num_cpus=1):
            script.run(folder / name)
        numbers += [result["number"] for result in script.results]
    return {"numbers": numbers}


def idle_places(folder: Path) -> dict[str, Any]:
    """Between two trials this launcher waits for another one, which needs the only place."""
    script = Script(ResourcesSection(cpus=1), [{"steps": 1}, {"steps": 1}])
    free: dict[str, float] = {}
    give = script.next

    def give_back_between(tune_id: str) -> Any:
        if len(script.numbers) != 1 or script.ours or "after" in free:
            return give(tune_id)
        free.setdefault("before", ray.available_resources().get("CPU", 0))
        script.places.release_idle()
        if (now := ray.available_resources().get("CPU", 0)) == 1:
            free["after"] = now
        return None

    script.next = give_back_between  # type: ignore[method-assign]
    with placement.cluster(None, num_cpus=1):
        script.run(folder)
    return free


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    placement.run_trial = _counting
    ray.cloudpickle.register_pickle_by_value(placement)  # so that workers run this file's trials
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
