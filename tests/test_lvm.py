"""Claims about lvm.py, against Hugging Face's LlamaForCausalLM (fixtures by make_lvm_fixtures.py) and by definition."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import safetensors.numpy
import weights_rule
from jax.sharding import PartitionSpec

from flash_attention import reference
import lvm
from common import runs, weights
from common.images import UserError

ROOT = Path(__file__).parent.parent
FIXTURES = np.load(Path(__file__).parent / "fixtures" / "lvm.npz")
CONFIG = lvm.LVMConfig(hidden=48, ffn=80, layers=3, heads=4, codes=28, specials=12, context=32)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (8, 24)), jnp.int32)


@pytest.fixture(scope="module")
def model():
    def scaled(path, w):  # at N(0, 0.02) attention is flat and every id equally likely: wrong models would pass
        return 1 + weights_rule.tensor(path[-1].name, w.shape, 0.1) if "norm" in path[-1].name else 8 * w

    return jax.tree_util.tree_map_with_path(scaled, new(CONFIG))


def new(config):
    """A model of N(0, 0.02) and ones; `lvm.LVM(config, key=key)` would first compile its random numbers."""

    def weight(path, leaf):
        name = path[-1].name
        return jnp.ones(leaf.shape) if "norm" in name else jnp.asarray(weights_rule.tensor(name, leaf.shape, 0.02))

    return jax.tree_util.tree_map_with_path(weight, eqx.filter_eval_shape(lvm.LVM, config, key=jax.random.key(0)))


@functools.partial(jax.jit, static_argnames="dtype")
def forward(model, ids_BT, segment_ids_BT=None, dtype=None):
    return model(ids_BT, segment_ids_BT, dtype=dtype)


def hf_folder(path, config, weights, file="model.safetensors"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights, path / file, metadata={"format": "pt"})
    return path


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# Sizes and the network


def test_parameter_counts_equal_the_published_table_to_the_digit():
    ours = {"nano", "micro", "mini", "25m"}
    counts = {name: lvm.parameter_count(config) for name, config in lvm.SIZES.items() if name not in ours}
    assert counts == {
        "debug": 2_451_072, "100m": 116_974_720, "300m": 290_968_576, "600m": 648_396_288, "1b": 1_147_119_616,
        "3b": 3_274_742_400, "7b": 6_544_199_680, "13b": 12_773_094_400, "20b": 20_722_710_528, "30b": 32_213_342_720,
    }  # fmt: skip
    assert {config.vocab_size for name, config in lvm.SIZES.items() if name not in ours} == {8292}


def test_flops_a_token_are_six_a_matrix_weight_and_half_of_full_attention():
    config, context = lvm.SIZES["7b"], 4096
    model = eqx.filter_eval_shape(lvm.LVM, config, key=jax.random.key(0))
    matrices = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(model) if "norm" not in path[-1].name) - model.embedding_VD.size
    full_attention = 3 * config.layers * 2 * 2 * context * config.hidden  # scores and mixtures, forward and twice backward
    assert lvm.training_flops(config, context) == 6 * matrices + full_attention / 2


def test_special_ids_follow_the_codes_unless_they_are_set():
    config = lvm.SIZES["7b"]
    assert (config.bos, config.eos, config.pad) == (8192, 8193, 8194)
    smaller = dataclasses.replace(config, codes=512, eos_id=520)
    assert (smaller.bos, smaller.eos, smaller.pad, smaller.vocab_size) == (512, 520, 514, 612)


@pytest.mark.parametrize("name", weights_rule.LLAMAS)
def test_logits_equal_transformers(name, tmp_path):
    config = weights_rule.LLAMAS[name]
    model = lvm.load(hf_folder(tmp_path / name, config, weights_rule.llama(config)))
    logits_BTV = forward(model, FIXTURES[f"{name}.ids"])
    assert logits_BTV.dtype == jnp.float32
    np.testing.assert_allclose(logits_BTV, FIXTURES[f"{name}.logits"], atol=1e-4)


def test_fresh_weights_are_those_published():
    model = jax.jit(lambda key: lvm.LVM(lvm.SIZES["debug"], key=key))(jax.random.key(0))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(model):
        if "norm" in keys[-1].name:
            assert (leaf == 1).all()
        else:
            assert abs(float(leaf.std()) - 0.02) < 2e-4 and abs(float(leaf.mean())) < 2e-4


def test_no_position_depends_on_a_later_one(model):
    rows_TD = model.embedding_VD[IDS[0]]

    def run(rows_TD, t):  # the embedding is fed as a table of its own, so that the gradient is for each position
        fed = eqx.tree_at(lambda m: m.embedding_VD, model, rows_TD)
        return fed(jnp.arange(len(rows_TD))[None])[0, t].sum()

    moved = jax.jit(jax.vmap(jax.grad(run), (None, 0)))(rows_TD, jnp.arange(len(rows_TD)))
    influence_TS = np.abs(moved).sum(-1)
    assert (np.triu(influence_TS, 1) == 0).all()
    assert (influence_TS[np.tril_indices(len(rows_TD))] > 1e-6).all()


def test_segments_do_not_see_each_other(model):
    segments_BT = jnp.broadcast_to(jnp.arange(24) >= 10, IDS.shape).astype(int)
    whole, apart = forward(model, IDS), forward(model, IDS, segments_BT)
    other_start = forward(model, IDS.at[:, :10].set(0), segments_BT)
    np.testing.assert_allclose(apart[:, :10], whole[:, :10], atol=1e-5)
    np.testing.assert_allclose(apart[:, 10:], other_start[:, 10:], atol=1e-5)
    assert np.abs(apart - whole)[:, 10:].max() > 0.1


def test_a_scan_over_blocks_equals_a_loop(model):
    rope_TK = lvm.rope_angles(jnp.arange(24), CONFIG)
    x_BTD = model.embedding_VD[IDS]
    for layer in range(CONFIG.layers):
        block = jax.tree.map(lambda w: w[layer], model.blocks)
        q, k, v = block.project(x_BTD, rope_TK)
        x_BTD = block.merge(x_BTD, reference(q, k, v))
    np.testing.assert_allclose(forward(model, IDS), model.logits(x_BTD), atol=1e-5)


MASK = jnp.asarray(np.random.default_rng(2).random(IDS.shape) < 0.5)


def loss_and_gradients(model, **kwargs):
    loss = lambda model: lvm.next_token_loss(model(IDS, **kwargs), IDS, MASK)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(model)


@pytest.fixture(scope="module")
def plain(model):
    return loss_and_gradients(model)


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_rematerialisation_changes_no_loss_and_no_gradient(model, plain, remat):
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(compare, loss_and_gradients(model, remat=remat), plain)


def test_the_backward_pass_repeats_no_product_where_remat_is_none_or_minimal(model):
    """Matrix products and kernels in the program of the gradient: full repeats six of a block's seven products, and the kernel
    of attention's forward pass, which is there for three platforms."""
    program = lambda remat: str(jax.make_jaxpr(jax.grad(lambda m: m(IDS, remat=remat, implementation="pallas").sum()))(model))
    count = {remat: np.array([program(remat).count(name) for name in (" dot_general[", " pallas_call[")]) for remat in ("none", "minimal", "full")}
    assert (count["none"] == count["minimal"]).all() and (count["full"] - count["minimal"] == (6, 3)).all(), count


