"""Claims about flash_attention.py: every kernel is the definition, forward and backward, on one device and on a ring."""

import dataclasses
import functools
import importlib.util
import math
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax._src import mesh as mesh_lib  # AbstractDevice has no public name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

import flash_attention
import lvm
import train
from benchmarks import pods
from flash_attention import decode_attention, ring_attention, zigzag

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 3e-2}


def tensors(seed, T, S, K, dtype=jnp.float32, B=2, N=2):
    """q, k, v, do: unit normal."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, n, N, K)), dtype) for n in (T, S, S, T)]


def sentences(B, S, seed=0):
    """Ids of four packed sentences of uneven length."""
    return jnp.asarray(np.sort(np.random.default_rng(seed).integers(0, 4, (B, S)), axis=1))


def definition(q, k, v, do, causal=True, segments=None, scale=None):
    """(o, dq, dk, dv) in float64, from the formulas."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    T, S, scale = q.shape[1], k.shape[1], scale or q.shape[-1] ** -0.5
    seen = np.arange(S) <= np.arange(S)[S - T :, None] if causal else np.ones((T, S), bool)
    seen = seen[None, None]
    if segments is not None:
        ids = np.asarray(segments)
        seen = seen & (ids[:, S - T :, None] == ids[:, None])[:, None]
    scores = np.where(seen, np.einsum("btnk,bsnk->bnts", q, k) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("btnk,bsnk->bnts", do, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    products = ("bnts,bsnk->btnk", p, v), ("bnts,bsnk->btnk", ds, k), ("bnts,btnk->bsnk", ds, q), ("bnts,btnk->bsnk", p, do)
    return [np.einsum(*product) for product in products]


def forward_and_gradients(attend, q, k, v, do):
    @jax.jit
    def run(q, k, v, do):
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    return run(q, k, v, do)


def assert_equal(ours, theirs, tolerance):
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, theirs):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance, rtol=tolerance, err_msg=name)


# The definition


@pytest.mark.parametrize("implementation", ["pallas", "xla", "chunked", "reference"])
@pytest.mark.parametrize("causal, T", [(True, 300), (True, 40), (False, 300)])
@pytest.mark.parametrize("segmented", [False, True])
def test_every_attention_equals_its_definition_forward_and_backward(implementation, causal, T, segmented):
    arrays, segments, scale = tensors(0, T, 300, 16), *((sentences(2, 300), 0.3) if segmented else (None, None))
    options = dict(causal=causal, segment_ids_BT=segments, implementation=implementation, scale=scale)
    attend = functools.partial(flash_attention.flash_attention, **options)
    assert_equal(forward_and_gradients(attend, *arrays), definition(*arrays, causal, segments, scale), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("K, T, causal", [(32, 257, True), (64, 128, True), (96, 1, True), (100, 333, True), (128, 385, False)])
def test_the_portable_kernels_take_every_head_dim_dtype_and_length(dtype, K, T, causal):
    arrays, segments = tensors(K, T, T, K, dtype), sentences(2, T)
    attend = functools.partial(flash_attention.flash_attention, causal=causal, segment_ids_BT=segments, implementation="pallas")
    ours = forward_and_gradients(attend, *arrays)
    assert all(x.dtype == dtype for x in ours)
    assert_equal(ours, definition(*arrays, causal, segments), TOLERANCE[dtype])


@pytest.mark.parametrize("T, S, causal", [(300, 300, True), (200, 333, True), (300, 300, False)])
def test_sentences_too_long_for_fast_memory_are_done_in_pieces(monkeypatch, T, S, causal):
    monkeypatch.setattr(flash_attention, "_longest", lambda platform, x: 256)
    arrays, segments = tensors(1, T, S, 32), sentences(2, S)
    attend = functools.partial(flash_attention.flash_attention, causal=causal, segment_ids_BT=segments, implementation="pallas")
    assert_equal(forward_and_gradients(attend, *arrays), definition(*arrays, causal, segments), 1e-5)


def test_blocks_above_the_diagonal_are_never_computed():
    # NaN keys in blocks that no query of the first block may see would spread even under a mask: 0 * NaN is NaN.
    q, k, v, _ = tensors(2, 384, 384, 32)
    poisoned = [x.at[:, 128:].set(jnp.nan) for x in (k, v)]
    out = flash_attention.flash_attention(q, *poisoned, implementation="pallas")
    clean = flash_attention.flash_attention(q, k, v, implementation="pallas")
    np.testing.assert_array_equal(out[:, :128], clean[:, :128])
    assert np.isnan(out[:, 128:]).all()


def test_large_scores_do_not_overflow():
    q, k, v, do = tensors(3, 130, 130, 32)
    arrays = 100 * q, 100 * k, v, do
    attend = functools.partial(flash_attention.flash_attention, implementation="pallas")
    assert_equal(forward_and_gradients(attend, *arrays)[:1], definition(*arrays)[:1], 1e-4)
    assert all(np.isfinite(x).all() for x in forward_and_gradients(attend, *arrays))


def traced_for(device_kind, platform, call, *shapes):
    """call(*arrays) while a program for such devices is being traced, by shard_map inside jit, gradient, checkpoint and scan."""
    device = mesh_lib.AbstractDevice(device_kind=device_kind, num_cores=None, platform=platform)
    mesh, found = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device), []

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P())
    def program(x):
        def body(x, _):
            found.append(call(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)))
            return x, None

        return lax.scan(jax.checkpoint(body), x, length=2)[0]

    jax.jit(jax.grad(lambda x: program(x).sum())).trace(jax.ShapeDtypeStruct((2,), jnp.float32))
    assert len(set(found)) == 1
    return found[0]


