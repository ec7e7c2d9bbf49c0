"""qk_norm_rope and gated_residual_modulate over odd sizes, views, dtypes and sets of gradients,
beside plain formulations in float64."""

from __future__ import annotations

import torch
from cases import backends_here, device_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gated_residual_modulate import plain
from torch import Tensor

import mmfast
from mmfast.ops import gated_residual_modulate, qk_norm_rope

EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16, torch.bfloat16: 8e-3, torch.float16: 1e-3}
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
Leaves = dict[str, Tensor]


def viewed(shape: tuple[int, ...], kind: str, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Numbers of that shape, in memory as ``kind`` says."""
    if kind == "dense":
        return normal(*shape, seed=seed, dtype=dtype).to(device)
    if kind == "transposed":
        order = (0, 2, 1, 3) if len(shape) == 4 else (1, 0, 2)
        lengths = [shape[i] for i in order]
        return normal(*lengths, seed=seed, dtype=dtype).to(device).permute(order)
    if kind == "packed":  # a part of a projection
        whole = normal(*shape[:-1], 3 * shape[-1], seed=seed, dtype=dtype).to(device)
        return whole.chunk(3, -1)[1]
    if kind == "expanded":
        return normal(1, *shape[1:], seed=seed, dtype=dtype).to(device).expand(shape)
    whole = normal(*shape[:-1], 2 * shape[-1], seed=seed, dtype=dtype).to(device)
    return whole[..., ::2]  # apart


kinds = st.sampled_from(["dense", "transposed", "packed", "expanded", "apart"])


def compare(ours, theirs, leaves: Leaves, learning: list[str], dtype: torch.dtype) -> None:
    """Outputs and gradients of two functions of leaves, the second in float64."""
    got_in = {n: t.detach().requires_grad_(n in learning) for n, t in leaves.items()}
    want_in = {n: t.detach().double().requires_grad_(n in learning) for n, t in leaves.items()}
    got, want = ours(**got_in), theirs(**want_in)

    def close(a: Tensor, b: Tensor, name: str) -> None:
        assert a.shape == b.shape, name
        limit = 64 * EPS[dtype] + EPS[a.dtype]
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(
            a.double(), b, rtol=limit, atol=limit * (largest + 0.1), msg=name
        )

    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype
        close(a, b, f"output {i}")
    if not learning:
        assert not any(a.requires_grad for a in got)
        return
    grads = [normal(*b.shape, seed=90 + i, dtype=dtype).to(b.device) for i, b in enumerate(want)]
    chosen = [got_in[n] for n in learning], [want_in[n] for n in learning]
    reached = [i for i, b in enumerate(want) if b.requires_grad]
    made, exact = (
        torch.autograd.grad([outputs[i] for i in reached], inputs, [to(grads[i]) for i in reached])
        for outputs, inputs, to in (
            (got, chosen[0], lambda t: t),
            (want, chosen[1], lambda t: t.double()),
        )
    )
    for name, a, b in zip(learning, made, exact, strict=True):
        assert a.dtype == leaves[name].dtype
        close(a, b, f"gradient of {name}")


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rotation: str, width: int) -> Tensor:
    """The first ``width`` numbers of each head, by tables of them all."""
    head, rest = x[..., :width], x[..., width:]
    if rotation == "half":
        first, second = head.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-head[..., 1::2], head[..., ::2]], -1).flatten(-2)
    return torch.cat([head * cos + turned * sin, rest], -1)


@settings(max_examples=60)
@given(st.data())
def test_qk_norm_rope(data):
    draw = data.draw
    backend = draw(st.sampled_from(backends_here(qk_norm_rope.OP)))
    device, dtype = device_of(backend), draw(dtypes)
    batch, length = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 5, 33]))
    heads, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    dims = draw(st.sampled_from([1, 2, 3, 8, 17, 24, 70, 72, 129]))
    norm, across = draw(st.sampled_from(qk_norm_rope.NORMS)), draw(st.booleans())
    rotation = draw(st.sampled_from(qk_norm_rope.ROTATIONS))
    width = draw(st.sampled_from([0, 2, dims // 2, dims])) // 2 * 2
    width = width if width <= dims else 0
    leaves: Leaves = {}
    second = draw(st.sampled_from(["own", "q itself", "none"]))
    leaves["q"] = viewed((batch, length, heads, dims), draw(kinds), 0, dtype, device)
    if second == "own":
        leaves["k"] = viewed((batch, length, kv_heads, dims), draw(kinds), 1, dtype, device)
    given_rows = {"q": heads} if second == "none" else {"q": heads, "k": kv_heads}
    if second == "q itself":
        given_rows["k"] = heads
    if norm != "none":
        for seed, name in enumerate(f"{r}_{x}" for x in given_rows for r in ("weight", "bias")):
            rows = dims * (given_rows[name[-1]] if across else 1)
            if draw(st.booleans()):
                leaves[name] = normal(rows, seed=10 + seed, dtype=draw(dtypes)).to(device)
    tables, full = {}, {}
    if width:
        per_sample, halved = draw(st.booleans()), draw(st.booleans())
        angles = normal(*([batch] if per_sample else []), length, width // 2, seed=20).to(device)
        for name in ("cos", "sin"):
            table = getattr(angles, name)().to(draw(dtypes))
            whole = (
                torch.cat([table, table], -1)
                if rotation == "half"
                else table.repeat_interleave(2, -1)
            )
            full[name] = (whole if per_sample else whole[None]).double()[:, :, None]
            tables[name] = table if halved else whole
        if width != dims:
            tables["rotary_dim"] = width
    learning = [name for name in leaves if draw(st.booleans())]

    def ours(q, k=None, **rows):
        k = q if second == "q itself" else k
        options = {"norm": norm, "across_heads": across, "rotation": rotation}
        with mmfast.use_backend(backend):
            outputs = mmfast.qk_norm_rope(q, k, **rows, **tables, **options)
        return [out for out in outputs if out is not None]

    def theirs(q, k=None, **rows):
        outputs = []
        for name, x in (("q", q), ("k", q if second == "q itself" else k)):
            if x is None:
                continue
            flat = x.flatten(2) if across else x
            if norm == "layer":
                flat = flat - flat.mean(-1, keepdim=True)
            if norm != "none":
                flat = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            flat = flat * rows.get(f"weight_{name}", 1) + rows.get(f"bias_{name}", 0)
            n = flat.view(x.shape) if across else flat
            outputs.append(rotated(n, full["cos"], full["sin"], rotation, width) if width else n)
        return outputs

    # Of one number, or two, a norm's gradients are nothing but rounding.
    if norm != "none" and dims < 3:
        learning = []
    compare(ours, theirs, leaves, learning, dtype)


@settings(max_examples=60)
@given(st.data())
def test_gated_residual_modulate(data):
    draw = data.draw
    backend = draw(st.sampled_from(backends_here(gated_residual_modulate.OP)))
    device, dtype = device_of(backend), draw(dtypes)
    batch, frames = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    length = frames * draw(st.sampled_from([1, 2, 7]))
    dims = draw(st.sampled_from([3, 8, 17, 40, 129]))
    norm, tanh = draw(st.sampled_from(["layer", "rms"])), draw(st.booleans())
    leaves: Leaves = {
        name: viewed((batch, length, dims), draw(kinds), seed, dtype, device)
        for seed, name in enumerate(("x", "y"))
    }
    shapes = [(batch, dims), (batch, frames, dims), (batch, length, dims)]
    together = draw(st.booleans())
    modulation_dtype, shape = draw(dtypes), draw(st.sampled_from(shapes))
    whole = normal(*shape[:-1], 6 * dims, seed=5, dtype=modulation_dtype).to(device).chunk(6, -1)
    for i, name in enumerate(("gate", "shift", "scale")):
        leaves[name] = whole[2 * i]
        if not together:
            kind = draw(st.sampled_from(["dense", "expanded", "apart", "packed"]))
            leaves[name] = viewed(draw(st.sampled_from(shapes)), kind, 6 + i, draw(dtypes), device)
    for seed, name in enumerate(("weight", "bias")):
        if draw(st.booleans()) and (name, norm) != ("bias", "rms"):
            leaves[name] = normal(dims, seed=12 + seed, dtype=draw(dtypes)).to(device)
    learning = [name for name in leaves if draw(st.booleans())]

    def ours(x, gate, y, shift, scale, **rows):
        activation = "tanh" if tanh else "linear"
        with mmfast.use_backend(backend):
            return mmfast.gated_residual_modulate(
                x, gate, y, shift, scale, norm=norm, gate_activation=activation, **rows
            )

    def theirs(**tensors):
        return plain(**tensors, norm=norm, tanh=tanh)

    compare(ours, theirs, leaves, learning, dtype)
