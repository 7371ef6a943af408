"""Runs a command for as long as whoever started it lives: ``python guard.py COMMAND…``.

A worker of Ray can be killed at any moment, and what it had started would go on without it, holding memory and a device. The
worker keeps the other end of this process's standard input open, and so its end, whatever it is, is seen here.

Stands alone: it is run by its path, and imports nothing but the standard library.
"""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType


def main(command: list[str]) -> int:
    """Returns the command's exit code, as a shell tells it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end(_signal: int, _frame: FrameType | None) -> None:
        child.terminate()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        child.kill()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
