"""The library's exceptions: one tree, so that a caller sees what each `except` will catch.

    BDenseError                 exit 1
      ConfigError               exit 2   a setting is wrong; nothing was started
        UnknownKey
        BadValue
      WeightsError              empty, negative or not finite branch weights
      ShapeMismatch             names the tensor and both shapes
      CheckpointError           missing, hash differs, other architecture
        UnsafePickle            names something that a checkpoint has no business with; nothing was run
      CacheError                a teacher cache that is damaged or cannot be written
      TrainingDiverged          carries kimg, interval and the last finite loss
      EvaluationError           too few images, statistics of another protocol

Every message says what was wrong, where, and what to do. The service's own errors hang below
`BDenseError` too, in `search/errors.py`.
"""


class BDenseError(Exception):
    """Anything this project reports to its user as one line instead of a traceback."""

    exit_code = 1


class ConfigError(BDenseError):
    """A setting is wrong. Nothing was started."""

    exit_code = 2


class UnknownKey(ConfigError):
    """A key that no setting has; the message names the nearest known one."""


class BadValue(ConfigError):
    """A known setting with a value outside its range."""


class WeightsError(BDenseError):
    """Branch weights that are empty, negative or not finite."""


class ShapeMismatch(BDenseError):
    """Two tensors that must agree in shape do not."""


class CheckpointError(BDenseError):
    """A network file that is missing, altered, or of another architecture."""


class UnsafePickle(CheckpointError):
    """A pickle that wants more than a network consists of. It was refused before anything was called."""


class CacheError(BDenseError):
    """A teacher cache that is damaged or cannot be written."""


class TrainingDiverged(BDenseError):
    """A loss that is no longer finite; `interval` is None where training has none."""

    def __init__(self, *, kimg: float, interval: int | None, last_finite_loss: float | None) -> None:
        self.kimg = kimg
        self.interval = interval
        self.last_finite_loss = last_finite_loss
        last = "none" if last_finite_loss is None else f"{last_finite_loss:.6g}"
        loss, advice = (
            ("the loss", "lower the learning rate")
            if interval is None
            else (f"the loss of interval {interval}", "lower method.lr or change the weights")
        )
        super().__init__(f"{loss} is not finite at {kimg:.3f} kimg (last finite loss: {last}); {advice}")


class EvaluationError(BDenseError):
    """A distance that cannot be computed, or must not be compared."""
