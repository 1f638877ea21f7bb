"""Files of state: JSON read strictly, and any file written whole or not at all."""

import io
import json
import math
import os
import reprlib
import types
import typing
import zipfile
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from common.images import UserError


MOST_JSON = 8 << 20  # bytes: far more than any file of settings; empty brackets take 25 times as much memory
DEEPEST_JSON = 64  # levels


def parse_json(text, source, kind=dict):
    """JSON text (str or UTF-8 bytes) -> a value of type `kind`.

    Raises UserError, naming `source`, for what is no JSON, is of more than MOST_JSON bytes or nested too deep, holds NaN,
    infinity or a character that is none (half of a surrogate pair), or is no `kind`."""
    if len(text) > MOST_JSON:
        raise UserError(f"{source}: {len(text):,} bytes of JSON are more than the {MOST_JSON:,} that are read")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        level = [value]
        for _ in range(DEEPEST_JSON):
            level = [one for outer in level if isinstance(outer, dict | list) for one in (outer.values() if isinstance(outer, dict) else outer)]
        if level:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{source}: no readable JSON ({reason[:200]})") from None
    if not isinstance(value, kind):
        raise UserError(f"{source}: wanted a JSON {kind.__name__}, got a {type(value).__name__}")
    return value


def read_json(file, kind=dict):
    """`parse_json` of a file. Raises UserError also where it is missing or cannot be read."""
    return parse_json(read_text(file, MOST_JSON), file, kind)


def read_text(file, most: int = 64 << 20) -> str:
    """The text of a UTF-8 file. Raises UserError where it is missing, no text, or of more than `most` bytes."""
    try:
        if not os.path.isfile(file):  # a pipe or a device might have no end
            raise UserError(f"{file}: {'no file' if os.path.exists(file) else 'no such file'}")
        with open(file, "rb") as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise UserError(f"{file}: more than the {most:,} bytes that are read")
        return content.decode()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is no UTF-8 text") from None


def check_fields(record: dict, kinds: dict, source):
    """Raises UserError, naming `source` and the field, unless every field of `kinds` is in `record` and of its type, such as
    int, str | None, list[str] or dict[str, int]. A field that may be None may be missing."""
    for field, kind in kinds.items():
        value = record.get(field)
        if not _fits(value, kind):
            there = reprlib.repr(value) if field in record else "nothing"
            raise UserError(f"{source}: {field} must be {getattr(kind, '__name__', kind) if type(kind) is type else kind}, got {there}")


def _fits(value, kind) -> bool:
    """Whether `value` is of a type: as isinstance, but True is no int, an int is a float, and what is in it counts."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if (outer := typing.get_origin(kind)) is not None:
        inside = value.values() if isinstance(value, dict) else value
        return isinstance(value, outer) and all(_fits(one, typing.get_args(kind)[-1]) for one in inside)
    return type(value) is kind or kind is float and type(value) is int


def read_array(file, dtype, shape: tuple[int | None, ...]) -> np.ndarray:
    """A memory-mapped `.npy` file. Raises UserError, naming the file, unless it holds an array of this dtype and shape (None:
    of any length)."""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file")
    try:
        array = np.load(file, mmap_mode="r")  # mapped, so that a header that claims more than there is takes no memory
    except Exception as error:  # numpy's reader of headers fails in many ways
        raise UserError(f"{file}: no whole .npy file ({str(error)[:200]})") from None
    _check_array(array, file, dtype, shape)
    return array


def read_npz(file, wanted: dict[str, tuple]) -> list[np.ndarray]:
    """The arrays that `wanted` names, {name: (dtype, shape as in `read_array`)}, of an `.npz` file that np.savez wrote.

    Raises UserError, naming file and array, where one is missing, of another dtype or shape, or compressed: a few bytes
    of a compressed one could stand for gigabytes."""
    arrays = []
    for name, (dtype, shape) in wanted.items():
        try:
            with zipfile.ZipFile(file) as archive:
                if (entry := archive.getinfo(f"{name}.npy")).compress_type != zipfile.ZIP_STORED:
                    raise UserError("it is compressed; np.savez writes it plain")
                array = np.load(io.BytesIO(archive.read(entry)))
        except Exception as error:  # as above
            raise UserError(f"{file}: no whole array {name} in it ({str(error)[:200]})") from None
        _check_array(array, f"{file}: {name}", dtype, shape)
        arrays.append(array)
    return arrays


def _check_array(array, source, dtype, shape):
    fits = isinstance(array, np.ndarray) and np.issubdtype(array.dtype, dtype) and len(shape) == array.ndim
    if not fits or any(n not in (None, m) for n, m in zip(shape, array.shape)):
        there = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        wanted = f"{np.dtype(dtype).name if dtype is not np.str_ else 'text'} {['N' if n is None else n for n in shape]}".replace("'", "")
        raise UserError(f"{source}: wanted {wanted}, got {there}")


def read_xml(file):
    """An XML file -> its root element (xml.etree). Raises UserError, naming the file, for what is no XML, is over 4 MiB, or
    declares a document type: entities, which can grow without bounds or name other files, come from nowhere else."""
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = builder.start, builder.end, builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    content = read_text(file, 4 << 20)
    try:
        parser.Parse(content, True)
        return builder.close()
    except (expat.ExpatError, ValueError) as error:
        raise UserError(f"{file}: no readable XML ({error})") from None


def _refuse_doctype(*_):
    raise ValueError("it declares a document type; take that line away")


def strict_json(value, **options) -> str:
    """`value` as JSON that every parser reads: numbers that are not finite become null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


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
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
