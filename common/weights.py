"""Files of state: JSON read strictly, and any file written whole or not at all."""

import contextlib
import errno
import json
import math
import os
import shutil
from pathlib import Path

from common.images import UserError


def parse_json(text, source, kind=dict):
    """JSON text (str or UTF-8 bytes) -> a value of type `kind`.

    Raises UserError, naming `source`, for what is no JSON, is nested too deep, holds NaN or infinity, or is no `kind`."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: no readable JSON ({'nested too deep' if isinstance(error, RecursionError) else error})") from None
    if not isinstance(value, kind):
        raise UserError(f"{source}: wanted a JSON {kind.__name__}, got a {type(value).__name__}")
    return value


def read_json(file, kind=dict):
    """`parse_json` of a file. Raises UserError also where it is missing or cannot be read."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    return parse_json(content, file, kind)


def strict_json(value, **options) -> str:
    """`value` as JSON that every parser reads: numbers that are not finite become null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def write_whole(file, content):
    """Writes bytes or text under a temporary name beside `file`, then renames: a reader sees the old file or the new one.

    Raises OSError with the path, and where the disk is full with the bytes that are needed and free."""
    write_together({file: content})


def write_together(contents: dict):
    """{file: bytes or text}: writes them all under temporary names, and renames them only when every one is on the disk."""
    partials = {}
    try:
        for file, content in contents.items():
            file, content = Path(file), content.encode() if isinstance(content, str) else content
            partials[file] = file.with_name(f".{file.name[:40]}.{os.getpid()}.partial")
            try:
                with open(partials[file], "wb") as out:
                    out.write(content)
                    out.flush()
                    os.fsync(out.fileno())
            except OSError as error:
                raise no_room(error, file, len(content)) from None
        for file, partial in partials.items():
            os.replace(partial, file)
    except BaseException:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink()
        raise


def no_room(error: OSError, file, needed: int) -> OSError:
    """The same error with its path, and for a full disk or quota with the bytes that `file` needs and that are free."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(next(path for path in Path(file).absolute().parents if path.exists())).free
        reason = f"{reason}: it needs {needed:,} bytes, and {free:,} are free there"
    return OSError(error.errno, reason, str(file))


def _refuse_constant(name):
    raise ValueError(f"{name} is no number")


def _finite_float(text):
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
