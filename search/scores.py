"""Scores by weighting and training seed, of one protocol by construction: the only door to a comparison."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from search.errors import UnlikeProtocols
from search.records import CONTROL, Row, last_of_chains
from search.spec import Study


@dataclass(frozen=True)
class Scores:
    """Final scores that may be subtracted and ranked."""

    metric: str
    protocol: str
    """Hash of what the values may be compared with."""
    values: dict[str, dict[int, float]]
    """Arm, or control of a search -> training seed -> value."""
    metrics: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """Of a comparison: further figure -> arm -> training seed -> value."""

    @classmethod
    def of(cls, study: Study, rows: list[Row]) -> "Scores":
        """The finished runs of a comparison's arms; of a search, its controls on all their training seeds.

        Raises:
            UnlikeProtocols: a row has a value of another protocol than the study's.
        """
        values: dict[str, dict[int, float]] = {}
        metrics: dict[str, dict[str, dict[int, float]]] = {}
        for row in finished(last_of_chains(rows), protocol=study.protocol_hash()):
            if row.arm is not None and row.value is not None:
                values.setdefault(row.arm, {})[row.seeds[0]] = row.value
                for name, figure in row.metrics.items():
                    metrics.setdefault(name, {}).setdefault(row.arm, {})[row.seeds[0]] = figure
            elif row.is_control:
                values.setdefault(row.role.removeprefix(CONTROL), {}).update(row.by_seed)
        return cls(metric=study.metric, protocol=study.protocol_hash(), values=values, metrics=metrics)


def finished(rows: Iterable[Row], *, protocol: str | None = None) -> list[Row]:
    """Rows that ran to their end, with a value that may be ranked among the others'.

    Args:
        protocol: the one that is asked for; None: whichever the first row has.

    Raises:
        UnlikeProtocols: a row has a value of another one.
    """
    ended = [row for row in rows if row.value is not None]
    for row in ended:
        protocol = protocol or row.protocol
        if row.protocol != protocol:
            raise UnlikeProtocols(
                f"trial {row.number} was scored by protocol {row.protocol}, what it would be compared with by "
                f"{protocol}; make a study of its own for each protocol (features, reference, number of samples)"
            )
    return [row for row in ended if row.state == "COMPLETE"]
