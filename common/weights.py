"""Tensors in files of any project, read without running anything; JSON and arrays read strictly; files written whole or not at all."""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import glob
import io
import json
import math
import os
import pickle
import re
import reprlib
import shutil
import struct
import sys
import types
import typing
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import ml_dtypes
import msgpack
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from common.images import UserError


# ---------------------------------------------------------------------------------------------------- tensors in files


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array in a file: its shape and dtype are known; `read` reads its numbers, every time anew."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def floats(self, dtype=np.float32) -> np.ndarray:
        """The numbers in `dtype`. Raises UserError, naming file and tensor, if they are integers or booleans in the file,
        and if one is NaN or infinite, in the file or in `dtype`."""
        if self.dtype not in FLOATS:
            raise UserError(
                f"{self.file}: tensor {self.name} is {self.dtype}; weights must be one of {', '.join(map(str, FLOATS))}"
            )
        with np.errstate(over="ignore"):  # said below
            array = np.asarray(self.read(), dtype)
        if not np.isfinite(array).all():
            raise UserError(f"{self.file}: tensor {self.name} holds NaN or infinity in {array.dtype}")
        return array


FLOATS = [np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)]


def open_tensors(file) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or else of a PyTorch checkpoint (`open_pickle`). Raises UserError for a damaged file."""
    return open_safetensors(file) if Path(file).suffix == ".safetensors" else open_pickle(file)


SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
               "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
               "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip


def open_safetensors(file) -> dict[str, Tensor]:
    """The tensors of a safetensors file; it stays open as long as one of them is held."""
    try:
        reader, tensors = safe_open(file, framework="np"), {}
        for name in reader.keys():
            view = reader.get_slice(name)
            if (kind := view.get_dtype()) not in SAFETENSORS:
                raise UserError(f"{file}: tensor {name[:100]} is of the dtype {kind}, which is not read")
            read = lambda name=name: reader.get_tensor(name)
            tensors[name] = Tensor(file, name, tuple(view.get_shape()), np.dtype(SAFETENSORS[kind]), read)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None
    return tensors


STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
            "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
            "ByteStorage": np.uint8, "BoolStorage": np.bool_}  # fmt: skip


def open_pickle(file) -> dict[str, Tensor]:
    """The tensors of a PyTorch checkpoint (zip or legacy format), without PyTorch and without running what it holds.

    A pickle is a program; this reader knows only the words for dicts and tensors and refuses every other one. Numbers are
    read tensor by tensor. In a zip the checksum of what they lie in is compared first. Raises UserError, naming the file."""
    try:
        with open(file, "rb") as stream:
            is_zip = zipfile.is_zipfile(stream)
            stream.seek(0)
            content = _zip_content(stream) if is_zip else _legacy_content(stream)
            return _checked_views(Path(file), content, os.fstat(stream.fileno()).st_size)
    except Exception as error:  # a damaged program fails in as many ways as there are words
        raise UserError(f"{file}: refused ({str(error) or type(error).__name__})") from None


@dataclasses.dataclass
class _Storage:
    """Bytes `start` to `start + size` of the file hold a tensor's numbers, or those of several; `crc` is their checksum, if there is one."""

    dtype: np.dtype
    key: str
    start: int = -1
    size: int = 0
    crc: int | None = None


@dataclasses.dataclass
class _View:
    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple


class _TensorUnpickler(
    pickle._Unpickler
):  # the one in Python: the one in C takes gigabytes where a file of bytes asks for a large memo
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
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module.startswith(
            "pytorch_lightning."
        ):  # names the entries of a training checkpoint's callbacks; as a word it does nothing
            return f"{module}.{name}"
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}; only tensors are read")

    def persistent_load(self, identifier):
        kind, dtype, key, *_ = identifier
        if kind != "storage" or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"unknown storage {kind}")
        return self.storages.setdefault(str(key), _Storage(np.dtype(dtype), str(key)))


def _zip_content(stream):
    with zipfile.ZipFile(stream) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UserError("a compressed entry, which PyTorch never writes")
        (pickled,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise UserError("it was written on a big-endian machine")
        unpickler = _TensorUnpickler(io.BytesIO(archive.read(pickled)))
        content = unpickler.load()
        for storage in unpickler.storages.values():
            entry = archive.getinfo(f"{root}data/{storage.key}")
            stream.seek(
                entry.header_offset + 26
            )  # there the lengths of a name and of an extra field, which the numbers follow
            storage.start = entry.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
            storage.size, storage.crc = entry.file_size, entry.CRC
    return content


def _legacy_content(stream):
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
        storage.start = stream.tell()
        stream.seek(storage.size, os.SEEK_CUR)
    return content


def _checked_views(file, content, file_size) -> dict[str, Tensor]:
    """Every view of the checkpoint as a Tensor, checked against the bytes that are there."""
    views = content
    for key in ("state_dict", "model"):  # of lightning, of LlamaGen; what is beside it stays unread
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            views = content[key]
    if not isinstance(views, dict) or not all(
        isinstance(name, str) and isinstance(view, _View) for name, view in views.items()
    ):
        raise UserError("not a dictionary of tensors")
    tensors = {}
    for name, view in views.items():
        storage, numbers = view.storage, (view.offset, *view.shape, *view.stride)
        count = storage.size // storage.dtype.itemsize
        extent = (
            sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True)) + 1
            if 0 not in view.shape
            else 0
        )
        if (
            not all(type(number) is int and number >= 0 for number in numbers)
            or max(view.offset + extent, math.prod(view.shape)) > count
        ):
            raise UserError(
                f"tensor {name[:100]} of shape {list(view.shape)} does not fit its {count} stored values"
            )
        if not 0 <= storage.start <= file_size - storage.size:
            raise UserError(f"tensor {name[:100]} lies outside the file, which was cut")
        read = lambda name=name, view=view, extent=extent: _read_view(file, name, view, extent)
        tensors[name] = Tensor(file, name, tuple(view.shape), storage.dtype, read)
    return tensors


