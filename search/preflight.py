"""Are the files that trials will read what they are known as? Asked before anything is started."""

from bdense_core.integrity import check_cache, check_file, read_metadata
from search.model_files import check_reference
from search.settings import Settings
from search.spec import Study

_CHECKED_CACHE_BYTES = 2e9


def preflight(study: Study, settings: Settings) -> None:
    """Check the files that the trials will read, before anything is started.

    A large cache is checked only in part: workers check each shard once more when they open it.

    Raises:
        CheckpointError, CacheError: a file is damaged.
        EvaluationError: the reference was made with other features.
    """
    if study.teacher:
        check_file(study.teacher)
        read_metadata(study.teacher.path)
    if study.evaluation:
        check_file(study.evaluation.features)
        check_file(study.evaluation.reference)
        check_reference(study.evaluation.features, study.evaluation.reference)
    check_cache(settings.cache, at_most_bytes=_CHECKED_CACHE_BYTES)
