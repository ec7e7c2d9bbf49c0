"""A training step of a whole VQ-VAE on photographs, with one quantiser or another."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mmfast.nn
from benchmarks import modules, parts, training
from benchmarks.modules import Step
from mmfast import use_backend
from mmfast.models import VQVAE

OP = "vqvae_step"
QUANTISER = "quantiser"  # the part
QUANTISER_RATIO = 3.0  # times faster in it
_LOSS, _INDICES, _GRADIENTS = 1e-4, 2e-3, 2e-2  # of the loss, of all vectors, of the norm
_LEARNING_RATE = 1e-3

Result = tuple[Any, ...]
MakeQuantiser = Callable[[Tensor], nn.Module]


@dataclass(frozen=True)
class Setting:
    """A model and its batch: pictures (B, 3, size, size), K codes of D numbers."""

    batch: int
    size: int
    num_codes: int
    dim: int
    widths: tuple[int, ...]

    @property
    def shape(self) -> dict[str, int]:
        """N vectors, a quarter of the pictures' sides each way."""
        return {"N": self.batch * (self.size // 4) ** 2, "K": self.num_codes, "D": self.dim}


SETTING = Setting(batch=8, size=128, num_codes=8192, dim=32, widths=(32, 64))


def arguments(setting: Setting, device: torch.device) -> Result:
    """The model without its quantiser, pictures, and codes, which are what the encoder makes of
    other pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQVAE(nn.Identity(), setting.dim, widths=setting.widths, patch_size=2)
    model.to(device)
    x, *others = (
        pictures.to(device) for pictures in training.batches(3, setting.batch, setting.size)
    )
    with torch.no_grad():
        vectors = torch.cat([model.latents(y).flatten(2).mT.flatten(0, 1) for y in others])
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    return model, x, vectors[chosen[: setting.num_codes].to(device)].contiguous()


def quantiser(library: Any) -> MakeQuantiser:
    """Of ``mmfast.nn`` or ``vector_quantize_pytorch``, in the state before the first step."""

    def make(codes: Tensor) -> nn.Module:
        made: nn.Module = modules.vector_quantiser(library, codes)
        modules.set_codes(made._codebook, codes)
        return made

    return make


def step(make: MakeQuantiser, model: VQVAE, x: Tensor, codes: Tensor) -> Step:
    """Loss, indices, and the gradients of all parameters. Adam moves these afterwards, and the
    quantiser its codes."""
    own = copy.deepcopy(model)
    own.quantizer = make(codes)
    start = {name: t.clone() for name, t in own.state_dict().items()}
    parameters = [*own.encoder.parameters(), *own.decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, _LEARNING_RATE)
    history: list[dict[str, float]] = []

    def reset() -> None:
        own.load_state_dict(start)
        for state in optimiser.state.values():
            for tensor in state.values():
                tensor.zero_()

    def run() -> Result:
        optimiser.zero_grad(set_to_none=True)
        marks = parts.Marks()
        latents = own.latents(x)
        marks("encoder")
        quantized, indices, quantiser_loss = own.quantize(latents)
        marks(QUANTISER)
        loss = own.reconstruction_loss(own.decoder(quantized), x) + quantiser_loss
        marks("decoder")
        # The decoder's backward ends where the quantiser's begins, and the encoder's is the rest.
        quantized.register_hook(lambda _: marks("backward"))
        latents.register_hook(lambda _: marks(QUANTISER))
        loss.backward()
        marks("backward")
        optimiser.step()
        marks("optimiser")
        history.append(marks.seconds)
        return loss.detach(), indices, *(p.grad for p in parameters)

    # The first step makes the optimiser's state and much else.
    return Step(reset, run, lambda: parts.medians(history[1:] or history))


def expected(model: VQVAE, x: Tensor, codes: Tensor) -> Result:
    """In float64, by the reference."""
    wide = copy.deepcopy(model).double()
    with use_backend("reference"):
        return step(quantiser(mmfast.nn), wide, x.double(), codes.double())()


def judge(result: Result, _: Result, wanted: Result) -> str:
    """What is further from float64 than float32 excuses. A vector whose nearest codes are as near
    as makes no difference may have the other one, and gradients with it."""
    (loss, indices, *gradients), (loss_, indices_, *gradients_) = result, wanted
    complaints = []
    if abs(float(loss) / float(loss_) - 1) > _LOSS:
        complaints.append(f"loss {float(loss):.4g}, not {float(loss_):.4g}")
    other = int((indices != indices_).sum())
    if other > _INDICES * indices.numel():
        complaints.append(f"{other} of {indices.numel()} indices differ")
    # All together: that of a bias before a norm is nothing but rounding.
    far, size = (
        math.hypot(*(float(g.double().norm()) for g in found))
        for found in (
            [a.double() - b for a, b in zip(gradients, gradients_, strict=True)],
            gradients_,
        )
    )
    if not far < _GRADIENTS * size:
        complaints.append(f"gradients off by {far / size:.1e} of their norm")
    return "; ".join(complaints)