def test_rotary_angles_are_exact_at_the_end_of_the_context_in_any_compute_dtype():
    config = lvm.SIZES["7b"]
    positions_T = jnp.arange(4090, 4096)
    cos, sin = lvm.rope_angles(positions_T, config)
    exact = np.arange(4090, 4096)[:, None, None] * 1e4 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(cos, np.cos(exact), atol=5e-4)
    np.testing.assert_allclose(sin, np.sin(exact), atol=5e-4)
    turned = lvm.rotate(jnp.ones((1, 6, 1, 128), jnp.bfloat16), (cos, sin))[0, :, 0].astype(jnp.float32)
    assert turned.shape == (6, 128)
    for a in range(6):
        for b in range(a):
            assert np.abs(turned[a] - turned[b]).max() > 0.5


def test_bfloat16_compute_stays_near_float32(model):
    logits_BTV = forward(model, IDS, dtype=jnp.bfloat16)
    assert logits_BTV.dtype == jnp.float32
    exact_BTV = forward(model, IDS)
    assert 1e-4 < np.abs(logits_BTV - exact_BTV).max() < 0.05 * np.abs(exact_BTV).max()


def test_an_id_outside_the_vocabulary_is_loud(model):
    logits_BTV = forward(model, IDS.at[0, 5].set(CONFIG.vocab_size))
    assert np.isnan(logits_BTV[0, 5:]).all() and np.isfinite(logits_BTV[1:]).all()


# Loss and sharding


