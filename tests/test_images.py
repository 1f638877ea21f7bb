"""Reading pictures and videos: right pixels, right frames, right files, and a reason for each file that is left out."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import av
import jax
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, ImageOps, features

import evaluate
import sample
import tokenize_data
import vqgan
from common import images
from common.images import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    config = vqgan.VQGANConfig(resolution=SIZE, hidden_channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(),
                               no_attn_mid_block=True, z_channels=4, num_embeddings=32, quantized_embed_dim=4, norm_groups=4)
    folder = tmp_path_factory.mktemp("tokenizer")
    vqgan.save(vqgan.VQGAN(config, key=jax.random.key(0)), folder)
    return folder


def rejected(out):
    return {pathlib.Path(r["path"]).name: r["reason"] for r in map(json.loads, pathlib.Path(f"{out}.rejected.jsonl").read_text().splitlines())}


def run(script, *arguments, cwd):
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------------------------------------ files made by hand


def png(width, height, bits, kind, rows, clear=None, palette=None, orientation=None):
    """A PNG of stored bytes; `kind` is 0 for grey, 2 for colours, 3 for a palette, 4 for grey and alpha."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette)] if palette else []
    parts += [chunk(b"tRNS", clear)] if clear else []
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")


def tiff(array, kind=1, white_is_zero=False):
    """A grey TIFF of the array's own dtype; `kind` is 1 for unsigned, 2 for signed, 3 for float."""
    (height, width), data = array.shape, array.astype(array.dtype.newbyteorder("<")).tobytes()
    data += b"\0" * (len(data) % 2)
    tags = {256: width, 257: height, 258: array.itemsize * 8, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: height, 279: array.nbytes, 339: kind}
    return (b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
            + b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items()) + b"\0" * 4)


