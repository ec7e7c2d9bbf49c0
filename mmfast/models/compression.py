"""Learned compression: the codes of a VQ-VAE as bytes, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfast
from mmfast.checks import check_floating
from mmfast.entropy_coding import decode_indices, encode_indices
from mmfast.models.codes import by_stage, stage_sizes
from mmfast.models.tiling import decode_in_tiles, encode_in_tiles
from mmfast.models.vqvae import VQVAE
from mmfast.ops.pack_indices import packed_size
from mmfast.sealed import SealedFormat

_DIGEST = 8  # bytes of the model's hash
_PACKED, _MODELLED = range(2)  # ways of writing codes
_MOST = 1 << 30  # numbers of a decompressed sample
# Digest, coding, dimensions, stages, up to three sizes; the note, the codes.
_FORMAT = SealedFormat(b"\x89MMV\r\n\x1a\n", 1, f"{_DIGEST}s3B3I", 2, "a file of compress")


class Decompressed(NamedTuple):
    """What :func:`decompress` returns.

    Attributes:
        x: float32 ``(channels, *sizes)``, as the model decodes it.
        indices: ``(*grid)``, behind it ``Q`` for quantisers of several stages.
        about: what was given to :func:`compress`.
    """

    x: Tensor
    indices: Tensor
    about: dict[str, Any]


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's class, configuration and weights, in hexadecimal digits."""
    described = [type(model).__name__, getattr(model, "config", None)]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def padded(x: Tensor, multiple: int) -> Tensor:
    """x ``(B, C, *sizes)`` with its last values repeated up to multiples of ``multiple``.

    Raises:
        ValueError: a size is 0.
    """
    if not all(x.shape[2:]):
        raise ValueError(f"x must have something in it, got {tuple(x.shape)}")
    amounts = [amount for size in x.shape[:1:-1] for amount in (0, -size % multiple)]
    return F.pad(x, amounts, mode="replicate") if any(amounts) else x


@torch.no_grad()
def compress(
    model: VQVAE,
    x: Tensor,
    *,
    stages: int | None = None,
    tile: int | None = None,
    **about: Any,
) -> bytes:
    """A sample as the bytes of a file: the codes, entropy-coded, and a header.

    Args:
        model: in evaluation mode.
        x: ``(channels, *sizes)``, sizes of any numbers above 0; at the ends it is filled up with
            its last values to what the model takes.
        stages: keep the codes of so many stages of a residual quantiser, for smaller files; it must
            have learned with ``quantize_dropout``. All by default.
        tile: side of the tiles that go through the model one after another; 0: everything at once.
            By default large samples are cut into tiles: :mod:`mmfast.models.tiling`.
        about: what :func:`decompress` is to return beside it, of JSON's types.

    Raises:
        ImportError: constriction is not installed.
        TypeError: x is no tensor of floating numbers.
        ValueError: the model is in training mode, x has another shape, or the quantiser does not
            do with so many stages.
    """
    check_floating("x", x)
    if model.training:
        raise ValueError("the model must be in evaluation mode: model.eval()")
    if x.dim() != 1 + model.spatial_dims:
        dims = ", ".join(["channels", *["size"] * model.spatial_dims])
        raise ValueError(f"x must be ({dims}), got {tuple(x.shape)}")
    whole = padded(x[None], model.downsampling)
    indices = encode_in_tiles(model, whole, tile).cpu().long()
    if stages is not None:
        groups = getattr(model.quantizer, "rvqs", ())
        together = max(1, len(groups))  # indices of a stage
        most = len(by_stage(model, indices)) // together
        if not 1 <= stages <= most:
            raise ValueError(f"stages must be from 1 to {most}, got {stages}")
        quantizer = groups[0] if groups else model.quantizer
        if stages < most and not getattr(quantizer, "quantize_dropout", False):
            raise ValueError("fewer stages need a quantizer with quantize_dropout=True")
        indices = indices[..., : stages * together] if stages < most else indices
    grids = by_stage(model, indices)[:, 0]
    counts = stage_sizes(model, len(grids))
    coding, codes = _MODELLED, encode_indices(grids.numpy(), counts)
    packed = _pack(grids, counts)
    if len(packed) < len(codes):
        coding, codes = _PACKED, packed
    sizes = [*x.shape[1:], 0, 0][:3]
    note = json.dumps(about).encode() if about else b""
    digest = bytes.fromhex(model_digest(model))[:_DIGEST]
    fields = (
        digest,
        coding,
        model.spatial_dims,
        len(grids) if indices.dim() > x.dim() else 0,
        *sizes,
    )
    return _FORMAT.seal(fields, (note, codes))


@torch.no_grad()
def decompress(model: VQVAE, data: bytes, *, tile: int | None = None) -> Decompressed:
    """The sample that a file's bytes hold.

    Args:
        model: with which it was compressed, in evaluation mode.
        data: of :func:`compress`.
        tile: as of :func:`compress`.

    Raises:
        ImportError: constriction is not installed.
        ValueError: the bytes are something else, damaged or truncated, or the model is another.
    """
    (digest, coding, dims, stages, *sizes), (note, codes) = _FORMAT.open(data)
    own = model_digest(model)
    if digest.hex() != own[: 2 * _DIGEST]:
        raise ValueError(f"wrong model: compressed with {digest.hex()}, given {own[: 2 * _DIGEST]}")
    sizes = sizes[:dims]
    sane = dims == model.spatial_dims and coding in (_PACKED, _MODELLED)
    if not (sane and 0 < np.prod(sizes, dtype=object) * model.channels <= _MOST):
        raise ValueError("the header makes no sense, though its checksum matches")
    shape = [-(-size // model.downsampling) for size in sizes]
    counts = stage_sizes(model, max(stages, 1))
    if coding == _MODELLED:
        grids = torch.from_numpy(decode_indices(codes, shape, counts))
    else:
        grids = _unpack(codes, shape, counts)
    indices = grids.movedim(0, -1) if stages else grids[0]
    device = next(model.parameters()).device
    decoded = decode_in_tiles(model, indices[None].to(device), tile)[0]
    cropped = decoded[(slice(None), *(slice(size) for size in sizes))]
    return Decompressed(cropped, indices, json.loads(note) if note else {})


def _bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


def _pack(grids: Tensor, counts: Sequence[int]) -> bytes:
    return b"".join(
        mmfast.pack_indices(grid.flatten(), _bits(count)).numpy().tobytes()
        for grid, count in zip(grids, counts, strict=True)
    )


def _unpack(data: bytes, shape: Sequence[int], counts: Sequence[int]) -> Tensor:
    size = int(np.prod(shape))
    lengths = [packed_size(size, _bits(count)) for count in counts]
    if len(data) != sum(lengths):
        raise ValueError(f"damaged: {len(data)} bytes of codes, expected {sum(lengths)}")
    grids = []
    for part, count in zip(
        torch.frombuffer(bytearray(data), dtype=torch.uint8).split(lengths), counts, strict=True
    ):
        grid = mmfast.unpack_indices(part, _bits(count), size)
        if int(grid.max()) >= count:
            raise ValueError("damaged: a code is beyond the codebook")
        grids.append(grid.view(*shape))
    return torch.stack(grids)
