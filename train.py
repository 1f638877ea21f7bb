"""Trains a Large Vision Model to predict the next code of visual sentences.

    python train.py                     # the main job: a mini LVM on the embedded pictures, about ten minutes
    python train.py --size 300m --data DIR:0.7 DIR:0.3 --context 4098 --out runs/mine
    python train.py --data DIR --init lvm-hf --learning-rate 3e-5 --out runs/finetuned
    python train.py --preset lvm-7b --compile-only --topology v5p:4x4x4      # what a pod would make of it

Run the same command again to resume: weights, moments and the place in the data are those of a run that was
never stopped, also on other devices or another number of processes. A run folder holds config.json,
metrics.jsonl, checkpoints/ (orbax, with digests) and samples/ (pictures).

On several hosts, which see one disk, start the same command on each. Under SLURM's srun, Open MPI's mpirun
and on TPU pods the processes find each other; elsewhere add --coordinator HOST:PORT --processes N --process
I.

Dimension key: A micro-batches, B sentences, T tokens, V vocabulary, S codes of a picture, N any number.
"""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import lvm
import tokenize_data
import vqgan
from common import runs
from common.images import UserError, encode_image, sheet
from common.runs import leads, side_work, warn
from common.weights import read_json, write_whole
from flash_attention import zigzag

AXES = ("data", "fsdp", "tensor", "seq")
ROWS = P(("data", "fsdp"))  # a batch is split over both
ROW_KEYS = ("ids_BT", "mask_BT", "segment_ids_BT")  # the last only where a row holds several sentences


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["none", "lvm-7b"] = "none"
    """Other defaults for the flags that are not given. lvm-7b: the published recipe of the 7b."""
    size: Literal[tuple(lvm.SIZES)] = "mini"
    """Width and depth of the model; `python lvm.py sizes` prints the table."""
    data: tuple[str, ...] = ()
    """Dataset folders or LVM's `.jsonl` files (also .jsonl.gz, .jsonl.zst), which are imported once into the
    run folder, each `DIR` or `DIR:weight`; by default demo sentences."""
    packing: Literal[tokenize_data.PACKINGS] = "sentence"
    """How sentences become rows. sentence: one a row, padded. concat, as published: joined and cut; attention
    crosses sentences, and --context 4097 are LVM's 4096 inputs and targets. segment: as many whole ones as
    fit."""
    fields: str | None = None
    """For .jsonl data, LVM's mini-language: `{key}` tokens of the line, `<|id|>` a literal id, in [ ] what
    the loss leaves out; by default '<|bos|>,{tokens},<|eos|>', which is LVM's
    '<|8192|>,{tokens},<|8193|>'."""
    special_ids: tuple[int, int, int] | None = None
    """Ids of BOS, EOS and padding; by default the three after the codes."""
    heldout: Path | None = None
    """Dataset for the held-out loss and the sample pictures, less what the training data hold too."""
    heldout_fraction: float = 0.0
    """Keep this fraction of every --data, chosen by the hash of the tokens, out of the training, and measure
    the held-out loss on it unless there is a --heldout."""
    accept_new_data: bool = False
    """Resume though the data under the same paths have changed."""
    out: Path = Path("runs/mini")
    """Run folder; a run that it already holds is resumed."""
    init: Path | None = None
    """Start from these weights: run folder, Hugging Face folder or EasyLM stream."""
    tokenizer: Path = vqgan.MINI
    """Tokenizer that made the data: the sample pictures are decoded with it."""
    steps: int = 400
    """Updates of the weights."""
    batch: int = 4
    """Sentences an update, over all devices."""
    accumulate: int = 1
    """Micro-batches an update: memory shrinks, and the result does not change."""
    context: int | None = None
    """Tokens of a row; by default the size's own."""
    optimizer: Literal["adamw", "palm", "muon"] = "adamw"
    """adamw, as published; palm, the published alternative (PaLM's with --schedule rsqrt --b2 0.99
    --weight-decay 1 --learning-rate 0.01 --warmup 10000); muon for the blocks' matrices, at adamw's learning
    rate, adamw for the rest."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    schedule: Literal["cosine", "wsd", "rsqrt"] = "cosine"
    """cosine, as published, down to the final rate; wsd, the peak, then a line down over the last
    --decay-fraction, so that a run can be lengthened before it; rsqrt, PaLM's, with no final rate."""
    decay_fraction: float = 0.2
    """Part of the steps over which wsd falls."""
    final_learning_rate: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    warmup: int | None = None
    """Steps from 0 to the peak; by default a tenth of --steps, at most the published 8,000."""
    weight_decay: float = 0.1
    """Decay of the matrices; norm scales are spared, unless:"""
    decay_norms: bool = False
    """Decay norm scales too, as published."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment; its exponent in palm."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; weights are float32. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    mesh: str = "auto"
    """Devices along data, fsdp (splits weights and moments), tensor (heads and feed-forward width) and seq
    (tokens); one may be -1 for all that are left. auto chooses, and says why."""
    remat: Literal[tuple(lvm.REMAT)] = "none"
    """What the backward pass computes again: minimal, elementwise work; full, whole blocks, a third more
    compute for the least memory; offload, as full, with the blocks' inputs in the host's memory."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in the gradient; PaLM takes 1e-4."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Stored dtype of the optimizer's moments; palm's second moment is always float32."""
    compile_only: bool = False
    """Say what the training step takes on the chips of --topology, which need not be here; status 1 where it
    does not fit. Needs no data, but the packages of tests/compilers.txt."""
    topology: str | None = None
    """v4:2x2x4, v5e:16x16, v5p:4x4x8, v6e:8x8, two slices v5e:16x16*2, or h200:16."""
    compilation_cache: str = "auto"
    """Folder for compiled programs; auto: one in the user's cache; off: none."""
    demo_sentences: int = 960
    """Sentences to make where --data is empty."""
    save_every: int = 50
    """Steps between checkpoints. A save that fails is tried again at the next."""
    save_patience: int = 300
    """Seconds for which a failed save of the last step is tried again."""
    keep: int = 2
    """Checkpoints to keep, the newest ones."""
    milestone_every: int | None = None
    """Also keep the checkpoints whose step is a multiple of this."""
    evaluate_every: int | None = None
    """Steps between held-out losses and sample pictures, 0 for never; by default --save-every."""
    log_every: int = 5
    """Steps between lines of metrics.jsonl."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where to send these lines besides."""
    profile: Path | None = None
    """Write a trace of the second to fourth step of this start here, for TensorBoard or Perfetto."""
    patience: int = 20
    """Stop after so many steps in a row that were left out for a loss or gradient norm that is no finite
    number, or a hundred times the usual."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where neither SLURM, Open MPI nor a TPU pod tells it."""
    processes: int | None = None
    """How many processes train together; with --coordinator."""
    process: int | None = None
    """Which of them this one is, from 0; with --coordinator."""
    heartbeat: int = 100
    """Seconds of silence after which a process is taken for dead, and the others stop."""
    seed: int = 0
    """Seed of the weights and of the order of the sentences."""

    def __post_init__(self):
        runs.check_numbers(self, {
            "[1, inf)": "steps batch accumulate save_every log_every demo_sentences keep patience heartbeat "
                        "milestone_every processes",
            "[0, inf)": "warmup evaluate_every save_patience process seed weight_decay z_loss",
            "[2, inf)": "context", "(0, inf)": "learning_rate clip", "[0, 1)": "b1 b2 heldout_fraction",
            "[0, 1]": "final_learning_rate", "(0, 1]": "decay_fraction"})  # fmt: skip
        if (self.processes, self.process) != (None, None) and not (
            self.coordinator and self.process is not None and self.process < (self.processes or 0)
        ):
            raise UserError("wanted --coordinator HOST:PORT --processes N --process I with I from 0 to N - 1")
        for name in ("tensorboardX" if name == "tensorboard" else name for name in self.log):
            if importlib.util.find_spec(name) is None:
                raise UserError(f"--log needs a package that is not installed here; type: pip install {name}")
        if self.batch % self.accumulate:
            raise UserError(f"--batch {self.batch} is not a multiple of --accumulate {self.accumulate}")
        if (warmup := warmup_of(self)) >= self.steps:
            raise UserError(f"--warmup {warmup} must be less than --steps {self.steps}")
        if self.schedule == "wsd" and warmup + self.decay_fraction * self.steps > self.steps:
            raise UserError(f"--warmup {warmup} and --decay-fraction {self.decay_fraction} overlap")
        if self.moments == "bfloat16" and self.optimizer != "palm" and self.b2 > 0.99:
            raise UserError(f"--moments bfloat16 would round off --b2 {self.b2}: take --b2 0.99 or less")
        if self.fields and not any(
            tokenize_data.is_lines(tokenize_data.split_weight(text)[0]) for text in self.data
        ):
            raise UserError(f"--fields {self.fields!r} is for .jsonl files, and --data names none")
        if self.compile_only != bool(self.topology):
            raise UserError("--compile-only and --topology go together, such as --topology v5p:4x4x8")
        parse_mesh(self.mesh)


