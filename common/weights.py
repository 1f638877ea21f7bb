"""Tensors in files of any project, read without running anything; JSON, arrays and XML read strictly;
files written whole or not at all."""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import glob
import io
import json
import math
import os
import pickle
import reprlib
import shutil
import sys
import types
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import msgpack
import numpy as np
from safetensors import SafetensorError, safe_open

from common.images import UserError

FLOATS = [np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)]

# ------------------------------------------------------------------------------------------- tensors in files


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array in a file: shape and dtype are known, `read` reads the numbers, each time anew."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def floats(self, dtype=np.float32) -> np.ndarray:
        """The numbers in `dtype`. Raises UserError, naming file and tensor, where the file holds integers or
        booleans, and where a number is NaN or infinite in the file or in `dtype`."""
        named = f"{self.file}: tensor {self.name}"
        check_is_float(self.dtype, named)
        with np.errstate(over="ignore"):  # the next line reports it
            return check_finite(np.asarray(self.read(), dtype), named)


def check_is_float(dtype, named: str):
    if dtype not in FLOATS:
        raise UserError(f"{named} is {dtype}; weights must be one of {', '.join(map(str, FLOATS))}")


def check_finite(array, named: str):
    if not np.isfinite(array).all():
        raise UserError(f"{named} holds NaN or infinity in {array.dtype}")
    return array


def open_tensors(file) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or else of a PyTorch checkpoint; UserError for a damaged file."""
    return open_safetensors(file) if Path(file).suffix == ".safetensors" else open_pickle(file)


SAFETENSORS = {f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "fiu" for size in (2, 4, 8)}
SAFETENSORS |= {"BF16": FLOATS[1], "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("?")}


def open_safetensors(file) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which stays open as long as one of them is held."""
    try:
        reader, tensors = safe_open(file, framework="np"), {}
        for name in reader.keys():
            view = reader.get_slice(name)
            if (kind := view.get_dtype()) not in SAFETENSORS:
                raise UserError(f"{file}: tensor {name[:100]} is of the dtype {kind}, which is not read")
            read = functools.partial(reader.get_tensor, name)
            tensors[name] = Tensor(file, name, tuple(view.get_shape()), SAFETENSORS[kind], read)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None
    return tensors


STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": FLOATS[1], "Long": "i8", "Int": "i4",
            "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"}  # fmt: skip


@dataclasses.dataclass
class _Storage:
    """What the numbers of one tensor or several lie in: `size` bytes, which `read` reads."""

    dtype: np.dtype
    size: int = 0
    read: Callable[[], bytes] = bytes


class _View(typing.NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple


def open_pickle(file) -> dict[str, Tensor]:
    """The tensors of a PyTorch checkpoint (zip or legacy format), by a restricted unpickler, without PyTorch.

    A pickle is a program; this unpickler knows only the words for dicts and tensors and refuses all others.
    The file stays open. Numbers are read tensor by tensor, in a zip with their checksum. Raises UserError."""
    try:
        stream = open(file, "rb")
        content = _open_zip(stream) if zipfile.is_zipfile(stream) else _open_legacy(stream)
        for key in ("state_dict", "model"):  # lightning's and LlamaGen's; what is beside it stays unread
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict):
            raise UserError("not a dictionary of tensors")
        file_size = os.fstat(stream.fileno()).st_size
        return {name: _checked_tensor(Path(file), name, view, file_size) for name, view in content.items()}
    except Exception as error:  # a damaged program fails in as many ways as there are words
        raise UserError(f"{file}: refused ({str(error) or type(error).__name__})") from None


class _TensorUnpickler(pickle._Unpickler):  # the C one takes gigabytes where bytes ask for a large memo
    def __init__(self, stream):
        super().__init__(stream)
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _View(storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and (kind := name.removesuffix("Storage")) in STORAGES:
            return np.dtype(STORAGES[kind])
        if module.startswith(
            "pytorch_lightning."
        ):  # keys of its callbacks' states; as a word it does nothing
            return f"{module}.{name}"
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}; only tensors are read")

    def persistent_load(self, identifier):
        kind, dtype, key, *_ = identifier
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"unknown storage {kind}")
        return self.storages.setdefault(str(key), _Storage(dtype))


