"""Checkpoints: folders of safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfast.data.errors import needed
from mmfast.files import remove_folder, replacing_folder

_FORMAT = 1
_STATE = "state.json"
_NAME = re.compile(r"step-\d{8,}")

Tensors = Mapping[str, Tensor]


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        tensors: of each file, by name.
        state: the rest, of JSON's kinds; ``state["step"]`` steps have been made.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies in a run's folder."""
    return folder / "checkpoints" / f"step-{step:08d}"


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint into a run's folder, and remove all but the newest ``keep``.

    Those of later steps go too, but for another version's: they are broken, and the run has passed
    over them.

    Args:
        folder: of the run.
        step: how many steps have been made.
        tensors: a mapping of tensors for each file, by the file's name without its ending.
        state: what else to keep, of JSON's kinds.
        keep: how many checkpoints remain.

    Returns:
        Where it lies.

    Raises:
        OSError: it cannot be written; what was there before remains.
    """
    save_file = needed("safetensors.torch").save_file
    target = path_of(folder, step)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    with replacing_folder(target) as temporary:
        for name, values in tensors.items():
            # Tensors that share memory are refused by the format.
            own = {key: t.detach().cpu().contiguous().clone() for key, t in values.items()}
            save_file(own, temporary / f"{name}.safetensors")
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        whole = {"format": _FORMAT, "files": sizes, **state, "step": step}
        (temporary / _STATE).write_text(json.dumps(whole, indent=1), "utf-8")
    there = checkpoints(folder)
    ours = there.index(target) + 1
    for other in there[: max(0, ours - keep)] + [p for p in there[ours:] if _is_ours(p)]:
        remove_folder(other)
    return target


def _is_ours(path: Path) -> bool:
    """Whether a checkpoint is of this format, or damaged: not another version's, and in reach."""
    try:
        return bool(json.loads((path / _STATE).read_text("utf-8"))["format"] == _FORMAT)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return True
    except OSError:
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest last."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def _whole(path: Path) -> dict[str, Any]:
    """The state of a checkpoint of which nothing is missing.

    Raises:
        ValueError: something is.
    """
    try:
        state = json.loads((path / _STATE).read_text("utf-8"))
        if state["format"] != _FORMAT:
            raise ValueError(f"it is of format {state['format']}, this version reads {_FORMAT}")
        for name, size in state["files"].items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} should have {size} bytes")
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{_STATE} is damaged ({error!r})") from None
    return state


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; broken ones are passed over with a warning."""
    for path in reversed(checkpoints(folder)):
        try:
            _whole(path)
        except ValueError as error:
            warnings.warn(f"{path} is not complete and is left out: {error}", stacklevel=2)
        else:
            return path
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """What :func:`write_checkpoint` wrote.

    Raises:
        ValueError: it is not complete, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = _whole(path)
        names = [name.removesuffix(".safetensors") for name in state["files"]]
        tensors = {name: load_file(path / f"{name}.safetensors") for name in names}
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no complete checkpoint: {error}") from None
    return Checkpoint(tensors, state)


def random_state() -> dict[str, Any]:
    """The states of the random numbers of torch, numpy and Python in this process.

    Returns:
        ``"tensors"``: of torch, the CPU's and each CUDA device's; ``"python"`` and ``"numpy"``, of
        JSON's kinds.
    """
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    # The state of numpy's functions, which transforms of data sets use, not that of a Generator.
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "tensors": tensors,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers of :func:`random_state`."""
    tensors = state["tensors"]
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002


def seed_everything(seed: int) -> None:
    """Start the random numbers of torch, numpy and Python."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
