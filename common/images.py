"""Pictures and videos in and out, and the error for what a user can cause.

Every command reads through this module: it finds the files below a folder, opens them safely and gives their pixels.
No file is trusted: pictures are opened by a list of formats and up to MAX_PIXELS, videos by a demuxer that is named, and
whatever fails in a file becomes a UserError that names it.

Dimension key: N packets of a video, H W C a picture.
"""

import collections
import contextlib
import functools
import io
import itertools
import math
import os
import re
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

    Commands print it as one line and end with status 2; any other exception is a bug of ours and keeps its traceback."""

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
MAX_PIXELS = 64_000_000
MOST_HOLES = 1 << 30  # decoders would look for hours for something in the zeros of a sparse file
VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".apng"}  # and animated .png and .webp
HEIF_HEADS = {
    b"ftyp" + brand
    for brand in (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
}
SOUGHT = {
    "h264",
    "hevc",
    "av1",
    "libdav1d",
    "vp9",
    "mjpeg",
    "prores",
}  # codecs of which each packet is one frame

# Files that look like pictures or videos and are not read: what to do about them.
CONVERT = "not a format that is read; save it as PNG, TIFF or JPEG"
OTHER_PICTURES = (
    dict.fromkeys(
        ".psd .psb .xcf .jp2 .j2k .jxl .jxr .tga .exr .hdr .pfm .ppm .pgm .pbm .pnm .svg .eps .ico .dds .pcx .fits".split(),
        CONVERT,
    )
    | dict.fromkeys(
        ".raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw".split(),
        "a camera's raw data; develop it to TIFF or JPEG",
    )
    | dict.fromkeys((".heic", ".heif"), "Pillow reads HEIC by a plug-in: pip install pillow-heif")
    | {".avif": "this Pillow reads no AVIF: pip install --upgrade pillow"}
)
OTHER_VIDEOS = dict.fromkeys(
    ".wmv .asf .flv .mpg .mpeg .ts .m2ts .mts .3gp .ogv .vob .rm .mxf".split(),
    "not a container that is read; type: ffmpeg -i IN OUT.mp4",
)


# -------------------------------------------------------------------------------------------------- finding files


def natural(path):
    """Sorting key of paths: folder by folder, numbers (of ASCII digits) by their value, so frame 2 stands before frame 10."""
    split = lambda name: [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]
    return [split(part) for part in Path(path).parts], str(path)


def walk(folder: Path, notes: list):
    """(files with whether they are regular ones, folders) below a folder, in natural order.

    Links are followed, real folders before them, and each folder is read once, so that loops end and no file comes twice;
    what begins with a dot is skipped. Folders that cannot be read and links that lead back are added to `notes`."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    files, folders, waiting, links, seen = [], [], [Path(folder)], [], set()
    while waiting or links:
        if not waiting:
            links.sort(key=natural)
        here = waiting.pop() if waiting else links.pop(0)
        if (real := os.path.realpath(here)) in seen:
            notes.append({"path": str(here), "reason": f"a link to {real}, which is read already"})
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(here))
        except OSError as error:
            if here == Path(folder):
                raise UserError(f"{folder}: {error.strerror}") from None
            notes.append({"path": str(here), "reason": error.strerror})
            continue
        folders.append(here)
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else waiting).append(path)
            else:
                files.append((path, os.path.isfile(path) if entry.is_symlink() else entry.is_file()))
    return sorted(files, key=lambda file: natural(file[0])), sorted(folders, key=natural)