# An update of the published 7b is 32 sentences x 4 micro-batches = 524,288 targets; its schedule counts
# updates. 4097 ids are 4096 inputs and targets.
PRESETS = {"lvm-7b": dict(
    size="7b", packing="concat", context=4097, batch=128, accumulate=4, steps=288_000, learning_rate=1.5e-4,
    final_learning_rate=0.2, b1=0.9, b2=0.95, clip=1.0, weight_decay=0.1, decay_norms=True, dtype="bfloat16",
    remat="full", save_every=2_000, log_every=50, out=Path("runs/lvm-7b"))}  # fmt: skip
# These may differ when a run is resumed; everything else must be as it was.
MAY_CHANGE = set(
    "preset out steps save_every keep milestone_every evaluate_every log_every log profile patience mesh"
    " remat save_patience compile_only topology compilation_cache learning_rate final_learning_rate warmup"
    " tokenizer heldout coordinator processes process heartbeat accept_new_data".split()
)


def preset(arguments) -> Config:
    """The defaults that `--preset NAME` or `--preset=NAME` among the arguments asks for."""
    words = " ".join(map(str, arguments)).replace("=", " ").split()
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else "none"
    return Config(preset=name, **PRESETS.get(name, {}))


def warmup_of(config: Config) -> int:
    """Steps from 0 to the peak."""
    return min(config.steps // 10, 8_000) if config.warmup is None else config.warmup


def train(config: Config) -> lvm.LVM:
    """Trains until `config.steps`, or until a signal asks to stop; returns the model."""
    start_processes(config.coordinator, config.processes, config.process, config.heartbeat)
    with runs.own_run_folder(config.out):
        return train_in_own_folder(config)


def train_in_own_folder(config: Config) -> lvm.LVM:
    """`train`, once no other training can use the run folder."""
    say, out, log = print if leads() else lambda text: None, config.out, config.out / "metrics.jsonl"
    picture = lambda step: out / "samples" / f"{step}.png"
    before = settings_of(out)
    if config.warmup is None:  # a longer --steps must not fall back into a longer warm-up
        warmup = before["train"].get("warmup") if before else None
        config = dataclasses.replace(config, warmup=warmup_of(config) if warmup is None else warmup)
    runs.check_hosts_agree(facts_of(config))

    # The data: what the model reads follows from --data, --seed and the step alone.
    with runs.together():  # process 0 first, as it may have to write them
        data = open_data(config) if leads() else None
    with runs.together():
        trained, asked, arch = data or open_data(config)
    runs.check_hosts_agree({f"data {rows.name}": rows.part.digest for rows in trained + asked})
    heldout = find_heldout(trained, asked, config.heldout_fraction, say)
    facts = [rows.facts() for rows in trained]
    if before and not config.accept_new_data:
        check_same_data(before, facts)
    flags, defaults = (json.loads(json.dumps(vars(c), default=str)) for c in (config, Config()))
    about = {"model": dataclasses.asdict(arch), "tokenizer": facts[0]["tokenizer"]}

    # The state: the newest whole checkpoint, or else random weights or those of --init.
    mesh = make_mesh(config.mesh, arch, config.batch, config.accumulate, bytes_a_weight(config))
    memories = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    if config.remat == "offload" and "pinned_host" not in memories:
        raise UserError(f"--remat offload needs pinned host memory, here is {memories}: take --remat full")
    noted = {"data": facts, "format": tokenize_data.FORMAT}
    runs.begin_run(out / "config.json", flags, defaults, MAY_CHANGE, about, noted)
    checkpoints = runs.Checkpoints(out / "checkpoints", config.keep, config.milestone_every)
    first = checkpoints.newest
    batches = on_devices(mesh, read_rows(config, trained, arch, mesh, first), config.batch)
    optimizer, schedule = make_optimizer(config)
    init = None if first else config.init
    state, shardings = make_state(arch, optimizer, mesh, config.seed, init, about["tokenizer"])
    if first:
        state = checkpoints.restore(state)
        say(f"resuming {out} at step {first}")
    if leads():
        runs.keep_log_until(log, first)

    dtype = jnp.dtype(runs.compute_dtype(config.dtype))
    size, device = lvm.parameter_count(arch), jax.devices()[0].device_kind
    say(f"{config.size}: {size:,} parameters, {dtype.name} on {mesh.size} {device}")
    entropy = unigram_entropy(trained)
    say(f"baseline: the entropy of the unigram distribution is {entropy:.3f} nats a code")
    kinds = heldout_kinds(heldout, arch, mesh.shape["data"] * mesh.shape["fsdp"], say)
    if not kinds:
        say(
            "no held-out loss: no sentence is withheld from the training; --heldout-fraction 0.01 does it."
            " The sample pictures are of training sentences"
        )
    length = arch.context if config.packing == "concat" else attended_length(trained)
    tokens, flops = tokens_until(log, first) if leads() else 0, lvm.training_flops(arch, length)
    meter = Meter(tokens, flops, peak_rates(dtype))
    specs = lvm.partition_specs(state["model"])
    loss_fn = make_loss(mesh, specs, dtype, config.remat, config.z_loss)
    eval_fn = jax.jit(make_loss(mesh, specs, dtype))
    evaluate_every = config.save_every if config.evaluate_every is None else config.evaluate_every
    pending, stopping, step = collections.deque(), False, first
    if first < config.steps:
        batch = next(batches)
        with meter.clock("compile"):
            train_step = make_train_step(loss_fn, optimizer, config.accumulate, shardings)
            train_step = train_step.lower(state, batch).compile()
    with (
        runs.asked_to_stop() as stop,
        checkpoints,
        runs.open_log(out, config.log, flags, first) as write,
        tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True, disable=not leads()) as bar,
    ):
        for step in range(first + 1, config.steps + 1):
            if config.profile and step == first + 2:
                with side_work(f"--profile {config.profile}"):
                    jax.profiler.start_trace(config.profile)
            state, metrics = train_step(state, batch)  # returns at once, while the devices work
            pending.append((step, metrics))
            bar.update()
            with meter.clock("input"):
                batch = next(batches)
            stopping = stop(step) and step < config.steps
            saving = step % config.save_every == 0 or step == config.steps or stopping
            evaluating = bool(evaluate_every) and (step % evaluate_every == 0 or step == config.steps)
            now = saving or evaluating
            while len(pending) > (not now):  # metrics are fetched one step late: no device waits for us
                done, metrics = pending.popleft()
                metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
                meter.tokens += metrics.pop("targets")
                runs.check_health(done, metrics, config.patience, checkpoints.newest)
                if done % config.log_every and (done < step or not now):
                    continue
                line = meter.line(done, metrics)
                line["learning_rate"] = float(schedule(done - 1 - metrics["skipped"]))
                bar.set_postfix(loss=f"{line['loss']:.3f}", tokens=f"{line['tokens_per_second']:,.0f}/s")
                if kinds and evaluating and done == step:
                    with meter.clock("evaluate"):
                        line |= heldout_losses(eval_fn, state["model"], kinds, mesh)
                write(line)
            if config.profile and step == min(first + 4, config.steps) > first + 1:
                jax.block_until_ready(state)
                with side_work(f"--profile {config.profile}"):
                    jax.profiler.stop_trace()
            if saving:  # the log is written already: no step of a checkpoint is missing there
                with meter.clock("checkpoint"):
                    checkpoints.save(step, state)
            if evaluating:
                with meter.clock("evaluate"):
                    model = state["model"]
                    if jax.process_count() > 1:
                        model = multihost_utils.process_allgather(model, tiled=True)
                    with side_work("the sample picture"):
                        if leads():
                            sample_picture(config.tokenizer, model, heldout or trained, picture(step))
            if stopping:
                break
        checkpoints.finish(step, state, config.save_patience)
    if stopping:
        say(f"stopped at step {step} of {config.steps} by a signal; the same command goes on from there")
    elif leads():
        look = f"look at {picture(step)}, then" if picture(step).exists() else "now"
        say(f"""done: {out} ({last_loss(log)}, unigram entropy {entropy:.3f}); {look} type
    python sample.py --model {out}
    python evaluate.py shots --model {out}""")
    return state["model"]


