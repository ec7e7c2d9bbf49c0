"""What mmfast sets out to reach on a GPU, held against what was measured in the same run."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import gpu_attention, gpu_attention_peers, gpu_peers, loops, transformers
from benchmarks.goals import LIBRARY, PART_OF_MEMORY, Goal, fastest
from benchmarks.results import Results, Row

OF_COPY = 0.85  # of the bytes per second of a copy
OVER_EAGER = 3.0  # times faster
# Ops that do little but move memory.
STREAMS = (
    "gated_residual_modulate",
    "layer_norm_modulate",
    "gated_residual",
    "qk_norm_rope",
    "gated_activation",
    "sampler_step",
    "add_noise",
    "finite_scalar_quantize",
    "lookup_free_quantize",
)
# Of nearest_code with D from 64: of the rate of a bfloat16 product of its sizes, by dtype.
OF_PRODUCT = {"bfloat16": 0.75, "float32": 0.6}
OVER_PEERS = {"nearest_code": 5.0, "kmeans": 3.0, "residual_quantize": 3.0}
STEP_OVER_PEERS = 6.0  # a VQ training step
HOST = 15e-6  # seconds of a sampler's step
# Of attention, by head size, forward and backward: times faster than the fastest of PyTorch's and
# of FlashAttention 3; at sizes that are powers of two of cuDNN alone, and than kernels in Triton.
OF_CUDNN = 0.95
OVER_TRITON = 1.0  # than FlexAttention
TRITON_RATE = 579.0  # TFLOP/s, forward: the fastest that is known of a kernel in Triton, on an H100
OVER_BEST = {72: (1.25, 1.2)}
OVER_BEST_OTHERS = (1.1, 1.1)
OVER_MASKED = 1.3  # than a dense mask or streams put together
OVER_BEST_TRAINING = 1.2  # forward and backward together, of DiT's batches
OF_MATHS_ERROR = 2.0  # at most, against float64, of outputs and gradients each
SAME_MEMORY = 1.01  # of what it takes without a mask, at most
_ATTENTION = "scaled_dot_product_attention"
_JOINT, _VARLEN = "joint_attention", "varlen_attention"
_CUDNN = "SDPA, cuDNN"
_KERNELS = (
    *gpu_attention_peers.BACKENDS,
    gpu_attention_peers.FLEX,
    gpu_attention_peers.FLASH_3,
)
_DIT_LENGTH = 256


def goals(results: Results) -> list[Goal]:
    """Every goal whose cases were measured."""
    rows = [r for r in results.rows if r.seconds is not None]
    return [
        *_bandwidth(rows, copied(results)),
        *_host(rows),
        *_products(rows),
        *_peers(rows),
        *_attention(rows),
        *_training(rows),
        *_numerics(rows),
        *_masked(rows),
        *_loops(rows),
        *_whole(rows),
        *_right(rows),
    ]


def copied(results: Results) -> float:
    """GB/s of the copy in the same run, read and written; 0 where it was not measured."""
    return max((rates.get("copy GB/s", 0.0) for rates in results.ceilings.values()), default=0.0)


def device_seconds(row: Row) -> float:
    """Of the device alone, where that is known."""
    return row.graph or row.seconds or 0.0


def _problems(rows: list[Row], *ops: str) -> Iterator[tuple[Row, list[Row]]]:
    """mmfast's fastest row of each case, and the others'."""
    for op, case in dict.fromkeys((r.op, r.case) for r in rows if r.op in ops):
        here = [r for r in rows if (r.op, r.case) == (op, case)]
        own = fastest(here, "mmfast")
        if own is not None:
            yield own, [r for r in here if r.kind != "mmfast"]


def _what(row: Row) -> str:
    return f"{row.op}, {row.case.replace('_', ' ')}"


def _times(what: str, other: float, own: float, wanted: float) -> Goal:
    ratio = other / own if own else 0.0
    return Goal(what, 1, f"{wanted:g}x", f"{ratio:.2f}x", ratio >= wanted)


def _faster(own: Row, other: Row, wanted: float) -> Goal:
    what = f"{_what(own)}: against {other.subject}"
    return _times(what, other.seconds or 0.0, own.seconds or 0.0, wanted)


def _bandwidth(rows: list[Row], copy: float) -> Iterator[Goal]:
    ops = [name for stream in STREAMS for name in (stream, f"{stream}_bwd")]
    for own, others in _problems(rows, *ops):
        if "tiny" in own.case:
            continue
        if copy and own.gbps and own.seconds:
            share = own.gbps * own.seconds / device_seconds(own) / copy
            wanted, reached = (f"{100 * s:.0f} %" for s in (OF_COPY, share))
            what = f"{_what(own)}: of the copy's bandwidth"
            yield Goal(what, 1, wanted, reached, share >= OF_COPY)
        for other in others:
            if other.subject == "torch.compile":
                yield _faster(own, other, 1.0)
            elif other.subject == "plain torch":
                yield _faster(own, other, OVER_EAGER)


def _host(rows: list[Row]) -> Iterator[Goal]:
    for own, _ in _problems(rows, "sampler_step"):
        if "tiny" in own.case:
            taken = own.seconds or 0.0
            yield Goal(
                f"{own.op}: the host's time of a step",
                1,
                f"{HOST * 1e6:g} us",
                f"{taken * 1e6:.1f} us",
                taken < HOST,
            )


def _products(rows: list[Row]) -> Iterator[Goal]:
    for own, others in _problems(rows, "nearest_code"):
        if own.shape["D"] < 64 or own.sweep is not None:
            continue
        wanted = OF_PRODUCT["bfloat16" if own.case.endswith("bfloat16") else "float32"]
        for other in others:
            if other.subject == gpu_peers.BF16_PRODUCT:
                share = device_seconds(other) / device_seconds(own)
                yield Goal(
                    f"{_what(own)}: of the rate of {other.subject}",
                    1,
                    f"{100 * wanted:.0f} %",
                    f"{100 * share:.0f} %",
                    share >= wanted,
                )
            elif other.subject == gpu_peers.TF32_PRODUCT:
                what = f"{_what(own)}: against {other.subject}"
                yield _times(what, device_seconds(other), device_seconds(own), 1.0)


def _peers(rows: list[Row]) -> Iterator[Goal]:
    for own, others in _problems(rows, *OVER_PEERS, "vector_quantize_step"):
        if own.op == "nearest_code" and own.shape["D"] >= 64:
            continue
        other = fastest(others, "peer", "compile")
        if other is not None:
            yield _faster(own, other, OVER_PEERS.get(own.op, STEP_OVER_PEERS))
        for library in others:
            known = own.memory is not None and library.memory
            if library.subject == LIBRARY and own.op.endswith("_step") and known:
                yield Goal(
                    f"{_what(own)}: memory, of {LIBRARY}'s at most",
                    1,
                    f"1/{PART_OF_MEMORY}",
                    f"{(own.memory or 0) / 2**20:.1f} of {(library.memory or 0) / 2**20:.1f} MiB",
                    PART_OF_MEMORY * (own.memory or 0) <= (library.memory or 0),
                )


def _attention(rows: list[Row]) -> Iterator[Goal]:
    for own, others in _problems(rows, _ATTENTION, f"{_ATTENTION}_bwd"):
        width, backward = own.shape["D"], own.op.endswith("_bwd")
        if own.case.startswith(("padded", "causal")):
            continue
        if width in gpu_attention.CUDNN_SIZES:
            wanted = {_CUDNN: OF_CUDNN, gpu_attention_peers.FLEX: OVER_TRITON}
            for other in others:
                if other.subject in wanted:
                    yield _faster(own, other, wanted[other.subject])
            if not backward and own.gflops:
                rate = own.gflops / 1e3
                what = f"{_what(own)}: more than any kernel in Triton"
                yield Goal(
                    what, 1, f"{TRITON_RATE:g} TFLOP/s", f"{rate:.0f} TFLOP/s", rate > TRITON_RATE
                )
            continue
        best = fastest([r for r in others if r.subject in _KERNELS], "peer")
        if best is not None:
            yield _faster(own, best, OVER_BEST.get(width, OVER_BEST_OTHERS)[backward])


def _training(rows: list[Row]) -> Iterator[Goal]:
    """Forward and backward together."""
    for own, others in _problems(rows, gpu_attention.STEP):
        best = fastest([r for r in others if r.subject in _KERNELS], "peer")
        if own.shape["K"] == _DIT_LENGTH and best is not None:
            yield _faster(own, best, OVER_BEST_TRAINING)


def _numerics(rows: list[Row]) -> Iterator[Goal]:
    for own, others in _problems(rows, gpu_attention.STEP):
        for other in others:
            if other.subject == gpu_attention_peers.MATH and own.errors and other.errors:
                worst = max(
                    a / max(b, 1e-30) for a, b in zip(own.errors, other.errors, strict=True)
                )
                yield Goal(
                    f"{_what(own)}: error against float64, of {other.subject}'s at most",
                    1,
                    f"{OF_MATHS_ERROR:g}x",
                    f"{worst:.2f}x",
                    worst <= OF_MATHS_ERROR,
                )


def _masked(rows: list[Row]) -> Iterator[Goal]:
    """Masks, texts of their own lengths, streams that lie apart, sequences behind each other."""
    ops = [f"{op}{way}" for op in (_ATTENTION, _JOINT, _VARLEN) for way in ("", "_bwd")]
    for own, others in _problems(rows, *ops):
        if own.op.startswith(_ATTENTION) and not own.case.startswith("padded"):
            continue
        # Those who make masks of blocks have other names.
        dense = [r for r in others if "SDPA" in r.subject or r.subject == "PyTorch"]
        other = fastest(dense, "peer")
        if other is not None:
            yield _faster(own, other, OVER_MASKED)
        yield from _no_mask_memory(own, rows)


def _no_mask_memory(own: Row, rows: list[Row]) -> Iterator[Goal]:
    """Beside what the same problem takes without a mask."""
    same = [r for r in rows if r.op == own.op and r.kind == "mmfast" and r.memory]
    for name in ("padded_", "lengths_"):
        plain = own.case.replace(name, "", 1)
        for other in same:
            if name in own.case and other.case == plain and own.memory and other.memory:
                yield Goal(
                    f"{_what(own)}: memory, of that without a mask",
                    1,
                    f"{other.memory / 2**20:.1f} MiB",
                    f"{own.memory / 2**20:.1f} MiB",
                    own.memory <= SAME_MEMORY * other.memory,
                )


def _loops(rows: list[Row]) -> Iterator[Goal]:
    """The fastest way against others; and without a graph the host's time of a step."""
    for own, others in _problems(rows, loops.OP):
        for other in others:
            if other.kind in ("peer", "compile"):
                yield _faster(own, other, 1.0)
    for row in rows:
        if row.op == loops.OP and row.subject == loops.PATCHED and row.case.startswith("tiny"):
            taken = (row.seconds or 0.0) / row.shape["K"]
            yield Goal(
                f"{_what(row)}: the host's time of a step, without a graph",
                1,
                f"{HOST * 1e6:g} us",
                f"{taken * 1e6:.1f} us",
                taken < HOST,
            )


def _whole(rows: list[Row]) -> Iterator[Goal]:
    for own, others in _problems(rows, *transformers.OPS):
        for other in others:
            if other.kind in ("peer", "compile"):
                yield _faster(own, other, 1.0)
            if other.kind == "peer" and own.memory and other.memory:
                yield Goal(
                    f"{_what(own)}: memory, less than {other.subject}",
                    1,
                    f"{other.memory / 2**20:.0f} MiB",
                    f"{own.memory / 2**20:.0f} MiB",
                    own.memory < other.memory,
                )


def _right(rows: list[Row]) -> Iterator[Goal]:
    own = [r for r in rows if r.kind == "mmfast"]
    if own:
        right = sum(not r.match for r in own)
        of = f"{len(own)} of {len(own)} runs"
        what = "results within the rule of their op, indices those of float64"
        yield Goal(what, 1, of, f"{right} of {len(own)} runs", right == len(own))
