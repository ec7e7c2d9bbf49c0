"""diffusers: ``VQModel``'s quantiser, transformer blocks, attention, and schedulers.

The schedulers are here by the library's names, as ``mmfast.integrations.diffusers.DDIMScheduler``.
The library is imported when the first of them is asked for. :func:`patch` swaps a pipeline's.
"""

from __future__ import annotations

from typing import Any

from mmfast.integrations.binding import joined
from mmfast.integrations.diffusers import activations, attention, blocks, norms, vq_model
from mmfast.integrations.diffusers.swapping import SCHEDULERS, patch

LIBRARY = joined(
    vq_model.LIBRARY, blocks.LIBRARY, norms.LIBRARY, activations.LIBRARY, attention.LIBRARY
)

__all__ = ["LIBRARY", "SCHEDULERS", "patch"]


def __getattr__(name: str) -> Any:
    if name not in SCHEDULERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmfast.integrations.diffusers.schedulers import CLASSES

    if name not in CLASSES:
        raise AttributeError(f"this version of diffusers has no {name}")
    return CLASSES[name]


def __dir__() -> list[str]:
    return [*globals(), *SCHEDULERS]