# -------------------------------------------------------------------------------------- loss, step, optimizer


def make_loss(mesh, specs, dtype, remat="none", z_loss=0.0, implementation=None):
    """loss(model, ids_BT, mask_BT[, segment_ids_BT]): the mean over the whole batch, computed shard by shard.

    Differentiate it outside the shard_map: the transpose of each gather below is then the reduce-scatter of
    its gradient. `implementation` is `flash_attention`'s; None picks for the mesh's devices."""
    ranks, parts = mesh.shape["seq"], mesh.shape["tensor"]
    ring = "seq" if ranks > 1 else None

    def gather(weights):
        def whole(path, w):
            name = path[-1].name
            w = own_columns(w) if name == "head_DV" else w
            w = lax.pcast(w, ("data", "seq"), to="varying")  # gradients are summed in shards, not whole
            if w.ndim > 1 and name != "embedding_VD":  # `LVM.embed` casts what it has looked up
                w = w.astype(dtype)
            if "fsdp" in (axes := lvm.SHARDING[name]):
                return lax.all_gather(w, "fsdp", axis=axes.index("fsdp"), tiled=True)
            return lax.pcast(w, "fsdp", to="varying")

        return jax.tree.map_with_path(whole, weights)

    def own_columns(head_DV):
        """This device's columns of the head along "tensor", as many for each, in whole lanes of 128."""
        width = -(-head_DV.shape[1] // (128 * parts)) * 128
        head_DV = jnp.pad(head_DV, ((0, 0), (0, width * parts - head_DV.shape[1])))
        return lax.dynamic_slice_in_dim(head_DV, lax.axis_index("tensor") * width, width, axis=1)

    def shard_loss(model, ids_BT, targets_BT, mask_BT, segment_ids_BT=None):
        options = {"remat": remat, "ring": ring, "z_loss": z_loss, "implementation": implementation}
        options |= {"gather": gather, "reduce": lambda x: lax.psum(x, "tensor"), "vocabulary": "tensor"}
        losses_BT = model.losses(ids_BT, targets_BT, segment_ids_BT, dtype=dtype, **options)
        loss, _ = lvm.mean_of_rows(losses_BT, mask_BT, whole_row=lambda sum_B: lax.psum(sum_B, "seq"))
        return lax.pmean(loss, ("data", "fsdp"))

    def loss(model, ids_BT, mask_BT, *segment_ids_BT):
        rows = [ids_BT, *lvm.next_tokens(ids_BT, mask_BT), *segment_ids_BT]
        if ring:  # whole chunks for all, in the order that gives each device as much work
            rows = [jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % (2 * ranks)))) for x_BT in rows]
            rows = [x_BT[:, zigzag(x_BT.shape[1], ranks)] for x_BT in rows]
        in_specs = (specs, *[P(*ROWS, "seq")] * len(rows))
        return jax.shard_map(shard_loss, mesh=mesh, in_specs=in_specs, out_specs=P())(model, *rows)

    return loss


