"""What mmfast sets out to reach on a CPU, held against what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import ratios, schedulers, transformers, vqvae
from benchmarks.results import Results, Row

# Of nearest_code: times faster than torch.mm of that shape, and than the fastest peer with indices.
RATIOS: dict[str, tuple[float | None, float]] = {
    "n65536_k1024_d64": (2.5, 3.2),
    "n65536_k512_d64": (2.5, 3.0),
    "n65536_k8192_d32": (4.5, 2.4),
    "n16384_k16384_d256": (2.8, 2.3),
    "n65536_k16384_d8": (10.0, 1.6),
    "patches_k1024": (1.5, 2.0),
    "patches_k8192": (3.0, 4.0),
    "n256_k512_d64": (None, 1.0),
}
# Of the modules, by the first letters of a case: times faster than vector-quantize-pytorch.
LIBRARY = "vector-quantize-pytorch"
MODULE_RATIOS = {
    "vector_quantize_step": {"n65536_k1024": 15.0, "n65536_k8192": 60.0, "n16384_k16384": 8.0},
    "vector_quantize_eval": {"n65536_k1024": 25.0, "n65536_k8192": 100.0, "n16384_k16384": 10.0},
    "residual_vq_step": {"n": 5.0},
    "residual_vq_eval": {"n": 5.0},
    "fsq_step": {"n": 4.0},
    "lfq_step": {"n": 4.0},
    "lfq_signs_step": {"n": 4.0},
}
# Times moving the bytes, and drawing the noise where it is drawn.
OF_BYTES = {
    "sampler_step": 1.3,
    "add_noise": 1.3,
    "gated_residual_modulate": 1.3,
    "gated_residual_modulate_bwd": 1.5,
    "qk_norm_rope": 1.3,
    "qk_norm_rope_bwd": 1.3,
}
STEP_OF_FLOOR = 1.5  # times the lookup alone, or moving the bytes
PART_OF_MEMORY = 20  # times less than vector-quantize-pytorch's VectorQuantize, and less elsewhere
KMEANS_RATIO = 3.0  # than scikit-learn
OVERHEAD = 10e-6  # seconds of a tiny call
MEMORY = 16 << 20  # bytes that nearest_code needs at most


@dataclass(frozen=True)
class Goal:
    """One goal with one number of threads."""

    what: str
    threads: int
    wanted: str
    reached: str
    met: bool


def goals(results: Results) -> list[Goal]:
    """Every goal whose cases were measured."""
    rows = [r for r in results.rows if r.seconds is not None]
    most = max((r.threads for r in rows), default=1)
    # Memory is measured with all threads.
    rows = [r if r.threads == most else dataclasses.replace(r, memory=None) for r in rows]
    return [
        *_ratios(rows),
        *_modules(rows),
        *_kmeans(rows),
        *_samplers(rows),
        *_ops(rows),
        *_schedulers(rows),
        *_vqvae(rows),
        *_transformers(rows),
        *_limits(rows),
    ]


def fastest(rows: list[Row], *kinds: str) -> Row | None:
    """The fastest of the rows of ``kinds``; None without any."""
    found = [r for r in rows if r.kind in kinds and r.seconds is not None]
    return min(found, key=lambda r: r.seconds or 0.0, default=None)


def _ratios(rows: list[Row]) -> Iterator[Goal]:
    for case, (floor_wanted, peer_wanted) in RATIOS.items():
        here = [r for r in rows if r.op == "nearest_code" and r.case == case]
        for threads in sorted({r.threads for r in here}):
            same = [r for r in here if r.threads == threads]
            own = fastest(same, "mmfast")
            pairs = [
                (floor_wanted, fastest(same, "floor")),
                (peer_wanted, fastest(same, "peer", "compile")),
            ]
            for wanted, other in pairs:
                if own is None or other is None or wanted is None:
                    continue
                ratio = (other.seconds or 0.0) / (own.seconds or 1.0)
                yield Goal(
                    f"{own.title}, {own.data}: against {other.subject}",
                    threads,
                    f"{wanted:g}x",
                    f"{ratio:.1f}x",
                    ratio >= wanted,
                )


def _modules(rows: list[Row]) -> Iterator[Goal]:
    here = [r for r in rows if r.op in MODULE_RATIOS]
    for op, case, threads in dict.fromkeys((r.op, r.case, r.threads) for r in here):
        same = [r for r in here if (r.op, r.case, r.threads) == (op, case, threads)]
        own = next((r for r in same if r.kind == "mmfast"), None)
        if own is None:
            continue
        ratios = MODULE_RATIOS[op]
        wanted = next((ratio for start, ratio in ratios.items() if case.startswith(start)), None)
        for other in same:
            if other.subject == LIBRARY and wanted is not None:
                yield _faster(own, other, wanted)
            elif other.kind in ("compile", "peer"):
                yield _faster(own, other, 1.0)
            elif other.kind == "floor" and op != "vector_quantize_eval":
                yield _near_floor(own, other)
            if other.subject == LIBRARY and other.measured == other.shape["N"]:
                yield from _memory(own, other)


def _faster(own: Row, other: Row, wanted: float) -> Goal:
    ratio = (other.seconds or 0.0) / (own.seconds or 1.0)
    return Goal(
        f"{own.op}, {own.title}: against {other.subject}",
        own.threads,
        f"{wanted:g}x",
        f"{ratio:.{1 if wanted >= 2 else 2}f}x",
        ratio >= wanted,
    )


def _near_floor(own: Row, floor: Row) -> Goal:
    ratio = (own.seconds or 0.0) / (floor.seconds or 1.0)
    return Goal(
        f"{own.op}, {own.title}: of {floor.subject}, at most",
        own.threads,
        f"{STEP_OF_FLOOR:g}x",
        f"{ratio:.2f}x",
        ratio <= STEP_OF_FLOOR,
    )


def _memory(own: Row, other: Row) -> Iterator[Goal]:
    """Of what is needed beside the results: vectors, their indices, and the gradient of a step."""
    if own.memory is None or not other.memory:
        return
    tensors = 2 if own.op.endswith("_step") else 1
    rows = 4 * tensors * own.shape["D"] + 8 * own.shape.get("Q", 1)
    extra, others = ((r.memory or 0) - own.shape["N"] * rows for r in (own, other))
    times = PART_OF_MEMORY if own.op.startswith("vector_quantize") else 1
    yield Goal(
        f"{own.op}, {own.title}: memory beside its results, of {other.subject}'s at most",
        own.threads,
        f"1/{times}" if times > 1 else "less",
        f"{max(extra, 0) / 2**20:.1f} of {others / 2**20:.1f} MiB",
        times * extra <= others,
    )


def _kmeans(rows: list[Row]) -> Iterator[Goal]:
    here = [r for r in rows if r.op == "kmeans" and r.data == "Gaussian"]
    for other in (r for r in here if r.subject == "scikit-learn"):
        own = fastest([r for r in here if r.threads == other.threads], "mmfast")
        if own is not None:
            ratio = (other.seconds or 0.0) / (own.seconds or 1.0)
            yield Goal(
                f"kmeans, {own.title}: against scikit-learn",
                other.threads,
                f"{KMEANS_RATIO:g}x",
                f"{ratio:.1f}x",
                ratio >= KMEANS_RATIO,
            )


def _schedulers(rows: list[Row]) -> Iterator[Goal]:
    for row in rows:
        if row.kind != "mmfast" or row.op not in schedulers.OPS:
            continue
        if row.case.endswith("_tiny"):
            yield Goal(
                f"overhead of {row.op}, {row.data}",
                row.threads,
                f"{schedulers.OVERHEAD[row.op] * 1e6:g} us",
                f"{(row.seconds or 0.0) * 1e6:.1f} us",
                (row.seconds or 0.0) < schedulers.OVERHEAD[row.op],
            )
        wanted = schedulers.RATIOS.get((row.op, row.case))
        for other in rows:
            same = (other.op, other.case, other.threads) == (row.op, row.case, row.threads)
            if wanted is not None and same and other.kind == "peer":
                ratio = (other.seconds or 0.0) / (row.seconds or 1.0)
                yield Goal(
                    f"{row.op}, {row.data}: against {other.subject}",
                    row.threads,
                    f"{wanted:g}x",
                    f"{ratio:.1f}x",
                    ratio >= wanted,
                )


def _pairs(rows: list[Row], *ops: str) -> Iterator[tuple[Row, Row]]:
    """mmfast's rows, each with every peer's."""
    for own in rows:
        for other in rows:
            same = (other.op, other.case, other.threads) == (own.op, own.case, own.threads)
            if own.kind == "mmfast" and own.op in ops and same and other.kind == "peer":
                yield own, other


def _vqvae(rows: list[Row]) -> Iterator[Goal]:
    for own, other in _pairs(rows, vqvae.OP):
        yield _faster(own, other, 1.0)
        if own.parts and other.parts:
            ratio = other.parts[vqvae.QUANTISER] / own.parts[vqvae.QUANTISER]
            yield Goal(
                f"{own.op}, {own.title}: {vqvae.QUANTISER} alone, against {other.subject}",
                own.threads,
                f"{vqvae.QUANTISER_RATIO:g}x",
                f"{ratio:.1f}x",
                ratio >= vqvae.QUANTISER_RATIO,
            )
        yield from _less_memory(f"{own.op}, {own.title}", own, other)


def _less_memory(what: str, own: Row, other: Row) -> Iterator[Goal]:
    if own.memory is not None and other.memory is not None:
        yield Goal(
            f"{what}: memory, less than {other.subject}",
            own.threads,
            f"{other.memory / 2**20:.1f} MiB",
            f"{own.memory / 2**20:.1f} MiB",
            own.memory < other.memory,
        )


def _transformers(rows: list[Row]) -> Iterator[Goal]:
    ratios = {s.key: s.ratio for s in transformers.SETTINGS}
    for own, other in _pairs(rows, *transformers.OPS):
        goal = _faster(own, other, ratios[own.case])
        what = f"{own.op}, {own.data}"
        yield dataclasses.replace(goal, what=f"{what}: against {other.subject}")
        yield from _less_memory(what, own, other)


def _samplers(rows: list[Row]) -> Iterator[Goal]:
    drawn = {
        r.threads: r.seconds or 0.0
        for r in rows
        if r.kind == "mmfast" and (r.op, r.case) == ("randn", "1x16x21x60x104")
    }
    for own in rows:
        if own.kind != "mmfast" or own.op not in OF_BYTES:
            continue
        noise = drawn.get(own.threads, 0.0) if "seed" in own.case else 0.0
        for floor in rows:
            same = (floor.op, floor.case, floor.threads) == (own.op, own.case, own.threads)
            stricter = "torch.compile" in ratios.RATIOS.get((own.op, own.case), {})
            if same and floor.subject == "torch.compile" and not stricter:
                goal = _faster(own, floor, 1.0)
                what = f"{own.op}, {own.case}: against torch.compile"
                yield dataclasses.replace(goal, what=what)
            if not same or floor.subject != "torch.add(out=)":
                continue
            if "seed" in own.case and not noise:
                continue
            ratio, most = (own.seconds or 0.0) / ((floor.seconds or 1.0) + noise), OF_BYTES[own.op]
            yield Goal(
                f"{own.op}, {own.case}: of {floor.subject}{' and randn' * bool(noise)}, at most",
                own.threads,
                f"{most:g}x",
                f"{ratio:.2f}x",
                ratio <= most,
            )


def _ops(rows: list[Row]) -> Iterator[Goal]:
    """Of those in ``ratios``."""
    for own in (r for r in rows if r.kind == "mmfast"):
        wanted = ratios.RATIOS.get((own.op, own.case), {})
        for other in rows:
            same = (other.op, other.case, other.threads) == (own.op, own.case, own.threads)
            if same and other.subject in wanted:
                goal = _faster(own, other, wanted[other.subject])
                what = f"{own.op}, {own.case}: against {other.subject}"
                yield dataclasses.replace(goal, what=what)


def _limits(rows: list[Row]) -> Iterator[Goal]:
    own = [r for r in rows if r.kind == "mmfast" and r.op == "nearest_code"]
    for row in own:
        if row.case.startswith("tiny"):
            yield Goal(
                f"overhead of a call of {row.title}",
                row.threads,
                f"{OVERHEAD * 1e6:g} us",
                f"{(row.seconds or 0.0) * 1e6:.1f} us",
                (row.seconds or 0.0) < OVERHEAD,
            )
    known = [r for r in own if r.memory is not None]
    if known:
        most = max(known, key=lambda r: r.memory or 0)
        yield Goal(
            f"memory of nearest_code at most, outputs included ({most.title})",
            most.threads,
            f"{MEMORY >> 20} MiB",
            f"{(most.memory or 0) / 2**20:.1f} MiB",
            (most.memory or 0) < MEMORY,
        )
    if own:
        wrong = [r for r in own if r.match]
        yield Goal(
            "every index the float64 argmin",
            max(r.threads for r in own),
            f"{len(own)} of {len(own)} runs",
            f"{len(own) - len(wrong)} of {len(own)} runs",
            not wrong,
        )