def test_the_loss_is_a_mean_over_rows_of_each_rows_mean_over_its_targets():
    logits_BTV = jnp.asarray(weights_rule.tensor("logits", (3, 5, 7)))
    ids_BT = jnp.asarray([[0, 1, 2, 3, 4], [4, 5, 6, 0, 1], [1, 1, 1, 1, 1]])
    mask_BT = jnp.asarray([[1, 1, 0, 1, 1], [1, 0, 0, 0, 1], [1, 0, 0, 0, 0]])  # the first id is nobody's target
    log_p = np.log(np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True))
    rows = [-(log_p[0, 0, 1] + log_p[0, 2, 3] + log_p[0, 3, 4]) / 3, -log_p[1, 3, 1], 0]
    loss, tokens = lvm.next_token_loss(logits_BTV, ids_BT, mask_BT)
    np.testing.assert_allclose(loss, np.mean(rows), rtol=1e-6)
    assert tokens == 4


def test_every_weight_has_a_place_on_the_mesh_and_the_layer_axis_is_never_split(model):
    specs = lvm.partition_specs({"weights": model, "step": jnp.zeros(())})
    assert specs["step"] == PartitionSpec()
    assert specs["weights"].blocks.q_DNK == PartitionSpec(None, "fsdp", "tensor", None)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(model):
        assert len(lvm.SHARDING[keys[-1].name]) == leaf.ndim - ("blocks" in str(keys[0]))


# Cache


def test_cached_decoding_equals_the_whole_forward(model):
    logits_BTV = forward(model, IDS)
    logits_BV, cache = jax.jit(lvm.prefill, static_argnames="length")(model, IDS[:, :13], 24)
    np.testing.assert_allclose(logits_BV, logits_BTV[:, 12], atol=1e-5)
    step = jax.jit(lvm.decode_step, donate_argnums=2)
    for t in range(13, 24):
        logits_BV, cache = step(model, IDS[:, t], cache)
        np.testing.assert_allclose(logits_BV, logits_BTV[:, t], atol=1e-5)
    logits_BV, _ = step(model, IDS[:, 0], cache)
    assert np.isnan(logits_BV).all()  # a 25th token in a cache for 24


def test_cached_decoding_in_bfloat16_equals_its_own_forward(model):
    logits_BTV = forward(model, IDS, dtype=jnp.bfloat16)
    read = jax.jit(lambda model, ids_BT: lvm.prefill(model, ids_BT, 24, dtype=jnp.bfloat16))
    step = jax.jit(lambda model, ids_B, cache: lvm.decode_step(model, ids_B, cache, dtype=jnp.bfloat16))
    _, cache = read(model, IDS[:, :20])
    assert cache.k_LBNSK.dtype == jnp.bfloat16 and cache.k_LBNSK.shape == (3, 8, 4, 24, 12)
    logits_BV, _ = step(model, IDS[:, 20], cache)
    np.testing.assert_allclose(logits_BV, logits_BTV[:, 20], atol=0.03 * np.abs(logits_BTV).max())


def test_greedy_codes_are_the_likeliest_at_every_place_and_never_specials(model):
    model = eqx.tree_at(lambda m: m.head_DV, model, model.head_DV.at[:, CONFIG.codes + 1].mul(50))  # EOS would often win
    codes_BS = jax.jit(lvm.greedy, static_argnums=2)(model, IDS[:, :13], 11)
    logits_BTV = forward(model, jnp.concatenate([IDS[:, :13], codes_BS], axis=1))
    np.testing.assert_array_equal(codes_BS, logits_BTV[:, 12:-1, : CONFIG.codes].argmax(-1))
    assert (logits_BTV[:, 12:-1].argmax(-1) >= CONFIG.codes).any()


@pytest.mark.parametrize("implementation, slots, unstack", [("xla", 11, False), ("xla", 11, True), ("pallas", 128, False)])
def test_rows_that_share_a_prompt_decode_as_if_each_had_read_it(model, implementation, slots, unstack):
    ids_BT = IDS.at[:4, :13].set(IDS[0, :13]).at[4:, :13].set(IDS[4, :13])  # two prompts, four rows each
    logits_BTV = forward(model, ids_BT)
    _, prompt = lvm.prefill(model, ids_BT[::4, :13], 13)
    if implementation == "pallas":
        prompt = prompt._replace(**{k: jnp.pad(getattr(prompt, k), [(0, 0)] * 3 + [(0, 115), (0, 0)]) for k in ("k_LBNSK", "v_LBNSK")})
    cache = lvm.fork_cache(prompt, 8, slots)
    assert cache.prompt.k_LBNSK.shape[1] == 2
    model, cache = lvm.unstack(model, cache) if unstack else (model, cache)
    step = jax.jit(functools.partial(lvm.decode_step, implementation=implementation))
    for t in range(13, 24):
        logits_BV, cache = step(model, ids_BT[:, t], cache)
        np.testing.assert_allclose(logits_BV, logits_BTV[:, t], atol=2e-5)
    with pytest.raises(UserError, match="7 rows do not divide over the 2 rows of the prompt"):
        lvm.fork_cache(prompt, 7, slots)


