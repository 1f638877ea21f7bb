"""Trains a Large Vision Model to predict the next code of visual sentences.

    python train.py                                    # the main job: a mini LVM on the embedded pictures, about ten minutes
    python train.py --size 300m --data DIR:0.7 DIR:0.3 --context 4098 --mesh -1,1,1,1 --out runs/mine
    python train.py --data DIR --init lvm-hf --learning-rate 3e-5 --out runs/finetuned

Run the same command again to resume: the weights, the moments and the place in the data are those of a run that was
never stopped. A run folder holds config.json, metrics.jsonl, checkpoints/ (orbax) and samples/ (pictures).

Dimension key: A accumulated micro-batches, B sentences, T tokens of a sentence, V vocabulary, S codes of a picture.
"""

import dataclasses
import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import lvm
import tokenize_data
import vqgan
from flash_attention import zigzag

AXES = ("data", "fsdp", "tensor", "seq")
ROWS = P(("data", "fsdp"))  # a batch is split over both
ROW_KEYS = ("ids_BT", "mask_BT", "segment_ids_BT")  # of a batch; the last only where a row holds several sentences


@dataclasses.dataclass(frozen=True)
class Config:
    size: Literal[tuple(lvm.SIZES)] = "mini"
    """Width and depth of the model; `python lvm.py sizes` prints the table."""
    data: tuple[str, ...] = ()
    """Dataset folders or LVM's `.jsonl` files, each `DIR` or `DIR:weight`. Without any, demo sentences are made in the run
    folder."""
    packing: Literal[tokenize_data.PACKINGS] = "sentence"
    """How sentences become rows. sentence: one a row, padded. concat, as published: joined for ever and cut; attention
    crosses sentences, and --context 4097 are LVM's 4096 inputs and targets. segment: as many whole ones as fit, each
    attending to itself alone."""
    fields: str | None = None
    """For .jsonl data, LVM's mini-language: `{key}` tokens of the line, `<|id|>` a literal id, in [ ] what the loss leaves
    out; by default '<|bos|>,{tokens},<|eos|>', which for LVM's codes is '<|8192|>,{tokens},<|8193|>'."""
    special_ids: tuple[int, int, int] | None = None
    """Ids of BOS, EOS and padding; by default the three after the codes."""
    heldout: Path | None = None
    """Dataset folder for the held-out loss and the sample pictures; by default the first of --data."""
    heldout_fraction: float = 0.0
    """Keep this fraction of the sentences, chosen by the hash of their tokens, out of the training; where --heldout is not
    given, the held-out loss and the sample pictures come from it."""
    out: Path = Path("runs/mini")
    """Run folder; a run that it already holds is resumed."""
    init: Path | None = None
    """Start from these weights (run folder, Hugging Face folder or EasyLM stream) instead of random ones."""
    tokenizer: Path = vqgan.MINI
    """Tokenizer that made the data: the sample pictures are decoded with it."""
    steps: int = 400
    """Updates of the weights."""
    batch: int = 4
    """Sentences an update, over all devices."""
    accumulate: int = 1
    """Micro-batches an update: each holds batch / accumulate sentences, so memory shrinks and the result does not change."""
    context: int | None = None
    """Tokens of a row; by default the size's own."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, as published; or muon for the blocks' matrices (scaled to AdamW's step, so that the same learning rate
    serves both) with adamw for the rest."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule."""
    final_learning_rate: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    warmup: int = 40
    """Steps from 0 to the peak."""
    weight_decay: float = 0.1
    """AdamW's decay of the matrices; norm scales are spared."""
    b1: float = 0.9
    """AdamW's decay of the first moment."""
    b2: float = 0.95
    """AdamW's decay of the second moment."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; weights and moments are float32. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    mesh: str = "-1,1,1,1"
    """Devices along data, fsdp, tensor, seq; one may be -1 for all that are left. seq splits the tokens of each
    sentence, for sentences that are too long for one device."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, a third more compute."""
    demo_sentences: int = 960
    """Sentences to make where --data is empty."""
    save_every: int = 50
    """Steps between checkpoints (the newest two are kept), held-out losses and sample pictures."""
    log_every: int = 5
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    """Seed of the weights and of the order of the sentences."""

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "save_every", "log_every", "demo_sentences"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(f"--batch {self.batch} is not a multiple of --accumulate {self.accumulate}")
        if self.warmup >= self.steps and self.steps > 1:
            raise ValueError(f"--warmup {self.warmup} must be less than --steps {self.steps}")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"--heldout-fraction must lie in [0, 1), got {self.heldout_fraction}")
        if self.fields and not any(tokenize_data.split_weight(path)[0].endswith(".jsonl") for path in self.data):
            raise ValueError(f"--fields {self.fields!r} is for .jsonl files, and --data names none")
        try:
            sizes = [int(n) for n in self.mesh.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
            raise ValueError(f"--mesh {self.mesh}: wanted four numbers data,fsdp,tensor,seq, one of which may be -1, such as -1,1,1,1")


# These may differ when a run is resumed; everything else must be as it was.
MAY_CHANGE = {"out", "steps", "save_every", "log_every", "mesh", "remat", "learning_rate", "final_learning_rate", "warmup", "tokenizer", "heldout"}


def train(config: Config) -> lvm.LVM:
    """Trains until `config.steps`, resuming where the run folder holds a checkpoint; returns the model."""
    mesh = make_mesh(config)
    if config.batch % (config.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(f"--batch {config.batch} over {config.accumulate} micro-batches does not divide by the {mesh.shape['data'] * mesh.shape['fsdp']} devices of data x fsdp")
    check_writable(config.out)
    data, heldout = (config.data, config.heldout) if config.data else make_demo(config)
    paths, weights = zip(*map(tokenize_data.split_weight, data))
    codes = next((tokenize_data.Shards(path).codes for path in paths if not path.endswith(".jsonl")), lvm.SIZES[config.size].codes)
    model_config = model_config_for(config, codes)
    specials = (model_config.bos, model_config.eos, model_config.pad)
    open_sentences = functools.partial(tokenize_data.open_sentences, codes=codes, specials=specials, fields=config.fields, vocabulary=model_config.vocab_size)
    shards = [open_sentences(path) for path in paths]
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if config.dtype == "auto" else config.dtype)
    context = config.context or model_config.context
    read = functools.partial(tokenize_data.open_dataset, context=context, specials=specials, packing=config.packing)
    begin_run(config, model_config, [s.about["tokenizer"] for s in shards])
    # Orbax writes under a temporary name and renames: a kill leaves the step before it as the newest.
    manager = ocp.CheckpointManager(config.out.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    first = manager.latest_step() or 0
    batches = iter(read(list(zip(shards, weights)), batch=config.batch, seed=config.seed, start=first, process=jax.process_index(),
                        processes=jax.process_count(), heldout_fraction=config.heldout_fraction))
    heldout = open_sentences(heldout) if heldout else shards[0]
    fraction = 0.0 if config.heldout or not config.data else config.heldout_fraction
    kept_N = np.flatnonzero(tokenize_data.is_heldout(heldout, fraction)) if fraction else np.arange(len(heldout))
    heldout_batch = next(iter(read([heldout], batch=heldout_rows(heldout, kept_N, mesh, context, config), seed=0, heldout_fraction=fraction, heldout=fraction > 0)))

    optimizer, schedule = make_optimizer(config)
    state, shardings = make_state(config, model_config, optimizer, mesh)
    if first:
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        restored = manager.restore(first, args=ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in abstract.items()}))
        state = {k: restored[k] for k in state}
        print(f"resuming {config.out} at step {first}")
    keep_log_until(config.out / "metrics.jsonl", first)

    print(f"{config.size}: {lvm.parameter_count(model_config):,} parameters, {dtype.name} on {mesh.size} {jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}")
    entropy = unigram_entropy(shards)
    print(f"baseline: the entropy of the unigram distribution is {entropy:.3f} nats a code; a loss below it means that the model uses context")

    loss_fn = make_loss(mesh, lvm.partition_specs(state["model"]), dtype, config.remat)
    step_fn = make_train_step(loss_fn, optimizer, config.accumulate, shardings)
    eval_fn = jax.jit(loss_fn)
    place = lambda batch: {k: jax.make_array_from_process_local_data(NamedSharding(mesh, ROWS), v) for k, v in batch.items()}
    tokens, last_step = config.batch * context, first
    began = last_time = time.time()

    with tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True) as bar:
        for step in range(first + 1, config.steps + 1):
            state, metrics = step_fn(state, place(next(batches)))
            bar.update()
            saving = step % config.save_every == 0 or step == config.steps
            if step % config.log_every == 0 or saving:
                metrics = {k: float(v) for k, v in metrics.items()}
                if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                    raise FloatingPointError(f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step {step}; the last good checkpoint is at step {manager.latest_step()}")
                now = time.time()
                rate = tokens * (step - last_step) / (now - last_time)
                last_time, last_step = now, step
                line = {"step": step, **metrics, "learning_rate": float(schedule(step - 1)), "tokens": step * tokens,
                        "tokens_per_second": round(rate, 1), "seconds": round(now - began, 2)}
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", tokens=f"{rate:,.0f}/s")
                if saving:
                    line["heldout_loss"] = float(eval_fn(state["model"], *(place(heldout_batch)[k] for k in ROW_KEYS if k in heldout_batch)))
                    manager.save(step, args=ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in state.items()}))
                    last_time = time.time()
                if jax.process_index() == 0:
                    with open(config.out / "metrics.jsonl", "a") as log:
                        log.write(json.dumps(line) + "\n")
            if saving and jax.process_count() == 1:
                sample_picture(config, state["model"], heldout, config.out / "samples" / f"{step}.png", kept_N=kept_N)
                last_time = time.time()
    manager.close()
    print(f"""done: {config.out} (loss {last_loss(config.out):.3f}, unigram entropy {entropy:.3f}); look at {config.out}/samples/{config.steps}.png, then type
    python sample.py --model {config.out}
    python evaluate.py shots --model {config.out}""")
    return state["model"]


