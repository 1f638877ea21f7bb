"""Pictures and videos in and out, and the error for what a user can cause.

Every command reads through this module: it finds the files below a folder, opens them safely and gives their pixels.

Dimension key: T pictures of a clip or prompt, H W C a picture.
"""

import collections
import contextlib
import itertools
import os
import re
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MAX_PIXELS = 64_000_000
VIDEOS = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif"}


class UserError(ValueError):
    """Wrong usage or bad input: the message names the file or flag, says what was wrong and what to type.

    Commands print it as one line and end with status 2; any other exception is a bug of ours and keeps its traceback."""


# --------------------------------------------------------------------------------------------- finding files


def find_images(folder: Path) -> list[Path]:
    """Picture files below a folder, sorted by path. Raises where there is no folder, or nothing in it."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"{folder}: no pictures below this folder ({' '.join(sorted(SUFFIXES))})")
    return paths


def find_stems(folder: Path, text: str, notes: list) -> dict[str, Path]:
    """{path below the folder without its suffix: path}, sorted; a second file of the same name goes into the notes."""
    stems = {}
    for path in find_images(folder):
        name = path.relative_to(folder)
        if text in name.as_posix():
            stem = name.with_suffix("").as_posix()
            if stem in stems:
                notes.append({"path": str(path), "reason": f"has the name of {stems[stem]}, but for the suffix"})
            stems.setdefault(stem, path)
    if not stems:
        raise UserError(f"{folder}: no picture's path holds {text!r}; change --filter or --answer-filter")
    return stems


def find_videos(folder: Path, text: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS and p.is_file() and text in p.relative_to(folder).as_posix())
    if not files:
        raise UserError(f"{folder}: no videos below this folder ({' '.join(sorted(VIDEOS))}){' with ' + repr(text) + ' in their path' if text else ''}")
    return files


def find_clips(folder: Path, text: str, videos: bool) -> dict[str, "Path | tuple[Path, ...]"]:
    """{name: video file without its suffix, or the pictures that a folder directly holds}."""
    clips = {}
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if videos and path.suffix.lower() in VIDEOS and path.is_file() and text in name:
            if (name := path.relative_to(folder).with_suffix("").as_posix()) in clips:
                raise UserError(f"{path}: another clip of this name is beside it; rename one of them")
            clips[name] = path
        elif path.is_dir() and text in name and (pictures := pictures_of(path, (".gif",) if videos else ())):
            clips[name] = pictures
    if not videos and text in folder.name and (pictures := pictures_of(folder)):
        clips["."] = pictures
    if not clips:
        raise UserError(f"{folder}: no clips below this folder{' with ' + repr(text) + ' in their path' if text else ''}")
    return clips


def pictures_of(folder: Path, no=()) -> tuple[Path, ...]:
    """The pictures that a folder directly holds, in natural order: frame 2 before frame 10."""
    natural = lambda path: [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name)]
    return tuple(sorted((p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES.difference(no) and p.is_file()), key=natural))


def is_video(path) -> bool:
    return path.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm", ".avi")


# -------------------------------------------------------------------------------------------------- pictures


def read_image(path, size: int, fit: Literal["stretch", "crop"] = "stretch", box=None) -> np.ndarray:
    """One picture file -> float32 [size, size, 3] in [0, 1].

    `stretch` resizes by bicubic without keeping the aspect ratio, as LVM does; `crop` cuts a square. `box` = (x, y, side) is
    the part to show: side as a share of the largest, x and y the shares of what is left over that lie left of it and
    above it; by default (0.5, 0.5, 1), the largest in the middle.
    EXIF rotation is applied, transparency is laid over white, of an animation the first frame is taken, and 16-bit and
    float greys are scaled by their full range (65535; float must lie in [0, 1]) instead of saturating.
    Raises UserError, naming the file, for what is no JPEG, PNG, WebP, GIF, BMP or TIFF, is damaged, or is over
    64 Mpx; and where there is none."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{image.width}x{image.height} pixels are over the limit of {MAX_PIXELS:,}")
            image = ImageOps.exif_transpose(image)
            return to_pixels(image, size, fit, box)
    except Exception as error:  # Pillow raises many kinds; whatever it is, the user wants the file's name and the reason
        reason = "not a JPEG, PNG, WebP, GIF, BMP or TIFF picture" if type(error).__name__ == "UnidentifiedImageError" else error
        raise UserError(f"{path}: {reason}") from None