def test_the_default_is_plain_jnp_on_a_cpu_and_our_kernels_on_the_accelerators_that_a_program_is_for(capsys):
    flash_attention._say_once.cache_clear()
    q = (2, 1000, 4, 64), jnp.bfloat16
    choice = lambda device, x=q, segmented=False: traced_for(*device, lambda x: flash_attention.choose(x, x, True, segmented), x)
    assert choice(("cpu", "cpu")) == "chunked" == flash_attention.choose(*[jax.ShapeDtypeStruct(*q)] * 2, True, False)
    assert choice(("TPU v5p", "tpu")) == "pallas" == choice(("NVIDIA A100-SXM4-80GB", "gpu")) == choice(("NVIDIA B200", "gpu"))
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"):
        assert choice((name, "gpu")) == "hopper" and capsys.readouterr().err == ""
    h200 = "NVIDIA H200", "gpu"
    assert choice(h200, segmented=True) == choice(h200, segmented=True) == "pallas"
    assert capsys.readouterr().err.splitlines() == ["flash_attention: the Hopper kernels know no segment ids; the portable kernels run instead"]
    assert choice(h200, (q[0], jnp.float32)) == "pallas" and "take bfloat16, not float32" in capsys.readouterr().err


def test_the_cuda_that_miscompiles_causal_masks_is_refused():
    assert "CUDA 12080 miscompiles" in flash_attention._cuda_refuses("PJRT C API\ncuda 12080")
    assert flash_attention._cuda_refuses("PJRT C API\ncuda 13000") is None and flash_attention._cuda_refuses("cpu") is None


def test_kernels_that_give_wrong_numbers_or_do_not_run_are_found_before_a_model_uses_them():
    attend = functools.partial(flash_attention.flash_attention, implementation="chunked")
    compare = lambda attend: flash_attention._compare_with_reference(attend, 64)
    assert compare(attend) is None
    assert compare(functools.partial(attend, causal=False)).startswith("are wrong here at head_dim 64")  # a kernel that forgets causality
    assert compare(lambda q, k, v: attend(q, k, jnp.sqrt(v - lax.stop_gradient(v)) + v)) is not None  # right, but for gradients that are NaN
    assert compare(functools.partial(attend, segment_ids_BT=jnp.zeros(3))).startswith("do not run here (ValueError: segment_ids_BT has the shape (3,)")


