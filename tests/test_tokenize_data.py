import base64
import collections
import gzip
import importlib
import itertools
import json
import pathlib
import tarfile
import re
import shutil
import subprocess
import sys
import zlib

import av
import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

import lvm
import tokenize_data
import train
import vqgan
from assets import scenes
from common.images import UserError
from conftest import seal

SIZE = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A random tokenizer of 16-pixel pictures, 16 codes each, 32 entries: a folder."""
    config = vqgan.VQGANConfig(resolution=SIZE, hidden_channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(),
                               no_attn_mid_block=True, z_channels=4, num_embeddings=32, quantized_embed_dim=4, norm_groups=4)
    folder = tmp_path_factory.mktemp("tokenizer")
    vqgan.save(vqgan.VQGAN(config, key=jax.random.key(0)), folder)
    return folder


def picture(seed, size=20):
    """A smooth random picture: JPEG and PNG hold nearly the same."""
    grid = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((size, size), Image.Resampling.BILINEAR)


def write_pictures(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        picture(i).save(folder / f"{i:03d}.png")
    return folder


def sentences(folder):
    shards = tokenize_data.Shards(folder)
    return [shards[i][1].tolist() for i in range(len(shards))]


def codes_of(tokenizer, path):
    return np.asarray(vqgan.encode(vqgan.load(tokenizer), tokenize_data.read_image(path, SIZE)[None]))[0].tolist()


# ------------------------------------------------------------------------------------------------ reading


def test_a_16_bit_picture_is_scaled_and_not_saturated(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    pixels = tokenize_data.read_image(tmp_path / "depth.png", 8)
    np.testing.assert_allclose(pixels[..., 0], ramp / 65535, atol=1e-4)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = tokenize_data.read_image(tmp_path / "turned.png", 8)
    assert pixels[:, 4:].min() == 1 and pixels[:, :4].max() == 0


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert tokenize_data.read_image(tmp_path / "clear.png", 4).min() == 1
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 200, 30] + [0] * 765)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert tokenize_data.read_image(tmp_path / "palette.png", 4).min() == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "CMYK"])
def test_every_mode_becomes_three_channels_in_range(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    picture(0).convert(mode).save(path)
    pixels = tokenize_data.read_image(path, SIZE)
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.float32 and 0 <= pixels.min() <= pixels.max() <= 1


def test_crop_keeps_the_aspect_ratio_and_stretch_does_not(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))  # the central square
    image.save(tmp_path / "wide.png")
    assert tokenize_data.read_image(tmp_path / "wide.png", 8, fit="crop").min() > 0.9  # bicubic looks a little beyond the cut
    assert tokenize_data.read_image(tmp_path / "wide.png", 8)[:, 0].max() < 0.2


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(tokenize_data.read_image(tmp_path / "a.gif", 8)[0, 0], [1, 0, 0], atol=0.02)


@pytest.mark.parametrize("name, content", [("text.png", b"this is no picture"), ("empty.jpg", b""), ("page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
                                           ("half.png", None)])
def test_what_is_no_whole_picture_is_refused_by_name(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        tokenize_data.read_image(path, 8)


def test_a_picture_over_the_pixel_cap_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="bomb.png.*limit"):
        tokenize_data.read_image(tmp_path / "bomb.png", 8)


def test_a_missing_file_is_a_file_not_found_error():
    with pytest.raises(UserError, match="nowhere.png"):
        tokenize_data.read_image("nowhere.png", 8)


# ------------------------------------------------------------------------------------------------ kinds


def test_pairs_are_matched_by_name_and_unmatched_files_are_listed(tmp_path, tokenizer):
    inputs, answers = write_pictures(tmp_path / "in", 5), write_pictures(tmp_path / "out", 4, first=1)
    tokenize_data.run(tokenize_data.Pairs(inputs=inputs, answers=answers, out=tmp_path / "d", tokenizer=tokenizer, shots=2))
    known = {tuple(codes_of(tokenizer, inputs / f"{i:03d}.png") + codes_of(tokenizer, answers / f"{i:03d}.png")) for i in range(1, 5)}
    halves = [tuple(s[i:i + 32]) for s in sentences(tmp_path / "d") for i in (0, 32)]
    assert len(halves) == 4 and set(halves) == known
    report = [json.loads(line) for line in (tmp_path / "d.rejected.jsonl").read_text().splitlines()]
    assert [pathlib.Path(r["path"]).name for r in report] == ["000.png"]


def test_a_bad_picture_is_left_out_and_the_rest_is_as_without_it(tmp_path, tokenizer):
    clean, dirty = write_pictures(tmp_path / "clean", 8), write_pictures(tmp_path / "dirty", 8)
    (dirty / "003a.png").write_text("no picture")
    for folder in (clean, dirty):
        tokenize_data.run(tokenize_data.Colorize(inputs=folder, out=tmp_path / f"{folder.name}-d", tokenizer=tokenizer,
                                                               shots=4, max_rejected=0.2))
    assert sentences(tmp_path / "clean-d") == sentences(tmp_path / "dirty-d")
    assert "003a.png" in (tmp_path / "dirty-d.rejected.jsonl").read_text()


def test_too_many_bad_pictures_stop_the_run(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "in", 4)
    (folder / "bad.png").write_text("no picture")
    with pytest.raises(UserError, match="max-rejected"):
        tokenize_data.run(tokenize_data.Colorize(inputs=folder, out=tmp_path / "d", tokenizer=tokenizer, shots=2))
    assert not (tmp_path / "d").exists()


def test_an_epoch_is_a_permutation_and_epochs_differ(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "in", 6)
    tokenize_data.run(tokenize_data.Colorize(inputs=folder, out=tmp_path / "d", tokenizer=tokenizer, shots=2, epochs=2))
    pairs = [tuple(s[i:i + 32]) for s in sentences(tmp_path / "d") for i in (0, 32)]
    assert len(pairs) == 12 and set(pairs[:6]) == set(pairs[6:]) and len(set(pairs[:6])) == 6 and pairs[:6] != pairs[6:]


def test_grey_has_the_published_weights():
    colour = np.zeros((1, 3, 3), np.float32)
    colour[0, np.arange(3), np.arange(3)] = 1
    np.testing.assert_allclose(tokenize_data.to_grey(colour)[0, :, 0], [0.2989, 0.5870, 0.1140], atol=1e-6)


def test_inpainting_covers_a_square_or_patches_and_leaves_the_rest():
    picture_HWC, squares = np.full((64, 64, 3), 0.5, np.float32), 0
    for seed in range(200):
        covered = scenes.random_mask(picture_HWC, np.random.default_rng(seed))
        assert set(np.unique(covered)) <= {0, 0.5}
        rows, columns = np.nonzero(covered[..., 0] == 0)
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            squares += len(rows) == height * width and height == width and height % 8 != 0
    assert 30 <= squares <= 90  # p = .3 of 200, less those whose side is a whole number of patches


def test_frames_of_a_sentence_come_from_one_clip_at_one_stride(tmp_path, tokenizer):
    clips = [write_pictures(tmp_path / "clips" / name, 9, first) for name, first in (("a", 0), ("b", 100))]
    order = {tuple(codes_of(tokenizer, path)): (clip.name, i) for clip in clips for i, path in enumerate(sorted(clip.iterdir()))}
    tokenize_data.run(tokenize_data.Frames(inputs=tmp_path / "clips", out=tmp_path / "d", tokenizer=tokenizer, frames=4,
                                                       max_stride=2, epochs=6))
    strides = set()
    for sentence in sentences(tmp_path / "d"):
        names, indices = zip(*[order[tuple(sentence[i:i + 16])] for i in range(0, 64, 16)])
        assert len(set(names)) == 1 and len(set(np.diff(indices))) == 1
        strides |= set(np.diff(indices))
    assert strides == {1, 2}


@pytest.mark.parametrize("task", list(scenes.TASKS))
def test_every_demo_task_draws_sixteen_pictures_in_range(task):
    world = scenes.World("heldout")
    kind, pixels = scenes.demo_sentence(world, np.random.default_rng(0), 48, task)
    assert kind == task and pixels.shape == (16, 48, 48, 3) and pixels.dtype == np.float32
    assert 0 <= pixels.min() and pixels.max() <= 1 and np.ptp(pixels) > 0.3


def test_a_segmentation_answer_is_exact():
    """Where the answer is in the object's colour, and only there, the picture differs from its empty background."""
    world, rng = scenes.World("train"), np.random.default_rng(3)
    scene = scenes.Scene(world, rng, 96, objects=1)
    drawn = scene.drawn(scene.layers[0])[..., 3] > 0.5
    assert ((scene.labels() > 0) == drawn).all() and 0.02 < drawn.mean() < 0.9
    np.testing.assert_array_equal(scene.render()[scene.drawn(scene.layers[0])[..., 3] == 0], scene.ground[scene.drawn(scene.layers[0])[..., 3] == 0])


