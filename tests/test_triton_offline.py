"""What the Triton kernels compile to for GPUs that are not here.

``python -m mmfast.kernels.offline`` does the same for many more variants.
"""

from __future__ import annotations

import pytest

from mmfast import backends

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("Triton interprets in this process", allow_module_level=True)

from mmfast.kernels import offline

VARIANTS = {v.name: v for v in offline.variants(quick=True)}


def compiled(variant: str, target: str) -> list[offline.Compiled]:
    try:
        return offline.compile_variant(VARIANTS[variant], offline.TARGETS[target])
    except FileNotFoundError as error:
        pytest.skip(f"this Triton cannot compile for {target}: {error}")


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_complaints(variant, target):
    kernels = compiled(variant, target)
    assert kernels
    complaints = {
        (k.kernel, k.configuration()): found
        for k in kernels
        if (found := offline.complaints(VARIANTS[variant], k))
    }
    assert not complaints
    if any(k.spills is None for k in kernels):
        pytest.skip("no cuobjdump beside Triton: spills are not known, the rest is as it should")


def test_every_kernel_file_declares_variants():
    assert {v.name.split(":")[0] for v in VARIANTS.values()} == {
        m.__name__.rpartition(".")[2] for m in offline.modules()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_do_not_recompile(variant):
    """The numbers of rows and codes: training data and codebooks of any size share the code."""
    target = offline.TARGETS["sm_90"]
    compiled(variant, "sm_90")
    seen = {
        tuple(offline.specialisations(VARIANTS[variant], target, rows, codes))
        for rows, codes in ((1, 1), (16, 16), (17, 33))
    }
    assert len(seen) == 1