def find_files(
    folder: Path, suffixes, others: dict[str, str], text: str = "", notes: list | None = None
) -> list[Path]:
    """Files below a folder whose names end in one of `suffixes` and whose path below it holds `text`, in natural order.

    Whatever is left out though it looks like one of them goes into `notes` as {"path", "reason"}: files of the suffixes
    `others`, what is no regular file, links that lead nowhere. Without `notes`, one line is printed about them."""
    left, paths = [], []
    files, _ = walk(folder, left)
    for path, regular in files:
        suffix = path.suffix.lower()
        if suffix not in suffixes and suffix not in others or text not in path.relative_to(folder).as_posix():
            continue
        if not regular:
            left.append(
                {
                    "path": str(path),
                    "reason": "not a regular file" if path.exists() else "a link that leads nowhere",
                }
            )
        elif suffix in suffixes:
            paths.append(path)
        else:
            left.append({"path": str(path), "reason": others[suffix]})
    if notes is not None:
        notes += left
    elif left:
        counts = collections.Counter(note["reason"] for note in left)
        first = {note["reason"]: note["path"] for note in reversed(left)}
        print(
            f"left out below {folder}: "
            + "; ".join(
                f"{first[reason]}{f' and {n - 1} more' if n > 1 else ''} ({reason})"
                for reason, n in counts.items()
            )
        )
    return paths


def find_images(folder: Path, notes: list | None = None, text: str = "") -> list[Path]:
    """The pictures below a folder; see `find_files`. Raises UserError where there is no folder, or nothing in it."""
    paths = find_files(
        folder, SUFFIXES, {k: v for k, v in OTHER_PICTURES.items() if k not in SUFFIXES}, text, notes
    )
    if not paths:
        raise UserError(
            f"{folder}: no pictures below this folder ({' '.join(sorted(SUFFIXES))}){holding(text)}"
        )
    return paths


def find_stems(folder: Path, text: str, notes: list | None = None) -> dict[str, Path]:
    """{path below the folder without its suffix: path} of the pictures; a second file of the same name goes into the notes."""
    stems, twice = {}, []
    for path in find_images(folder, notes, text):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in stems:
            twice.append({"path": str(path), "reason": f"has the name of {stems[stem]}, but for the suffix"})
        stems.setdefault(stem, path)
    if notes is not None:
        notes += twice
    elif twice:
        print(
            f"left out: {len(twice)} pictures that differ from others only in the suffix, such as {twice[0]['path']}"
        )
    return stems


def find_videos(folder: Path, text: str = "", notes: list | None = None) -> list[Path]:
    """The videos and animations below a folder; see `find_files`."""
    still, found = [], find_files(folder, VIDEOS | {".png", ".webp"}, OTHER_VIDEOS, text, notes)
    files = [path for path in found if path.suffix.lower() in VIDEOS or moves(path) or still.append(path)]
    if notes is not None:
        notes += [
            {
                "path": str(path),
                "reason": "a picture that does not move; the kind `frames` reads folders of them",
            }
            for path in still
        ]
    if not files:
        raise UserError(f"{folder}: no videos below this folder ({' '.join(sorted(VIDEOS))}){holding(text)}")
    return files


def find_clips(
    folder: Path, text: str, videos: bool, notes: list | None = None
) -> dict[str, "Path | tuple[Path, ...]"]:
    """{name: the pictures that a folder directly holds or, with `videos`, a video file without its suffix}."""
    films = VIDEOS if videos else set()
    others = {
        suffix: reason
        for suffix, reason in (OTHER_PICTURES | (OTHER_VIDEOS if videos else {})).items()
        if suffix not in SUFFIXES
    }
    clips, folders = {}, collections.defaultdict(list)
    for path in find_files(folder, SUFFIXES | films, others, "", notes):
        if path.suffix.lower() not in films:
            folders[path.parent].append(path)
        elif text in (name := path.relative_to(folder)).as_posix():
            if (name := name.with_suffix("").as_posix()) in clips:
                raise UserError(f"{path}: another clip of this name is beside it; rename one of them")
            clips[name] = path
    for parent, pictures in folders.items():
        if parent != folder and text in (name := parent.relative_to(folder).as_posix()):
            clips[name] = tuple(pictures)
        elif parent == folder and not videos and text in folder.name:
            clips["."] = tuple(pictures)
    if not clips:
        raise UserError(f"{folder}: no clips below this folder{holding(text)}")
    return dict(sorted(clips.items(), key=lambda clip: natural(clip[0])))


