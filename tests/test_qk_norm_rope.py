"""qk_norm_rope: the models' own formulations, gradients, views, hard values, refusals."""

from __future__ import annotations

import pytest
import torch
from cases import backends_here, device_of, normal
from test_determinism import assert_same_bits

import mmfast
from mmfast.ops import qk_norm_rope

BACKENDS = backends_here(qk_norm_rope.OP)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def close(got, expected):
    """Within what diffusers itself rounds on the way."""
    torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=3e-2) if (
        got.dtype in (torch.bfloat16, torch.float16)
    ) else torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux(backend, dtype):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    device = device_of(backend)
    q, k, _ = normal(2, 12, 3, 4, 32).to(device, dtype).unbind(2)
    norm_q, norm_k = RMSNorm(32, 1e-6).to(device), RMSNorm(32, 1e-6).to(device)
    with torch.no_grad():
        norm_q.weight.copy_(1 + 0.1 * normal(32, seed=1))
        norm_k.weight.copy_(1 + 0.1 * normal(32, seed=2))
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(3), torch.arange(4)).to(device)
    cos, sin = FluxPosEmbed(10000, [8, 12, 12])(ids)
    own = mmfast.rotary_tables(ids, (8, 12, 12))
    for tables in ((cos, sin), own):
        got = mmfast.qk_norm_rope(q, k, norm_q.weight, norm_k.weight, *tables)
        for x, norm, out in ((q, norm_q, got[0]), (k, norm_k, got[1])):
            close(out, embeddings.apply_rotary_emb(norm(x), (cos, sin), sequence_dim=1))


def test_wan(backend):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    device = device_of(backend)
    heads, dim = 3, 48
    x = normal(2, 24, heads, dim).to(device)
    weight = 1 + 0.1 * normal(heads * dim, seed=1).to(device)
    rope = wan.WanRotaryPosEmbed(dim, (1, 2, 2), 32).to(device)
    cos, sin = rope(torch.empty(2, 1, 2, 6, 8))
    small = 2 * (dim // 6)
    own = mmfast.rotary_tables((2, 3, 4), (dim - 2 * small, small, small), device=device)
    n = torch.nn.functional.rms_norm(x.flatten(2), (heads * dim,), weight, 1e-6)
    a, b = n.view_as(x).unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    expected = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    for tables in (own, (cos[0, :, 0], sin[0, :, 0])):
        got, none = mmfast.qk_norm_rope(x, None, weight, None, *tables, across_heads=True)
        assert none is None
        close(got, expected)


@pytest.mark.parametrize("rotation", qk_norm_rope.ROTATIONS)
def test_cogvideox_and_cogview(backend, rotation):
    """(B, H, L, E), a layer's norm with biases, and text in front that is not rotated."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    device = device_of(backend)
    text, dim = 5, 32
    x = normal(2, 3, text + 8, dim).to(device)
    weight, bias = 1 + 0.1 * normal(dim, seed=1).to(device), normal(dim, seed=2).to(device)
    cos, sin = (t.to(device) for t in mmfast.rotary_tables((2, 2, 2), (8, 12, 12)))
    wide = [
        torch.cat((t, t), -1) if rotation == "half" else t.repeat_interleave(2, -1)
        for t in (cos, sin)
    ]
    expected = torch.nn.functional.layer_norm(x, (dim,), weight, bias, 1e-6)
    expected[:, :, text:] = embeddings.apply_rotary_emb(
        expected[:, :, text:], wide, use_real_unbind_dim=-1 if rotation == "interleaved" else -2
    )
    tables = mmfast.rotary_tables((2, 2, 2), (8, 12, 12), before=text, device=device)
    got, _ = mmfast.qk_norm_rope(
        x.transpose(1, 2), None, weight, None, *tables, norm="layer", bias_q=bias, rotation=rotation
    )
    assert got.transpose(1, 2).is_contiguous()
    close(got.transpose(1, 2), expected)


def test_complex_frequencies(backend):
    """As Lumina2 has them, for each sample."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    device = device_of(backend)
    x = normal(2, 7, 3, 24).to(device)
    frequencies = torch.polar(torch.ones(2, 7, 12), normal(2, 7, 12, seed=1)).to(device)
    expected = embeddings.apply_rotary_emb(x, frequencies, use_real=False)
    tables = frequencies.real, frequencies.imag
    got, _ = mmfast.qk_norm_rope(x, None, None, None, *tables, norm="none")
    close(got, expected)


def inputs(case, dtype=torch.float64, device="cpu"):
    """Arguments of the public function."""
    q, k, weight_q, bias_q, weight_k, bias_k, cos, sin = case.tensors(
        torch.device(device), dtype, 0
    )
    given = {"weight_q": weight_q, "weight_k": weight_k, "bias_q": bias_q, "bias_k": bias_k}
    given = {n: t if t is None else t.to(dtype) for n, t in given.items()}
    options = {"norm": case.norm, "across_heads": case.across_heads, "rotation": case.rotation}
    if cos is not None:
        options |= {"cos": cos, "sin": sin, "rotary_dim": case.rotary_dim}
    return {"q": q, "k": k} | given, options


@pytest.mark.parametrize("rotation", qk_norm_rope.ROTATIONS)
@pytest.mark.parametrize("norm", qk_norm_rope.NORMS)
@pytest.mark.parametrize("across", [False, True])
def test_gradcheck(backend, norm, across, rotation):
    case = qk_norm_rope._Case(
        1, 3, 2, 1, 6, norm, across, bias=True, rotation=rotation, rotary_dim=4, pairs=False
    )
    tensors, options = inputs(case, device=device_of(backend))
    names = [n for n, t in tensors.items() if t is not None]
    leaves = [tensors[n].detach().clone().requires_grad_() for n in names]

    def run(*values):
        return mmfast.qk_norm_rope(**tensors | dict(zip(names, values, strict=True)), **options)

    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_against_autograd_of_the_reference():
    case = qk_norm_rope._Case(2, 70, 3, 2, 72, bias=True, rotary_dim=72)
    grads = {}
    for dtype in (torch.float64, torch.float32):
        tensors, options = inputs(case, dtype)
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        if dtype == torch.float64:
            rows = (leaves[n] for n in ("weight_q", "bias_q", "weight_k", "bias_k"))
            values = []
            for x in ("q", "k"):
                weight, bias = next(rows), next(rows)
                n = torch.nn.functional.rms_norm(leaves[x], (72,), weight, 1e-6) + bias
                values.append(
                    qk_norm_rope._rotated(n, options["cos"], options["sin"], "interleaved", 72)
                )
        else:
            values = mmfast.qk_norm_rope(**leaves, **options)
        weights = [normal(*v.shape, seed=3 + i, dtype=dtype) for i, v in enumerate(values)]
        total = sum((v * w).sum() for v, w in zip(values, weights, strict=True))
        found = torch.autograd.grad(total, list(leaves.values()))
        grads[dtype] = dict(zip(leaves, found, strict=True))
    for name, expected in grads[torch.float64].items():
        got = grads[torch.float32][name].double()
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4, msg=name)


