"""diffusers' VQModel on mmfast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import normal
from patched import assert_same, largest, pair, randomised, results

pytest.importorskip("diffusers")

from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer


def vq_model(num_codes=16):
    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=4,
        num_vq_embeddings=num_codes,
        mid_block_add_attention=False,
    )
    return randomised(model)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_model(training):
    plain, patched, report = pair(vq_model().train(training))
    assert [(entry.name, entry.done, entry.left) for entry in report.entries] == [
        ("quantize", "forward", "")
    ]
    image = normal(2, 3, 6, 5)

    def run(model, x):
        return model(x, return_dict=False)

    assert_same(results(patched, run, image), results(plain, run, image))
    assert list(patched.state_dict()) == list(plain.state_dict())
    report.undo()
    assert_same(patched(image).sample, plain(image).sample, exact=True)


@pytest.mark.parametrize("options", [{}, {"sane_index_shape": True}, {"legacy": False}], ids=str)
@pytest.mark.parametrize("remap", [None, "random", "extra", 3])
def test_quantizer(options, remap, tmp_path):
    if remap is not None:
        np.save(tmp_path / "used.npy", np.array([3, 1, 5, 9, 2]))
        options = {**options, "remap": tmp_path / "used.npy", "unknown_index": remap}
    plain, patched, _ = pair(randomised(VectorQuantizer(16, 4, beta=0.25, **options)))
    z = normal(2, 4, 3, 5, seed=1)
    assert_same(*(results(m, lambda m, x: m(x), z) for m in (patched, plain)))
    codes = torch.tensor([[1], [4]]), (1, 1, 2, 4)
    assert_same(*(m.get_codebook_entry(*codes) for m in (patched, plain)))


def test_nothing_to_quantise():
    plain, patched, _ = pair(VectorQuantizer(16, 4, beta=0.25))
    z = normal(0, 4, 3, 5)
    assert_same(*(results(m, lambda m, x: m(x), z) for m in (patched, plain)))


def test_half_precision():
    plain, patched, _ = pair(randomised(VectorQuantizer(16, 4, beta=0.25)).bfloat16())
    z = normal(2, 4, 3, 5, dtype=torch.bfloat16)
    assert [t.dtype for t in patched(z)[:2]] == [t.dtype for t in plain(z)[:2]]


def test_memory():
    plain, patched, _ = pair(vq_model(num_codes=900).quantize)
    z = normal(2, 4, 10, 10)
    assert largest(lambda: plain(z)) >= 200 * 900
    assert largest(lambda: patched(z)) <= 900 * 4


def test_compiles():
    plain, patched, _ = pair(vq_model().quantize.eval())
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    z = normal(2, 4, 3, 5)
    assert_same(results(compiled, lambda m, x: m(x), z), results(plain, lambda m, x: m(x), z))
