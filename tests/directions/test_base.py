"""Direction samplers: E[v vᵀ] = I, the error each docstring promises, and draws that depend on the key alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.directions import DirectionSampler, Gaussian, Orthogonal, Rademacher
from lightning_bilevel.randomness import Key
from tests.support.seeds import key_of
from tests.support.statistics import check_error, check_mean
from tests.support.tables import every_sampler

N = 6
COUNT = 2000
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class UnitPerTensor(DirectionSampler):
    """Broken: a Gaussian direction divided by the norm of each of its two tensors."""

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        rows = Gaussian().flat(key, start, stop, like)
        return torch.cat([torch.nn.functional.normalize(part) for part in rows.split([2, N - 2], dim=1)], dim=1)


class OffCentre(DirectionSampler):
    """Broken: Gaussian with a mean of 0.3, so that E[v_i v_j] = 0.09."""

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        return Gaussian().flat(key, start, stop, like) + 0.3


class SharedSign(DirectionSampler):
    """Broken: the first two entries always have equal signs."""

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        rows = Rademacher().flat(key, start, stop, like)
        rows[:, 1] = rows[:, 0]
        return rows


def second_moments(sampler: DirectionSampler, directions: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return (1/b) Σ v vᵀ of ``COUNT`` independent estimates, of shape ``(COUNT, N, N)``."""
    like = torch.zeros(N, dtype=dtype)
    draws = torch.stack([sampler.flat(key_of(seed=7, estimate=i), 0, directions, like) for i in range(COUNT)]).double()
    return draws.mT @ draws / directions


def check_isotropic(sampler: DirectionSampler, dtype: torch.dtype = torch.float64) -> None:
    # √N, where a sampler needs it, is rounded to the dtype, and enters squared.
    check_mean(second_moments(sampler, 2, dtype), torch.eye(N), torch.finfo(dtype).eps / 2)


def check_documented(sampler: DirectionSampler, directions: int, error: float) -> None:
    gradient = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    check_error(second_moments(sampler, directions) @ gradient, gradient, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_sampler
def test_second_moment_is_the_identity(sampler: DirectionSampler, dtype: torch.dtype) -> None:
    check_isotropic(sampler, dtype)


@pytest.mark.parametrize("fake", [UnitPerTensor(), OffCentre(), SharedSign()], ids=lambda fake: type(fake).__name__)
def test_the_check_rejects_broken_samplers(fake: DirectionSampler) -> None:
    with pytest.raises(AssertionError, match=r"^the mean is off by \d"):
        check_isotropic(fake)


@pytest.mark.parametrize("directions", [1, 4, N + 3])
@every_sampler
def test_error_of_the_mean_is_the_documented_one(sampler: DirectionSampler, directions: int) -> None:
    rest, odd = directions % N, directions % 2
    expected = {
        "Gaussian": (N + 1) / directions,
        "Orthogonal": rest * (N - rest) / directions**2,  # (N − b)/b for b ≤ N
        "Blocks": rest * (N - rest) / directions**2,
        "Blocks 2": ((directions - odd) * (N - 2) + odd * (N - 1)) / directions**2,
    }
    name = f"{type(sampler).__name__} {getattr(sampler, 'blocks', None) or ''}".strip()
    documented = expected.get(name, (N - 1) / directions)
    check_documented(sampler, directions, documented)
    assert sampler.error(N, directions) == pytest.approx(documented)


class Own(DirectionSampler):
    """A sampler that says nothing of its error."""

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        return Rademacher().flat(key, start, stop, like)


def test_a_sampler_that_says_nothing_has_the_error_of_independent_directions() -> None:
    assert Own().error(9, 4) == 2
    assert all(each.of(3) is each for each in (Own(), Gaussian(), Orthogonal()))


def test_the_error_check_tells_gaussian_from_rademacher() -> None:
    with pytest.raises(AssertionError, match="^error "):
        check_documented(Gaussian(), 4, (N - 1) / 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_sampler
def test_cutting_the_range_changes_nothing(sampler: DirectionSampler, dtype: torch.dtype) -> None:
    like = torch.zeros(4, dtype=dtype)  # 10 directions are two and a half blocks of `Orthogonal`
    whole = sampler.flat(key_of(seed=3), 0, 10, like)
    parts = [sampler.flat(key_of(seed=3), start, stop, like) for start, stop in [(0, 3), (3, 3), (3, 9), (9, 10)]]
    # A QR decomposition of fewer columns rounds differently; all other samplers agree bit for bit.
    tolerance = 8 * torch.finfo(dtype).eps if isinstance(sampler, Orthogonal) else 0.0
    torch.testing.assert_close(torch.cat(parts), whole, rtol=tolerance, atol=tolerance)


@every_sampler
def test_the_key_decides_and_nothing_else(sampler: DirectionSampler) -> None:
    names = {"seed": 1, "estimate": 2, "rank": 4}
    like, key = torch.zeros(64), key_of(**names)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rows = sampler.flat(key, 0, 8, like)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(rows, sampler.flat(key_of(**names), 0, 8, like))
    others = [key_of(**{**names, name: 9}) for name in names]
    for other in (*others, Key(key.words[::-1]), key.fold_in("guide"), key.fold_in(0)):
        assert not torch.allclose(rows, sampler.flat(other, 0, 8, like)), other
    assert len(rows.unique(dim=0)) > 6, "direction numbers must give different directions"


@every_sampler
def test_one_direction_covers_all_parameters_jointly(sampler: DirectionSampler) -> None:
    params = {
        "w": torch.zeros(2, 2, dtype=torch.float64),
        "s": torch.zeros((), dtype=torch.bfloat16),
        "b": torch.zeros(3, dtype=torch.float32),
    }
    drawn = sampler.draw(key_of(seed=5), 2, 6, params)
    joint = sampler.flat(key_of(seed=5), 2, 6, torch.zeros(8, dtype=torch.float64))
    expected = tree.unflatten(joint, params)
    assert list(drawn) == list(params)
    for name, value in params.items():
        assert drawn[name].shape == (4, *value.shape)
        assert drawn[name].dtype == value.dtype
        torch.testing.assert_close(drawn[name], expected[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_sampler
def test_length_is_the_root_of_the_dimension(sampler: DirectionSampler, dtype: torch.dtype) -> None:
    if isinstance(sampler, Gaussian):
        return
    # Entries are rounded by at most eps/2. Norms and factors must not be rounded too, as they are below float32.
    roundings = 8 if dtype in (torch.float32, torch.float64) else 0.5
    for size in (1, 7, 100):
        rows = sampler.flat(key_of(), 0, 5, torch.zeros(size, dtype=dtype)).double()
        lengths = rows.norm(dim=1) / size**0.5
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=roundings * torch.finfo(dtype).eps)


@every_sampler
def test_an_empty_range_is_an_empty_tensor(sampler: DirectionSampler) -> None:
    assert sampler.flat(key_of(), 0, 0, torch.zeros(3)).shape == (0, 3)
