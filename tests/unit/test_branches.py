"""Repeating the head of a network and dropping all but its last group."""

import pytest
import torch

from bdense_core.branches import freeze, with_branches, without_branches
from bdense_core.errors import BadValue
from bdense_core.networks import NetworkConfig, build

SONG = NetworkConfig.ddpmpp(
    img_resolution=8,
    img_channels=2,
    model_channels=8,
    channel_mult=[1],
    num_blocks=1,
    attn_resolutions=[],
    label_dim=3,
)
ADM = NetworkConfig.adm(
    img_resolution=8,
    img_channels=2,
    model_channels=16,
    channel_mult=[1],
    num_blocks=1,
    attn_resolutions=[],
    label_dim=3,
)
configs = pytest.mark.parametrize("config", [SONG, ADM], ids=["song", "adm"])


def randomised(config):
    torch.manual_seed(0)
    denoiser = build(config).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(0, 0.2)
    return denoiser


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([0.1, 2.0, 70.0]), torch.eye(3)


@configs
def test_the_head_becomes_consecutive_copies_and_all_else_stays(config):
    """K groups of C channels, not C groups of K: channel c of branch k is at k C + c."""
    teacher = randomised(config)
    student = with_branches(teacher, 3)
    head = {f"{teacher.head_name}.{kind}" for kind in ("weight", "bias")}
    state = student.state_dict()
    assert list(state) == list(teacher.state_dict())
    for name, taught in teacher.state_dict().items():
        if name in head:
            assert len(state[name]) == 6
            for channel in range(6):
                assert torch.equal(state[name][channel], taught[channel % 2]), name
        else:
            assert torch.equal(state[name], taught), name
    assert student.config.num_branches == 3


@configs
@torch.no_grad()
def test_the_last_group_and_no_other_becomes_the_ordinary_network(config):
    student = with_branches(randomised(config), 3)
    for parameter in student.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # so that all groups differ
    alone = without_branches(student)
    branches = student.branches(*inputs())
    assert alone.config == config
    # Convolutions of 6 and of 2 channels may add in another order.
    assert torch.allclose(alone(*inputs()), branches[:, -1], atol=1e-5)
    assert (alone(*inputs()) - branches[:, 0]).abs().max() > 0.01


@configs
def test_repeating_and_dropping_gives_the_same_network(config):
    teacher = randomised(config)
    there_and_back = without_branches(with_branches(teacher, 4))
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(there_and_back.state_dict()[name], tensor), name


def test_a_student_shares_no_memory_with_its_teacher():
    teacher = randomised(SONG)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for num_branches in (1, 2):
        student = with_branches(teacher, num_branches)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_type_and_mode_of_the_network_are_kept():
    teacher = randomised(SONG).double()
    assert with_branches(teacher, 2).get_parameter("model.map_layer0.weight").dtype == torch.float64
    assert not with_branches(teacher, 2).training
    assert with_branches(teacher.train(), 2).training
    assert without_branches(with_branches(teacher, 2)).training


def test_a_student_cannot_have_students():
    student = with_branches(randomised(SONG), 4)
    with pytest.raises(BadValue, match="already has 4 branches"):
        with_branches(student, 4)


def test_a_network_that_sums_several_outputs_has_no_head_to_repeat():
    config = NetworkConfig.from_dict(SONG.to_dict() | {"decoder_type": "skip", "channel_mult": [1, 1]})
    with pytest.raises(BadValue, match="no single head to repeat"):
        with_branches(build(config), 4)


def test_a_frozen_network_takes_no_gradient_and_no_dropout():
    config = NetworkConfig.from_dict(SONG.to_dict() | {"dropout": 0.5})
    frozen = freeze(build(config).train())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(frozen(*inputs()), frozen(*inputs()))
    assert not frozen(*inputs()).requires_grad
