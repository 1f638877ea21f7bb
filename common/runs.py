"""How commands start and end, and what a run folder is."""

import dataclasses
import math
import sys
import traceback
import typing

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


def check_numbers(config, intervals: dict[str, str], called=lambda field: "--" + field.replace("_", "-")):
    """Raises UserError, naming the flag, where a number of the dataclass `config` makes no sense.

    `intervals` holds the names of all its fields of numbers, by the interval in which they must lie:
    {"[1, inf)": "steps batch", "[0, 1)": "ema"}. Integers lie below 2**31 where the interval is open above, and
    floats in the range of float32 in any case; None passes where the field may be None; every entry of a
    tuple is checked. A message calls a field `called(field)`. Raises KeyError for a field of numbers that
    has no interval."""
    interval_of = {field: interval for interval, fields in intervals.items() for field in fields.split()}
    for field in dataclasses.fields(config):
        kinds = (field.type, *typing.get_args(field.type))
        value = getattr(config, field.name)
        if int not in kinds and float not in kinds or value is None and type(None) in kinds:
            continue
        interval = interval_of[field.name]
        low, high = map(float, interval[1:-1].split(","))
        most = 2**31 - 1 if float not in kinds and high == math.inf else 3.4e38
        for number in value if isinstance(value, tuple) else [value]:
            fits = type(number) in (int, *kinds) and abs(number) <= most and low <= number <= high
            if not fits or (number == low and interval[0] == "(") or (number == high and interval[-1] == ")"):
                kind = "an integer" if float not in kinds else "a number"
                raise UserError(f"{called(field.name)} must be {kind} in {interval}, got {number!r}")
