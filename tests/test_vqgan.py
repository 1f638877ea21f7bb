"""The tokenizer gives the published one's codes and pixels; its files go out and come in whole, and bad ones stay out.

fixtures/{vqgan.npz,small.bin,peers.npz} come from make_vqgan_fixtures.py, which says how; no PyTorch is needed here.
"""

import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
import zlib
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import save_file
from weights_rule import (
    VQGAN_CONFIGS,
    VQGAN_TINY,
    efficientnet_weights,
    lpips_weights,
    measured_pictures,
    picture,
    tensor,
    vqgan_shapes,
    vqgan_weights,
)

import vqgan
from common import metrics
from common.images import UserError
from common.runs import RunStopped
from common.weights import open_pickle, open_tensors
from benchmarks import tokenizer as benchmark

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
EXPECTED = np.load(FIXTURES / "vqgan.npz")
PEERS = np.load(FIXTURES / "peers.npz")
PEER_NAMES = ["taming-f16-1024", "taming-f16-16384", "llamagen-vq16", "llamagen-vq8", "maskgit"]


# ---------------------------------------------------------------------------- the network


@pytest.mark.parametrize("name", VQGAN_CONFIGS)
@pytest.mark.slow
def test_codes_and_pixels_equal_the_published_tokenizer(name):
    expected = lambda key: EXPECTED[f"{name}/{key}"]
    weights = vqgan_weights(vqgan_shapes(VQGAN_CONFIGS[name]), str(expected("suffix")))
    images = picture(VQGAN_CONFIGS[name]["resolution"], len(expected("codes_BS")))
    made_from = expected("picture_crc"), expected("codebook_crc")
    assert (zlib.crc32(images), zlib.crc32(weights["quantize.embedding.weight"])) == made_from, (
        "weights_rule.py gives other numbers than it gave when the fixtures were made: run make_vqgan_fixtures.py"
    )
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: pytest would keep the released size's 585 MB
        model = vqgan.load(write_folder(folder, VQGAN_CONFIGS[name], weights))
    del weights

    codes_BS = vqgan.encode(model, images.astype(np.float32) / 255)
    assert codes_BS.dtype == np.int32
    np.testing.assert_array_equal(codes_BS, expected("codes_BS"))

    raw_BHWC = np.asarray(raw_decode(model, codes_BS))
    kept = {
        "raw_BHWC": lambda x: x,
        "grid_BHWC": lambda x: x[:, ::8, ::8],
        "off_grid_BHWC": lambda x: x[:, 3::16, 5::16],
        "rows_BHWC": lambda x: x[:, [0, -1]],
        "columns_BHWC": lambda x: x[:, :, [0, -1]],
    }
    checked = [key for key in kept if f"{name}/{key}" in EXPECTED]
    assert checked
    for key in checked:
        np.testing.assert_allclose(kept[key](raw_BHWC), expected(key), rtol=0, atol=1e-4, err_msg=key)
    np.testing.assert_allclose([raw_BHWC.mean(), raw_BHWC.std()], [expected("mean"), expected("std")], atol=1e-5)


def test_decode_is_the_reconstruction_clamped_to_0_1(tiny):
    model = eqx.tree_at(lambda m: m.decoder.conv_out.bias, tiny, jnp.array([-1.0, 0.5, 2.0]))
    codes_BS = np.arange(2 * 256, dtype=np.int32).reshape(2, 256) % 64
    pixels_BHWC = vqgan.decode(model, codes_BS)
    assert pixels_BHWC.shape == (2, 32, 32, 3) and pixels_BHWC.dtype == np.float32
    assert pixels_BHWC.min() == 0 and pixels_BHWC.max() == 1
    np.testing.assert_allclose(pixels_BHWC, np.clip(raw_decode(model, codes_BS), 0, 1), atol=1e-6)