def test_the_hopper_kernels_are_tried_while_a_model_is_being_traced_and_the_reason_names_the_exception():
    """On this machine they can only fail, but for the right reason: at lowering for a CPU, not because of the trace around."""
    flash_attention._hopper_trial.cache_clear()
    verdict = traced_for("NVIDIA H200", "gpu", lambda: flash_attention._hopper_trial(64))
    assert verdict == "the Hopper kernels do not run here (ValueError: Only interpret mode is supported on CPU backend.)"


def test_what_attention_cannot_do_is_refused_in_words():
    q = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match="'cudnnn' is none of None, 'hopper', 'pallas'"):
        flash_attention.flash_attention(q, q, q, implementation="cudnnn")
    with pytest.raises(ValueError, match="there are 4 queries and 3 keys"):
        flash_attention.flash_attention(q, q[:, :3], q[:, :3])
    with pytest.raises(ValueError, match="batch, heads and head_dim must be the same"):
        flash_attention.flash_attention(q, q[..., :4], q)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) for 1 rows of 4 tokens"):
        flash_attention.flash_attention(q, q, q, segment_ids_BT=jnp.zeros((1, 3), int))
    with pytest.raises(ValueError, match="the Hopper kernels take bfloat16, not float32; take \"pallas\" or None"):
        flash_attention.flash_attention(q, q, q, implementation="hopper")
    with pytest.raises(ValueError, match="10 tokens do not divide into 2 x 4 chunks"):
        zigzag(10, 4)
    with pytest.raises(ValueError, match="the cache has 100 slots"):
        decode_attention(q, *[jnp.zeros((1, 1, 4, 100, 8))] * 2, 0, 1, implementation="pallas")


# The Hopper kernels, on a machine without a Hopper GPU


@pytest.mark.parametrize("K", [64, 96, 100, 128])
def test_the_hopper_kernels_lower_to_mosaic_gpu(K):
    x = jax.ShapeDtypeStruct((2, 1000, 4, K), jnp.bfloat16)
    attend = functools.partial(flash_attention.flash_attention, implementation="hopper")
    run = jax.jit(lambda q, k, v, do: forward_and_gradients(attend, q, k, v, do))
    assert run.trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 3  # forward, dq, dkv


@pytest.mark.parametrize("K, T", [(64, 300), (96, 128), (100, 130)])  # 100 runs as 112
def test_the_hopper_kernels_interpreted_are_the_definition_and_have_no_races(K, T, monkeypatch):
    try:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
        from jax.experimental.pallas import mosaic_gpu as plgpu
        interpreter = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
    except (ImportError, AttributeError):
        pytest.skip(f"jax {jax.__version__} has no interpreter for these kernels; jax 0.12 has")

    # Two things that the interpreter lacks: a product whose left side is in registers, and several in one run_state.
    def product(token, mesh_location, thread, source_info=None, *, product=gpu_callbacks.wgmma, **refs):
        a = np.asarray(refs["a_allocation_key_as_array"])
        if a.ndim == 1:  # a reference: the key of its allocation
            return product(token=token, mesh_location=mesh_location, thread=thread, source_info=source_info, **refs)
        memory = gpu_callbacks._get_shared_memory()
        info = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)

        def resolve(name):
            key = gpu_callbacks.HostAllocationKey.from_array(refs[f"{name}_allocation_key_as_array"])
            transforms = gpu_callbacks._remove_noop_transforms(refs[f"{name}_transforms"])
            access = memory.access(key, jax.tree.map(int, transforms))
            return key, access, memory.get_buffer_content(key, access, thread, logging_info=info)[0]

        key, access, total = resolve("acc")
        total = total + a.astype(np.float32) @ resolve("b")[2].astype(np.float32)
        memory.store_buffer_content(key, access, total, thread, logging_info=info)
        return token

    def add_products(*terms):
        sums = tuple(total + flash_attention._product(a, b) for total, a, b in terms)
        return sums if len(sums) > 1 else sums[0]

    monkeypatch.setattr(gpu_callbacks, "wgmma", product)
    monkeypatch.setattr(flash_attention, "_add_products", add_products)
    arrays = tensors(K, T, T, K, jnp.bfloat16, B=1)
    attend = functools.partial(flash_attention.flash_attention, implementation="hopper")
    with interpreter:
        ours = forward_and_gradients(attend, *arrays)
        verdict = flash_attention._compare_with_reference(attend, K) if K == 64 else None
    assert_equal(ours, definition(*arrays), TOLERANCE[jnp.bfloat16])
    assert verdict is None  # what `_hopper_trial` says where they run


