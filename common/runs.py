"""How commands start and end, and what a run folder is."""

import sys
import traceback

from common.images import UserError


class RunStopped(Exception):
    """Work that cannot go on though its input was right, such as a diverged training or a dead worker: one line, status 1."""


def run_command(command, *arguments, leave=sys.exit):
    """Runs `command(*arguments)` as the whole of a script, and ends with `leave(status)` where it fails.

    One line on stderr and status 2: a `UserError`, or the operating system's refusal about a path (no space, no permission).
    One line and status 1: `RunStopped`. Anything else is a bug of ours: its traceback and status 1."""
    try:
        command(*arguments)
        return
    except UserError as error:
        message, status = str(error), 2
    except RunStopped as error:
        message, status = str(error), 1
    except OSError as error:
        named = error.errno is not None and error.filename is not None
        message, status = (f"{error.filename}: {error.strerror}", 2) if named else (None, 1)
        if not named:
            traceback.print_exc()
    except Exception:
        message, status = None, 1
        traceback.print_exc()
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    leave(status)