def test_the_portable_kernels_give_the_models_own_loss_and_gradients(model):
    def loss(model, implementation):
        logits_BTV = model(IDS, implementation=implementation, remat="full")
        return lvm.next_token_loss(logits_BTV, IDS, jnp.ones_like(IDS))[0]

    ours, plain = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(model, name) for name in ("pallas", "reference"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), ours, plain)


# Files


def test_a_saved_folder_comes_back_to_the_bit(model, tmp_path):
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda w: w.astype(dtype), model)
        lvm.save(cast, tmp_path / dtype.__name__)
        assert_same(lvm.load(tmp_path / dtype.__name__, dtype=dtype), cast)


def test_saved_weights_are_as_readable_as_any_new_file(model, tmp_path):
    lvm.save(model, tmp_path / "model", shard_bytes=1e5)
    (tmp_path / "new").touch()
    files = list((tmp_path / "model").iterdir())
    assert len(files) > 3 and {file.stat().st_mode for file in files} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("name", weights_rule.LLAMAS)
def test_a_saved_folder_holds_what_transformers_reads(name, tmp_path):
    config, weights = weights_rule.LLAMAS[name], weights_rule.llama(weights_rule.LLAMAS[name])
    lvm.save(lvm.load(hf_folder(tmp_path / "in", config, weights)), tmp_path / "out")
    saved = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for key in weights:
        np.testing.assert_array_equal(saved[key], weights[key])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.items() <= written.items()
    assert written["architectures"] == ["LlamaForCausalLM"] and written["torch_dtype"] == "float32"
    assert written["num_key_value_heads"] == written["num_attention_heads"]