def test_a_model_with_padded_projections_is_the_same_function_with_the_same_gradients(monkeypatch):
    config = lvm.LVMConfig(hidden=24, ffn=8, layers=1, heads=4, codes=8, specials=3, context=8)  # head_dim 6
    rng, seen = np.random.default_rng(0), []
    normal = lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32)  # attention far from uniform
    model, ids_BT = jax.tree.map(normal, eqx.filter_eval_shape(lvm.LVM, config, key=jax.random.key(0))), jnp.arange(8)[None]

    def attend(q, k, v, **options):
        seen.append(q.shape[3])
        return flash_attention.flash_attention(q, k, v, **options)

    def run(model, width):
        monkeypatch.setattr(lvm, "native_head_dim", lambda *_: width)
        gradients = jax.grad(lambda model: (model(ids_BT, dtype=jnp.float32) ** 2).mean())(model)
        return gradients, model(ids_BT), lvm.quantize(model)(ids_BT)

    monkeypatch.setattr(lvm, "flash_attention", attend)
    plain, padded = jax.jit(lambda model: [run(model, width) for width in (6, 10)])(model)
    assert set(seen) == {6, 10} and jax.tree.map(jnp.shape, padded[0]) == jax.tree.map(jnp.shape, model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), padded, plain)


def test_a_model_projects_to_the_width_that_the_kernels_read():
    shape = 2, 1000, 32, 100
    width = lambda shape=shape, dtype=jnp.bfloat16, **options: flash_attention.native_head_dim(shape, dtype, False, **options)
    assert width() == 100  # on a CPU
    assert width(implementation="hopper") == 112 and width((2, 1000, 32, 128), implementation="hopper") == 128
    on_h200 = lambda **options: traced_for("NVIDIA H200", "gpu", lambda: width(**options))
    assert on_h200() == 112 and on_h200(dtype=jnp.float32) == 100 and on_h200(implementation="xla") == 100


def test_a_model_for_hopper_gpus_takes_the_hopper_kernels_by_itself():
    """The training loss as train.py builds it, with no implementation named, over a mesh of GPUs that are not here: shard_map,
    gradient, scan and checkpoint. Its program calls the three kernels, and heads of 100 are born 112 wide."""
    device = mesh_lib.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1, 2, 2, 1), train.AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=device)
    config = lvm.LVMConfig(hidden=400, ffn=256, layers=2, heads=4, codes=60, context=256)
    model = eqx.filter_eval_shape(lvm.LVM, config, key=jax.random.key(0))
    ids_BT = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    loss = train.make_loss(mesh, lvm.partition_specs(model), jnp.bfloat16, remat="full")
    program = jax.jit(jax.grad(loss)).trace(model, ids_BT, ids_BT).lower(lowering_platforms=("cuda",)).as_text()
    called = program.count("@mosaic_gpu")
    assert called == 4 and "tensor<1x256x2x112xbf16>" in program, called  # forward, and again in the backward pass; dq; dkv