def make_loss(mesh, specs, dtype, remat="none", z_loss=0.0, implementation=None):
    """loss(model, ids_BT, mask_BT[, segment_ids_BT]): the mean over the whole batch, computed shard by shard.

    Differentiate it outside the shard_map: the transpose of each gather below is then the reduce-scatter of its gradient.
    `implementation` is `flash_attention`'s; None picks for the default backend."""
    ranks = mesh.shape["seq"]
    ring = "seq" if ranks > 1 else None

    def gather(weights):
        def whole(path, w):
            name = path[-1].name
            axes = lvm.SHARDING[name]
            w = lax.pcast(w, ("data", "seq"), to="varying")  # so that the sum over them runs on shards, not on whole gradients
            w = w.astype(dtype) if w.ndim > 1 else w
            w = own_columns(w) if name == "head_DV" else w
            return lax.all_gather(w, "fsdp", axis=axes.index("fsdp"), tiled=True) if "fsdp" in axes else lax.pcast(w, "fsdp", to="varying")

        return jax.tree_util.tree_map_with_path(whole, weights)

    def own_columns(head_DV):
        """The columns of the head for this device along "tensor", after padding it to whole lanes of 128 for each."""
        V, parts = head_DV.shape[1], mesh.shape["tensor"]
        width = -(-V // (128 * parts)) * 128
        head_DV = jnp.pad(head_DV, ((0, 0), (0, width * parts - V)))
        return lax.dynamic_slice_in_dim(head_DV, lax.axis_index("tensor") * width, width, axis=1)

    def shard_loss(model, ids_BT, targets_BT, mask_BT, segment_ids_BT=None):
        losses_BT = model.losses(
            ids_BT, targets_BT, segment_ids_BT, gather=gather, reduce=lambda x: lax.psum(x, "tensor"), dtype=dtype, remat=remat, ring=ring,
            vocabulary="tensor", z_loss=z_loss, implementation=implementation)
        loss, _ = lvm.mean_of_rows(losses_BT, mask_BT, whole_row=lambda sum_B: lax.psum(sum_B, "seq"))
        return lax.pmean(loss, ("data", "fsdp"))

    def loss(model, ids_BT, mask_BT, *segment_ids_BT):
        rows = [ids_BT, *lvm.next_tokens(ids_BT, mask_BT), *segment_ids_BT]
        if ring:  # whole chunks for all, in the order that gives each device as much work
            rows = [jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % (2 * ranks)))) for x_BT in rows]
            rows = [x_BT[:, zigzag(x_BT.shape[1], ranks)] for x_BT in rows]
        split = P(*ROWS, "seq")
        return jax.shard_map(shard_loss, mesh=mesh, in_specs=(specs, *[split] * len(rows)), out_specs=P())(model, *rows)

    return loss


