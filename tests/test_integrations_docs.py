"""What docs/integrations.md shows works as it is written."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import normal
from test_integrations_attention import TINY, Attention
from test_integrations_taming import VectorQuantizer
from torch import nn
from transformers_of_diffusers import sd3

import mmfast
import mmfast.integrations

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("vector_quantize_pytorch")

pytestmark = pytest.mark.skipif(
    bool(mmfast.backends.extension_missing()), reason="the compiled extension is absent"
)
PAGE = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def shown(words: str) -> str:
    """The only snippet with these words."""
    (found,) = (code for code in SNIPPETS if words in code)
    return found


def run(words: str, **names: Any) -> dict[str, Any]:
    names = {"mmfast": mmfast, **names}
    exec(shown(words), names)
    return names


def test_each_snippet_is_run_below():
    """By what the tests look for, each snippet once."""
    source = Path(__file__).read_text()
    words = re.findall(r'(?:run|shown)\(\s*"((?:[^"\\]|\\.)+)"', source)
    counts = [sum(w in code for w in words) for code in SNIPPETS]
    assert min(counts) >= 1, [c for c, n in zip(SNIPPETS, counts, strict=True) if not n]


def test_patch_and_back(capsys):
    model = nn.Sequential(Attention())
    names = run("report = mmfast.integrations.patch(model)", model=model)
    assert "Attention" in capsys.readouterr().out
    undo, rest = shown("report.undo()  # takes it back").split("\n", 1)
    assert "forward" in vars(model[0])
    exec(undo, names)
    assert "forward" not in vars(model[0])
    within, unpatch = rest.replace("...", "ours = 'forward' in vars(model[0])").rsplit("\n", 2)[:2]
    exec(within, names)
    assert names["ours"]
    assert "forward" in vars(model[0])
    exec(unpatch, names)
    assert "forward" not in vars(model[0])


def test_quantisers(tmp_path):
    mmfast.integrations.unpatch(run("import ResidualVQ")["model"])
    diffusers.VQModel(
        block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8
    ).save_pretrained(tmp_path / "vq")
    transformers.EncodecModel(
        transformers.EncodecConfig(num_filters=4, codebook_size=16, hidden_size=16)
    ).save_pretrained(tmp_path / "encodec")
    mmfast.integrations.unpatch(run("VQModel.from_pretrained", path=tmp_path / "vq")["model"])
    mmfast.integrations.unpatch(run("EncodecModel", path=tmp_path / "encodec")["model"])
    made = run(
        "# of one of these projects", VQModel=lambda _: nn.Sequential(VectorQuantizer(8, 4, 0.25))
    )
    mmfast.integrations.unpatch(made["model"])


def test_transformers_of_diffusers(tmp_path):
    model, inputs = sd3()
    model.save_pretrained(tmp_path / "transformer")
    names = run("SD3Transformer2DModel", path=tmp_path)
    got = names["model"].eval()(**inputs).sample
    torch.testing.assert_close(got, model.eval()(**inputs).sample, rtol=1e-4, atol=1e-5)
    mmfast.integrations.unpatch(names["model"])


def test_by_name(tmp_path):
    config = transformers.LlamaConfig(**TINY)
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    names = run("register()", AutoModel=transformers.AutoModel, path=tmp_path)
    assert names["model"].config._attn_implementation == "mmfast"
    names["model"](torch.arange(7)[None])


def test_context(capsys):
    run("with mmfast.integrations.patch_attention()", model=Attention(), x=normal(2, 7, 48))
    assert "1 of 1 calls ran on mmfast" in capsys.readouterr().out


def test_schedulers():
    class Pipeline:
        def __init__(self):
            self.scheduler = diffusers.DPMSolverMultistepScheduler()
            self.components = {"scheduler": self.scheduler}

    pipeline = Pipeline()
    run("import DPMSolverMultistepScheduler", pipeline=pipeline)
    ours = mmfast.integrations.diffusers.DPMSolverMultistepScheduler
    assert type(pipeline.scheduler) is ours
    pipeline = Pipeline()
    theirs = type(pipeline.scheduler)
    code = shown("mmfast.integrations.diffusers.patch(pipeline)")
    make, undo = code.rstrip().split("\n")
    names = {"mmfast": mmfast, "pipeline": pipeline}
    exec(make, names)
    assert type(pipeline.scheduler) is ours
    run("use_philox", scheduler=pipeline.scheduler, seed=3)
    exec(undo, names)
    assert type(pipeline.scheduler) is theirs


def test_readme():
    """Its lines on models of other libraries."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", readme, re.S) if "pipeline" in c)
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",),
        ),
        diffusers.DDPMScheduler(),
    )
    exec(code, {"model": copy.deepcopy(Attention()), "pipeline": pipeline})
    assert type(pipeline.scheduler) is mmfast.integrations.diffusers.DDPMScheduler
