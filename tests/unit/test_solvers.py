import math

import pytest
import torch

from bdense_core import solvers
from bdense_core.errors import BadValue
from bdense_core.sigmas import logsnr, polynomial

MEAN, STD = 0.3, 0.6


def gaussian(x, t):
    """The exact denoiser of one Gaussian, N(0.3, 0.6^2) in every pixel."""
    return (STD**2 * x + t**2 * MEAN) / (STD**2 + t**2)


def exact(x, t, t_end):
    """The solution of the ODE for that Gaussian: the distance to the mean shrinks with the total spread."""
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + t_end**2) / (STD**2 + t**2))


def error(num_steps, **options):
    # Images beyond [-1, 1] are thresholded by dpmpp, so the start is small.
    x = torch.linspace(-0.5, 0.9, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    grid = logsnr(num_steps, sigma_min=0.05, sigma_max=2.0)
    states = solvers.solve(gaussian, x, grid, **options)
    assert states.shape == (num_steps, 2, 1, 2, 2)
    return (states[-1] - exact(x, 2.0, 0.05)).abs().max().item()


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"solver": "euler"}, 1),
        ({"solver": "heun"}, 2),
        ({"solver": "dpm2"}, 2),
        ({"solver": "ipndm", "max_order": 1}, 1),
        ({"solver": "deis_tab", "max_order": 1}, 1),
        ({"solver": "dpmpp", "max_order": 1}, 1),
        ({"solver": "dpmpp", "max_order": 2, "lower_order_final": False}, 2),
        ({"solver": "dpmpp", "max_order": 2, "predict_x0": False, "lower_order_final": False}, 2),
    ],
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(options, order):
    observed = math.log2(error(129, **options) / error(257, **options))
    # A multistep solver starts with lower orders, which costs a little of the last order.
    assert order - 0.3 < observed < order + 1.0


@pytest.mark.parametrize("predict_x0", [True, False])
def test_a_higher_order_of_dpmpp_is_more_accurate(predict_x0):
    # Order 3 starts with one step of order 1, so only its constant is smaller, not its exponent.
    errors = [
        error(33, solver="dpmpp", max_order=order, predict_x0=predict_x0, lower_order_final=False)
        for order in (1, 2, 3)
    ]
    assert errors[0] > 5 * errors[1] > 5 * 1.2 * errors[2]


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_integrates_polynomials_on_equal_steps_once_started(order):
    # d = t^(order - 1) has the solution t^order / order; Adams-Bashforth of that order is exact.
    def denoise(x, t):
        return x - t * t ** (order - 1)

    grid = tuple(5.0 - 0.5 * i for i in range(9))
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    states = solvers.solve(denoise, x, grid, solver="ipndm", max_order=order).flatten()
    for i in range(order - 1, len(grid) - 1):
        step = (grid[i + 1] ** order - grid[i] ** order) / order
        assert (states[i + 1] - states[i]).item() == pytest.approx(step, rel=1e-12)


def test_one_step_of_every_solver_of_order_one_is_an_euler_step():
    x = torch.tensor([[0.4, -0.2]], dtype=torch.float64)
    euler = solvers.solve(gaussian, x, (2.0, 1.0))
    for name in ("ipndm", "deis_tab", "dpmpp"):
        assert torch.allclose(solvers.solve(gaussian, x, (2.0, 1.0), solver=name), euler, rtol=1e-14), name


@pytest.mark.parametrize("name", solvers.SOLVERS)
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("to_zero", [False, True])
def test_network_calls_are_counted_as_they_happen(name, afs, to_zero):
    levels = []

    def denoise(x, t):
        levels.append(t)
        return gaussian(x, t)

    solvers.solve(denoise, torch.ones(1, 4), polynomial(5), solver=name, afs=afs, to_zero=to_zero)
    assert len(levels) == solvers.network_calls(name, 5, afs=afs, to_zero=to_zero)


@pytest.mark.parametrize("name", ["euler", "ipndm", "deis_tab", "dpmpp"])
def test_the_analytic_first_step_needs_no_network(name):
    x = torch.tensor([[8.0, -3.0]], dtype=torch.float64)
    states = solvers.trajectory(pytest.fail, x, (2.0, 1.0), solver=name, afs=True, predict_x0=False)
    next(states)
    assert torch.allclose(next(states), x * (1 - 1 / math.sqrt(5)), rtol=1e-14)  # by hand: x + (1 - 2) d


def test_states_are_computed_only_when_asked_for():
    states = solvers.trajectory(pytest.fail, torch.ones(1, 2), polynomial(4))
    assert torch.equal(next(states), torch.ones(1, 2))


def test_to_zero_appends_the_denoised_last_state():
    x = torch.ones(1, 3)
    plain = solvers.solve(gaussian, x, (2.0, 1.0))
    longer = solvers.solve(gaussian, x, (2.0, 1.0), to_zero=True)
    assert torch.equal(longer[:2], plain)
    assert torch.equal(longer[2], gaussian(plain[1], torch.tensor(1.0)))


@pytest.mark.parametrize("pixels", [12, 192, 201, 3072])
def test_dynamic_threshold_equals_its_definition_by_torch_quantile(pixels):
    images = 3 * torch.randn(5, pixels, generator=torch.Generator().manual_seed(0))
    images[0] *= 0.01
    limit = images.abs().quantile(0.995, dim=1, keepdim=True).clamp(min=1)
    assert torch.allclose(solvers.dynamic_threshold(images), images.clamp(-limit, limit) / limit, rtol=1e-5)
    assert torch.equal(solvers.dynamic_threshold(images)[0], images[0])


@pytest.mark.parametrize(
    ("num_points", "max_order", "final", "orders"),
    [
        (4, 3, True, [1, 2, 1]),
        (13, 3, True, [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 2, 1]),
        (4, 3, False, [1, 2, 3]),
        (2, 3, True, [1]),
    ],
)
def test_dpmpp_orders_rise_and_fall(num_points, max_order, final, orders):
    found = [solvers.dpmpp_order(i, num_points, max_order, lower_order_final=final) for i in range(num_points - 1)]
    assert found == orders  # spec/methods.md 1.5 and the README of the vectors


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"solver": "dpmp"}, "did you mean dpmpp"),
        ({"solver": "dpmpp", "max_order": 4}, "give 1 to 3"),
        ({"solver": "ipndm", "max_order": 0}, "give 1 to 4"),
        ({"solver": "euler", "max_order": 1}, "no choice of order"),
        ({"sigmas": (1.0, 2.0)}, "falling"),
        ({"sigmas": (1.0, 0.0)}, "falling"),
    ],
)
def test_mistakes_are_reported_before_the_first_state(options, named):
    with pytest.raises(BadValue, match=named):
        solvers.trajectory(gaussian, torch.ones(1, 1), **{"sigmas": (2.0, 1.0), **options})
