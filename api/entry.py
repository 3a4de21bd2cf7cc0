"""What the command `gateway` starts: as little as possible before a Ctrl-C is answered quietly."""

import sys


def main() -> None:
    """Runs the command line; an interrupt while it is still being read ends it without a word."""
    try:
        from api.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