def _open_zip(stream):
    archive = zipfile.ZipFile(stream)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise UserError("a compressed entry, which PyTorch never writes")
    (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    root = pickled.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise UserError("it was written on a big-endian machine")
    unpickler = _TensorUnpickler(io.BytesIO(archive.read(pickled)))
    content = unpickler.load()
    for key, storage in unpickler.storages.items():
        entry = archive.getinfo(f"{root}data/{key}")
        storage.size, storage.read = entry.file_size, functools.partial(archive.read, entry)
    return content


def _open_legacy(stream):
    def read(start, size):
        stream.seek(start)
        return stream.read(size)

    stream.seek(0)
    if _TensorUnpickler(stream).load() != 0x1950A86A20F9469CFC6C:
        raise UserError("no PyTorch checkpoint")
    _TensorUnpickler(stream).load()  # the protocol's version
    if not _TensorUnpickler(stream).load()["little_endian"]:
        raise UserError("it was written on a big-endian machine")
    unpickler = _TensorUnpickler(stream)
    content = unpickler.load()
    for key in _TensorUnpickler(stream).load():
        storage = unpickler.storages[key]
        storage.size = int.from_bytes(stream.read(8), "little") * storage.dtype.itemsize
        storage.read = functools.partial(read, stream.tell(), storage.size)
        stream.seek(storage.size, os.SEEK_CUR)
    return content


def _checked_tensor(file, name, view, file_size) -> Tensor:
    """A view of the checkpoint as a Tensor, checked against the bytes that are there."""
    if not isinstance(name, str) or not isinstance(view, _View):
        raise UserError("not a dictionary of tensors")
    storage, shape = view.storage, tuple(view.shape)
    count = storage.size // storage.dtype.itemsize
    reach = sum((n - 1) * s for n, s in zip(shape, view.stride, strict=True)) + 1
    end = view.offset + (0 if 0 in shape else reach)
    fits = all(type(n) is int and n >= 0 for n in (view.offset, *shape, *view.stride))
    if not fits or max(end, math.prod(shape)) > count:
        raise UserError(f"tensor {name[:100]} of shape {list(shape)} does not fit its {count} stored values")
    if storage.size > file_size:
        raise UserError(f"tensor {name[:100]} lies outside the file, which was cut")

    def read():
        try:
            flat = np.frombuffer(storage.read(), storage.dtype, count)[view.offset : end]
        except Exception as error:  # such as a wrong checksum
            raise UserError(f"{file}: tensor {name} is damaged ({error})") from None
        return np.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in view.stride])

    return Tensor(file, name, shape, storage.dtype, read)


def read_stream(file, roots, dtype) -> dict[str, np.ndarray]:
    """The tensors below one of the words `roots` in an EasyLM stream, {key with slashes: array in `dtype`}.

    The stream is one msgpack pair after another: a tuple of words, and a tensor as flax serialises it. Words
    `params` before a key are left out. Raises UserError as `Tensor.floats` does."""
    arrays = {}
    limits = dict(max_buffer_size=0, max_array_len=64, max_map_len=0, max_ext_len=0, max_str_len=1000)
    try:
        with open(file, "rb") as stream:
            for key, value in msgpack.Unpacker(stream, read_size=1 << 26, **limits):
                start = next((i for i, word in enumerate(key) if word != "params"), len(key))
                if key[start] not in roots:  # a train state also holds the optimizer and the step
                    continue
                if (name := "/".join(key[start:])) in arrays:
                    raise UserError(f"it holds {name} twice")
                arrays[name] = _flax_tensor(file, name, value).floats(dtype)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, TypeError, IndexError, KeyError, msgpack.UnpackException) as error:
        raise UserError(f"{file} is not an EasyLM stream of LLaMA weights: {str(error)[:300]}") from None
    return arrays


def _flax_tensor(file, name, data) -> Tensor:
    """flax.serialization.to_bytes of one array: msgpack extension 1, or pieces of at most 1 GiB in a dict."""

    def array(code, payload):
        if code != 1:
            raise UserError(f"msgpack extension {code} is not an array")
        shape, dtype, buffer = msgpack.unpackb(payload)
        return np.frombuffer(buffer, np.dtype(dtype)).reshape(shape)

    value = msgpack.unpackb(data, ext_hook=array)
    if isinstance(value, dict):
        pieces, shape = ([value[key][str(i)] for i in range(len(value[key]))] for key in ("chunks", "shape"))
        value = np.concatenate(pieces).reshape(shape)
    if not isinstance(value, np.ndarray):
        raise UserError(f"expected an array, got a {type(value).__name__}")
    return Tensor(file, name, value.shape, value.dtype, lambda: value)