def gif(side, frames):
    """A GIF of black, red, green and blue without transparency, from frames (x, y, width, height, colour, disposal)."""
    def lzw(pixels):
        bits = "".join(f"{code:03b}"[::-1] for pixel in pixels for code in (4, pixel)) + "101"[::-1]
        data = bytes(int(bits[i:i + 8][::-1], 2) for i in range(0, len(bits), 8))
        return b"\x02" + b"".join(bytes([len(data[i:i + 255])]) + data[i:i + 255] for i in range(0, len(data), 255)) + b"\0"

    content = b"GIF89a" + struct.pack("<HHBBB", side, side, 0xF1, 0, 0) + bytes([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    for x, y, width, height, colour, disposal in frames:
        content += b"\x21\xf9\x04" + bytes([disposal << 2, 10, 0, 0, 0]) + b"\x2c" + struct.pack("<HHHHB", x, y, width, height, 0) + lzw([colour] * width * height)
    return content + b";"


WEIGHTS = {"BT.601": (0.299, 0.114, 5), "BT.709": (0.2126, 0.0722, 1)}  # of red and blue in luma, and FFmpeg's number


def write_flat_video(path, colours, weights, full, bits, size, codec):
    """A lossless video of frames of one colour each, converted to luma and chroma by the formulas of the standard."""
    red, blue, space = WEIGHTS[weights]
    with av.open(str(path), "w") as container:
        options = {"libx264": {"crf": "0"}, "libvpx-vp9": {"lossless": "1"}}[codec]
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p" if bits == 8 else "yuv420p10le"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 2 if full else 1
        for rgb in colours:
            r, g, b = np.array(rgb) / 255
            y = red * r + (1 - red - blue) * g + blue * b
            chroma = np.array([(b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)])
            top = 2**bits - 1
            values = [y * top, *(chroma * top + (top + 1) / 2)] if full else 2**(bits - 8) * np.array([16 + 219 * y, *(128 + 224 * chroma)])
            frame = av.VideoFrame(*size, stream.pix_fmt)
            frame.colorspace, frame.color_range = space, 2 if full else 1
            for plane, value in zip(frame.planes, np.rint(values)):
                plane.update(np.full(plane.buffer_size // (1 if bits == 8 else 2), value, np.uint8 if bits == 8 else np.uint16).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def drawn(number, size=(48, 32)):
    """A frame that shows its number: a bar of that many pixels, and noise that makes each frame another."""
    noise = np.random.default_rng(number).integers(0, 90, (size[1] // 8, size[0] // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    noise[:8, :number % size[0]] = 250
    return noise


def write_video(path, frames, codec="libx264", pix_fmt="yuv420p", stream_options=None, first=()):
    """`first`: streams (codec, pictures, disposition) that come before the moving one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        covers = []
        for cover_codec, pictures, disposition in first:
            cover = container.add_stream(cover_codec, rate=10)
            cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
            cover.disposition = disposition
            covers.append((cover, pictures))
        stream = container.add_stream(codec, rate=10, options=stream_options or {})
        stream.width, stream.height, stream.pix_fmt = 48, 32, pix_fmt
        for cover, pictures in covers:
            for picture in pictures:
                container.mux(cover.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(cover.encode())
        for t in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(t))))
        container.mux(stream.encode())
    return path


def cut(path, out, first, count, rate=10):
    """What a lossless cutter does: all packets stay, and an edit list shows `count` frames from `first` on."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        ticks = int(1 / (container.streams.video[0].time_base * rate))
    at = data.index(b"elst")
    duration, media_time = struct.unpack_from(">ii", data, at + 12)
    movie = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    struct.pack_into(">ii", data, at + 12, count * movie // rate, media_time + first * ticks)
    out.write_bytes(data)
    return out


def all_frames(path, stream=0):
    """An independent reading of the whole video."""
    with av.open(str(path)) as container:
        return [np.asarray(frame.to_image()) for frame in container.decode(container.streams[stream])]


def small(frame_HWC):
    return np.asarray(Image.fromarray(frame_HWC).resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32) / 255


# ------------------------------------------------------------------------------------------------ integers and greys


@pytest.mark.parametrize("name, content, integers", [
    ("grey of 1 bit", png(8, 1, 1, 0, [bytes([0b01010011])]), [0, 1, 0, 1, 0, 0, 1, 1]),
    ("grey of 2 bits", png(4, 1, 2, 0, [bytes([0b00011011])]), [0, 1, 2, 3]),
    ("grey of 4 bits", png(4, 1, 4, 0, [bytes([0x01, 0x2F])]), [0, 1, 2, 15]),
    ("grey of 16 bits", png(3, 1, 16, 0, [struct.pack(">3H", 7, 300, 65535)]), [7, 300, 65535]),
    ("palette of 2 bits", png(4, 1, 2, 3, [bytes([0b00011011])], palette=bytes(range(12))), [0, 1, 2, 3]),
    ("unsigned 8 bits", tiff(np.array([[0, 1, 255]], np.uint8)), [0, 1, 255]),
    ("signed 8 bits", tiff(np.array([[0, -5, 127]], np.int8), 2), [0, -5, 127]),
    ("unsigned 16 bits", tiff(np.array([[0, 40000, 65535]], np.uint16)), [0, 40000, 65535]),
    ("signed 16 bits", tiff(np.array([[0, -5, 32767]], np.int16), 2), [0, -5, 32767]),
    ("unsigned 32 bits", tiff(np.array([[0, 70000, 4000000000]], np.uint32)), [0, 70000, 4000000000]),
    ("signed 32 bits", tiff(np.array([[0, -5, 70000]], np.int32), 2), [0, -5, 70000]),
    ("white is zero", tiff(np.array([[0, 1, 200]], np.uint8), white_is_zero=True), [0, 1, 200]),
])
def test_a_map_of_integers_is_read_as_the_file_stores_it(tmp_path, name, content, integers):
    (tmp_path / "map").write_bytes(content)
    assert images.read_integers(tmp_path / "map").tolist() == [integers]


@pytest.mark.parametrize("content, greys", [
    (png(4, 1, 2, 0, [bytes([0b00011011])]), [0, 1 / 3, 2 / 3, 1]),
    (png(2, 1, 16, 0, [struct.pack(">2H", 6553, 65535)]), [6553 / 65535, 1]),
    (tiff(np.array([[0, 128, 255]], np.uint8), white_is_zero=True), [1, 127 / 255, 0]),
    (tiff(np.array([[0, 13107, 65535]], np.uint16), white_is_zero=True), [1, 0.8, 0]),
    (tiff(np.array([[0, 0.25, 1]], np.float32), 3), [0, 0.25, 1]),
])
def test_a_grey_picture_of_any_depth_shows_its_share_of_white(tmp_path, content, greys):
    (tmp_path / "grey").write_bytes(content)
    with images.open_image(tmp_path / "grey") as image:
        shown = images.to_pixels(image, len(greys), resample=Image.Resampling.NEAREST)
    np.testing.assert_allclose(shown[0], np.repeat(np.array(greys)[:, None], 3, 1), atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_every_reader(tmp_path, bad):
    grey_HW = np.full((20, 20), 0.5, np.float32)
    grey_HW[3, 4] = bad
    Image.fromarray(grey_HW).save(tmp_path / "float.tif")
    for read in (images.read_image, images.read_depth, lambda path, _: images.read_edges(path)):
        with pytest.raises(UserError, match="float.tif.*(NaN|finite)"):
            read(tmp_path / "float.tif", SIZE)


@pytest.mark.slow
def test_pictures_of_nan_are_named_by_every_command_and_in_no_batch(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for n in range(8):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(tmp_path / "in" / f"{n}.png")
    bad = tmp_path / "in" / "nan.tif"
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(bad)
    tokenize_data.run(tokenize_data.Colorize(inputs=tmp_path / "in", out=tmp_path / "d", tokenizer=tokenizer, shots=2, max_rejected=0.2))
    assert "NaN" in rejected(tmp_path / "d")["nan.tif"] and len(tokenize_data.Shards(tmp_path / "d")) == 4
    (tmp_path / "run").mkdir()
    pictures = vqgan.Pictures(tmp_path / "in", SIZE, 1.0, tmp_path / "run" / "rejected.jsonl", 0.2)
    assert np.isfinite([pictures.read(n, np.zeros(3)) for n in range(9)]).all()
    assert "nan.tif" in (tmp_path / "run" / "rejected.jsonl").read_text()
    for command in (["vqgan.py", "reconstruct", "--images", bad, "--model", tokenizer], ["sample.py", "--prompt", bad],
                    ["evaluate.py", "reconstruction", "--data", tmp_path / "in", "--tokenizer", tokenizer, "--out", tmp_path / "report"]):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 2 and "nan.tif" in done.stderr and "NaN" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_ordinary_integers_are_not_taken_for_half_floats(tmp_path):
    millimetres = np.random.default_rng(0).integers(500, 8000, (20, 20)).astype(np.uint16)
    millimetres[:5] = 0
    wide = np.random.default_rng(0).integers(1, 65535, (20, 20)).astype(np.uint16)
    far = np.linspace(9000, 30000, 400).reshape(20, 20).astype(np.uint16)
    for integers in (millimetres, wide, far, (millimetres // 32).astype(np.uint8)):
        Image.fromarray(integers).save(tmp_path / "depth.png")
        with pytest.raises(UserError, match="depth.png.*--half-floats"):
            images.read_half(tmp_path / "depth.png")
    metres = np.random.default_rng(0).uniform(0.3, 60, (20, 20)).astype(np.float16)
    metres[:5], metres[5] = 0, np.inf
    Image.fromarray(metres.view(np.uint16)).save(tmp_path / "depth.png")
    np.testing.assert_array_equal(images.read_half(tmp_path / "depth.png"), np.where(np.isfinite(metres), metres, 0))


# ------------------------------------------------------------------------------------------------ colours, turning, transparency


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_pictures_are_turned_and_mirrored_as_exif_says(tmp_path, number, suffix):
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :12], stored[:8, 12:], stored[8:, :12] = (250, 10, 10), (10, 250, 10), (10, 10, 250)
    exif = Image.Exif()
    exif[0x0112] = number
    Image.fromarray(stored).save(tmp_path / f"turned{suffix}", exif=exif)
    reference = Image.fromarray(stored)
    reference.getexif()[0x0112] = number
    right = ImageOps.exif_transpose(reference).resize((8, 8), Image.Resampling.NEAREST)
    shown = images.read_image(tmp_path / f"turned{suffix}", 8)[[1, 1, 6, 6], [1, 6, 1, 6]]
    np.testing.assert_allclose(shown, np.asarray(right)[[1, 1, 6, 6], [1, 6, 1, 6]] / 255, atol=0.08)
    assert images.shown_size(tmp_path / f"turned{suffix}") == ((24, 16) if number < 5 else (16, 24))


@pytest.mark.parametrize("content", [
    png(2, 1, 16, 0, [struct.pack(">2H", 700, 700)], clear=struct.pack(">H", 700)),
    png(4, 1, 2, 0, [bytes([0b10101010])], clear=b"\0\2"),
    png(8, 1, 1, 0, [b"\0"], clear=b"\0\0"),
    png(2, 1, 8, 0, [b"\5\5"], clear=b"\0\5"),
    png(2, 1, 16, 2, [struct.pack(">6H", *[700] * 6)], clear=struct.pack(">3H", 700, 700, 700)),
    png(2, 1, 8, 3, [b"\0\0"], clear=b"\0", palette=bytes(3)),
    png(2, 1, 16, 4, [struct.pack(">4H", 700, 0, 40000, 0)]),
    gif(8, [(2, 2, 1, 1, 0, 1)])[:-1] + b";",
])
def test_transparency_of_every_kind_is_white(tmp_path, content):
    (tmp_path / "clear").write_bytes(content)
    assert images.read_image(tmp_path / "clear", 8)[0, 0].tolist() == [1, 1, 1]


def test_parts_of_a_gif_that_no_frame_drew_or_one_cleared_are_white(tmp_path):
    """Browsers show them transparent; Pillow makes them the first colour, mostly black."""
    frames = [(2, 2, 4, 4, 1, 2), (0, 0, 3, 3, 2, 1), (5, 5, 3, 3, 3, 3), (0, 7, 1, 1, 1, 1)]
    (tmp_path / "a.gif").write_bytes(gif(8, frames))
    canvas_HWC, colours = np.ones((8, 8, 3)), np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    right = []
    for x, y, width, height, colour, disposal in frames:
        before = canvas_HWC.copy()
        canvas_HWC[y:y + height, x:x + width] = colours[colour]
        right.append(canvas_HWC.copy())
        if disposal == 2:
            canvas_HWC[y:y + height, x:x + width] = 1
        elif disposal == 3:
            canvas_HWC = before
    assert images.count_frames(tmp_path / "a.gif") == 4
    read, _ = images.read_frames(tmp_path / "a.gif", range(4), 8)
    np.testing.assert_array_equal(read, right)
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.gif", 8), right[0])


@pytest.mark.parametrize("codec, bits, size, suffix", [("libx264", 8, (34, 24), ".mp4"), ("libx264", 10, (34, 24), ".mp4"), ("libvpx-vp9", 8, (33, 23), ".webm")])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_colours_of_videos_are_right_by_their_matrix_and_range(tmp_path, weights, full, codec, bits, size, suffix):
    colours, path = [(200, 50, 60), (30, 180, 90), (128, 128, 128), (255, 255, 255)], tmp_path / f"flat{suffix}"
    write_flat_video(path, colours, weights, full, bits, size, codec)
    read, _ = images.read_frames(path, range(4), SIZE)
    for pixels_HWC, rgb in zip(read, colours):
        np.testing.assert_allclose(pixels_HWC * 255, np.broadcast_to(rgb, pixels_HWC.shape), atol=3.01)


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1), (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0), (0, -1, 1, 0)])
def test_a_video_is_turned_and_mirrored_by_all_eight_display_matrices(tmp_path, matrix):
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24], stored[:16, 24:], stored[16:, :24] = (250, 10, 10), (10, 250, 10), (10, 10, 250)
    path, (a, b, c, d) = tmp_path / "turned.mp4", matrix
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stored)))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    [shown], _ = images.read_frames(path, [0], SIZE)
    for x, y in ((-1, -1), (1, -1), (-1, 1), (1, 1)):  # each corner goes to where the matrix sends it, x' = a x + c y, y' = b x + d y
        u, v = a * x + c * y, b * x + d * y
        np.testing.assert_allclose(shown[8 + 6 * v, 8 + 6 * u] * 255, stored[16 + 10 * y, 24 + 10 * x], atol=6)
    assert images.shown_size(path) == ((48, 32) if a else (32, 48))


# ------------------------------------------------------------------------------------------------ frames


def test_only_gif_apng_and_animated_webp_are_clips(tmp_path):
    frames = [Image.fromarray(drawn(n)) for n in range(3)]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if name == "a.webp" else {}))
        assert images.count_frames(tmp_path / name) == 3
        read, _ = images.read_frames(tmp_path / name, [0, 2], SIZE)
        if name != "a.gif":
            np.testing.assert_array_equal(read, [small(drawn(0)), small(drawn(2))])
    for name, format in (("phone.jpg", "MPO"), ("pages.tif", "TIFF")):
        first, *others = (Image.fromarray(drawn(n)) for n in range(3))
        first.save(tmp_path / name, format=format, save_all=True, append_images=others)
    assert Image.open(tmp_path / "phone.jpg").n_frames == Image.open(tmp_path / "pages.tif").n_frames == 3
    assert len(sample.list_prompt([tmp_path / "phone.jpg", tmp_path / "pages.tif"])) == 2
    np.testing.assert_allclose(images.read_image(tmp_path / "pages.tif", 48), images.read_image(tmp_path / "a.png", 48))


@pytest.mark.parametrize("suffix, codec, options, exact", [
    (".mp4", "libx264", {"g": "12", "bf": "3"}, True),
    (".mkv", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}, True),
    (".mp4", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}, True),
    (".mp4", "libx264", {"g": "12", "x264-params": "intra-refresh=1"}, True),
    (".webm", "libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}, True),
    (".mov", "mjpeg", {}, True),
    (".webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}, False),
    (".avi", "mpeg4", {"g": "12", "bf": "2"}, False),
])
def test_frames_that_are_sought_equal_those_of_a_full_decoding(tmp_path, suffix, codec, options, exact):
    path = write_video(tmp_path / f"clip{suffix}", 60, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p", options)
    whole = [small(frame) for frame in all_frames(path)]
    index = images.read_index(path)
    assert len(whole) == 60 and index.exact == exact
    for wanted in ([0], [59], [11, 12, 13], range(0, 60, 8), range(5, 50), [7, 23, 24, 58], range(60)):
        read, there = images.read_frames(path, wanted, SIZE)
        assert there is None
        np.testing.assert_array_equal(read, [whole[n] for n in wanted])
    assert images.count_frames(path) >= 60 and images.read_frames(path, [60], SIZE) == ([], 60)


def test_a_late_frame_is_read_without_decoding_all_before_it(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 200, stream_options={"g": "10"})
    index = images.read_index(path)
    with images.open_video(path, index.stream) as (container, stream):
        [frame] = images.sought(container, stream, index, [195])
    assert frame.pts == np.sort(index.pts_N)[195]
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][20:60]
    for place, size in places:  # what is never decoded can be rubbish
        data[place + 4:place + size] = bytes(size - 4)
    whole = all_frames(path)
    path.write_bytes(data)
    [read], _ = images.read_frames(path, [195], SIZE)
    np.testing.assert_array_equal(read, small(whole[195]))


@pytest.mark.parametrize("first, count", [(5, 43), (0, 20), (12, 48)])
def test_a_losslessly_cut_clip_has_the_frames_that_are_shown(tmp_path, first, count):
    whole = write_video(tmp_path / "whole.mp4", 60, stream_options={"g": "12", "bf": "2"})
    path = cut(whole, tmp_path / "cut.mp4", first, count)
    right = [small(frame) for frame in all_frames(whole)[first:first + count]]
    assert images.count_frames(path) == count == len(all_frames(path))
    read, _ = images.read_frames(path, range(count), SIZE)
    np.testing.assert_array_equal(read, right)
    read, _ = images.read_frames(path, [count - 1], SIZE)
    np.testing.assert_array_equal(read, right[-1:])


@pytest.mark.parametrize("suffix, pictures, disposition", [(".mkv", 1, 0), (".mp4", 1, Disposition.attached_pic), (".mov", 3, 0)])
def test_a_cover_that_comes_first_is_not_the_clip(tmp_path, suffix, pictures, disposition):
    cover = np.full((64, 64, 3), 200, np.uint8)
    path = write_video(tmp_path / f"covered{suffix}", 20, first=[("mjpeg", [cover] * pictures, disposition)])
    plain = write_video(tmp_path / "plain.mkv", 20)
    assert images.count_frames(path) == 20
    np.testing.assert_array_equal(images.read_frames(path, [0, 19], SIZE)[0], images.read_frames(plain, [0, 19], SIZE)[0])


def test_damaged_frames_are_not_shown_as_if_they_were_whole(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 40, stream_options={"g": "10", "bf": "0", "sc_threshold": "0"})
    whole, data = [small(frame) for frame in all_frames(path)], bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][12]
    data[place + 5:place + size] = bytes(255 - byte for byte in data[place + 5:place + size])
    path.write_bytes(data)
    for wanted in ([12], [13], [5, 15]):
        with pytest.raises(UserError, match="clip.mp4"):
            images.read_frames(path, wanted, SIZE)
    np.testing.assert_array_equal(images.read_frames(path, [5, 35], SIZE)[0], [whole[5], whole[35]])


