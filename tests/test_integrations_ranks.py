"""Patched models in two processes: patched_ranks.py has the checks."""

from __future__ import annotations

import pytest
import torch

import mmfast

pytest.importorskip("diffusers")

import patched_ranks


@pytest.mark.skipif(
    bool(mmfast.backends.extension_missing()), reason="the compiled extension is absent"
)
def test_ranks_train_as_one(tmp_path):
    torch.multiprocessing.spawn(patched_ranks.work, (str(tmp_path),), nprocs=patched_ranks.RANKS)