# ----------------------------------------------------------------------- text, JSON, arrays and XML, strictly

MOST_JSON = 8 << 20  # bytes: far more than any file of settings; empty brackets take 25 times as much memory
DEEPEST_JSON = 64  # levels


def read_text(file, most: int = 64 << 20) -> str:
    """The text of a UTF-8 file. Raises UserError where it is missing, no text, or over `most` bytes."""
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


def read_json(file, kind=dict):
    """`parse_json` of a file. Raises UserError also where it is missing or cannot be read."""
    return parse_json(read_text(file, MOST_JSON), file, kind)


def parse_json(text, source, kind=dict):
    """JSON text (str or UTF-8 bytes) -> a value of type `kind`.

    Raises UserError, naming `source`, for what is no JSON or no `kind`, is over MOST_JSON bytes, nested too
    deep, or holds NaN, infinity or half of a surrogate pair (but for Python's stand-ins for bytes of a file
    name that are no text)."""
    if len(text) > MOST_JSON:
        raise UserError(
            f"{source}: {len(text):,} bytes of JSON are more than the {MOST_JSON:,} that are read"
        )
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape")
        _check_json(value, DEEPEST_JSON)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{source}: no readable JSON ({reason[:200]})") from None
    if not isinstance(value, kind):
        raise UserError(f"{source}: wanted a JSON {kind.__name__}, got a {type(value).__name__}")
    return value


