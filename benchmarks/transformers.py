"""Diffusion transformers as contenders: facebookresearch/DiT's blocks, as they are and patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import parts
from benchmarks.modules import Step
from mmfast.integrations import patch

OPS = ("dit_eval", "dit_step")
# Times faster than the model as it is, by the dtype of the products.
RATIOS = {torch.float32: 1.2, torch.bfloat16: 1.5}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of norms

Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Setting:
    """A model and what goes through it.

    Attributes:
        name: as the paper has it; ``"block"`` in it: a single one of that model, or as many.
        width, heads, blocks: C, H, and how many blocks.
        batch, tokens: B, L.
        dtype: of weights and activations.
        autocast: products are of bfloat16, as trainers of float32 weights have them.
    """

    name: str
    width: int
    heads: int
    blocks: int
    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    @property
    def kind(self) -> str:
        """What weights, activations and products are."""
        return "autocast" if self.autocast else str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        """For the names of cases."""
        return f"{self.name}_{self.kind}".lower().replace("/", "_").replace(" ", "_")

    @property
    def title(self) -> str:
        """For readers."""
        return f"{self.name}, {self.kind}"

    @property
    def ops(self) -> tuple[str, ...]:
        """Which of :data:`OPS` are timed."""
        return OPS[1:] if self.autocast else OPS

    @property
    def ratio(self) -> float:
        """The goal, times faster."""
        return RATIOS[torch.bfloat16 if self.autocast else self.dtype]


def _settings(dtype: torch.dtype) -> list[Setting]:
    return [
        Setting("DiT-S/4", 384, 6, 12, 4, 64, dtype),
        Setting("DiT-XL/2 block", 1152, 16, 1, 1, 256, dtype),
    ]


SETTINGS = [
    *_settings(torch.float32),
    *_settings(torch.bfloat16),
    Setting("DiT-S/4 3 blocks", 384, 6, 3, 4, 64, autocast=True),
]


class Attention(nn.Module):
    """As timm's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulated(self.norm1(x), shift, scale))
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Its blocks, with weights that hide nothing."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.autocast = setting.autocast
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(
                DiTBlock(setting.width, setting.heads) for _ in range(setting.blocks)
            )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        # float64 stays what it is.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            for block in self.blocks:
                x = block(x, c)
        return x


def arguments(setting: Setting, device: torch.device) -> tuple[Any, ...]:
    """Model, tokens (B, L, C), condition (B, C), and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shape = setting.batch, setting.tokens, setting.width
    tensors = (
        torch.randn(size, generator=generator).to(device, setting.dtype)
        for size in (shape, shape[::2], shape)
    )
    return DiT(setting).to(device, setting.dtype), *tensors


def plain(model: nn.Module) -> nn.Module:
    """A model of one's own, as it is."""
    return copy.deepcopy(model)


def patched(model: nn.Module) -> nn.Module:
    """One that runs on mmfast."""
    twin = copy.deepcopy(model)
    report = patch(twin)
    if report.left:
        raise RuntimeError(f"not all of the model runs on mmfast:\n{report}")
    return twin


def compiled(model: nn.Module) -> Any:
    """One that is compiled; on a GPU, where it has many, by blocks, which are compiled once."""
    twin = copy.deepcopy(model)
    if not torch.cuda.is_available():
        return torch.compile(twin)
    for block in twin.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)
    return twin


def evaluation(
    prepare: Callable[[nn.Module], Any], model: nn.Module, x: Tensor, c: Tensor, _: Tensor
) -> Callable[[], Result]:
    """The output."""
    own = prepare(model)

    @torch.no_grad()
    def run() -> Result:
        return (own(x, c),)

    return run


def step(
    prepare: Callable[[nn.Module], Any], model: nn.Module, x: Tensor, c: Tensor, gradient: Tensor
) -> Step:
    """Gradients of the tokens and of all parameters."""
    own = prepare(model)
    wanted = list(own.parameters())

    def run() -> Result:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(own(leaf, c), (leaf, *wanted), gradient)

    # The profiler's seconds are the host's.
    told = (lambda: parts.profiled(run)) if x.device.type == "cpu" else None
    return Step(lambda: None, run, told)


def expected(
    make: Callable[..., Callable[[], Result]],
) -> Callable[..., Result]:
    """Of a call above, in float64."""

    def run(model: nn.Module, *tensors: Tensor) -> Result:
        wide = copy.deepcopy(model).double()
        return make(plain, wide, *(t.double() for t in tensors))()

    return run


def errors(result: Result, wanted: Result) -> list[float]:
    """Of each, by the norm of what is wanted."""
    return [
        float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
        for got, want in zip(result, wanted, strict=True)
    ]


def judge(result: Result, given: tuple[Any, ...], wanted: Result) -> str:
    """What is further from float64 than the dtype excuses, by its norm."""
    low = given[0].autocast
    limit = _TOLERANCE[torch.bfloat16 if low else given[1].dtype]
    worst = max(errors(result, wanted))
    return "" if worst < limit else f"an error of {worst:.1e} of the norm"