def to_pixels(image: Image.Image, size: int, fit: str = "stretch", box=None, resample=Image.Resampling.BICUBIC) -> np.ndarray:
    """Pillow image of any mode -> float32 [size, size, 3] in [0, 1]; see `read_image`."""
    if image.mode.startswith("I") or image.mode == "F":
        grey_HW = np.asarray(image, np.float32) / (1.0 if image.mode == "F" else 65535.0)
        if grey_HW.min() < 0 or grey_HW.max() > 1:
            raise UserError(f"{image.mode} values lie in [{grey_HW.min():g}, {grey_HW.max():g}] of full scale; wanted [0, 1]")
        image = Image.fromarray(grey_HW)
    else:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    x, y, side = box or (0.5, 0.5, 1.0)
    width, height = (side * n for n in (image.size if fit == "stretch" else (min(image.size),) * 2))
    left, top = x * (image.width - width), y * (image.height - height)
    image = image.resize((size, size), resample, (left, top, min(left + width, image.width), min(top + height, image.height)))
    pixels = np.asarray(image, np.float32)
    if pixels.ndim == 2:
        return np.repeat(np.clip(pixels, 0, 1)[:, :, None], 3, axis=2)
    return pixels / 255


def read_integers(path) -> np.ndarray:
    """A grey or palette picture -> its stored integers, [H, W]. Raises UserError for a colour picture."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{image.width}x{image.height} pixels are over the limit of {MAX_PIXELS:,}")
            if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
                raise UserError(f"a {image.mode} picture, not a map of integers")
            return np.asarray(image).astype(np.int64)
    except Exception as error:  # as in read_image
        raise UserError(f"{path}: {error}") from None


def read_half(path) -> np.ndarray:
    """A 16-bit picture that holds float16 values -> float32 [H, W], infinities and NaN as 0."""
    bits_HW = read_integers(path)
    if bits_HW.max(initial=0) > 65535:
        raise UserError(f"{path}: values of more than 16 bits are no float16")
    return np.maximum(np.nan_to_num(bits_HW.astype(np.uint16).view(np.float16).astype(np.float32), nan=0, posinf=0, neginf=0), 0)


def read_depth(path, size) -> np.ndarray:
    """A grey picture of depths in any unit (1 to 32 bits, or float) -> float64 [size, size], the nearest pixels, 0 where
    unknown. Raises UserError for negative, infinite and NaN depths, and for colours."""
    with opened_map(path) as image:
        if image.mode == "P":
            image = image.convert("RGB")
        if image.mode == "RGB" and all(np.array_equal(image.getchannel(0), image.getchannel(c)) for c in (1, 2)):
            image = image.getchannel(0)  # the palette holds greys alone: what is shown is the depth, not the number of its entry
        if image.mode not in ("1", "L", "F") and not image.mode.startswith("I"):
            raise UserError(f"a picture of colours ({image.mode}), not a map of depths")
        depth_HW = np.asarray(image).astype(np.float64)
        if not np.isfinite(depth_HW).all() or depth_HW.min() < 0:
            raise UserError("holds depths that are negative or not finite; write 0 where the depth is unknown")
    y, x = (np.minimum(((np.arange(size) + 0.5) * side / size).astype(int), side - 1) for side in depth_HW.shape)
    return depth_HW[y][:, x]


def read_edges(path) -> np.ndarray:
    """A picture of white lines on black -> bool [H, W], True where it is brighter than half of its full scale (1 of 1 bit,
    255 of 8 bits, 65535 of more, 1.0 of floats; colours by their luminance). Raises UserError for values outside of the
    scale, for transparency, and where something is drawn but nothing is brighter than half."""
    with opened_map(path) as image:
        if image.mode.startswith("I") or image.mode == "F":
            grey_HW = np.asarray(image).astype(np.float64) / (1 if image.mode == "F" else 65535)
        else:
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                    raise UserError("has transparent pixels; wanted white lines on black")
            grey_HW = np.asarray(image.convert("RGB").convert("L")) / 255
        if not (grey_HW.min() >= 0 and grey_HW.max() <= 1):  # NaN lies nowhere
            raise UserError(f"{image.mode} values lie in [{grey_HW.min():g}, {grey_HW.max():g}] of full scale; wanted [0, 1]")
        if 0 < grey_HW.max() <= 0.5:
            raise UserError(f"its brightest pixel is {grey_HW.max():.3g} of full scale, and edges are those over 0.5; draw them white")
        return grey_HW > 0.5


@contextlib.contextmanager
def opened_map(path):
    """The first picture in a file, as `read_image` opens it. Raises UserError, naming the file, for whatever fails in it."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{image.width}x{image.height} pixels are over the limit of {MAX_PIXELS:,}")
            yield image
    except Exception as error:  # as in read_image
        raise UserError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------- videos


