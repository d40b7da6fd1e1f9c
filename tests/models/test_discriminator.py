"""Losses of the discriminator that the published training does not have, against closed forms."""

import pytest
import torch

from models.discriminator import LeCam, ramp


def test_a_ramp_is_linear_between_0_and_1():
    assert [ramp(step, 4) for step in range(-2, 7)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [ramp(step, 0) for step in (-1, 0, 1)] == [0, 1, 1], "without a ramp: a step"


def test_lecam_of_constant_outputs():
    """Outputs r and f that stay the same: after n updates the averages are (1 - 0.99^n) times them."""
    lecam, r, f = LeCam(), 2.0, -1.0
    for n in range(1, 6):
        loss = lecam(torch.full((3, 1, 2, 2), r), torch.full((3, 1, 2, 2), f))
        share = 1 - 0.99**n
        assert loss.item() == pytest.approx((r - share * f) ** 2 + (f - share * r) ** 2, rel=1e-5)
    assert lecam.averages.tolist() == pytest.approx([share * r, share * f], rel=1e-5)


def test_the_gradient_of_lecam_is_of_the_outputs_alone():
    """2 (D(x) - a_fake) / n and 2 (D(x_hat) - a_real) / n: the averages are constants."""
    lecam = LeCam()
    lecam.averages = torch.tensor([0.5, -0.5])
    real, fake = (torch.tensor(v, requires_grad=True) for v in ([1.0, 3.0], [-2.0, 0.0]))
    lecam(real, fake).backward()
    a_real, a_fake = 0.99 * 0.5 + 0.01 * 2.0, -0.99 * 0.5 - 0.01 * 1.0
    assert real.grad.tolist() == pytest.approx([1 - a_fake, 3 - a_fake])
    assert fake.grad.tolist() == pytest.approx([-2 - a_real, 0 - a_real])


def test_outputs_that_overflow_leave_the_averages():
    lecam = LeCam()
    lecam.averages = torch.tensor([0.5, -0.5])
    lecam(torch.tensor([float("inf")]), torch.tensor([1.0]))
    assert lecam.averages.tolist() == pytest.approx([0.5, -0.485])