def test_no_object_background_or_colour_pair_is_in_both_splits():
    train, heldout = scenes.World("train"), scenes.World("heldout")
    pictures = lambda world: {image.tobytes() for image in world.objects + world.grounds}
    assert not pictures(train) & pictures(heldout)
    assert len(heldout.objects) > 40 and len(heldout.grounds) > 20
    assert scenes.TASKS["cut-out"] == 0


# ------------------------------------------------------------------------------------------------ shards and reader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer):
    """20 sentences of 32 codes; sentence i begins with code i."""
    folder, model = tmp_path_factory.mktemp("data") / "d", vqgan.load(tokenizer)
    rng = np.random.default_rng(0)
    rows = [np.concatenate([[i], rng.integers(0, 32, 31)]).astype(np.uint16) for i in range(20)]
    tokenize_data.write_dataset(folder, model, ["a", "b"], ((i % 2, row) for i, row in enumerate(rows)))
    return folder, rows


def test_what_was_written_is_read_with_its_kind(dataset):
    folder, rows = dataset
    shards = tokenize_data.Shards(folder)
    assert len(shards) == 20 and shards.kinds == ["a", "b"]
    for i, row in enumerate(rows):
        kind, tokens = shards[i]
        assert kind == i % 2 and (tokens == row).all()


def test_a_row_is_bos_codes_eos_and_padding_that_the_mask_leaves_out(dataset):
    folder, rows = dataset
    batch = next(iter(tokenize_data.open_dataset([folder], context=40, batch=4, seed=0)))
    assert batch["ids_BT"].shape == (4, 40) and batch["ids_BT"].dtype == np.int32
    for ids, mask in zip(batch["ids_BT"], batch["mask_BT"]):
        assert ids[0] == 32 and ids[33] == 33 and (ids[34:] == 34).all() and (ids[1:33] == rows[ids[1]]).all()
        assert mask.tolist() == [0] + [1] * 33 + [0] * 6


def firsts(dataset, count, **options):
    iterator = iter(tokenize_data.open_dataset([dataset], context=34, seed=1, **options))
    return [next(iterator)["ids_BT"][:, 1].tolist() for _ in range(count)]


def test_an_epoch_shows_every_sentence_once_and_the_next_in_another_order(dataset):
    order = sum(firsts(dataset[0], 10, batch=4), [])
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20)) and order[:20] != order[20:]


def test_reading_resumes_at_any_step(dataset):
    assert firsts(dataset[0], 12, batch=4)[7:] == firsts(dataset[0], 5, batch=4, start=7)


def test_the_order_of_sentences_does_not_depend_on_the_number_of_processes(dataset):
    whole = firsts(dataset[0], 6, batch=4)
    parts = [firsts(dataset[0], 6, batch=4, process=p, processes=2) for p in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(step) for step in whole]


