"""Compiling interpreted TPU kernels takes long: of their tests, those that add little are `long` or `slow`."""

import pytest


def pytest_configure(config):
    for name in ("slow", "long"):
        config.addinivalue_line(
            "markers", f"{name}_interpreted(parameters): {name} for interpreted TPU kernels; all, if none"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backends = parameters.get("backends", ())  # of an empty list, a marker of pytest's that none is
        if "pallas_tpu" not in (parameters.get("backend"), *(backends if isinstance(backends, list) else ())):
            continue
        for name in ("slow", "long"):
            given = item.get_closest_marker(f"{name}_interpreted")
            if given and (not given.args or any(value in given.args for value in parameters.values())):
                item.add_marker(getattr(pytest.mark, name))
