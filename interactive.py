"""Runs inside another program: a notebook, a REPL, a loop over settings.

    import interactive, lco
    folder = interactive.run(lco, steps=10, lr=1e-4)        # python lco.py --steps 10 --lr 1e-4

The process goes on whatever happens: errors are raised, and Ctrl-C does afterwards what it did before.
"""

import signal
import sys
import threading
from pathlib import Path

import common  # before torch: it sets how OpenMP threads wait

import torch.distributed as dist


def run(script, **settings) -> Path:
    """The run of a script with the settings of its bare command, but for those given; returns its folder.

    Ctrl-C ends it after the step, with a checkpoint, and a second one at once; either raises KeyboardInterrupt.
    """
    words = [[f"--{k}", *map(str, v)] if isinstance(v, list) else [f"--{k}={v}"] for k, v in settings.items()]
    args = common.parse(script.Args, script.BUILTIN, sum(words, []))
    argv, path, hook, handler = sys.argv, list(sys.path), sys.excepthook, signal.getsignal(signal.SIGINT)
    common.join(args.device, alone=True)
    in_main = threading.current_thread() is threading.main_thread()  # no other one may set what a signal does
    try:
        sys.argv = [Path(script.__file__).name, *sum(words, [])]  # what the folder keeps as its command
        if in_main:
            signal.signal(signal.SIGINT, _on_interrupt)
        common.prepare(args.device)
        (script.train if hasattr(script, "train") else script.evaluate)(args)
        return common._folder
    except SystemExit as stop:
        raise KeyboardInterrupt("stopped after a step, with a checkpoint") from stop
    except BaseException:
        common._remove_unused_folder()
        raise
    finally:
        sys.argv, sys.path, sys.excepthook = argv, path, hook  # torch writes the rank before each line of a traceback
        if in_main:
            signal.signal(signal.SIGINT, handler)
        common._stop.clear()
        dist.destroy_process_group()


def _on_interrupt(number, frame) -> None:
    if common._stop.is_set():
        raise KeyboardInterrupt
    common._on_signal(number, frame)