# Meshes


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "scan and checkpoint"])
def test_the_portable_kernels_run_under_shard_map_with_its_checks(remat):
    mesh, spec = mesh_of(data=2, tensor=4), P("data", None, "tensor")
    arrays, segments = tensors(4, 200, 200, 32, N=4), sentences(2, 200)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec, spec, P("data")), out_specs=spec, check_vma=True)
    def sharded(q, k, v, segments):
        attend = functools.partial(flash_attention.flash_attention, segment_ids_BT=segments, implementation="pallas")
        if not remat:
            return attend(q, k, v)
        layer = jax.checkpoint(lambda _, kv: (attend(q, *kv), None))
        return lax.scan(layer, jnp.zeros_like(q), (k[None], v[None]))[0]

    ours = forward_and_gradients(lambda q, k, v: sharded(q, k, v, segments), *arrays)
    assert_equal(ours, definition(*arrays, True, segments), 1e-5)


@pytest.mark.parametrize("implementation, ranks, causal", [
    ("xla", 2, True), ("xla", 4, True), ("xla", 8, True), ("xla", 4, False), ("pallas", 2, True), ("pallas", 4, True), ("pallas", 8, True)])
@pytest.mark.slow
def test_a_ring_of_devices_equals_one_device(implementation, ranks, causal):
    tokens = 272
    mesh, spec = mesh_of(data=8 // ranks, seq=ranks), P(None, "seq")
    arrays, segments, order = tensors(5, tokens, tokens, 32), sentences(2, tokens), zigzag(tokens, ranks)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=True)
    def ring(q, k, v, segments):
        return ring_attention(q, k, v, "seq", causal=causal, segment_ids_BT=segments, implementation=implementation, scale=0.3)

    attend = lambda q, k, v: ring(*(x[:, order] for x in (q, k, v, segments)))[:, jnp.argsort(order)]
    assert_equal(forward_and_gradients(attend, *arrays), definition(*arrays, causal, segments, 0.3), 1e-5)


def test_zigzag_gives_every_device_the_same_share_of_the_causal_triangle():
    for ranks in (2, 4, 8):
        order = np.asarray(zigzag(64, ranks))
        assert sorted(order) == list(range(64))
        assert len({int(positions.sum()) for positions in order.reshape(ranks, -1)}) == 1


# Decoding


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("length", [1, 128, 300, 640])
def test_decoding_equals_the_definition_on_the_slots_that_are_filled(implementation, length):
    rng = np.random.default_rng(6)
    q_BNCK = jnp.asarray(rng.normal(size=(2, 2, 3, 64)), jnp.float32)
    k_LBNSK, v_LBNSK = (jnp.asarray(rng.normal(size=(3, 2, 2, 640, 64)), jnp.float32) for _ in range(2))
    stale = [x.at[:, :, :, length:].set(1e4) for x in (k_LBNSK, v_LBNSK)]
    o_BNCK, lse_BNC = jax.jit(functools.partial(decode_attention, implementation=implementation))(q_BNCK, *stale, 1, length)
    scores = np.einsum("bnck,bnsk->bncs", q_BNCK, k_LBNSK[1, :, :, :length], dtype=np.float64) / 8
    p = np.exp(scores)
    np.testing.assert_allclose(lse_BNC, np.log(p.sum(-1)), atol=1e-5)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(o_BNCK, np.einsum("bncs,bnsk->bnck", p, v_LBNSK[1, :, :, :length]), atol=1e-5)


@pytest.mark.slow
def test_the_benchmark_prints_a_rate_and_a_small_error_for_every_implementation(capsys):
    from benchmarks import attention
    attention.main(attention.Config(head_dims=(32,), tokens=(128,), total=128, width=32, rounds=1))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = {row[2]: row[3:] for row in rows if row[:2] == ["32", "128"]}
    assert [len(cells[name]) for name in ("forward", "forward + backward")] == [3, 3]
    for rate, error in (re.fullmatch(r"(\S+) \((\S+)\)", cell).groups() for row in cells.values() for cell in row):
        assert float(rate) > 0 and float(error) < 3e-2
    assert [row[2] for row in rows if row[0].startswith("256 slots")] == ["pallas", "xla"] * 2  # decoding


