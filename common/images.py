"""Every picture and video in and out, and the error for what a user can cause.

Commands find the files below a folder here, open them safely and take their pixels. No file is trusted:
pictures are opened by a list of formats and up to MAX_PIXELS, videos by a demuxer that is named, and whatever
fails in a file becomes a UserError that names it.

Dimension key: N packets of a video, H W C a picture."""

import collections
import contextlib
import functools
import io
import itertools
import math
import os
import re
import tarfile
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError, features
from PIL import TiffImagePlugin as TIFF


class UserError(ValueError):
    """Wrong usage or bad input: the message names the file or flag, says what was wrong and what to type.

    Commands print it as one line and end with status 2. Any other exception is a bug."""

    def __init__(self, message):
        message = str(message)  # what is quoted in it may be megabytes long
        super().__init__(message if len(message) <= 4000 else f"{message[:2000]} ... {message[-1900:]}")


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
if features.check("avif"):
    FORMATS, SUFFIXES = (*FORMATS, "AVIF"), SUFFIXES | {".avif"}
with contextlib.suppress(ImportError):  # not required: who has HEIC pictures installs it
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS, SUFFIXES = (*FORMATS, "HEIF"), SUFFIXES | {".heic", ".heif"}
VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".apng"}  # and animated .png and .webp
MAX_PIXELS = 64_000_000
MOST_HOLES = 1 << 30  # bytes of a sparse file; decoders would look through its zeros for hours
# What looks like a picture or a video and is not read: suffix -> what to do about it.
OTHERS = {
    "not a format that is read; save it as PNG, TIFF or JPEG": (
        ".psd .psb .xcf .jp2 .j2k .jxl .jxr .tga .exr .hdr .pfm .ppm .pgm .pbm .pnm .svg .eps .ico .dds .pcx "
        ".fits"
    ),
    "a camera's raw data; develop it to TIFF or JPEG": (
        ".raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw"
    ),
    "Pillow reads HEIC by a plug-in: pip install pillow-heif": ".heic .heif",
    "this Pillow reads no AVIF: pip install --upgrade pillow": ".avif",
}
OTHER_PICTURES = {s: reason for reason, names in OTHERS.items() for s in names.split() if s not in SUFFIXES}
OTHER_VIDEOS = dict.fromkeys(
    ".wmv .asf .flv .mpg .mpeg .ts .m2ts .mts .3gp .ogv .vob .rm .mxf".split(),
    "not a container that is read; type: ffmpeg -i IN OUT.mp4",
)


# ---------------------------------------- finding files


def natural(path):
    """Sorting key of paths: folder by folder, numbers of ASCII digits by value: frame 2 before frame 10."""
    split = lambda name: [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]
    return [split(part) for part in Path(path).parts], str(path)


def find_files(folder: Path, suffixes, others: dict[str, str], text="", rejections=None) -> list[Path]:
    """Files below a folder that end in one of `suffixes` and whose path below it holds `text`, in natural
    order.

    Links are followed, after real folders, and each folder is read once; what begins with a dot is skipped.
    Left out and reported to `reject` are files of the suffixes `others` (suffix -> reason), links that lead
    nowhere or back, what is no regular file, and folders that cannot be read."""
    folder = Path(folder)
    if not folder.is_dir() and not (folder.is_file() and folder.suffix.lower() in ARCHIVES):
        raise UserError(f"{folder}: no such folder, and no {' or '.join(ARCHIVES)} file")
    single = folder.is_file()
    files, found, left_out, roots, seen = [folder] * single, [], [], [folder] * (not single), set()

    def unreadable(error):
        if Path(error.filename) == Path(folder):
            raise UserError(f"{folder}: {error.strerror}")
        left_out.append((error.filename, error.strerror))

    while roots:
        for here, folders, names in os.walk(roots.pop(0), onerror=unreadable):
            if (real := os.path.realpath(here)) in seen:
                left_out.append((here, f"a link to {real}, which is read already"))
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            roots += [Path(here, name) for name in folders if os.path.islink(Path(here, name))]
            files += [Path(here, name) for name in names if not name.startswith(".")]
        roots.sort(key=natural)
    if not VIDEOS & {*suffixes} - SUFFIXES:  # videos are not read from archives
        for path in [path for path in files if path.suffix.lower() in ARCHIVES and os.path.isfile(path)]:
            files += members(path)
    looked_for = {*suffixes, *others}
    files = [path for path in files if path.suffix.lower() in looked_for]
    for path in sorted(files, key=natural):
        if text not in path.relative_to(folder).as_posix():
            continue
        if not isinstance(path, Member) and not os.path.isfile(path):
            missing = "not a regular file" if os.path.exists(path) else "a link that leads nowhere"
            left_out.append((path, missing))
        elif path.suffix.lower() in suffixes:
            found.append(path)
        else:
            left_out.append((path, others[path.suffix.lower()]))
    reject(folder, left_out, rejections)
    return found


