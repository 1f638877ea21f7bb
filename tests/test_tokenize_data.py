import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import tokenize_data
import vqgan

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
    with pytest.raises(ValueError, match=name):
        tokenize_data.read_image(path, 8)


def test_a_picture_over_the_pixel_cap_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="bomb.png.*limit"):
        tokenize_data.read_image(tmp_path / "bomb.png", 8)


def test_a_missing_file_is_a_file_not_found_error():
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        tokenize_data.read_image("nowhere.png", 8)


# ------------------------------------------------------------------------------------------------ kinds


def test_pairs_are_matched_by_name_and_unmatched_files_are_listed(tmp_path, tokenizer):
    inputs, answers = write_pictures(tmp_path / "in", 5), write_pictures(tmp_path / "out", 4, first=1)
    tokenize_data.tokenize_pairs(tokenize_data.Pairs(inputs=inputs, answers=answers, out=tmp_path / "d", tokenizer=tokenizer, shots=2))
    known = {tuple(codes_of(tokenizer, inputs / f"{i:03d}.png") + codes_of(tokenizer, answers / f"{i:03d}.png")) for i in range(1, 5)}
    halves = [tuple(s[i:i + 32]) for s in sentences(tmp_path / "d") for i in (0, 32)]
    assert len(halves) == 4 and set(halves) == known
    report = [json.loads(line) for line in (tmp_path / "d.rejected.jsonl").read_text().splitlines()]
    assert [pathlib.Path(r["path"]).name for r in report] == ["000.png"]


def test_a_bad_picture_is_left_out_and_the_rest_is_as_without_it(tmp_path, tokenizer):
    clean, dirty = write_pictures(tmp_path / "clean", 8), write_pictures(tmp_path / "dirty", 8)
    (dirty / "003a.png").write_text("no picture")
    for folder in (clean, dirty):
        tokenize_data.tokenize_colorize(tokenize_data.Colorize(inputs=folder, out=tmp_path / f"{folder.name}-d", tokenizer=tokenizer,
                                                               shots=4, max_rejected=0.2))
    assert sentences(tmp_path / "clean-d") == sentences(tmp_path / "dirty-d")
    assert "003a.png" in (tmp_path / "dirty-d.rejected.jsonl").read_text()


def test_too_many_bad_pictures_stop_the_run(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "in", 4)
    (folder / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match="max-rejected"):
        tokenize_data.tokenize_colorize(tokenize_data.Colorize(inputs=folder, out=tmp_path / "d", tokenizer=tokenizer, shots=2))
    assert not (tmp_path / "d").exists()


def test_an_epoch_is_a_permutation_and_epochs_differ(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "in", 6)
    tokenize_data.tokenize_colorize(tokenize_data.Colorize(inputs=folder, out=tmp_path / "d", tokenizer=tokenizer, shots=2, epochs=2))
    pairs = [tuple(s[i:i + 32]) for s in sentences(tmp_path / "d") for i in (0, 32)]
    assert len(pairs) == 12 and set(pairs[:6]) == set(pairs[6:]) and len(set(pairs[:6])) == 6 and pairs[:6] != pairs[6:]


def test_grey_has_the_published_weights():
    colour = np.zeros((1, 3, 3), np.float32)
    colour[0, np.arange(3), np.arange(3)] = 1
    np.testing.assert_allclose(tokenize_data.to_grey(colour)[0, :, 0], [0.2989, 0.5870, 0.1140], atol=1e-6)


def test_inpainting_covers_a_square_or_patches_and_leaves_the_rest():
    picture_HWC, squares = np.full((64, 64, 3), 0.5, np.float32), 0
    for seed in range(200):
        covered = tokenize_data.cover(picture_HWC, np.random.default_rng(seed))
        assert set(np.unique(covered)) <= {0, 0.5}
        rows, columns = np.nonzero(covered[..., 0] == 0)
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            squares += len(rows) == height * width and height == width and height % 8 != 0
    assert 30 <= squares <= 90  # p = .3 of 200, less those whose side is a whole number of patches


def test_frames_of_a_sentence_come_from_one_clip_at_one_stride(tmp_path, tokenizer):
    clips = [write_pictures(tmp_path / "clips" / name, 9, first) for name, first in (("a", 0), ("b", 100))]
    order = {tuple(codes_of(tokenizer, path)): (clip.name, i) for clip in clips for i, path in enumerate(sorted(clip.iterdir()))}
    tokenize_data.tokenize_frames(tokenize_data.Frames(inputs=tmp_path / "clips", out=tmp_path / "d", tokenizer=tokenizer, frames=4,
                                                       max_stride=2, epochs=6))
    strides = set()
    for sentence in sentences(tmp_path / "d"):
        names, indices = zip(*[order[tuple(sentence[i:i + 16])] for i in range(0, 64, 16)])
        assert len(set(names)) == 1 and len(set(np.diff(indices))) == 1
        strides |= set(np.diff(indices))
    assert strides == {1, 2}