def test_a_convolution_after_doubling_equals_smaller_ones_before_it():
    resample = vqgan.Resample(3, True, up=True, key=jax.random.key(0))
    resample = eqx.tree_at(lambda r: r.conv.bias, resample, jnp.array([1.0, -2.0, 3.0]))
    x_BHWC = jax.random.normal(jax.random.key(1), (2, 3, 5, 3))
    doubled_BHWC = x_BHWC.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(resample(x_BHWC), resample.conv(doubled_BHWC), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_codes_of_a_picture_do_not_depend_on_its_batch_or_the_number_of_devices(tiny):
    pixels_BHWC = picture(32, 8).astype(np.float32) / 255
    codes_BS = vqgan.encode(tiny, pixels_BHWC)
    assert len(np.unique(codes_BS)) > 8
    for n in (1, 3):
        for i in range(0, 8 - n + 1, n):
            np.testing.assert_array_equal(vqgan.encode(tiny, pixels_BHWC[i : i + n]), codes_BS[i : i + n])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = vqgan.encode(jax.device_put(tiny, NamedSharding(mesh, P())), jax.device_put(pixels_BHWC, NamedSharding(mesh, P("data"))))
    assert len(split.sharding.device_set) == 8
    np.testing.assert_array_equal(split, codes_BS)
    replicated = jax.device_put(tiny, NamedSharding(mesh, P()))
    for model, batch in ((tiny, 3), (tiny, 16), (replicated, 16)):
        np.testing.assert_array_equal(vqgan.encode_all(model, pixels_BHWC, batch), codes_BS)
        np.testing.assert_allclose(vqgan.decode_all(model, codes_BS, batch), vqgan.decode(tiny, codes_BS), atol=1e-6)


def test_the_released_network_is_146_244_675_parameters_in_277_tensors():
    network = eqx.filter_eval_shape(
        lambda: vqgan.VQGAN(vqgan.VQGANConfig(**VQGAN_CONFIGS["released"]), key=jax.random.key(0))
    )
    leaves = jax.tree.leaves(network)
    assert len(leaves) == 277 and sum(math.prod(leaf.shape) for leaf in leaves) == 146_244_675
    assert network.config == vqgan.PRESETS["lvm"]


@pytest.mark.parametrize("name", VQGAN_CONFIGS)
def test_the_path_of_every_weight_is_its_published_name(name):
    network = eqx.filter_eval_shape(
        lambda: vqgan.VQGAN(vqgan.VQGANConfig(**VQGAN_CONFIGS[name]), key=jax.random.key(0))
    )
    ours = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(network)
    }
    hwio = lambda shape: (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape
    assert ours == {name: hwio(shape) for name, shape in vqgan_shapes(VQGAN_CONFIGS[name]).items()}


def test_the_defaults_are_the_published_class_defaults():
    assert vqgan.VQGANConfig() == vqgan.VQGANConfig(**VQGAN_CONFIGS["defaults"])


@pytest.mark.parametrize(
    "pixels_BHWC, reason",
    [
        (np.zeros((1, 31, 31, 3), np.float32), r"multiple of 2.*31"),
        (np.zeros((1, 32, 16, 3), np.float32), r"32, 16"),
        (np.zeros((1, 0, 0, 3), np.float32), r"0, 0"),
        (np.zeros((1, 32, 32, 4), np.float32), r"32, 4"),
        (np.zeros((1, 32, 32, 1), np.float32), r"32, 1"),
        (np.zeros((1, 3, 32, 32), np.float32), r"3, 32, 32"),
        (np.zeros((32, 32, 3), np.float32), r"32, 32, 3"),
        (np.zeros((1, 32, 32, 3), np.uint8), "uint8"),
        (np.zeros((1, 32, 32, 3), np.int32), "int32"),
        (np.zeros((1, 32, 32, 3), bool), "bool"),
        (np.full((1, 32, 32, 3), 1.5, np.float32), r"\[0, 1\].*1\.5"),
        (np.full((1, 32, 32, 3), -1, np.float32), r"\[0, 1\].*-1"),
        (np.full((1, 32, 32, 3), 255, np.float32), r"\[0, 1\].*255"),
        (np.full((1, 32, 32, 3), np.nan, np.float32), "nan"),
    ],
)
def test_encode_refuses_what_is_no_batch_of_square_pictures_in_0_1(tiny, pixels_BHWC, reason):
    with pytest.raises(UserError, match=reason):
        vqgan.encode(tiny, pixels_BHWC)


@pytest.mark.parametrize(
    "codes_BS, reason",
    [
        (np.zeros(256, np.int32), "256"),
        (np.zeros((1, 255), np.int32), "255"),
        (np.zeros((1, 0), np.int32), "0"),
        (np.zeros((1, 16, 16), np.int32), "16, 16"),
        (np.full((1, 256), 64, np.int32), "64"),
        (np.full((1, 256), -1, np.int32), "-1"),
        (np.zeros((1, 256), np.float32), "float32"),
    ],
)
def test_decode_refuses_what_is_no_square_of_codes_of_the_codebook(tiny, codes_BS, reason):
    with pytest.raises(UserError, match=reason):
        vqgan.decode(tiny, codes_BS)


# ---------------------------------------------------------------------------- files that are whole


def test_saving_and_loading_returns_every_bit_and_writes_the_published_layout(tiny, tmp_path):
    vqgan.save(tiny, tmp_path / "new" / "model")
    again = vqgan.load(tmp_path / "new" / "model")
    assert again.config == tiny.config and jax.tree.structure(again) == jax.tree.structure(tiny)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tiny)))

    with safe_open(tmp_path / "new" / "model" / "model.safetensors", "np") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}
    assert {name: array.shape for name, array in written.items()} == vqgan_shapes(VQGAN_TINY)
    assert all(np.array_equal(written[name], array) for name, array in tiny_weights().items())
    fields = json.loads((tmp_path / "new" / "model" / "config.json").read_text())
    assert fields["_class_name"] == "VQGANModel" and VQGAN_TINY.keys() <= fields.keys()
    assert sorted(p.name for p in (tmp_path / "new" / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_saving_refuses_to_replace_a_model_unless_told_to(tiny, tmp_path):
    vqgan.save(tiny, tmp_path)
    with pytest.raises(UserError, match="model.safetensors"):
        vqgan.save(tiny, tmp_path)
    vqgan.save(tiny, tmp_path, overwrite=True)


def test_saved_weights_are_as_readable_as_any_new_file(tiny, tmp_path):
    vqgan.save(tiny, tmp_path / "model")
    (tmp_path / "new").touch()
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_file_written_by_torch_loads_equal_to_its_safetensors(tmp_path):
    """fixtures/small.bin is torch.save's own: one storage, views at many offsets, one with strides unlike its shape."""
    write_config(tmp_path / "torch")
    shutil.copy(FIXTURES / "small.bin", tmp_path / "torch" / "pytorch_model.bin")
    shapes, weights = vqgan_shapes(VQGAN_TINY), {}
    base = tensor("base", 9216 + len(shapes), 0.05)
    for offset, (name, shape) in enumerate(shapes.items()):
        weights[name] = base[offset : offset + math.prod(shape)].reshape(shape)
    transposed = np.ascontiguousarray(weights["post_quant_conv.weight"].reshape(8, 16).T)
    weights["post_quant_conv.weight"] = transposed[:, :, None, None]
    theirs = vqgan.load(tmp_path / "torch")
    ours = vqgan.load(write_folder(tmp_path / "safetensors", VQGAN_TINY, weights))
    assert theirs.config == ours.config
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True))


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("DoubleStorage", np.float64),
    ],
)
def test_both_of_torchs_formats_load_in_every_float(tiny, tmp_path, container, kind, dtype):
    write_config(tmp_path)
    blobs = {str(i): array.astype(dtype).tobytes() for i, array in enumerate(tiny_weights().values())}
    pairs = [
        (text(name), tensor_word(storage_word(kind, str(i), array.size), 0, array.shape))
        for i, (name, array) in enumerate(tiny_weights().items())
    ]
    write = write_zip if container == "zip" else write_legacy
    write(tmp_path / "pytorch_model.bin", program(dictionary(*pairs)), blobs, np.dtype(dtype).itemsize)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(tiny), jax.tree.leaves(vqgan.load(tmp_path)), strict=True
    ):
        np.testing.assert_array_equal(
            theirs, np.asarray(ours).astype(dtype).astype(np.float32), err_msg=jax.tree_util.keystr(path)
        )


