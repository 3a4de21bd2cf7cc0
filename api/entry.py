"""What the command `gateway` starts: as little as possible before a Ctrl-C is answered quietly."""

import os
import sys


def main() -> None:
    """Runs the command line; an interrupt while it is still being read ends it without a word."""
    try:
        if len(sys.argv) == 3 and sys.argv[1] == "alive":  # runs every few seconds, and needs none of the rest
            from api.alive import PARTS, tell

            if sys.argv[2] in PARTS:
                sys.exit(tell(sys.argv[2], os.environ))
        from api.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
