"""How many trials fit, on nodes that are made up here."""

import pytest

from search import room
from search.errors import ClusterError
from search.room import Node, Room
from search.sections import ResourcesSection

FREE = Node(cpus=4, gpus=0, free_cpus=4, free_gpus=0)
TAKEN = Node(cpus=4, gpus=0, free_cpus=0, free_gpus=0)


def room_with(monkeypatch: pytest.MonkeyPatch, nodes: list[Node], **resources: float) -> Room:
    monkeypatch.setattr(room, "_nodes", lambda: iter(nodes))
    monkeypatch.setattr(room, "_LOOK_AGAIN_S", 0.0)
    return Room(ResourcesSection(**resources))


@pytest.mark.parametrize(
    ("gpus", "places"), [(0.25, 8), (0.4, 4), (0.5, 4), (0.6, 2), (1 / 3, 6), (1.0, 2), (2.0, 1), (3.0, 0)]
)
def test_a_part_of_a_gpu_is_never_put_together_from_two(gpus: float, places: int) -> None:
    node = Node(cpus=64, gpus=2, free_cpus=64, free_gpus=2)
    assert node.fits(ResourcesSection(gpus=gpus)) == places
    assert node.fits_now(ResourcesSection(gpus=gpus)) == places


def test_what_full_gpus_have_left_over_is_no_place() -> None:
    full = Node(cpus=64, gpus=4, free_cpus=56, free_gpus=4 - 8 * 0.4)
    assert full.fits_now(ResourcesSection(gpus=0.4)) == 0
    one_free = Node(cpus=64, gpus=4, free_cpus=57, free_gpus=4 - 7 * 0.4)
    assert one_free.fits_now(ResourcesSection(gpus=0.4)) == 1


def test_a_trial_must_fit_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Node(cpus=1, gpus=0, free_cpus=1, free_gpus=0)
    with pytest.raises(ClusterError, match=r"a trial asks for 2 CPU and 0 GPU on one node.*1 CPU and 0 GPU"):
        room_with(monkeypatch, [small, small], cpus=2).total()
    assert room_with(monkeypatch, [FREE, small, small], cpus=2).total() == 2


def test_an_empty_cluster_is_filled_at_once_and_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = room_with(monkeypatch, [FREE, FREE])
    ours = 0
    while empty.left(ours=ours, held=0):
        ours += 1
    assert ours == 8


def test_places_that_we_hold_are_filled_again_though_ray_calls_them_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room_with(monkeypatch, [TAKEN]).left(ours=3, held=4) == 1
    assert room_with(monkeypatch, [TAKEN]).left(ours=4, held=4) == 0


def test_rays_late_view_does_not_make_a_lone_launcher_claim_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room_with(monkeypatch, [FREE]).left(ours=4, held=4) == 0


def test_one_trial_at_most_waits_while_somebody_else_has_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    others = room_with(monkeypatch, [TAKEN, TAKEN])
    assert others.left(ours=0, held=0) == 1
    assert others.left(ours=1, held=0) == 0


def test_a_node_that_joins_or_dies_is_seen_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [TAKEN]
    followed = room_with(monkeypatch, nodes)
    assert (followed.total(), followed.left(ours=4, held=4)) == (4, 0)
    nodes.append(FREE)
    assert (followed.total(), followed.left(ours=4, held=4)) == (8, 4)
    del nodes[0]
    assert (followed.total(), followed.left(ours=4, held=0)) == (4, 0)
    nodes.clear()
    assert followed.total() == 0, "only a cluster that never had a place is an error"


def test_max_parallel_bounds_both_the_total_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = room_with(monkeypatch, [FREE, FREE], max_parallel=3)
    assert (bounded.total(), bounded.left(ours=1, held=1), bounded.left(ours=3, held=3)) == (3, 2, 0)


def test_a_cluster_that_does_not_answer_is_taken_to_be_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = room_with(monkeypatch, [FREE])
    assert silent.left(ours=1, held=0) == 3

    def no_answer() -> None:
        raise ConnectionError

    monkeypatch.setattr(room, "_nodes", no_answer)
    assert silent.left(ours=1, held=0) == 3