def reject(folder, left_out, rejections: list | None):
    """Adds (path, reason) pairs to `rejections` as {"path", "reason"}, or prints them in one line if None."""
    if rejections is not None:
        rejections += [{"path": str(path), "reason": reason} for path, reason in left_out]
    elif left_out:
        paths = collections.defaultdict(list)
        for path, reason in left_out:
            paths[reason].append(path)
        more = lambda count: f" and {count} more" if count else ""
        said = "; ".join(f"{some[0]}{more(len(some) - 1)} ({reason})" for reason, some in paths.items())
        print(f"left out below {folder}: {said}")


def none_below(folder, what: str, suffixes, text: str) -> UserError:
    listed = f" ({' '.join(sorted(suffixes))})" if suffixes else ""
    return UserError(
        f"{folder}: no {what} below this folder{listed}{f' with {text!r} in their path' if text else ''}"
    )


ARCHIVES = (".tar", ".parquet")


class Member(type(Path())):
    """A picture inside of a `.tar` or `.parquet` file, as the path ARCHIVE/NAME. `place` is where `archive`
    holds its bytes: (offset, size), or (row group, row in it, column)."""

    @classmethod
    def of(cls, archive, name: str, place: tuple):
        member = cls(archive, name)
        member.archive, member.place = archive, place
        return member

    def __reduce__(self):
        return Member.of, (self.archive, self.relative_to(self.archive).as_posix(), self.place)

    def read(self) -> bytes:
        if self.archive.suffix.lower() == ".parquet":
            group, row, column = self.place
            value = read_row_group(self.archive, os.stat(self.archive).st_mtime_ns, group, column)[
                row
            ].as_py()
            return (value["bytes"] if isinstance(value, dict) else value) or b""
        offset, size = self.place
        if size > 4 * MAX_PIXELS:
            raise UserError(f"{self}: {size:,} bytes are over the limit of {4 * MAX_PIXELS:,} in an archive")
        with open(self.archive, "rb") as file:
            file.seek(offset)
            return file.read(size)


def members(archive: Path) -> list[Member]:
    """The files in a `.tar` (webdataset's naming: 0001.jpg and 0001.mask.png are of one sample), or the
    pictures in a `.parquet`: ROW.COLUMN.png for each column of bytes, or LABEL/ROW.COLUMN.png where there is
    a column `label`."""
    found = []
    with naming(archive):
        if archive.suffix.lower() == ".tar":
            with tarfile.open(archive, "r:") as tar:
                for entry in tar:
                    parts = Path(entry.name.lstrip("/")).parts
                    if entry.isfile() and not any(part.startswith(".") for part in parts):
                        place = (entry.offset_data, entry.size)
                        found.append(Member.of(archive, Path(*parts).as_posix(), place))
            return found
        file, row = open_parquet(archive), 0
        types = {field.name: str(field.type) for field in file.schema_arrow}
        columns = [name for name, kind in types.items() if "binary" in kind.split("bytes:")[-1][:14]]
        if not columns:
            raise UserError(f"no column of pictures among {', '.join(types)}")
        labels = file.read(["label"]).column(0).to_pylist() if "label" in types else None
        for group in range(file.num_row_groups):
            for n in range(file.metadata.row_group(group).num_rows):
                folder = f"{labels[row]}/".replace("/", "_")[:-1] + "/" if labels else ""
                for column in columns:
                    found.append(Member.of(archive, f"{folder}{row:08d}.{column}.png", (group, n, column)))
                row += 1
    return found


def open_parquet(archive):
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files are read by pyarrow: pip install pyarrow") from None
    return parquet.ParquetFile(archive)


@functools.lru_cache(2)
def read_row_group(archive, changed: int, group: int, column: str):
    """Of the file as it was `changed`: another one is read anew."""
    return open_parquet(archive).read_row_group(group, [column]).column(0)


def find_images(folder: Path, rejections: list | None = None, text: str = "") -> list[Path]:
    """The pictures below a folder; see `find_files`. Raises UserError where there are none."""
    if not (paths := find_files(folder, SUFFIXES, OTHER_PICTURES, text, rejections)):
        raise none_below(folder, "pictures", SUFFIXES, text)
    return paths