# Programs for chips that are not here: the real compilers accept every kernel.

CHIPS = {
    "v4": dict(platform="tpu", topology_name="v4:2x2x1", chip_config_name="megacore"),
    "v5e": dict(platform="tpu", topology_name="v5e:2x2"),
    "v5p": dict(platform="tpu", topology_name="v5p:2x2x1", chip_config_name="megachip_tccontrol"),
    "v6e": dict(platform="tpu", topology_name="v6e:2x2"),
    "h200": dict(platform="cuda", topology_name="h200", target_config=pods.H200, topology="1x1x4"),
}


def chips(name):
    """The four devices of a small machine; skips where its compiler is not installed."""
    plugin = "jax_cuda13_plugin" if name == "h200" else "libtpu"
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: pip install -r tests/compilers.txt on Linux x86_64")
    return np.array(topologies.get_topology_desc(**CHIPS[name]).devices)


def compile_ahead(devices, run, spec, *shapes):
    """Compiles run under shard_map, each (shape, dtype) split by spec."""
    mesh = Mesh(devices, ("seq",))
    args = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec)) for shape in shapes]
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * len(args), out_specs=spec, check_vma=True)
    return jax.jit(sharded).trace(*args).lower().compile()


def gradients_of(attend):
    return lambda q, k, v, *rest: jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)[1](jnp.ones_like(q))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("T, K, dtype, causal", [
    (8192, 128, jnp.bfloat16, True), (578, 100, jnp.bfloat16, True), (200, 96, jnp.float32, True), (300, 64, jnp.bfloat16, False)])
def test_ahead_of_time_the_portable_kernels_compile_for(chip, T, K, dtype, causal):
    attend = lambda q, k, v, ids: flash_attention.flash_attention(
        q, k, v, causal=causal, segment_ids_BT=ids, implementation="pallas")
    shapes = [((4, T, 2, K), dtype)] * 3 + [((4, T), jnp.int32)]
    assert compile_ahead(chips(chip), gradients_of(attend), P("seq"), *shapes) is not None


def needs_an_assembler():
    toolkit = Path("/usr/local/cuda")
    if not (toolkit / "bin/ptxas").exists() or not (toolkit / "nvvm/libdevice").exists():
        pytest.skip("no CUDA 13 toolkit in /usr/local/cuda: its ptxas and libdevice make machine code; lowering was tested")


def copies(program, least):
    """The instructions of a compiled program that write `least` numbers or more and compute nothing: copies, pads, slices."""
    moves = set("parameter constant bitcast copy pad slice transpose reshape concatenate broadcast convert tuple get-tuple-element".split())
    instruction = re.compile(r"^ *(?:ROOT )?%(\S+) = \(?\w+\[([\d,]*)\].*? ([a-z-]+)\(")
    bodies, found = {}, []
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        lines = [line for line in computation.splitlines() if instruction.match(line)]
        operations = {instruction.match(line)[3] for line in lines}
        bodies[computation.split()[0].lstrip("%")] = operations
        for line in lines:
            name, shape, operation = instruction.match(line).groups()
            inside = bodies[re.search(r"calls=%([^\s,]+)", line)[1]] if operation == "fusion" else {operation}
            copying = inside <= moves and inside & {"copy", "pad", "slice", "transpose", "reshape", "concatenate", "convert"}
            if computation.startswith("ENTRY") and copying and math.prod(map(int, filter(None, shape.split(",")))) >= least:
                found.append(name)
    return found


