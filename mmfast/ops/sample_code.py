"""Sampling of codes with probabilities that fall with their distance."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mmfast import backends, philox
from mmfast.checks import FLOATING, check_choice, check_codebook, check_device, check_floating
from mmfast.ops.nearest_code import METRICS, nearest_code
from mmfast.registry import Arguments, Cost, Op, Sample, register

_WORKSPACE = 1 << 22  # float64 elements of the reference's largest temporary


def sample_code(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 1.0,
    metric: str = "euclidean",
    seed: int | Tensor,
    offset: int | Tensor = 0,
) -> Tensor:
    """A code for every vector, drawn from softmax(logits / temperature), without an N x K matrix.

    The draw is the argmax over k of logit_k / temperature + g_k, g Gumbel noise that is a function
    of the seed, the offset, the vector's place in its sample, and k. With one number for both
    ``seed`` and ``offset`` all vectors are one sample, so that more vectors only append to what
    fewer get. If either has one number per sample, vectors count from 0 in each.

    Args:
        x: vectors, ``(..., D)``, or ``(H, ..., D)`` when ``codebook`` has heads. Any strides.
        codebook: codes, ``(K, D)`` or ``(H, K, D)``, K >= 1, as in :func:`nearest_code`.
        temperature: at least 0; 0 gives the indices of :func:`nearest_code`.
        metric: the logits: ``"euclidean"``, minus the distance, not its square, as in
            vector-quantize-pytorch; ``"cosine"``, the similarity; ``"dot"``, the inner product.
        seed: an int of at most 64 bits, or an int64 tensor of shape ``()`` or ``(B,)``, B the size
            of the first dimension of ``x`` after the heads. Nothing is synchronised.
        offset: likewise; other offsets give independent draws.

    Returns:
        Indices, int64, of shape ``x.shape[:-1]``: the argmax of the scores evaluated in float64,
        the lowest index on ties, whatever the backend, batch size or thread count. As in
        ``torch.argmax`` NaN counts as the best: a vector with a NaN gets index 0. Not
        differentiable.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices, ``metric`` or ``temperature`` do not fit.

    Source: the Gumbel-max trick (Gumbel, "Statistical theory of extreme values", 1954; Maddison et
    al., "A* sampling", 2014), ``gumbel_sample`` of vector-quantize-pytorch.
    """
    check_floating("x", x)
    check_floating("codebook", codebook)
    check_device(x=x, codebook=codebook)
    check_codebook(x, codebook)
    check_choice("metric", metric, METRICS)
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    seed, offset = philox.streams(seed, offset, x.device)
    lead = x.shape[codebook.dim() - 2 : -1]
    for name, stream in (("seed", seed), ("offset", offset)):
        if stream.dim() and stream.shape != lead[:1]:
            raise ValueError(
                f"{name} must be of shape () or (B,) with x's B = "
                f"{lead[0] if lead else 'none'}, got {tuple(stream.shape)}"
            )
    if temperature == 0:
        return nearest_code(x, codebook, metric=metric)[0]
    return backends.call(OP, x, codebook, float(temperature), metric, seed, offset)


def reference(
    x: Tensor, codebook: Tensor, temperature: float, metric: str, seed: Tensor, offset: Tensor
) -> Tensor:
    """The specification, in float64.

    Vector n of its sample and head h of H take the K elements from (n H + h) 4 ceil(K / 4) on.
    """
    heads = codebook.dim() - 2
    indices = fake(x, codebook, temperature, metric, seed, offset)
    if indices.numel() == 0:
        return indices
    num_heads = x.shape[0] if heads else 1
    rows = x.reshape(num_heads, -1, x.shape[-1])  # [H, N, D]
    num_rows, num_codes = rows.shape[1], codebook.shape[-2]
    seed, offset = torch.broadcast_tensors(seed, offset)
    each = num_rows // (x.shape[heads] if seed.dim() else 1)  # vectors of a sample
    place = torch.arange(num_rows, device=x.device)
    seed, offset = (t.reshape(-1)[place // each][:, None] for t in (seed, offset))  # [N, 1]
    block = torch.arange((num_codes + 3) // 4, device=x.device)  # [ceil(K / 4)]
    step = max(1, _WORKSPACE // (4 * len(block)))
    for h in range(num_heads):
        codes = (codebook[h] if heads else codebook).double()  # [K, D]
        for start in range(0, num_rows, step):
            part = slice(start, start + step)
            first = (place[part] % each * num_heads + h) * len(block)  # [n]
            words = philox.words(seed[part], offset[part], first[:, None] + block)
            noise = philox.gumbel(words).flatten(1)[:, :num_codes]  # [n, K]
            scores = _logits(rows[h, part].double(), codes, metric) / temperature + noise
            indices.view(num_heads, -1)[h, part] = _first_best(scores)
    return indices


def _logits(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """(N, K) of x (N, D) and codes (K, D), float64."""
    if metric == "euclidean":
        return -torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist")
    products = x @ codes.T
    if metric == "dot":
        return products
    norms = x.norm(dim=1)[:, None] * codes.norm(dim=1)
    return torch.where(norms == 0, products.abs() * 0, products / norms)


def _first_best(scores: Tensor) -> Tensor:
    """The first index of the largest of each row, or of its first NaN."""
    best = scores.amax(1, keepdim=True)  # NaN where there is one
    hit = (scores == best) | (scores.isnan() & best.isnan())
    index = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(hit, index, scores.shape[1]).amin(1)


def fake(
    x: Tensor, codebook: Tensor, temperature: float, metric: str, seed: Tensor, offset: Tensor
) -> Tensor:
    """The output without values."""
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def cost(x: Tensor, codebook: Tensor, *_: object) -> Cost:
    """Inputs read once, indices written once; one multiply and one add per pair and dimension."""
    rows = x.shape[:-1].numel()
    moved = x.nbytes + codebook.nbytes + 8 * rows
    return Cost(bytes=moved, flops=2 * rows * codebook.shape[-2] * x.shape[-1])


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Every index must equal the reference's."""
    want = reference(*arguments) if expected is None else expected
    if (result.dtype, result.shape) != (want.dtype, want.shape):
        return [f"{result.dtype} {tuple(result.shape)}, expected {tuple(want.shape)}"]
    wrong = int((result != want).sum())
    return [f"{wrong} of {want.numel()} indices differ from the float64 argmax"] if wrong else []


