"""What two stages share: pictures and videos (images), tensors in files (weights), run folders (runs),
measures (metrics).

The scripts import this package before the libraries that take seconds to load, so that Ctrl-C meanwhile is
one line."""

import os
import signal
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def end_now(number, frame):
    """The handler of a signal that finds nothing to save."""
    os.write(2, f"\nstopped by {signal.Signals(number).name} before there was anything to save\n".encode())
    os._exit(128 + number)


def end_at_signals():
    """From now on Ctrl-C, SIGTERM and SIGHUP end this process at once, with one line and status 128 + their
    number.

    Only in our own commands, and only those signals that nobody has given another meaning (nohup ignores
    SIGHUP)."""
    script = getattr(sys.modules["__main__"], "__file__", None)  # none in a worker
    if not script or os.path.dirname(os.path.abspath(script)) != _ROOT:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_now)


end_at_signals()
