"""The audio codecs and VQGAN tokenizers of transformers on mmfast."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import normal
from patched import assert_same, largest, pair, randomised, results

import mmfast
from mmfast.integrations import unpatch
from mmfast.integrations.transformers import LIBRARY

transformers = pytest.importorskip("transformers")

K, D = 16, 8


def encodec():
    config = transformers.EncodecConfig(
        num_filters=2,
        hidden_size=D,
        codebook_size=K,
        codebook_dim=D,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        sampling_rate=600,
        target_bandwidths=[1.5, 3.0],
    )
    return transformers.EncodecModel(config)


def dac():
    config = transformers.DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=16,
        downsampling_ratios=[4, 2],
        upsampling_ratios=[4, 2],
        n_codebooks=3,
        codebook_size=K,
        codebook_dim=4,
    )
    return transformers.DacModel(config)


def mimi():
    config = transformers.MimiConfig(
        num_filters=2,
        hidden_size=16,
        vector_quantization_hidden_dimension=D,
        codebook_size=K,
        codebook_dim=D,
        num_quantizers=3,
        num_semantic_quantizers=1,
        upsampling_ratios=[4, 2],
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        head_dim=8,
        sampling_rate=800,
        frame_rate=50,
        upsample_groups=16,
    )
    return transformers.MimiModel(config)


MODELS = {"encodec": encodec, "dac": dac, "mimi": mimi}


def model_of(name):
    torch.manual_seed(0)
    return randomised(MODELS[name]()).eval()


def codebooks(report):
    """The entries of codebooks; others are of models whose attention was swapped."""
    return [entry for entry in report.swapped if entry.done != "attention"]


@pytest.mark.parametrize("name", MODELS)
def test_encoding(name):
    plain, patched, report = pair(model_of(name))
    assert report.left == ()
    assert len(codebooks(report)) == {"encodec": 10, "dac": 3, "mimi": 3}[name]
    sound = normal(2, 1, 160, seed=1)

    def run(model, x):
        encoded = model.encode(x)
        return {key: value for key, value in encoded.items() if isinstance(value, torch.Tensor)}

    got, want = run(patched, sound), run(plain, sound)
    assert torch.equal(got["audio_codes"], want["audio_codes"])
    assert len(got["audio_codes"].unique()) > 4
    assert_same(got, want)
    assert_same(dict(patched.state_dict()), dict(plain.state_dict()), exact=True)
    report.undo()
    assert_same(run(patched, sound), run(plain, sound), exact=True)


def test_dac_trains_alike():
    plain, patched, _ = pair(model_of("dac").quantizer.train())
    hidden = normal(2, 16, 20, seed=1)
    assert_same(*(results(m, lambda m, x: m(x), hidden) for m in (patched, plain)))


def test_dac_from_latents():
    plain, patched, _ = pair(model_of("dac"))
    latents = normal(2, 12, 7)
    assert_same(patched.quantizer.from_latents(latents), plain.quantizer.from_latents(latents))
    # Every vector and code has unit norm: the metric is the cosine.
    first = patched.quantizer.quantizers[0]
    _, indices = first.decode_latents(latents[:, :4])
    similar = torch.nn.functional.normalize(latents[:, :4].double(), dim=1).transpose(1, 2)
    codes = torch.nn.functional.normalize(first.codebook.weight.double(), dim=1)
    assert torch.equal(indices, (similar @ codes.T).argmax(-1))


def test_dac_offloaded():
    """accelerate's hooks bring the weights only around the library's own method."""
    plain, patched, report = pair(model_of("dac").quantizer.quantizers[0])
    assert report.entries[0].left == "when accelerate offloads it"
    latents = normal(2, 4, 200)
    small = largest(lambda: patched.decode_latents(latents))
    patched.codebook._hf_hook = None
    assert small < 400 * K <= largest(lambda: patched.decode_latents(latents))
    assert_same(patched.decode_latents(latents), plain.decode_latents(latents))


class Config:
    """The sizes that the quantisers read."""

    codebook_size = num_embeddings = K
    codebook_dim = embed_dim = D
    beta = 0.25
    num_patches = 1


INPUTS = {"Vqgan": (2, D, 3, 5), "Emu3": (2, 3, D, 2, 5), "Euclidean": (30, D)}


def quantizer(name, file):
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    return randomised(getattr(module, name)(Config()))


QUANTIZERS = [
    ("XcodecEuclideanCodebook", "xcodec", "Euclidean"),
    ("WavTokenizerEuclideanCodebook", "wavtokenizer", "Euclidean"),
    ("ChameleonVQVAEVectorQuantizer", "chameleon", "Vqgan"),
    ("JanusVQVAEVectorQuantizer", "janus", "Vqgan"),
    ("Emu3VQVAEVectorQuantizer", "emu3", "Emu3"),
]


@pytest.mark.parametrize(("name", "file", "kind"), QUANTIZERS)
def test_quantizers(name, file, kind):
    plain, patched, report = pair(quantizer(name, file))
    assert report.entries[0].class_name == name
    x = normal(*INPUTS[kind], seed=1)

    def run(model, x):
        return model.quantize(x) if kind == "Euclidean" else model(x)

    assert_same(results(patched, run, x), results(plain, run, x))


def test_all_classes_are_tested():
    names = {name for name, *_ in QUANTIZERS}
    models = {"EncodecEuclideanCodebook", "MimiEuclideanCodebook", "DacVectorQuantize"}
    assert set(LIBRARY.classes) == names | models | {"PreTrainedModel"}


@pytest.mark.parametrize("name", ["encodec", "mimi"])
def test_indices_are_exact(name):
    """A common offset, and half precision: the library's distances have no digits left."""
    _, patched, _ = pair(model_of(name))
    codebook = next(m for m in patched.modules() if type(m).__name__.endswith("EuclideanCodebook"))
    codebook.get_buffer("embed" if name == "encodec" else "embed_sum").add_(1e3)
    for dtype in (torch.float32, torch.bfloat16):
        vectors = (normal(50, D, seed=1) + 1e3).to(dtype)
        want, _ = mmfast.nearest_code(vectors, codebook.embed)
        assert torch.equal(codebook.quantize(vectors), want)
        assert len(want.unique()) > 1


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_frozen(name, tmp_path):
    """A patched model is saved as any other; codebooks without gradients stay without."""
    plain, patched, _ = pair(model_of(name).requires_grad_(False))
    patched.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="is patched"):
        unpatch(loaded)
    sound = normal(2, 1, 160, seed=1)
    want = plain(sound)
    assert torch.equal(loaded(sound).audio_values, want.audio_values)
    assert_same(patched(sound).audio_values, want.audio_values)


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    plain, patched, _ = pair(model_of(name))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (m(normal(2, 1, 160, seed=1)) for m in (patched, plain))
    for key, value in want.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
    assert (got.audio_codes == want.audio_codes).float().mean() > 0.9


@pytest.mark.parametrize("name", MODELS)
def test_compiles(name):
    _, patched, report = pair(model_of(name))
    part = patched.get_submodule(codebooks(report)[0].name)
    method, x = ("decode_latents", normal(2, 4, 7)) if name == "dac" else ("quantize", normal(9, D))
    compiled = torch.compile(getattr(part, method), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), getattr(part, method)(x))