def find_tracks(
    folder: Path, text: str, modalities: tuple[str, ...], notes: list
) -> dict[str, list[tuple[Path, ...]]]:
    """{name of a folder that holds folders named as the modalities: the pictures of each of these}."""
    clips, tracks = collections.defaultdict(list), {}
    for path in find_images(folder, notes):
        clips[path.parent].append(path)
    for track in sorted(
        (parent.parent for parent in clips if parent.name == modalities[0] and parent != folder), key=natural
    ):
        missing = [name for name in modalities if track / name not in clips]
        if missing:
            notes.append({"path": str(track), "reason": f"a track without {' and '.join(missing)}"})
        elif text in (name := track.relative_to(folder).as_posix()):
            tracks[name] = [tuple(clips[track / modality]) for modality in modalities]
    return tracks


def holding(text: str) -> str:
    return f" with {text!r} in their path" if text else ""


# ---------------------------------------------------------------------------------------------------- opening files


@contextlib.contextmanager
def naming(path):
    """Whatever fails inside (decoders raise many kinds of errors) becomes a UserError that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            reason if isinstance(error, UserError) and str(path) in reason else f"{path}: {reason}"
        ) from None


class PatientFile(io.BufferedReader):
    """A file that is read up to two million times for a few bytes only: some decoders look for the next marker byte by byte,
    and in a file of zeros they would go on for hours."""

    left = 2_000_000

    def read(self, size=-1):
        self.left -= 0 <= size < 8
        if self.left < 0:
            raise UserError("its parts are too small or too many: no picture is found in it")
        return super().read(size)


def open_file(path) -> io.BufferedReader:
    """A file opened to read bytes. Raises UserError for what is none: opening a FIFO would wait, and a device has no end."""
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
    """Bytes of a file for which the disk holds nothing and which read as zeros; counted until they are MOST_HOLES."""
    size, at, holes = os.fstat(file.fileno()).st_size, 0, 0
    while size > MOST_HOLES >= holes and hasattr(os, "SEEK_HOLE"):
        start = os.lseek(file.fileno(), at, os.SEEK_HOLE)
        try:
            at = os.lseek(file.fileno(), start, os.SEEK_DATA)
        except OSError:  # the hole reaches to the end
            at = size
        holes += at - start
        if at >= size:
            break
    file.seek(0)
    return holes


@contextlib.contextmanager
def open_image(path):
    """The first picture in a file, not decoded yet. Raises UserError, naming the file, for whatever fails in it."""
    with naming(path), open_file(path) as file:
        if (
            size := os.fstat(file.fileno()).st_size
        ) > 16 * MAX_PIXELS:  # some decoders read all of it at once
            raise UserError(f"{size:,} bytes are over the limit of {16 * MAX_PIXELS:,} for a picture")
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            suffix = Path(path).suffix.lower()
            known = (
                "n MP4, MOV, MKV, WebM or AVI video"
                if suffix in VIDEOS - SUFFIXES
                else f" {', '.join(FORMATS)} picture"
            )
            raise UserError(
                f"not a{known}" + (f" ({OTHER_PICTURES[suffix]})" if suffix in OTHER_PICTURES else "")
            ) from None
        with image:
            check_size(*image.size)
            yield image


def check_size(width, height):
    if width * height > MAX_PIXELS:
        raise UserError(f"{width}x{height} pixels are over the limit of {MAX_PIXELS:,}")


# ---------------------------------------------------------------------------------------------------- pictures

# What turns the rows and columns as they are stored upright, by the number of EXIF's Orientation.
TURNS = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
# The same numbers by the signs a, b, c, d of a video's display matrix: x' = a x + c y, y' = b x + d y.
MATRICES = {
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


def upright(image: Image.Image, x_HW):
    """The pixels of a loaded image, turned as its EXIF says (Pillow has turned those of a TIFF)."""
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return turn(x_HW) if turn else x_HW


def read_image(path, size: int, fit: Literal["stretch", "crop"] = "stretch", box=None) -> np.ndarray:
    """One picture file -> float32 [size, size, 3] in [0, 1].

    `stretch` resizes by bicubic without keeping the aspect ratio, as LVM does; `crop` cuts a square. `box` = (x, y, side)
    is the part to show: side as a share of the largest, x and y the shares of what is left over that lie left of it and
    above it; by default (0.5, 0.5, 1), the largest in the middle.
    EXIF rotation is applied, transparency is laid over white, of a file of several pictures the first is taken. Greys of
    16 and 32 bits are scaled by 65535, floats must lie in [0, 1]; NaN, infinity and what is over full scale are refused.
    Raises UserError, naming the file, for what is no picture of FORMATS, is damaged, or is over 64 Mpx; and where there is
    none."""
    with open_image(path) as image:
        image = next(frames_of_gif(image, [0])) if image.format == "GIF" else image
        return to_pixels(image, size, fit, box)


def to_pixels(
    image: Image.Image, size: int, fit="stretch", box=None, resample=Image.Resampling.BICUBIC
) -> np.ndarray:
    """Pillow image of any mode -> float32 [size, size, 3] in [0, 1]; see `read_image`."""
    image = Image.fromarray(np.ascontiguousarray(upright(image, np.asarray(displayed(image)))))
    x, y, side = box or (0.5, 0.5, 1.0)
    width, height = (side * n for n in (image.size if fit == "stretch" else (min(image.size),) * 2))
    left, top = x * (image.width - width), y * (image.height - height)
    image = image.resize(
        (size, size), resample, (left, top, min(left + width, image.width), min(top + height, image.height))
    )
    pixels = np.asarray(image, np.float32)
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
        check_grey(grey_HW)
        return Image.fromarray(grey_HW)
    if image.has_transparency_data:
        if (
            clear is not None and (step := levels_between(image)) != 1
        ):  # Pillow scales the greys, but not what is clear
            image.info["transparency"] = clear * step
        elif isinstance(clear, tuple) and "16" in stored_as(image):
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_grey(grey_HW):
    if not np.isfinite(grey_HW).all():
        raise UserError("holds NaN or infinity; wanted [0, 1]")
    if grey_HW.min() < 0 or grey_HW.max() > 1:
        raise UserError(f"values lie in [{grey_HW.min():g}, {grey_HW.max():g}] of full scale; wanted [0, 1]")


def stored_as(image: Image.Image) -> str:
    """Pillow's name for how the pixels of an image that is not loaded yet are stored, such as L;4 for greys of 4 bits."""
    layout = image.tile[0].args if getattr(image, "tile", []) else ""
    return str(layout if isinstance(layout, str) or not layout else layout[0])