def test_transformers_computes_the_same_logits_from_a_saved_folder(model, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed; make_lvm_fixtures.py made the same check")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    lvm.save(model, tmp_path / "out", shard_bytes=20_000)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits_BTV = theirs(torch.from_numpy(np.asarray(IDS)).long()).logits.numpy()
    np.testing.assert_allclose(forward(model, IDS), logits_BTV, atol=1e-4)


def test_sharded_safetensors_equal_one_file(model, tmp_path):
    lvm.save(model, tmp_path / "out", shard_bytes=20_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 5 and {f.name for f in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 4 * lvm.parameter_count(CONFIG)
    assert_same(lvm.load(tmp_path / "out"), model)


def test_a_folder_written_elsewhere_with_8292_ids_keeps_our_special_ids(tmp_path):
    model = new(lvm.SIZES["debug"])
    lvm.save(model, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("codes", "specials", "pad_token_id")}
    file.write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": 2}))  # HF's defaults: both are image codes
    assert lvm.load(tmp_path / "out").config == lvm.SIZES["debug"]


def pickled_folder(path, config, weights, files):
    """A folder as LVM's converter and older transformers write it: torch.save's format, and rotary frequencies among the weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    weights = weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    names = [f"pytorch_model-{i + 1:05}-of-{files:05}.bin" for i in range(files)] if files > 1 else ["pytorch_model.bin"]
    weight_map = {name: names[i % files] for i, name in enumerate(weights)}
    for file in names:
        weights_rule.write_pickle(path / file, {name: array for name, array in weights.items() if weight_map[name] == file})
    if files > 1:
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("files", [1, 3])
def test_pickled_hugging_face_folders_give_transformers_logits_and_are_converted(files, tmp_path):
    config = weights_rule.LLAMAS["head32"]
    folder = pickled_folder(tmp_path / "bin", config, weights_rule.llama(config), files)
    np.testing.assert_allclose(forward(lvm.load(folder), FIXTURES["head32.ids"]), FIXTURES["head32.logits"], atol=1e-4)
    command = [sys.executable, ROOT / "lvm.py", "convert", "--model", folder, "--out", tmp_path / "hf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(lvm.load(tmp_path / "hf"), lvm.load(folder))


def test_a_pickle_that_would_run_something_is_refused_by_convert_in_one_line(tmp_path):
    config = weights_rule.LLAMAS["head32"]
    folder = pickled_folder(tmp_path / "bin", config, weights_rule.llama(config), 1)
    ran = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    command = [sys.executable, ROOT / "lvm.py", "convert", "--model", folder, "--out", tmp_path / "hf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: .*pytorch_model.bin: refused \(it asks to run os.system; .*\n", done.stderr)
    assert not ran.exists() and not (tmp_path / "hf").exists()


def test_a_shard_that_is_missing_or_holds_another_ones_tensor_is_named(tmp_path):
    config = weights_rule.LLAMAS["head32"]
    folder = pickled_folder(tmp_path / "bin", config, weights_rule.llama(config), 3)
    second, third = folder / "pytorch_model-00002-of-00003.bin", folder / "pytorch_model-00003-of-00003.bin"
    third.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="00003-of-00003.bin: tensor .* is in .*00002-of-00003.bin too"):
        lvm.load(folder)
    second.unlink()
    with pytest.raises(UserError, match="00002-of-00003.bin: refused .*No such file"):
        lvm.load(folder)


MEMORY = """
import pathlib, re, sys
import lvm
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])  # ru_maxrss begins with the parent's
lvm.load(sys.argv[1])  # what compiling and the libraries take
before = peak()
lvm.load(sys.argv[2])
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_a_pickled_folder_is_never_held_twice_in_memory(tmp_path):
    sizes = dict(hidden_size=1024, intermediate_size=1024, num_attention_heads=2)  # a stacked field is a seventh of the weights
    for name, layers in (("small", 1), ("large", 8)):
        config = weights_rule.LLAMAS["head32"] | sizes | dict(num_hidden_layers=layers)
        shapes = {name: np.shape(array) for name, array in weights_rule.llama(config | dict(num_hidden_layers=0)).items()}
        block = {name: np.shape(array) for name, array in weights_rule.llama(config | dict(num_hidden_layers=1)).items() if ".0." in name}
        shapes |= {key.replace(".0.", f".{layer}."): shape for layer in range(layers) for key, shape in block.items()}
        pickled_folder(tmp_path / name, config, {key: np.ones(shape, np.float32) for key, shape in shapes.items()}, 2)
    stored = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.bin"))
    run = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "large"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert stored > 2e8 and stored / 2 < int(run.stdout) < 1.6 * stored


def easylm_stream(path, model, prefix, extra=()):
    """Writes what EasyLM's StreamingCheckpointer would: neighbours are the pairs, matrices (inputs, outputs)."""

    def neighbours(w_DNK):
        first, second = np.split(np.asarray(w_DNK), 2, axis=-1)
        return np.stack([first, second], axis=-1).reshape(len(w_DNK), -1)

    def flat(w, inputs):
        return np.asarray(w).reshape(inputs, -1)

    D = model.config.hidden
    tensors = {("transformer", "wte", "embedding"): model.embedding_VD, ("lm_head", "kernel"): model.head_DV}
    tensors[("transformer", "ln_f", "kernel")] = model.norm_D
    for layer in range(model.config.layers):
        b = jax.tree.map(lambda w: w[layer], model.blocks)
        block = {("attention", "wq"): neighbours(b.q_DNK), ("attention", "wk"): neighbours(b.k_DNK)}
        block |= {("attention", "wv"): flat(b.v_DNK, D), ("attention", "wo"): flat(b.o_NKD, D)}
        block |= {("feed_forward", f"w{i}"): w for i, w in ((1, b.gate_DF), (2, b.down_FD), (3, b.up_DF))}
        block |= {("attention_norm",): b.attention_norm_D, ("ffn_norm",): b.ffn_norm_D}
        tensors |= {("transformer", "h", str(layer), *name, "kernel"): w for name, w in block.items()}

    def array(w):
        w = np.asarray(w)
        return msgpack.ExtType(1, msgpack.packb((w.shape, w.dtype.name, w.tobytes())))

    with open(path, "wb") as file:
        for key, value in extra:
            file.write(msgpack.packb((key, value)))
        for key, w in tensors.items():
            value = array(w)
            if key[-1] == "embedding":  # flax cuts what is over 1 GiB into pieces
                shape = {"0": w.shape[0], "1": w.shape[1]}
                pieces = {"0": array(w.reshape(-1)[:100]), "1": array(w.reshape(-1)[100:])}
                value = {"__msgpack_chunked_array__": True, "shape": shape, "chunks": pieces}
            file.write(msgpack.packb((prefix + key, msgpack.packb(value))))
    return path


@pytest.fixture(scope="module")
def easylm_model():
    return new(lvm.LVMConfig(hidden=48, ffn=80, layers=2, heads=4, codes=60))


def test_an_easylm_stream_becomes_the_same_model(easylm_model, tmp_path):
    stream = easylm_stream(tmp_path / "streaming_params", easylm_model, ("params",))
    for path in (stream, f"params::{stream}"):
        assert_same(lvm.load(path, heads=4), easylm_model)


def test_an_easylm_train_state_gives_its_parameters(easylm_model, tmp_path):
    extra = [(("step",), msgpack.packb(7)), (("opt_state", "0", "mu", "params", "lm_head", "kernel"), msgpack.packb(0))]
    stream = easylm_stream(tmp_path / "streaming_train_state", easylm_model, ("params", "params"), extra)
    assert_same(lvm.load(f"trainstate_params::{stream}", heads=4), easylm_model)


def test_an_easylm_stream_of_a_known_size_needs_no_heads(tmp_path):
    model = new(lvm.SIZES["debug"])
    assert_same(lvm.load(easylm_stream(tmp_path / "stream", model, ("params",))), model)


def test_interleaved_rotation_of_a_stream_equals_ours_of_the_model_read(easylm_model, tmp_path):
    """EasyLM turns the neighbours (2i, 2i + 1) by the i-th angle: scores from its own layout must equal ours."""
    D, N, K = 48, 4, 12
    model = easylm_model
    wq, wk = (weights_rule.tensor(x, (D, N * K), D**-0.5) for x in ("wq", "wk"))
    h_TD = weights_rule.tensor("h", (9, D))
    angles = np.arange(9)[:, None, None] * 1e4 ** (-np.arange(0, K, 2) / K)

    def turn(w):
        x = (h_TD @ w).reshape(9, N, K // 2, 2)
        x = (x[..., 0] + 1j * x[..., 1]) * np.exp(1j * angles)
        return np.stack([x.real, x.imag], -1).reshape(9, N, K)

    stream = easylm_stream(tmp_path / "stream", model, ("params",))
    packed = {tuple(key): value for key, value in msgpack.Unpacker(open(stream, "rb"))}
    for name, w in (("wq", wq), ("wk", wk)):
        array = msgpack.ExtType(1, msgpack.packb((w.shape, "float32", w.tobytes())))
        packed[("params", "transformer", "h", "0", "attention", name, "kernel")] = msgpack.packb(array)
    stream.write_bytes(b"".join(msgpack.packb(item) for item in packed.items()))
    block = jax.tree.map(lambda w: w[0], lvm.load(stream, heads=4).blocks)
    rope_TK = lvm.rope_angles(jnp.arange(9), model.config)
    q, k = (lvm.rotate(jnp.einsum("td,dnk->tnk", h_TD, w)[None], rope_TK)[0] for w in (block.q_DNK, block.k_DNK))
    scores = jnp.einsum("tnk,snk->nts", q, k)
    np.testing.assert_allclose(scores, np.einsum("tnk,snk->nts", turn(wq), turn(wk)), atol=1e-4)


def one_step_run(path, model):
    import orbax.checkpoint as ocp

    (path / "checkpoints").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(model.config)}))
    with ocp.CheckpointManager(path / "checkpoints") as manager:
        manager.save(8, args=ocp.args.Composite(model=ocp.args.StandardSave(model)))
    runs.write_digests(path / "checkpoints" / "8")
    return path


