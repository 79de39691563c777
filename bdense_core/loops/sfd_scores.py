"""The teacher's images that a student of SFD is compared with."""

from torch import Tensor

from bdense_core.loops.sfd_teacher import Teacher
from bdense_core.loops.teacher import Endpoints
from bdense_core.networks import NetworkConfig
from bdense_core.task import Task

ENDPOINTS = "sfd/1"
"""Changes with whatever makes the teacher's endpoints differ that their identity does not name."""


class TeacherEndpoints(Endpoints):
    """Where the teacher's trajectories end.

    Args:
        config: of the teacher.
    """

    def __init__(self, task: Task, config: NetworkConfig, teacher: Teacher) -> None:
        super().__init__(task, config, teacher, {"endpoints": ENDPOINTS})
        self._walking = teacher

    def _images(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        return self._walking.states(noise, labels)[:, -1, -1]
