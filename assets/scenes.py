"""The demo world: scenes composed from the embedded pictures, and tasks whose answers are exact by
construction.

Pictures are float32 [H, W, 3] in [0, 1]. They are drawn at twice their size and halved, which smooths the
outlines.
"""

import itertools
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.images import UserError

PICTURES = Path(__file__).resolve().parent / "pictures"

COLOURS = {
    "white": (1, 1, 1),
    "black": (0, 0, 0),
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.3, 0.9),
    "yellow": (1, 0.85, 0.1),
}
# Colour pairs that no training sentence shows: the examples in the prompt are the only place to learn them
# from.
UNSEEN = {
    ("white", "red"),
    ("red", "white"),
    ("yellow", "black"),
    ("black", "green"),
    ("green", "blue"),
    ("blue", "yellow"),
}
# kind: share of the training sentences. The last one is never trained on.
TASKS = {
    "segmentation": 4,
    "edges": 2,
    "depth": 2,
    "negative": 1,
    "grey": 1,
    "colorization": 1.5,
    "inpainting": 1.5,
    "rotation": 1,
    "style": 1.5,
    "relief": 0.5,
    "motion": 2,
    "cut-out": 0,
}


class World:
    """The embedded pictures of one split: `objects` (RGBA), `styles` (pairs of RGBA), `grounds` (RGB),
    `reliefs` (pairs of RGB).

    The split is by source: the text before the first '-' of a file name (an emoji, a drawing, a scene of the
    film, a region of the earth) is wholly in one or the other."""

    def __init__(self, split: str):
        self.split = split
        folders = {}
        for folder in ("fluent", "noto", "clipart", "satellite", "height", "film", "photo"):
            files = sorted((PICTURES / folder).glob("*.webp"))
            mine = [
                f
                for f in files
                if (zlib.crc32(f.name.split("-")[0].encode()) % 8 == 0) == (split == "heldout")
            ]
            folders[folder] = {
                f.name: Image.open(f).convert("RGBA" if folder in ("fluent", "noto", "clipart") else "RGB")
                for f in mine
            }
        self.styles = [
            (image, folders["noto"][name])
            for name, image in folders["fluent"].items()
            if name in folders["noto"]
        ]
        self.reliefs = [
            (image, folders["height"][name])
            for name, image in folders["satellite"].items()
            if name in folders["height"]
        ]
        self.objects = [
            image for folder in ("fluent", "noto", "clipart") for image in folders[folder].values()
        ]
        self.grounds = [
            image for folder in ("satellite", "film", "photo") for image in folders[folder].values()
        ]
        if not (self.styles and self.reliefs and self.objects and self.grounds):
            raise UserError(
                f"{PICTURES}: the embedded pictures are missing or incomplete; take them from the repository"
            )


def demo_sentence(world: World, rng, size: int, task: str | None = None):
    """-> (task, float32 pixels [16, size, size, 3]): eight (input, answer) pairs, or 16 frames."""
    task = task or str(rng.choice(list(TASKS), p=np.array(list(TASKS.values())) / sum(TASKS.values())))
    if task == "motion":
        return task, motion(world, rng, size)
    colours = [
        pair for pair in itertools.permutations(COLOURS, 2) if (pair in UNSEEN) == (world.split == "heldout")
    ]
    front, back = (np.array(COLOURS[c], np.float32) for c in colours[rng.integers(len(colours))])
    angle, inverse, swap = int(rng.choice([90, 180, 270])), rng.random() < 0.5, rng.random() < 0.5
    pixels = []
    for _ in range(8):
        scene = Scene(world, rng, 2 * size, objects=int(rng.integers(2, 4)) if task == "depth" else 1)
        picture = scene.render()
        if task == "segmentation":
            answer = np.where(scene.labels()[..., None] > 0, front, back)
        elif task == "edges":
            answer = np.where(outlines(scene.labels())[..., None], front, back)
        elif task == "depth":
            nearness = scene.labels() / len(scene.layers)
            answer = np.repeat((1 - nearness if inverse else nearness)[..., None], 3, axis=-1)
        elif task == "negative":
            answer = 1 - picture
        elif task == "grey":
            answer = to_grey(picture)
        elif task == "colorization":
            picture, answer = to_grey(picture), picture
        elif task == "inpainting":
            picture, answer = random_mask(picture, rng), picture
        elif task == "rotation":
            answer = scene.render(turn=angle)
        elif task == "style":
            pair = world.styles[rng.integers(len(world.styles))]
            scene.ground = np.ones_like(scene.ground) * np.float32(rng.choice([1.0, 0.85]))
            scene.layers[0] = (pair[swap], *scene.layers[0][1:])
            picture = scene.render()
            scene.layers[0] = (pair[not swap], *scene.layers[0][1:])
            answer = scene.render()
        elif task == "relief":
            first, second = world.reliefs[rng.integers(len(world.reliefs))]
            box = random_box(rng, first.size[0])
            picture, answer = (
                np.asarray(i.resize((2 * size, 2 * size), Image.Resampling.BILINEAR, box), np.float32) / 255
                for i in (first, second)
            )
        elif task == "cut-out":
            scene.ground, ground = np.broadcast_to(back, scene.ground.shape), scene.ground
            answer, scene.ground = scene.render(), ground
        pixels += [halve(picture), halve(answer)]
    return task, np.clip(np.stack(pixels), 0, 1).astype(np.float32)


