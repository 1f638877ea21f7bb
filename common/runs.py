"""How commands start and end, and what a run folder is."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
import traceback
import typing
from pathlib import Path

from common.images import UserError
from common.weights import naming, parse_json, strict_json, write_whole


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
    {"[1, inf)": "steps batch", "[0, 1)": "ema"}. Integers lie below 2**31 where the interval is open above, and floats in
    the range of float32 in any case; None passes where the field may be None; every entry of a tuple is checked. A message calls a field
    `called(field)`. Raises KeyError for a field of numbers that has no interval."""
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


# ---------------------------------------------------------------------------------------------------- records of finished work


class Record:
    """JSON lines beside the results of a command, one for each piece of work that is finished; the first holds the settings.

    `lines` are those of an earlier call, which a kill or a full disk may have stopped at any point; what stands after a
    damaged line does not count. Raises UserError, naming what differs, where the file is of other settings, unless such a
    file is `replaced`."""

    def __init__(self, file: Path, settings: dict, replaced: bool = False):
        self.file, self.lines = file, []
        self.head = strict_json({"settings": settings}, default=str) + "\n"
        head, *lines = file.read_bytes().splitlines(keepends=True) if file.exists() else [b""]
        if head and head != self.head.encode():
            before, now = parse_json(head, f"{file} line 1").get("settings"), json.loads(self.head)["settings"]
            before = before if isinstance(before, dict) else {}
            if not replaced:
                changed = [f"{k}: {str(before.get(k))[:60]} -> {str(now.get(k))[:60]}" for k in before | now if before.get(k) != now.get(k)]
                raise UserError(f"{file} is of work with other settings ({'; '.join(changed)}); repeat them, delete it, or choose another --out")
            lines = []
        for line in lines:
            try:
                self.lines.append(parse_json(line if line.endswith(b"\n") else b"", file))
            except UserError:
                break

    def write(self, lines: list[dict]):
        """Replaces all lines, whole or not at all."""
        write_whole(self.file, self.head + "".join(strict_json(line) + "\n" for line in lines))

    def append(self, lines: list[dict]):
        with naming(self.file), open(self.file, "a") as out:
            out.write("".join(strict_json(line) + "\n" for line in lines))


@functools.cache
def code_digest() -> str:
    """Tells apart versions of this program."""
    root = Path(__file__).resolve().parent.parent
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted([*root.glob("*.py"), *root.glob("common/*.py")]))).hexdigest()[:16]
