"""`python -m metal_marlin COMMAND …`: the program's commands."""

import signal
import sys

from metal_marlin import _native


def main(*before: str) -> int:
    """Runs the program with the command line's arguments, and `before` in front of them. Returns its exit status."""
    # Ctrl-C is the program's. Python would wait until that is done.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _native.main(["metal-marlin", *before, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