def make_train_step(loss_fn, optimizer, accumulate, shardings):
    """train_step(state, batch) -> (state, metrics): pure, jitted, its state donated."""

    def train_step(state, batch):
        loss_and_grads = lambda rows: jax.value_and_grad(loss_fn)(state["model"], *(rows[k] for k in ROW_KEYS if k in rows))
        if accumulate == 1:
            loss, grads = loss_and_grads(batch)
        else:  # micro-batch a takes rows a, a + A, ... so that no row changes its device
            micro = jax.tree.map(lambda x_BT: x_BT.reshape(-1, accumulate, x_BT.shape[1]).swapaxes(0, 1), batch)
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["model"]))
            total, _ = lax.scan(lambda total, rows: (jax.tree.map(jnp.add, total, loss_and_grads(rows)), None), zero, micro)
            loss, grads = jax.tree.map(lambda x: x / accumulate, total)
        updates, moments = optimizer.update(grads, state["optimizer"], state["model"])
        return ({"model": optax.apply_updates(state["model"], updates), "optimizer": moments},
                {"loss": loss, "grad_norm": optax.global_norm(grads)})

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_optimizer(config: Config):
    """AdamW or Muon after clipping by the global norm; linear warm-up, then cosine. Returns (optimizer, schedule)."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, config.steps, config.final_learning_rate * config.learning_rate)
    matrices = lambda model: jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].name, model)
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=matrices)
    else:
        # Which axes of a weight are summed over and which it makes; the stacked layers before them are a batch.
        ends = {"q_DNK": (1, 2), "k_DNK": (1, 2), "v_DNK": (1, 2), "o_NKD": (2, 1), "gate_DF": (1, 1), "up_DF": (1, 1), "down_FD": (1, 1)}

        def axes(path, w):
            if (name := path[-1].name) not in ends:
                return None
            taken, made = ends[name]
            return optax.contrib.MuonDimensionNumbers(tuple(range(1, 1 + taken)), tuple(range(1 + taken, 1 + taken + made)))

        update = optax.contrib.muon(
            schedule, weight_decay=config.weight_decay, weight_decay_mask=matrices, adam_b1=config.b1, adam_b2=config.b2,
            adam_weight_decay=config.weight_decay, consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda model: jax.tree_util.tree_map_with_path(axes, model))
    return optax.chain(optax.clip_by_global_norm(config.clip), update), schedule


def make_state(config: Config, model_config, optimizer, mesh):
    """({"model", "optimizer"}, their shardings): every leaf is born on the devices that keep it."""

    def init(model):
        return {"model": model, "optimizer": optimizer.init(model)}

    model = lvm.load(config.init) if config.init else None
    if model is not None and model.config != model_config:
        raise ValueError(f"--init {config.init} holds {model.config}, --size {config.size} and the data ask for {model_config}")
    new = lambda: lvm.LVM(model_config, key=jax.random.key(config.seed))
    abstract = eqx.filter_eval_shape(lambda: init(new()))
    for axis, sizes in (("fsdp", {"hidden": model_config.hidden}), ("tensor", {"heads": model_config.heads, "ffn": model_config.ffn})):
        for name, size in sizes.items():
            if size % mesh.shape[axis]:
                raise ValueError(f"--mesh: {name} {size} does not divide by {axis} {mesh.shape[axis]}")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), lvm.partition_specs(abstract), is_leaf=lambda x: isinstance(x, P))
    state = jax.jit(init, out_shardings=shardings)(model) if config.init else jax.jit(lambda: init(new()), out_shardings=shardings)()
    return state, shardings


def make_mesh(config: Config):
    sizes, devices = [int(n) for n in config.mesh.split(",")], jax.device_count()
    known = math.prod(n for n in sizes if n != -1)
    sizes = [devices // known if n == -1 else n for n in sizes]
    if math.prod(sizes) != devices:
        raise ValueError(f"--mesh {config.mesh} does not make use of exactly the {devices} devices that are here")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def model_config_for(config: Config, codes: int):
    """The size's config, with the codebook of the data, and the context and special ids that were asked for."""
    model_config = dataclasses.replace(lvm.SIZES[config.size], codes=codes)
    if config.special_ids:
        model_config = dataclasses.replace(model_config, **dict(zip(("bos_id", "eos_id", "pad_id"), config.special_ids)))
    return dataclasses.replace(model_config, context=config.context or model_config.context)


