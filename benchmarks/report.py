"""The report: Markdown with tables and plots, and the README's table."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots, tables
from benchmarks.goals import fastest
from benchmarks.results import FILE, Results

_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"
_README_CASES = (
    "n65536_k1024_d64",
    "n65536_k8192_d32",
    "n16384_k16384_d256",
    "n65536_k16384_d8",
    "patches_k1024",
    "patches_k8192",
)
_LEGEND = """\
Contenders take turns; a time is the median of the rounds, the spread half the distance between
their quartiles; who takes long is timed once. A time after ~ was taken on fewer vectors and
scaled up. Where a call is all overhead it is timed in loops of its own. On a CPU, calls of what is
bound by memory (add_noise, fsq_step, gated_residual_modulate, lfq_signs_step, qk_norm_rope,
sampler_step, and gradients of these) go from one copy of their arguments to the next, twice as many
as the largest cache holds: everybody's bytes come from memory, the floor's too. "of peak" is the
op's least number of operations per second over the rate of bfloat16 dot products (below), which
pruning may exceed. "Match" compares with the float64 reference: ✓, or what differs; - where there
is nothing to compare, and for others than mmfast where a smaller shape of the op says it.
"""
_ON_A_GPU = (
    "A time is the device's, of calls that queue up behind what makes its L2 cache cold, and the "
    "host's where that is slower. As a CUDA graph, where a call can be captured, it is that of the "
    "device alone.",
    "",
)
_STEPS = (
    "Parts of steps of a VQ-VAE are medians of the steps, its quantiser with its backward and its "
    "moving averages. Those of transformers are the ops of three profiled steps by their names, "
    "plain products and sums with the modulation; what is outside of ops, the profiler too, is "
    "with the others. The plot is above.",
    "",
)
_TRAINING = (
    "The VQ-VAE: three strided convolutions, a quantiser, three back; the same start, pictures and "
    "arguments for all. mmfast's two backends and the library are trained apart, so that every "
    "difference would add up. The plot of the curves is above.",
    "",
)


def write(results: Results, folder: Path, more: Sequence[tables.Table] = ()) -> Path:
    """Write ``report.md`` and the plots into ``folder``; returns the report's path.

    Args:
        more: tables for its end.
    """
    pictures = plots.draw(results, folder)
    lines = [f"# Benchmarks on {results.facts['device']}", "", summary(results), "", _LEGEND]
    lines += [f"![{p.stem}]({p.name})" for p in pictures]
    if results.facts["device_type"] != "cpu":
        lines += ["", *_ON_A_GPU, *(f"- {name}: {came}" for name, came in results.checks.items())]
    lines += ["", *(table.markdown() for table in tables.all_tables(results))]
    lines += _STEPS if any(r.parts for r in results.rows) else ()
    lines += [*(_TRAINING if results.curves else ()), "## Ceilings", "", *_ceilings(results), ""]
    notes = {(r.subject, r.note.split("; ")[-1]) for r in results.rows if r.note and r.seconds}
    notes = {n for n in notes if "timed on" not in n[1] and not n[0].startswith("mmfast")}
    lines += ["## Notes", "", *(f"- {name}: {note}" for name, note in sorted(notes)), ""]
    absent = {(r.subject, r.note) for r in results.rows if r.seconds is None}
    lines += [f"- {name} did not run: {why}" for name, why in sorted(absent)]
    lines += ["", *(table.markdown() for table in more)]
    lines += [f"All figures: [{FILE}]({FILE})."]
    path = folder / "report.md"
    _replace(path, "\n".join(lines) + "\n")
    return path


def summary(results: Results) -> str:
    """The machine and the versions in a line or two."""
    facts = results.facts
    parts = [facts["device"]]
    if facts["device_type"] == "cpu":
        parts.append(f"{facts['platform']['cores']} cores")
        isa = facts["extension"].get("isa")
        parts.append(f"instruction set {isa}" if isa else "without the extension")
    versions = [f"{name} {version}" for name, version in facts["versions"].items() if version]
    return ", ".join(parts) + "; " + ", ".join(versions) + "."


def _ceilings(results: Results) -> list[str]:
    names = list(dict.fromkeys(n for rates in results.ceilings.values() for n in rates))
    lines = ["| | " + " | ".join(f"threads: {n}" for n in results.ceilings) + " |"]
    lines.append("|---|" + "---:|" * len(results.ceilings))
    for name in names:
        values = [rates.get(name) for rates in results.ceilings.values()]
        lines.append(f"| {name} | " + " | ".join(f"{v:.0f}" if v else "-" for v in values) + " |")
    return lines


def update_readme(results: Results, path: Path) -> None:
    """Put the README's table of ``nearest_code`` between its markers.

    Raises:
        ValueError: the file has no markers.
    """
    text = path.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{path} must have the markers {_BEGIN} and {_END}")
    table = "\n".join(_readme_table(results))
    _replace(path, f"{before}{begin}\n\n{table}\n\n{end}{after}")


def _readme_table(results: Results) -> list[str]:
    rows = [r for r in results.rows if r.op == "nearest_code" and r.seconds is not None]
    rows = [r for r in rows if r.kind != "level"]
    most = max(r.threads for r in rows)
    lines = [
        "| `nearest_code`, N x K x D | mmfast | fastest peer | "
        "`torch.mm` of that shape | vector-quantize-pytorch |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in _README_CASES:
        here = [r for r in rows if r.case == case and r.threads == most]
        own, peer = fastest(here, "mmfast"), fastest(here, "peer", "compile")
        if own is None or peer is None or own.match:
            continue
        cells = [f"**{tables.duration(own.seconds)}**"]
        for other in (
            peer,
            fastest(here, "floor"),
            next((r for r in here if r.subject == "vector-quantize-pytorch"), None),
        ):
            if other is None or other.seconds is None:
                cells.append("-")
                continue
            ratio = other.seconds / (own.seconds or 1.0)
            name = f" ({other.subject})" if other is peer else ""
            cells.append(f"{tables.duration(other.seconds)}{name}, {ratio:.1f}x")
        lines.append(f"| {own.title}, {own.data} | " + " | ".join(cells) + " |")
    facts = results.facts
    lines += [
        "",
        f"float32, {most} threads of {facts['device']}, {facts['extension'].get('isa')}, torch "
        f"{facts['versions']['torch']}; every index of mmfast equal to the float64 argmin. ",
    ]
    lines[-1] += "The times as many are how much longer the others take."
    return lines


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