def find_stems(folder: Path, text: str, rejections: list | None = None) -> dict[str, Path]:
    """{path below the folder without its suffix: path} of the pictures; a second of the same is rejected."""
    stems, twice = {}, []
    for path in find_images(folder, rejections, text):
        stem = path.relative_to(folder).with_suffix("")
        if isinstance(path, Member):  # webdataset's naming: what a sample is called ends at the first dot
            stem = stem.with_name(path.name.split(".")[0])
        if stems.setdefault(stem.as_posix(), path) != path:
            twice.append((path, "another picture has this name, but for the suffix"))
    reject(folder, twice, rejections)
    return stems


def find_videos(folder: Path, text: str = "", rejections: list | None = None) -> list[Path]:
    """The videos and animations below a folder; see `find_files`."""
    files, stills = [], []
    for path in find_files(folder, VIDEOS | {".png", ".webp"}, OTHER_VIDEOS, text, rejections):
        (files if path.suffix.lower() in VIDEOS or moves(path) else stills).append(path)
    why = "a picture that does not move; the kind `frames` reads folders of them"
    if rejections is not None:
        reject(folder, [(path, why) for path in stills], rejections)
    if not files:
        raise none_below(folder, "videos", VIDEOS, text)
    return files


def find_clips(folder: Path, text: str, videos: bool, rejections: list | None = None) -> dict:
    """{name: the pictures that a folder directly holds (a tuple) or, with `videos`, a video file (a
    Path)}."""
    films, others = (VIDEOS, OTHER_PICTURES | OTHER_VIDEOS) if videos else (set(), OTHER_PICTURES)
    clips, folders = {}, collections.defaultdict(list)
    for path in find_files(folder, SUFFIXES | films, others, "", rejections):
        place = path.relative_to(folder)
        if path.suffix.lower() not in films:
            folders[place.parent.as_posix()].append(path)
        elif text in place.as_posix() and clips.setdefault(place.with_suffix("").as_posix(), path) != path:
            raise UserError(f"{path}: another clip of this name is beside it; rename one of them")
    for name, pictures in folders.items():
        if text in name if name != "." else not videos and text in folder.name:
            clips[name] = tuple(pictures)
    if not clips:
        raise none_below(folder, "clips", (), text)
    return dict(sorted(clips.items(), key=lambda clip: natural(clip[0])))


def find_tracks(folder: Path, text: str, modalities: tuple[str, ...], rejections: list) -> dict[str, list]:
    """{name of a folder that holds one folder a modality: the pictures (a tuple) of each of these}."""
    clips, tracks = collections.defaultdict(list), {}
    for path in find_images(folder, rejections):
        clips[path.parent].append(path)
    found = {parent.parent for parent in clips if parent.name == modalities[0] and parent != folder}
    for track in sorted(found, key=natural):
        if missing := [name for name in modalities if track / name not in clips]:
            reject(folder, [(track, f"a track without {' and '.join(missing)}")], rejections)
        elif text in (name := track.relative_to(folder).as_posix()):
            tracks[name] = [tuple(clips[track / modality]) for modality in modalities]
    return tracks


# ---------------------------------------- opening files