# ---------------------------------------------------------------------------------------------------- the run folder


def heldout_rows(heldout, kept_N, mesh, context: int, config: Config) -> int:
    """32 rows, or as many as the held-out sentences fill, a multiple of the devices that share them."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    there = len(kept_N) if config.packing == "sentence" else int(heldout.row_lengths_N[kept_N].sum()) // (context - 1)
    if there < devices:
        raise ValueError(f"the held-out sentences fill {there} rows, and {devices} devices share them; give more of them, or another --mesh")
    return min(32, there) // devices * devices


def make_demo(config: Config):
    """Composes the embedded demo sentences where they are not there yet -> (training folders, held-out folder)."""
    folder = config.out / "data"
    for split, sentences in (("train", config.demo_sentences), ("heldout", 64)):
        if not (folder / split).exists():
            print(f"composing {sentences} demo sentences ({split}) in {folder / split}")
            tokenize_data.demo(tokenize_data.Demo(out=folder / split, sentences=sentences, split=split, tokenizer=config.tokenizer))
    return (str(folder / "train"),), folder / "heldout"


def check_writable(out: Path):
    """Fails before anything is compiled, not at the first checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    probe = out / ".writable"
    probe.write_text("")
    probe.unlink()


def begin_run(config: Config, model_config, fingerprints):
    """Writes config.json, or refuses a run folder whose settings are others, naming them."""
    settings = {"model": dataclasses.asdict(model_config), "tokenizer": fingerprints[0],
                "train": json.loads(json.dumps(dataclasses.asdict(config), default=str))}
    file = config.out / "config.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = [f"{k}: {before['train'].get(k)} -> {v}" for k, v in settings["train"].items() if before["train"].get(k) != v and k not in MAY_CHANGE]
        changed += [f"{k} is another one" for k in ("model", "tokenizer") if before[k] != settings[k] and not changed]
        if changed:
            raise ValueError(f"{config.out} holds a run with other settings ({'; '.join(changed)}); choose another --out, or repeat its settings")
    if jax.process_index() == 0:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(partial, file)