def test_gradients_of_one_output(backend):
    case = qk_norm_rope._Case(1, 4, 2, 2, 8, rotary_dim=8)
    tensors, options = inputs(case, device=device_of(backend))
    tensors["q"] = tensors["q"].detach().requires_grad_()
    tensors["k"] = tensors["k"].detach().requires_grad_()
    _, k = mmfast.qk_norm_rope(**tensors, **options)
    k.sum().backward()
    assert tensors["q"].grad is None
    assert tensors["k"].grad is not None


@pytest.mark.parametrize(
    "case", [*qk_norm_rope._BENCH, *qk_norm_rope._ODD[:7]], ids=lambda c: c.name
)
def test_threads_and_batch_do_not_matter(case):
    case = case._replace(batch=2, length=min(case.length, 70))
    tensors, options = inputs(case, torch.bfloat16)
    both = [t for t in mmfast.qk_norm_rope(**tensors, **options) if t is not None]
    arguments = qk_norm_rope._sample_bwd(case).make(torch.device("cpu"), torch.float32, 0)
    gradients = torch.ops.mmfast.qk_norm_rope_bwd.default
    expected = gradients(*arguments)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            again = mmfast.qk_norm_rope(**tensors, **options)
            assert_same_bits([t for t in again if t is not None], both)
            assert_same_bits(gradients(*arguments), expected)
    finally:
        torch.set_num_threads(threads)
    for b in range(2):
        of_one = {n: t[b : b + 1] if n in "qk" and t is not None else t for n, t in tensors.items()}
        own = dict(options)
        for name in ("cos", "sin"):
            if name in own and own[name].dim() == 3:
                own[name] = own[name][b : b + 1]
        for one, all_of in zip(mmfast.qk_norm_rope(**of_one, **own), both, strict=False):
            assert_same_bits(one, all_of[b : b + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_calls_are_small_ones(dtype):
    """What is written past the cache, forwards and backwards."""
    q, k, _ = normal(1, 700, 3, 24, 128).to(dtype).unbind(2)
    tables = mmfast.rotary_tables((700,), 128)
    weight = 1 + 0.1 * normal(128, seed=1)

    def both(part):
        own = [t[:, part].detach().requires_grad_() for t in (q, k)]
        of = [t[part] for t in tables]
        made = mmfast.qk_norm_rope(*own, weight, weight, *of)
        return [*made, *torch.autograd.grad(made, own, [t.detach() for t in made])]

    halves = zip(both(slice(350)), both(slice(350, None)), strict=True)
    for large, small in zip(both(slice(None)), halves, strict=True):
        assert_same_bits(large, torch.cat(small, 1))


def test_scattered_heads_and_expanded_gradients(backend):
    device = device_of(backend)
    q = normal(2, 5, 8, 3).to(device).transpose(2, 3)  # numbers of a head are 3 apart
    weight = normal(8, seed=1).to(device)
    expected, _ = mmfast.qk_norm_rope(q.contiguous(), None, weight)
    assert_same_bits(mmfast.qk_norm_rope(q, None, weight)[0].contiguous(), expected)
    leaf = q.contiguous().requires_grad_()
    mmfast.qk_norm_rope(leaf, None, weight)[0].sum().backward()
    other = q.contiguous().requires_grad_()
    mmfast.qk_norm_rope(other, None, weight)[0].backward(torch.ones_like(leaf))
    assert_same_bits(leaf.grad, other.grad)


def test_hard_values(backend):
    """What is not finite stays in its head; numbers that are not rotated are not touched."""
    device = device_of(backend)
    q = normal(1, 3, 2, 20).to(device)
    q[0, 0, 0, 3], q[0, 1, 1, 18] = torch.nan, torch.inf
    tables = [t.to(device) for t in mmfast.rotary_tables((3,), 16)]
    got, _ = mmfast.qk_norm_rope(q, None, None, None, *tables, norm="none", rotary_dim=16)
    assert got.isnan().sum() == 2
    assert_same_bits(got[..., 16:], q[..., 16:])
    got, _ = mmfast.qk_norm_rope(q, None, None, None, *tables, rotary_dim=16)
    assert got[0, 0, 0].isnan().all()
    assert got[0, 2].isfinite().all()
    # Squares far below the normal numbers count where eps does not hide them.
    small = 1e-21 * normal(1, 3, 2, 64).to(device, torch.bfloat16)
    got, _ = mmfast.qk_norm_rope(small, None, eps=0.0)
    close(got, (small.double() / small.double().square().mean(-1, keepdim=True).sqrt()).float())
    zero = torch.zeros(1, 2, 2, 20, device=device)
    assert_same_bits(mmfast.qk_norm_rope(zero, zero)[1], zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compile(dtype):
    def block(packed, weight, cos, sin):
        q, k, v = packed.unbind(2)
        q, k = mmfast.qk_norm_rope(q, k, weight, weight, cos, sin)
        return (q * 2 + k * v).sum(1)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9):
        packed = normal(2, length, 3, 2, 16, dtype=dtype)
        weight = normal(16, seed=1)
        tables = mmfast.rotary_tables((length,), 16)
        leaves = [packed.requires_grad_(), weight.requires_grad_()]
        got, expected = compiled(*leaves, *tables), block(*leaves, *tables)
        assert_same_bits(got, expected)
        assert_same_bits(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        )


Q = torch.zeros(2, 5, 3, 8)
TABLE = torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must be \(B, L, H, E\)"),
        ({"q": Q.long()}, TypeError, "q must be float32"),
        ({"k": Q.double()}, TypeError, "k must have q's dtype"),
        ({"k": Q[..., :4]}, ValueError, "k must have q's B = 2 and E = 8"),
        ({"weight_q": TABLE[0]}, ValueError, r"weight_q must be \(E,\) = \(8,\), got \(4,\)"),
        ({"weight_k": TABLE[0]}, ValueError, "not possible: weight_k without k"),
        (
            {"weight_q": torch.ones(8), "across_heads": True},
            ValueError,
            r"weight_q must be \(H E,\) = \(24,\)",
        ),
        ({"weight_q": torch.ones(8), "norm": "none"}, ValueError, 'weight_q with norm="none"'),
        ({"cos": TABLE}, ValueError, "only one of cos and sin"),
        ({"cos": TABLE, "sin": TABLE[:4]}, ValueError, "cos and sin must be"),
        ({"cos": TABLE[:4], "sin": TABLE[:4]}, ValueError, "cos and sin must be"),
        ({"cos": TABLE, "sin": TABLE, "rotary_dim": 3}, ValueError, "R must be even"),
        ({"cos": TABLE, "sin": TABLE, "rotary_dim": 6}, ValueError, "cos and sin must be"),
        ({"rotary_dim": 6}, ValueError, "rotary_dim without cos and sin"),
        ({"cos": TABLE, "sin": TABLE, "k": Q[:, :4]}, ValueError, "k must have q's L = 5"),
        ({"cos": TABLE.clone().requires_grad_(), "sin": TABLE}, ValueError, "cos has no gradient"),
        ({"norm": "batch"}, ValueError, "norm must be one of rms, layer, none"),
        ({"rotation": "full"}, ValueError, "rotation must be one of interleaved, half"),
        ({"weight_q": torch.ones(8, device="meta")}, ValueError, "on one device"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        mmfast.qk_norm_rope(**{"q": Q, "k": None} | arguments)
