"""What the Triton kernels compile to for GPUs that are not here.

``python -m mmfast.kernels.offline`` does the same for many more variants, on every target.
"""

from __future__ import annotations

import pytest

from mmfast import backends

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("Triton interprets in this process", allow_module_level=True)

from mmfast.kernels import offline

VARIANTS = {v.name: v for v in offline.variants(quick=True)}
NVIDIA = [name for name, target in offline.TARGETS.items() if target.gpu.backend == "cuda"]
OTHERS = [name for name in offline.TARGETS if name not in NVIDIA]
# Matrix instructions are each target's own. The rest compiles much alike for all of NVIDIA's, which
# take turns.
TARGETS = {
    name: [*(NVIDIA if variant.matrix else [NVIDIA[i % len(NVIDIA)]]), *OTHERS]
    for i, (name, variant) in enumerate(VARIANTS.items())
}


def compiled(variant: str, target: str) -> list[offline.Compiled]:
    try:
        return offline.compile_variant(VARIANTS[variant], offline.TARGETS[target])
    except FileNotFoundError as error:
        pytest.skip(f"this Triton cannot compile for {target}: {error}")


@pytest.mark.parametrize(
    ("variant", "target"), [(name, target) for name in VARIANTS for target in TARGETS[name]]
)
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
    name = TARGETS[variant][0]
    target = offline.TARGETS[name]
    compiled(variant, name)
    seen = {
        tuple(offline.specialisations(VARIANTS[variant], target, rows, codes))
        for rows, codes in ((1, 1), (16, 16), (17, 33))
    }
    assert len(seen) == 1