@contextlib.contextmanager
def naming(path):
    """Whatever fails inside (decoders raise many kinds of errors) becomes a UserError that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        named = isinstance(error, UserError) and str(path) in reason
        raise UserError(reason if named else f"{path}: {reason}") from None


class PatientFile(io.BufferedReader):
    """A file from which a few bytes may be read two million times: some decoders look for the next marker
    byte by byte, and in a file of zeros they would go on for hours."""

    left = 2_000_000

    def read(self, size=-1):
        self.left -= 0 <= size < 8
        if self.left < 0:
            raise UserError("its parts are too small or too many: no picture is found in it")
        return super().read(size)


def open_file(path) -> io.BufferedReader:
    """A file opened to read bytes. Raises UserError for a FIFO (opening would wait), a device (it has no
    end), and what is mostly unwritten."""
    if isinstance(path, Member):
        return io.BytesIO(path.read())
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
    file = PatientFile(io.FileIO(path))
    if (holes := count_holes(file)) > MOST_HOLES:
        file.close()
        raise UserError(
            f"{path}: {holes:,} of its bytes were never written (a download that did not finish?)"
        )
    return file


def count_holes(file) -> int:
    """Bytes of a large file for which the disk holds nothing; counted until they are more than MOST_HOLES."""
    size, at, holes = os.fstat(file.fileno()).st_size, 0, 0
    if size > MOST_HOLES and hasattr(os, "SEEK_HOLE"):
        with contextlib.suppress(OSError):  # there are no data after a hole that reaches the end
            while at < size and holes <= MOST_HOLES:
                start = os.lseek(file.fileno(), at, os.SEEK_HOLE)
                holes, at = holes + size - start, size
                at = os.lseek(file.fileno(), start, os.SEEK_DATA)
                holes -= size - at
        file.seek(0)
    return holes


@contextlib.contextmanager
def open_image(path):
    """The first picture in a file, not decoded yet. Whatever fails in it is a UserError that names the
    file."""
    with naming(path), open_file(path) as file:
        if (size := file.seek(0, os.SEEK_END)) > 16 * MAX_PIXELS:  # some decoders read it all at once
            raise UserError(f"{size:,} bytes are over the limit of {16 * MAX_PIXELS:,} for a picture")
        file.seek(0)
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            suffix = Path(path).suffix.lower()
            film = suffix in VIDEOS - SUFFIXES
            known = "n MP4, MOV, MKV, WebM or AVI video" if film else f" {', '.join(FORMATS)} picture"
            advice = f" ({OTHER_PICTURES[suffix]})" if suffix in OTHER_PICTURES else ""
            raise UserError(f"not a{known}{advice}") from None
        with image:
            check_size(*image.size)
            yield image


def check_size(width, height):
    if width * height > MAX_PIXELS:
        raise UserError(f"{width}x{height} pixels are over the limit of {MAX_PIXELS:,}")


# ---------------------------------------- pictures

# EXIF's Orientation as the signs (a, b, c, d) of a display matrix: x' = a x + c y, y' = b x + d y.
ORIENTATIONS = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def turn(x_HW, signs):
    """An array of pixels, turned and mirrored by a display matrix."""
    right, a, d, down = signs
    if a:  # x' comes from y
        x_HW, right, down = x_HW.swapaxes(0, 1), d, a
    return x_HW[::down, ::right]


def upright(image: Image.Image, x_HW):
    """The pixels of a loaded image, turned as its EXIF says (Pillow has turned those of a TIFF)."""
    signs = ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    return turn(x_HW, signs) if signs else x_HW


def read_image(path, size: int, fit: Literal["stretch", "crop"] = "stretch", box=None) -> np.ndarray:
    """One picture file -> float32 [size, size, 3] in [0, 1].

    `stretch` resizes by bicubic without keeping the aspect ratio, as LVM does; `crop` cuts a square. `box` =
    (x, y, side) is the part to show: side as a share of the largest, x and y the shares of the rest that lie
    left of it and above it; by default (0.5, 0.5, 1). EXIF rotation is applied, transparency is laid over
    white, of several pictures the first is taken. Greys of 16 and 32 bits are scaled by 65535, floats must
    lie in [0, 1]. Raises UserError, naming the file, for what is missing, no picture of FORMATS, damaged,
    over 64 Mpx, not finite or over full scale."""
    with open_image(path) as image:
        image = next(frames_of_gif(image, [0])) if image.format == "GIF" else image
        return to_pixels(image, size, fit, box)


def to_pixels(image, size: int, fit="stretch", box=None, resample=Image.Resampling.BICUBIC) -> np.ndarray:
    """Pillow image of any mode -> float32 [size, size, 3] in [0, 1]; see `read_image`."""
    image = Image.fromarray(np.ascontiguousarray(upright(image, np.asarray(displayed(image)))))
    x, y, side = box or (0.5, 0.5, 1.0)
    width, height = (side * n for n in (image.size if fit == "stretch" else (min(image.size),) * 2))
    left, top = x * (image.width - width), y * (image.height - height)
    part = left, top, min(left + width, image.width), min(top + height, image.height)
    pixels = np.asarray(image.resize((size, size), resample, part), np.float32)
    if pixels.ndim == 2:
        return np.repeat(np.clip(pixels, 0, 1)[:, :, None], 3, axis=2)
    return pixels / 255


def displayed(image: Image.Image) -> Image.Image:
    """Any image -> RGB, or for greys of more than 8 bits F in [0, 1], transparent parts white."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        numbers_HW, black, white = stored_numbers(image)
        grey_HW = (numbers_HW.astype(np.float32) - black) / np.float32(white - black)
        if clear is not None:
            grey_HW[numbers_HW == clear] = 1
        if not np.isfinite(grey_HW).all():
            raise UserError("holds NaN or infinity; wanted [0, 1]")
        low, high = grey_HW.min(), grey_HW.max()
        if low < 0 or high > 1:
            raise UserError(f"values lie in [{low:g}, {high:g}] of full scale; wanted [0, 1]")
        return Image.fromarray(grey_HW)
    if image.has_transparency_data:
        if clear is not None and (step := levels_between(image)) != 1:
            image.info["transparency"] = clear * step  # Pillow scales the greys, but not what is clear
        elif isinstance(clear, tuple) and "16" in stored_as(image):
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def stored_as(image: Image.Image) -> str:
    """Pillow's name for how an image that is not loaded yet stores pixels; L;4 are greys of 4 bits."""
    layout = image.tile[0].args if getattr(image, "tile", []) else ""
    return str(layout if isinstance(layout, str) or not layout else layout[0])


