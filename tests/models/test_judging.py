"""The surprise of codes against closed forms, with the perfect denoiser of a known distribution."""

import math

import pytest
import torch
from test_orders import lively
from test_samplers import STATES, L, data_distribution, tiny, with_oracle

from models.judging import surprise
from utils.core.errors import UserError
from utils.core.seed import StepRandom


def test_surprise_given_all_others():
    """p(x_i | x_-i) = p(x) / the sum over the values of x_i."""
    p = data_distribution()
    found = surprise(with_oracle(p), STATES)
    for i in range(L):
        others = [j for j in range(L) if j != i]
        same = (STATES[:, None, others] == STATES[None, :, others]).all(-1)
        expected = -(p / (same * p).sum(1)).log2()
        assert torch.allclose(found[:, i], expected.float(), atol=1e-5)


def test_surprise_over_subsets_is_unbiased():
    """The sum over the codes is -log2 p(x) on average, whatever the number of passes."""
    p = data_distribution()
    rows, n = torch.tensor([5, 40, 77]), 4000
    for passes in (1, 4):
        found = surprise(with_oracle(p), STATES[rows].repeat(n, 1), StepRandom("a"), passes).sum(1).view(n, 3)
        error = found.std(0) / math.sqrt(n)
        assert ((found.mean(0) + p[rows].log2()) / error).abs().max() < 4
        assert error.max() < 0.2


def test_the_rows_do_not_depend_on_the_batch():
    model = lively(latent_shape=[1, 4, 4])
    ids = torch.randint(16, (5, 16), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        torch.cat([surprise(model, ids[:2]), surprise(model, ids[2:])]), surprise(model, ids), atol=1e-4
    )


def test_raster_order_is_refused():
    with pytest.raises(UserError, match="give an absorbing sampler"):
        surprise(tiny("autoregressive"), STATES[:1])