def test_a_folder_of_diffusers_vqmodel_gives_the_published_codes(tmp_path):
    """The fixture holds diffusers' own config.json and its names; its attention has linear layers."""
    theirs, suffix = json.loads(str(EXPECTED["diffusers"])), str(EXPECTED["small/suffix"])
    weights = vqgan_weights(vqgan_shapes(VQGAN_CONFIGS["small"]), suffix)
    linear = lambda name, array: array[:, :, 0, 0] if "attentions" in name and array.ndim == 4 else array
    save_file(
        {name: np.ascontiguousarray(linear(name, weights[ours])) for name, ours in theirs["names"].items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(theirs["config"]))
    codes_BS = vqgan.encode(vqgan.load(tmp_path), picture(32, 2).astype(np.float32) / 255)
    np.testing.assert_array_equal(codes_BS, EXPECTED["small/codes_BS"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_safetensors_load_as_float32(tiny, tmp_path, dtype):
    model = vqgan.load(
        write_folder(tmp_path, VQGAN_TINY, {name: array.astype(dtype) for name, array in tiny_weights().items()})
    )
    assert all(
        b.dtype == np.float32 and np.array_equal(np.asarray(a).astype(dtype).astype(np.float32), b)
        for a, b in zip(jax.tree.leaves(tiny), jax.tree.leaves(model), strict=True)
    )


# ---------------------------------------------------------------------------- other projects' checkpoints


@functools.cache
def peer_weights(name):
    shapes = {key: tuple(shape) for key, shape in json.loads(str(PEERS[f"{name}/shapes"])).items()}
    weights = vqgan_weights(shapes, str(PEERS[f"{name}/suffix"]))
    assert zlib.crc32(weights["encoder.conv_in.weight"]) == PEERS[f"{name}/weights_crc"], "run make_vqgan_fixtures.py peers"
    return weights


def write_peer(folder, name, weights) -> pathlib.Path:
    """Writes what that project publishes: a lightning checkpoint, a training checkpoint, or a folder."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "maskgit":
        config = dict(resolution=256, hidden_channels=32, z_channels=64, num_embeddings=1024, quantized_embed_dim=64)
        config |= dict(channel_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,))
        (folder / "config.json").write_text(json.dumps({"_class_name": "MaskGitVQGAN", **config}))
        save_file(weights, folder / "pytorch_model.safetensors")
        return folder
    entries, blobs = [], {}
    for i, (key, array) in enumerate(weights.items()):
        entries.append((text(key), tensor_word(storage_word("FloatStorage", str(i), array.size), 0, array.shape)))
        blobs[str(i)] = array.tobytes()
    extra = ("loss.discriminator.main.0.weight", "state_dict") if "taming" in name else ("quantize.codebook_used", "model")
    entries.append((text(extra[0]), tensor_word(storage_word("FloatStorage", "0", 4), 0, (4,))))
    callbacks = dictionary((word("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"), dictionary((text("best"), b"N"))))
    body = dictionary((text("epoch"), number(3)), (text(extra[1]), dictionary(*entries)), (text("callbacks"), callbacks))
    file = folder / ("last.ckpt" if "taming" in name else "vq_ds16_c2i.pt")
    write_zip(file, program(body), blobs)
    return file


@pytest.mark.parametrize("name", PEER_NAMES)
@pytest.mark.slow
def test_a_checkpoint_of_another_project_gives_its_codes_and_pixels_and_comes_back_from_every_format(name, tmp_path):
    model = vqgan.load(write_peer(tmp_path / "theirs", name, peer_weights(name)))
    images = picture(64, 2).astype(np.float32) / 255
    codes_BS = vqgan.encode(model, images)
    np.testing.assert_array_equal(codes_BS, PEERS[f"{name}/codes_BS"])
    raw_BHWC = np.asarray(raw_decode(model, codes_BS))
    np.testing.assert_allclose(raw_BHWC[:, ::2, 1::2], PEERS[f"{name}/raw_BHWC"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(raw_BHWC[:, [0, -1]], PEERS[f"{name}/edge_BHWC"], rtol=0, atol=1e-4)

    shared = ("open-muse",) if name == "maskgit" else vqgan.LAYOUTS
    for layout in vqgan.LAYOUTS:
        if layout not in shared:
            with pytest.raises(UserError, match=f"{layout} has no such network"):
                vqgan.save(model, tmp_path / layout, layout=layout)
            assert not (tmp_path / layout).exists()
            continue
        vqgan.save(model, tmp_path / layout, layout=layout)
        again = vqgan.load(tmp_path / layout)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(model), jax.tree.leaves(again), strict=True):
            if "quantize" in jax.tree_util.keystr(path) and model.config.l2_codes and layout == "diffusers":
                latents = tensor("latents", (1, 8, 8, a.shape[1]))
                a = a / jnp.linalg.norm(a, axis=-1, keepdims=True)  # there entries are of length 1, which changes no code
                np.testing.assert_allclose(a, b, atol=1e-6)
                np.testing.assert_array_equal(again.quantize.nearest(latents), model.quantize.nearest(vqgan.l2_normalize(latents)))
            else:
                np.testing.assert_array_equal(a, b, err_msg=f"{layout} {jax.tree_util.keystr(path)}")
        if layout == "open-muse":
            assert again.config == model.config and vqgan.fingerprint(again) == vqgan.fingerprint(model)


def test_a_checkpoint_is_written_back_under_its_own_names_shapes_and_numbers(tmp_path):
    weights = peer_weights("maskgit")
    vqgan.save(vqgan.load(write_peer(tmp_path / "theirs", "maskgit", weights)), tmp_path / "back")
    written = open_tensors(tmp_path / "back" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(np.array_equal(written[key].read(), weights[key]) for key in weights)


@pytest.mark.parametrize("name", PEER_NAMES)
def test_every_tensor_of_a_checkpoint_is_used_once_or_named(name, tmp_path):
    weights = peer_weights(name)
    missing = "decoder.conv_in.bias"
    with pytest.raises(UserError, match=r"no tensor decoder\.conv_in\.bias"):
        vqgan.load(write_peer(tmp_path / "less", name, {k: v for k, v in weights.items() if k != missing}))
    with pytest.raises(UserError, match=r"unexpected tensor encoder\.extra\.weight"):
        vqgan.load(write_peer(tmp_path / "more", name, weights | {"encoder.extra.weight": np.zeros(4, np.float32)}))
    with pytest.raises(UserError, match=r"encoder\.conv_out\.weight"):
        vqgan.load(write_peer(tmp_path / "other", name, weights | {"encoder.conv_out.weight": np.zeros((8, 8, 3, 3), np.float32)}))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("taming-f16-1024", {}),
        ("taming-f16-16384", dict(num_embeddings=16384)),
        ("llamagen-vq16", dict(num_embeddings=16384, quantized_embed_dim=8, l2_codes=True)),
        (
            "llamagen-vq8",
            dict(num_embeddings=16384, quantized_embed_dim=8, l2_codes=True, channel_mult=(1, 2, 2, 4), attn_resolutions=(32,)),
        ),
        ("maskgit", dict(maskgit=True, symmetric_pixels=False)),
    ],
)
def test_the_networks_of_full_width_have_the_published_number_of_parameters(name, changes):
    config = dataclasses.replace(vqgan.PRESETS["taming-f16"], **changes)
    network = eqx.filter_eval_shape(lambda: vqgan.VQGAN(config, key=jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network)) == PEERS[f"{name}/parameters"]


def test_a_class_of_lightning_is_a_mere_word_and_calling_it_is_refused(tmp_path):
    harmless = word("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    for name, body in {"call": call(harmless, text("x")), "build": harmless + dictionary((text("x"), number(1))) + b"b"}.items():
        write_zip(tmp_path / f"{name}.ckpt", program(dictionary((text("callbacks"), body))), {})
        with pytest.raises(UserError, match=f"{name}.ckpt: refused"):
            vqgan.load(tmp_path / f"{name}.ckpt")


def test_diffusers_own_folder_returns_from_our_export_and_its_other_networks_are_refused(tmp_path):
    theirs, weights = json.loads(str(EXPECTED["diffusers"])), vqgan_weights(vqgan_shapes(VQGAN_CONFIGS["small"]), "#1")
    model = vqgan.load(write_folder(tmp_path / "muse", VQGAN_CONFIGS["small"], weights))
    vqgan.save(model, tmp_path / "diffusers", layout="diffusers")
    written = json.loads((tmp_path / "diffusers" / "config.json").read_text())
    assert {k: v for k, v in theirs["config"].items() if k in written and not k.startswith("_diff")} == written
    with safe_open(tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors", "np") as file:
        assert set(file.keys()) == set(theirs["names"])
        ndim = {name: file.get_tensor(name).ndim for name in file.keys()}
    assert all(n == 2 for name, n in ndim.items() if ".to_" in name and name.endswith("weight"))
    for field, value in {"norm_type": "spatial", "act_fn": "mish", "up_block_types": ["UpDecoderBlock2D"] * 2}.items():
        (tmp_path / "diffusers" / "config.json").write_text(json.dumps(written | {field: value}))
        with pytest.raises(UserError, match=rf"config\.json.*{field}"):
            vqgan.load(tmp_path / "diffusers")


def test_amused_whose_sample_size_is_the_meaningless_default_is_read_at_256_pixels():
    config = vqgan.VQGANConfig(**VQGAN_CONFIGS["released"])
    fields = vqgan.config_fields("diffusers", config) | {"sample_size": 32}
    assert vqgan.read_config(pathlib.Path("config.json"), fields, 1000)[1] == config


def test_the_bundled_tokenizer_keeps_the_name_that_datasets_know_it_by():
    assert vqgan.fingerprint(vqgan.load(vqgan.MINI)) == "c790061100646d36"


@pytest.mark.slow
def test_the_convert_command_writes_each_format(tiny, tmp_path):
    vqgan.save(vqgan.with_config(tiny, symmetric_pixels=True), tmp_path / "ours")
    command = [sys.executable, vqgan.__file__, "convert", "--model", str(tmp_path / "ours"), "--out", str(tmp_path / "out")]
    run = lambda *more: subprocess.run([*command, *more], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert run("--format", "diffusers").returncode == 0
    assert vqgan.load(tmp_path / "out").config == dataclasses.replace(tiny.config, symmetric_pixels=True)
    assert run("--format", "diffusers", "--pixels", "unit").returncode == 2  # there is a model already


# ---------------------------------------------------------------------------- files that lie


# The words of a pickle, put together by hand: PyTorch is not here, and no pickler writes what an attacker does.

word = lambda module, name: f"c{module}\n{name}\n".encode()
text = lambda value: b"X" + struct.pack("<I", len(str(value).encode())) + str(value).encode()
number = lambda value: b"\x8a" + bytes([len(long := pickle.encode_long(value))]) + long
group = lambda *parts: b"(" + b"".join(parts) + b"t"
call = lambda function, *arguments: function + group(*arguments) + b"R"
dictionary = lambda *pairs: b"}(" + b"".join(key + value for key, value in pairs) + b"u"
program = lambda body: b"\x80\x02" + body + b"."
storage_word = lambda kind, key, count: (
    group(text("storage"), word("torch", kind), text(key), text("cpu"), number(count)) + b"Q"
)


def tensor_word(storage, offset, shape, stride=None):
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))] if stride is None else stride
    return call(
        word("torch._utils", "_rebuild_tensor_v2"),
        storage,
        number(offset),
        group(*map(number, shape)),
        group(*map(number, stride)),
        b"\x89",
        call(word("collections", "OrderedDict")),
    )


PAYLOADS = {
    "os.system": lambda canary: call(word("os", "system"), text(f"touch {canary}")),
    "posix.system": lambda canary: call(word("posix", "system"), text(f"touch {canary}")),
    "subprocess.check_call": lambda canary: call(
        word("subprocess", "check_call"), b"](" + text("touch") + text(canary) + b"e"
    ),
    "builtins.eval": lambda canary: call(word("builtins", "eval"), text(f"open({canary!r}, 'w')")),
    "builtins.exec": lambda canary: call(word("builtins", "exec"), text(f"open({canary!r}, 'w')")),
    "an instance by INST": lambda canary: b"(" + text(canary) + text("w") + b"iio\nopen\n",
    "an instance by OBJ": lambda canary: b"(" + word("io", "open") + text(canary) + text("w") + b"o",
    "a dotted name": lambda canary: call(text("collections") + text("OrderedDict.fromkeys.__class__") + b"\x93"),
    "nested in a tensor's hooks": lambda canary: call(
        word("torch._utils", "_rebuild_tensor_v2"),
        storage_word("FloatStorage", "0", 1),
        number(0),
        group(number(1)),
        group(number(1)),
        b"\x89",
        call(word("builtins", "open"), text(canary), text("w")),
    ),
    "nested in an OrderedDict": lambda canary: call(
        word("collections", "OrderedDict"),
        b"](" + group(text("weight"), call(word("io", "open"), text(canary), text("w"))) + b"e",
    ),
    "nested in a storage's name": lambda canary: (
        group(text("storage"), call(word("io", "open"), text(canary), text("w"))) + b"Q"
    ),
    "a state set by BUILD": lambda canary: (
        call(word("collections", "OrderedDict"))
        + dictionary((text("x"), call(word("io", "open"), text(canary), text("w"))))
        + b"b"
    ),
}


@pytest.mark.parametrize("container", ["zip", "legacy", "first pickle of legacy", "state_dict in zip"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path, payload, container):
    canary = tmp_path / "canary"
    harmful, file = PAYLOADS[payload](str(canary)), tmp_path / "pytorch_model.bin"
    if not any(kind in payload for kind in ("tensor", "storage", "dotted")):  # the others need no PyTorch to do harm
        pickle.loads(program(harmful))
        assert canary.exists()
        canary.unlink()
    write_config(tmp_path)
    if container == "first pickle of legacy":
        file.write_bytes(program(harmful))
    elif container == "legacy":
        write_legacy(file, program(dictionary((text("encoder.conv_in.weight"), harmful))), {"0": b"0000"}, 4)
    else:
        body = dictionary((text("encoder.conv_in.weight"), harmful))
        write_zip(
            file, program(dictionary((text("state_dict"), body)) if "state_dict" in container else body), {"0": b"0000"}
        )
    with pytest.raises(UserError) as refusal:
        vqgan.load(tmp_path)
    assert not canary.exists()
    assert str(file) in str(refusal.value) and "refused" in str(refusal.value) and "\n" not in str(refusal.value)


def one_tensor(kind="FloatStorage", key="0", count=4, offset=0, shape=(4,), stride=None):
    return dictionary((text("x"), tensor_word(storage_word(kind, key, count), offset, shape, stride)))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(one_tensor(shape=(5,)), id="more values than are stored"),
        pytest.param(one_tensor(offset=1), id="an offset that ends outside"),
        pytest.param(one_tensor(offset=-1), id="a negative offset"),
        pytest.param(one_tensor(stride=(-1,)), id="a negative stride"),
        pytest.param(one_tensor(shape=(2, 2), stride=(2**40, 1)), id="a stride to far memory"),
        pytest.param(one_tensor(shape=(2**62, 2**62), stride=(0, 0)), id="a shape beyond memory"),
        pytest.param(one_tensor(shape=(2**33,), stride=(0,)), id="one value claimed 8 billion times"),
        pytest.param(one_tensor(shape=(5,), stride=(0,)), id="one value claimed more often than values are stored"),
        pytest.param(one_tensor(shape=(4, 1), stride=(1,)), id="fewer strides than dimensions"),
        pytest.param(one_tensor(key="7"), id="a storage that is not there"),
        pytest.param(one_tensor(key="../data.pkl"), id="a storage outside the data"),
        pytest.param(one_tensor(kind="ComplexFloatStorage"), id="a storage of unknown kind"),
        pytest.param(dictionary((text("x"), number(1))), id="a number for a tensor"),
        pytest.param(b"](" + number(1) + b"e", id="a list"),
        pytest.param(b"}q\x00(" + text("x") + b"h\x00u", id="a dictionary that holds itself"),
        pytest.param(
            b"}q\x00"
            + b"".join(
                b"0}q%c(" % (i + 1) + (text("a") + b"h%c" % i) + text("b") + b"h%c" % i + b"u" for i in range(64)
            ),
            id="a dictionary of 2 to the 64 leaves",
        ),
        pytest.param(b"}" + (b"(" + text("x") + b"}") * 5_000 + b"u" * 5_000, id="five thousand nested dictionaries"),
        pytest.param(word("torch._utils", "_rebuild_tensor_v2") + b")R", id="a tensor of nothing"),
        pytest.param(number(1) + b"Q", id="a storage that is a number"),
        pytest.param(b"0", id="a program that empties its stack"),
    ],
)
def test_a_pickle_whose_tensors_lie_is_refused(tmp_path, body):
    write_config(tmp_path)
    write_zip(tmp_path / "pytorch_model.bin", program(body), {"0": np.arange(4, dtype=np.float32).tobytes()})
    with pytest.raises(UserError, match="pytorch_model.bin: refused"):
        vqgan.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", id="git lfs pointer"),
        pytest.param(b"PK\x03\x04 and nothing more", id="start of a zip"),
        pytest.param(bytes(4096), id="zeros"),
        pytest.param((FIXTURES / "small.bin").read_bytes()[:-20_000], id="truncated zip"),
        pytest.param((FIXTURES / "small.bin").read_bytes()[20_000:], id="tail of a zip"),
        pytest.param(pickle.dumps(0x1950A86A20F9469CFC6C, 2), id="start of a legacy file"),
    ],
)
def test_a_damaged_torch_file_is_refused_by_name(tmp_path, content):
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="pytorch_model.bin"):
        vqgan.load(tmp_path)


def test_a_compressed_bomb_in_a_torch_file_is_refused_before_it_is_unpacked(tmp_path):
    write_config(tmp_path)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program(one_tensor()))
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(256):
                entry.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="pytorch_model.bin"):
            vqgan.load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_a_flipped_bit_in_a_torch_file_never_changes_a_weight_or_escapes_as_another_error(tmp_path):
    """torch.save writes a checksum with every entry, so what is read after a flip is either refused or unchanged."""
    file, whole, rng = tmp_path / "pytorch_model.bin", (FIXTURES / "small.bin").read_bytes(), random.Random(0)
    original = {name: tensor.read() for name, tensor in open_pickle(FIXTURES / "small.bin").items()}
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            read = {name: tensor.read() for name, tensor in open_pickle(file).items()}
            assert read.keys() == original.keys() and all(np.array_equal(read[name], original[name]) for name in read)
        except ValueError as error:
            refused += 1
            assert "pytorch_model.bin" in str(error)
    assert refused > 200


def safetensors(header, data=b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 64, id="zeros"),
        pytest.param(b"not a model at all, only text that someone renamed", id="text"),
        pytest.param(struct.pack("<Q", 2**62) + b"{}", id="a header of 4 exabytes"),
        pytest.param(struct.pack("<Q", 100) + b"{", id="a header cut short"),
        pytest.param(safetensors(b"{nonsense"), id="a header that is no JSON"),
        pytest.param(
            safetensors({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"0" * 8), id="data cut short"
        ),
        pytest.param(
            safetensors({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, b"0" * 16),
            id="a shape unlike its bytes",
        ),
        pytest.param(
            safetensors({"x": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, b"0" * 16),
            id="offsets that run backwards",
        ),
        pytest.param(
            safetensors(
                {
                    "x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                    "y": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
                },
                b"0" * 24,
            ),
            id="tensors that overlap",
        ),
        pytest.param(
            safetensors({"x": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, b"0" * 16),
            id="an unknown dtype",
        ),
    ],
)
def test_a_malformed_safetensors_file_is_refused_by_name(tmp_path, content):
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors"):
        vqgan.load(tmp_path)


@pytest.mark.parametrize("part", [4, 1000, 100_000, -1])
def test_a_truncated_safetensors_file_is_refused_by_name(tmp_path, part):
    file = write_folder(tmp_path, VQGAN_TINY, tiny_weights()) / "model.safetensors"
    os.truncate(file, part if part > 0 else file.stat().st_size + part)
    with pytest.raises(UserError, match="model.safetensors"):
        vqgan.load(tmp_path)


# ---------------------------------------------------------------------------- folders that do not fit


def test_a_folder_without_its_parts_is_refused_with_what_is_wanted(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        vqgan.load(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        vqgan.load(tmp_path / "nowhere")
    write_config(tmp_path)
    with pytest.raises(UserError, match="model.safetensors"):
        vqgan.load(tmp_path)


@pytest.mark.parametrize(
    "config, reason",
    [
        pytest.param("{", "config.json", id="no JSON"),
        pytest.param("", "config.json", id="empty"),
        pytest.param("[]", "config.json", id="a list"),
        pytest.param("{}", "channel_mult", id="no fields"),
        pytest.param(
            json.dumps({k: v for k, v in VQGAN_TINY.items() if k != "num_embeddings"}),
            "num_embeddings",
            id="a field missing",
        ),
        pytest.param(json.dumps(VQGAN_TINY | {"channel_mult": "1,2"}), "config.json", id="a string for a list"),
        pytest.param(json.dumps(VQGAN_TINY | {"channel_mult": []}), "config.json", id="no levels"),
        pytest.param(
            json.dumps(VQGAN_TINY | {"hidden_channels": 33}),
            "hidden_channels",
            id="channels that 32 groups do not divide",
        ),
        pytest.param(json.dumps(VQGAN_TINY | {"hidden_channels": 0}), "hidden_channels", id="no channels"),
        pytest.param(
            json.dumps(VQGAN_TINY | {"resolution": 33}), "resolution", id="a resolution that the levels do not divide"
        ),
        pytest.param(json.dumps(VQGAN_TINY | {"num_embeddings": "64"}), "num_embeddings", id="a string for a number"),
        pytest.param(json.dumps(VQGAN_TINY | {"num_res_blocks": -1}), "num_res_blocks", id="a negative number"),
    ],
)
def test_a_config_that_describes_no_network_is_refused(tmp_path, config, reason):
    write_folder(tmp_path, VQGAN_TINY, tiny_weights())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=reason) as refusal:
        vqgan.load(tmp_path)
    assert "config.json" in str(refusal.value)


def test_weights_unlike_their_config_are_refused_by_the_tensors_name(tmp_path):
    weights, name = tiny_weights(), "encoder.down.1.block.0.conv2.weight"
    cases = {
        "short": weights | {name: weights[name][:16]},
        "absent": {k: v for k, v in weights.items() if k != name},
        "flat": weights | {name: weights[name].reshape(32, -1)},
    }
    for case, changed in cases.items():
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as refusal:
            vqgan.load(write_folder(tmp_path / case, VQGAN_TINY, changed))
        assert "model.safetensors" in str(refusal.value)
    with pytest.raises(UserError, match=r"loss\.logvar"):
        vqgan.load(write_folder(tmp_path / "more", VQGAN_TINY, weights | {"loss.logvar": np.zeros(1, np.float32)}))
    with pytest.raises(UserError, match=r"quantize\.embedding\.weight"):
        vqgan.load(write_folder(tmp_path / "codes", VQGAN_TINY | {"num_embeddings": 128}, weights))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["folder", "taming-f16-1024", "llamagen-vq16", "maskgit"])
def test_a_weight_that_is_not_a_number_is_refused_by_its_name_in_every_layout(tmp_path, name, value):
    weights = tiny_weights() if name == "folder" else peer_weights(name)
    bad = next(key for key in weights if key.startswith("decoder.conv_in.weight"))
    weights = weights | {bad: np.where(np.arange(weights[bad].size).reshape(weights[bad].shape) == 5, np.float32(value), weights[bad])}
    path = write_folder(tmp_path, VQGAN_TINY, weights) if name == "folder" else write_peer(tmp_path, name, weights)
    with pytest.raises(UserError, match=rf"{tmp_path}.*: tensor {bad} holds NaN or infinity"):
        vqgan.load(path)


def test_integers_where_weights_are_wanted_are_refused_by_name(tmp_path):
    name, weights = "quant_conv.bias", tiny_weights()
    with pytest.raises(UserError, match=r"model.safetensors: tensor quant_conv.bias is int8; weights must be one of float32"):
        vqgan.load(write_folder(tmp_path / "a", VQGAN_TINY, weights | {name: np.ones(8, np.int8)}))
    entries = [(text(key), tensor_word(storage_word("LongStorage" if key == name else "FloatStorage", str(i), array.size), 0, array.shape))
               for i, (key, array) in enumerate(weights.items())]
    blobs = {str(i): array.astype(np.int64 if key == name else np.float32).tobytes() for i, (key, array) in enumerate(weights.items())}
    (tmp_path / "b").mkdir()
    write_config(tmp_path / "b")
    write_zip(tmp_path / "b" / "pytorch_model.bin", program(dictionary(*entries)), blobs)
    with pytest.raises(UserError, match=r"pytorch_model.bin: tensor quant_conv.bias is int64; weights must be one of float32"):
        vqgan.load(tmp_path / "b")


# ---------------------------------------------------------------------------- training

TRAINED = vqgan.VQGANConfig(
    resolution=24, hidden_channels=8, channel_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), no_attn_mid_block=True,
    z_channels=8, num_embeddings=32, quantized_embed_dim=4, norm_groups=4,
)  # fmt: skip


real_make_mesh = vqgan.make_mesh


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(vqgan.PRESETS, "mini", TRAINED)
    one = lambda mesh: real_make_mesh(mesh) if mesh != "-1,1" else jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
    monkeypatch.setattr(vqgan, "make_mesh", one)  # eight devices only where they are the claim: they take long to compile for
    np.save(tmp_path / "pictures.npy", picture(24, 24))
    return tmp_path / "pictures.npy"


def gan_config(pictures, **changes):
    return vqgan.TrainConfig(data=pictures, out=pictures.parent / "run", optimizer="adam", learning_rate=1e-3, steps=6, batch=8, quantize_from=1,
                             save_every=2, log_every=2, gan_weight=0.8, gan_from=2, gan_warmup=1, gan_channels=4, gan_penalty="r1", **changes)  # fmt: skip


def new_state(config, started_from=None):
    network = vqgan.network_config(config, started_from)
    state, task = vqgan.make_state(config, network, started_from, vqgan.make_mesh(config.mesh))
    return state, lambda state, pixels_BHWC: vqgan.train_step(task, state, jnp.asarray(pixels_BHWC), jnp.array(4), True)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_next_picture_stands_in_the_place_of_one_that_cannot_be_read_which_is_listed(tmp_path, capsys):
    for i in range(10):
        Image.new("RGB", (24, 24), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    for i in (3, 4, 9):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    (tmp_path / "out").mkdir()
    opened = lambda most: vqgan.Pictures(tmp_path, 24, 1.0, tmp_path / "out" / "rejected.jsonl", most)
    again = opened(0.3)
    assert [round(again.read(i, np.zeros(3))[0, 0, 0] * 255 / 20) for i in (*range(10), 3)] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0, 5]
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = [line["reason"] for line in listed]
    assert [line["path"] for line in listed] == [reason.split(": ")[0] for reason in reasons] == [str(tmp_path / f"{i}.png") for i in (3, 4, 9)]
    assert [line for line in capsys.readouterr().err.splitlines()] == [f"left out: {reason}" for reason in reasons]
    assert round(opened(0.3).read(9, np.zeros(3))[0, 0, 0] * 255 / 20) == 0  # what is listed already stays, once
    assert [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()] == listed
    with pytest.raises(UserError, match="2 of 10 pictures cannot be read, more than --max-rejected 0.1; the last: .*4.png"):
        opened(0.1).read(3, np.zeros(3))


@pytest.mark.slow
def test_a_resumed_adversarial_run_equals_an_uninterrupted_one_and_logs_every_step_once(pictures):
    config = gan_config(pictures)
    whole = vqgan.train(config)
    log = config.out / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line[k]) for line in lines for k in ("loss", "entropy", "perplexity", "used", "grad_norm"))
    assert "critic" not in lines[1] and {"critic", "gan", "gan_weight", "penalty", "gate"} <= lines[2].keys()
    assert lines[2]["gan_weight"] == 0 < lines[3]["gan_weight"]  # the discriminator learns before it is listened to
    checkpoints = config.out / "checkpoints"
    stored = lambda: {path.name: ocp.StandardCheckpointHandler().restore(path) for path in (checkpoints / "6").absolute().iterdir() if path.is_dir()}
    newest = stored()
    shutil.rmtree(checkpoints / "6")
    again = vqgan.train(config)
    assert equal(whole, again) and equal(newest, stored())
    assert {"critic", "critic_optimizer", "ema", "optimizer", "usage_K"} <= newest.keys()
    without_time = lambda line: {k: v for k, v in line.items() if k != "seconds"}
    assert [without_time(json.loads(x)) for x in log.read_text().splitlines()] == [without_time(line) for line in lines]


@pytest.mark.slow
def test_a_step_with_nan_changes_neither_weights_nor_moments_and_is_counted_and_a_row_of_them_stops_the_run(pictures):
    config = gan_config(pictures)
    pixels_BHWC = picture(24, 8).astype(np.float32) / 255
    state, step = new_state(config)
    before = jax.tree.map(np.asarray, state)
    state, metrics = step(state, np.where(np.arange(24)[:, None] == 3, np.nan, pixels_BHWC))
    untouched = lambda s: {k: v for k, v in s.items() if k != "guard"}
    assert equal(untouched(before), untouched(state))
    assert metrics["skipped"] == metrics["in_a_row"] == 1
    state, metrics = step(state, pixels_BHWC)
    assert metrics["skipped"] == 1 and metrics["in_a_row"] == 0 and not equal(before["model"], state["model"])

    # A pixel loss at twice its best closes the gate: the generator no longer listens to the discriminator.
    assert metrics["gate"] == 1 and metrics["gan_weight"] > 0
    pixel = state["guard"]["pixel"]
    _, metrics = step(state | {"guard": state["guard"] | {"best": pixel / 2}}, pixels_BHWC)
    assert metrics["gate"] == 0 and metrics["gan_weight"] == 0

    bad = {"step": 7, "in_a_row": 20.0, "loss": float("nan"), "grad_norm": 1.0, "perplexity": 9.0}
    with pytest.raises(RunStopped, match="20 steps in a row.*step 7.*checkpoint is that of step 6"):
        vqgan.check_training(config, bad, 6)
    with pytest.raises(RunStopped, match="codebook has collapsed: perplexity 1.20"):
        vqgan.check_training(config, bad | {"step": 600, "in_a_row": 0, "perplexity": 1.2}, 500)


@pytest.mark.slow
def test_weights_split_over_devices_and_a_batch_in_parts_give_the_same_gradients(pictures):
    changes = dict(accumulate=2, mesh="2,4")
    whole = dataclasses.replace(gan_config(pictures), batch=16, gan_penalty="none", gan_adaptive=False)
    pixels_BHWC = picture(24, whole.batch).astype(np.float32) / 255
    results = []
    for config in (whole, dataclasses.replace(whole, **changes)):
        state, step = new_state(config)
        state, metrics = step(state, pixels_BHWC)
        results.append({k: float(v) for k, v in metrics.items()})
    for key in ("loss", "pixel", "codebook", "critic", "grad_norm", "critic_norm"):
        np.testing.assert_allclose(results[1][key], results[0][key], rtol=2e-5, err_msg=key)


def test_the_adaptive_weight_is_the_ratio_of_the_two_gradients_at_the_last_kernel(pictures):
    config = dataclasses.replace(gan_config(pictures), gan_penalty="none")
    keys = jax.random.split(jax.random.key(config.seed))
    model, critic = vqgan.VQGAN(TRAINED, key=keys[0]), vqgan.Discriminator(3, 4, key=keys[1])
    pixels_BHWC = jnp.asarray(picture(24, 8) / 255, jnp.float32)

    @jax.jit
    def weight_and_slopes(model, critic, kernel):
        task = vqgan.Task(config, None, None, None, {})
        _, made = vqgan.generator_loss(model, critic, task, pixels_BHWC, config.quantize_from, config.gan_weight)

        def two_losses(kernel):
            codes_BHW = model.quantize.nearest(model.to_latents(pixels_BHWC))
            output_BHWC = eqx.tree_at(lambda m: m.decoder.conv_out.weight, model, kernel).to_pixels(model.quantize.codebook()[codes_BHW])
            rebuilt = jnp.abs(output_BHWC - pixels_BHWC).mean() + vqgan.image_gradient_loss(output_BHWC, pixels_BHWC)
            return jnp.stack([rebuilt, -critic(output_BHWC).mean()])

        return made.numbers["gan_weight"], jnp.linalg.norm(jax.jacrev(two_losses)(kernel).reshape(2, -1), axis=1)

    weight, slopes = weight_and_slopes(model, critic, model.decoder.conv_out.weight)
    assert slopes.min() > 0
    np.testing.assert_allclose(weight, 0.8 * slopes[0] / (slopes[1] + 1e-4), rtol=1e-3)


@pytest.mark.slow
def test_each_step_draws_by_the_seed_and_its_number(pictures, monkeypatch):
    """By the keys that the steps are given: the revived codes and the penalty's mixtures follow from them."""
    keys, revive = [], vqgan.revive_codes
    note = lambda key: jax.debug.callback(lambda data: keys.append(data.tolist()), jax.random.key_data(key))
    monkeypatch.setattr(vqgan, "revive_codes", lambda *given: note(given[-1]) or revive(*given))
    for seed in (0, 1):
        vqgan.train(vqgan.TrainConfig(data=pictures, out=pictures.parent / f"{seed}", optimizer="adam", steps=2, batch=8, quantize_from=1, save_every=2,
                                      seed=seed))  # fmt: skip
    jax.effects_barrier()
    assert len(keys) == 4 and len(set(map(tuple, keys))) == 4


@pytest.mark.slow
def test_a_decoder_finetune_leaves_every_code_as_it_was(pictures, tmp_path):
    vqgan.save(vqgan.VQGAN(TRAINED, key=jax.random.key(5)), tmp_path / "start")
    start = vqgan.load(tmp_path / "start")
    config = vqgan.TrainConfig(data=pictures, out=tmp_path / "fine", init=tmp_path / "start", freeze_encoder=True, optimizer="adam",
                               learning_rate=1e-3, steps=3, pixel_loss="l2", crop=0.7, l2_codes=0)  # fmt: skip
    tuned = vqgan.train(config)
    assert equal((start.encoder, start.quant_conv, start.quantize), (tuned.encoder, tuned.quant_conv, tuned.quantize))
    assert vqgan.fingerprint(start) == vqgan.fingerprint(tuned)  # so what was made with the old decoder is shown by the new one
    assert vqgan.fingerprint(eqx.tree_at(lambda m: m.encoder.conv_in.weight, start, start.encoder.conv_in.weight.at[0, 0, 0, 0].add(1e-3))) != vqgan.fingerprint(start)
    assert not np.array_equal(start.decoder.conv_out.weight, tuned.decoder.conv_out.weight)
    assert not np.array_equal(start.post_quant_conv.weight, tuned.post_quant_conv.weight)


@pytest.mark.slow
def test_codes_of_length_1_train_in_bfloat16(pictures, tmp_path):
    config = vqgan.TrainConfig(data=pictures, out=tmp_path / "sphere", l2_codes=8, dtype="bfloat16", optimizer="adam", learning_rate=1e-3,
                               steps=3, quantize_from=1, legacy_loss=True)  # fmt: skip
    model = vqgan.train(config)
    assert model.config.l2_codes and model.config.quantized_embed_dim == 8
    np.testing.assert_allclose(jnp.linalg.norm(model.quantize.codebook(), axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(model.to_latents(jnp.asarray(picture(24, 1)) / 255), axis=-1), 1, rtol=1e-5)
    assert vqgan.load(tmp_path / "sphere").config == model.config
    assert all(np.isfinite(json.loads(line)["loss"]) for line in (tmp_path / "sphere" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "flags, reason",
    [
        (dict(crop=0.0), "--crop"),
        (dict(lpips_vgg=pathlib.Path("vgg.pth")), "--lpips-heads"),
        (dict(freeze_encoder=True), "--init"),
        (dict(gan_weight=0.8, gan_from=5), "--quantize-from"),
        (dict(accumulate=0), "--accumulate"),
    ],
)
def test_training_flags_that_contradict_each_other_are_refused(flags, reason):
    with pytest.raises(UserError, match=reason):
        vqgan.TrainConfig(data=pathlib.Path("x"), **flags)


@pytest.mark.parametrize("mesh", ["8", "3,1", "a,b", "0,8", "16,1"])
def test_a_mesh_unlike_the_devices_is_refused(mesh):
    with pytest.raises(UserError, match="--mesh"):
        vqgan.make_mesh(mesh)


# ---------------------------------------------------------------------------- measures

MEASURES = np.load(FIXTURES / "measures.npz")


def test_psnr_and_ssim_equal_scikit_image():
    a, b = measured_pictures()
    np.testing.assert_allclose(vqgan.psnr(a, b), MEASURES["psnr_B"], rtol=1e-6)
    np.testing.assert_allclose(vqgan.ssim(a, b), MEASURES["ssim_B"], rtol=1e-9)


def test_lpips_equals_the_lpips_package_and_its_files_are_used_whole(tmp_path):
    weights = lpips_weights()
    vgg = {k: v for k, v in weights.items() if k.startswith("features")}
    heads = {k: v for k, v in weights.items() if k.startswith("lin")}
    save_file(vgg | {"classifier.0.bias": np.zeros(4, np.float32)}, tmp_path / "vgg.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    network = metrics.load_lpips(tmp_path / "vgg.safetensors", tmp_path / "heads.safetensors")
    a, b = measured_pictures()
    distance = jax.jit(lambda network, a, b: network.distance(a, b))
    np.testing.assert_allclose(distance(network, a, b), MEASURES["lpips_B"], rtol=1e-4)
    assert (distance(network, a, a) < 1e-12).all()
    save_file(heads | {"lin5.model.1.weight": np.zeros((1, 4, 1, 1), np.float32)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"more\.safetensors: unexpected tensor lin5"):
        metrics.load_lpips(tmp_path / "vgg.safetensors", tmp_path / "more.safetensors")
    save_file({k: v for k, v in vgg.items() if "28.bias" not in k}, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"less\.safetensors: no tensor features\.28\.bias"):
        metrics.load_lpips(tmp_path / "less.safetensors", tmp_path / "heads.safetensors")


def test_efficientnet_lite0_equals_its_pytorch_package_and_tells_pictures_apart(tmp_path):
    weights = efficientnet_weights(json.loads(str(MEASURES["efficientnet_shapes"])))
    save_file(weights, tmp_path / "e.safetensors")
    network = metrics.load_efficientnet_lite0(tmp_path / "e.safetensors")
    a, b = measured_pictures()
    logits_BK, distance_B, none_B = jax.jit(lambda n, a, b: (n(a), n.distance(a, b), n.distance(a, a)))(network, a, b)
    np.testing.assert_allclose(logits_BK[:, ::4], MEASURES["logits_BK"], rtol=0, atol=1e-4)
    assert (distance_B > 0.01).all() and (none_B < 1e-9).all()
    save_file(weights | {"extra": np.zeros(1, np.float32)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="unexpected tensor extra"):
        metrics.load_efficientnet_lite0(tmp_path / "more.safetensors")


@pytest.mark.skipif("EFFICIENTNET_LITE0" not in os.environ, reason="EFFICIENTNET_LITE0 names no weights; see README.md")
def test_efficientnet_lite0_knows_what_is_on_the_photographs():
    network = metrics.load_efficientnet_lite0(pathlib.Path(os.environ["EFFICIENTNET_LITE0"]))
    folder = pathlib.Path(vqgan.__file__).parent / "assets/pictures/photo"
    cats, cups = sorted(folder.glob("chelsea*")), [folder / f"coffee-{n}.webp" for n in ("01", "09", "14")]  # the crops with the whole cup
    pixels_BHWC = np.stack([vqgan.read_image(path, 224) for path in cats + cups])
    best_B = np.asarray(jax.jit(lambda network, x: network(x))(network, pixels_BHWC)).argmax(-1)
    assert np.isin(best_B[:len(cats)], [281, 282, 283, 284, 285]).mean() > 0.8  # domestic cats; the rest show only a part of her
    assert (best_B[len(cats):] == 967).all()  # espresso


def test_operations_are_counted_as_by_hand():
    shapes = lambda config: eqx.filter_eval_shape(lambda: vqgan.VQGAN(config, key=jax.random.key(0)))
    def count(config):
        pixels = jax.ShapeDtypeStruct((1, config.resolution, config.resolution, 3), jnp.float32)
        codes = jax.ShapeDtypeStruct((1, config.codes_per_image), jnp.int32)
        return tuple(benchmark.flops(shapes(config), pixels, codes).values())

    large, small, conv = 24 * 24, 12 * 12, 8 * 8 * 9  # places of both levels; products of a convolution 8 -> 8 at one place
    encode = large * (3 * 8 * 9 + 2 * conv) + small * (8 * conv + 8 * 4 + 4 * 32)
    doubling = 13 * 13 * 2 * 2 * 8 * (4 * 8)  # 2x2 kernels at the small places and one more in a row; four outputs at each
    decode = small * (4 * 8 + 9 * conv) + doubling + large * (4 * conv + 8 * 3 * 9)
    assert count(TRAINED) == (2 * encode, 2 * decode)
    with mock.patch.object(vqgan.Resample, "double", lambda self, x_BHWC: self.conv(x_BHWC.repeat(2, axis=1).repeat(2, axis=2))):
        np.testing.assert_allclose(count(vqgan.PRESETS["class-default"]), (138e9, 253e9), rtol=5e-3)  # counted elsewhere, attention included


def test_the_benchmark_times_both_directions_and_counts_what_bfloat16_changes(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(vqgan.PRESETS, "mini", TRAINED)
    vqgan.save(vqgan.VQGAN(TRAINED, key=jax.random.key(5)), tmp_path / "model")
    Image.fromarray(picture(24)[0]).save(tmp_path / "a.png")
    benchmark.speed(benchmark.Speed(preset="mini", model=tmp_path / "model", data=tmp_path, rounds=1, seconds=0.0, matrix=64))
    printed = capsys.readouterr().out
    assert "| encode, ours " in printed and "| decode, ours " in printed
    assert re.search(r"bfloat16 changes \d+\.\d\d% of the codes of model \(\d+ of 144;", printed)
    if benchmark.torch is None:
        assert "pip install torch" in printed
    else:
        assert "100.00% of the codes are equal" in printed and "| encode, PyTorch channels_last " in printed


def test_curves_of_runs_become_a_picture_and_a_table(tmp_path, capsys):
    for name, jump in (("calm", 0.0), ("sudden", 0.1)):
        (tmp_path / name).mkdir()
        lines = [{"step": i + 1, "pixel": 0.1 + (jump if 50 <= i < 60 else 0), "perplexity": 30.0, "used": 0.5} | ({"critic": 1.0} if i >= 40 else {}) for i in range(80)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    benchmark.curves(benchmark.Curves(runs=(tmp_path / "calm", tmp_path / "sudden"), out=tmp_path / "c.png", window=10))
    rows = {row[1].strip(): row[-2].strip() for row in (line.split("|") for line in capsys.readouterr().out.splitlines()) if len(row) > 2}
    assert rows["calm"] == "1.00" and rows["sudden"] == "2.00"  # ten steps of twice the error
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert picture.shape[1] > 1000 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10  # lines are drawn


def test_without_a_perceptual_network_the_run_says_so_loudly(pictures):
    assert "NO NETWORK IS GIVEN" in vqgan.perceptual_networks(gan_config(pictures))[1]
    assert "NONE AT ALL" in vqgan.perceptual_networks(gan_config(pictures, gradient_weight=0.0))[1]


# ---------------------------------------------------------------------------- helpers


@functools.cache
def tiny_weights():
    return vqgan_weights(vqgan_shapes(VQGAN_TINY))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return vqgan.load(write_folder(tmp_path_factory.mktemp("tiny"), VQGAN_TINY, tiny_weights()))


@jax.jit
def raw_decode(model, codes_BS):
    side = math.isqrt(codes_BS.shape[1])
    return model.to_pixels(model.quantize.codebook()[codes_BS].reshape(len(codes_BS), side, side, -1))


def write_config(folder, config=VQGAN_TINY):
    """Writes what the published module writes beside its weights."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    (pathlib.Path(folder) / "config.json").write_text(
        json.dumps({"_class_name": "VQGANModel", "_version": "0.0.1", **config}, indent=2, sort_keys=True)
    )


def write_folder(folder, config, weights) -> pathlib.Path:
    write_config(folder, config)
    save_file(weights, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})
    return pathlib.Path(folder)


def write_zip(file, pickled, blobs, itemsize=4):
    """torch.save's format since 1.6."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {
            "data.pkl": pickled,
            "byteorder": b"little",
            **{f"data/{key}": blob for key, blob in blobs.items()},
            "version": b"3\n",
        }.items():
            archive.writestr(f"archive/{name}", content)


def write_legacy(file, pickled, blobs, itemsize):
    """torch.save's format before 1.6: three pickles of preamble, the content, the order of the storages, and those."""
    stream = io.BytesIO()
    for preamble in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    ):
        stream.write(pickle.dumps(preamble, 2))
    stream.write(pickled + pickle.dumps(list(blobs), 2))
    for blob in blobs.values():
        stream.write(struct.pack("<q", len(blob) // itemsize) + blob)
    pathlib.Path(file).write_bytes(stream.getvalue())


def test_the_gradient_of_a_bias_in_bfloat16_is_the_float32_sum_over_all_places():
    conv, cotangent = vqgan.Conv(1, 1, 1, key=jax.random.key(0)), jnp.full((1, 256, 256, 1), 0.01, jnp.bfloat16)
    product = lambda conv: (conv(jnp.ones((1, 256, 256, 1), jnp.bfloat16)) * cotangent).astype(jnp.float32).sum()
    right = 256 * 256 * float(cotangent[0, 0, 0, 0])  # 656: 0.01 is rounded to bfloat16
    np.testing.assert_allclose(jax.jit(jax.grad(product))(conv).bias, right, rtol=1e-3)