def make_train_step(loss_fn, optimizer, accumulate, shardings):
    """train_step(state, batch) -> (state, metrics): pure, jitted, its state donated."""

    def train_step(state, batch):
        model = state["model"]
        of_rows = lambda rows: jax.value_and_grad(loss_fn)(model, *(rows[k] for k in ROW_KEYS if k in rows))
        if accumulate == 1:
            loss, grads = of_rows(batch)
        else:  # micro-batch a takes rows a, a + A, ... so that no row changes its device
            split = lambda x_BT: x_BT.reshape(-1, accumulate, x_BT.shape[1]).swapaxes(0, 1)
            add = lambda total, rows: (jax.tree.map(jnp.add, total, of_rows(rows)), None)
            zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, model)
            total, _ = lax.scan(add, zero, jax.tree.map(split, batch))
            loss, grads = jax.tree.map(lambda x: x / accumulate, total)
        updates, moments = optimizer.update(grads, state["optimizer"], model)
        new = {"model": optax.apply_updates(model, updates), "optimizer": moments}
        norm = optax.global_norm(grads)
        new = runs.skip_bad_step(new, state, loss, {"loss": loss, "norm": norm})
        counts = {name: new["guard"][name] for name in ("skipped", "in_a_row")}
        targets = jnp.count_nonzero(batch["mask_BT"][:, 1:])  # the first of a row is nobody's target
        return new, {"loss": loss, "grad_norm": norm, **counts, "targets": targets}

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_optimizer(config: Config):
    """(clipping by the global norm and the update, the learning rate of an update counted from 0)"""
    schedule, b1, b2, decay = make_schedule(config), config.b1, config.b2, config.weight_decay
    by_name = lambda of: lambda model: jax.tree.map_with_path(lambda path, w: of(path[-1].name, w), model)
    decayed = by_name(lambda name, w: config.decay_norms or "norm" not in name)
    if config.optimizer == "palm":
        update = palm(schedule, b1, b2, decay, decayed, config.moments)
    elif config.optimizer == "adamw":
        update = optax.adamw(schedule, b1, b2, weight_decay=decay, mask=decayed)
    else:
        # How many axes of a matrix are summed over, after that of the stacked layers; the rest it makes.
        summed = {"q_DNK": 1, "k_DNK": 1, "v_DNK": 1, "o_NKD": 2, "gate_DF": 1, "up_DF": 1, "down_FD": 1}

        def axes(name, w):
            if n := summed.get(name):
                return optax.contrib.MuonDimensionNumbers(tuple(range(1, 1 + n)), tuple(range(1 + n, w.ndim)))

        options = {"consistent_rms": 0.2, "muon_weight_dimension_numbers": by_name(axes)}
        muon = optax.contrib.muon(schedule, adam_b1=b1, adam_b2=b2, **options)
        # Its own decay knows no mask for the weights that are left to Adam.
        update = optax.chain(muon, optax.add_decayed_weights(lambda count: -decay * schedule(count), decayed))
    if config.moments != "float32" and config.optimizer != "palm":
        update = with_narrow_moments(update, config.moments)
    return optax.chain(optax.clip_by_global_norm(config.clip), update), schedule


def make_schedule(config: Config):
    """The learning rate of an update, counted from 0: linear warm-up, then as --schedule says."""
    peak, warmup, steps = config.learning_rate, warmup_of(config), config.steps
    last = config.final_learning_rate * peak
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, last)
    if config.schedule == "rsqrt":  # the peak for `warmup` updates
        return lambda count: peak * jnp.sqrt(max(warmup, 1) / jnp.maximum(count, max(warmup, 1)))
    decay = max(1, round(config.decay_fraction * steps))
    rise, fall = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, last, decay)
    return optax.join_schedules((rise, optax.constant_schedule(peak), fall), [warmup, steps - decay])


def palm(schedule, b1, b2, weight_decay, decayed, moments):
    """Adafactor without factors, as in the PaLM paper (arXiv 2204.02311, section 5) and in EasyLM: steps in
    proportion to the RMS of each weight of each layer, a second moment whose decay 1 - t^-b2 grows with the
    update t, momentum of the steps, and weights that decay by `weight_decay` times the square of the learning
    rate (1 in the paper; EasyLM writes 1e-4). The momentum has the dtype `moments`; the second moment would
    lose its late, small steps in less than float32."""

    def scale(path, u, w):
        layers = path[0].name == "blocks"  # the first axis is the layer
        rms = jnp.sqrt(jnp.mean(w**2, axis=tuple(range(layers, w.ndim)), keepdims=True))
        return u * jnp.maximum(rms, 1e-3)

    return optax.chain(
        optax.scale_by_factored_rms(factored=False, decay_rate=b2),
        optax.scale_by_schedule(schedule),
        optax.stateless(lambda updates, weights: jax.tree.map_with_path(scale, updates, weights)),
        optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(moments)),
        optax.scale(-1),
        optax.add_decayed_weights(lambda count: -weight_decay * schedule(count) ** 2, decayed),
    )


def with_narrow_moments(update, dtype):
    """The same update, with its moments kept in `dtype` between steps. They bear the names of their weights;
    what else a state holds, such as Muon's coefficients, stays as it is."""
    moment = lambda path: getattr(path[-1], "name", None) in lvm.SHARDING
    cast = lambda state, to: jax.tree.map_with_path(lambda p, x: x.astype(to) if moment(p) else x, state)

    def step(grads, state, weights):
        updates, state = update.update(grads, cast(state, jnp.float32), weights)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda weights: cast(update.init(weights), dtype), step)


# --------------------------------------------------------------------------------------------- state and mesh


