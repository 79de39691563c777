"""The service's exceptions: one tree, below the library's `BDenseError`.

    BDenseError                 exit 1   bdense_core/errors.py, with the library's own errors
      StorageError              the database, or what is (not) in it
        StudyNotFound           no study of that name; the message lists the names there are
        StudyExists             the name is taken by a study with other settings
        StudyUnreadable         another version stored it, with settings that this one does not know
        StudyBusy               trials of it are running, so it is not deleted
        NothingFinished         no trial has ended, so there is nothing to show or export
        LeaseLost               the trial belongs to somebody else now; its result is dropped
        ServerError             the embedded PostgreSQL does not start, answer or stop
      UnlikeProtocols           values of two protocols would be ranked, subtracted or shown in one column
      ClusterError              Ray cannot be reached, or all of it was lost
      TrackerError              a tracker that was asked for cannot begin; later it would only be switched off
      FetchError                a published file cannot be got, or is not the one that was meant
      MissingFile               a study names a file that is not there; the message says how to get it

Wrong settings (`BadValue`, `UnknownKey`, exit 2) come from `bdense_core.errors`. No message carries a
password: a storage URL goes through `search.settings.mask` first.
"""

from bdense_core.errors import BDenseError, CheckpointError

__all__ = [
    "ClusterError",
    "FetchError",
    "LeaseLost",
    "MissingFile",
    "NothingFinished",
    "ServerError",
    "StorageError",
    "StudyBusy",
    "StudyExists",
    "StudyNotFound",
    "StudyUnreadable",
    "TrackerError",
    "UnlikeProtocols",
]


class StorageError(BDenseError):
    """The database cannot be used, or does not hold what was asked of it."""


class StudyNotFound(StorageError):
    """No study of that name in this database."""


class StudyExists(StorageError):
    """The name is taken by a study whose settings differ; nothing was changed."""


class StudyUnreadable(StorageError):
    """Another version stored the study, with settings that this one does not know."""


class StudyBusy(StorageError):
    """Trials of the study are running; it was left as it is."""


class NothingFinished(StorageError):
    """The study has no finished trial yet."""


class LeaseLost(StorageError):
    """This worker no longer owns its trial: it stops, and its result is dropped."""


class ServerError(StorageError):
    """The embedded PostgreSQL does not start, answer or stop."""


class UnlikeProtocols(BDenseError):
    """Values that were not measured alike: other features, reference statistics, or number of samples."""


class ClusterError(BDenseError):
    """Ray cannot be reached, or every node of it was lost."""


class TrackerError(BDenseError):
    """A tracker cannot begin."""


class FetchError(BDenseError):
    """A published file cannot be got, or is not the one that was meant; what was there before still is."""


class MissingFile(CheckpointError):
    """A study names a model file that this machine does not have."""