def _check_json(value, levels):
    if isinstance(value, dict | list):
        if levels == 0:
            raise RecursionError
        for entry in _entries(value):
            _check_json(entry, levels - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN or infinity is no number")


def _entries(outer):
    return outer.values() if isinstance(outer, dict) else outer


def check_fields(record: dict, kinds: dict, source):
    """Raises UserError, naming `source` and the field, unless each field of `kinds` is in `record` and of its
    type, such as int, str | None, list[str] or dict[str, int]. A field that may be None may be missing."""
    for field, kind in kinds.items():
        value = record.get(field)
        if not _fits(value, kind):
            there = reprlib.repr(value) if field in record else "nothing"
            wanted = kind.__name__ if type(kind) is type else kind
            raise UserError(f"{source}: {field} must be {wanted}, got {there}")


def _fits(value, kind) -> bool:
    """As isinstance, but True is no int, an int is a float, and entries are checked too."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if (outer := typing.get_origin(kind)) is not None:
        return isinstance(value, outer) and all(_fits(v, typing.get_args(kind)[-1]) for v in _entries(value))
    return type(value) is kind or kind is float and type(value) is int


def read_array(file, dtype, shape: tuple[int | None, ...]) -> np.ndarray:
    """A memory-mapped `.npy` file. Raises UserError, naming the file, unless it holds an array of this dtype
    and shape (None: of any length)."""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file")
    try:
        array = np.load(file, mmap_mode="r")  # so that a header that claims too much takes no memory
    except Exception as error:  # numpy's reader of headers fails in many ways
        raise UserError(f"{file}: no whole .npy file ({str(error)[:200]})") from None
    return _checked_array(array, file, dtype, shape)


def read_npz(file, wanted: dict[str, tuple]) -> list[np.ndarray]:
    """The arrays that `wanted` names, {name: (dtype, shape as in `read_array`)}, of an `.npz` file.

    Raises UserError, naming file and array, where one is missing, of another dtype or shape, or compressed,
    as np.savez never writes it: a few bytes of it could stand for gigabytes."""
    arrays = []
    for name, (dtype, shape) in wanted.items():
        try:
            with zipfile.ZipFile(file) as archive:
                if (entry := archive.getinfo(f"{name}.npy")).compress_type != zipfile.ZIP_STORED:
                    raise UserError("it is compressed; np.savez writes it plain")
                array = np.load(io.BytesIO(archive.read(entry)))
        except Exception as error:  # as above
            raise UserError(f"{file}: no whole array {name} in it ({str(error)[:200]})") from None
        arrays.append(_checked_array(array, f"{file}: {name}", dtype, shape))
    return arrays


def _checked_array(array, source, dtype, shape):
    is_array = isinstance(array, np.ndarray)
    fits = is_array and np.issubdtype(array.dtype, dtype) and len(shape) == array.ndim
    if not fits or any(n not in (None, m) for n, m in zip(shape, array.shape)):
        there = f"{array.dtype} {list(array.shape)}" if is_array else type(array).__name__
        kind = "text" if dtype is np.str_ else np.dtype(dtype).name
        wanted = f"{kind} [{', '.join('N' if n is None else str(n) for n in shape)}]"
        raise UserError(f"{source}: wanted {wanted}, got {there}")
    return array


class _TreeWithoutDoctype(ElementTree.TreeBuilder):
    """Only a document type declares entities, which can grow without bounds or name other files."""

    def doctype(self, *_):
        raise ValueError("it declares a document type; take that line away")


def read_xml(file):
    """An XML file -> its root element (xml.etree). Raises UserError, naming the file, for what is no XML, is
    over 1 MiB, or declares a document type."""
    content = read_text(file, 1 << 20)
    try:
        return ElementTree.fromstring(content, ElementTree.XMLParser(target=_TreeWithoutDoctype()))
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file}: no readable XML ({error})") from None


# ----------------------------------------------------------------------------------- files written as a whole


def strict_json(value, **options) -> str:
    """`value` as JSON that every parser reads: numbers that are not finite become null,
    and a `reason` beside them names them."""
    return json.dumps(_without_infinities(value)[0], allow_nan=False, **options)


def _without_infinities(value):
    """-> (the value with None for floats that are not finite, whether it is one of them or lists one)."""
    if isinstance(value, dict):
        parts = {name: _without_infinities(v) for name, v in value.items()}
        lost = ", ".join(str(name) for name, (_, is_lost) in parts.items() if is_lost)
        reason = {"reason": f"not finite: {lost}"} if lost and "reason" not in value else {}
        return {name: v for name, (v, _) in parts.items()} | reason, False
    if isinstance(value, (list, tuple)):
        parts = [_without_infinities(v) for v in value]
        return [v for v, _ in parts], any(is_lost for _, is_lost in parts)
    is_lost = isinstance(value, float) and not math.isfinite(value)
    return None if is_lost else value, is_lost


def write_whole(file, content):
    """Writes bytes or text under a temporary name, then renames: a reader sees the old file or the new one.

    Raises OSError with the path, and where the disk is full with the bytes that are needed and free."""
    write_together({file: content})


def write_together(contents: dict):
    """{file: bytes or text}: writes all under temporary names, and renames them once all are on the disk."""
    partials = {}
    try:
        for file, content in contents.items():
            file, content = Path(file), content.encode() if isinstance(content, str) else content
            partials[file] = _partial(file)
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


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process takes, on this host or another: `.NAME.*.partial`."""
    return path.with_name(f".{path.name[:40]}.{os.uname().nodename[:40]}-{os.getpid()}.partial")


@contextlib.contextmanager
def write_folder(out):
    """Yields a temporary folder beside `out`, which takes its name when the block ends without an error.

    What a killed process left is removed. Raises OSError where `out` exists and is not an empty folder."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{glob.escape(out.name[:40])}.*.partial"):
        with contextlib.suppress(OSError), _locked(leftover):  # its writer is dead: the lock is free
            shutil.rmtree(leftover)
    partial = _partial(out)
    partial.mkdir()
    try:
        with _locked(partial):
            yield partial
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path):
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(file):
    """An OSError inside, such as a full disk's, which knows no path or a temporary one, names `file`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from None


def no_room(error: OSError, file, needed: int) -> OSError:
    """The same error with its path, and for a full disk or quota with the bytes that are needed and free."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(next(path for path in Path(file).absolute().parents if path.exists())).free
        reason = f"{reason}: it needs {needed:,} bytes, and {free:,} are free there"
    return OSError(error.errno, reason, str(file))


def cache_folder(name: str) -> Path | None:
    """The folder `name` in the user's cache, made if missing; None, with one line, where none can be written
    to (no home, a disk that may only be read)."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvm-jax" / name
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot be written to", str(folder))
        return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"nothing is kept in a cache between two starts: {error}", file=sys.stderr)
        return None