def make_state(arch, optimizer, mesh, seed=0, init: Path | None = None, tokenizer: str | None = None):
    """({"model", "optimizer", "guard"}, their shardings): every leaf is born on the devices that keep it.

    The weights are random, or those of `init`. Raises UserError where those have other shapes, or were
    trained on codes of another tokenizer than that with the fingerprint `tokenizer`."""
    _, shardings = abstract_state(arch, optimizer, mesh)
    if init is None:
        random = lambda: new_state(lvm.LVM(arch, key=jax.random.key(seed)), optimizer)
        return jax.jit(random, out_shardings=shardings)(), shardings
    file = init / "config.json"
    known = read_json(file).get("tokenizer") if file.is_file() else None
    if None not in (known, tokenizer) and known != tokenizer:
        raise UserError(
            f"--init {init} was trained on codes of the tokenizer {known}, and the data are of {tokenizer}:"
            " tokenize them with the first one"
        )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # one of the mesh may be too small for it
        given = lvm.load(init)
    # No weight's shape or meaning depends on these.
    free = {name: getattr(arch, name) for name in ("context", "bos_id", "eos_id", "pad_id")}
    if dataclasses.replace(given.config, **free) != arch:
        raise UserError(f"--init {init} holds {given.config}, --size and the data ask for {arch}")
    leaves, tree = jax.tree.flatten(shardings["model"])
    weights = [place(w, sharding) for w, sharding in zip(map(np.asarray, jax.tree.leaves(given)), leaves)]
    new = jax.jit(lambda model: new_state(model, optimizer), out_shardings=shardings, donate_argnums=0)
    return new(jax.tree.unflatten(tree, weights)), shardings


def place(x, sharding):
    """An array of the host on the devices of the mesh, each of which takes its part."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def new_state(model, optimizer):
    return {"model": model, "optimizer": optimizer.init(model), "guard": runs.new_guard(accepted="taken")}


def abstract_state(arch, optimizer, mesh):
    """(the state's shapes, its shardings)"""
    model = functools.partial(lvm.LVM, arch, key=jax.random.key(0))
    shapes = eqx.filter_eval_shape(lambda: new_state(model(), optimizer))
    specs, is_leaf = lvm.partition_specs(shapes), lambda x: isinstance(x, P)
    return shapes, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_leaf)


def bytes_a_weight(config: Config) -> int:
    """Of the weight, its gradient and its two moments."""
    moment = jnp.dtype(config.moments).itemsize
    return 8 + moment + (4 if config.optimizer == "palm" else moment)


def parse_mesh(text: str) -> list[int] | None:
    """The sizes along AXES, or None for auto."""
    sizes = [int(n) for n in re.findall(r"-?[0-9]{1,9}", text)]
    fits = len(sizes) == len(AXES) and sizes.count(-1) < 2 and min(sizes) >= -1 and 0 not in sizes
    if text != "auto" and not (fits and text == ",".join(map(str, sizes))):
        raise UserError(f"--mesh {text}: wanted auto or four numbers {','.join(AXES)}, such as 1,-1,1,1")
    return sizes or None


