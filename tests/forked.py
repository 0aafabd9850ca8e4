"""What a forked process of conftest.run_forked does; alone in a module, because the process imports it first."""

import os
import runpy
import sys
from pathlib import Path


def be(words: list[str], logs: list[str], env: dict) -> None:
    """This process becomes `python words...`, with its two outputs in files and `env` added to the environment."""
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= {name: str(value) for name, value in env.items()}
    sys.argv = words
    sys.path[:] = [path for path in sys.path if "pytest-of-" not in path]  # reward files of other tests
    sys.path[:0] = [os.path.dirname(words[0]), str(Path(__file__).resolve().parent.parent)]  # tests put others first
    runpy.run_path(words[0], run_name="__main__")
