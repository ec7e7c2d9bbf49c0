"""What all tests share: hypothesis settings, and the tests that need a GPU."""

import hypothesis
import pytest
import torch

# The same examples in every run, and no limit on a single one: machines differ.
hypothesis.settings.register_profile("mmfast", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("mmfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``cuda`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def threads(request):
    """Run the test with so many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """One torch thread: of small tensors beside other tests, more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
