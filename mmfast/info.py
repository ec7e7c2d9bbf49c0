"""What runs here and why: the contents of ``python -m mmfast info``."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table

from mmfast import backends
from mmfast.registry import OPS
from mmfast.version import __version__

# What changes how mmfast, its backends or their threads behave.
_VARIABLES = (
    "MMFAST_ISA",
    "MMFAST_KEPT_MIB",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def collect() -> dict[str, Any]:
    """The facts, of JSON types only.

    Returns:
        ``versions``, ``platform``, ``extension``, ``environment`` (variables that are set),
        ``devices`` by device type, and ``ops``: for each op and device type the backend that
        ``runs`` and the reasons ``against`` each other one.
    """
    devices = _devices()
    ops: dict[str, dict[str, Any]] = {}
    for name, op in OPS.items():
        ops[name] = {}
        for device_type in devices:
            chosen, against = backends.automatic(op, device_type)
            ops[name][device_type] = {"runs": chosen, "against": against}
    return {
        "versions": {
            "mmfast": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "numpy")},
        },
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "extension": _extension(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "devices": devices,
        "ops": ops,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo") as lines:
                for line in lines:
                    if line.startswith("model name"):
                        return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor()


def _devices() -> dict[str, list[str]]:
    """The names of the devices of each type that torch can use now."""
    devices = {"cpu": [_processor()]}
    if torch.cuda.is_available():
        devices["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return devices


def _extension() -> dict[str, Any]:
    """The compiled extension: what it was built with and the instruction set it chose."""
    missing = backends.extension_missing()
    if missing:
        return {"loaded": False, "reason": missing[0]}
    module = backends.extension()
    facts: dict[str, Any] = {"loaded": True, **module.build_info()}
    facts["supported_isas"] = module.supported_isas()
    try:
        facts["isa"] = module.isa()
    except RuntimeError as error:  # MMFAST_ISA names none that this processor has
        facts["isa"] = None
        facts["isa_error"] = str(error)
    return facts


def render(facts: dict[str, Any]) -> Group:
    """``facts`` of :func:`collect` as tables."""
    summary = Table(show_header=False, box=None, pad_edge=False)
    summary.add_column(style="bold")
    summary.add_column(overflow="fold")
    versions = facts["versions"]
    summary.add_row("mmfast", versions["mmfast"])
    for name in ("python", "torch", "triton", "numpy"):
        summary.add_row(name, versions[name] or "not installed")
    system = facts["platform"]
    summary.add_row("system", system["system"])
    summary.add_row("processor", f"{system['processor']} ({system['cores']} cores)")
    summary.add_row("torch threads", str(system["threads"]))
    for device_type, names in facts["devices"].items():
        if device_type != "cpu":
            summary.add_row(device_type, "\n".join(names))
    for row in _extension_rows(facts["extension"]):
        summary.add_row(*row)
    for name, value in facts["environment"].items():
        summary.add_row(name, value)

    table = Table(title="What runs where", title_justify="left")
    for heading in ("op", "device", "runs", "why not the others"):
        table.add_column(heading, overflow="fold")
    for name, by_device in facts["ops"].items():
        for device_type, choice in by_device.items():
            against = [f"{other}: {'; '.join(why)}" for other, why in choice["against"].items()]
            table.add_row(name, device_type, choice["runs"], "\n".join(against))
    return Group(summary, "", table)


def _extension_rows(extension: dict[str, Any]) -> list[tuple[str, str]]:
    if not extension["loaded"]:
        return [("extension", extension["reason"])]
    build = f"{extension['compiler']}, for torch {extension['torch_target_version']} and newer"
    supported = ", ".join(extension["supported_isas"])
    chosen = extension["isa"] or f"none: {extension['isa_error']}"
    hint = f"{chosen} (this processor has {supported}; MMFAST_ISA=... lowers it)"
    return [("extension", build), ("instruction set", hint)]


def show(facts: dict[str, Any]) -> None:
    """Print ``facts`` for people."""
    Console(markup=False, highlight=False).print(render(facts))
