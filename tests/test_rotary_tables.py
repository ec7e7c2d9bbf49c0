"""rotary_tables against the tables of diffusers, and refusals."""

from __future__ import annotations

import pytest
import torch
from cases import normal

import mmfast


@pytest.mark.parametrize(("linear", "ntk"), [(1.0, 1.0), (2.0, 1.0), (1.0, 8.0)])
def test_one_axis(linear, ntk):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    cos, sin = embeddings.get_1d_rotary_pos_embed(
        16, 30, 500.0, use_real=True, linear_factor=linear, ntk_factor=ntk,
        freqs_dtype=torch.float64,
    )  # fmt: skip
    options = {"theta": 500.0, "linear_factor": linear, "ntk_factor": ntk}
    for positions in ((30,), torch.arange(30)[:, None]):
        got = mmfast.rotary_tables(positions, 16, **options)
        torch.testing.assert_close(got, (cos[:, ::2], sin[:, ::2]), rtol=0, atol=1e-6)


def test_axes_of_a_grid():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    cos, sin = embeddings.get_3d_rotary_pos_embed(32, None, (3, 4), 2, grid_type="slice",
                                                  max_size=(3, 4))  # fmt: skip
    got = mmfast.rotary_tables((2, 3, 4), (8, 12, 12))
    torch.testing.assert_close(got, (cos[:, ::2], sin[:, ::2]), rtol=0, atol=1e-5)


def test_positions_of_samples_and_text():
    positions = normal(2, 7, 2) * 9
    cos, sin = mmfast.rotary_tables(positions, (4, 6), before=3, after=1, dtype=torch.float64)
    assert cos.shape == sin.shape == (2, 11, 5)
    for rows in (slice(0, 3), slice(10, 11)):
        assert (cos[:, rows] == 1).all()
        assert (sin[:, rows] == 0).all()
    exponents = torch.arange(3, dtype=torch.float64) / 3
    angles = positions[:, :, 1:].double() / 10000**exponents
    torch.testing.assert_close(cos[:, 3:10, 2:], angles.cos())
    torch.testing.assert_close(sin[:, 3:10, 2:], angles.sin())
    assert mmfast.rotary_tables((0, 4), (2, 2))[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2,), 3), "dims must be even"),
        (((2, 3), (2, 2, 2)), "sizes must be 3"),
        (((-2,), 2), "sizes must be 1"),
        ((torch.zeros(3), 2), r"positions must be \(L, axes\)"),
        ((torch.zeros(3, 2), 2), "with 1 axes"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        mmfast.rotary_tables(*arguments)
    with pytest.raises(ValueError, match="before and after"):
        mmfast.rotary_tables((2,), 2, before=-1)