def test_videos_that_cannot_be_decoded_are_listed_and_the_rest_is_tokenised(tmp_path, tokenizer):
    clips = tmp_path / "in"
    write_video(clips / "good.mp4", 20)
    for suffix, codec, unknown in ((".mp4", b"avc1", b"zzzz"), (".mkv", b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/AVX")):
        path = write_video(clips / f"unknown{suffix}", 20)
        path.write_bytes(path.read_bytes().replace(codec, unknown))
    with av.open(str(clips / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (clips / "old.wmv").write_bytes(b"\x30\x26\xb2\x75")
    frames = [Image.fromarray(drawn(n)) for n in range(20)]
    frames[0].save(clips / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(clips / "still.png")
    tokenize_data.run(tokenize_data.Video(inputs=clips, out=tmp_path / "d", tokenizer=tokenizer, frames=4, strides=(2,), max_rejected=0.9))
    reasons = rejected(tmp_path / "d")
    assert set(reasons) == {"unknown.mp4", "unknown.mkv", "sound.mp4", "old.wmv", "still.png"} and len(tokenize_data.Shards(tmp_path / "d")) == 2
    assert "codec" in reasons["unknown.mp4"] and "codec" in reasons["unknown.mkv"] and "ffmpeg" in reasons["old.wmv"] and "does not move" in reasons["still.png"]


# ------------------------------------------------------------------------------------------------ files


def save(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)).save(content, **({"format": "PNG"} | options))
    path.write_bytes(content.getvalue())
    return path


def test_numbers_in_names_count_by_their_value_and_only_ascii_digits_are_numbers(tmp_path):
    names = ["2.png", "10.png", "a/9.png", "a/10.png", "b²/1.png", "b٣/1.png", "shot.0002.png", "shot.0010.png", "x007.png", "x7.png"]
    for name in names:
        save(tmp_path / name)
    assert [path.relative_to(tmp_path).as_posix() for path in images.find_images(tmp_path)] == names
    assert [path.relative_to(tmp_path).as_posix() for path, _ in sample.list_prompt([tmp_path])] == names


def test_views_whose_numbers_follow_a_dot_are_frames_of_their_own(tmp_path, tokenizer):
    for t in range(4):
        save(tmp_path / "in" / "car" / "images" / f"shot.{t:04d}.jpg", t, format="JPEG")
        save(tmp_path / "in" / "car" / "masks" / f"shot.{t:04d}.mask.png", t)
    source = tokenize_data.Tracks(inputs=tmp_path / "in", out=tmp_path / "d", tokenizer=tokenizer, modalities=("images", "masks"), half_floats=(), frames=4, shots=1,
                                  max_stride=1)
    tokenize_data.run(source)
    assert len(tokenize_data.Shards(tmp_path / "d")) == 1 and not pathlib.Path(f"{tmp_path / 'd'}.rejected.jsonl").exists()


def test_one_finder_follows_links_skips_hidden_files_and_names_what_it_leaves_out(tmp_path, capsys):
    top, far = tmp_path / "top", tmp_path / "far"
    save(top / "a.jfif", format="JPEG"), save(top / "b.JPG", format="JPEG"), save(top / "folder.png" / "c.png"), save(far / "d.png"), save(far / "deep" / "e.png")
    save(top / ".hidden.png"), save(top / "._a.png"), save(top / ".ipynb_checkpoints" / "a.png")
    (top / "linked").symlink_to(far), (far / "deep" / "back").symlink_to(top), (top / "again").symlink_to(top / "folder.png"), (top / "self").symlink_to("self")
    (top / "lost.png").symlink_to(tmp_path / "nowhere"), (top / "zero.png").symlink_to("/dev/zero"), os.mkfifo(top / "pipe.png")
    for name in ("phone.heic", "layers.psd", "camera.nef", "notes.txt"):
        (top / name).write_bytes(b"x")
    read = ["a.jfif", "b.JPG", "folder.png/c.png", "linked/d.png", "linked/deep/e.png"]
    if features.check("avif"):
        save(top / "f.avif", format="AVIF")
        read.insert(2, "f.avif")
    notes = []
    assert [path.relative_to(top).as_posix() for path in images.find_images(top, notes)] == read
    reasons = {pathlib.Path(note["path"]).name: note["reason"] for note in notes}
    assert set(reasons) == {"again", "back", "lost.png", "zero.png", "pipe.png", "layers.psd", "camera.nef"} | ({"phone.heic"} if ".heic" not in images.SUFFIXES else set())
    assert reasons.get("phone.heic", "pip install pillow-heif").endswith("pip install pillow-heif")
    assert all(np.isfinite(images.read_image(top / name, SIZE)).all() for name in read)
    images.find_images(top)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "pillow-heif" in printed and "layers.psd" in printed


@pytest.mark.slow
def test_odd_names_and_what_is_no_file_are_read_or_listed_and_nothing_hangs(tmp_path, tokenizer):
    folder = tmp_path / "in"
    names = ["two words.png", "line\nbreak.png", "-dash.png", "colon:quote'\".png", "漢" * 78 + ".png", "٣.png", os.fsdecode(b"caf\xe9.png")]
    for n, name in enumerate(names):
        save(folder / name, n)
    for name, head in (("sparse.png", b""), ("sparse.tif", b"II*\0\x08\0\0\0"), ("sparse.jpg", b"\xff\xd8\xff")):
        with open(folder / name, "wb") as file:
            file.write(head)
            file.truncate(100 << 30)
    with open(save(folder / "long.png", 99), "ab") as file:
        file.truncate(900 << 20)  # a whole picture, and what follows it is not read
    os.mkfifo(folder / "pipe.png"), (folder / "loop.png").symlink_to("loop.png"), (folder / "null.png").symlink_to("/dev/null")
    done = run("tokenize_data.py", "colorize", "--inputs", folder, "--out", tmp_path / "d", "--tokenizer", tokenizer, "--shots", 2, "--max-rejected", 0.5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(tokenize_data.Shards(tmp_path / "d")) == 4
    done = run("vqgan.py", "reconstruct", "--images", folder / names[-1], "--model", tokenizer, cwd=tmp_path)
    assert done.returncode == 0 and "caf\\udce9.png" in done.stdout, done.stderr
    assert set(rejected(tmp_path / "d")) == {"sparse.png", "sparse.tif", "sparse.jpg", "pipe.png", "loop.png", "null.png"}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm", ".gif", ".jpg"])
def test_a_hundred_gigabytes_of_nothing_are_listed_at_once_even_behind_a_whole_video(tmp_path, suffix):
    with open(tmp_path / f"sparse{suffix}", "wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(UserError, match="sparse.*never written"):
        images.count_frames(tmp_path / f"sparse{suffix}")
    if suffix not in (".gif", ".jpg"):
        path = write_video(tmp_path / f"long{suffix}", 10, "libvpx" if suffix == ".webm" else "mpeg4" if suffix == ".avi" else "libx264")
        assert images.count_frames(path) == 10
        with open(path, "ab") as file:
            file.truncate(100 << 30)
        with pytest.raises(UserError, match="long.*never written"):
            images.count_frames(path)


def test_a_decoder_that_looks_for_a_picture_byte_by_byte_is_stopped(tmp_path):
    (tmp_path / "zeros.jpg").write_bytes(b"\xff\xd8\xff" + bytes(3_000_000))
    with pytest.raises(UserError, match="zeros.jpg"):
        images.read_image(tmp_path / "zeros.jpg", SIZE)


def test_a_cut_clip_is_measured_and_what_cannot_be_decoded_is_named_by_evaluate(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 60, stream_options={"g": "12", "bf": "2"})
    config = evaluate.Video(data=tmp_path, frames=4, stride=10)  # a clip spans 41 frames
    frames, count, reason = evaluate.draw_clip(config, cut(whole, tmp_path / "cut.mp4", 5, 43))
    assert count == 43 and reason is None and frames[-1] < 43
    right = all_frames(whole)[5:48]
    np.testing.assert_array_equal(images.read_clip(tmp_path / "cut.mp4", frames, SIZE), [small(right[n]) for n in frames])
    whole.write_bytes(whole.read_bytes().replace(b"avc1", b"zzzz"))
    frames, _, reason = evaluate.draw_clip(config, whole)
    assert frames is None and "whole.mp4" in reason and "codec" in reason


def test_pictures_are_written_in_formats_that_are_read_and_no_others(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    for suffix in images.SUFFIXES - {".heic", ".heif"}:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(images.encode_image(Image.fromarray(pixels), path))
        assert images.read_image(path, 4).shape == (4, 4, 3)
    for name in ("a.psd", "a.mp4", "a.pdf", "a"):  # Pillow knows the first two suffixes and writes neither
        with pytest.raises(UserError, match=f"{name}: no picture"):
            images.encode_image(Image.fromarray(pixels), name)