# The demuxer is named, never guessed: guessing would also try playlists, which open what they name.
def demuxer(head: bytes) -> str | None:
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"  # mp4 too
    return {b"\x1aE\xdf\xa3": "matroska", b"RIFF": "avi"}.get(head[:4])  # matroska: webm too


def open_video(file, path):
    file.seek(0)
    if (format := demuxer(file.read(12))) is None:
        raise UserError(f"{path}: not an MP4, MOV, MKV, WebM, AVI or GIF video")
    file.seek(0)
    container = av.open(file, format=format)
    if not container.streams.video:
        raise UserError(f"{path}: no picture stream in it")
    stream = container.streams.video[0]
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise UserError(f"{path}: {stream.codec_context.width}x{stream.codec_context.height} pixels are over the limit of {MAX_PIXELS:,}")
    stream.thread_type = "NONE"  # the workers are many already
    return container


def count_frames(path: Path) -> int:
    """Frames of a video by its packets (nothing is decoded), or of a GIF."""
    with video_errors(path), open(path, "rb") as file:
        if file.read(6) in (b"GIF87a", b"GIF89a"):
            with Image.open(path, formats=("GIF",)) as image:
                return image.n_frames
        with open_video(file, path) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))


def read_frames(path: Path, wanted, size: int, fit="stretch", box=None):
    """-> (the wanted frames, resized bilinearly as the published script does; None, or how many there are if fewer)."""
    pictures, show = [], lambda image: to_pixels(image, size, fit, box, Image.Resampling.BILINEAR)
    with video_errors(path), open(path, "rb") as file:
        if file.read(6) in (b"GIF87a", b"GIF89a"):
            with Image.open(path, formats=("GIF",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{image.width}x{image.height} pixels are over the limit of {MAX_PIXELS:,}")
                for number in wanted:
                    image.seek(number)
                    pictures.append(show(image.convert("RGBA")))
            return pictures, None
        with open_video(file, path) as container:
            left, number = collections.deque(wanted), -1
            for number, frame in enumerate(container.decode(video=0)):
                if number == left[0]:
                    image = frame.to_image()
                    if turned := round(getattr(frame, "rotation", 0)) % 360:
                        image = image.rotate(turned, expand=True)
                    pictures.append(show(image))
                    left.popleft()
                    if not left:
                        return pictures, None
    return [], number + 1


@contextlib.contextmanager
def video_errors(path):
    """Whatever a decoder raises becomes a ValueError that names the file."""
    try:
        yield
    except (av.error.FFmpegError, ValueError, EOFError, IndexError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def read_clip(path, wanted, size: int, fit="stretch") -> list[np.ndarray]:
    """`read_frames` where all of the wanted frames must be there."""
    pictures, there = read_frames(path, wanted, size, fit)
    if there is not None:
        raise UserError(f"{path}: {there} frames can be decoded, its container promises more; take it away or mend it")
    return pictures


# ------------------------------------------------------------------------ prompts: pictures and videos alike


def count_pictures(path) -> int:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if is_video(path):
        return count_frames(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return getattr(image, "n_frames", 1)
    except Exception:  # read_image says what is wrong with it
        return 1


def read_pictures(pictures, size, fit) -> np.ndarray:
    """(file, frame) of every picture -> float32 [T, size, size, 3] in [0, 1]; a file's frames are read in one go."""
    pixels = []
    for path, group in itertools.groupby(pictures, lambda picture: picture[0]):
        frames = [frame for _, frame in group]
        if not is_video(path):
            pixels += [read_picture(path, frame, size, fit) for frame in frames]
            continue
        wanted = sorted(set(frames))
        read = read_clip(path, wanted, size, fit)
        pixels += [read[wanted.index(frame)] for frame in frames]
    return np.stack(pixels)


def read_picture(path, frame, size, fit):
    if frame == 0:
        return read_image(path, size, fit)
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.seek(frame)
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"over the limit of {MAX_PIXELS:,} pixels")
            return to_pixels(image, size, fit)
    except Exception as error:
        raise UserError(f"{path}: frame {frame}: {error}") from None
