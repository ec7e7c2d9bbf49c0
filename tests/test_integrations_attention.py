"""PyTorch's attention served by mmfast: the context manager, modules of anyone, transformers."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import normal
from patched import assert_same, pair, results
from torch import nn

import mmfast.integrations
from mmfast.integrations import patch, patch_attention, unpatch
from mmfast.integrations.attention import objections, scaled_dot_product_attention

# Options of language models of transformers.
TINY = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


class Attention(nn.Module):
    """As people write it."""

    def __init__(self, width=48, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(F.silu(out.transpose(1, 2).flatten(2)))


class Spelled(Attention):
    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(nn.functional.silu(out.transpose(1, 2).flatten(2)))


@pytest.fixture
def calls(monkeypatch):
    """Counts what reaches mmfast."""
    counted = []
    ours = mmfast.scaled_dot_product_attention

    def counting(*args, **kwargs):
        counted.append(args[0].shape)
        return ours(*args, **kwargs)

    monkeypatch.setattr(mmfast, "scaled_dot_product_attention", counting)
    return counted


served = pytest.mark.skipif(
    bool(mmfast.backends.extension_missing()), reason="the compiled extension is absent"
)


@served
@pytest.mark.parametrize("kind", [Attention, Spelled])
def test_module(kind, calls):
    torch.manual_seed(0)
    plain, patched, report = pair(nn.Sequential(nn.Linear(48, 48), kind()))
    assert [(entry.name, entry.done) for entry in report.swapped] == [("1", "attention")]
    x = normal(2, 7, 48)
    assert_same(*(results(m, lambda m, x: m(x), x) for m in (patched, plain)))
    assert calls
    report.undo()
    calls.clear()
    assert_same(patched(x), plain(x), exact=True)
    assert not calls
    assert "scaled_dot_product_attention" in vars(F)


@served
@pytest.mark.parametrize("kind", [Attention, Spelled])
def test_module_compiles_whole(kind):
    torch.manual_seed(0)
    module = kind()
    patch(module)
    x = normal(2, 7, 48)
    assert_same(torch.compile(module, fullgraph=True)(x), module(x))


@served
def test_context(calls):
    q, k, v = (normal(2, 3, 9, 24, seed=i) for i in range(3))
    before = F.scaled_dot_product_attention
    with patch_attention() as report:
        got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        F.scaled_dot_product_attention(q, k, normal(2, 3, 9, 300))
    assert F.scaled_dot_product_attention is before
    assert_same(got, before(q, k, v, is_causal=True))
    assert calls == [q.shape]
    assert (report.served, report.left) == (1, {"heads wider than 256": 1})
    assert "1 of 2 calls ran on mmfast" in str(report)
    assert "heads wider than 256" in str(report)


@served
def test_context_takes_itself_back_after_an_error():
    before = F.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), patch_attention():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is before


def test_objections():
    q = normal(1, 1, 2, 8)
    assert objections(q, q, q.double()) == ["dtypes float32, float32, float64"]
    assert objections(q.to("meta"), q, q) == ["tensors on several devices"]
    assert "no kernels for meta" in objections(*[q.to("meta")] * 3)[0]


@served
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    q = normal(2, 3, 9, 24)
    with torch.autocast("cpu", dtype):
        got = scaled_dot_product_attention(q, q, q)
        want = F.scaled_dot_product_attention(q, q, q)
    assert got.dtype == want.dtype == dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_no_values():
    """Tensors on the meta device, for which there is no autocast."""
    q = torch.empty(2, 3, 9, 24, device="meta")
    assert scaled_dot_product_attention(q, q, q).shape == q.shape


class TestTransformers:
    def model(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**TINY)
        return transformers.LlamaModel(config).eval()

    @served
    def test_patch(self, calls):
        plain, patched, report = pair(self.model())
        assert [entry.done for entry in report.swapped] == ["attention"]
        ids = torch.arange(14).reshape(2, 7)
        mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
        for inputs in ({}, {"attention_mask": mask}):
            got = patched(ids, **inputs).last_hidden_state[:, 2:]
            assert_same(got, plain(ids, **inputs).last_hidden_state[:, 2:])
        assert calls
        report.undo()
        assert patched.config._attn_implementation == "sdpa"
        assert_same(patched(ids).last_hidden_state, plain(ids).last_hidden_state, exact=True)

    def test_unpatch(self):
        model = self.model()
        patch(model)
        unpatch(model)
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(ValueError, match="nothing in LlamaModel is patched"):
            unpatch(model)

    def test_pickled(self, monkeypatch):
        """The name stays in the configuration; a patch registers it where nothing has yet."""
        transformers = pytest.importorskip("transformers")
        model = self.model()
        patch(model)
        again = pickle.loads(pickle.dumps(model))
        monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "mmfast")
        ids = torch.arange(14).reshape(2, 7)
        with pytest.raises(KeyError, match="mmfast"):
            again(ids)
        assert patch(again).swapped
        assert_same(again(ids).last_hidden_state, model(ids).last_hidden_state)
        unpatch(again)
        assert again.config._attn_implementation == "sdpa"

    def test_another_implementation_is_left(self):
        model = self.model()
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="its attention implementation is 'eager', not 'sdpa'"):
            patch(model)

    @served
    def test_by_name(self, calls):
        model = self.model()
        mmfast.integrations.transformers.register()
        ids = torch.arange(14).reshape(2, 7)
        want = model(ids).last_hidden_state
        model.set_attn_implementation("mmfast")
        assert_same(model(ids).last_hidden_state, want)
        assert calls

    def test_sinks_are_not_ignored(self):
        transformers = pytest.importorskip("transformers", minversion="4.56")
        config = transformers.GptOssConfig(
            **TINY, head_dim=8, num_local_experts=2, num_experts_per_tok=1
        )
        model = transformers.GptOssModel(config)
        with pytest.raises(ValueError, match="GptOssModel"):
            patch(model)
        mmfast.integrations.transformers.register()
        model.set_attn_implementation("mmfast")
        with pytest.raises(ValueError, match="attention of GptOssAttention has sinks"):
            model(torch.arange(5)[None])


def test_a_pickled_module_is_not_patched():
    module = Attention()
    want = module(normal(1, 3, 48))
    patch(module)
    again = pickle.loads(pickle.dumps(module))
    assert_same(again(normal(1, 3, 48)), want, exact=True)
