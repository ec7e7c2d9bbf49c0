"""Plots of the results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.contest import CURVES
from benchmarks.results import Results, Row

_WIDTH = 0.8  # of a group of bars
_COLOURS = {
    "torch.mm": "#7f7f7f",
    "addmm+argmin": "#ff7f0e",
    "cdist+argmin": "#bcbd22",
    "faiss flat": "#1f77b4",
    "vector-quantize-pytorch": "#9467bd",
    "KeOps": "#8c564b",
    "torch.compile": "#e377c2",
    "reference (float64)": "#17becf",
}
_OWN = "#2ca02c"


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the plots that the rows allow as PNG files into ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [r for r in results.rows if r.seconds is not None and r.kind != "level"]
    if not rows and not results.curves:
        return []
    figures = {**(_of_rows(rows, results.facts) if rows else {}), "training": _training(results)}
    figures["samplers"] = _samplers(rows)
    figures["steps"] = _steps(rows)
    if results.facts["device_type"] != "cpu":
        from benchmarks import gpu_plots

        figures["streams"] = gpu_plots.streams(results)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written


def _of_rows(rows: list[Row], facts: dict[str, Any]) -> dict[str, Any]:
    most = max(r.threads for r in rows)
    rows = [r for r in rows if r.op == "nearest_code" and r.threads == most]
    subtitle = facts["device"]
    if facts["device_type"] == "cpu":
        subtitle += f", {most} thread{'s' if most > 1 else ''}"
    tables = [r for r in rows if r.sweep is None and not r.case.startswith("tiny")]
    return {
        "speedup": _bars(tables, subtitle, _speedups, "time of each / time of mmfast", "speed"),
        "memory": _bars(tables, subtitle, _memories, "MiB, outputs included", "memory"),
        "scaling": _curves(list(_curve_points(rows)), subtitle),
        "patches": _patches([r for r in rows if _of_patches(r)], subtitle),
    }


def _curve_points(rows: list[Row]) -> Iterator[Row]:
    """The last of the curve over N is in the tables."""
    shown = [r for r in rows if r.kind == "mmfast" or r.subject in CURVES]
    yield from (r for r in shown if r.sweep in ("N", "K", "D"))
    if any(r.sweep == "N" for r in shown):
        yield from (replace(r, sweep="N") for r in shown if r.case == "n65536_k1024_d64")


def _of_patches(row: Row) -> bool:
    if row.sweep is None:
        return row.data == "image patches" and (row.kind == "mmfast" or row.subject in CURVES)
    return row.sweep == "K, image patches"


def _colour(subject: str) -> str:
    return _COLOURS.get(subject, _OWN)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def _label(row: Row) -> str:
    return f"{row.title}\n{row.data}"


def _speedups(rows: list[Row]) -> dict[str, float]:
    own = min((r.seconds or 0.0 for r in rows if r.kind == "mmfast"), default=None)
    if not own:
        return {}
    return {r.subject: (r.seconds or 0.0) / own for r in rows if r.kind != "mmfast"}


def _memories(rows: list[Row]) -> dict[str, float]:
    # Those measured on fewer vectors would need more.
    whole = [r for r in rows if r.memory is not None and r.measured == r.shape["N"]]
    return {r.subject: max((r.memory or 0) / 2**20, 0.1) for r in whole}


def _bars(rows: list[Row], subtitle: str, values: Any, label: str, what: str) -> Any:
    cases = list(dict.fromkeys(r.case for r in rows))
    found = {case: values([r for r in rows if r.case == case]) for case in cases}
    found = {case: bars for case, bars in found.items() if bars}
    if not found:
        return None
    subjects = list(dict.fromkeys(s for bars in found.values() for s in bars))
    figure, axis = _figure(12, 1.2 + 1.1 * len(found))
    height = _WIDTH / len(subjects)
    for i, subject in enumerate(subjects):
        places = [
            (n - _WIDTH / 2 + (i + 0.5) * height, bars[subject])
            for n, bars in enumerate(found.values())
            if subject in bars
        ]
        bars_ = axis.barh(
            [p for p, _ in places],
            [v for _, v in places],
            height * 0.9,
            color=_colour(subject),
            label=subject,
        )
        axis.bar_label(bars_, fmt="%.3g", fontsize=7, padding=2)
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_yticks(range(len(found)))
    axis.set_yticklabels([_label(next(r for r in rows if r.case == case)) for case in found])
    axis.invert_yaxis()
    if what == "speed":
        axis.axvline(1, color=_OWN, linewidth=2)
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=4, fontsize=8, frameon=False)
    axis.set_title(f"nearest_code: {what} of everybody ({subtitle})")
    return figure


def _curves(rows: list[Row], subtitle: str) -> Any:
    if not rows:
        return None
    figure, axes = _figure(15, 5, 3)
    for axis, letter in zip(axes, "NKD", strict=True):
        here = [r for r in rows if r.sweep == letter]
        _lines(axis, here, letter, lambda r: (r.seconds or 0.0) * 1e3)
        fixed = [f"{x} = {here[0].shape[x]}" for x in "NKD" if x != letter] if here else []
        axis.set_title(", ".join(fixed))
        axis.set_ylabel("ms")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"nearest_code, Gaussian data ({subtitle})")
    return figure


def _patches(rows: list[Row], subtitle: str) -> Any:
    if not rows:
        return None
    figure, axis = _figure(8, 6)

    def each(row: Row) -> float:
        return (row.seconds or 0.0) / row.shape["N"] * 1e9

    _lines(axis, rows, "K", each)
    own = sorted((r for r in rows if r.kind == "mmfast"), key=lambda r: r.shape["K"])
    if own:
        first = own[0]
        sizes = [r.shape["K"] for r in own]
        axis.plot(
            sizes,
            [each(first) * k / first.shape["K"] for k in sizes],
            color="black",
            linestyle=":",
            label="growth like K",
        )
    axis.set_ylabel("ns per vector")
    axis.legend()
    axis.set_title(
        f"nearest_code, {rows[0].shape['N']} image patches of 4 x 4 x 3, codes by k-means\n"
        f"({subtitle})"
    )
    return figure


def _samplers(rows: list[Row]) -> Any:
    """Steps of schedulers, in units of the time that their bytes take."""
    most = max((r.threads for r in rows), default=0)
    rows = [r for r in rows if r.op == "scheduler_step" and r.threads == most]
    floors = {r.case: r for r in rows if r.kind == "floor"}
    if not floors:
        return None
    figure, axis = _figure(9, 1.5 + 0.34 * len(floors))
    contenders = (("mmfast", _OWN), ("diffusers", _COLOURS["faiss flat"]))
    height = _WIDTH / len(contenders)
    for i, (subject, colour) in enumerate(contenders):
        own = {r.case: r.seconds or 0.0 for r in rows if r.subject == subject}
        values = [own.get(case, 0.0) / (floor.seconds or 1.0) for case, floor in floors.items()]
        places = [place + (i - 0.5) * height for place in range(len(values))]
        bars = axis.barh(places, values, height, color=colour, label=subject)
        axis.bar_label(bars, [f"{v:.1f}" for v in values], fontsize=7, padding=2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(floors)), [r.data for r in floors.values()], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("time of a step / time of torch.add(out=) that moves as many bytes")
    axis.set_title(f"Samplers against their floor, {most} thread{'s' if most > 1 else ''}")
    axis.legend(loc="lower right")
    return figure


def _steps(rows: list[Row]) -> Any:
    """Bars of training steps, one part after the other."""
    most = max((r.threads for r in rows), default=0)
    rows = [r for r in rows if r.parts and r.threads == most]
    ops = list(dict.fromkeys(r.op for r in rows))
    if not ops:
        return None
    width = max(sum(r.op == op for r in rows) for op in ops)
    figure, axes = _figure(8 * len(ops), 1.8 + 0.45 * width, len(ops))
    for op, axis in zip(ops, axes if len(ops) > 1 else [axes], strict=True):
        here = [r for r in rows if r.op == op]
        ends = [0.0] * len(here)
        for part in dict.fromkeys(name for r in here for name in r.parts or ()):
            values = [(r.parts or {}).get(part, 0.0) * 1e3 for r in here]
            axis.barh(range(len(here)), values, _WIDTH, left=ends, label=part)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        axis.set_yticks(range(len(here)), [f"{r.data}: {r.subject}" for r in here], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("ms")
        axis.set_title(f"{op}, {most} thread{'s' if most > 1 else ''}")
        axis.legend(fontsize=8)
    figure.suptitle("Where the time of training steps goes")
    return figure


def _training(results: Results) -> Any:
    curves = results.curves
    if not curves:
        return None
    figure, axes = _figure(15, 5, 3)
    labels = ("perplexity", "codes used", "reconstruction error")
    # The last ones are drawn on top, each thinner than what it may hide.
    widths = [2.0 + 2.5 * (len(curves) - 1 - n) for n in range(len(curves))]
    for axis, label in zip(axes, labels, strict=True):
        for curve, width in zip(curves, widths, strict=True):
            values = {labels[0]: curve.perplexity, labels[1]: curve.used, labels[2]: curve.error}
            own = curve.subject == curves[0].subject
            colour = _OWN if own else _COLOURS.get(curve.subject, "black")
            axis.plot(values[label], color=colour, linewidth=width, label=curve.subject)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"A VQ-VAE on photographs ({results.facts['device']})")
    return figure


def _lines(axis: Any, rows: list[Row], letter: str, value: Any) -> None:
    for subject in dict.fromkeys(r.subject for r in rows):
        points = sorted((r.shape[letter], value(r)) for r in rows if r.subject == subject)
        own = subject.startswith("mmfast")
        axis.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=4,
            linewidth=2.5 if own else 1.5,
            color=_colour(subject),
            label=subject,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(letter)
