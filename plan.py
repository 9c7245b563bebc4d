"""Says what a run would need on chips elsewhere: `moc-plan` from a clone. `python plan.py --help` says how."""

import sys

if sys.version_info < (3, 12):  # noqa: UP036 - outside the environment it may be any
    sys.exit("error: this needs Python 3.12 or newer: run `make setup` once, then .venv/bin/python plan.py")
if __name__ == "__main__":
    sys.path.insert(0, __file__.rpartition("/")[0])  # where python -P and -I don't look by themselves
    from moc_jax.cli import plan

    plan()