def test_datasets_are_mixed_by_weight(dataset, tmp_path, tokenizer):
    rows = (np.full(32, 31, np.uint16) for _ in range(10))
    tokenize_data.write_dataset(tmp_path / "other", vqgan.load(tokenizer), ["c"], ((0, row) for row in rows))
    iterator = iter(tokenize_data.open_dataset([f"{dataset[0]}:3", f"{tmp_path / 'other'}:1"], context=34, batch=20, seed=0))
    batch = np.concatenate([next(iterator)["ids_BT"] for _ in range(2)])
    assert (batch[:, 1:33] == 31).all(axis=1).sum() == 10


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "00000.tokens").write_bytes((d / "00000.tokens").read_bytes()[:-2]), "truncated"),
    (lambda d: (d / "00000.tokens").write_bytes(b"\5\0" + (d / "00000.tokens").read_bytes()[2:]), "00000.tokens: its bytes are not those"),
    (lambda d: [(d / "00000.tokens").write_bytes(b"\xff\xff" + (d / "00000.tokens").read_bytes()[2:]), seal(d)], "outside the codebook"),
    (lambda d: (d / "00000.index.npy").write_bytes(b""), "index.npy"),
    (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: no readable JSON"),
    (lambda d: (d / "dataset.json").unlink(), "no dataset here"),
])
def test_a_damaged_dataset_is_refused_before_it_is_read(tmp_path, dataset, damage, message):
    folder = tmp_path / "d"
    folder.mkdir()
    for file in dataset[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    with pytest.raises(UserError, match=message):
        tokenize_data.open_dataset([folder], context=34, batch=2, seed=0)


def test_a_sentence_longer_than_the_context_and_other_tokenizers_are_refused(dataset, tmp_path, tokenizer):
    with pytest.raises(UserError, match="--context 34"):
        tokenize_data.open_dataset([dataset[0]], context=33, batch=2, seed=0)
    other = vqgan.VQGAN(vqgan.load(tokenizer).config, key=jax.random.key(1))
    tokenize_data.write_dataset(tmp_path / "other", other, ["c"], [(0, np.zeros(32, np.uint16))])
    with pytest.raises(UserError, match="another tokenizer"):
        tokenize_data.open_dataset([dataset[0], tmp_path / "other"], context=34, batch=2, seed=0)


def test_a_dataset_appears_whole_or_not_at_all(tmp_path, tokenizer):
    def breaks():
        yield 0, np.zeros(32, np.uint16)
        raise RuntimeError("the machine stops here")

    model = vqgan.load(tokenizer)
    with pytest.raises(RuntimeError):
        tokenize_data.write_dataset(tmp_path / "d", model, ["a"], breaks())
    assert not (tmp_path / "d").exists()
    tokenize_data.write_dataset(tmp_path / "d", model, ["a"], [(0, np.zeros(32, np.uint16))])
    with pytest.raises(UserError):
        tokenize_data.write_dataset(tmp_path / "d", model, ["a"], [(0, np.zeros(32, np.uint16))])


def test_show_decodes_sentences_to_a_picture(tmp_path, dataset, tokenizer):
    tokenize_data.show(tokenize_data.Show(data=dataset[0], out=tmp_path / "s.png", tokenizer=tokenizer, count=4))
    width, height = Image.open(tmp_path / "s.png").size
    assert (width, height) == (6 + 2 * 134, 6 + 4 * (18 + 134))  # two of each kind, titles above


@pytest.mark.slow
def test_show_draws_a_sentence_of_pictures_wider_than_4000_pixels_in_all(tmp_path):
    config = vqgan.VQGANConfig(
        resolution=256,
        hidden_channels=4,
        channel_mult=(1,) * 6,
        num_res_blocks=1,
        attn_resolutions=(),
        no_attn_mid_block=True,
        z_channels=4,
        num_embeddings=8,
        quantized_embed_dim=4,
        norm_groups=4,
    )
    vqgan.save(vqgan.VQGAN(config, key=jax.random.key(0)), tmp_path / "vq")
    tokenize_data.write_dataset(
        tmp_path / "d", vqgan.load(tmp_path / "vq"), ["a"], [(0, np.zeros(16 * 64, np.uint16))]
    )
    command = [
        "tokenize_data.py",
        "show",
        "--data",
        tmp_path / "d",
        "--out",
        tmp_path / "s.png",
        "--tokenizer",
        tmp_path / "vq",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(tokenize_data.__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "s.png").size == (6 + 16 * 262, 6 + 18 + 262)


@pytest.mark.parametrize("first, second", [("1", "1e-7"), ("1", "1e-20"), ("3e6", "1"), ("1e-9", "1e-9")])
def test_a_weight_by_which_a_dataset_would_never_be_seen_is_refused_by_its_name(
    tmp_path, dataset, first, second
):
    shutil.copytree(dataset[0], tmp_path / "d")
    opened = lambda first, second: tokenize_data.open_dataset(
        [f"{dataset[0]}:{first}", f"{tmp_path / 'd'}:{second}"], context=34, batch=2, seed=0
    )
    with pytest.raises(UserError, match=r"/d:.*: a weight below a millionth of all"):
        opened(first, second)
    opened("1", "1e-5")


def test_the_command_ends_with_one_line_and_status_2_on_bad_input(tmp_path):
    command = [sys.executable, "tokenize_data.py", "colorize", "--inputs", str(tmp_path / "none"), "--out", str(tmp_path / "d")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(tokenize_data.__file__).parent)
    assert done.returncode == 2 and "none: no such folder" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ every kind, code by code


def codes_of_pixels(tokenizer, pixels):
    pixels = np.stack(list(pixels)).astype(np.float32)
    batches = np.zeros((-(-len(pixels) // 16), 16, *pixels.shape[1:]), np.float32)  # one shape, one compilation
    batches.reshape(-1, *pixels.shape[1:])[:len(pixels)] = pixels
    model = vqgan.load(tokenizer)
    return [tuple(codes) for batch in batches for codes in np.asarray(vqgan.encode(model, batch)).tolist()][:len(pixels)]


def codes_of_files(tokenizer, paths):
    return dict(zip(paths, codes_of_pixels(tokenizer, [tokenize_data.read_image(path, SIZE) for path in paths])))


def pictures_in(sentence):
    return [tuple(sentence[i:i + 16]) for i in range(0, len(sentence), 16)]


def run(config):
    next(command for kind, command in tokenize_data.COMMANDS.values() if type(config) is kind)(config)
    shards = tokenize_data.Shards(config.out)
    return [(shards.kinds[kind], pictures_in(tokens.tolist())) for kind, tokens in map(shards.__getitem__, range(len(shards)))]


def rejected(out):
    return {pathlib.Path(r["path"]).name: r["reason"] for r in map(json.loads, pathlib.Path(f"{out}.rejected.jsonl").read_text().splitlines())}


def test_pairs_make_sentences_of_each_annotation_folder(tmp_path, tokenizer):
    photos, masks, depth = write_pictures(tmp_path / "photos", 6), write_pictures(tmp_path / "masks", 6, 0), tmp_path / "depth"
    depth.mkdir()
    for i in range(4):
        picture(50 + i).save(depth / f"{i:03d}.jpg")
    found = run(tokenize_data.Pairs(inputs=photos, answers=(masks, depth), out=tmp_path / "d", tokenizer=tokenizer, shots=2))
    codes = {(path.parent.name, path.stem): c for path, c in codes_of_files(tokenizer, [*photos.iterdir(), *masks.iterdir(), *depth.iterdir()]).items()}
    for kind, folder, count in (("pairs-masks", "masks", 6), ("pairs-depth", "depth", 4)):
        pairs = sorted(tuple(s[i:i + 2]) for k, s in found if k == kind for i in (0, 2))
        assert pairs == sorted((codes["photos", f"{i:03d}"], codes[folder, f"{i:03d}"]) for i in range(count))
    assert rejected(tmp_path / "d").keys() == {"004.png", "005.png"}  # photos without a depth


def test_colorization_and_inpainting_show_the_changed_picture_and_then_the_original(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "in", 4)
    originals = {path: tokenize_data.read_image(path, SIZE) for path in sorted(folder.iterdir())}
    [(_, colour)] = run(tokenize_data.Colorize(inputs=folder, out=tmp_path / "c", tokenizer=tokenizer, shots=4))
    wanted = list(zip(codes_of_pixels(tokenizer, [tokenize_data.to_grey(p) for p in originals.values()]), codes_of_pixels(tokenizer, originals.values())))
    assert sorted(zip(colour[::2], colour[1::2])) == sorted(wanted)
    masks = [[scenes.random_mask(p, np.random.default_rng((0, epoch, zlib.crc32(path.name.encode())))) for path, p in originals.items()] for epoch in (0, 1)]
    found = run(tokenize_data.Inpaint(inputs=folder, out=tmp_path / "i", tokenizer=tokenizer, shots=4, epochs=2))
    for (_, sentence), masked in zip(found, masks):
        assert sorted(zip(sentence[::2], sentence[1::2])) == sorted(zip(codes_of_pixels(tokenizer, masked), codes_of_pixels(tokenizer, originals.values())))


def test_modalities_of_a_picture_come_in_one_order_a_sentence(tmp_path, tokenizer):
    folders = [write_pictures(tmp_path / name, 12, 0) for name in "abc"]
    for k, folder in enumerate(folders):
        for path in folder.iterdir():
            picture(100 * k + int(path.stem)).save(path)
    at = {codes: (path.parent.name, path.stem) for path, codes in codes_of_files(tokenizer, [p for f in folders for p in f.iterdir()]).items()}
    orders = []
    for kind, sentence in run(tokenize_data.Multi(inputs=tuple(folders), out=tmp_path / "d", tokenizer=tokenizer, shots=3, epochs=3)):
        shots = [[at[codes] for codes in sentence[i:i + 3]] for i in (0, 3, 6)]
        assert kind == "multi" and len(sentence) == 9
        assert all(len({stem for _, stem in shot}) == 1 for shot in shots) and len({shot[0][1] for shot in shots}) == 3
        (order,) = {"".join(name for name, _ in shot) for shot in shots}
        assert sorted(order) == ["a", "b", "c"]
        orders.append(order)
    assert len(orders) == 12 and len(set(orders)) > 2


@pytest.mark.parametrize("per_class", [1, 2, 4])
def test_a_category_sentence_shows_different_classes_one_after_the_other(tmp_path, tokenizer, per_class):
    for c in range(5):
        write_pictures(tmp_path / "in" / f"class{c}", 5, 10 * c)
    at = {codes: path for path, codes in codes_of_files(tokenizer, list((tmp_path / "in").rglob("*.png"))).items()}
    found = run(tokenize_data.Category(inputs=tmp_path / "in", out=tmp_path / "d", tokenizer=tokenizer, per_class=per_class, pictures=4))
    for kind, sentence in found:
        classes = [at[codes].parent.name for codes in sentence]
        blocks = [set(classes[i:i + per_class]) for i in range(0, 4, per_class)]
        assert kind == "category" and all(len(block) == 1 for block in blocks) and len(set(classes)) == len(blocks)
    shown = [at[codes] for _, sentence in found for codes in sentence]
    assert len(shown) == len(set(shown)) >= (16 if per_class == 4 else 18)


def write_video(path, frames, first=0, rate=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [picture(first + i, 32) for i in range(frames)]
    if path.suffix == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:], duration=50)
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream({".webm": "libvpx", ".avi": "mpeg4"}.get(path.suffix, "libx264"), rate=rate)
        stream.width = stream.height = 32
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def frames_of(path):
    """An independent reading: every frame, by PyAV's or Pillow's own means."""
    if path.suffix == ".gif":
        with Image.open(path) as image:
            images = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    else:
        with av.open(str(path)) as container:
            images = [frame.to_image() for frame in container.decode(video=0)]
    return [np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32) / 255 for image in images]


def test_a_video_sentence_is_every_so_many_th_frame_of_one_file(tmp_path, tokenizer):
    files = [write_video(tmp_path / "in" / f"clip{suffix}", 14 + n, 40 * n) for n, suffix in enumerate((".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif"))]
    at = {codes: (path.name, t) for path in files for t, codes in enumerate(codes_of_pixels(tokenizer, frames_of(path)))}
    write_video(tmp_path / "in" / "short.mp4", 3, 500)
    (tmp_path / "in" / "half.mp4").write_bytes(files[0].read_bytes()[:900])
    (tmp_path / "in" / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    found = run(tokenize_data.Video(inputs=tmp_path / "in", out=tmp_path / "d", tokenizer=tokenizer, frames=4, strides=(1, 4), epochs=2, max_rejected=0.5))
    strides = collections.Counter()
    for kind, sentence in found:
        names, times = zip(*(at[codes] for codes in sentence))
        assert kind == "video" and len(set(names)) == 1 and len(set(np.diff(times))) == 1
        strides[names[0], int(np.diff(times)[0])] += 1
    assert strides == {(path.name, stride): 2 for path in files for stride in (1, 4)}
    reasons = rejected(tmp_path / "d")
    assert "3 frames" in reasons["short.mp4"] and "half.mp4" in reasons and "not an MP4" in reasons["list.mp4"]


def test_damaged_videos_are_counted_as_videos_not_as_frames(tmp_path, tokenizer):
    for n in range(20):
        file = write_video(tmp_path / "in" / f"{n:02d}.avi", 16, n)
        if n < 12:
            file.write_bytes(b"no video")
    video = lambda name, most: tokenize_data.Video(
        inputs=tmp_path / "in", out=tmp_path / name, tokenizer=tokenizer, strides=(1,), max_rejected=most
    )
    with pytest.raises(UserError, match="of 20 inputs cannot be read, more than --max-rejected 0.05"):
        run(video("strict", 0.05))
    assert len(run(video("lenient", 0.6))) == 8


def test_a_codebook_that_16_bits_cannot_name_is_refused_when_it_is_opened(tmp_path):
    config = vqgan.VQGANConfig(
        resolution=8,
        hidden_channels=4,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(),
        no_attn_mid_block=True,
        z_channels=4,
        num_embeddings=65_537,
        quantized_embed_dim=1,
        norm_groups=4,
    )
    vqgan.save(vqgan.VQGAN(config, key=jax.random.key(0)), tmp_path / "vq")
    (tmp_path / "d.jsonl").write_text("{}")
    for command in (
        tokenize_data.Colorize(
            inputs=write_pictures(tmp_path / "in", 8), out=tmp_path / "d", tokenizer=tmp_path / "vq"
        ),
        tokenize_data.ImportJsonl(
            inputs=(tmp_path / "d.jsonl",), out=tmp_path / "d", tokenizer=tmp_path / "vq"
        ),
        tokenize_data.Demo(out=tmp_path / "d", sentences=1, tokenizer=tmp_path / "vq"),
    ):
        with pytest.raises(UserError, match="vq: its codebook of 65,537 entries is over the 65,536"):
            next(call for kind, call in tokenize_data.COMMANDS.values() if kind is type(command))(command)


def test_a_bad_frame_changes_a_clip_as_if_it_were_not_there(tmp_path, tokenizer):
    clean, dirty = (write_pictures(tmp_path / name / "clip", 12) for name in ("clean", "dirty"))
    for n, stem in enumerate(("002a", "005a", "007a")):
        (dirty / f"{stem}.png").write_text("no picture")
    (tmp_path / "dirty" / "few").mkdir()
    picture(0).save(tmp_path / "dirty" / "few" / "1.png")
    of = lambda name: run(tokenize_data.Frames(inputs=tmp_path / name, out=tmp_path / f"{name}-d", tokenizer=tokenizer, frames=5, max_stride=2, epochs=4, max_rejected=0.4))
    assert of("clean") == of("dirty")
    assert {"002a.png", "005a.png", "007a.png"} & rejected(tmp_path / "dirty-d").keys() and "1 frames" in rejected(tmp_path / "dirty-d")["few"]


def test_frames_are_in_natural_order(tmp_path, tokenizer):
    (tmp_path / "in" / "clip").mkdir(parents=True)
    for i in range(12):
        picture(i).save(tmp_path / "in" / "clip" / f"frame{i}.png")
    [(_, sentence)] = run(tokenize_data.Frames(inputs=tmp_path / "in", out=tmp_path / "d", tokenizer=tokenizer, frames=12))
    assert sentence == list(codes_of_files(tokenizer, [tmp_path / "in" / "clip" / f"frame{i}.png" for i in range(12)]).values())


@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_a_clip_in_several_modalities_makes_a_sentence_in_both_orders(tmp_path, tokenizer, suffix):
    roots = [tmp_path / name for name in ("rgb", "depth")]
    for k, root in enumerate(roots):
        for c, name in enumerate(("clip0", "clip1", "alone")[:3 - k]):
            first = 100 * k + 20 * c
            if suffix:
                write_video(root / f"{name}.mp4", 9, first)
                continue
            (root / name).mkdir(parents=True)
            for t in range(9):
                picture(first + t).save(root / name / f"{t}.png")
    if suffix:
        at = {codes: (root.name, path.stem, t) for root in roots for path in root.iterdir() for t, codes in enumerate(codes_of_pixels(tokenizer, frames_of(path)))}
    else:
        at = {codes: (path.parent.parent.name, path.parent.name, int(path.stem)) for path, codes in codes_of_files(tokenizer, [p for root in roots for p in root.rglob("*.png")]).items()}
    found = run(tokenize_data.MultiVideo(inputs=tuple(roots), out=tmp_path / "d", tokenizer=tokenizer, frames=3, max_stride=2))
    assert [kind for kind, _ in found] == ["multi-video-by-task"] * 2 + ["multi-video-by-frame"] * 2
    for kind, sentence in found:
        tasks, clips, times = zip(*(at[codes] for codes in sentence))
        assert len(set(clips)) == 1
        (t0, t1, t2) = times[:3] if kind == "multi-video-by-task" else times[::2]
        assert t1 - t0 == t2 - t1 in (1, 2)
        assert tasks == (("rgb",) * 3 + ("depth",) * 3 if kind == "multi-video-by-task" else ("rgb", "depth") * 3)
        assert times == ((t0, t1, t2) * 2 if kind == "multi-video-by-task" else (t0, t0, t1, t1, t2, t2))
    assert any("alone" in name for name in rejected(tmp_path / "d"))


def test_tracks_show_the_images_and_then_their_masks_or_depths(tmp_path, tokenizer):
    """CO3D's layout; its depths are float16 values in 16-bit pictures."""
    depths, at = {}, {}
    for n in range(4):
        track = tmp_path / "in" / ("car" if n < 2 else "apple") / f"track{n}"
        for folder, name in (("images", "frame{:06d}.jpg"), ("masks", "frame{:06d}.png"), ("depths", "frame{:06d}.jpg.geometric.png")):
            (track / folder).mkdir(parents=True)
            for t in range(3):
                path = track / folder / name.format(t)
                if folder == "depths":
                    depths[n, t] = np.random.default_rng((n, t)).uniform(1, 7, (20, 20)).astype(np.float16)
                    Image.fromarray(depths[n, t].view(np.uint16)).save(path)
                else:
                    picture(n * 20 + t + 10 * (folder == "masks")).save(path, quality=95)
                    at[path] = (folder, n, t)
    where = {codes: at[path] for path, codes in codes_of_files(tokenizer, list(at)).items()}
    for n in range(4):
        scale = np.float32(max(depths[n, t].astype(np.float32).max() for t in range(2)))
        for t in range(2):
            [codes] = codes_of_pixels(tokenizer, [vqgan.to_pixels(Image.fromarray(depths[n, t].astype(np.float32) / scale), SIZE)])
            where.setdefault(codes, ("depths", n, t))
    found = run(tokenize_data.Tracks(inputs=tmp_path / "in", out=tmp_path / "d", tokenizer=tokenizer, frames=2, shots=2, max_stride=1, limit=4, epochs=3))
    assert {kind for kind, _ in found} == {"tracks-masks", "tracks-depths"} and len(found) == 12
    for kind, sentence in found:
        for first in (0, 4):
            images, others = sentence[first:first + 2], sentence[first + 2:first + 4]
            [(_, n, t), (_, m, u)] = [where[codes] for codes in images]
            assert n == m and u == t + 1
            if kind == "tracks-masks":
                assert [where[codes] for codes in others] == [("masks", n, t), ("masks", n, u)]
            elif t == 0:
                assert [where[codes] for codes in others] == [("depths", n, 0), ("depths", n, 1)]
        assert {where[codes][1] for codes in sentence[:2] + sentence[4:6]} in ({0, 1}, {2, 3})  # of one category


def test_labels_survive_the_way_through_colours_and_back(tmp_path):
    rng = np.random.default_rng(0)
    labels = {name: rng.integers(0, 256, (24, 24)).astype(dtype) for name, dtype in (("grey", np.uint8), ("deep", np.uint16))}
    (tmp_path / "in").mkdir()
    for name, array in labels.items():
        Image.fromarray(array).save(tmp_path / "in" / f"{name}.png")
    indexed = Image.fromarray(labels["grey"], "L").convert("P")
    indexed.putpalette(list(range(256)) * 3)
    indexed.putdata(labels["grey"].reshape(-1).tolist())
    indexed.save(tmp_path / "in" / "indexed.png")
    picture(0).save(tmp_path / "in" / "photo.png")
    tokenize_data.recolor(tokenize_data.Recolor(inputs=tmp_path / "in", out=tmp_path / "colours", max_rejected=0.5))
    assert rejected(tmp_path / "colours").keys() == {"photo.png"}
    (tmp_path / "noisy").mkdir()
    palette = np.array(json.loads((tmp_path / "colours" / "palette.json").read_text()))
    closest = min(np.abs(a - b).max() for a, b in itertools.combinations(palette, 2))
    for name in ("grey", "deep", "indexed"):
        noisy = np.asarray(Image.open(tmp_path / "colours" / f"{name}.png")).astype(int)
        noisy += rng.integers(-(closest // 4), closest // 4 + 1, noisy.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "noisy" / f"{name}.png")
    tokenize_data.recolor(tokenize_data.Recolor(inputs=tmp_path / "noisy", out=tmp_path / "back", palette=tmp_path / "colours" / "palette.json", invert=True))
    assert closest >= 8
    for name, wanted in (("grey", labels["grey"]), ("deep", labels["deep"]), ("indexed", labels["grey"])):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "back" / f"{name}.png")), wanted)


@pytest.mark.slow
def test_a_palette_takes_the_farthest_of_64_random_colours_each_time():
    rng, found = np.random.default_rng((7, 300)), [np.zeros(3, int)]
    for _ in range(299):
        tried = rng.integers(0, 256, (64, 3))
        nearest = [min(int(((colour - other) ** 2).sum()) for other in found) for colour in tried]
        found.append(tried[int(np.argmax(nearest))])
    np.testing.assert_array_equal(tokenize_data.draw_palette(300, 7), found)


def test_demo_pictures_do_not_replace_a_file_that_is_named_without_its_suffix(tmp_path):
    (tmp_path / "mine.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match="mine.npy exists"):
        tokenize_data.demo(tokenize_data.Demo(out=tmp_path / "mine", pictures=1))
    assert (tmp_path / "mine.npy").read_bytes() == b"mine"


def test_a_label_without_a_colour_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match="300.*256 colours"):
        tokenize_data.recolor(tokenize_data.Recolor(inputs=tmp_path / "in", out=tmp_path / "d"))


def test_augmentation_is_alike_on_both_sides_of_a_pair_and_new_in_each_epoch(tmp_path, tokenizer):
    photos = write_pictures(tmp_path / "photos", 8)
    (tmp_path / "same").mkdir()
    for path in photos.iterdir():
        Image.open(path).save(tmp_path / "same" / path.name)
    found = run(tokenize_data.Pairs(inputs=photos, answers=(tmp_path / "same",), out=tmp_path / "d", tokenizer=tokenizer, shots=8, epochs=2,
                                    random_crop=0.5, flip=True, jitter=0.4))
    plain = codes_of_files(tokenizer, list(photos.iterdir()))
    assert all(sentence[::2] == sentence[1::2] for _, sentence in found)
    assert len({codes for _, sentence in found for codes in sentence}) == 16
    assert len({codes for _, s in found for codes in s} & set(plain.values())) < 4  # few show the picture as it is


def test_a_mirrored_view_is_the_mirror_image_of_the_crop(tmp_path):
    image = picture(0, 40)
    image.save(tmp_path / "a.png")
    view = ("stretch", (0.5, 1.0, 0.5), True, None)
    wanted = np.asarray(image.crop((10, 20, 30, 40)).transpose(Image.Transpose.FLIP_LEFT_RIGHT), np.float32) / 255
    np.testing.assert_allclose(tokenize_data.read_view(tmp_path / "a.png", 20, view), wanted, atol=0.02)


def test_a_sideways_video_is_turned_upright(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2)
    upright = frames_of(path)
    data, turn = bytearray(path.read_bytes()), (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # the matrix of a telephone held upright
    at = data.index(b"tkhd") + 4 + 40
    data[at:at + 36] = np.array(turn, ">i4").tobytes()
    path.write_bytes(data)
    [shown], _ = tokenize_data.read_frames(path, [1], SIZE)
    np.testing.assert_allclose(shown, np.rot90(upright[1], -1), atol=0.02)  # clockwise, as players show it


KINDS_OF_ARCHIVES = [
    (tokenize_data.Colorize, {"shots": 2}), (tokenize_data.Inpaint, {"shots": 2, "flip": True}), (tokenize_data.Frames, {"frames": 3}),
    (tokenize_data.Category, {"per_class": 2, "pictures": 4}), (tokenize_data.Pairs, {"shots": 2, "filter": ".jpg", "answer_filter": ".mask."})]


@pytest.mark.parametrize("kind, flags", KINDS_OF_ARCHIVES)
def test_a_webdataset_gives_the_sentences_of_its_folder(tmp_path, tokenizer, kind, flags):
    """Samples are named up to the first dot; an entry that cannot be read is listed as FILE.tar/NAME."""
    folder, paired = tmp_path / "in", kind is tokenize_data.Pairs
    for i in range(8):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"class{i % 2}" / f"{i:04}.jpg", quality=95)
        if paired:
            picture(i + 50).save(folder / f"class{i % 2}" / f"{i:04}.mask.png")
    (folder / "class0" / "bad.jpg").write_text("no picture")
    for name in ("bad.mask.png", "0000.json"):
        (folder / "class0" / name).write_text("{}")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted(folder.rglob("*.*")):
            tar.add(path, path.relative_to(folder))
    if paired:  # in folders the names differ in the suffix alone
        for path in list(folder.rglob("*.mask.png")):
            (tmp_path / "masks" / path.parent.name).mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "masks" / path.parent.name / path.name.replace(".mask", ""))
    same = {"tokenizer": tokenizer, "max_rejected": 0.3}
    of_folder = {"answers": (tmp_path / "masks",), **flags, "answer_filter": "", "filter": ""} if paired else flags
    run(kind(inputs=folder, out=tmp_path / "a", **same, **of_folder))
    run(kind(inputs=tmp_path / "set.tar", out=tmp_path / "b", **same, **({"answers": (tmp_path / "set.tar",)} if paired else {}), **flags))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    reports = [[json.loads(line)["path"] for line in (tmp_path / f"{name}.rejected.jsonl").read_text().splitlines()] for name in "ab"]
    assert str(tmp_path / "set.tar/class0/bad.jpg") in reports[1] and len(reports[0]) == len(reports[1])


def test_a_parquet_file_gives_the_sentences_of_its_pictures(tmp_path, tokenizer):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    files = sorted(write_pictures(tmp_path / "in", 6).iterdir())
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pyarrow.table({"image": rows, "label": [0, 1] * 3, "caption": ["a"] * 6})
    parquet.write_table(table, tmp_path / "set.parquet", row_group_size=4)
    run(tokenize_data.Colorize(inputs=tmp_path / "in", out=tmp_path / "a", tokenizer=tokenizer, shots=3))
    parquet.write_table(table.drop(["label"]), tmp_path / "plain.parquet", row_group_size=4)
    run(tokenize_data.Colorize(inputs=tmp_path / "plain.parquet", out=tmp_path / "b", tokenizer=tokenizer, shots=3))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    (_, shown), = run(tokenize_data.Category(inputs=tmp_path / "set.parquet", out=tmp_path / "c", tokenizer=tokenizer, per_class=2, pictures=4))
    assert len(shown) == 4
    with pytest.raises(UserError, match="no column of pictures among caption"):
        parquet.write_table(table.select(["caption"]), tmp_path / "text.parquet")
        run(tokenize_data.Colorize(inputs=tmp_path / "text.parquet", out=tmp_path / "d", tokenizer=tokenizer))


def test_a_compressed_or_cut_tar_is_refused_by_name(tmp_path, tokenizer):
    for name, content in (("cut.tar", b"no tar"), ("packed.tar", gzip.compress(bytes(10240)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: "):
            run(tokenize_data.Colorize(inputs=tmp_path / name, out=tmp_path / "d", tokenizer=tokenizer))


def test_sentences_longer_than_the_context_are_reported(tmp_path, tokenizer, capsys):
    folder = write_pictures(tmp_path / "in", 4)
    run(tokenize_data.Colorize(inputs=folder, out=tmp_path / "d", tokenizer=tokenizer, shots=2, context=65))
    assert "2 of 2 sentences are longer than --context 65" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ faults


def digests(folder):
    """What the dataset holds, but for how many inputs were left out."""
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.name != "dataset.json"}


def test_workers_give_the_bytes_of_one_thread(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "in", 12)
    (folder / "bad.png").write_text("no picture")
    Image.fromarray(np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)).save(folder / "deep.png")
    for workers in (0, 3):
        run(tokenize_data.Inpaint(inputs=folder, out=tmp_path / f"d{workers}", tokenizer=tokenizer, shots=2, epochs=2, workers=workers, max_rejected=0.1))
    assert digests(tmp_path / "d0") == digests(tmp_path / "d3")
    assert (tmp_path / "d0" / "dataset.json").read_bytes() == (tmp_path / "d3" / "dataset.json").read_bytes()
    assert not list(tmp_path.glob("*.partial*")) + list(tmp_path.glob("*.codes"))


def test_hosts_that_share_a_disk_make_the_bytes_of_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize_data, "CHUNK", 8)
    folder = write_pictures(tmp_path / "in", 14)
    for part in ("1/3", "0/3", "2/3"):
        assert not (tmp_path / "parts").exists()
        tokenize_data.run(tokenize_data.Colorize(inputs=folder, out=tmp_path / "parts", tokenizer=tokenizer, shots=3, part=part))
    run(tokenize_data.Colorize(inputs=folder, out=tmp_path / "one", tokenizer=tokenizer, shots=3))
    assert {p.name: p.read_bytes() for p in (tmp_path / "parts").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}


def test_devices_that_share_a_batch_give_the_codes_of_one(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "in", 10)
    of = lambda mesh: run(tokenize_data.Colorize(inputs=folder, out=tmp_path / f"d{mesh}", tokenizer=tokenizer, shots=2, mesh=mesh, batch=16))
    assert of(1) == of(8)


@pytest.mark.parametrize("make, message", [
    (lambda d: (d / "empty").mkdir(), "no pictures"),
    (lambda d: write_pictures(d / "empty", 1), "do not fill one sentence"),
    (lambda d: [(d / "empty").mkdir(), *((d / "empty" / f"{i}.png").write_text("bad") for i in range(8))], "max-rejected"),
])
def test_empty_all_bad_and_too_few_inputs_are_errors(tmp_path, tokenizer, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        run(tokenize_data.Colorize(inputs=tmp_path / "empty", out=tmp_path / "d", tokenizer=tokenizer))


def test_a_folder_of_the_user_is_never_cleared(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "in", 2)
    for name in ("d.partial", "d.codes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match="in the way"):
            run(tokenize_data.Colorize(inputs=folder, out=tmp_path / "d", tokenizer=tokenizer, shots=2))
        assert (tmp_path / name / "mine.txt").exists()
        shutil.rmtree(tmp_path / name)
        shutil.rmtree(tmp_path / "d.codes", ignore_errors=True)


def test_inspect_counts_and_finds_a_changed_byte(tmp_path, dataset, capsys):
    tokenize_data.inspect(tokenize_data.Inspect(data=dataset[0], context=33))
    printed = capsys.readouterr().out
    assert "20 sentences, 640 tokens" in printed and "10 a" in printed and "32 of 32 in use" in printed and "20 longer than --context 33" in printed
    shutil.copytree(dataset[0], tmp_path / "d")
    data = bytearray((tmp_path / "d" / "00000.tokens").read_bytes())
    data[100] ^= 1
    (tmp_path / "d" / "00000.tokens").write_bytes(data)
    with pytest.raises(UserError, match="00000.tokens.*sha256"):
        tokenize_data.inspect(tokenize_data.Inspect(data=tmp_path / "d"))


# ------------------------------------------------------------------------------------------------ jsonl


def write_jsonl(path, rows, **more):
    """As LVM's scripts write it."""
    lines = [json.dumps({"tokens": base64.b64encode(np.asarray(row, "i4").tobytes()).decode("utf-8")}) + "\n" for row in rows]
    path.write_text("".join(lines))
    return path


def test_jsonl_comes_in_and_goes_out_to_the_byte(tmp_path, tokenizer, dataset):
    rows = [np.random.default_rng(i).integers(0, 32, 32 + 16 * (i % 3)) for i in range(9)]
    file = write_jsonl(tmp_path / "lvm.jsonl", rows)
    tokenize_data.import_jsonl(tokenize_data.ImportJsonl(inputs=(file,), out=tmp_path / "d", tokenizer=tokenizer))
    assert sentences(tmp_path / "d") == [row.tolist() for row in rows]
    tokenize_data.export_jsonl(tokenize_data.ExportJsonl(data=tmp_path / "d", out=tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("packing, context", [("sentence", 40), ("concat", 25), ("segment", 80)])
def test_a_jsonl_reads_as_the_shards_made_of_it(tmp_path, dataset, packing, context):
    file = write_jsonl(tmp_path / "lvm.jsonl", dataset[1])
    options = dict(context=context, batch=5, seed=3, packing=packing)
    shards, lines = (iter(tokenize_data.open_dataset([d], **options)) for d in (dataset[0], tokenize_data.open_sentences(file, 32, beside=tmp_path)))
    for _ in range(9):
        a, b = next(shards), next(lines)
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_int64_tokens_are_refused_with_the_cure(tmp_path, tokenizer):
    lines = [np.random.default_rng(n).integers(0, 32, 32).astype("<i8") for n in range(5)]
    file = tmp_path / "wide.jsonl"
    file.write_text(
        "".join(json.dumps({"tokens": base64.b64encode(ids_T.tobytes()).decode()}) + "\n" for ids_T in lines)
    )
    with pytest.raises(
        UserError, match=r"wide.jsonl.* int64 tokens .* write them with tokens.astype\('<i4'\)"
    ):
        tokenize_data.import_jsonl(
            tokenize_data.ImportJsonl(inputs=(file,), out=tmp_path / "d", tokenizer=tokenizer)
        )


def test_bad_lines_are_counted_listed_and_left_out(tmp_path, tokenizer, dataset, capsys):
    file = write_jsonl(tmp_path / "lvm.jsonl", [*dataset[1], [1, 2, 999], [-1], []])
    with open(file, "a") as more:
        more.write('\n{"tokens": "%%%"}\n{"token": "AAAA"}\nnot json\n[1]\n{"tokens": "AAA="}\n')
    command = tokenize_data.ImportJsonl(inputs=(file,), out=tmp_path / "d", tokenizer=tokenizer, max_rejected=0.5)
    tokenize_data.import_jsonl(command)
    assert sentences(tmp_path / "d") == [row.tolist() for row in dataset[1]]
    lines = [r["path"].rpartition(":")[2] for r in map(json.loads, (tmp_path / "d.rejected.jsonl").read_text().splitlines())]
    assert lines == ["21", "22", "23", "25", "26", "27", "28", "29"] and "8 of 28 lines" in capsys.readouterr().err
    with pytest.raises(UserError, match="lines are bad"):
        tokenize_data.open_sentences(file, 32, beside=tmp_path / "run")


def test_fields_place_literal_ids_and_keep_the_loss_from_what_is_in_brackets(tmp_path):
    encode = lambda row: base64.b64encode(np.asarray(row, "<i4").tobytes()).decode()
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"context": encode([1, 2]), "target": encode([3, 4])}) + "\n")
    opened = lambda fields: tokenize_data.open_sentences(file, 32, fields=fields, beside=tmp_path)
    row = lambda fields: [x.tolist() for x in opened(fields).row(0, (32, 33, 34))]
    assert row("[{context}],{target}") == [[1, 2, 3, 4], [0, 0, 1, 1]]
    assert row("<|32|>,{target},<|33|>") == [[32, 3, 4, 33], [1, 1, 1, 1]]
    assert row("[<|bos|>],[{context}],<|40|>,{target},<|eos|>") == [[32, 1, 2, 40, 3, 4, 33], [0, 0, 0, 1, 1, 1, 1]]
    for packing, wanted in (("sentence", [0, 0, 1, 1, 0, 0, 0, 0]), ("segment", [0, 0, 1, 1, 0, 0, 0, 0]), ("concat", [0, 0, 1, 1, 0, 0, 0, 0])):
        batch = next(iter(tokenize_data.open_dataset([opened("[{context}],{target}")], context=8, batch=1, seed=0, packing=packing)))
        assert batch["mask_BT"].tolist() == [wanted]
    for fields, message in ((",{tokens},", "swallows"), ("{a", "neither"), ("[{a}", "neither"), ("text", "neither"), ("<|999|>,{target}", "vocabulary"), ("<|1|>", "no {key}")):
        with pytest.raises(UserError, match=re.escape(message)):
            opened(fields)


def test_a_jsonl_is_imported_once_unless_it_changes(tmp_path, dataset, capsys):
    """Compressed ones too; a reader of datasets alone says how to make one of it."""
    file = write_jsonl(tmp_path / "a.jsonl", dataset[1])
    opened = lambda name: tokenize_data.open_sentences(tmp_path / name, 32, beside=tmp_path / "run")
    assert opened("a.jsonl").folder == opened("a.jsonl").folder and capsys.readouterr().out.count("wrote 20 sentences") == 1
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert [opened("b.jsonl.gz")[i][1].tolist() for i in range(20)] == [row.tolist() for row in dataset[1]]
    write_jsonl(file, dataset[1][:7])
    assert len(opened("a.jsonl")) == 7
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(file.read_bytes())[:-20])
    with pytest.raises(UserError, match="b.jsonl.gz: cannot be decompressed"):
        opened("b.jsonl.gz")
    with pytest.raises(UserError, match="import-jsonl --inputs .*a.jsonl"):
        tokenize_data.open_dataset([file], context=34, batch=2, seed=0)


def test_a_zst_is_imported_or_its_package_named(tmp_path, dataset):
    name, file = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", tmp_path / "a.jsonl.zst"
    opened = lambda: tokenize_data.open_sentences(file, 32, beside=tmp_path)
    try:
        zstd = importlib.import_module(name)
    except ImportError:
        file.write_bytes(b"")
        with pytest.raises(UserError, match="a.jsonl.zst.*pip install backports.zstd"):
            opened()
        return
    content = zstd.compress(write_jsonl(tmp_path / "a.jsonl", dataset[1]).read_bytes())
    file.write_bytes(content)
    assert [opened()[i][1].tolist() for i in range(20)] == [row.tolist() for row in dataset[1]]
    file.write_bytes(content[:-9])
    with pytest.raises(UserError, match="cannot be decompressed"):
        opened()


def test_an_empty_jsonl_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no line"):
        tokenize_data.open_sentences(tmp_path / "a.jsonl", 32, beside=tmp_path)


# ------------------------------------------------------------------------------------------------ packing and order


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, tokenizer):
    """30 sentences of 16 to 64 codes; the first two codes number the sentence."""
    folder, rng = tmp_path_factory.mktemp("uneven") / "d", np.random.default_rng(1)
    rows = [np.concatenate([[i // 32, i % 32], rng.integers(0, 32, 14 + 16 * (i % 4))]).astype(np.uint16) for i in range(30)]
    tokenize_data.write_dataset(folder, vqgan.load(tokenizer), ["a"], ((0, row) for row in rows))
    return folder, rows


def batches(paths, count, **options):
    iterator = iter(tokenize_data.open_dataset(paths, **{"context": 66, "batch": 4, "seed": 1} | options))
    return [next(iterator) for _ in range(count)]


def test_concat_cuts_the_joined_sentences_and_shows_each_target_once_an_epoch(uneven):
    """Behind the token that stands before it; in rows that another epoch shows in another order."""
    joined = [[32, *row.tolist(), 33] for row in uneven[1]]
    wanted = collections.Counter(pair for row in joined for pair in zip(row, row[1:])) + collections.Counter({(33, 32): 29})
    count = -(-(wanted.total()) // 32)
    read = batches([uneven[0]], count, batch=2, packing="concat", context=33)
    ids_NT, mask_NT = (np.concatenate([batch[key] for batch in read]) for key in ("ids_BT", "mask_BT"))
    orders = []
    for rows, masks in zip(np.split(ids_NT, 2), np.split(mask_NT, 2)):
        assert collections.Counter((int(row[t - 1]), int(row[t])) for row, mask in zip(rows, masks) for t in np.flatnonzero(mask)) == wanted
        assert not masks[:, 0].any() and masks.sum(1).tolist().count(32) >= count - 1
        orders.append(list(map(tuple, rows)))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_segment_row_holds_whole_sentences_and_marks_what_may_be_predicted(uneven):
    """Each sentence once an epoch, and few places stay empty."""
    seen, filled = [], []
    for batch in batches([uneven[0]], 40, packing="segment", context=100):
        for ids, mask, segments in zip(batch["ids_BT"], batch["mask_BT"], batch["segment_ids_BT"]):
            filled.append((segments > 0).mean())
            for number in range(1, segments.max() + 1):
                sentence = ids[segments == number]
                assert sentence[0] == 32 and sentence[-1] == 33 and mask[segments == number].tolist() == [0] + [1] * (len(sentence) - 1)
                seen.append(tuple(sentence[1:-1].tolist()))
            assert (ids[segments == 0] == 34).all() and mask[segments == 0].sum() == 0
    known = {tuple(row.tolist()) for row in uneven[1]}
    assert set(seen[:30]) == set(seen[30:60]) == known and seen[:30] != seen[30:60]
    assert np.mean(filled) > 0.75


def test_a_sentence_packed_behind_others_gets_the_logits_it_gets_alone(uneven):
    """Segments keep attention apart, and rotary positions are relative: so they restart."""
    model = lvm.LVM(lvm.LVMConfig(hidden=32, ffn=48, layers=2, heads=2, codes=32, context=200), key=jax.random.key(0))
    [batch] = batches([uneven[0]], 1, packing="segment", context=160, batch=2)
    run, compared = jax.jit(lambda ids_BT, segment_ids_BT=None: model(ids_BT, segment_ids_BT)), 0
    logits_BTV = run(batch["ids_BT"], batch["segment_ids_BT"])
    for b in range(2):
        for number in range(1, batch["segment_ids_BT"][b].max() + 1):
            at = np.flatnonzero(batch["segment_ids_BT"][b] == number)
            alone_BT = np.zeros((1, 66), np.int32)  # what follows a sentence changes nothing in it
            alone_BT[0, :len(at)] = batch["ids_BT"][b, at]
            np.testing.assert_allclose(logits_BTV[b, at], run(alone_BT)[0, :len(at)], atol=2e-5)
            compared += at[0] > 0
    assert compared > 2


@pytest.mark.parametrize("packing", tokenize_data.PACKINGS)
def test_a_row_is_the_same_at_any_start_and_number_of_processes(uneven, dataset, packing):
    paths, options = [f"{uneven[0]}:0.7", f"{dataset[0]}:0.3"], dict(packing=packing, seed=5)
    whole = batches(paths, 12, **options)
    for start, processes in ((7, 1), (3, 2), (9, 4)):
        parts = [batches(paths, 3, start=start, process=p, processes=processes, **options) for p in range(processes)]
        for step in range(3):
            for key in whole[0]:
                np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), whole[start + step][key])


def test_the_mixture_is_exact_and_even(uneven, dataset):
    own = {tuple(row[:2].tolist()) + (len(row),) for row in uneven[1]}
    rows = np.concatenate([b["ids_BT"] for b in batches([f"{uneven[0]}:0.7", f"{dataset[0]}:0.3"], 25, batch=20)])
    first = np.array([(int(row[1]), int(row[2]), int((row < 32).sum())) in own for row in rows])
    assert first.sum() == 350 and all(abs(first[:n].sum() - 0.7 * n) <= 1 for n in range(len(first)))


def test_the_held_out_fraction_is_the_same_sentences_wherever_they_are_stored(tmp_path, uneven, tokenizer):
    seen = lambda data: {tuple(ids[ids < 32].tolist()) for b in batches([data], 15, batch=2, heldout_fraction=0.3) for ids in b["ids_BT"]}
    shards, known = tokenize_data.Shards(uneven[0]), {tuple(row.tolist()) for row in uneven[1]}
    heldout = {tuple(shards[i][1].tolist()) for i in np.flatnonzero(tokenize_data.is_heldout(shards, 0.3))}
    assert 3 <= len(heldout) <= 15 and seen(uneven[0]) == known - heldout
    tokenize_data.write_dataset(tmp_path / "d", vqgan.load(tokenizer), ["b"], ((0, row) for row in reversed(uneven[1])))
    assert seen(tmp_path / "d") == known - heldout
    with pytest.raises(UserError, match="leaves no sentence out of"):
        batches([uneven[0]], 1, heldout_fraction=1 - 1e-9)


@pytest.mark.parametrize("packing", tokenize_data.PACKINGS)
def test_data_that_do_not_fill_a_batch_are_an_error(dataset, packing):
    with pytest.raises(UserError, match="do not fill a batch"):
        tokenize_data.open_dataset([dataset[0]], context=34, batch=64, seed=0, packing=packing)


def test_datasets_of_older_formats_are_refused_by_name(tmp_path, dataset):
    shutil.copytree(dataset[0], tmp_path / "d")
    for version, words in ((1, "an older program wrote it"), (2, "an older program wrote it"), (9, "format 9, this program reads 3$")):
        seal(tmp_path / "d", format=version)
        with pytest.raises(UserError, match=f"dataset.json: format {version}.*{words}" if version < 9 else words):
            tokenize_data.Shards(tmp_path / "d")


def test_weights_without_a_measure_are_refused(dataset):
    for weight in ("0", "-1"):
        with pytest.raises(UserError, match="more than 0"):
            tokenize_data.open_dataset([f"{dataset[0]}:{weight}"], context=34, batch=2, seed=0)


# ------------------------------------------------------------------------------------------------ training on it


def losses(out, monkeypatch, **options):
    """Trains a very small model for two steps -> the losses of metrics.jsonl, held-out ones included."""
    monkeypatch.setitem(lvm.SIZES, "mini", lvm.LVMConfig(hidden=32, ffn=48, layers=1, heads=2, codes=32, context=34))
    train.train(train.Config(out=out, steps=2, warmup=1, batch=8, log_every=1, save_every=2, **options))
    return [{k: v for k, v in json.loads(line).items() if "loss" in k} for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_jsonl_written_by_hand_trains_as_the_shards_made_of_it(tmp_path, tokenizer, monkeypatch, capsys):
    """Three sentences a row, with special ids of one's own, and a held-out fraction."""
    rows = [np.random.default_rng(i).integers(0, 32, 32) for i in range(96)]
    file = write_jsonl(tmp_path / "lvm.jsonl", rows)
    tokenize_data.import_jsonl(tokenize_data.ImportJsonl(inputs=(file,), out=tmp_path / "d", tokenizer=tokenizer))
    options = dict(packing="segment", context=102, heldout_fraction=0.4, special_ids=(40, 41, 42))
    shards = losses(tmp_path / "a", monkeypatch, data=(str(tmp_path / "d"),), **options)
    lines = losses(tmp_path / "b", monkeypatch, data=(str(file),), fields="<|40|>,{tokens},<|41|>", **options)
    assert len(shards) == 2 and shards == lines and all(2 < line["loss"] < 6 for line in lines) and "heldout_loss" in shards[-1]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model"]["bos_id"] == 40
    assert "import-jsonl" in capsys.readouterr().err  # no sample pictures of either: the tokenizer is another one
