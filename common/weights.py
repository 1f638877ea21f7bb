"""Files of state: JSON read strictly, and any file written whole or not at all."""

import contextlib
import json
import math
import os
import socket
import sys
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

    Raises OSError, naming the file and how many bytes it takes."""
    file, content = Path(file), content.encode() if isinstance(content, str) else content
    # The whole name, which may be 255 bytes long, and an ending would be too long; several hosts may write to one disk.
    partial = file.with_name(f".{file.name[:40]}.{socket.gethostname()[:40]}-{os.getpid()}.partial")
    try:
        with naming(file, f" ({len(content):,} bytes)"), open(partial, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(file, more=""):
    """An OSError inside, such as a full disk's, which knows no path or a temporary one, names `file`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}{more}", str(file)) from None


def cache_folder(name: str) -> Path | None:
    """The folder `name` of this program's in the user's cache, made where it is not there; None, with one line, without a
    place that can be written to (no home, a disk that may only be read)."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvm-jax" / name
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "cannot be written to", str(folder))
        return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"nothing is kept in a cache between two starts: {error}", file=sys.stderr)
        return None


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