def samples() -> Iterable[Sample]:
    """Vectors of the field (``bench``) and odd ones."""

    def of(
        *lead: int,
        k: int,
        d: int,
        heads: int = 0,
        seeds: int = 0,
        metric: str = "euclidean",
        temperature: float = 1.0,
    ) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            generator = torch.Generator().manual_seed(seed)
            both = (heads,) if heads else ()
            x = torch.randn(*both, *lead, d, generator=generator).to(device, dtype)
            codes = torch.randn(*both, k, d, generator=generator).to(device, dtype)
            size = (seeds,) if seeds else ()
            numbers = torch.randint(-(2**62), 2**62, (2, *size), generator=generator).to(device)
            return x, codes, temperature, metric, numbers[0], numbers[1]

        n = torch.Size(lead).numel()
        name = f"{f'h{heads}_' * bool(heads)}n{'x'.join(map(str, lead))}_k{k}_d{d}"
        name += f"_{metric}_t{temperature:g}{'_seeds' * bool(seeds)}"
        # Heads share a stream: they are no problems of their own.
        return Sample(name, make, {"N": n, "K": k, "D": d, "H": 1}, bench=n >= 4096)

    yield of(4096, k=1024, d=64)
    yield of(4096, k=512, d=32, metric="cosine", temperature=0.1)
    for n, k, d in ((0, 5, 3), (1, 1, 1), (7, 3, 1), (33, 65, 7), (41, 129, 33)):
        yield of(n, k=k, d=d)
    yield of(33, k=70, d=33, metric="dot", temperature=3.0)
    yield of(35, k=33, d=40, metric="cosine", temperature=0.05)
    yield of(3, 11, k=37, d=5, seeds=3, temperature=0.01)
    yield of(2, 9, k=19, d=5, heads=3, seeds=2)


def _load_triton() -> Callable[..., Tensor]:
    from mmfast.kernels.sample_code import sample_code as launch

    return launch


OP = register(
    Op(
        name="sample_code",
        schema="(Tensor x, Tensor codebook, float temperature, str metric, Tensor seed, "
        "Tensor offset) -> Tensor",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("sample_code"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
    )
)
