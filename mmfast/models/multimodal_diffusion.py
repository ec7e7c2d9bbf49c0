"""Training and sampling of a multimodal diffusion transformer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mmfast
from mmfast.models.diffusion import START_STREAM, Diffusion, evaluating
from mmfast.models.multimodal import MultimodalDiT, Named
from mmfast.models.noising import uniform
from mmfast.schedule import SamplerTable, sample

# Random numbers of one kind are others than those of the noise, whose offset is the step.
_ROLES_STREAM = 3 << 60
_MODALITY_STREAM = 1 << 48  # times the modality's number: noise and times of its own


@dataclasses.dataclass(frozen=True)
class MultimodalDiffusion:
    """Any subset of the modalities is generated from the others, which are clean or absent.

    Args:
        diffusion: of all modalities; or its ``config``.
        target: probability with which a modality is to be generated, at least one of each sample.
            Others are clean: conditions.
        drop: probability with which a sample loses all its conditions, and another time with which
            it loses each of them: for guidance, and for modalities that are not given.
        weights: of the modalities' losses, by name; 1 for others.

    Raises:
        ValueError: a probability is not from 0 to 1.
    """

    diffusion: Diffusion = dataclasses.field(default_factory=lambda: Diffusion("flow"))
    target: float = 0.5
    drop: float = 0.1
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.diffusion, Mapping):
            object.__setattr__(self, "diffusion", Diffusion(**self.diffusion))
        for name in ("target", "drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, as JSON knows them."""
        return {
            "diffusion": self.diffusion.config,
            "target": self.target,
            "drop": self.drop,
            "weights": dict(self.weights),
        }

    def losses(
        self,
        model: nn.Module,
        data: Named,
        *,
        lengths: Named | None = None,
        seed: int | Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> dict[str, Tensor]:
        """``"loss"``, to be minimised, and the mean loss of each modality where it was a target.

        Args:
            model: a :class:`MultimodalDiT`, maybe compiled or inside of DistributedDataParallel.
            data: by modality, ``(B, ...)``: arrays of patches, ids of tokens. What is absent in
                some samples has any finite numbers there.
            lengths: of some modalities, ``(B,)``, int64: how many tokens are there; 0: it is
                absent. Or bool: whether it is there.
            seed, offset: of :meth:`Diffusion.noised`.

        Returns:
            By name, ``()``, float32.

        Raises:
            TypeError, ValueError: a tensor's dtype or shape does not fit its modality.
        """
        own = _unwrapped(model)
        names = [name for name in own.modalities if name in data]
        if not names or len(names) != len(data):
            raise ValueError(f"data must be of {', '.join(own.modalities)}, got {', '.join(data)}")
        clean = {name: own.modality(name).numbers(data[name]) for name in names}
        there = _lengths(own, lengths or {}, names)
        like = clean[names[0]]
        batch, device = like.shape[0], like.device
        if seed is None:
            seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), device=device)
        present = torch.stack(
            [
                there[name] > 0 if name in there else torch.ones(batch, device=device) > 0
                for name in names
            ],
            1,
        )
        targets, dropped = self._roles(present, seed, offset)
        noised, numbers, times = {}, {}, {}
        for i, name in enumerate(names):
            stream = offset + _MODALITY_STREAM * list(own.modalities).index(name)
            made = noised[name] = self.diffusion.noised(clean[name], seed=seed, offset=stream)
            target = targets[:, i]
            lead = (-1, *[1] * (clean[name].dim() - 1))
            numbers[name] = torch.where(target.view(lead), made.noisy, clean[name])
            times[name] = torch.where(target, made.timesteps.float(), 0)
        seen = {
            name: torch.where(dropped[:, i], 0, there.get(name, own.modality(name).length))
            for i, name in enumerate(names)
        }
        outputs = model(numbers, times, seen)
        total, result = torch.zeros(batch, device=device), {}
        for i, name in enumerate(names):
            partly = own.there(name, there, like) if name in there else None
            losses = own.modality(name).losses(outputs[name], data[name], noised[name], partly)
            losses = torch.where(targets[:, i], losses, 0)
            total = total + self.weights.get(name, 1.0) * losses
            result[name] = losses.sum() / targets[:, i].sum().clamp(min=1)
        return {"loss": (total / targets.sum(1).clamp(min=1)).mean(), **result}

    def _roles(
        self, present: Tensor, seed: int | Tensor, offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which modalities are targets, and which conditions are dropped, each ``(B, M)``, bool."""
        batch, count = present.shape
        device = present.device
        draws = uniform((batch, 2 * count + 1), seed, offset + _ROLES_STREAM, device)
        draw, drop, drop_all = draws.split([count, count, 1], 1)
        least = torch.where(present, draw, 2).amin(1, keepdim=True)
        targets = present & ((draw < self.target) | (draw == least))
        return targets, ~targets & ((drop < self.drop) | (drop_all < self.drop))

    def loss(self, model: nn.Module, data: Named, **options: Any) -> Tensor:
        """That of :meth:`losses`, ``()``."""
        return self.losses(model, data, **options)["loss"]

    def generate(
        self,
        model: MultimodalDiT,
        want: Sequence[str],
        given: Named | None = None,
        *,
        batch: int | None = None,
        lengths: Named | None = None,
        guidance: float | Tensor = 1.0,
        sampler: str | None = None,
        steps: int = 50,
        seed: int | Tensor = 0,
        table: SamplerTable | None = None,
        progress: bool = True,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Draw samples of some modalities together; the model is in evaluation mode meanwhile.

        Args:
            model: trained with :meth:`losses`.
            want: names of the modalities.
            given: others, by name, as ``data`` of :meth:`losses`. What is in neither is absent.
            batch: B, if nothing is given.
            lengths: as of :meth:`losses`.
            guidance: the scale of classifier-free guidance against nothing given, a number or
                ``(B,)``; 1 is none.
            sampler, steps, seed, table, progress, options: as of :meth:`Diffusion.sample`.

        Returns:
            By name: arrays ``(B, channels, *size)``, float32, or ids ``(B, L)``.

        Raises:
            ValueError: nothing or an unknown modality is wanted, or one that is given.
        """
        given, want = dict(given or {}), list(want)
        parameter = next(model.parameters())
        device = parameter.device
        if not want or set(want) & set(given) or len(set(want)) != len(want):
            raise ValueError(f"want must name others than those given, got {want} and {[*given]}")
        shapes = [model.modality(name).shape for name in want]
        sizes = [math.prod(shape) for shape in shapes]
        clean = {name: model.modality(name).numbers(v.to(device)) for name, v in given.items()}
        counts = {len(v) for v in clean.values()} | (set() if batch is None else {batch})
        if len(counts) != 1:
            raise ValueError(f"given and batch must say one B, got {sorted(counts) or 'neither'}")
        (count,) = counts
        seen = _lengths(model, lengths or {}, [*want, *given], device)
        guided = isinstance(guidance, Tensor) or guidance != 1
        if guided:
            clean, seen = _for_guidance(model, clean, seen, count)
        clean = {name: v.to(parameter.dtype) for name, v in clean.items()}
        if table is None:
            table = self.diffusion.table(sampler, steps, **options)

        def call(x: Tensor, t: Tensor) -> Tensor:
            parts = [
                part.unflatten(1, shape)
                for part, shape in zip(x.split(sizes, 1), shapes, strict=True)
            ]
            noisy = dict(zip(want, parts, strict=True))
            times = dict.fromkeys(want, t) | dict.fromkeys(clean, torch.zeros_like(t))
            outputs = model(noisy | clean, times, seen, wanted=want)
            made = [
                model.modality(name).prediction(outputs[name], noisy[name], t, self.diffusion)
                for name in want
            ]
            return torch.cat([part.flatten(1).to(x.dtype) for part in made], 1)

        if isinstance(seed, Tensor):
            seed = seed.to(device)
        noise = mmfast.randn((count, sum(sizes)), seed=seed, offset=START_STREAM, device=device)
        with evaluating(model):
            drawn = sample(
                call,
                noise,
                table,
                guidance_scale=guidance,
                seed=seed,
                progress=progress,
                dtype=parameter.dtype,
            )
        parts = [
            part.unflatten(1, shape)
            for part, shape in zip(drawn.split(sizes, 1), shapes, strict=True)
        ]
        return {
            name: model.modality(name).data(part) for name, part in zip(want, parts, strict=True)
        }


def _unwrapped(model: nn.Module) -> MultimodalDiT:
    own = model if hasattr(model, "modalities") else getattr(model, "module", model)
    if not hasattr(own, "modalities"):
        raise TypeError(f"model must be a MultimodalDiT, got {type(model).__name__}")
    return own  # type: ignore[return-value]


def _lengths(
    model: MultimodalDiT,
    lengths: Named,
    names: Sequence[str],
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """As numbers of tokens, also those that say whether a modality is there."""
    made = {}
    for name, given in lengths.items():
        if name not in names:
            raise ValueError(f"lengths are of {name!r}, which is not among {', '.join(names)}")
        whole = given.to(torch.int64) * model.modality(name).length
        made[name] = (whole if given.dtype == torch.bool else given).to(device or given.device)
    return made


def _for_guidance(
    model: MultimodalDiT, clean: Named, lengths: Named, batch: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Twice the batch, in whose first half what is given is absent."""
    seen = {}
    for name in {*clean, *lengths}:
        if name in lengths:
            length = lengths[name]
        else:
            full = model.modality(name).length
            length = torch.full((batch,), full, device=clean[name].device)
        seen[name] = torch.cat([torch.zeros_like(length) if name in clean else length, length])
    return {name: torch.cat([v, v]) for name, v in clean.items()}, seen
