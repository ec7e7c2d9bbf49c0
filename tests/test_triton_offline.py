"""What the Triton kernels compile to for GPUs that are not here, held to ``budgets.json``.

``python -m mmfast.kernels.offline`` does the same for many more variants, on every target.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from patched import default_dtype

from mmfast import backends

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("Triton interprets in this process", allow_module_level=True)

from mmfast.kernels import budgets, nearest_code, offline
from mmfast.kernels.budgets import Budgets, Needs
from mmfast.kernels.finite_scalar_quantize_few import numbers_of
from mmfast.kernels.scaled_dot_product_attention import HEAD_SIZES

BUDGETS = Budgets.load()
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
    if BUDGETS.applies:
        assert not BUDGETS.exceeded(VARIANTS[variant], kernels)
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


def made_up(**more) -> offline.Compiled:
    fields = {
        "kernel": "some_kernel",
        "target": offline.TARGETS["sm_90"],
        "constants": {"BLOCK": 64},
        "num_warps": 4,
        "num_stages": 2,
        "shared": 1024,
        "registers": 100,
        "spills": 0,
        "matrix_instructions": {"wgmma.mma_async": 8},
        "loads": {("some.py", 1): collections.Counter({128: 3, 32: 1})},
        "copies": 0,
        "specialisation": "",
        "assembly": "",
        "binary": b"",
    }
    return offline.Compiled(**{**fields, **more})


OWN = offline.Variant("some: quick", lambda n, k: None, quick=True)
OTHER = offline.Variant("some: other", lambda n, k: None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"registers": 101}, "101 registers, the budget is 100"),
        ({"spills": 4}, "4 bytes spilled, the budget is 0"),
        ({"shared": 2048}, "2048 bytes of shared memory, the budget is 1024"),
        ({"matrix_instructions": {"wgmma.mma_async": 7}}, "7 matrix instructions, the budget is 8"),
        ({"loads": {}}, "0 loads of 128 bits or more, the budget is 3"),
    ],
)
def test_budgets_are_kept(more, message):
    variant, limits = OWN, Budgets()
    limits.refresh(variant, [made_up()])
    assert limits.exceeded(variant, [made_up()]) == []
    better = made_up(registers=90, matrix_instructions={"wgmma.mma_async": 9})
    assert limits.exceeded(variant, [better]) == []
    # In any of its configurations.
    found = limits.exceeded(variant, [made_up(), made_up(**more)])
    assert found == [f"some_kernel, sm_90: {message}"]


def test_budgets_of_what_is_new():
    limits = Budgets()
    limits.refresh(OWN, [made_up()])
    other = made_up(target=offline.TARGETS["gfx942"])
    assert limits.exceeded(OWN, [other]) == ["some_kernel, gfx942: no budget"]
    assert limits.exceeded(OWN, [made_up(kernel="new")]) == ["new, sm_90: no budget"]
    assert limits.exceeded(OTHER, [made_up()]) == []


def test_refreshed_budgets():
    limits = Budgets()
    for registers in (80, 100):
        limits.refresh(OWN, [made_up(registers=registers)])
    assert limits.variants[OWN.name]["some_kernel"]["sm_90"] == Needs(100, 0, 1024, 8, 3)
    limits.chosen_from(OWN, {"sm_90": "abc"})
    limits.chosen_from(OWN, {"sm_80": ""})
    assert limits.choices == {OWN.name: {"sm_90": "abc", "sm_80": ""}}
    limits.chosen_from(OWN, {"sm_90": ""})
    assert not limits.choices
    limits.triton = "another"
    assert not limits.applies
    limits.refresh(OTHER, [made_up()])
    assert limits.applies
    assert limits.variants.keys() == {OTHER.name}
    limits.chosen_from(OTHER, {"sm_90": ""})
    assert not limits.choices


def test_budgets_survive_the_disk(tmp_path):
    limits = Budgets()
    for variant in (OWN, dataclasses.replace(OWN, name="some: else"), OTHER):
        limits.refresh(variant, [made_up(), made_up(kernel="other_kernel", shared=0)])
    limits.save(tmp_path / "budgets.json")
    assert Budgets.load(tmp_path / "budgets.json") == limits
    BUDGETS.save(tmp_path / "budgets.json")
    assert (tmp_path / "budgets.json").read_text() == budgets.FILE.read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"columns": ["registers"]}'])
def test_foreign_budgets_are_refused(content, tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="does not hold budgets"):
        Budgets.load(path)


def test_what_is_compiled_here_has_budgets_of_its_own():
    assert set(VARIANTS) <= set(BUDGETS.variants) <= {v.name for v in offline.variants()}
    for name, rows in BUDGETS.variants.items():
        assert rows
        assert all("sm_90" in row for row in rows.values())
        # Ways of devices with descriptors are behind a comma, or have kernels of their own.
        some = {kernel for kernel in rows if "," in kernel or "fused" in kernel}
        assert all(set(rows[kernel]) <= {"sm_90", "sm_100"} for kernel in some)
        if name in VARIANTS:
            assert all(set(row) == set(offline.TARGETS) for k, row in rows.items() if k not in some)


def lookup(num_dims: int, dtype: torch.dtype, metric: str = "euclidean") -> offline.Variant:
    def launch(n: int, k: int) -> None:
        x, codes = (torch.ones(count, num_dims, dtype=dtype) for count in (n, k))
        nearest_code.nearest_code(x, codes, metric)

    return offline.Variant(f"nearest_code: {metric}, {dtype}, D {num_dims}", launch)


SCREEN = "nearest_code_screen_kernel"
WIDTHS = (1, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257,
          300, 512, 513, 1000, 1024)  # fmt: skip


@pytest.mark.parametrize("name", offline.TARGETS)
def test_whatever_the_lookup_may_choose_has_a_budget(name):
    """For any width, metric and dtype the configurations to choose from are those of a variant with
    a budget, in float64 of one in float64: the worst of all of them is held to it."""
    target = offline.TARGETS[name]
    known = {
        (choices[name], "float64" in variant)
        for variant, choices in BUDGETS.choices.items()
        if name in choices and name in BUDGETS.variants[variant].get(SCREEN, {})
    }
    missing = [
        (num_dims, metric, dtype)
        for num_dims in WIDTHS
        for metric in nearest_code.METRICS
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        if (offline.choices(lookup(num_dims, dtype, metric), target), dtype == torch.float64)
        not in known
    ]
    assert not missing


def test_budgets_are_of_what_may_be_chosen_now():
    """Attention's have no hash until they are written again."""
    all_variants = {v.name: v for v in offline.variants()}
    for name in BUDGETS.variants:
        variant = all_variants[name]
        if "attention" in name and name not in BUDGETS.choices:
            continue
        now = {n: offline.choices(variant, target) for n, target in offline.TARGETS.items()}
        then = BUDGETS.choices.get(name, {})
        targets = then or (now if name in VARIANTS else ())
        assert {n: now[n] for n in targets} == (then or dict.fromkeys(targets, "")), name


