"""Are the files that trials will read what they are known as? Asked before anything is started."""

import math
import shutil
from pathlib import Path

from bdense_core import assets
from bdense_core.dataset_names import DATASET_NAMES
from bdense_core.errors import CacheError
from bdense_core.integrity import cache_bytes, check_cache, check_file, read_metadata
from bdense_core.network_config import NetworkConfig
from search.errors import MissingFile
from search.model_files import check_reference
from search.settings import Settings
from search.spec import Study

_CHECKED_CACHE_BYTES = 2e9


def preflight(study: Study, settings: Settings) -> None:
    """Check the files that the trials will read, before anything is started.

    A large cache is checked only in part: workers check each shard once more when they open it.

    Raises:
        CheckpointError: a file is damaged.
        EvaluationError: the reference was made with other features.
        CacheError: a shard is damaged, or the teacher cache cannot fit.
        MissingFile: the data set is not where it was when the study was made.
    """
    if study.dataset and study.dataset not in DATASET_NAMES and not Path(study.dataset).exists():
        raise MissingFile(f"the data set {study.dataset} does not exist any more; put it back, or make a new study")
    if study.teacher:
        check_file(study.teacher)
        read_metadata(study.teacher.path)
    if study.evaluation:
        check_file(study.evaluation.features)
        check_file(study.evaluation.reference)
        check_reference(study.evaluation.features, study.evaluation.reference)
    check_cache(settings.cache, at_most_bytes=_CHECKED_CACHE_BYTES)
    _check_room(study, settings.cache)


def files_of(study: Study) -> list[str]:
    """What trials read that did not come with the package, by its path."""
    at = study.evaluation
    known = [study.teacher, *((at.features, at.reference) if at else ())]
    own = [file.path for file in known if file and not assets.is_shipped(file)]
    return own + ([study.dataset] if study.dataset and study.dataset not in DATASET_NAMES else [])


def _check_room(study: Study, cache: Path) -> None:
    if study.teacher is None:
        return
    network = NetworkConfig.from_dict(read_metadata(study.teacher.path)["config"])
    if (problem := lacking_room(study, network, cache)) is not None:
        raise CacheError(problem)


def lacking_room(study: Study, network: NetworkConfig, cache: Path) -> str | None:
    """Why the teacher caches of all seeds cannot fit, even if all that is there already were theirs; None if they can.

    Each run checks its own cache once more, exactly.
    """
    needed = study.cache_bytes(network)
    room = free_bytes(cache) + cache_bytes(cache)
    budget = study.spec.cache.budget_gb
    if needed <= min(room, math.inf if budget is None else budget * 1e9):
        return None
    allowed = "" if budget is None else f", and cache.budget_gb allows {budget:g}"
    return (
        f"the teacher cache takes {needed / 1e9:.3g} GB for {len(study.all_seeds())} seed(s), {cache} has room for "
        f"{room / 1e9:.3g}{allowed}; set BDENSE_HOME to a larger disk, raise the budget, lower seeds.control_repeats, "
        "or do without: --set cache.enabled=false"
    )


def free_bytes(folder: Path) -> int:
    """Free space where a folder is, or would be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