def keep_log_until(log: Path, step: int):
    """Drops the lines after `step`, which a resumed run writes again, and a line that a kill cut short."""
    if log.exists() and jax.process_index() == 0:
        whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        partial = log.with_suffix(".partial")
        partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        os.replace(partial, log)


def last_loss(out: Path) -> float:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


def unigram_entropy(shards) -> float:
    """Entropy in nats of the codes' frequencies: the loss of a model that knows these and nothing else."""
    counts_V = sum(s.code_counts() for s in shards)
    p_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(p_V * np.log(p_V)).sum())


def sample_picture(config: Config, model, heldout, path: Path, rows=6, kept_N=None):
    """Rows of held-out sentences (`kept_N` of the dataset): all but the last picture, the true last one, and the model's likeliest one."""
    tokenizer, shards = vqgan.load(config.tokenizer), tokenize_data.Shards(heldout) if isinstance(heldout, (str, Path)) else heldout
    kept_N = np.arange(len(shards)) if kept_N is None else kept_N
    if vqgan.fingerprint(tokenizer) != shards.about["tokenizer"]:
        print(f"no sample pictures: the held-out sentences were not made by {config.tokenizer}, or do not say so as a .jsonl does; name their tokenizer "
              "with --tokenizer, or turn the .jsonl into shards with: python tokenize_data.py import-jsonl", file=sys.stderr)
        return
    S = shards.about["codes_per_image"]
    sentences = [shards[i][1] for i in kept_N[np.linspace(0, len(kept_N) - 1, rows).astype(int)]]
    if (most := (model.config.context - 1) // S * S) < 2 * S:
        print(f"no sample pictures: a context of {model.config.context} holds no two pictures of {S} codes after BOS", file=sys.stderr)
        return
    sentences = np.stack([s[-most:] for s in sentences if len(s) == len(sentences[0])]).astype(np.int32)
    prompt_BT = np.concatenate([np.full((len(sentences), 1), model.config.bos), sentences[:, :-S]], axis=1)
    answer_BS = likeliest_picture(jax.device_put(model, jax.devices()[0]), jnp.asarray(prompt_BT, jnp.int32), S)
    codes_BNS = np.concatenate([sentences, answer_BS], axis=1).reshape(len(sentences), -1, S)
    pixels = vqgan.decode(tokenizer, codes_BNS.reshape(-1, S)).reshape(*codes_BNS.shape[:2], *[tokenizer.config.resolution] * 2, 3)
    vqgan.save_rows(list(np.asarray(pixels)), path)


@functools.partial(jax.jit, static_argnums=2)
def likeliest_picture(model, prompt_BT, S):
    """Greedy decoding of the next S image codes -> int32 [B, S]."""
    logits_BV, cache = lvm.prefill(model, prompt_BT, prompt_BT.shape[1] + S)

    def step(carry, _):
        logits_BV, cache = carry
        code_B = jnp.argmax(logits_BV[:, :model.config.codes], axis=-1).astype(jnp.int32)
        return lvm.decode_step(model, code_B, cache), code_B

    _, codes_SB = lax.scan(step, (logits_BV, cache), length=S)
    return codes_SB.T


def main():
    try:
        train(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