@pytest.mark.parametrize("K", [64, 96, 100, 128])
def test_ahead_of_time_the_hopper_kernels_are_assembled(K, monkeypatch, capfd):
    needs_an_assembler()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    attend = functools.partial(flash_attention.flash_attention, implementation="hopper")
    shape = 4, 1024, 2, K
    program = compile_ahead(chips("h200"), gradients_of(attend), P("seq"), *[(shape, jnp.bfloat16)] * 3).as_text()
    assert program.count('custom_call_target="mosaic_gpu') == 3  # forward, dq, dkv
    assert bool(copies(program, math.prod(shape) // 4)) == (K == 100)
    said = capfd.readouterr().out
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    assert len(spilled) >= 6 and max(spilled) <= (40 if K == 128 else 0) and "serialized" not in said


def test_ahead_of_time_a_block_of_size_3b_copies_no_activation_around_the_hopper_kernels():
    needs_an_assembler()
    B, T = 2, 4096
    config = dataclasses.replace(lvm.SIZES["3b"], layers=1, codes=16, ffn=256)
    model = eqx.filter_eval_shape(lvm.LVM, config, key=jax.random.key(0))
    here = SingleDeviceSharding(chips("h200")[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (model, jax.ShapeDtypeStruct((B, T), jnp.int32)))
    # Without the barrier cuBLAS would add to the residual stream in place, for which XLA copies it. That is no doing of attention's.
    options = dict(dtype=jnp.bfloat16, implementation="hopper", reduce=lax.optimization_barrier)
    loss = lambda model, ids_BT: model(ids_BT, **options).mean()
    # Triton's products would take the compiler another ten seconds; cuBLAS's come from a library.
    lowered = jax.jit(jax.grad(loss)).trace(*args).lower()
    program = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False}).as_text()
    assert program.count('custom_call_target="mosaic_gpu') == 3 and "bf16[2,4096,32,112]" in program
    assert copies(program, B * T * config.hidden) == []


@pytest.mark.parametrize("chip", ["v4", "v5e", "h200"])
def test_ahead_of_time_the_ring_compiles_for(chip):
    attend = functools.partial(ring_attention, axis="seq", implementation="pallas")
    shapes = [((1, 2048, 2, 64), jnp.bfloat16)] * 3
    text = compile_ahead(chips(chip), gradients_of(attend), P(None, "seq"), *shapes).as_text()
    assert "collective-permute" in text


@pytest.mark.parametrize("chip", CHIPS)
def test_ahead_of_time_the_decode_kernel_compiles_for(chip):
    decode = lambda q, k, v, length: decode_attention(q, k, v, 1, length[0], implementation="pallas")
    cache = (2, 4, 2, 1024, 128), jnp.bfloat16
    mesh = Mesh(chips(chip), ("seq",))
    specs = P("seq"), P(None, "seq"), P(None, "seq"), P()
    shapes = ((4, 2, 8, 128), jnp.bfloat16), cache, cache, ((1,), jnp.int32)
    args = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec)) for shape, spec in zip(shapes, specs)]
    sharded = jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=P("seq"), check_vma=True)
    assert jax.jit(sharded).trace(*args).lower().compile() is not None


@pytest.mark.parametrize("chip, kernel", [("v4", "tpu_custom_call"), ("v5e", "tpu_custom_call"), ("h200", "mosaic_gpu")])
def test_ahead_of_time_a_model_over_a_mesh_takes_the_kernels_of_that_chip_by_itself(chip, kernel):
    mesh = Mesh(chips(chip).reshape(1, 2, 2, 1), train.AXES)
    config = dataclasses.replace(lvm.SIZES["debug"], heads=2)  # of 64, which the Hopper kernels take
    model = eqx.filter_eval_shape(lvm.LVM, config, key=jax.random.key(0))
    specs = lvm.partition_specs(model)
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    ids_BT = jax.ShapeDtypeStruct((2, 578), jnp.int32, sharding=NamedSharding(mesh, train.ROWS))
    loss = train.make_loss(mesh, specs, jnp.bfloat16, remat="full")
    lowered = jax.jit(jax.grad(loss)).trace(jax.tree.map(place, model, specs), ids_BT, ids_BT).lower()
    assert kernel in lowered.as_text()
    if chip == "h200":
        needs_an_assembler()
    assert kernel in lowered.compile().as_text()
