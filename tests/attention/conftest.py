"""TPU kernels are interpreted. Compiling them so takes long: tests that add little are `long` or `slow` for them."""

import pytest

from tests.attention.interpreter import interpreted


@pytest.fixture(autouse=True)
def _interpreted_kernels(request):
    """Of tests whose backend they are, to the end, as a backward pass may be traced long after its forward one."""
    if not _has_interpreted(request.node):
        yield
        return
    with interpreted():
        yield


def _has_interpreted(item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backends = parameters.get("backends", ())  # of an empty list, a marker of pytest's that none is
    return "pallas_tpu" in (parameters.get("backend"), *(backends if isinstance(backends, list) else ()))


def pytest_configure(config):
    for name in ("slow", "long"):
        config.addinivalue_line(
            "markers", f"{name}_interpreted(parameters): {name} for interpreted TPU kernels; all, if none"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if not _has_interpreted(item):
            continue
        parameters = item.callspec.params
        for name in ("slow", "long"):
            given = item.get_closest_marker(f"{name}_interpreted")
            if given and (not given.args or any(value in given.args for value in parameters.values())):
                item.add_marker(getattr(pytest.mark, name))
