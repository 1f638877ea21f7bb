"""Files of state: JSON read strictly, and any file written whole or not at all."""

import json
import math
import os
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
    """`value` as JSON that every parser reads: numbers that are not finite become null, and `reason` beside them names them."""
    return json.dumps(_finite(value)[0], allow_nan=False, **options)


def write_whole(file, content):
    """Writes bytes or text under a temporary name beside `file`, then renames: a reader sees the old file or the new one."""
    file = Path(file)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _refuse_constant(name):
    raise ValueError(f"{name} is no number")


def _finite_float(text):
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _finite(value):
    """-> (the same with None for floats that are not finite, whether `value` is or directly lists one of them)."""
    if isinstance(value, dict):
        parts = {name: _finite(v) for name, v in value.items()}
        lost = ", ".join(str(name) for name, (_, missing) in parts.items() if missing)
        return {name: v for name, (v, _) in parts.items()} | ({"reason": f"not finite: {lost}"} if lost and "reason" not in value else {}), False
    if isinstance(value, (list, tuple)):
        parts = [_finite(v) for v in value]
        return [v for v, _ in parts], any(missing for _, missing in parts)
    missing = isinstance(value, float) and not math.isfinite(value)
    return None if missing else value, missing