def levels_between(image: Image.Image) -> int:
    """By what Pillow multiplies the numbers of an image that is not loaded yet: it widens greys of 2 and 4 bits to 8."""
    layout = stored_as(image)
    return 85 if layout.startswith("L;2") else 17 if layout.startswith("L;4") else 1


def stored_numbers(image: Image.Image):
    """An image of one channel that is not loaded yet -> its numbers as the file stores them [H, W], and which are black and white.

    Pillow would widen greys of few bits, turn TIFFs round that count from white to black, and lose the signs of some."""
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
    """A grey or palette picture -> the integers that it stores, int64 [H, W]. Raises UserError for colours and floats."""
    with open_image(path) as image:
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise UserError(f"a {image.mode} picture, not a map of integers")
        return upright(image, stored_numbers(image)[0].astype(np.int64))


HALF_FLOATS = (
    "as float16 (--half-floats) its depths {}: it holds ordinary integers; type --half-floats without a name"
)


def read_half(path) -> np.ndarray:
    """A 16-bit picture that holds float16 values -> float32 [H, W], infinities and NaN as 0.

    Raises UserError where the numbers are ordinary integers, such as millimetres: as float16 they would be black. Those are
    negative values, a median under 1/16 (integers up to 11,264), or nine of ten values that span a factor over 1,024."""
    bits_HW = read_integers(path)
    if bits_HW.min(initial=0) < 0 or bits_HW.max(initial=0) > 65535:
        raise UserError(f"{path}: values of more than 16 bits are no float16")
    depth_HW = bits_HW.astype(np.uint16).view(np.float16).astype(np.float32)
    if (depth_HW < 0).any():
        raise UserError(f"{path}: {HALF_FLOATS.format('are negative')}")
    depth_HW = np.where(np.isfinite(depth_HW), depth_HW, 0)
    if (depth_HW > 0).any():
        low, middle, high = np.quantile(depth_HW[depth_HW > 0], (0.05, 0.5, 0.95))
        if middle < 1 / 16 or high > 1024 * low:
            raise UserError(
                f"{path}: {HALF_FLOATS.format(f'lie around {middle:.2g}, from {low:.2g} to {high:.2g}')}"
            )
    return depth_HW