def levels_between(image: Image.Image) -> int:
    """By what Pillow multiplies the numbers as it loads an image: it widens greys of 2 and 4 bits to 8."""
    return {"L;2": 85, "L;4": 17}.get(stored_as(image)[:3], 1)


def stored_numbers(image: Image.Image):
    """An image of one channel, not loaded yet -> (its numbers as the file stores them [H, W], black, white).

    Pillow would widen greys of few bits, invert TIFFs that count from white to black, and lose some signs."""
    step, tags = levels_between(image), getattr(image, "tag_v2", {})
    signed, bits = tags.get(TIFF.SAMPLEFORMAT, (1,))[0] == 2, tags.get(TIFF.BITSPERSAMPLE, (8,))[0]
    numbers_HW = np.asarray(image)
    if image.mode == "L" and signed:
        numbers_HW = numbers_HW.view(np.int8)
    elif image.mode == "I" and bits == 32 and not signed:
        numbers_HW = numbers_HW.view(np.uint32)
    elif image.mode in ("1", "L"):
        numbers_HW = numbers_HW.astype(np.uint8) // step
    black, white = 0, {"1": 1, "L": 255 // step, "F": 1}.get(image.mode, 65535)
    if tags.get(TIFF.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        black, white = white, black
        if image.mode in ("1", "L"):
            numbers_HW = black - numbers_HW
    return numbers_HW, black, white


def read_integers(path) -> np.ndarray:
    """A grey or palette picture -> the integers that it stores, int64 [H, W]. UserError for colours and
    floats."""
    with open_image(path) as image:
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise UserError(f"a {image.mode} picture, not a map of integers")
        return upright(image, stored_numbers(image)[0].astype(np.int64))


def read_half(path) -> np.ndarray:
    """A 16-bit picture that holds float16 values -> float32 [H, W], infinities and NaN as 0.

    Raises UserError where the numbers are ordinary integers, such as millimetres, which would be black: where
    float16 values are negative, their median is under 1/16 (integers up to 11,264), or nine of ten span 1,024
    times."""
    bits_HW = read_integers(path)
    if bits_HW.min(initial=0) < 0 or bits_HW.max(initial=0) > 65535:
        raise UserError(f"{path}: values of more than 16 bits are no float16")
    depth_HW = bits_HW.astype(np.uint16).view(np.float16).astype(np.float32)
    known_HW = np.where(np.isfinite(depth_HW), depth_HW, 0)
    some = known_HW[known_HW != 0] if known_HW.any() else np.ones(1)
    low, middle, high = np.quantile(some, (0.05, 0.5, 0.95))
    if (depth_HW < 0).any() or middle < 1 / 16 or high > 1024 * low:
        raise UserError(
            f"{path}: as float16 (--half-floats) its depths lie around {middle:.2g}, from {low:.2g} to "
            f"{high:.2g}: it holds ordinary integers; type --half-floats without a name"
        )
    return known_HW


def read_depth(path, size) -> np.ndarray:
    """A grey picture of depths in any unit (1 to 32 bits, or float) -> float64 [size, size], the nearest
    pixels, 0 where unknown. Raises UserError for negative, infinite and NaN depths, and for colours."""
    with open_image(path) as image:
        if image.mode == "P":
            image = image.convert("RGB")
        if image.mode == "RGB" and not np.ptp(image, axis=2).any():
            image = image.getchannel(
                0
            )  # a palette of greys: the depth is what is shown, not the entry's number
        if image.mode not in ("1", "L", "F") and not image.mode.startswith("I"):
            raise UserError(f"a picture of colours ({image.mode}), not a map of depths")
        depth_HW = upright(image, stored_numbers(image)[0].astype(np.float64))
        if not np.isfinite(depth_HW).all() or depth_HW.min() < 0:
            raise UserError("holds negative or not finite depths; write 0 where the depth is unknown")
    y, x = (
        np.minimum((np.arange(size) + 0.5) * side / size, side - 1).astype(int) for side in depth_HW.shape
    )
    return depth_HW[y][:, x]


def read_edges(path) -> np.ndarray:
    """A picture of white lines on black -> bool [H, W], True over half of full scale (1 of 1 bit, 255 of 8
    bits, 65535 of more, 1.0 of floats; colours by their luminance). Raises UserError for values outside of
    the scale, transparency, and where something is drawn but nothing is over half."""
    with open_image(path) as image:
        grey = image.mode.startswith("I") or image.mode == "F"
        clear = image.has_transparency_data
        if clear and (grey or image.convert("RGBA").getchannel("A").getextrema()[0] < 255):
            raise UserError("has transparent pixels; wanted white lines on black")
        shown = displayed(image)
        grey_HW = upright(image, np.asarray(shown if grey else shown.convert("L")) / (1 if grey else 255))
        if 0 < grey_HW.max() <= 0.5:
            raise UserError(
                f"its brightest pixel is {grey_HW.max():.3g} of full scale, and edges are those over 0.5; "
                "draw them white"
            )
        return grey_HW > 0.5


def shown_size(path) -> tuple[int, int]:
    """(width, height) of a picture, or of the first frame of a video, as they are shown."""
    if is_video(path):
        with open_video(path, read_index(path).stream) as (container, stream):
            return frame_image(next(container.decode(stream))).size
    with open_image(path) as image:
        image.load()
        return upright(image, np.broadcast_to(0, image.size[::-1])).shape[::-1]


# ---------------------------------------- clips


def count_frames(path) -> int:
    """Frames that a video or an animation (GIF, APNG, WebP) shows, undecoded; 1 for any other picture."""
    if is_video(path):
        return read_index(path).shown
    with open_image(path) as image:
        return frames_in(image)


def read_frames(path, wanted, size: int, fit="stretch", box=None):
    """Frames of a video or an animation, by increasing number -> (the wanted ones, resized bilinearly as the
    published script does; None), or ([], how many there are) if that is fewer."""
    show = lambda image: to_pixels(image, size, fit, box, Image.Resampling.BILINEAR)
    wanted = list(wanted)
    if is_video(path):
        return read_video(path, wanted, show)
    with open_image(path) as image:
        if wanted[-1] >= (count := frames_in(image)):
            return [], count
        frames = frames_of_gif if image.format == "GIF" else frames_of
        return [show(frame) for frame in frames(image, wanted)], None


def read_clip(path, wanted, size: int, fit="stretch") -> list[np.ndarray]:
    """`read_frames` where all of the wanted frames must be there."""
    pictures, there = read_frames(path, wanted, size, fit)
    if there is not None:
        raise UserError(
            f"{path}: {there} frames can be decoded, its container promises more; take it away or mend it"
        )
    return pictures


def read_pictures(pictures, size, fit) -> np.ndarray:
    """(file, frame) of every picture -> float32 [T, size, size, 3] in [0, 1]; a clip is read once."""
    pixels = []
    for path, group in itertools.groupby(pictures, lambda picture: picture[0]):
        frames = [frame for _, frame in group]
        if count_frames(path) == 1 and not is_video(path):
            pixels += [read_image(path, size, fit)] * len(frames)
            continue
        wanted = sorted(set(frames))
        read = read_clip(path, wanted, size, fit)
        pixels += [read[wanted.index(frame)] for frame in frames]
    return np.stack(pixels)


def moves(path) -> bool:
    try:
        return count_frames(path) > 1
    except UserError:
        return False


def frames_in(image: Image.Image) -> int:
    """Frames of a GIF, APNG or WebP; 1 for a phone's JPEG of several pictures or a TIFF of pages."""
    count = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP") else 1
    return count - (count > 1 and getattr(image, "default_image", False))  # shown only where APNG is unknown


def frames_of(image: Image.Image, wanted):
    for number in wanted:
        image.seek(number + getattr(image, "default_image", False))
        yield image


def frames_of_gif(image: Image.Image, wanted):
    """As browsers show them: what no frame has drawn, or one cleared, is transparent. Pillow makes it
    black."""
    drawn_HW = np.zeros(image.size[::-1], bool)
    for number in range(wanted[-1] + 1):
        image.seek(number)
        before_HW, (left, top, right, bottom) = drawn_HW, image.dispose_extent
        drawn_HW = drawn_HW.copy()
        drawn_HW[top:bottom, left:right] = True
        if number in wanted:
            frame = image.convert("RGBA")
            frame.putalpha(Image.fromarray(np.where(drawn_HW, np.asarray(frame)[..., 3], 0).astype(np.uint8)))
            yield frame
        if image.disposal_method == 2:
            drawn_HW[top:bottom, left:right] = False
        elif image.disposal_method == 3:
            drawn_HW = before_HW


# ---------------------------------------- videos

HEIF_BRANDS = b"avif avis heic heix heim heis hevc hevx mif1 msf1".split()
ONE_FRAME_A_PACKET = {"h264", "hevc", "av1", "libdav1d", "vp9", "mjpeg", "prores"}


def demuxer(head: bytes) -> str | None:
    """The demuxer by a file's first 12 bytes; None for what is no video. It is named, never guessed: FFmpeg
    would also try playlists, which open the files that they name."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return None if head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS else "mov"  # mp4 too
    if head[:4] == b"RIFF":
        return "avi" if head[8:] == b"AVI " else None  # WebP
    return "matroska" if head[:4] == b"\x1aE\xdf\xa3" else None  # webm too


def is_video(path) -> bool:
    with naming(path), open_file(path) as file:
        return demuxer(file.read(12)) is not None


class Index(NamedTuple):
    """The packets of a video's moving stream, in the order in which they are decoded.

    `exact`: frame n is surely the n-th of the shown packets by time, so that it can be sought. `seek_N`: the
    times by which the container finds packets: of showing them in Matroska, else of decoding them."""

    stream: int
    shown: int  # packets whose frames are shown: an edit list hides some
    exact: bool
    pts_N: np.ndarray
    seek_N: np.ndarray
    key_N: np.ndarray
    hidden_N: np.ndarray


def read_index(path) -> Index:
    """Reads the packets of a video, decoding nothing. Kept until the file changes."""
    about = os.stat(path)
    return _read_index(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(16)
def _read_index(path, size, changed) -> Index:
    with open_video(path) as (container, _):
        covers = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise UserError("no moving picture in it")
        packets = [
            (packet.stream_index, packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
            for packet in container.demux(*streams)
            if packet.size
        ]
        shown = collections.Counter(number for number, *_, hidden in packets if not hidden)
        # A cover can be a video of one frame, and come first.
        number = max((stream.index for stream in streams), key=lambda index: shown[index])
        packets = [packet[1:] for packet in packets if packet[0] == number]
        if (codec := container.streams[number].codec_context) is None:
            raise UserError("its codec is not one that this FFmpeg decodes; type: ffmpeg -i IN OUT.mp4")
        check_size(codec.width, codec.height)
        by_showing = "matroska" in container.format.name
        times = [(pts, pts if by_showing else dts) for pts, dts, *_ in packets]
        known = bool(times) and not any(time is None for pair in times for time in pair)
        pts_N, seek_N = np.array(times).T if known else np.zeros((2, 0), np.int64)
        key_N, hidden_N = np.array([packet[2:] for packet in packets], bool).reshape(-1, 2).T
        exact = known and codec.name in ONE_FRAME_A_PACKET and key_N[0] and pts_N.min() == pts_N[0]
        exact = bool(exact and len(np.unique(pts_N[~hidden_N])) == shown[number])
        return Index(number, shown[number], exact, pts_N, seek_N, key_N, hidden_N)


@contextlib.contextmanager
def open_video(path, stream: int | None = None):
    """(container, stream of this number). Raises UserError, naming the file, for whatever fails in it."""
    with naming(path), open_file(path) as file:
        format = demuxer(file.read(12))
        file.seek(0)
        with av.open(file, format=format) as container:
            if stream is not None:
                stream = container.streams[stream]
                stream.thread_type = "NONE"  # the workers are many already
            yield container, stream


def read_video(path, wanted: list[int], show):
    """As `read_frames`. Where frames can be sought, only what the wanted ones need is decoded."""
    index = read_index(path)
    if wanted[-1] >= index.shown:
        return [], index.shown
    if index.exact:
        with open_video(path, index.stream) as (container, stream):
            pictures = [show(frame_image(frame)) for frame in sought(container, stream, index, wanted)]
        if len(pictures) == len(wanted):
            return pictures, None
    pictures, left, number, damaged = [], collections.deque(wanted), -1, False
    with open_video(path, index.stream) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            damaged = frame.is_corrupt or damaged and not frame.key_frame  # frames are made from earlier ones
            if number == left[0]:
                if damaged:
                    raise UserError(f"frame {number} is damaged, or made from a damaged one")
                pictures.append(show(frame_image(frame)))
                left.popleft()
                if not left:
                    return pictures, None
    return [], number + 1


def sought(container, stream, index: Index, wanted):
    """Yields the wanted frames, each decoded from the last key frame before it. Stops early where the decoder
    shows other frames than the packets promise, or damaged ones: then all must be decoded."""
    order_N, frames, last = np.sort(index.pts_N[~index.hidden_N]), None, -1
    for number in wanted:
        place = np.flatnonzero((index.pts_N == order_N[number]) & ~index.hidden_N)[0]
        key = np.flatnonzero(index.key_N[: place + 1] & (index.pts_N[: place + 1] <= order_N[number]))[-1]
        try:
            if frames is None or index.pts_N[key] > order_N[last]:
                container.seek(int(index.seek_N[key]), stream=stream)
                frames, last = container.decode(stream), None
            for frame in frames:
                n = int(np.searchsorted(order_N, frame.pts)) if frame.pts is not None else len(order_N)
                if n > number or order_N[n] != frame.pts or last is not None and n != last + 1:
                    return
                if frame.is_corrupt and frame.pts >= index.pts_N[key]:  # later frames are made from this one
                    return
                last = n
                if n == number:
                    break
            else:
                return
        except av.error.FFmpegError:
            return
        yield frame


def frame_image(frame: av.VideoFrame) -> Image.Image:
    """A decoded frame -> RGB (RGBA where it has transparent parts) as players show it: turned and mirrored as
    its display matrix says, colours by its own matrix and range (BT.601 where none is named)."""
    check_size(frame.width, frame.height)
    transparent = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba")) if transparent else frame.to_image()
    for data in frame.side_data:
        if data.type == Type.DISPLAYMATRIX:
            signs = np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]].astype(np.float64)
            signs = tuple(np.rint(signs / max(1, *np.abs(signs))).astype(int).tolist())
            if signs in ORIENTATIONS.values():
                return Image.fromarray(np.ascontiguousarray(turn(np.asarray(image), signs)))
    return image


# ---------------------------------------- pictures out


def encode_image(image: Image.Image, path, **options) -> bytes:
    """An image in the format that the suffix of `path` names, to be written whole.

    Raises UserError for a suffix of no format that is also read."""
    if (suffix := Path(path).suffix.lower()) not in SUFFIXES:
        raise UserError(f"{path}: no picture that is written has the suffix {suffix!r}; take .png")
    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[suffix], **options)
    return content.getvalue()


def encode_animation(images: list[Image.Image], path, rate: int = 5) -> bytes:
    """Frames, `rate` a second, as GIF where `path` ends so, else as MP4 (H.264), to be written whole."""
    if Path(path).suffix.lower() == ".gif":
        how = {"save_all": True, "append_images": images[1:], "duration": 1000 // rate, "loop": 0}
        return encode_image(images[0], path, **how)
    with av.open(content := io.BytesIO(), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height = (n + n % 2 for n in images[0].size)  # 4:2:0 halves both
        stream.pix_fmt = "yuv420p"
        for image in images:
            canvas = Image.new("RGB", (stream.width, stream.height), "white")
            canvas.paste(image)
            container.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        container.mux(stream.encode())
    return content.getvalue()


def to_image(pixels_HWC) -> Image.Image:
    """Pixels in [0, 1] -> an image of 8 bits."""
    return Image.fromarray((np.asarray(pixels_HWC) * 255 + 0.5).astype(np.uint8))


def sheet(rows, captions: bool = True, columns: int | None = None) -> Image.Image:
    """Rows of square pictures of one size on white -> one picture.

    A row is a list of pixels_HWC in [0, 1] or of pairs (pixels_HWC, caption below it), or a string: a title.
    Rows of more than `columns` pictures wrap. Pictures of under 128 pixels are enlarged to at least that."""
    gap, line, lines, font = 6, 18, [], ImageFont.load_default(13)
    for row in rows:
        width = len(row) if isinstance(row, str) else columns or len(row)
        lines += [row[i : i + width] for i in range(0, len(row), width)]
    cells = lambda row: [cell if isinstance(cell, tuple) else (cell, "") for cell in row]
    size = next(len(cells(row)[0][0]) for row in lines if not isinstance(row, str))
    side = size * math.ceil(128 / size)
    width_of = lambda row: math.ceil(font.getlength(row)) if isinstance(row, str) else len(row) * (side + gap)
    height_of = lambda row: line if isinstance(row, str) else side + line * captions + gap
    width, height = max(map(width_of, lines)), sum(map(height_of, lines))
    image, top = Image.new("RGB", (gap + width, gap + height), "white"), gap
    draw = ImageDraw.Draw(image)
    for row in lines:
        if isinstance(row, str):
            draw.text((gap, top), row, "black", font)
        for x, (pixels_HWC, caption) in enumerate(cells(row) if not isinstance(row, str) else ()):
            left = gap + x * (side + gap)
            image.paste(to_image(pixels_HWC).resize((side, side), Image.Resampling.BICUBIC), (left, top))
            if captions:
                draw.text((left + side / 2, top + side + 2), caption, "black", font, anchor="ma")
        top += height_of(row)
    return image