class Scene:
    """A background and objects before it, drawn at twice the size so that halving it smooths the outlines."""

    def __init__(self, world: World, rng, size: int, objects: int):
        self.size = size
        if rng.random() < 0.2:
            self.ground = np.broadcast_to(rng.random(3).astype(np.float32), (size, size, 3))
        else:
            image = world.grounds[rng.integers(len(world.grounds))]
            image = image.resize((size, size), Image.Resampling.BILINEAR, random_box(rng, image.size[0]))
            self.ground = np.asarray(image, np.float32) / 255
        self.layers = []  # back to front: (image, side, x, y of the centre, angle)
        for i in range(objects):
            image = (
                world.objects[rng.integers(len(world.objects))]
                if rng.random() < 0.8
                else textured_shape(world, rng)
            )
            side = rng.uniform(0.5, 0.8) if objects == 1 else rng.uniform(0.4, 0.6)
            x, y = rng.uniform(side / 2 - 0.05, 1.05 - side / 2, 2)
            if objects > 1:  # from left to right, so that they overlap without hiding each other
                x = (i + 1) / (objects + 1) + rng.uniform(-0.05, 0.05)
            self.layers.append((image, side, x, y, rng.uniform(-20, 20)))
        order = rng.permutation(objects)
        self.layers = [self.layers[i] for i in order]

    def drawn(self, layer, turn=0, shift=(0.0, 0.0)):
        """One object on an empty canvas -> float32 [size, size, 4] in [0, 1]."""
        image, side, x, y, angle = layer
        image = image.resize((max(2, int(side * self.size)),) * 2, Image.Resampling.BILINEAR).rotate(
            angle + turn, Image.Resampling.BILINEAR, expand=True
        )
        canvas = Image.new("RGBA", (self.size, self.size))
        canvas.paste(
            image,
            (
                int((x + shift[0]) * self.size - image.width / 2),
                int((y + shift[1]) * self.size - image.height / 2),
            ),
        )
        return np.asarray(canvas, np.float32) / 255

    def render(self, turn=0, shift=(0.0, 0.0)):
        picture_HWC = self.ground
        for layer in self.layers:
            drawn_HWC = self.drawn(layer, turn, shift)
            picture_HWC = picture_HWC + drawn_HWC[..., 3:] * (drawn_HWC[..., :3] - picture_HWC)
        return picture_HWC

    def labels(self):
        """0 for the background, i for the pixels where the i-th object from the back is the nearest."""
        labels_HW = np.zeros((self.size, self.size), np.float32)
        for i, layer in enumerate(self.layers):
            labels_HW[self.drawn(layer)[..., 3] > 0.5] = i + 1
        return labels_HW


