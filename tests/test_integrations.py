"""patch and unpatch: what they find, bind, report and take back."""

from __future__ import annotations

import ast
import copy
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch
from cases import normal
from patched import assert_same, own_methods, randomised
from test_integrations_taming import Taming, Taming2
from torch import nn

import mmfast.integrations
from mmfast.integrations import PatchReport, patch, unpatch


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 1)
        self.stages = nn.ModuleList([Taming2(16, 4, 0.25), Taming(16, 4, 0.25)])
        randomised(self)

    def forward(self, image):
        z = self.encoder(image)
        return [stage(z) for stage in self.stages]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


IMAGE = normal(2, 3, 4, 4)


def patched_stages(model):
    return [bool(list(own_methods(stage))) for stage in model.stages]


def test_report(model):
    report = patch(model)
    assert isinstance(report, PatchReport)
    assert [entry.name for entry in report.swapped] == ["stages.0", "stages.1"]
    assert [entry.class_name for entry in report.swapped] == ["VectorQuantizer2", "VectorQuantizer"]
    assert report.left == ()
    text = str(report)
    assert text.startswith("2 of 2 modules run on mmfast\n")
    assert "stages.1" in text
    assert "forward (as Taming)" in text
    assert max(map(len, text.splitlines())) <= 110


def test_undo(model):
    want = model(IMAGE)
    keys = list(model.state_dict())
    report = patch(model)
    assert patched_stages(model) == [True, True]
    assert_same(model(IMAGE), want)
    assert list(model.state_dict()) == keys
    report.undo()
    assert patched_stages(model) == [False, False]
    assert_same(model(IMAGE), want, exact=True)
    report.undo()  # a second time does nothing


def test_with_block(model):
    with patch(model) as report:
        assert len(report.swapped) == 2
        assert patched_stages(model) == [True, True]
    assert patched_stages(model) == [False, False]


def test_unpatch(model):
    patch(model)
    twin = copy.deepcopy(model)
    unpatch(model)
    assert patched_stages(model) == [False, False]
    assert patched_stages(twin) == [True, True]
    unpatch(twin.stages[0])
    assert patched_stages(twin) == [False, True]
    with pytest.raises(ValueError, match="nothing in Model is patched"):
        unpatch(model)


def test_a_copy_is_patched_and_its_own(model):
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.stages[0].embedding.weight.mul_(2)
    assert not torch.equal(twin(IMAGE)[0][0], model(IMAGE)[0][0])
    unpatch(model)
    unpatched = copy.deepcopy(twin)
    unpatch(unpatched)
    assert_same(twin(IMAGE), unpatched(IMAGE))


def test_moves_with_the_model(model):
    twin = copy.deepcopy(model).double()
    patch(model)
    assert_same(model.double()(IMAGE.double()), twin(IMAGE.double()))


def test_hooks_stay(model):
    seen = []
    model.stages[0].register_forward_hook(lambda *_: seen.append("hook"))
    patch(model)
    model(IMAGE)
    assert seen == ["hook"]


def test_twice(model):
    first = patch(model)
    second = patch(model)
    assert second.entries == first.entries
    second.undo()  # it did nothing
    assert patched_stages(model) == [True, True]
    first.undo()
    assert patched_stages(model) == [False, False]


def test_a_pickled_model_is_unpatched(model):
    patch(model)
    stored = io.BytesIO()
    pickle.dump(model, stored)
    stored.seek(0)
    loaded = pickle.load(stored)
    with pytest.raises(ValueError, match="is patched"):
        unpatch(loaded)
    assert_same(loaded(IMAGE), model(IMAGE))
    assert len(patch(loaded).swapped) == 2


def test_what_others_replaced_is_left(model):
    first = model.stages[0]
    first.forward = lambda z: z
    report = patch(model)
    assert [entry.left for entry in report.left] == [
        "something else has replaced forward on this module"
    ]
    assert first(IMAGE) is IMAGE


def test_undo_after_others_replaced(model):
    report = patch(model)
    ours = model.stages[0].forward
    model.stages[0].forward = lambda z: ours(z)
    with pytest.raises(RuntimeError, match=r"after the patch: VectorQuantizer2\.forward; remove"):
        report.undo()
    assert patched_stages(model) == [True, False]
    del model.stages[0].forward
    report.undo()


def test_nothing_found(monkeypatch):
    """Nor does looking import a library."""
    libraries = ("vector_quantize_pytorch", "diffusers", "transformers")
    for name in list(sys.modules):
        if name.partition(".")[0] in libraries:
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="nothing in Linear can be swapped") as error:
        patch(nn.Linear(2, 2))
    for library in libraries:
        assert f"  {library} (not imported): " in error.value.args[0]
        assert library not in sys.modules


def test_files_import_no_library():
    for file in Path(mmfast.integrations.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names}
            assert roots <= sys.stdlib_module_names | {"torch", "rich", "mmfast"}


def test_libraries(model):
    with pytest.raises(ValueError, match=r"Looked for:\n  diffusers.*: VectorQuantizer, .*$"):
        patch(model, libraries=["diffusers"])
    assert patched_stages(model) == [False, False]
    assert len(patch(model, libraries=["diffusers", "taming"]).swapped) == 2
    with pytest.raises(ValueError, match=r"libraries must be among .*taming, .*, got 'tamming'"):
        patch(model, libraries=["tamming"])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        patch({})
