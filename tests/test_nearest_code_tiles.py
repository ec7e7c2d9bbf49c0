"""What the lookup's screening has to choose from on each kind of device, and what comes of it."""

from __future__ import annotations

import re

import pytest
import torch
from test_attention_tiles import instructions

from mmfast import backends

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("Triton interprets in this process", allow_module_level=True)

from mmfast.kernels import nearest_code, offline
from mmfast.kernels import nearest_code_tiles as tiles
from mmfast.kernels.tuned import Tuned

HOPPER = "sm_90"
WIDTHS = (16, 32, 64, 128, 256, 512)


def candidates(target: str, width: int, **more) -> list:
    with offline.compiling(offline.TARGETS[target]):
        sizes = nearest_code._padded(width)
        return nearest_code._screen.candidates({**sizes, "WIDE": False, "AGAIN": False, **more})


def ahead(found) -> list[bool]:
    return [c.kwargs["AHEAD"] for c in found]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("target", offline.TARGETS)
def test_what_devices_have(target, width):
    found = candidates(target, width)
    keys = [(*tiles._size(c), c.kwargs["TMA"], c.kwargs["AHEAD"]) for c in found]
    assert len(set(keys)) == len(keys)
    # Products are asynchronous on Hopper, and have two halves of 16 dimensions from 32 on.
    assert ahead(found)[0] == (target == HOPPER and 32 <= width <= 256)
    assert any(ahead(found)) == ahead(found)[0]
    assert any(c.kwargs["TMA"] for c in found) == (target in ("sm_90", "sm_100"))
    again = nearest_code._screen_again
    with offline.compiling(offline.TARGETS[target]):
        sizes = nearest_code._padded(width) | {"STEP_D": min(width, 64)}
        (only,) = again.candidates({**sizes, "WIDE": False, "AGAIN": True})
    assert not only.kwargs["AHEAD"]


@pytest.mark.parametrize("width", [w for w in WIDTHS if w <= 128])
def test_hopper_has_several_programs_of_a_multiprocessor(width):
    """By registers, of which a multiprocessor has 65536 for its threads."""
    programs = {65536 // (c.maxnreg * 32 * c.num_warps) for c in candidates(HOPPER, width)}
    assert {1, 2} <= programs
    assert max(programs) >= 3


def compiled(config, width: int):
    """The screening with one configuration."""
    x = torch.ones(64, width)
    with (
        offline.compiling(offline.TARGETS[HOPPER]) as kernels,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(Tuned, "candidates", lambda self, constants: [config])
        patch.setattr(
            Tuned,
            "run",
            lambda self, *args, grid, **constants: (
                constants["AGAIN"] or self.launch(config, args, grid, constants)
            ),
        )
        nearest_code.nearest_code(x, x, "euclidean")
    (kernel,) = (k for k in kernels if k.src.fn.__name__ == "nearest_code_screen_kernel")
    return kernel


# p: products are issued; w: all that were issued are waited for; a: a multiply-add; m: a maximum.
LETTERS = {"HGMMA": "p", "WARPGROUP.DEPBAR": "w", "FFMA": "a", "FMNMX": "m", "BRA": "|"}


def order(kernel, tmp_path) -> str:
    """In which the instructions stand in SASS."""
    words = re.findall(
        "|".join(rf"\b{re.escape(n)}\b" for n in LETTERS), instructions(kernel, tmp_path)
    )
    return "".join(LETTERS[word] for word in words)


# Behind the wait of a tile: its norm terms, then products of the next tile among its maxima, and no
# wait until the loop is back at its beginning.
AMONG = re.compile(r"p\|?w\|?(a{32,})\|?(m*p[mp]*)\|")


@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_scores_are_compared_between_products(width, tmp_path):
    config = candidates(HOPPER, width)[0]
    assert tiles._size(config) == (128, 128, 8)
    found = AMONG.search(order(compiled(config, width), tmp_path))
    assert found
    terms, among = found.groups()
    scores = 128 * 128 // 256  # of a thread
    assert len(terms) == scores
    assert among.count("p") == width // 2 // 16  # half of the dimensions, 16 at a time
    # Of a group of codes all but one, and three of each group's place.
    group = nearest_code._group(width)
    maxima = scores - scores // group + 3 * scores // group
    assert among.count("m") >= 0.95 * maxima
    assert among.lstrip("m").count("m") >= 0.75 * maxima


def test_without_it_products_are_waited_for(tmp_path):
    config = next(c for c in candidates(HOPPER, 64) if not c.kwargs["AHEAD"])
    text = order(compiled(config, 64), tmp_path)
    assert re.search(r"p{4}w[am]{100,}", text)
    assert not AMONG.search(text)