def textured_shape(world: World, rng) -> Image.Image:
    """An ellipse, polygon or star cut from a background or filled with one colour: RGBA, 96 x 96."""
    if rng.random() < 0.5:
        texture = world.grounds[rng.integers(len(world.grounds))].resize((96, 96), Image.Resampling.BILINEAR)
    else:
        texture = Image.new("RGB", (96, 96), tuple(int(c) for c in rng.integers(0, 256, 3)))
    mask, corners = Image.new("L", (96, 96)), int(rng.choice([0, 3, 4, 5, 6, 10]))
    if corners == 0:
        ImageDraw.Draw(mask).ellipse((2, int(rng.integers(2, 24)), 94, 94), fill=255)
    else:
        angle_N = np.arange(corners) * 2 * np.pi / corners + rng.uniform(0, 2 * np.pi)
        radius_N = np.where(np.arange(corners) % 2, 22, 46) if corners == 10 else np.full(corners, 46)
        points = np.stack([48 + radius_N * np.cos(angle_N), 48 + radius_N * np.sin(angle_N)], axis=1)
        ImageDraw.Draw(mask).polygon([tuple(p) for p in points], fill=255)
    texture = texture.convert("RGBA")
    texture.putalpha(mask)
    return texture


def motion(world: World, rng, size: int):
    """16 frames of one object that crosses a still background at constant velocity and bounces off the
    borders."""
    scene = Scene(world, rng, 2 * size, objects=1)
    image, _, _, _, angle = scene.layers[0]
    side, direction, speed = rng.uniform(0.3, 0.5), rng.uniform(0, 2 * np.pi), rng.uniform(0.04, 0.1)
    low, high, position = side / 2, 1 - side / 2, rng.uniform(side / 2, 1 - side / 2, 2)
    velocity, frames = speed * np.array([np.cos(direction), np.sin(direction)]), []
    for t in range(16):
        fold = (position + t * velocity - low) % (
            2 * (high - low)
        )  # a triangle wave reflects it at both ends
        x, y = low + np.minimum(fold, 2 * (high - low) - fold)
        scene.layers[0] = (image, side, x, y, angle)
        frames.append(halve(scene.render()))
    return np.clip(np.stack(frames), 0, 1).astype(np.float32)


def outlines(labels_HW):
    """True within one final pixel of a border between two labels."""
    edge_HW = np.zeros(labels_HW.shape, bool)
    edge_HW[:, 1:] |= labels_HW[:, 1:] != labels_HW[:, :-1]
    edge_HW[1:] |= labels_HW[1:] != labels_HW[:-1]
    padded = np.pad(edge_HW, 1)
    return np.any(
        [padded[y : y + len(edge_HW), x : x + len(edge_HW)] for y in range(3) for x in range(3)], axis=0
    )


def random_box(rng, size):
    """A random square covering 50 to 100% of the side."""
    side = rng.uniform(0.5, 1) * size
    x, y = rng.uniform(0, size - side, 2)
    return x, y, x + side, y + side


def halve(picture_HWC):
    H, W, C = picture_HWC.shape
    return picture_HWC.reshape(H // 2, 2, W // 2, 2, C).mean((1, 3))


def to_grey(pixels_HWC):
    """ITU-R 601 luma in three equal channels, as LVM's colorization script weighs it."""
    grey_HW1 = (pixels_HWC @ np.array([0.2989, 0.5870, 0.1140], np.float32))[..., None]
    return np.clip(np.repeat(grey_HW1, 3, axis=-1), 0, 1)


def random_mask(pixels_HWC, rng, squares: float = 0.3):
    """Zeroes a square of side U[25, 128) of 256 (with probability `squares`), else the dropped ones of 8 x 8
    patches."""
    size, pixels_HWC = len(pixels_HWC), pixels_HWC.copy()
    if rng.random() < squares:
        side = int(rng.integers(-(-25 * size // 256), size // 2))
        y, x = rng.integers(0, size - side + 1, 2)
        pixels_HWC[y : y + side, x : x + side] = 0
        return pixels_HWC
    kept = rng.random((8, 8)) < rng.random()
    patch = np.arange(size) * 8 // size
    return pixels_HWC * kept[patch][:, patch, None]