def read_depth(path, size) -> np.ndarray:
    """A grey picture of depths in any unit (1 to 32 bits, or float) -> float64 [size, size], the nearest pixels, 0 where
    unknown. Raises UserError for negative, infinite and NaN depths, and for colours."""
    with open_image(path) as image:
        if image.mode == "P":
            image = image.convert("RGB")
        if image.mode == "RGB" and all(
            np.array_equal(image.getchannel(0), image.getchannel(c)) for c in (1, 2)
        ):
            image = image.getchannel(
                0
            )  # the palette holds greys alone: what is shown is the depth, not the number of its entry
        if image.mode not in ("1", "L", "F") and not image.mode.startswith("I"):
            raise UserError(f"a picture of colours ({image.mode}), not a map of depths")
        depth_HW = upright(image, stored_numbers(image)[0].astype(np.float64))
        if not np.isfinite(depth_HW).all() or depth_HW.min() < 0:
            raise UserError(
                "holds depths that are negative or not finite; write 0 where the depth is unknown"
            )
    y, x = (
        np.minimum(((np.arange(size) + 0.5) * side / size).astype(int), side - 1) for side in depth_HW.shape
    )
    return depth_HW[y][:, x]


def read_edges(path) -> np.ndarray:
    """A picture of white lines on black -> bool [H, W], True where it is brighter than half of its full scale (1 of 1 bit,
    255 of 8 bits, 65535 of more, 1.0 of floats; colours by their luminance). Raises UserError for values outside of the
    scale, for transparency, and where something is drawn but nothing is brighter than half."""
    with open_image(path) as image:
        grey = image.mode.startswith("I") or image.mode == "F"
        if image.has_transparency_data and (
            grey or image.convert("RGBA").getchannel("A").getextrema()[0] < 255
        ):
            raise UserError("has transparent pixels; wanted white lines on black")
        shown = displayed(image)
        grey_HW = upright(image, np.asarray(shown if grey else shown.convert("L")) / (1 if grey else 255))
        if 0 < grey_HW.max() <= 0.5:
            raise UserError(
                f"its brightest pixel is {grey_HW.max():.3g} of full scale, and edges are those over 0.5; draw them white"
            )
        return grey_HW > 0.5


def shown_size(path) -> tuple[int, int]:
    """(width, height) of a picture, or of the first frame of a video, as they are shown."""
    if is_video(path):
        with open_video(path, read_index(path, stamp(path)).stream) as (container, stream):
            return frame_image(next(container.decode(stream))).size
    with open_image(path) as image:
        image.load()
        return upright(image, np.broadcast_to(0, image.size[::-1])).shape[::-1]


# ---------------------------------------------------------------------------------------------------- clips


def count_frames(path) -> int:
    """Frames that a video or an animation (GIF, APNG, WebP) shows, nothing being decoded; 1 for any other picture."""
    if is_video(path):
        return read_index(path, stamp(path)).shown
    with open_image(path) as image:
        return frames_in(image)


def read_frames(path, wanted, size: int, fit="stretch", box=None):
    """Frames of a video or an animation, by increasing number -> (the wanted ones, resized bilinearly as the published
    script does; None, or how many there are if fewer)."""
    show = lambda image: to_pixels(image, size, fit, box, Image.Resampling.BILINEAR)
    wanted = list(wanted)
    if is_video(path):
        return read_video(path, wanted, show)
    with open_image(path) as image:
        if wanted[-1] >= (count := frames_in(image)):
            return [], count
        return [
            show(frame) for frame in (frames_of_gif if image.format == "GIF" else frames_of)(image, wanted)
        ], None


