"""Precision, recall, density and coverage against the prdc package, and against plain differences."""

import pytest
import torch
from prdc import compute_prdc
from sklearn.metrics import pairwise_distances

from utils.core.errors import UserError
from utils.evaluation.prdc import distances, prdc

SIZES = [(90, 131, 64), (131, 90, 3), (64, 64, 300)]


def normal(n, m, D, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=random), 0.9 * torch.randn(m, D, generator=random) + 0.1


def with_duplicates(n, m, D, seed=0):
    """Each row several times, half of the fake ones among the real."""
    random = torch.Generator().manual_seed(seed)
    real, fake = normal(n, m, D, seed)
    real = real[torch.randint(0, n // 4, (n,), generator=random)]
    copies = real[torch.randint(0, n, (m,), generator=random)]
    others = fake[torch.randint(0, m // 3, (m,), generator=random)]
    return real, torch.where(torch.rand(m, 1, generator=random) < 0.5, copies, others)


def plain(real, fake, k):
    """The definitions on whole matrices, distances from differences, which are 0 for equal rows."""

    def matrix(a, b):
        return (a.double()[:, None] - b.double()).square().sum(-1).float().sqrt()

    real_radii, fake_radii = (matrix(x, x).sort(1).values[:, k] for x in (real, fake))
    d = matrix(real, fake)
    inside = d < real_radii[:, None]
    return dict(
        precision=inside.any(0).double().mean().item(),
        recall=(d < fake_radii).any(1).double().mean().item(),
        density=inside.sum(0).double().mean().item() / k,
        coverage=inside.any(1).double().mean().item(),
    )


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert isinstance(actual[name], float)
        assert abs(actual[name] - expected[name]) <= 1e-6, name


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_package(size, k):
    real, fake = normal(*size)
    expected = compute_prdc(real.numpy(), fake.numpy(), k)
    assert expected["precision"] > 0 and expected["recall"] < 1  # else much would go unseen
    for tile in (7, 64, 1024):
        assert_same(prdc(real, fake, k, tile=tile), expected)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_package_with_duplicates(size, k):
    # Multiples of 1/8: then the package's arithmetic is exact, and equal rows are at 0 there too.
    real, fake = ((x * 8).round() / 8 for x in with_duplicates(*size))
    for tile in (7, 64, 1024):
        assert_same(prdc(real, fake, k, tile=tile), compute_prdc(real.numpy(), fake.numpy(), k))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_equal_rows_are_at_distance_zero(size, k):
    # Here the package finds noise of 1e-8 between equal rows, which changes with the order of the rows.
    real, fake = with_duplicates(*size, seed=k)
    expected = plain(real, fake, k)
    for tile in (7, 64, 1024):
        assert_same(prdc(real, fake, k, tile=tile), expected)


def test_a_ball_of_radius_zero_is_empty():
    point = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    assert prdc(point.expand(6, -1), point.expand(7, -1), 3) == dict(precision=0, recall=0, density=0, coverage=0)


def test_distances_are_scikit_learns_to_the_last_digit():
    # The last digit can decide a comparison: 4 of the 10^8 pairs of 10,000 x 2048 features, before this was exact.
    real, fake = normal(300, 200, 64)
    assert (distances(real, fake).numpy() == pairwise_distances(real.numpy(), fake.numpy())).all()


def test_distances_near_the_noise():
    """Rows that differ in a float32's last digits are apart unless float64 cannot tell."""
    a = torch.ones(1, 2048)
    assert distances(a, a).item() == 0
    b = a.clone()
    b[0, 0] += 1e-3
    assert distances(a, b).item() == pytest.approx(1e-3, rel=1e-3)
    assert distances(torch.zeros(1, 5), torch.zeros(1, 5)).item() == 0


def test_progress_sees_all_tiles_and_none_is_larger():
    seen = []

    def progress(tiles):
        seen.append(tiles)
        return iter(tiles)

    real, fake = normal(30, 25, 4)
    assert prdc(real, fake, tile=8, progress=progress) == prdc(real, fake)
    real_tiles, fake_tiles, pairs = seen
    assert len(real_tiles) == len(fake_tiles) == 10  # 4 + 3 + 2 + 1: half of the square
    area = torch.zeros(30, 25)
    for rows, cols in pairs:
        area[rows, cols] += 1
        assert area[rows, cols].numel() <= 64
    assert (area == 1).all()


def test_what_cannot_be_compared_is_refused():
    real, fake = normal(20, 20, 4)
    with pytest.raises(UserError, match="width 4 and 3"):
        prdc(real, fake[:, :3])
    prdc(real, fake[:5], nearest_k=3)
    with pytest.raises(UserError, match="4 fake images are too few.*use 5"):
        prdc(real, fake[:4], nearest_k=3)
    for value in (float("nan"), float("inf")):
        broken = real.clone()
        broken[17, 2] = value
        with pytest.raises(UserError, match="the real features"):
            prdc(broken, fake, tile=8)
