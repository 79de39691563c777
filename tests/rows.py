"""Trials as the database holds them and as a launcher claims them, with what a test does not care about filled in."""

from search.records import Claim, Row

WEIGHTS = (1.0, 1.0, 2.0)


def row(
    number: int,
    state: str = "COMPLETE",
    role: str = "search",
    *,
    value: float | None = None,
    duration_s: float | None = None,
    seeds: tuple[int, ...] = (0,),
    fraction: float = 0.0,
) -> Row:
    return Row(
        number=number, state=state, role=role, params={}, weights=WEIGHTS, seeds=seeds, value=value,
        intermediate={}, repeats=(), duration_s=duration_s, reason=None, is_final=False,
        is_enqueued=False, owner=None, retry_of=None, protocol="p", progress={"fraction": fraction},
    )  # fmt: skip


def claim(number: int, role: str = "search", *, seeds: tuple[int, ...] = (0,)) -> Claim:
    return Claim(number=number, origin=number, role=role, weights=WEIGHTS, seeds=seeds)