@pytest.fixture
def run_folder(model, tmp_path):
    """A run as train.py leaves it: three steps, the newest is `model`."""
    import orbax.checkpoint as ocp

    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(CONFIG), "steps": 32}))
    with ocp.CheckpointManager(path / "checkpoints") as manager:
        for step in (8, 16, 32):
            weights = jax.tree.map(lambda w: w * step / 32, model)
            state = ocp.args.Composite(model=ocp.args.StandardSave(weights), step=ocp.args.JsonSave(step))
            manager.save(step, args=state)
    for step in (8, 16, 32):
        runs.write_digests(path / "checkpoints" / str(step))
    return path


def test_a_run_folder_gives_its_newest_step_that_restores(model, run_folder, capfd):
    assert_same(lvm.load(run_folder), model)
    for file in (run_folder / "checkpoints" / "32" / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert_same(lvm.load(run_folder), jax.tree.map(lambda w: w / 2, model))
    assert re.search("checkpoint passed over: .*checkpoints/32/model/.* is damaged", capfd.readouterr().err)


def test_a_run_whose_config_is_not_that_of_its_weights_is_refused(run_folder, capfd):
    config = dataclasses.asdict(dataclasses.replace(CONFIG, ffn=96))
    (run_folder / "config.json").write_text(json.dumps({"model": config}))
    with pytest.raises(UserError, match="no whole step that restores as the config says"):
        lvm.load(run_folder)
    assert "down_FD is (3, 80, 48), by the config (3, 96, 48)" in capfd.readouterr().err


def test_the_convert_command_turns_a_run_into_a_folder(model, run_folder, tmp_path):
    out = tmp_path / "hf"
    command = [sys.executable, ROOT / "lvm.py", "convert", "--model", run_folder, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(lvm.load(out), model)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1 and "not an empty folder" in again.stderr


def test_the_sizes_command_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lvm.py", "sizes"])
    lvm.main()
    assert "6,544,199,680" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(heads=5), "hidden 48 / heads 5"),
        (dict(heads=16), "even"),
        (dict(layers=0), "layers must be an integer in"),
        (dict(context=1), "context must be"),
        (dict(rms_eps=float("nan")), "rms_eps must be"),
        (dict(rope_theta=0.0), "rope_theta must be"),
        (dict(eos_id=2.5), "eos_id must be"),
        (dict(specials=2), r"pad id 30 must be a special, 28 to 29"),
        (dict(bos_id=1), "bos id 1 must be a special"),
    ],
)
def test_a_bad_config_says_which_number_is_wrong(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_sentence_longer_than_the_context_says_so(model):
    for call in (lambda: model(jnp.zeros((1, 33), int)), lambda: lvm.prefill(model, IDS, 33)):
        with pytest.raises(UserError, match="33 tokens; the model's context is 32"):
            call()
    with pytest.raises(UserError, match="24 tokens and the cache room for 20"):
        lvm.prefill(model, IDS, 20)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_key_value_heads=2), "num_key_value_heads 2"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "rope scaling"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope scaling"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(model_type="mistral"), "model_type 'mistral'"),
        (dict(head_dim=16), "head_dim 16"),
        (dict(codes=50), "codes 50 .* is not vocab_size 160"),
        (dict(codes=None), "does not say how many of its 160 ids are codes"),
        (dict(eos_token_id=2), "eos id 2 must be a special"),
        (dict(hidden_size=None), "hidden_size must be int, got nothing"),
        (dict(hidden_size="128"), "hidden_size must be int, got '128'"),
        (dict(intermediate_size=177), r"gate_proj.weight has the shape \(176, 128\), expected \(177, 128\)"),
        (dict(num_hidden_layers=3), r"lacks the tensor model.layers.2.* and 8 more"),
        (dict(num_hidden_layers=1), r"has an unknown tensor model.layers.1"),
    ],
)
def test_a_folder_that_is_no_lvm_is_refused_with_its_reason(change, message, tmp_path):
    config = weights_rule.LLAMAS["head32"]
    changed = {key: value for key, value in (config | change).items() if value is not None}
    folder = hf_folder(tmp_path / "hf", changed, weights_rule.llama(config))
    with pytest.raises(UserError, match=message) as error:
        lvm.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_broken_files_are_refused_by_name(easylm_model, model, tmp_path):
    config = weights_rule.LLAMAS["head32"]
    folder = hf_folder(tmp_path / "hf", config, weights_rule.llama(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        lvm.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
        lvm.load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../x"}}))
    with pytest.raises(UserError, match="'../x' outside its own folder"):
        lvm.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: no readable JSON"):
        lvm.load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="neither 'model' .* nor 'model_type'"):
        lvm.load(folder)
    (folder / "config.json").write_text(json.dumps({"model": dataclasses.asdict(CONFIG)}))
    with pytest.raises(UserError, match="has no checkpoint"):
        lvm.load(folder)

    stream = easylm_stream(tmp_path / "stream", easylm_model, ("params",))
    with pytest.raises(UserError, match="pass its number of heads"):
        lvm.load(stream)
    stream.write_bytes(stream.read_bytes()[:-1000])
    with pytest.raises(UserError, match="lacks the tensor transformer/h/1"):
        lvm.load(stream, heads=4)
    for rubbish in (b"", b"rubbish", bytes(range(256)), b"\xc1" * 9):
        stream.write_bytes(rubbish)
        with pytest.raises(UserError, match="stream is not an EasyLM stream"):
            lvm.load(stream)
    with pytest.raises(UserError, match="nowhere"):
        lvm.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        lvm.load("params::nowhere")
    with pytest.raises(UserError, match="pass the folder"):
        lvm.load(folder / "config.json")


def written(layout, path, model):
    """`model` in a layout that `lvm.load` reads, without any check on the way."""
    if layout == "easylm":
        return easylm_stream(path, model, ("params",))
    if layout == "run":
        return one_step_run(path, model)
    if layout == "safetensors":
        lvm.save(model, path)
        return path
    lvm.save(model, path.with_suffix(".hf"))
    weights = safetensors.numpy.load_file(path.with_suffix(".hf") / "model.safetensors")
    return pickled_folder(path, json.loads((path.with_suffix(".hf") / "config.json").read_text()), weights, files=2)


THEIR_NAMES = {"safetensors": "model.layers.1.mlp.down_proj.weight", "bin": "model.layers.1.mlp.down_proj.weight",
               "easylm": "transformer/h/1/feed_forward/w2/kernel", "run": "down_FD"}


@pytest.mark.parametrize("layout", THEIR_NAMES)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_one_weight_that_is_no_number_is_refused_by_the_name_of_its_tensor(easylm_model, layout, value, tmp_path, capfd):
    bad = eqx.tree_at(lambda m: m.blocks.down_FD, easylm_model, easylm_model.blocks.down_FD.at[1, 7, 11].set(value))
    path = written(layout, tmp_path / "model", bad)
    with pytest.raises(UserError) as error:
        lvm.load(path, heads=4)
    said = str(error.value) + capfd.readouterr().err  # a run says so of the step, and goes on to the one before
    assert f"{THEIR_NAMES[layout]} holds NaN or infinity" in said and str(path) in said
    assert_same(lvm.load(written(layout, tmp_path / "good", easylm_model), heads=4).blocks, easylm_model.blocks)


@pytest.mark.parametrize("layout", ["safetensors", "easylm", "run"])  # write_pickle knows one dtype
def test_weights_that_are_integers_in_the_file_are_refused_by_name(easylm_model, layout, tmp_path, capfd):
    integers = np.ones(easylm_model.blocks.down_FD.shape, np.int8)
    path = written(layout, tmp_path / "model", eqx.tree_at(lambda m: m.blocks.down_FD, easylm_model, integers))
    with pytest.raises(UserError) as error:
        lvm.load(path, heads=4)
    name = THEIR_NAMES[layout].replace("1", "0")  # the first of them
    assert re.search(rf"{name}.* is int8; weights must be one of float32, bfloat16, float16, float64", str(error.value) + capfd.readouterr().err)


def test_a_weight_too_large_for_the_dtype_asked_for_is_refused_by_name(easylm_model, tmp_path):
    large = eqx.tree_at(lambda m: m.norm_D, easylm_model, easylm_model.norm_D.at[3].set(1e5))  # float16 ends at 65504
    folder = written("safetensors", tmp_path / "model", large)
    assert lvm.load(folder).norm_D[3] == 1e5
    with pytest.raises(UserError, match="model.safetensors: tensor model.norm.weight holds NaN or infinity in float16"):
        lvm.load(folder, dtype=jnp.float16)


def test_an_easylm_key_of_a_million_words_is_refused_at_once_and_many_keys_cost_as_many_steps(easylm_model, tmp_path):
    stream = tmp_path / "stream"
    stream.write_bytes(msgpack.packb((("params",) * 10**6, b"")))
    with pytest.raises(UserError, match="stream is not an EasyLM stream of LLaMA weights: .*exceeds max_array_len"):
        lvm.load(stream, heads=4)

    def steps(keys):  # of Python, which a loop over the words of every key would multiply
        extra = [(("opt_state", "0", "mu", *("params",) * 20, f"{i}"), b"\xc0") for i in range(keys)]
        path, count = easylm_stream(tmp_path / f"{keys}", easylm_model, ("params",), extra), 0

        def traced(frame, event, argument):
            nonlocal count
            count += frame.f_code.co_filename.endswith("weights.py")
            return traced

        before = sys.gettrace()
        sys.settrace(traced)
        try:
            weights.read_stream(path, ("transformer", "lm_head"), np.float32)
        finally:
            sys.settrace(before)
        return count

    few, many, more = (steps(keys) for keys in (0, 1000, 2000))
    assert 1000 <= many - few == more - many <= 10_000


def test_a_save_that_fails_leaves_nothing_behind(easylm_model, tmp_path):
    """The real command, and a file that the system lets grow to 100 KiB only."""
    stream, before = easylm_stream(tmp_path / "stream", easylm_model, ("params",)), set(tmp_path.iterdir())
    command = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", sys.executable, ROOT / "lvm.py", "convert", "--heads", "4", "--model", stream]
    done = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True, env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"})
    assert done.returncode == 2 and re.fullmatch("error: .*model.safetensors: File too large: it needs .* bytes.*\n", done.stderr)
    assert set(tmp_path.iterdir()) == before