def test_other_choices_are_seen(monkeypatch):
    variant, target = lookup(64, torch.float32), offline.TARGETS["sm_90"]
    before = offline.choices(variant, target)
    assert before
    assert offline.choices(variant, target) == before
    monkeypatch.setattr(nearest_code._screen, "configs", nearest_code._screen.configs[1:])
    assert offline.choices(variant, target) != before
    assert not offline.choices(VARIANTS["gated_activation: gelu_tanh, bfloat16"], target)


@pytest.mark.parametrize("backward", ["", ", backward"])
@pytest.mark.parametrize("width", HEAD_SIZES)
def test_attention_multiplies_on_tensor_cores_at_every_head_size(width, backward):
    table = dict(BUDGETS.variants[f"scaled_dot_product_attention: bfloat16, E {width}{backward}"])
    fused = {name: table.pop(name) for name in list(table) if "fused" in name}
    ordered = {name.partition(", ")[2] for name in fused if "gradient" in name}
    assert ordered == ({"", "ORDERED"} if backward else set())
    assert all(row.keys() == {"sm_90"} and row["sm_90"].spilled == 0 for row in fused.values())
    assert all(row["sm_90"].matrix > 0 for name, row in fused.items() if "gradient" in name)
    assert len({name.split(",")[0] for name in table}) == (2 if backward else 1)
    # Hopper has ways of its own, most of them with tiles by descriptors.
    assert all(("," in name) == (row.keys() == {"sm_90"}) for name, row in table.items())
    ways = 2 if backward else 3
    assert sum("TMA" in name or "AHEAD" in name for name in table) == ways * (2 if backward else 1)
    for row in table.values():
        for needs in row.values():
            assert needs.matrix > 0
            assert needs.wide > 0
            assert needs.spilled == 0


def test_the_tables_are_in_the_documents():
    text = (Path(__file__).parent.parent / "docs" / "tuning.md").read_text()
    assert budgets.markdown(BUDGETS) in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_do_not_depend_on_the_default_dtype(dtype):
    levels = (7, 5, 5, 5, 5, 8)
    want = numbers_of([3] * 6, levels)
    with default_dtype(dtype):
        assert torch.equal(numbers_of([3] * 6, levels), want)
    assert want[:, 3].tolist() == [math.prod(levels[:d]) / 2 for d in range(6)]