def make_mesh(asked, arch, batch, accumulate=1, bytes_a_weight=16, devices=None, memory=None):
    """The mesh of --mesh over all devices: fsdp, tensor and seq next to each other within a node or slice,
    data across. `memory` is a device's in bytes; None asks it. Raises UserError where the devices, the model
    or the batch do not divide by it."""
    devices = devices or jax.devices()
    on_tpu, n = devices[0].platform == "tpu", len(devices)
    slices = len({getattr(device, "slice_index", None) for device in devices}) if on_tpu else 1
    sizes, reason = parse_mesh(asked), "as asked for"
    if sizes is None:
        memory = memory or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        group, state = n // slices if on_tpu else min(8, n), bytes_a_weight * lvm.parameter_count(arch)
        sizes, reason = choose_mesh(arch, batch // accumulate, state, n, group, memory, slices)
    elif -1 in sizes:
        sizes[sizes.index(-1)] = n // -math.prod(sizes)
    if math.prod(sizes) != n:
        raise UserError(f"--mesh {asked} does not make use of exactly the {n} devices that are here")
    heads = math.gcd(arch.heads, arch.ffn)
    for axis, size, name, whole in (
        ("fsdp", sizes[1], "hidden size", arch.hidden),
        ("tensor", sizes[2], "heads and ffn", heads),
        ("data x fsdp x micro-batches", sizes[0] * sizes[1] * accumulate, "--batch", batch),
    ):
        if whole % size:
            fit = ", ".join(str(m) for m in range(1, 2 * size) if whole % m == 0)
            raise UserError(f"--mesh {asked}: {axis} {size} does not divide the {name}; take one of {fit}")
    if sizes[0] % slices:
        raise UserError(f"--mesh {asked}: data {sizes[0]} is no multiple of the {slices} slices")
    print(f"mesh {','.join(map(str, sizes))} ({','.join(AXES)}): {reason}")
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:  # which data alone crosses
        within = (sizes[0] // slices, *sizes[1:])
        array = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), **options)
    elif on_tpu:
        array = mesh_utils.create_device_mesh(sizes, **options)
    else:  # in the order of their processes: neighbours share a node
        array = np.array(devices).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def choose_mesh(arch, rows: int, state: int, devices: int, group: int, memory, slices=1):
    """(sizes, reason) of --mesh auto, for `rows` sentences a micro-batch and a `state` of so many bytes.

    A `group` is a node of GPUs or a slice of TPUs, where gathers are quick; `memory` in bytes a device, None
    where devices share it. Between `slices` goes data alone."""
    if devices == 1:
        return (1, 1, 1, 1), "one device"
    if memory is None:
        shards, reason = 1, "these devices share one memory, so nothing is gained by splitting weights"
    else:
        half = memory / 2
        shards = 1 if state <= half else group if state <= half * group or slices > 1 else devices
        where = f"split over {shards} devices" if shards > 1 else "every device holds them all"
        told = f"weights, gradients and moments take {state / 1e9:.1f} GB"
        reason = f"{told} of a device's {memory / 1e9:.0f} GB: {where}"
    # The devices that work on one row do so by tensor, or else by seq. The last choice always fits.
    for seq, tensor in (*itertools.product((1, 2, 4, 8), (1, 2, 4, 8)), (devices, 1)):
        workers, rest = divmod(devices, tensor * seq)
        if not (rest or arch.heads % tensor or arch.ffn % tensor or rows % max(1, workers)):
            fit = [m for m in range(1, min(workers, shards) + 1) if workers % m == arch.hidden % m == 0]
            if tensor * seq > 1:
                reason += f"; {rows} rows a micro-batch do not divide by them: {tensor * seq} devices a row"
            return (workers // fit[-1], fit[-1], tensor, seq), reason


def start_processes(coordinator, processes, process, heartbeat: int):
    """Joins the processes of a run on several hosts, before JAX looks for devices. JAX reads their number and
    addresses from the environment of SLURM's srun, of Open MPI's mpirun (from version 5 on with
    --coordinator) and of TPU pods."""
    if jax.distributed.is_initialized():
        return
    found = os.environ.get
    srun = int(found("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ
    mpirun = int(found("OMPI_COMM_WORLD_SIZE", 1)) > 1
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if coordinator and processes is None and mpirun:
        processes, process = int(found("OMPI_COMM_WORLD_SIZE")), int(found("OMPI_COMM_WORLD_RANK"))
    if coordinator or srun or mpirun or (chips and found("JAX_PLATFORMS", "tpu") == "tpu"):
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=heartbeat)


# ------------------------------------------------------------------------------------------ the data


class Sentences(NamedTuple):
    """Some sentences of a dataset: its path, all of it, its weight in the mixture, numbers of those meant."""

    name: str
    part: tokenize_data.Shards
    weight: float
    chosen_N: np.ndarray

    def facts(self) -> dict:
        names = ("tokenizer", "sentences", "tokens", "kinds")
        return {"path": self.name, "digest": self.part.digest} | {k: self.part.about[k] for k in names}


def open_data(config: Config):
    """-> (training datasets, [that of --heldout], the model's config with their codebook). Demo sentences are
    composed where they are wanted and not there yet."""
    demo, data, heldout = config.out / "data", config.data, config.heldout
    if not data:
        data, heldout = [str(demo / "train")], heldout or demo / "heldout"
        for split, count in (("train", config.demo_sentences), ("heldout", 64)):
            if not (folder := demo / split).exists():
                print(f"composing {count} demo sentences ({split}) in {folder}")
                tokenize_data.demo(tokenize_data.Demo(folder, count, split=split, tokenizer=config.tokenizer))
    pairs = list(map(tokenize_data.split_weight, data))
    folders = {
        path: tokenize_data.open_sentences(path) for path, _ in pairs if not tokenize_data.is_lines(path)
    }
    codes = next((part.codes for part in folders.values()), lvm.SIZES[config.size].codes)
    arch = arch_for(config, codes)
    options = (codes, specials_of(arch), config.fields, arch.vocab_size, demo)

    def opened(path, weight=1.0):
        part = folders.get(path) or tokenize_data.open_sentences(path, *options)
        return Sentences(path, part, weight, np.arange(len(part)))

    return list(itertools.starmap(opened, pairs)), [opened(str(heldout))] if heldout else [], arch


def arch_for(config: Config, codes: int) -> lvm.LVMConfig:
    """That of the size, with another codebook, and the context and special ids that were asked for."""
    size, ids = lvm.SIZES[config.size], config.special_ids or ()
    try:
        asked = dict(zip(("bos_id", "eos_id", "pad_id"), ids))
        return dataclasses.replace(size, codes=codes, context=config.context or size.context, **asked)
    except UserError as error:
        raise UserError(f"--special-ids {' '.join(map(str, ids))}: {error}") from None


def specials_of(arch) -> tuple[int, int, int]:
    return arch.bos, arch.eos, arch.pad


def read_rows(config: Config, trained: list[Sentences], arch, mesh, start: int):
    """The rows that this process feeds its devices at each step from `start` on."""
    process, processes = rows_of_process(mesh, config.batch, jax.process_index())
    return tokenize_data.open_dataset(
        [(rows.part, rows.weight) for rows in trained],
        **{name: getattr(config, name) for name in ("batch", "seed", "packing", "heldout_fraction")},
        context=arch.context,
        specials=specials_of(arch),
        start=start,
        process=process,
        processes=processes,
    )


def rows_of_process(mesh, batch: int, process: int) -> tuple[int, int]:
    """(part, parts): a process feeds its devices the part-th of so many equal parts of a batch, in order.

    The rows of its devices need not be neighbours: a host of TPUs is a block of the torus. Processes that
    split a sentence or a matrix between them read the same rows. Where the rows of two processes differ and
    yet have some in common, (0, 1): all read the whole batch."""
    rows_of = collections.defaultdict(set)
    for device, (rows,) in NamedSharding(mesh, ROWS).devices_indices_map((batch,)).items():
        rows_of[device.process_index].add(rows.start or 0)
    sets = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if len({len(rows) for rows in sets}) > 1 or sum(map(len, sets)) > len(set().union(*sets)):
        return 0, 1
    return sets.index(tuple(sorted(rows_of[process]))), len(sets)


def on_devices(mesh, batches, batch: int, ahead=2):
    """Yields batches of so many rows in all, sent to the devices two steps before they are wanted."""
    coming, sharding = collections.deque(), NamedSharding(mesh, ROWS)
    send = lambda x_BT: jax.make_array_from_process_local_data(sharding, x_BT, (batch, *x_BT.shape[1:]))
    for rows in batches:
        coming.append(jax.tree.map(send, rows))
        if len(coming) > ahead:
            yield coming.popleft()


def attended_length(trained: list[Sentences]) -> float:
    """Tokens of its sentence, among which a token attends: the mean over the tokens of the mixture."""
    mean = lambda power: sum(t.weight * np.mean(t.part.row_lengths_N.astype(float) ** power) for t in trained)
    return mean(2) / mean(1)


def unigram_entropy(trained: list[Sentences]) -> float:
    """Entropy in nats of the codes' frequencies in the mixture: the loss of who knows these alone."""
    p_V = sum(rows.weight * rows.part.code_counts() / len(rows.part) for rows in trained)
    p_V = p_V[p_V > 0] / p_V.sum()
    return float(-(p_V * np.log(p_V)).sum())


def find_heldout(trained: list, asked: list, fraction=0.0, say=print) -> list[Sentences]:
    """Sentences that are never trained on: of the one dataset `asked` those that the training data do not
    hold too, or else the `fraction` of each training dataset that `open_dataset` leaves out."""
    none = lambda part, fraction: np.zeros(len(part), bool)
    withheld = functools.partial(tokenize_data.is_heldout if fraction else none, fraction=fraction)
    if not asked:
        found = [rows._replace(chosen_N=np.flatnonzero(withheld(rows.part))) for rows in trained]
        for name, part, _, chosen_N in found if fraction else ():
            say(f"{name}: {len(chosen_N):,} of {len(part):,} sentences are withheld from the training")
        return [rows for rows in found if len(rows.chosen_N)]
    name, part, *_ = asked[0]
    twins, known = np.zeros(len(part), bool), set()  # by hashes of 32 bits, then by all tokens
    for path, other, *_ in trained:
        if part.codes != other.codes or len({part.about["tokenizer"], other.about["tokenizer"], None}) > 2:
            raise UserError(f"--heldout {name} was made by another tokenizer than {path}")
        twins |= np.isin(part.hashes_N, other.hashes_N)
        known |= {other[i][1].tobytes() for i in np.flatnonzero(np.isin(other.hashes_N, part.hashes_N))}
    twins &= ~withheld(part)
    twins[twins] = [part[n][1].tobytes() in known for n in np.flatnonzero(twins)]
    if twins.all():
        raise UserError(
            f"--heldout {name}: all of its {len(part):,} sentences are among those of --data; name other"
            " data, or use --heldout-fraction 0.01"
        )
    if twins.any():
        say(f"--heldout {name}: {twins.sum():,} of its {len(part):,} sentences are trained on, and left out")
    return [asked[0]._replace(chosen_N=np.flatnonzero(~twins))]


def heldout_kinds(heldout: list[Sentences], arch, rows: int, say=print, most=32) -> dict:
    """Held-out sentences -> {kind: (its share of the loss, how many are taken, batches of `rows` rows of ids
    and masks)}; kinds of several datasets are named "dataset/kind".

    The share is that in the mixture of the training. About as many are taken of each kind, evenly spaced,
    `most` in all, each a row of its own, cut to the context. Rows that are left empty count for nothing."""
    names, groups, kinds = [Path(held.name).stem for held in heldout], {}, {}
    names = names if len(set(names)) == len(names) else [held.name for held in heldout]
    for name, (_, part, weight, chosen_N) in zip(names, heldout):
        kinds_N = part.kinds_N[chosen_N]
        for kind in np.unique(kinds_N):
            label = part.kinds[kind] if len(heldout) == 1 else f"{name}/{part.kinds[kind]}"
            share = weight / sum(held.weight for held in heldout) * np.mean(kinds_N == kind)
            groups[label] = share, part, chosen_N[kinds_N == kind]
    for label, (share, part, members_N) in groups.items():
        count = min(len(members_N), -(-most // len(groups) // rows) * rows)
        say(f"held-out loss of {label}: of {count} of {len(members_N):,} sentences")
        ids_NT = np.full((-(-count // rows) * rows, arch.context), arch.pad, np.int32)
        mask_NT = np.zeros(ids_NT.shape, np.float32)
        for n, i in enumerate(members_N[np.linspace(0, len(members_N) - 1, count).astype(int)]):
            ids_T, counts_T = part.row(i, specials_of(arch))
            T = min(len(ids_T), arch.context)
            ids_NT[n, :T], mask_NT[n, 1:T] = ids_T[:T], counts_T[1:T]
        batches = [(ids_NT[n : n + rows], mask_NT[n : n + rows]) for n in range(0, len(ids_NT), rows)]
        kinds[label] = share, count, batches
    return kinds


def heldout_losses(eval_fn, model, kinds: dict, mesh) -> dict[str, float]:
    """The held-out loss of every kind, and their mean by its share."""
    losses, loss, sharding = {}, 0.0, NamedSharding(mesh, ROWS)
    for kind, (share, count, batches) in kinds.items():
        means = [float(eval_fn(model, *(place(x_BT, sharding) for x_BT in arrays))) for arrays in batches]
        losses[f"heldout_loss/{kind}"] = sum(means) * len(batches[0][0]) / count
        loss += share * losses[f"heldout_loss/{kind}"]
    perplexity = math.exp(min(loss, 700))
    return {"heldout_loss": loss, "heldout_perplexity": perplexity} | (losses if len(losses) > 1 else {})


def sample_picture(tokenizer_path: Path, model, chosen: list[Sentences], path: Path, rows=6):
    """Rows of some sentences: all but the last picture, the true last one, and the model's likeliest one."""
    tokenizer, context = vqgan.load(tokenizer_path), model.config.context
    ours = vqgan.fingerprint(tokenizer)
    pool = [(c.part, i) for c in chosen if c.part.about["tokenizer"] == ours for i in c.chosen_N]
    if not pool:
        warn(
            f"no sample pictures: the sentences were not made by --tokenizer {tokenizer_path}, or do not say "
            "so, as a .jsonl: name theirs, or make shards of it with python tokenize_data.py import-jsonl"
        )
        return
    S = pool[0][0].about["codes_per_image"]
    if (most := (context - 1) // S * S) < 2 * S:
        warn(f"no sample pictures: --context {context} holds no two pictures of {S} codes after BOS")
        return
    codes = [pool[n][0][pool[n][1]][1] for n in np.linspace(0, len(pool) - 1, rows).astype(int)]
    codes_BT = np.stack([c[-most:] for c in codes if len(c) == len(codes[0])]).astype(np.int32)
    prompt_BT = np.pad(codes_BT[:, :-S], ((0, 0), (1, 0)), constant_values=model.config.bos)
    model = jax.device_put(model, jax.local_devices()[0])
    answer_BS = jax.jit(lvm.greedy, static_argnums=2)(model, jnp.asarray(prompt_BT), S)
    codes_NS = np.concatenate([codes_BT, answer_BS], axis=1).reshape(-1, S)
    pixels = np.asarray(vqgan.decode(tokenizer, codes_NS))
    rows = sheet(list(pixels.reshape(len(codes_BT), -1, *pixels.shape[1:])), captions=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encode_image(rows, path))


# --------------------------------------------------------------------------- the run and its numbers


def facts_of(config: Config) -> dict[str, str]:
    """What all hosts must have alike before they compute together: flags, program, libraries, devices."""
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    flags = {k: str(v) for k, v in vars(config).items() if k not in ("process", "profile")}
    return {f"--{k.replace('_', '-')}": v for k, v in flags.items()} | {
        "code": runs.code_digest() + own,
        "versions": f"jax {jax.__version__}, numpy {np.__version__}",
        "devices of a host": str(jax.local_device_count()),
    }


def settings_of(out: Path) -> dict:
    """config.json of the run that is resumed; {} where there is none, or a damaged one (see `begin_run`)."""
    with contextlib.suppress(UserError):
        if runs.steps_of(out / "checkpoints"):
            settings = read_json(out / "config.json")
            return settings if isinstance(settings.get("train"), dict) else {}
    return {}


def check_same_data(before: dict, facts: list[dict]):
    """Raises UserError where a dataset of a run that goes on is not what it was, with the difference, or
    where an older program, which read the rows in another order, began it."""
    if before.get("format") != tokenize_data.FORMAT:
        raise UserError(
            f"--out holds a run of format {before.get('format', 'below 3')}, which read the data in another"
            f" order than this program's {tokenize_data.FORMAT}: start from its weights with --init and"
            " another --out, or go on in the new order by --accept-new-data"
        )
    for old, new in zip(before.get("data", []), facts):
        if old["path"] == new["path"] and old != new:
            differ = ", ".join(f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v)
            raise UserError(
                f"the data were changed since this run began ({new['path']}: {differ}): put them back, or go"
                " on with the new ones by --accept-new-data"
            )


def read_log(log: Path) -> list[dict]:
    """The lines of a metrics.jsonl; `keep_log_until` has mended it."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def last_loss(log: Path) -> str:
    """What a run has come to: its last held-out loss, or, where it has none, the loss of the last batch."""
    number = lambda line, name: "no finite number" if line[name] is None else f"{line[name]:.3f}"
    lines = read_log(log)
    if measured := [line for line in lines if "heldout_loss" in line]:
        return f"held-out loss {number(measured[-1], 'heldout_loss')} at step {measured[-1]['step']}"
    told = number(lines[-1], "loss") if lines else "unknown"
    return f"training loss {told} of the last batch, none held out"


def tokens_until(log: Path, step: int) -> int:
    """The targets counted until `step`, by the last line of the log."""
    line = (read_log(log) or [{"step": 0}])[-1]
    if line["step"] < step:  # a full disk has swallowed it
        warn(f"{log} has no line of step {step}: its tokens are counted on from step {line['step']}")
    return line.get("tokens", 0)


class Meter:
    """Turns metrics into lines of the log, with the speed, the MFU and where the time since the start went.

    `tokens` counts the targets of the loss, so no padding; whoever has the metrics adds those of each step.
    `flops` a token, `peaks` of `peak_rates`."""

    def __init__(self, tokens: int, flops: float, peaks: dict[str, float]):
        self.tokens, self.flops, self.peaks, self.spent = tokens, flops, peaks, collections.Counter()
        self.began, self.last = time.monotonic(), (tokens, 0.0)

    @contextlib.contextmanager
    def clock(self, what: str):
        """The seconds of this block go to the share of `what`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] += time.monotonic() - began

    def line(self, step: int, metrics) -> dict[str, float]:
        seconds, away = time.monotonic() - self.began, self.spent.total()
        trained = seconds - away + self.spent["input"]  # the speed is that of training alone
        rate = (self.tokens - self.last[0]) / max(1e-6, trained - self.last[1])
        self.last = self.tokens, trained
        shares = {"compute": seconds - away, **self.spent}
        return {
            "step": step,
            **metrics,
            "tokens": self.tokens,
            "tokens_per_second": round(rate, 1),
            "seconds": round(seconds, 2),
            **{name: round(self.flops * rate / peak, 4) for name, peak in self.peaks.items()},
            **{f"share_{what}": round(share / seconds, 4) for what, share in shares.items()},
        }


# Dense bfloat16 TFLOP/s of a device, by the beginning of its device_kind.
NOMINAL = {
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459, "TPU v6 lite": 918, "TPU v6e": 918,
    "NVIDIA A100": 312, "NVIDIA H100 PCIe": 756, "NVIDIA H100": 989, "NVIDIA H200": 989, "NVIDIA B200": 2250,
    "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165}  # fmt: skip


def peak_rates(dtype) -> dict[str, float]:
    """FLOP/s of all devices that 100% stands for: {"mfu": nominal, for known kinds and bfloat16;
    "mfu_measured": of a large product of random matrices}. GPUs multiply constant ones faster, as fewer bits
    flip."""
    devices, n, rounds = jax.local_devices(), 1024 if jax.default_backend() == "cpu" else 8192, 0
    x_NN = jax.random.normal(jax.random.key(0), (n, n), dtype)
    copies, product = [jax.device_put(x_NN, device) for device in devices], jax.jit(lambda x_NN: x_NN @ x_NN)
    jax.block_until_ready(list(map(product, copies)))
    began = time.perf_counter()
    while time.perf_counter() - began < 0.2:
        rounds += 4
        jax.block_until_ready([product(x_NN) for x_NN in copies for _ in range(4)])
    rates = {"mfu_measured": 2 * n**3 * rounds * jax.device_count() / (time.perf_counter() - began)}
    known = [rate for kind, rate in NOMINAL.items() if devices[0].device_kind.startswith(kind)]
    return ({"mfu": known[0] * 1e12 * jax.device_count()} if known and dtype == jnp.bfloat16 else {}) | rates


# GPUs run collectives beside compute, issue the next layer's gathers in this one, join small collectives,
# leave products to cuBLAS, and rematerialise only what --remat says. TPUs do so by themselves.
GPU_FLAGS = """
--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_triton_gemm=false
--xla_gpu_enable_pipelined_all_gather=true --xla_gpu_all_gather_combine_threshold_bytes=134217728
--xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
--xla_gpu_enable_pipelined_all_reduce=true --xla_gpu_all_reduce_combine_threshold_bytes=134217728
--xla_gpu_enable_while_loop_double_buffering=true --xla_disable_hlo_passes=rematerialization""".split()


def tell_xla(platform: str | None = None):
    """Appends what GPUs need to XLA_FLAGS before a backend starts; a flag that the user has set stays as it
    is."""
    platform = platform or os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    plugins = [n for n in (12, 13) if importlib.util.find_spec(f"jax_cuda{n}_plugin")]
    if platform not in ("cuda", "gpu") and (platform or not plugins):
        return
    given = os.environ.get("XLA_FLAGS", "")
    names = {flag.split("=")[0] for flag in given.split()}
    if new := [flag for flag in GPU_FLAGS if flag.split("=")[0] not in names]:
        os.environ["XLA_FLAGS"] = " ".join([given, *new]).strip()
        print(f"XLA_FLAGS += {' '.join(new)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of the memory; 0.75 by default


def compile_only(config: Config) -> dict:
    """Compiles the step for --topology, prints what it takes, and returns that; `fits` says whether it
    does."""
    from benchmarks import pods

    tell_xla("cuda" if config.topology.startswith("h200") else "tpu")
    return pods.compile_only(config, sys.modules[__name__])


def run(config: Config):
    if config.compile_only:
        jax.config.update("jax_platforms", "cpu")
        sys.exit(0 if compile_only(config)["fits"] else 1)
    tell_xla()
    runs.keep_compiled(config.compilation_cache)
    train(config)


def main():
    # An orderly exit would first wait minutes for the other processes, which wait for this one.
    leave = lambda status: os._exit(status) if jax.distributed.is_initialized() else sys.exit(status)
    runs.run_command(run, tyro.cli(Config, description=__doc__, default=preset(sys.argv[1:])), leave=leave)


if __name__ == "__main__":
    main()
