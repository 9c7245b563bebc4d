"""Compiling interpreted TPU kernels takes long: of their tests, those that add least are slow."""

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "slow_interpreted(parameters): slow for interpreted TPU kernels; all, if none")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backends = parameters.get("backends", ())  # of an empty list, a marker of pytest's that none is
        if "pallas_tpu" not in (parameters.get("backend"), *(backends if isinstance(backends, list) else ())):
            continue
        slow = item.get_closest_marker("slow_interpreted")
        if slow and (not slow.args or any(value in slow.args for value in parameters.values())):
            item.add_marker(pytest.mark.slow)
