"""Models as files: there and back, and files that are something else."""

from __future__ import annotations

import pytest
import torch
from cases import normal

import mmfast.nn
from mmfast.files import replacing, write_whole
from mmfast.models import VQVAE, DiT, describe_model, load_model, save_model

QUANTIZER = {"type": "VectorQuantize", "dim": 4, "codebook_size": 8}


def vqvae():
    torch.manual_seed(0)
    return VQVAE(QUANTIZER, 4, widths=(4, 8), num_blocks=1).eval()


def dit():
    torch.manual_seed(0)
    return DiT(8, 2, 3, hidden_size=16, depth=2, num_heads=2, num_classes=5).eval()


def test_vqvae_there_and_back(tmp_path):
    model, x = vqvae(), normal(2, 3, 8, 8)
    save_model(model, tmp_path / "model.safetensors", data={"size": 8})
    loaded = load_model(tmp_path / "model.safetensors", VQVAE)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    described = describe_model(tmp_path / "model.safetensors")
    assert described["about"] == {"data": {"size": 8}}
    assert described["config"]["widths"] == [4, 8]
    assert loaded.config["quantizer"] == QUANTIZER


def test_dit_there_and_back(tmp_path):
    model = dit()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert isinstance(loaded, DiT)
    inputs = normal(2, 3, 8, 8), torch.tensor([3, 5]), torch.tensor([0, 4])
    assert torch.equal(loaded(*inputs), model(*inputs))


def test_a_model_built_with_a_module_is_refused(tmp_path):
    model = VQVAE(mmfast.nn.FSQ([4, 4], dim=4), 4, widths=(4, 8))
    with pytest.raises(TypeError, match="describe a quantizer by a mapping"):
        save_model(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantizer", [{}, {"type": "Nothing"}, {"type": "ranks"}])
def test_an_unknown_quantizer_is_refused(quantizer):
    with pytest.raises(ValueError, match="quantizer must have a type"):
        VQVAE(quantizer, 4)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(path)
    write_whole(path, b"something else")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_model(path)
    save_model(vqvae(), path)
    with pytest.raises(TypeError, match="holds a VQVAE, expected a DiT"):
        load_model(path, DiT)
    write_whole(path, path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        load_model(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_bytes(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_models_inside_of_a_file(tmp_path):
    """Parts have weights of their own beside the model's, also of the same names."""
    model, part = vqvae(), VQVAE(QUANTIZER, 4, widths=(4, 8), num_blocks=1)
    path = tmp_path / "model.safetensors"
    save_model(model, path, parts={"first": part}, data=1)
    assert describe_model(path)["parts"].keys() == {"first"}
    for loaded, saved in ((load_model(path), model), (load_model(path, part="first"), part)):
        assert loaded.state_dict().keys() == saved.state_dict().keys()
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    with pytest.raises(KeyError, match="has no part 'second'; it has first"):
        load_model(path, part="second")
    with pytest.raises(TypeError, match="holds a VQVAE, expected a DiT"):
        load_model(path, DiT, part="first")