def _read_view(file, name, view, extent):
    storage = view.storage
    with open(file, "rb") as stream:
        if storage.crc is not None:
            stream.seek(storage.start)
            crc, left = 0, storage.size
            while left and (piece := stream.read(min(left, 2**20))):
                crc, left = zlib.crc32(piece, crc), left - len(piece)
            if crc != storage.crc:
                raise UserError(
                    f"{file}: tensor {name} is damaged: its checksum is not that of what was written"
                )
            storage.crc = None  # once is enough
        stream.seek(storage.start + view.offset * storage.dtype.itemsize)
        flat = np.fromfile(stream, storage.dtype, extent)
    if len(flat) < extent:
        raise UserError(f"{file}: tensor {name} lies outside the file, which was cut")
    return np.lib.stride_tricks.as_strided(flat, view.shape, [s * flat.itemsize for s in view.stride])


def write_pickle(file, tensors: dict[str, np.ndarray], key: str | None = None):
    """Writes tensors, or {key: tensors}, (float32) as torch.save would, without PyTorch: its words are put together by hand."""
    words = lambda value: pickle.dumps(value, 2)[2:-1]  # without the frame of a whole pickle
    entries = []
    for i, (name, array) in enumerate(tensors.items()):
        storage = (
            b"("
            + words("storage")
            + b"ctorch\nFloatStorage\n"
            + words(str(i))
            + words("cpu")
            + words(array.size)
            + b"tQ"
        )
        strides = tuple(s // array.itemsize for s in array.strides)
        entries.append(words(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + words(0) + words(array.shape) + words(strides)
                       + b"\x89ccollections\nOrderedDict\n)RtR")  # fmt: skip
    dictionary = b"}(" + b"".join(entries) + b"u"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "archive/data.pkl",
            b"\x80\x02" + (dictionary if key is None else b"}" + words(key) + dictionary + b"s") + b".",
        )
        for i, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def read_stream(file, roots, dtype) -> dict[str, np.ndarray]:
    """The tensors below one of the words `roots` in an EasyLM stream, in `dtype`, by their keys joined with slashes.

    EasyLM's StreamingCheckpointer writes msgpack pairs, of a tuple of words and a tensor as flax serialises it, one after
    another; words `params` before a key are left out. Raises UserError, naming the file, as `Tensor.floats` does too."""
    arrays = {}
    try:
        with open(file, "rb") as stream:
            limits = dict(max_buffer_size=0, max_array_len=64, max_map_len=0, max_ext_len=0, max_str_len=1000)
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


# ---------------------------------------------------------------------------------------------------- files of state

MOST_JSON = 8 << 20  # bytes: far more than any file of settings; empty brackets take 25 times as much memory
DEEPEST_JSON = 64  # levels


def parse_json(text, source, kind=dict):
    """JSON text (str or UTF-8 bytes) -> a value of type `kind`.

    Raises UserError, naming `source`, for what is no JSON, is of more than MOST_JSON bytes or nested too deep,
    holds NaN, infinity or half of a surrogate pair (but for those that stand for the bytes of a file name
    that is no text), or is no `kind`."""
    if len(text) > MOST_JSON:
        raise UserError(
            f"{source}: {len(text):,} bytes of JSON are more than the {MOST_JSON:,} that are read"
        )
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape")
        level, depth = [value], 0
        while level:
            level = [
                inside for outer in level if isinstance(outer, dict | list) for inside in _entries(outer)
            ]
            depth += 1
            if depth > DEEPEST_JSON:
                raise RecursionError
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{source}: no readable JSON ({reason[:200]})") from None
    if not isinstance(value, kind):
        raise UserError(f"{source}: wanted a JSON {kind.__name__}, got a {type(value).__name__}")
    return value


def _entries(outer):
    return outer.values() if isinstance(outer, dict) else outer


def read_json(file, kind=dict):
    """`parse_json` of a file. Raises UserError also where it is missing or cannot be read."""
    return parse_json(read_text(file, MOST_JSON), file, kind)


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


def check_fields(record: dict, kinds: dict, source):
    """Raises UserError, naming `source` and the field, unless every field of `kinds` is in `record` and of its
    type, such as int, str | None, list[str] or dict[str, int]. A field that may be None may be missing."""
    for field, kind in kinds.items():
        value = record.get(field)
        if not _fits(value, kind):
            there = reprlib.repr(value) if field in record else "nothing"
            raise UserError(
                f"{source}: {field} must be "
                f"{getattr(kind, '__name__', kind) if type(kind) is type else kind}, got {there}"
            )


def _fits(value, kind) -> bool:
    """Whether `value` is of a type: as isinstance, but True is no int, an int is a float, and entries count."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if (outer := typing.get_origin(kind)) is not None:
        return isinstance(value, outer) and all(
            _fits(one, typing.get_args(kind)[-1]) for one in _entries(value)
        )
    return type(value) is kind or kind is float and type(value) is int


def read_array(file, dtype, shape: tuple[int | None, ...]) -> np.ndarray:
    """A memory-mapped `.npy` file. Raises UserError, naming the file, unless it holds an array of this dtype
    and shape (None: of any length)."""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file")
    try:
        # Mapped, so that a header that claims more than there is takes no memory.
        array = np.load(file, mmap_mode="r")
    except Exception as error:  # numpy's reader of headers fails in many ways
        raise UserError(f"{file}: no whole .npy file ({str(error)[:200]})") from None
    _check_array(array, file, dtype, shape)
    return array


def read_npz(file, wanted: dict[str, tuple]) -> list[np.ndarray]:
    """The arrays that `wanted` names, {name: (dtype, shape as in `read_array`)}, of an `.npz` file.

    Raises UserError, naming file and array, where one is missing, of another dtype or shape, or compressed, as
    np.savez never writes it: a few bytes of it could stand for gigabytes."""
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
        there = type(array).__name__
        if isinstance(array, np.ndarray):
            there = f"{array.dtype} {list(array.shape)}"
        kind = "text" if dtype is np.str_ else np.dtype(dtype).name
        wanted = f"{kind} [{', '.join('N' if n is None else str(n) for n in shape)}]"
        raise UserError(f"{source}: wanted {wanted}, got {there}")


def read_xml(file):
    """An XML file -> its root element (xml.etree). Raises UserError, naming the file, for what is no XML, is
    over 1 MiB, or declares a document type: only there stand entities, which can grow without bounds or name
    other files."""
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    content = read_text(file, 1 << 20)
    try:
        parser.Parse(content, True)
        return builder.close()
    except (expat.ExpatError, ValueError) as error:
        raise UserError(f"{file}: no readable XML ({error})") from None


def _refuse_doctype(*_):
    raise ValueError("it declares a document type; take that line away")


def strict_json(value, **options) -> str:
    """`value` as JSON that every parser reads: numbers that are not finite become null, and a `reason` beside
    them names them."""
    return json.dumps(_finite(value)[0], allow_nan=False, **options)


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


@contextlib.contextmanager
def naming(file):
    """An OSError inside, such as a full disk's, which knows no path or a temporary one, names `file`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from None


def cache_folder(name: str) -> Path | None:
    """The folder `name` of this program's in the user's cache, made where it is not there; None, with one line,
    without a place that can be written to (no home, a disk that may only be read)."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvm-jax" / name
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot be written to", str(folder))
        return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"nothing is kept in a cache between two starts: {error}", file=sys.stderr)
        return None


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process takes, on this host or another; `.NAME.*.partial` finds it."""
    return path.with_name(f".{path.name[:40]}.{os.uname().nodename[:40]}-{os.getpid()}.partial")


def write_safetensors(tensors: dict, file, metadata={"format": "pt"}):
    """Writes a file of tensors without a second copy in memory, readable for all whom the umask allows. Raises OSError as `write_whole` does."""
    write_whole(file, b"")
    mode = Path(file).stat().st_mode
    try:
        safetensors.numpy.save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:  # the operating system's, in words
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise no_room(
            OSError(int(number[1]), os.strerror(int(number[1]))),
            file,
            sum(array.nbytes for array in tensors.values()),
        ) from None
    os.chmod(file, mode)  # safetensors 0.8 makes files that their owner alone can read


@contextlib.contextmanager
def write_folder(out):
    """Yields a temporary folder beside `out`, which bears that name once the block has ended, and is removed where it fails.

    What a killed process left there is removed. Raises OSError where `out` is there and not an empty folder."""
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
    """-> (the same with None for floats that are not finite, whether `value` is one of them or lists one)."""
    if isinstance(value, dict):
        parts = {name: _finite(v) for name, v in value.items()}
        lost = ", ".join(str(name) for name, (_, missing) in parts.items() if missing)
        return {name: v for name, (v, _) in parts.items()} | (
            {"reason": f"not finite: {lost}"} if lost and "reason" not in value else {}
        ), False
    if isinstance(value, (list, tuple)):
        parts = [_finite(v) for v in value]
        return [v for v, _ in parts], any(missing for _, missing in parts)
    missing = isinstance(value, float) and not math.isfinite(value)
    return None if missing else value, missing