def read_clip(path, wanted, size: int, fit="stretch") -> list[np.ndarray]:
    """`read_frames` where all of the wanted frames must be there."""
    pictures, there = read_frames(path, wanted, size, fit)
    if there is not None:
        raise UserError(
            f"{path}: {there} frames can be decoded, its container promises more; take it away or mend it"
        )
    return pictures


def read_pictures(pictures, size, fit) -> np.ndarray:
    """(file, frame) of every picture -> float32 [T, size, size, 3] in [0, 1]; a clip's frames are read in one go."""
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
    """Frames of a GIF, APNG or WebP. The second picture in a phone's JPEG and the further pages of a TIFF are none."""
    count = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP") else 1
    return count - (count > 1 and getattr(image, "default_image", False))  # shown only where APNG is unknown


def frames_of(image: Image.Image, wanted):
    for number in wanted:
        image.seek(number + getattr(image, "default_image", False))
        yield image


def frames_of_gif(image: Image.Image, wanted):
    """As browsers show them: what no frame has drawn, and what one has cleared, is transparent. Pillow makes it black."""
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


# ---------------------------------------------------------------------------------------------------- videos


def demuxer(head: bytes) -> str | None:
    """The demuxer by the first 12 bytes: it is named, never guessed, as guessing would also try playlists, which open
    what they name. None for what is no video."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") and head[4:] not in HEIF_HEADS:
        return "mov"  # mp4 too
    if head[:4] == b"RIFF":
        return "avi" if head[8:] == b"AVI " else None  # WebP
    return "matroska" if head[:4] == b"\x1aE\xdf\xa3" else None  # webm too


def is_video(path) -> bool:
    with naming(path), open_file(path) as file:
        return demuxer(file.read(12)) is not None


class Index(NamedTuple):
    """The packets of a video's moving stream, in the order in which they are decoded."""

    stream: int
    shown: int  # packets whose frames are shown: an edit list hides some
    exact: bool  # whether frame n is surely the n-th of the shown packets by time, so that it can be sought
    pts_N: np.ndarray
    seek_N: (
        np.ndarray
    )  # by which time the container finds a packet: in Matroska that of showing it, else that of decoding it
    key_N: np.ndarray
    hidden_N: np.ndarray


def stamp(path):
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