@pytest.mark.parametrize("task", list(tokenize_data.TASKS))
def test_every_demo_task_draws_sixteen_pictures_in_range(task):
    world = tokenize_data.World("heldout")
    kind, pixels = tokenize_data.demo_sentence(world, np.random.default_rng(0), 48, task)
    assert kind == task and pixels.shape == (16, 48, 48, 3) and pixels.dtype == np.float32
    assert 0 <= pixels.min() and pixels.max() <= 1 and np.ptp(pixels) > 0.3


def test_a_segmentation_answer_is_exact():
    """Where the answer is in the object's colour, and only there, the picture differs from its empty background."""
    world, rng = tokenize_data.World("train"), np.random.default_rng(3)
    scene = tokenize_data.Scene(world, rng, 96, objects=1)
    drawn = scene.drawn(scene.layers[0])[..., 3] > 0.5
    assert ((scene.labels() > 0) == drawn).all() and 0.02 < drawn.mean() < 0.9
    np.testing.assert_array_equal(scene.render()[scene.drawn(scene.layers[0])[..., 3] == 0], scene.ground[scene.drawn(scene.layers[0])[..., 3] == 0])


def test_no_object_background_or_colour_pair_is_in_both_splits():
    train, heldout = tokenize_data.World("train"), tokenize_data.World("heldout")
    pictures = lambda world: {image.tobytes() for image in world.objects + world.grounds}
    assert not pictures(train) & pictures(heldout)
    assert len(heldout.objects) > 40 and len(heldout.grounds) > 20
    assert tokenize_data.TASKS["cut-out"] == 0


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
    iterator = iter(tokenize_data.open_dataset([f"{dataset[0]}:3", f"{tmp_path / 'other'}:1"], context=34, batch=40, seed=0))
    batch = next(iterator)["ids_BT"]
    assert (batch[:, 1:33] == 31).all(axis=1).sum() == 10


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "00000.tokens").write_bytes((d / "00000.tokens").read_bytes()[:-2]), "truncated"),
    (lambda d: (d / "00000.tokens").write_bytes(b"\xff\xff" + (d / "00000.tokens").read_bytes()[2:]), "outside the codebook"),
    (lambda d: (d / "00000.index.npy").write_bytes(b""), "index.npy"),
    (lambda d: (d / "dataset.json").write_text("{"), "damaged"),
    (lambda d: (d / "dataset.json").unlink(), "no dataset here"),
])
def test_a_damaged_dataset_is_refused_before_it_is_read(tmp_path, dataset, damage, message):
    folder = tmp_path / "d"
    folder.mkdir()
    for file in dataset[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tokenize_data.open_dataset([folder], context=34, batch=2, seed=0)


def test_a_sentence_longer_than_the_context_and_other_tokenizers_are_refused(dataset, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="--context 34"):
        tokenize_data.open_dataset([dataset[0]], context=33, batch=2, seed=0)
    other = vqgan.VQGAN(vqgan.load(tokenizer).config, key=jax.random.key(1))
    tokenize_data.write_dataset(tmp_path / "other", other, ["c"], [(0, np.zeros(32, np.uint16))])
    with pytest.raises(ValueError, match="another tokenizer"):
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
    with pytest.raises(FileExistsError):
        tokenize_data.write_dataset(tmp_path / "d", model, ["a"], [(0, np.zeros(32, np.uint16))])


def test_show_decodes_sentences_to_a_picture(tmp_path, dataset, tokenizer):
    tokenize_data.show(tokenize_data.Show(data=dataset[0], out=tmp_path / "s.png", tokenizer=tokenizer, count=3))
    assert Image.open(tmp_path / "s.png").size == (2 * (SIZE + 4), 3 * (SIZE + 4))


def test_the_command_ends_with_one_line_and_status_2_on_bad_input(tmp_path):
    command = [sys.executable, "tokenize_data.py", "colorize", "--inputs", str(tmp_path / "none"), "--out", str(tmp_path / "d")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(tokenize_data.__file__).parent)
    assert done.returncode == 2 and "none: no such folder" in done.stderr and "Traceback" not in done.stderr
