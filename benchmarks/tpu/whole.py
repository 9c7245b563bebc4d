"""Compiles the reference scene's attention for a TPU: python -m benchmarks.tpu.whole CHIP PART FILE

PART is one of real_sizes.py. The process's environment must be `compiler.environment()`. FILE gets the program's text.
"""

import pathlib
import sys

from benchmarks.tpu.real_sizes import SCENES, program
from benchmarks.tpu.worker import compiled


def main(chip: str, part: str, file: str) -> None:
    """In bfloat16, 12 heads of 128."""
    text = compiled(chip, *program(SCENES["multi_shot"], part, chip)).as_text()
    assert text is not None
    pathlib.Path(file).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