@functools.lru_cache(16)
def read_index(path, stamp) -> Index:
    """Reads the packets of a video, decoding nothing. `stamp` is the file's: another file of this name is read anew."""
    with open_video(path) as (container, _):
        covers = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise UserError("no moving picture in it")
        packets = {stream.index: [] for stream in streams}
        for packet in container.demux(*streams):
            if packet.size:
                packets[packet.stream_index].append(
                    (packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
                )
        shown = {index: sum(not hidden for *_, hidden in found) for index, found in packets.items()}
        stream = container.streams[
            max(shown, key=shown.get)
        ]  # a cover can be a video of one frame, and come first
        if (codec := stream.codec_context) is None:
            raise UserError("its codec is not one that this FFmpeg decodes; type: ffmpeg -i IN OUT.mp4")
        check_size(codec.width, codec.height)
        by_showing = "matroska" in container.format.name
        times = [(pts, pts if by_showing else dts) for pts, dts, *_ in packets[stream.index]]
        known = bool(times) and not any(time is None for pair in times for time in pair)
        pts_N, seek_N = np.array(times).T if known else np.zeros((2, 0), np.int64)
        key_N, hidden_N = np.array([packet[2:] for packet in packets[stream.index]], bool).reshape(-1, 2).T
        exact = known and codec.name in SOUGHT and key_N[0] and pts_N.min() == pts_N[0]
        exact = bool(exact and len(np.unique(pts_N[~hidden_N])) == shown[stream.index])
        return Index(stream.index, shown[stream.index], exact, pts_N, seek_N, key_N, hidden_N)


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
    """As `read_frames`. Only what the wanted frames need is decoded where the frames can be sought."""
    index = read_index(path, stamp(path))
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
            damaged = (
                frame.is_corrupt or damaged and not frame.key_frame
            )  # frames are made from those before them
            if number == left[0]:
                if damaged:
                    raise UserError(f"frame {number} is damaged, or made from a damaged one")
                pictures.append(show(frame_image(frame)))
                left.popleft()
                if not left:
                    return pictures, None
    return [], number + 1


def sought(container, stream, index: Index, wanted):
    """Yields the wanted frames, each decoded from the last key frame before it. Stops early where the decoder shows other
    frames than the packets promise, or damaged ones: only decoding everything tells then which frame is which."""
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
    """A decoded frame -> RGB (RGBA where it has transparent parts) as players show it: turned and mirrored as its display
    matrix says, colours by its own matrix and range (BT.601 where none is named) within three levels."""
    check_size(frame.width, frame.height)
    if any(component.is_alpha for component in frame.format.components):
        image = Image.fromarray(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_image()
    for data in frame.side_data:
        if data.type == Type.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(np.float64)
            signs = tuple(
                np.rint(np.array([a, b, c, d]) / max(map(abs, (a, b, c, d, 1)))).astype(int).tolist()
            )
            if turn := TURNS.get(MATRICES.get(signs)):
                return Image.fromarray(np.ascontiguousarray(turn(np.asarray(image))))
    return image


# -------------------------------------------------------------------------------------------------- pictures out


def encode_image(image, path, **options) -> bytes:
    """A PIL image in the format that the suffix of `path` names, to be written whole.

    Raises UserError for a suffix of no format that is also read."""
    if (suffix := Path(path).suffix.lower()) not in SUFFIXES:
        raise UserError(f"{path}: no picture that is written has the suffix {suffix!r}; take .png")
    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[suffix], **options)
    return content.getvalue()


def encode_animation(images: list[Image.Image], path, rate: int = 5) -> bytes:
    """Frames, `rate` a second, as GIF where `path` ends so, else as MP4 (H.264), to be written whole."""
    if Path(path).suffix.lower() == ".gif":
        return encode_image(
            images[0], path, save_all=True, append_images=images[1:], duration=1000 // rate, loop=0
        )
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
    """Pixels in [0, 1] -> a PIL image of 8 bits."""
    return Image.fromarray((np.asarray(pixels_HWC) * 255 + 0.5).astype(np.uint8))


def sheet(rows, captions: bool = True, columns: int | None = None) -> Image.Image:
    """Rows of pictures of one size on white -> one picture.

    A row is a list of pixels_HWC in [0, 1] or of pairs (pixels_HWC, caption below it), or a string: a title.
    Rows of more than `columns` pictures wrap. Pictures of under 128 pixels are enlarged to at least that."""
    gap, line, lines, font = 6, 18, [], ImageFont.load_default(13)
    for row in rows:
        width = len(row) if isinstance(row, str) else columns or len(row)
        lines += [row[i : i + width] for i in range(0, len(row), width)]
    cells = lambda row: [cell if isinstance(cell, tuple) else (cell, "") for cell in row]
    size = len(next(cells(row)[0][0] for row in lines if not isinstance(row, str)))
    side = size * math.ceil(128 / size)
    below = line if captions else 0
    widths = [
        math.ceil(font.getlength(row)) + gap if isinstance(row, str) else len(row) * (side + gap)
        for row in lines
    ]
    heights = [line if isinstance(row, str) else side + below + gap for row in lines]
    image = Image.new("RGB", (gap + max(widths), gap + sum(heights)), "white")
    draw, top = ImageDraw.Draw(image), gap
    for row, height in zip(lines, heights):
        if isinstance(row, str):
            draw.text((gap, top), row, "black", font)
        else:
            for x, (pixels_HWC, caption) in enumerate(cells(row)):
                left = gap + x * (side + gap)
                picture = to_image(pixels_HWC).resize((side, side), Image.Resampling.BICUBIC)
                image.paste(picture, (left, top))
                if captions:
                    draw.text((left + side / 2, top + side + 2), caption, "black", font, anchor="ma")
        top += height
    return image
