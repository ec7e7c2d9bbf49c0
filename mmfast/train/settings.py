"""All settings of ``mmfast train``, and what is made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from mmfast.data import reader_from
from mmfast.data.sampling import Samples
from mmfast.models import VQVAE, ConditionalDiT, Diffusion, DiT, describe_model, load_model
from mmfast.models.dit import SIZES
from mmfast.nn.codebook import Codebook
from mmfast.train.about import modality_of
from mmfast.train.batches import collated
from mmfast.train.conditional import ConditionalTask
from mmfast.train.config import TrainConfig
from mmfast.train.context import Context
from mmfast.train.dit import DiTTask
from mmfast.train.latents import latent_shape
from mmfast.train.run_folder import model_file
from mmfast.train.sources import Data, DataConfig, TextConfig, cached, open_data
from mmfast.train.state import load_state
from mmfast.train.task import Task
from mmfast.train.typed import check_least, setting
from mmfast.train.vqvae import VQVAETask

PICTURES = 8  # reconstructions that are shown


class Prepared(NamedTuple):
    """What is to be trained, and on what."""

    task: Task
    samples: Samples


@dataclass(frozen=True)
class VQVAEConfig:
    """A VQ-VAE."""

    quantizer: Literal["VectorQuantize", "ResidualVQ", "FSQ", "LFQ", "SimVQ"] = setting(
        "VectorQuantize", "a module of mmfast.nn"
    )
    codebook_size: int = setting(512, "codes; of FSQ it follows from levels")
    latent_dim: int = setting(32, "dimensions of the vectors that are quantised")
    num_quantizers: int = setting(4, "stages of a ResidualVQ")
    levels: tuple[int, ...] = setting((8, 5, 5, 5), "of FSQ")
    decay: float = setting(0.95, "of a codebook's moving averages")
    commitment_weight: float = setting(0.25, "of the loss that pulls vectors to their codes")
    dead_codes: float = setting(1.0, "replace codes used less often in a batch; 0: never")
    kmeans: bool = setting(True, "start the codebook by k-means on the encoder's outputs")
    codebook_start: int = setting(0, "steps without a quantiser before that")
    decoder_only: bool = setting(False, "train the decoder alone, after that")
    weights: str | None = setting(None, "file or run of a VQ-VAE, to start from its weights")
    widths: tuple[int, ...] = setting((32, 64, 128), "channels; each after the first halves sizes")
    num_blocks: int = setting(2, "residual blocks of each width")
    block_size: int = setting(1, "side of blocks of values that are channels first")
    shortcut: bool = setting(False, "linear maps beside encoder and decoder, of blocks")
    norm: bool = setting(True, "group norms; without, tiles of large files equal the whole")
    reconstruction: Literal["l1", "l2"] = setting("l2", "loss")
    quantizer_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_least(
            self, codebook_size=1, latent_dim=1, num_quantizers=1, num_blocks=1, codebook_start=0
        )
        check_least(self, commitment_weight=0, dead_codes=0)

    def described(self) -> dict[str, Any]:
        """The quantiser as :class:`mmfast.models.VQVAE` takes it; ``quantizer_options`` has further
        arguments of it."""
        codebook = {
            "decay": self.decay,
            "commitment_weight": self.commitment_weight,
            "threshold_ema_dead_code": self.dead_codes,
            "kmeans_init": self.kmeans,
        }
        size = {"codebook_size": self.codebook_size}
        options: dict[str, dict[str, Any]] = {
            "VectorQuantize": {**size, **codebook},
            "ResidualVQ": {**size, **codebook, "num_quantizers": self.num_quantizers},
            "FSQ": {"levels": list(self.levels)},
            "LFQ": size,
            "SimVQ": size,
        }
        given = {"dim": self.latent_dim, **options[self.quantizer], **self.quantizer_options}
        return {"type": self.quantizer, **given}


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer, conditioned on a class, a text or codes."""

    vqvae: str | None = setting(None, "file or run of a VQ-VAE, to work on its latents")
    cache_latents: bool = setting(True, "encode the data once, unless it is cut or mirrored")
    preset: Literal["S", "B", "L", "XL"] | None = setting(None, "hidden_size, depth, num_heads")
    hidden_size: int = setting(384, "channels of the tokens")
    depth: int = setting(12, "blocks")
    num_heads: int = setting(6, "of the attention")
    patch_size: int = setting(2, "side of what is a token")
    class_dropout: float = setting(0.1, "probability that a condition is dropped, for guidance")
    learn_sigma: bool = setting(False, "predict variances too")
    guidance: float = setting(2.0, "of the samples that are shown")
    sampler: str | None = setting(None, "of those; docs/samplers.md has them")
    sampler_steps: int = setting(25, "of those")
    condition: Literal["label", "text", "codes"] = setting(
        "label", "what it is told: a class, a text, or codes of another modality"
    )
    context_vqvae: str | None = setting(None, "file or run of the VQ-VAE that makes those codes")
    conditioning: Literal["cross", "joint"] = setting("cross", "attention to a text or codes")

    def __post_init__(self) -> None:
        check_least(self, hidden_size=1, depth=1, num_heads=1, patch_size=1, sampler_steps=1)
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout must be from 0 to 1, got {self.class_dropout}")

    def context(self, data: DataConfig, text: TextConfig) -> Context | None:
        """What the model is conditioned on beside a class.

        Raises:
            FileError, FileNotFoundError: there is no such tokenizer or VQ-VAE.
            TypeError, ValueError: settings do not fit each other.
        """
        if (self.condition == "codes") != (self.context_vqvae is not None):
            raise ValueError("--condition codes and --context-vqvae go together")
        if self.condition == "text":
            return Context(text.make_reader(data))
        if self.context_vqvae is None:
            return None
        about = describe_model(model_file(self.context_vqvae))["about"].get("data") or {}
        reader = reader_from(about.get("modalities", {}).get(modality_of(about), {}))
        return Context(reader, _vqvae(self.context_vqvae))


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a diffusion model learns."""

    noise: str = setting("flow", "flow, linear, scaled_linear, squared_cosine, ...")
    prediction: Literal["epsilon", "v_prediction", "flow_prediction", "sample"] | None = setting(
        None, "flow_prediction of flows by default, else epsilon"
    )
    times: Literal["uniform", "logit_normal"] = setting("uniform", "which noise levels")
    shift: float = setting(1.0, "of a flow's times")
    weighting: Literal["min_snr", "soft_min_snr", "max_snr"] | None = setting(None, "of the loss")
    diffusion: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Diffusion:
        """The objective; ``diffusion`` has further arguments of :class:`mmfast.models.Diffusion`.

        Raises:
            ValueError: options do not go together.
        """
        options = {name: getattr(self, name) for name in ("prediction", "times", "shift")}
        options |= {"schedule": self.noise, "weighting": self.weighting, **self.diffusion}
        known = {f.name for f in dataclasses.fields(Diffusion) if f.init}
        for name in options.keys() - known:
            raise ValueError(f"diffusion: unknown setting {name!r}")
        return Diffusion(**options)


@dataclass(frozen=True)
class VQVAERun:
    """Settings of ``mmfast train vqvae``."""

    data: DataConfig = field(default_factory=DataConfig)
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def open(self) -> Data:
        """The data."""
        return open_data(self.data, self.train.seed)

    def prepare(self, data: Data, device: torch.device) -> Prepared:
        """The task.

        Raises:
            TypeError, ValueError: settings do not fit each other or the data.
        """
        config = self.model
        torch.manual_seed(self.train.seed)
        model = VQVAE(
            config.described(),
            config.latent_dim,
            channels=data.shape[0],
            spatial_dims=len(data.shape) - 1,
            widths=config.widths,
            num_blocks=config.num_blocks,
            reconstruction=config.reconstruction,
            patch_size=config.block_size,
            shortcut=config.shortcut,
            norm="group" if config.norm else None,
        )
        if config.weights is not None:
            _start_from(model, config.weights)
        latent_shape(model, data.about)
        shown = collated(data.test, range(min(PICTURES, len(data.test))))
        pictures = shown[modality_of(data.about)]
        task = VQVAETask(
            model,
            data.about,
            pictures=pictures,
            codebook_start=config.codebook_start,
            decoder_only=config.decoder_only,
        )
        return Prepared(task, data.train)


@dataclass(frozen=True)
class DiTRun:
    """Settings of ``mmfast train dit``."""

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: DiTConfig = field(default_factory=DiTConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def open(self) -> Data:
        """The data, with what the model is conditioned on."""
        context = self.model.context(self.data, self.text)
        return open_data(self.data, self.train.seed, context)

    def prepare(self, data: Data, device: torch.device) -> Prepared:
        """The task.

        Args:
            data: to train on.
            device: to encode it on.

        Raises:
            FileNotFoundError: there is no such VQ-VAE.
            TypeError, ValueError: settings do not fit each other or the data.
        """
        config = self.model
        vqvae = None
        if config.vqvae is not None:
            vqvae = _vqvae(config.vqvae)
        channels, *sizes = latent_shape(vqvae, data.about)
        named = {name: getattr(config, name) for name in ("hidden_size", "depth", "num_heads")}
        common: dict[str, Any] = {
            **(SIZES[config.preset] if config.preset else named),
            "learn_sigma": config.learn_sigma,
        }
        shown = {name: getattr(config, name) for name in ("guidance", "sampler", "sampler_steps")}
        learnt = self.objective.make(), data.about
        torch.manual_seed(self.train.seed)
        task: DiTTask
        if data.context is None:
            model = DiT(
                sizes,
                config.patch_size,
                channels,
                **common,
                num_classes=max(1, data.classes),
                class_dropout_prob=config.class_dropout if data.classes else 0.0,
            )
            task = DiTTask(model, *learnt, vqvae=vqvae, **shown)
        else:
            conditional = ConditionalDiT(
                sizes,
                config.patch_size,
                channels,
                **common,
                conditioning=config.conditioning,
                context_codes=data.context.num_codes,
                context_size=data.context.size,
                context_dropout_prob=config.class_dropout,
            )
            pictures = collated(data.test, range(min(PICTURES, len(data.test))))
            task = ConditionalTask(
                conditional, *learnt, data.context, vqvae=vqvae, **shown, shown=pictures
            )
        if vqvae is not None and config.cache_latents and not data.augmented:
            for part in task.parts.values():
                part.to(device)
            return Prepared(task, cached(task.encoded, data.train, device))
        return Prepared(task, data.train)


def _vqvae(path: str) -> VQVAE:
    """The VQ-VAE in a file or in a run's folder."""
    return load_model(model_file(path), VQVAE)


def _start_from(model: VQVAE, path: str) -> None:
    """Give a VQ-VAE another one's weights; without its codebook, where k-means is to make one."""
    weights = _vqvae(path).state_dict()
    if any(not bool(m.initted) for m in model.modules() if isinstance(m, Codebook)):
        own = model.state_dict()
        weights = {n: own[n] if n.startswith("quantizer.") else t for n, t in weights.items()}
    load_state(model, weights, path)
