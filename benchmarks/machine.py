"""The machine: what it is called, and what it can do at most, measured beside the ops."""

from __future__ import annotations

import contextlib
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.timing import best
from mmfast import backends, info
from mmfast.regions import setting

_ROUNDS = 5
# Of products, and bytes of a copy, by the kind of device.
_PRODUCT = {"cpu": 1536, "cuda": 8192}
_COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}


def facts(device: torch.device) -> dict[str, Any]:
    """Versions, processor, instruction set: what ``python -m mmfast info --json`` gives, and the
    device's name."""
    found = info.collect()
    gpu = {"gpu": _gpu(device)} if device.type == "cuda" else {}
    return {
        "device": device_name(device),
        "device_type": device.type,
        "versions": {**found["versions"], **_package_versions()},
        "platform": found["platform"],
        "extension": found["extension"],
        "environment": found["environment"],
        **gpu,
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    """What tells a GPU from another one of its name."""
    found = torch.cuda.get_device_properties(device)
    return {
        "architecture": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "cache": found.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def device_name(device: torch.device) -> str:
    """What a person would call the device. Virtual machines name no more than the maker of their
    processor, so that its family tells generations apart."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = info.collect()["platform"]["processor"] or platform.machine()
    family = re.search(r"cpu family\s*:\s*(\d+)[^$]*?model\s*:\s*(\d+)", _cpuinfo())
    if family:
        name += f" (family {family[1]} model {family[2]})"
    return name


def slug(device: torch.device) -> str:
    """The folder of the device's results."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _cpuinfo() -> str:
    if sys.platform != "linux":
        return ""
    with open("/proc/cpuinfo") as file:
        return file.read()


def _package_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    packages = ("faiss-cpu", "scikit-learn", "vector-quantize-pytorch", "pykeops", "scikit-image")
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def ceilings(device: torch.device, threads: int) -> dict[str, float]:
    """Rates that nothing exceeds: GFLOP/s of float32 and bfloat16 products, of dot-product and
    matrix instructions alone where the CPU has them, GB/s of a copy (read and written)."""
    found = {
        "float32 GFLOP/s": _matmul(device, torch.float32),
        "bfloat16 GFLOP/s": _matmul(device, torch.bfloat16),
        "copy GB/s": _copy(device),
    }
    if device.type == "cuda":
        with _tf32():
            found["TF32 GFLOP/s"] = _matmul(device, torch.float32)
    if device.type == "cpu" and not backends.extension_missing():
        module = backends.extension()
        instructions = {
            "bfloat16 dot": lambda: module.dot_products(1 << 20, True),
            "int16 dot": lambda: module.dot_products(1 << 20, False),
            "bfloat16 matrix": lambda: module.matrix_products(1 << 18),
        }
        for name, call in instructions.items():
            rate = _rate(threads, call)
            if rate:
                found[f"{name} instructions GFLOP/s"] = rate
    return found


def _tf32() -> contextlib.AbstractContextManager[None]:
    """Products of float32 by way of TF32."""
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high")


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    size = _PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: torch.mm(a, b), device, _ROUNDS) / 1e9


def _copy(device: torch.device) -> float:
    size = _COPIED[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best(lambda: target.copy_(source), device, _ROUNDS) / 1e9


def _rate(threads: int, products: Callable[[], int]) -> float:
    """GFLOP/s of ``products``, which returns its multiply-adds, on each of ``threads``."""
    with ThreadPoolExecutor(threads) as pool:
        best = 0.0
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            made = sum(pool.map(lambda _: products(), range(threads)))
            best = max(best, 2 * made / (time.perf_counter() - start) / 1e9)
    return best
