"""What README.md and the pages on quantisers show works as it is written, but for sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import normal
from test_integrations_taming import Taming2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mmfast
from mmfast.nn import VectorQuantize

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_readme():
    names: dict[str, Any] = {}
    exec(blocks("README.md")[0], names)
    assert torch.equal(names["indices"], mmfast.nearest_code(names["x"], names["codebook"])[0])


def test_integrations(tmp_path):
    """The first part, up to the transformers."""
    library = pytest.importorskip("vector_quantize_pytorch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from test_integrations_transformers import encodec

    diffusers.VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, num_vq_embeddings=16
    ).save_pretrained(tmp_path / "diffusers")
    encodec().save_pretrained(tmp_path / "transformers")
    names: dict[str, Any] = {"model": Taming2(16, 4, 0.25)}
    patched = []
    for code in blocks("docs/integrations.md")[:6]:
        names["path"] = tmp_path / ("diffusers" if "diffusers" in code else "transformers")
        if "VQModel(...)" in code:
            names["VQModel"] = lambda _: Taming2(16, 4, 0.25)
        exec(code, names)
        patched.append(type(names["model"]))
    assert patched[2:] == [library.ResidualVQ, diffusers.VQModel, patched[4], Taming2]
    assert patched[4].__name__ == "EncodecModel"
    assert "model = SD3" in blocks("docs/integrations.md")[6]


def test_distributed(tmp_path):
    """In one process, on the CPU."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, shard = normal(6, 256), normal(9, 256, seed=1)
        names: dict[str, Any] = {"mesh": mesh, "x": x, "shard": shard, "group": None}
        names |= {"data": 1, "codes": 1, "codebook": distribute_tensor(shard, mesh, [Shard(0)])}
        for code in blocks("docs/distributed.md"):
            names["model"] = torch.nn.Sequential(
                VectorQuantize(8, 16, learnable_codebook=True, ema_update=False)
            )
            exec(code.replace('"cuda"', '"cpu"').replace("1_000_000", "16"), names)
        assert names["quantized"].shape == x.shape
        assert torch.equal(names["indices"], mmfast.nearest_code(x, shard)[0])
    finally:
        dist.destroy_process_group()
