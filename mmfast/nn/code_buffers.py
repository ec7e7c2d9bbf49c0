"""The buffers that all codebooks have, whole or a process's part of one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.nn.initialisation import unit
from mmfast.nn.nonfinite import NonFiniteBatches


class CodeBuffers(nn.Module):
    """Codes, their moving averages, and whether they are initialised.

    Buffers, with the peer's names: ``initted`` (), ``cluster_size`` (H, K), ``embed_avg``
    (H, K, D), and ``embed`` (H, K, D), a parameter if learnable; of a part of a codebook P codes in
    place of K. ``nonfinite_batches`` () is not in the state dict.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor
    nonfinite_batches: Tensor
    use_cosine_sim: bool
    # What is known on the host of ``initted``, so that a step does not ask the device, and whether
    # the ranks have compared it.
    _ready: bool
    _agreed: bool
    _watch: NonFiniteBatches

    def _register_codes(
        self,
        num_codebooks: int,
        codebook_size: int,
        dim: int,
        *,
        kmeans_init: bool,
        learnable: bool = False,
        part: slice = slice(None),
    ) -> None:
        """Make the buffers.

        Args:
            num_codebooks, codebook_size, dim: H, K, D.
            kmeans_init: the codes are zeros, for k-means to set; else random ones.
            learnable: ``embed`` is a parameter.
            part: of the codes, to be kept: those that an unsharded codebook has there.
        """
        if kmeans_init:
            codes = torch.zeros(num_codebooks, len(range(codebook_size)[part]), dim)
        else:
            drawn = nn.init.kaiming_uniform_(torch.empty(num_codebooks, codebook_size, dim))
            drawn = unit(drawn) if self.use_cosine_sim else drawn
            codes = drawn[:, part].clone(memory_format=torch.contiguous_format)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", codes.new_ones(codes.shape[:2]))
        self.register_buffer("embed_avg", codes.clone())
        if learnable:
            self.embed = nn.Parameter(codes)
        else:
            self.register_buffer("embed", codes)
        zero = torch.zeros((), dtype=torch.int64)
        self.register_buffer("nonfinite_batches", zero, persistent=False)
        self._watch = NonFiniteBatches()
        self._ready = not kmeans_init
        self._agreed = False
