"""Ranks, counts and ratios against the published table, brute force and hand-made spectra."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorllm.errors import UserError
from tensorllm.tensors import ranks as rk
from tensorllm.tensors.factors import parameters
from tensorllm.tensors.tucker import relative_error, spectra, tucker

ROBERTA, GPTJ, LLAMA = (768, 64, 4, 12), (4096, 256, 4, 16), (4096, 128, 4, 32)
PUBLISHED = [  # TensorLLM's poster: the twelve cells, of which one has two candidate triples
    (ROBERTA, (636, 53, 4), 1.12),
    (ROBERTA, (720, 60, 3), 1.12),
    (ROBERTA, (312, 26, 4), 3.74),
    (ROBERTA, (180, 15, 4), 8.78),
    (ROBERTA, (444, 37, 3), 2.52),
    (GPTJ, (64, 4, 2), 247.30),
    (GPTJ, (800, 50, 2), 14.69),
    (GPTJ, (208, 13, 1), 74.68),
    (GPTJ, (304, 19, 2), 46.77),
    (LLAMA, (1920, 60, 3), 3.54),
    (LLAMA, (1920, 60, 1), 5.81),
]


@pytest.mark.parametrize(("sizes", "ranks", "published"), PUBLISHED)
def test_published_compression_ratios(
    sizes: tuple[int, ...], ranks: tuple[int, ...], published: float
) -> None:
    stored = rk.tucker_parameters(sizes, dict(enumerate(ranks)))
    assert round(math.prod(sizes) / stored, 2) == published


def test_counts_are_what_is_stored() -> None:
    w = torch.randn(20, 6, 4, 3)
    for chosen in ({0: 5, 1: 3, 2: 2}, {1: 2}, {0: 20, 2: 1}):
        assert rk.tucker_parameters(w.shape, chosen) == parameters(tucker(w, chosen))
    assert rk.low_rank_parameters((30, 20), 4) == 4 * 50


def test_good_ranks_become_ints() -> None:
    got = rk.check_ranks([torch.tensor(5), 1, 4], (5, 3, 4))
    assert got == (5, 1, 4)
    assert all(type(rank) is int for rank in got)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ((6, 1, 1), ("R1", "1..5", "6")),
        ((5, 0, 1), ("R2", "1..3", "0")),
        ((5, 1, -2), ("R3", "1..4", "-2")),
        ((5, 1), ("3 ranks", "(R1 in 1..5, R2 in 1..3, R3 in 1..4)", "got 2")),
        ((5, 1, 1, 1), ("3 ranks", "got 4")),
        ((5, 1.0, 1), ("R2", "integer", "1.0")),
        ((5, "1", 1), ("R2", "integer", "'1'")),
        ((True, 1, 1), ("R1", "integer", "True")),
        ((5, None, 1), ("R2", "integer", "None")),
        ("511", ("integers", "'511'")),
        (7, ("integers", "7")),
    ],
)
def test_bad_ranks_are_named(bad: object, said: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        rk.check_ranks(bad, (5, 3, 4))  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rho", "shape", "rank"),
    [
        (0.29, (100, 300), 29),  # 0.29 * 100 = 28.999999999999996
        (0.57, (100, 100), 57),  # 56.99999999999999
        (0.29, (20_000, 20_000), 5800),  # 5799.999999999999
        (0.01, (4096, 16384), 40),
        (0.1, (4096, 16384), 409),
        (1, (7, 5), 5),
        (1.0, (7, 5), 5),
        (1e-9, (7, 5), 1),
        (0.999, (5, 1000), 4),
    ],
)
def test_laser_rank(rho: float, shape: tuple[int, int], rank: int) -> None:
    assert rk.laser_rank(rho, shape) == rank


@given(st.integers(1, 99), st.integers(1, 20000))
def test_laser_rank_is_the_exact_floor_of_percentages(percent: int, size: int) -> None:
    assert rk.laser_rank(percent / 100, (size, 2 * size)) == max(1, percent * size // 100)


@pytest.mark.parametrize("rho", [0, -0.1, 1.01, float("nan"), "0.5", True, None])
def test_laser_rho_out_of_range(rho: object) -> None:
    with pytest.raises(UserError, match=r"\(0, 1\]"):
        rk.laser_rank(rho, (4, 4))  # type: ignore[arg-type]


def test_ranks_for_energy_by_hand() -> None:
    singular = {0: torch.tensor([3.0, 2.0, 1.0, 1.0]), 2: torch.tensor([1.0, 0.0])}  # 9 4 1 1 of 15
    assert rk.ranks_for_energy(singular, 9 / 15 - 1e-9) == {0: 1, 2: 1}
    assert rk.ranks_for_energy(singular, 9 / 15 + 1e-9) == {0: 2, 2: 1}
    assert rk.ranks_for_energy(singular, 14.5 / 15) == {0: 4, 2: 1}
    assert rk.ranks_for_energy(singular, 1) == {0: 4, 2: 1}


@pytest.mark.parametrize("wanted", [0.9, 0.5, 0.2, 0.05, 0.001])
def test_ranks_for_error_keep_the_promise(wanted: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(24, 12, 4, 3) * torch.arange(1, 25)[:, None, None, None] ** -1.0
    chosen = rk.ranks_for_error(spectra(w, (0, 1, 2)), wanted)
    assert relative_error(w, tucker(w, chosen, sweeps=0)) <= wanted


def test_ranks_for_error_by_hand() -> None:
    """Each mode discards its equal part of the squared error, and the most that this allows."""
    singular = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])  # 4 of 9, then a ninth each
    assert rk.ranks_for_error({0: singular}, (2.5 / 9) ** 0.5) == {0: 4}
    assert rk.ranks_for_error({0: singular, 3: singular}, (2.5 / 9) ** 0.5) == {0: 5, 3: 5}
    assert rk.ranks_for_error({0: singular}, 0) == {0: 6}
    assert rk.ranks_for_error({0: torch.tensor([1.0, 0.0])}, 0) == {0: 1}


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_shares_of_energy_out_of_range(share: float) -> None:
    with pytest.raises(UserError, match=rf"energy .*\(0, 1\], got {share}"):
        rk.ranks_for_energy({0: torch.ones(3)}, share)


@pytest.mark.parametrize("error", [-0.1, 1, 1.1, float("nan")])
def test_errors_out_of_range(error: float) -> None:
    with pytest.raises(UserError, match=rf"error .*\[0, 1\), got {error}"):
        rk.ranks_for_error({0: torch.ones(3)}, error)


def test_marchenko_pastur_edge_bounds_noise() -> None:
    torch.manual_seed(0)
    top = float(torch.linalg.svdvals(0.3 * torch.randn(400, 900))[0])
    assert top == pytest.approx(rk.marchenko_pastur_edge((400, 900), 0.3), rel=0.02)
