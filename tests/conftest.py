"""What all tests share: hypothesis settings, and what tests on a GPU need."""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator

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


_SENT = 1.0  # seconds, after which what a test came to is with whoever deals out tests


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--limit``, for tests that several processes share: whoever deals them out names the test at
    which one of these ends, and has another one go on."""
    parser.addoption(
        "--limit", type=float, help="seconds of a test, after which its process is ended"
    )


def is_lost() -> bool:
    """Whether an error has made the device useless to this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A kernel that never ends, or that spoils all calls behind it, costs its own test alone."""
    limit = item.config.getoption("--limit")
    if limit is None:
        return (yield)
    marker = item.get_closest_marker("cuda")
    seconds = marker.kwargs.get("seconds", limit) if marker else limit
    # Ends the process from a thread of its own, whatever this one waits for.
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if is_lost():
        time.sleep(_SENT)
        os._exit(1)
    return result


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
