"""Trains a Large Vision Model to predict the next code of visual sentences.

    python train.py                                    # the main job: a mini LVM on the embedded pictures, about ten minutes
    python train.py --size 300m --data DIR:0.7 DIR:0.3 --context 4098 --out runs/mine
    python train.py --data DIR --init lvm-hf --learning-rate 3e-5 --out runs/finetuned
    python train.py --preset lvm-7b --compile-only --topology v5p:4x4x4        # what a pod would make of it, without the pod

Run the same command again to resume: the weights, the moments and the place in the data are those of a run that was
never stopped, be it on other devices or another number of processes. A run folder holds config.json, metrics.jsonl,
checkpoints/ (orbax, with digests) and samples/ (pictures).

On several hosts start the same command on each: under SLURM's srun, Open MPI's mpirun and on TPU pods the processes find
each other; elsewhere add --coordinator HOST:PORT --processes N --process I. All of them see one disk.

Dimension key: A accumulated micro-batches, B sentences, T tokens of a sentence, V vocabulary, S codes of a picture.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax import lax
from jax.experimental import mesh_utils, multihost_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import lvm
import tokenize_data
import vqgan
from common.images import UserError
from common.runs import RunStopped, run_command
from common.weights import strict_json
from flash_attention import zigzag

AXES = ("data", "fsdp", "tensor", "seq")
ROWS = P(("data", "fsdp"))  # a batch is split over both
ROW_KEYS = ("ids_BT", "mask_BT", "segment_ids_BT")  # of a batch; the last only where a row holds several sentences


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["none", "lvm-7b"] = "none"
    """Other defaults for all flags that are not given (`PRESETS`). lvm-7b: the published recipe of the 7b."""
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
    accept_new_data: bool = False
    """Go on with a run though the data under the same paths are others than they were, such as tokenized anew."""
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
    optimizer: Literal["adamw", "palm", "muon"] = "adamw"
    """adamw, as published; palm, the published alternative (Adafactor without factors; with --schedule rsqrt --b2 0.99
    --weight-decay 1 --learning-rate 0.01 --warmup 10000 it is that of PaLM); or muon for the blocks' matrices (scaled to
    AdamW's step, so that the same learning rate serves both) with adamw for the rest."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    schedule: Literal["cosine", "wsd", "rsqrt"] = "cosine"
    """After the warm-up: cosine, as published, down to the final rate at the last step; wsd, the peak, then a line down over
    the last --decay-fraction, so that a run can be lengthened before it; rsqrt, PaLM's, with no final rate."""
    decay_fraction: float = 0.2
    """Part of the steps over which wsd falls."""
    final_learning_rate: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    warmup: int = 40
    """Steps from 0 to the peak."""
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
    """Compute dtype; weights and moments are float32. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    mesh: str = "auto"
    """Devices along data, fsdp, tensor, seq; one may be -1 for all that are left, such as 1,-1,1,1. fsdp splits weights and
    moments, tensor heads and feed-forward width, seq the tokens of each sentence. auto chooses, and says why."""
    remat: Literal[tuple(lvm.REMAT)] = "none"
    """What the backward pass computes again. none: nothing but gathers; minimal: elementwise work; full: each block, a third
    more compute for the least memory; offload: as full, with the blocks' inputs in the host's memory."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in the gradient, which keeps logits small; PaLM takes 1e-4."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Stored dtype of the optimizer's moments; bfloat16 saves four bytes a weight."""
    compile_only: bool = False
    """Compile the training step for the chips of --topology, which need not be here, say what it takes, and stop: exit
    status 1 where it does not fit. Needs no data, but the packages of tests/compilers.txt."""
    topology: str | None = None
    """Chips for --compile-only: v4:2x2x4, v5e:16x16, v5p:4x4x8, v6e:8x8, two slices of them v5e:16x16*2, or h200:16."""
    compilation_cache: str = "auto"
    """Folder for compiled programs, so that a resumed run starts at once; auto: one in the user's cache; off: none."""
    demo_sentences: int = 960
    """Sentences to make where --data is empty."""
    save_every: int = 50
    """Steps between checkpoints; they are written while the training goes on."""
    keep: int = 2
    """Checkpoints to keep, the newest ones."""
    milestone_every: int | None = None
    """Also keep the checkpoints whose step is a multiple of this."""
    evaluate_every: int | None = None
    """Steps between held-out losses (of every kind of sentence) and sample pictures, 0 for never; by default --save-every."""
    log_every: int = 5
    """Steps between lines of metrics.jsonl."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where to send these lines besides; each needs its package (for tensorboard: tensorboardX)."""
    profile: Path | None = None
    """Write a trace of three steps, the second to the fourth of this start, to this folder, for TensorBoard or Perfetto."""
    patience: int = 20
    """A step whose loss or gradient norm is no finite number, or a hundred times the usual, is left out; stop after so
    many in a row."""
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
        for name in ("steps", "batch", "accumulate", "save_every", "log_every", "demo_sentences", "keep", "patience", "heartbeat"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if (self.evaluate_every or 0) < 0 or (self.milestone_every or 1) < 1:
            raise UserError(f"--evaluate-every must be at least 0 and --milestone-every at least 1, got {self.evaluate_every} and {self.milestone_every}")
        if (self.processes is None) != (self.process is None) or self.processes and not (self.coordinator and 0 <= self.process < self.processes):
            raise UserError(f"wanted --coordinator HOST:PORT --processes N --process I with I from 0 to N - 1, got {self.coordinator}, {self.processes}, {self.process}")
        for package in self.log:
            module = {"tensorboard": "tensorboardX"}.get(package, package)
            if importlib.util.find_spec(module) is None:
                raise UserError(f"--log {package} needs a package that is not installed here; type: pip install {module}")
        if self.batch % self.accumulate:
            raise UserError(f"--batch {self.batch} is not a multiple of --accumulate {self.accumulate}")
        if self.warmup >= self.steps and self.steps > 1:
            raise UserError(f"--warmup {self.warmup} must be less than --steps {self.steps}")
        if not 0 < self.decay_fraction <= 1 or self.schedule == "wsd" and self.warmup + self.decay_fraction * self.steps > self.steps:
            raise UserError(f"--decay-fraction {self.decay_fraction} of {self.steps} steps and --warmup {self.warmup} do not fit one after the other")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"--heldout-fraction must lie in [0, 1), got {self.heldout_fraction}")
        if self.fields and not any(tokenize_data.split_weight(path)[0].endswith(".jsonl") for path in self.data):
            raise UserError(f"--fields {self.fields!r} is for .jsonl files, and --data names none")
        if self.compile_only != bool(self.topology):
            raise UserError("--compile-only and --topology NAME go together, such as --compile-only --topology v5p:4x4x8")
        try:
            sizes = [1] * 4 if self.mesh == "auto" else [int(n) for n in self.mesh.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
            raise UserError(f"--mesh {self.mesh}: wanted auto or four numbers data,fsdp,tensor,seq, one of which may be -1, such as 1,-1,1,1")


# An update of the published 7b is 32 sentences x 4 micro-batches = 524,288 targets; its schedule counts updates. 4097 ids are
# 4096 inputs and targets.
PRESETS = {
    "none": {},
    "lvm-7b": dict(
        size="7b", packing="concat", context=4097, batch=128, accumulate=4, steps=288_000, warmup=8_000, learning_rate=1.5e-4, final_learning_rate=0.2,
        b1=0.9, b2=0.95, clip=1.0, weight_decay=0.1, decay_norms=True, dtype="bfloat16", remat="full", save_every=2_000, log_every=50, out=Path("runs/lvm-7b")),
}  # fmt: skip


def preset(arguments) -> Config:
    """The defaults that `--preset NAME` or `--preset=NAME` among the arguments asks for."""
    words = " ".join(map(str, arguments)).replace("=", " ").split()
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else "none"
    return Config(preset=name, **PRESETS.get(name, {}))


# These may differ when a run is resumed; everything else must be as it was.
MAY_CHANGE = {"preset", "out", "steps", "save_every", "keep", "milestone_every", "evaluate_every", "log_every", "log", "profile", "patience", "mesh",
              "remat", "compile_only", "topology", "compilation_cache", "learning_rate", "final_learning_rate", "warmup", "tokenizer", "heldout",
              "coordinator", "processes", "process", "heartbeat", "accept_new_data"}


def train(config: Config) -> lvm.LVM:
    """Trains until `config.steps`, or until SIGTERM asks to stop, resuming where the run folder holds a checkpoint; returns the model."""
    check_writable(config.out)
    start_processes(config)
    check_hosts_agree(facts_of(config))
    leads = jax.process_index() == 0  # this process writes the logs and draws the pictures
    say = print if leads else lambda text: None

    # The data: what the model reads follows from --data, --seed and the step alone, so a checkpoint need not hold its place.
    data, heldout = (config.data, config.heldout) if config.data else make_demo(config)
    paths, weights = zip(*map(tokenize_data.split_weight, data))
    codes = next((tokenize_data.Shards(path).codes for path in paths if not path.endswith(".jsonl")), lvm.SIZES[config.size].codes)
    model_config = model_config_for(config, codes)
    mesh = make_mesh(config, model_config)
    check_batch(config, mesh)
    if config.remat == "offload" and "pinned_host" not in (kinds := [memory.kind for memory in jax.devices()[0].addressable_memories()]):
        raise UserError(f"--remat offload wants pinned host memory; {jax.devices()[0].device_kind} has {', '.join(kinds)}: take --remat full")
    specials = (model_config.bos, model_config.eos, model_config.pad)
    open_sentences = functools.partial(tokenize_data.open_sentences, codes=codes, specials=specials, fields=config.fields, vocabulary=model_config.vocab_size)
    shards = [open_sentences(path) for path in paths]
    heldout = open_sentences(heldout) if heldout else shards[0]
    check_hosts_agree({f"data {path}": part.digest for path, part in zip(paths, shards)})
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if config.dtype == "auto" else config.dtype)
    context = config.context or model_config.context
    if config.init:
        check_init(config.init, shards[0].about["tokenizer"])
    begin_run(config, model_config, [s.about["tokenizer"] for s in shards], [
        {"path": path, "digest": part.digest, **{k: part.about[k] for k in ("tokenizer", "sentences", "tokens", "kinds")}} for path, part in zip(paths, shards)])

    # The state: the newest whole checkpoint, or else random weights or those of --init. What is wrong with the data is said before.
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep, config.milestone_every)
    first = checkpoints.newest
    part, parts = rows_of_this_process(mesh, config.batch)
    batches = on_devices(mesh, tokenize_data.open_dataset(
        list(zip(shards, weights)), context=context, specials=specials, packing=config.packing, batch=config.batch, seed=config.seed, start=first,
        process=part, processes=parts, heldout_fraction=config.heldout_fraction))
    optimizer, schedule = make_optimizer(config)
    state, shardings = make_state(dataclasses.replace(config, init=None) if first else config, model_config, optimizer, mesh)
    if first:
        state = checkpoints.restore(state)
        say(f"resuming {config.out} at step {first}")
    if leads:
        keep_log_until(config.out / "metrics.jsonl", first)

    fraction = 0.0 if config.heldout or not config.data else config.heldout_fraction
    kept_N = np.flatnonzero(tokenize_data.is_heldout(heldout, fraction)) if fraction else np.arange(len(heldout))
    kinds = heldout_kinds(heldout, kept_N, context, specials, rows=mesh.shape["data"] * mesh.shape["fsdp"])

    say(f"{config.size}: {lvm.parameter_count(model_config):,} parameters, {dtype.name} on {mesh.size} {jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}")
    entropy = unigram_entropy(shards)
    say(f"baseline: the entropy of the unigram distribution is {entropy:.3f} nats a code; a loss below it means that the model uses context")
    loss_fn = make_loss(mesh, lvm.partition_specs(state["model"]), dtype, config.remat, config.z_loss)
    eval_fn = jax.jit(make_loss(mesh, lvm.partition_specs(state["model"]), dtype))
    evaluate_every = config.save_every if config.evaluate_every is None else config.evaluate_every
    meter = Meter(first, config.batch * context, lvm.training_flops(model_config, context), peak_rates(dtype))
    pending, stopping = collections.deque(), False

    with asked_to_stop() as stop, checkpoints, open_log(config, first) as write, tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True, disable=not leads) as bar:
        if first < config.steps:
            batch = next(batches)
            with meter.clock("compile"):
                step_fn = make_train_step(loss_fn, optimizer, config.accumulate, shardings).lower(state, batch).compile()
        for step in range(first + 1, config.steps + 1):
            if config.profile and step == first + 2:
                jax.profiler.start_trace(config.profile)
            state, metrics = step_fn(state, batch)  # returns at once, while the devices work
            pending.append((step, metrics))
            bar.update()
            with meter.clock("input"):
                batch = next(batches)
            stopping = stop(step) and step < config.steps
            saving = step % config.save_every == 0 or step == config.steps or stopping
            evaluating = bool(evaluate_every) and (step % evaluate_every == 0 or step == config.steps)
            while len(pending) > (0 if saving or evaluating else 1):  # metrics are fetched one step late: no device waits for us
                done, metrics = pending.popleft()
                metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
                check_health(config, done, metrics, checkpoints.newest)
                if done % config.log_every == 0 or done == step and (saving or evaluating):
                    line = meter.line(done, metrics) | {"learning_rate": float(schedule(done - 1 - metrics["skipped"]))}
                    bar.set_postfix(loss=f"{line['loss']:.3f}", tokens=f"{line['tokens_per_second']:,.0f}/s")
                    if done == step and evaluating:
                        with meter.clock("evaluate"):
                            line |= heldout_losses(eval_fn, state["model"], kinds, mesh)
                    write(line)
            if config.profile and step == min(first + 4, config.steps) > first + 1:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            if saving:  # the log is written already: no step of a checkpoint is missing there
                with meter.clock("checkpoint"):
                    checkpoints.save(step, state)
            if evaluating:
                with meter.clock("evaluate"):
                    model = on_host(state["model"])
                    if leads:
                        sample_picture(config, model, heldout, config.out / "samples" / f"{step}.png", kept_N=kept_N)
            if stopping:
                break
    checkpoints.close()
    if stopping:
        say(f"stopped at step {step} of {config.steps}, as a signal asked; the same command goes on from there")
    else:
        say(f"""done: {config.out} (loss {last_loss(config.out):.3f}, unigram entropy {entropy:.3f}); look at {config.out}/samples/{config.steps}.png, then type
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
            w = own_columns(w) if name == "head_DV" else w
            w = lax.pcast(w, ("data", "seq"), to="varying")  # so that the sum over them runs on shards, not on whole gradients
            w = w.astype(dtype) if w.ndim > 1 else w
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
        norm = optax.global_norm(grads)
        good, guard = judge(state["guard"], loss, norm)
        new = {"model": optax.apply_updates(state["model"], updates), "optimizer": moments}
        new = {k: jax.tree.map(functools.partial(jnp.where, good), new[k], state[k]) for k in new}
        return new | {"guard": guard}, {"loss": loss, "grad_norm": norm, "skipped": guard["skipped"], "in_a_row": guard["in_a_row"]}

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def new_guard():
    """What a step is judged by: running means of the loss and the gradient norm, and counts of steps."""
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "norm")} | {name: jnp.zeros((), jnp.int32) for name in ("taken", "skipped", "in_a_row")}


def judge(guard, loss, norm):
    """Shall this step be taken? Not if its loss or gradient norm is no finite number, nor, once twenty steps have been
    taken, if one is a hundred times its running mean. Returns (bool, the guard after it)."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    good &= (guard["taken"] < 20) | (loss <= 100 * guard["loss"]) & (norm <= 100 * guard["norm"])
    mean = lambda old, value: jnp.where(good, jnp.where(guard["taken"] > 0, 0.95 * old + 0.05 * value, value), old)
    return good, {"loss": mean(guard["loss"], loss), "norm": mean(guard["norm"], norm), "taken": guard["taken"] + good,
                  "skipped": guard["skipped"] + ~good, "in_a_row": jnp.where(good, 0, guard["in_a_row"] + 1)}


def make_optimizer(config: Config):
    """(clipping by the global norm and the update, the learning rate at an update); both count updates, not micro-batches."""
    schedule = make_schedule(config)
    decayed = lambda model: jax.tree_util.tree_map_with_path(lambda path, _: config.decay_norms or "norm" not in path[-1].name, model)
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed)
    elif config.optimizer == "palm":
        update = palm(schedule, config.b1, config.b2, config.weight_decay, decayed)
    else:
        # Which axes of a weight are summed over and which it makes; the stacked layers before them are a batch.
        ends = {"q_DNK": (1, 2), "k_DNK": (1, 2), "v_DNK": (1, 2), "o_NKD": (2, 1), "gate_DF": (1, 1), "up_DF": (1, 1), "down_FD": (1, 1)}

        def axes(path, w):
            if (name := path[-1].name) not in ends:
                return None
            taken, made = ends[name]
            return optax.contrib.MuonDimensionNumbers(tuple(range(1, 1 + taken)), tuple(range(1 + taken, 1 + taken + made)))

        update = optax.contrib.muon(
            schedule, weight_decay=config.weight_decay, weight_decay_mask=decayed, adam_b1=config.b1, adam_b2=config.b2,
            adam_weight_decay=config.weight_decay, consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda model: jax.tree_util.tree_map_with_path(axes, model))
    update = update if config.moments == "float32" else with_narrow_moments(update, jnp.dtype(config.moments))
    return optax.chain(optax.clip_by_global_norm(config.clip), update), schedule


def make_schedule(config: Config):
    """Linear warm-up to the peak; then a cosine or, in wsd, the peak until the last `decay_fraction` of the steps and a line
    down to the final rate; rsqrt, PaLM's: the peak for `warmup` updates, then falling with the square root of the update."""
    peak, last = config.learning_rate, config.final_learning_rate * config.learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup, config.steps, last)
    if config.schedule == "rsqrt":
        return lambda count: peak * jnp.sqrt(max(config.warmup, 1) / jnp.maximum(count, max(config.warmup, 1)))
    decay = max(1, round(config.decay_fraction * config.steps))
    parts = optax.linear_schedule(0.0, peak, config.warmup), optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)
    return optax.join_schedules(parts, [config.warmup, config.steps - decay])


def palm(schedule, b1, b2, weight_decay, decayed):
    """Adafactor without factors, as in the PaLM paper (arXiv 2204.02311, section 5) and in EasyLM: steps in proportion to the
    RMS of each weight of each layer, a second moment whose decay 1 - t^-b2 grows with the update t, momentum of the steps,
    and weights that decay by `weight_decay` times the square of the learning rate (1 in the paper; EasyLM writes 1e-4)."""

    def scale(updates, state, weights):
        rms = lambda w: jnp.sqrt(jnp.mean(w**2, axis=tuple(range(len(w.shape) > 2, w.ndim)), keepdims=True))
        return jax.tree.map(lambda u, w: u * jnp.maximum(rms(w), 1e-3), updates, weights), state

    by_weight = optax.GradientTransformation(lambda weights: optax.EmptyState(), scale)
    return optax.chain(
        optax.scale_by_factored_rms(factored=False, decay_rate=b2), optax.scale_by_schedule(schedule), by_weight, optax.ema(b1, debias=False),
        optax.scale(-1), optax.add_decayed_weights(lambda count: -weight_decay * schedule(count) ** 2, decayed))


def with_narrow_moments(update, dtype):
    """The same update, with its state's arrays kept in `dtype` between steps and float32 within one."""
    cast = lambda dtype: functools.partial(jax.tree.map, lambda x: x.astype(dtype) if x.ndim and x.dtype in (jnp.float32, jnp.bfloat16) else x)
    narrow, wide = cast(dtype), cast(jnp.float32)

    def step(grads, state, weights):
        updates, state = update.update(grads, wide(state), weights)
        return updates, narrow(state)

    return optax.GradientTransformation(lambda weights: narrow(update.init(weights)), step)


def make_state(config: Config, model_config, optimizer, mesh):
    """({"model", "optimizer", "guard"}, their shardings): every leaf is born on the devices that keep it."""
    abstract, shardings = abstract_state(config, model_config, optimizer, mesh)
    if config.init is None:
        return jax.jit(lambda: new_state(lvm.LVM(model_config, key=jax.random.key(config.seed)), optimizer), out_shardings=shardings)(), shardings
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the host's memory: a whole model may be too large for a device
        given = lvm.load(config.init)
    ours = {name: getattr(model_config, name) for name in ("context", "bos_id", "eos_id", "pad_id")}  # no weight's shape or meaning depends on these
    if dataclasses.replace(given.config, **ours) != model_config:
        raise UserError(f"--init {config.init} holds {given.config}, --size {config.size} and the data ask for {model_config}")

    def place(weight, sharding):  # each device takes its part
        return jax.make_array_from_callback(weight.shape, sharding, lambda index: weight[index])

    weights = jax.tree.unflatten(jax.tree.structure(shardings["model"]), [np.asarray(weight) for weight in jax.tree.leaves(given)])
    model = jax.tree.map(place, weights, shardings["model"])
    return jax.jit(lambda model: new_state(model, optimizer), out_shardings=shardings, donate_argnums=0)(model), shardings


def new_state(model, optimizer):
    return {"model": model, "optimizer": optimizer.init(model), "guard": new_guard()}


def abstract_state(config: Config, model_config, optimizer, mesh):
    """(the state's shapes, its shardings); refuses a mesh that does not divide the model."""
    for axis, sizes in (("fsdp", {"hidden": model_config.hidden}), ("tensor", {"heads": model_config.heads, "ffn": model_config.ffn})):
        for name, size in sizes.items():
            if size % (n := mesh.shape[axis]):
                fit = [m for m in range(1, size + 1) if all(other % m == 0 for other in sizes.values())]
                near = sorted({max(m for m in fit if m < n), min([m for m in fit if m > n], default=fit[-1])})
                raise UserError(f"--mesh: {axis} {n} does not divide the {name} of {config.size}, {size}; the nearest that do: {' and '.join(map(str, near))}")

    abstract = eqx.filter_eval_shape(lambda: new_state(lvm.LVM(model_config, key=jax.random.key(config.seed)), optimizer))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), lvm.partition_specs(abstract), is_leaf=lambda x: isinstance(x, P))
    return abstract, shardings


def make_mesh(config: Config, model_config, devices=None, memory=None):
    """The mesh of --mesh over all devices: fsdp, tensor and seq next to each other within a node or slice, data across.

    `memory` is a device's in bytes; None asks it."""
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", None) for device in devices}) if devices[0].platform == "tpu" else 1
    if config.mesh == "auto":
        memory = memory or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        group = len(devices) // slices if devices[0].platform == "tpu" else min(8, len(devices))
        sizes, reason = choose_mesh(config, model_config, len(devices), group, memory, slices)
    else:
        sizes, reason = [int(n) for n in config.mesh.split(",")], "as asked for"
        known = math.prod(n for n in sizes if n != -1)
        sizes = [len(devices) // known if n == -1 else n for n in sizes]
        if math.prod(sizes) != len(devices):
            raise UserError(f"--mesh {config.mesh} does not make use of exactly the {len(devices)} devices that are here")
    if sizes[0] % slices:
        raise UserError(f"--mesh: data {sizes[0]} is no multiple of the {slices} slices; fsdp, tensor and seq stay within one")
    print(f"mesh {','.join(map(str, sizes))} ({','.join(AXES)}): {reason}")
    if slices > 1:
        array = mesh_utils.create_hybrid_device_mesh((sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:  # in the order of their processes: neighbours share a node
        array = np.array(devices).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(config: Config, mesh):
    share = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch % (config.accumulate * share):
        raise UserError(f"--batch {config.batch} over {config.accumulate} micro-batches does not divide by the {share} devices of data x fsdp")


def choose_mesh(config: Config, model_config, devices: int, group: int, memory, slices=1):
    """(sizes, reason) of --mesh auto. A `group` is a node of GPUs or a slice of TPUs, where gathers are quick; `memory` in
    bytes a device, None where devices share it. Between `slices` goes data alone."""
    rows, D, N, F = config.batch // config.accumulate, model_config.hidden, model_config.heads, model_config.ffn
    state = lvm.parameter_count(model_config) * (8 + 2 * jnp.dtype(config.moments).itemsize)
    told = f"weights, gradients and moments take {state / 1e9:.1f} GB"
    if devices == 1:
        return (1, 1, 1, 1), "one device"
    if memory is None:
        shards, reason = 1, "these devices share one memory, so nothing is gained by splitting weights"
    elif state <= memory / 2:
        shards, reason = 1, f"{told}, at most half of a device's {memory / 1e9:.0f} GB: every device holds them all"
    else:
        shards = group if state / group <= memory / 2 or slices > 1 else devices
        where = "all devices" if shards == devices else f"the {group} of a node or slice, which then do alike"
        reason = f"{told}, more than half of a device's {memory / 1e9:.0f} GB: split over {where}"
    # Each group of devices that work on one row does so by tensor, or else by seq.
    for tensor, seq in [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (8, 2), (1, 4), (4, 4), (8, 4), (1, 8), (8, 8), (1, devices)]:  # the last always does
        workers = devices // (tensor * seq)
        if devices % (tensor * seq) == 0 and rows % workers == 0 and N % tensor == 0 and F % tensor == 0:
            fsdp = max(n for n in range(1, workers + 1) if workers % n == 0 and D % n == 0 and n <= shards)
            reason += f"; {rows} rows a micro-batch are fewer than devices or do not divide by them: {tensor * seq} devices a row" if tensor * seq > 1 else ""
            return (workers // fsdp, fsdp, tensor, seq), reason


def model_config_for(config: Config, codes: int):
    """The size's config, with the codebook of the data, and the context and special ids that were asked for."""
    model_config = dataclasses.replace(lvm.SIZES[config.size], codes=codes)
    if config.special_ids:
        model_config = dataclasses.replace(model_config, **dict(zip(("bos_id", "eos_id", "pad_id"), config.special_ids)))
    return dataclasses.replace(model_config, context=config.context or model_config.context)


# ---------------------------------------------------------------------------------------------------- processes


def start_processes(config: Config):
    """Joins the processes of a run on several hosts, before JAX looks for devices. JAX reads their number and addresses
    from the environment of SLURM's srun, of Open MPI's mpirun (from version 5 on with --coordinator) and of TPU pods."""
    if jax.distributed.is_initialized():
        return
    found, processes, process = os.environ.get, config.processes, config.process
    srun, mpirun = int(found("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ, int(found("OMPI_COMM_WORLD_SIZE", 1)) > 1
    on_tpu = found("JAX_PLATFORMS", "tpu") == "tpu" and (any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*")))
    if config.coordinator and processes is None and mpirun:
        processes, process = int(found("OMPI_COMM_WORLD_SIZE")), int(found("OMPI_COMM_WORLD_RANK"))
    if config.coordinator or srun or mpirun or on_tpu:
        jax.distributed.initialize(config.coordinator, processes, process, heartbeat_timeout_seconds=config.heartbeat)


def facts_of(config: Config) -> dict[str, str]:
    """What all hosts must have alike before they compute together: flags, program, libraries, devices."""
    flags = {f"--{k.replace('_', '-')}": str(v) for k, v in dataclasses.asdict(config).items() if k not in ("process", "profile")}
    here = Path(__file__).resolve().parent
    sources = sorted([Path(__file__), *here.glob("common/*.py"), *(here / f"{name}.py" for name in ("lvm", "flash_attention", "tokenize_data", "vqgan"))])
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return flags | {"code": code, "versions": f"jax {jax.__version__}, numpy {np.__version__}", "devices of a host": str(jax.local_device_count())}


def check_same_data(before: list[dict], now: list[dict]):
    """Raises UserError where a dataset of a run that goes on is not what it was, with the difference."""
    differ = [f"{new['path']}: " + ", ".join(f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v and k != "path")
              for old, new in zip(before, now) if {**old, "path": ""} != {**new, "path": ""}]
    if differ:
        raise UserError(f"the data were changed since this run began ({'; '.join(differ)}): put them back, or go on with the new ones by --accept-new-data")


def check_hosts_agree(facts: dict[str, str]):
    """Raises UserError, on all processes, where their facts differ, naming which."""
    if jax.process_count() == 1:
        return
    text = json.dumps({name: value if len(value) < 200 else hashlib.sha256(value.encode()).hexdigest() for name, value in facts.items()})
    text_PN = multihost_utils.process_allgather(np.frombuffer(text.encode().ljust(1 << 15), np.uint8))
    first, *others = [json.loads(text_N.tobytes()) for text_N in text_PN]
    differ = [f"{name} ({first.get(name)} on process 0, {other.get(name)} on process {i})" for i, other in enumerate(others, 1)
              for name in first | other if first.get(name) != other.get(name)]
    if differ:
        raise UserError(f"the hosts differ in {'; '.join(differ[:4])}: start the same command with the same code and data on all of them")


def agreed(value: int) -> int:
    """Process 0's value, on all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def on_host(model):
    """The whole model where one process shall use it alone."""
    return multihost_utils.process_allgather(model, tiled=True) if jax.process_count() > 1 else model


@contextlib.contextmanager
def asked_to_stop():
    """Yields a function of the step: shall the run stop after it, because somebody sent SIGTERM to any process, or pressed Ctrl-C?"""
    if jax.process_count() > 1:  # JAX's own handler finds a step that no process has passed yet
        yield multihost_utils.reached_preemption_sync_point
        return
    with vqgan.asked_to_stop() as asked:
        yield lambda step: bool(asked)


# ---------------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The steps of a run. `folder/<step>` bears that name once orbax has written everything and process 0 the digests; until
    then, and while it is removed, `.partial` follows. The training waits only for the copy off the devices.

    `newest` is the newest whole step on the disk, 0 for none, at the start the same on all processes."""

    def __init__(self, folder: Path, keep: int, milestone_every: int | None):
        self.folder, self.keep, self.milestone_every = folder.absolute(), keep, milestone_every
        self.writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self.thread, self.commit, self.failure, self.failed, self.newest = ThreadPoolExecutor(1), None, None, [], 0
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.partial*"):
                shutil.rmtree(leftover)
            steps, whole = lvm.steps_of(self.folder), next(lvm.whole_steps(self.folder), None)
            self.newest = int(whole.name) if whole else -1 if steps else 0
            for path in steps if whole else ():
                if int(path.name) > self.newest:  # out of the way of the steps to come
                    path.rename(path.with_name(f"{path.name}.damaged-{time.time():.0f}"))
        self.newest = agreed(self.newest)
        if self.newest < 0:
            raise UserError(f"{self.folder} has no checkpoint that is whole; restore one from a copy, or begin again with another --out")

    def restore(self, state):
        """The state of the newest step, on the devices of the given one, whose memory it takes over."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)
        items = ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in like.items()})
        restored = self.writer.restore(self.folder / str(self.newest), args=items)
        return {k: restored[k] for k in like}

    def save(self, step: int, state):
        """Begins to write a step. What cannot be written is reported at once, and the next save tries again."""
        self.wait()
        if not all_finite(state):
            raise RunStopped(f"at step {step} weights or moments are no finite numbers, and are not saved; the last checkpoint is that of step {self.newest}")
        needed, self.failure = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), None
        try:
            if not agreed(shutil.disk_usage(self.folder).free > needed):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            items = ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in state.items()})
            self.writer.save(self.folder / f"{step}.partial", args=items, force=True)
            self.commit = self.thread.submit(self._commit, step, needed)
        except Exception as error:
            self._give_up(step, needed, error)

    def _commit(self, step: int, needed: int):
        try:
            self.writer.wait_until_finished()
            if jax.process_index() == 0:
                lvm.write_digests(self.folder / f"{step}.partial")
                (self.folder / f"{step}.partial").rename(self.folder / str(step))
                steps = sorted(int(path.name) for path in lvm.steps_of(self.folder))
                for old in steps[:-self.keep]:
                    if not self.milestone_every or old % self.milestone_every:
                        shutil.rmtree((self.folder / str(old)).rename(self.folder / f"{old}.partial"))
            self.newest = step
        except Exception as error:  # orbax fails in as many ways as disks do
            self._give_up(step, needed, error)

    def _give_up(self, step: int, needed: int, error: Exception):
        self.failed.append(step)
        self._clear_failed()
        free = shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.exists())).free
        self.failure = f"{self.folder / str(step)} could not be saved ({str(error).splitlines()[0]}): it needs {needed:,} bytes, and {free:,} are free there"
        print(f"{self.failure}; the last checkpoint is that of step {self.newest}, and the next save tries again", file=sys.stderr)

    def wait(self):
        if self.commit:
            self.commit.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """A run that fails lets the save that it has begun come to its end; one of several processes might wait in vain."""
        if error is None or jax.process_count() == 1:
            self.wait()

    def close(self):
        self.wait()
        self._clear_failed()  # once more: some of their threads may have written on
        if self.failure:
            raise RunStopped(self.failure)

    def _clear_failed(self):
        for step in self.failed if jax.process_index() == 0 else ():
            for partial in self.folder.glob(f"{step}.partial*"):
                shutil.rmtree(partial, ignore_errors=True)


@jax.jit
def all_finite(state):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


# ---------------------------------------------------------------------------------------------------- the run folder


def make_demo(config: Config):
    """Composes the embedded demo sentences where they are not there yet -> (training folders, held-out folder)."""
    folder = config.out / "data"
    for split, sentences in (("train", config.demo_sentences), ("heldout", 64)):
        if jax.process_index() == 0 and not (folder / split).exists():
            print(f"composing {sentences} demo sentences ({split}) in {folder / split}")
            tokenize_data.demo(tokenize_data.Demo(out=folder / split, sentences=sentences, split=split, tokenizer=config.tokenizer))
    multihost_utils.sync_global_devices("demo")
    return (str(folder / "train"),), folder / "heldout"


def check_writable(out: Path):
    """Fails before anything is compiled, not at the first checkpoint."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"-")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to ({error}); choose another folder") from None


def begin_run(config: Config, model_config, fingerprints, data):
    """Writes config.json, or refuses a run folder whose settings are others, naming them."""
    settings = {"model": dataclasses.asdict(model_config), "tokenizer": fingerprints[0],
                "train": json.loads(json.dumps(dataclasses.asdict(config), default=str)), "data": data}
    file = config.out / "config.json"
    if file.exists() and lvm.steps_of(config.out / "checkpoints"):  # before the first checkpoint there is nothing to resume
        before = json.loads(file.read_text())
        defaults = json.loads(json.dumps(dataclasses.asdict(Config()), default=str))  # of flags that are newer than the run
        was = {k: before["train"].get(k, defaults[k]) for k in settings["train"]}
        changed = [f"{k}: {was[k]} -> {v}" for k, v in settings["train"].items() if was[k] != v and k not in MAY_CHANGE]
        changed += [f"{k} is another one" for k in ("model", "tokenizer") if before[k] != settings[k] and not changed]
        if changed:
            raise UserError(f"{config.out} holds a run with other settings ({'; '.join(changed)}); choose another --out, or repeat its settings")
        if not config.accept_new_data:
            check_same_data(before.get("data", data), data)  # older runs do not say
    if jax.process_index() == 0:
        partial = file.with_suffix(".partial")
        partial.write_text(strict_json(settings, indent=1) + "\n")
        os.replace(partial, file)


def check_init(init: Path, fingerprint: str | None):
    """Refuses weights that were trained on another tokenizer's codes, where both they and the data say whose those are."""
    file = init / "config.json"
    known = lvm.read_json(file).get("tokenizer") if file.is_file() else None
    if None not in (known, fingerprint) and known != fingerprint:
        raise UserError(f"--init {init} was trained on the codes of tokenizer {known}, and the data are codes of {fingerprint}: tokenize them with the first one")


def keep_log_until(log: Path, step: int):
    """Drops the lines after `step`, which a resumed run writes again, and a line that a kill cut short."""
    if log.exists():
        whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        partial = log.with_suffix(".partial")
        partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        os.replace(partial, log)


def last_loss(out: Path) -> float:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"] or math.nan


def rows_of_this_process(mesh, batch: int) -> tuple[int, int]:
    """(part, parts): the devices of this process hold the part-th of so many equal parts of a batch's rows. Processes that
    split a sentence or a matrix between them hold the same rows."""
    spans = {(rows.start or 0, batch if rows.stop is None else rows.stop)
             for rows, in NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch,)).values()}
    low, high = min(low for low, _ in spans), max(high for _, high in spans)
    assert sum(b - a for a, b in spans) == high - low and batch % (high - low) == 0 == low % (high - low), spans
    return low // (high - low), batch // (high - low)


def on_devices(mesh, batches, ahead=2):
    """Yields batches that are already on their way to the devices, two steps before they are wanted."""
    coming = collections.deque()
    for batch in batches:
        coming.append({k: jax.make_array_from_process_local_data(NamedSharding(mesh, ROWS), v) for k, v in batch.items()})
        if len(coming) > ahead:
            yield coming.popleft()


def heldout_kinds(shards, kept_N, context: int, specials, rows: int, most=32):
    """Held-out sentences -> {kind: (its share of them, how many are taken, batches of `rows` rows of ids and masks)}.

    Of every kind about as many are taken, evenly spaced, `most` in all; each is a row of its own, cut to the context. Rows
    that are left empty count for nothing."""
    kinds_N = np.concatenate([index_N3[:, 1] for _, index_N3 in shards.shards]) if isinstance(shards, tokenize_data.Shards) else np.zeros(len(shards), int)
    members, taken = {kind: kept_N[kinds_N[kept_N] == kind] for kind in np.unique(kinds_N[kept_N])}, {}
    for kind, members_N in members.items():
        count = min(len(members_N), -(-most // len(members) // rows) * rows)
        ids_NT = np.full((-(-count // rows) * rows, context), specials[2], np.int32)
        mask_NT = np.zeros(ids_NT.shape, np.float32)
        for n, i in enumerate(members_N[np.linspace(0, len(members_N) - 1, count).astype(int)]):
            ids_T, counts_T = shards.row(i, specials)
            T = min(len(ids_T), context)
            ids_NT[n, :T], mask_NT[n, 1:T] = ids_T[:T], 1 if counts_T is None else counts_T[1:T]
        batches = [(ids_NT[n:n + rows], mask_NT[n:n + rows]) for n in range(0, len(ids_NT), rows)]
        taken[shards.kinds[kind]] = len(members_N) / len(kept_N), count, batches
    return taken


def heldout_losses(eval_fn, model, kinds, mesh) -> dict[str, float]:
    """The held-out loss of every kind, and their mean by its share of the sentences."""
    place = lambda x_BT: jax.make_array_from_callback(x_BT.shape, NamedSharding(mesh, ROWS), lambda index: x_BT[index])
    losses = {kind: sum(float(eval_fn(model, *map(place, batch))) * len(batch[0]) for batch in batches) / count for kind, (_, count, batches) in kinds.items()}
    loss = sum(kinds[kind][0] * losses[kind] for kind in kinds)
    return {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 700)), **{f"heldout_loss/{kind}": losses[kind] for kind in kinds if len(kinds) > 1}}


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
    answer_BS = likeliest_picture(jax.device_put(model, jax.local_devices()[0]), jnp.asarray(prompt_BT, jnp.int32), S)
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


# ------------------------------------------------------------------------------- programs for chips that are not here


class Chip(NamedTuple):
    flops: float
    """bf16 FLOP/s, nominal"""
    memory: float
    """bytes that a program may fill"""
    link: float
    """bytes/s: TPU, both ways along one axis of the torus; GPU, into it from its node (NVLink)"""
    topology: dict
    """for `get_topology_desc`"""
    ring: int = 1
    """a whole axis of the torus is closed where this divides its length"""


# The CUDA compiler's description of the device; its cluster has nodes of eight, each GPU with 400 Gbit/s to the others.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
CHIPS = {
    "v4": Chip(275e12, 31.75 * 2**30, 9e10, {"chip_config_name": "megacore"}, ring=4),
    "v5e": Chip(197e12, 15.75 * 2**30, 9e10, {}, ring=16),
    "v5p": Chip(459e12, 95.74 * 2**30, 1.8e11, {"chip_config_name": "megachip_tccontrol"}, ring=4),
    "v6e": Chip(918e12, 31.25 * 2**30, 1.8e11, {}, ring=16),
    "h200": Chip(989e12, 0.92 * 141e9, 4.5e11, {"topology_name": "h200", "target_config": H200}),
}
NETWORK, SLICE_NETWORK = 5e10, 6.25e9  # bytes/s of a GPU to other nodes, and of a TPU chip to other slices


def find_topology(name: str):
    """(chip, devices) of a --topology; to be called before any backend has started."""
    match = re.fullmatch(r"(v4|v5e|v5p|v6e):(\d+(?:x\d+)+)(?:\*(\d+))?|h200:(\d+)", name)
    if not match:
        raise UserError(f"--topology {name}: wanted one of {', '.join(CHIPS)} and a shape, such as v5p:4x4x8, v5e:16x16*2 (two slices) or h200:16")
    kind, shape, slices, gpus = match.groups()
    n = int(gpus or 0)
    if n > 8 and n % 8:
        raise UserError(f"--topology {name}: more than 8 GPUs come in nodes of 8")
    package = "jax_cuda13_plugin" if gpus else "libtpu"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--topology {name} needs the compiler of {package}, which is not installed; type: pip install -r tests/compilers.txt")
    chip = CHIPS[kind or "h200"]
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")  # libtpu shall not look for chips
    tell_xla("cuda" if gpus else "tpu")
    try:
        if gpus:
            return chip, topologies.get_topology_desc(platform="cuda", topology=f"1x{max(1, n // 8)}x{min(n, 8)}", **chip.topology).devices
        more = {"num_slices": int(slices)} if slices else {}
        return chip, topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **more, **chip.topology).devices
    except Exception as error:  # the compiler's own refusal, such as of a shape that no pod has
        raise UserError(f"--topology {name}: {str(error).splitlines()[0]}") from None


def compile_step(config: Config, chip: Chip, devices):
    """(compiled training step, mesh, model config) on devices that need not be here: nothing of it runs."""
    model_config = model_config_for(config, lvm.SIZES[config.size].codes)
    mesh = make_mesh(config, model_config, devices, chip.memory)
    check_batch(config, mesh)
    optimizer, _ = make_optimizer(config)
    state, shardings = abstract_state(config, model_config, optimizer, mesh)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    row = lambda dtype: jax.ShapeDtypeStruct((config.batch, model_config.context), dtype, sharding=NamedSharding(mesh, ROWS))
    dtype = jnp.dtype("bfloat16" if config.dtype == "auto" else config.dtype)
    loss_fn = make_loss(mesh, lvm.partition_specs(state["model"]), dtype, config.remat, config.z_loss, implementation="pallas")
    step = make_train_step(loss_fn, optimizer, config.accumulate, shardings)
    batch = {"ids_BT": row(jnp.int32), "mask_BT": row(jnp.float32)}
    return step.trace(jax.tree.map(place, state, shardings), batch).lower().compile(), mesh, model_config


def compile_only(config: Config) -> dict:
    """Compiles the step for --topology, prints what it takes, and returns it; `fits` says whether it does."""
    chip, devices = find_topology(config.topology)
    began = time.time()
    try:
        compiled, mesh, model_config = compile_step(config, chip, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"[Uu]sed ([\d.]+)([GM]) of", str(error))
        peak = float(used[1]) * {"G": 2**30, "M": 2**20}[used[2]] if used else math.inf
        print(f"does not fit: {str(error).splitlines()[0][:300]}")
        return {"fits": False, "peak": peak, "memory": chip.memory, "seconds": time.time() - began}
    seconds = time.time() - began
    memory, n = compiled.memory_analysis(), len(devices)
    peak = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.generated_code_size_in_bytes)
    moved = collectives(compiled.as_text(), mesh, chip)
    tokens = config.batch * model_config.context
    flops = tokens * lvm.training_flops(model_config, model_config.context)
    compute = flops * (4 / 3 if config.remat in ("full", "offload") else 1) / (n * chip.flops)
    network = sum(c["seconds"] for c in moved.values())
    facts = {
        "fits": peak <= chip.memory, "mesh": ",".join(map(str, mesh.devices.shape)), "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "host": memory.host_temp_size_in_bytes, "peak": peak, "memory": chip.memory, "flops": flops, "collectives": moved, "compute_seconds": compute,
        "network_seconds": network, "tokens": tokens, "seconds": seconds}
    GB = lambda bytes: f"{bytes / 1e9:.2f} GB"
    print(f"{config.topology}: {n} chips of {chip.flops / 1e12:.0f} TFLOP/s; {config.size}, {config.batch} x {model_config.context} tokens an update in {config.accumulate} micro-batch(es), remat {config.remat}, "
          f"{config.moments} moments; jax {jax.__version__}, compiled in {seconds:.0f} s")
    print(f"bytes a chip: arguments {GB(facts['arguments'])}, temporaries {GB(facts['temporaries'])}, peak {GB(peak)} of {GB(chip.memory)}"
          + (f", and {GB(facts['host'])} of the host's memory" if facts["host"] else ""))
    print(f"FLOPs a step: {flops:.3e} (6 a weight and token, causal attention at half; what remat repeats is not counted)")
    for name, c in moved.items():
        print(f"{name}: {c['count']} a step, {GB(c['bytes'])} through each chip, {c['seconds'] * 1e3:.1f} ms")
    print(f"roofline: {compute * 1e3:.0f} ms of compute{' (remat included)' if config.remat in ('full', 'offload') else ''}, {network * 1e3:.0f} ms of collectives: "
          f"{'compute' if compute >= network else 'communication'}-bound where they overlap, {tokens / max(compute, network):,.0f} tokens/s at most")
    print("it fits" if facts["fits"] else f"does not fit: {GB(peak)} of {GB(chip.memory)}")
    return facts


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_KINDS = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"


def collectives(text: str, mesh, chip: Chip) -> dict:
    """{kind: {"count", "bytes" through a device, "seconds"}} of one step, read from optimized HLO.

    A loop's body counts as often as XLA knows it to run (known_trip_count), or else as the constant in its condition says. A ring moves an array (n - 1) / n times through
    each of n devices, an all-reduce twice. A group of TPUs has the links of the axes of the torus that it spans, both ways
    where the axis is closed; GPUs have NVLink within a node, and each its own network card between nodes.
    """
    computations, name, entry = {}, None, None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line)):
            name = head[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            computations[name].append(line)
    total = {}

    def visit(name, times, fused=False):
        lines = computations.get(name, [])
        # TPUs split an asynchronous gather into fusions that start it, go on with it and end it: the first counts.
        counts = not fused or "all-reduce-scatter" in name or any("AsyncCollectiveStart" in line for line in lines)
        for line in lines:
            found = counts and re.search(rf" = (.+?) ({_KINDS})(-start)?\(", line)
            if found:
                shapes, kind, start = found.groups()
                group = _group(line, mesh)
                n = len(group)
                size = sum(_BYTES.get(t, 0) * math.prod(int(d) for d in dims.split(",") if d) for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes))
                # An asynchronous one lists its operands before its results, but for the all-reduce that is not a tuple of tuples.
                both = start and (kind != "all-reduce" or shapes.startswith("(("))
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"  # a fusion of TPUs, which sums and keeps a part
                elif kind in ("all-gather", "reduce-scatter"):
                    size *= n / (n + 1) if both else n if kind == "reduce-scatter" else 1  # the whole array
                elif both:
                    size /= 2
                through = size * (1 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1))
                if through:
                    row = total.setdefault(kind, {"count": 0, "bytes": 0.0, "seconds": 0.0})
                    row["count"] += times
                    row["bytes"] += times * through
                    row["seconds"] += times * through / _bandwidth(group, mesh, chip, kind)
            trips = 1
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+)", line):
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                limits = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations.get(loop[1], [])))]
                trips = int(known[1]) if known else max(limits, default=1)
            for how, callee in re.findall(r"(calls|body|true_computation|false_computation)=%?([\w.\-]+)", line):
                visit(callee, times * trips, how == "calls")
            for callees in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for callee in re.findall(r"[\w.\-]+", callees):
                    visit(callee, times)

    visit(entry, 1)
    return total


def _group(line, mesh):
    """The devices of the first group of a collective."""
    devices = mesh.devices.reshape(-1)
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return [devices[int(i)] for i in pairs.groups()]
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        names = re.findall(r"'(\w+)'", axes[2])
        index = tuple(slice(None) if k in names else 0 for k in sizes)
        return list(devices.reshape(tuple(sizes.values()))[index].reshape(-1))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(len(devices)).reshape([int(d) for d in iota[3].split(",")])
        ids = ids.transpose([int(d) for d in iota[4].split(",")]) if iota[4] else ids
        return [devices[i] for i in ids.reshape(int(iota[1]), int(iota[2]))[0]]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return [devices[int(i)] for i in listed[1].split(",")] if listed else list(devices)


def _bandwidth(group, mesh, chip, kind):
    """Bytes/s into a device of a group."""
    if group[0].platform != "tpu":
        nodes = {}
        for device in group:
            nodes[device.process_index] = nodes.get(device.process_index, 0) + 1
        return chip.link if len(nodes) == 1 else NETWORK * (1 if kind == "collective-permute" else max(nodes.values()))
    if len({getattr(device, "slice_index", None) for device in group}) > 1:
        return SLICE_NETWORK
    if kind == "collective-permute":
        return chip.link / 2
    speed = 0.0
    for i in range(3):
        here = len({device.coords[i] for device in group})
        whole = len({device.coords[i] for device in mesh.devices.flat})
        if here > 1:
            speed += chip.link if here == whole and whole % chip.ring == 0 else chip.link / 2
    return speed


# What XLA needs to be told. TPUs nothing: compiled for v5e, six of the seven gathers of a block run inside fusions that compute
# (AsyncCollectiveStart in the HLO), and only the first is waited for. GPUs: run collectives beside compute, issue the
# next layer's gathers in this one, join small collectives, leave products to cuBLAS, and rematerialise only what --remat says.
XLA_FLAGS = {
    "cuda": (
        "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_triton_gemm=false --xla_gpu_enable_pipelined_all_gather=true "
        "--xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_pipelined_all_reduce=true --xla_gpu_enable_while_loop_double_buffering=true "
        "--xla_gpu_all_gather_combine_threshold_bytes=134217728 --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728 "
        "--xla_gpu_all_reduce_combine_threshold_bytes=134217728 --xla_disable_hlo_passes=rematerialization").split(),
}  # fmt: skip


def tell_xla(platform: str | None = None):
    """Appends what `platform` needs to XLA_FLAGS before a backend starts; a flag that the user has set stays as it is."""
    if platform is None:
        asked = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
        plugins = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
        platform = asked or ("cuda" if plugins else "")
    given = os.environ.get("XLA_FLAGS", "")
    names = {flag.split("=")[0] for flag in given.split()}
    if new := [flag for flag in XLA_FLAGS.get({"gpu": "cuda"}.get(platform, platform), ()) if flag.split("=")[0] not in names]:
        os.environ["XLA_FLAGS"] = " ".join([given, *new]).strip()
        print(f"XLA_FLAGS += {' '.join(new)}")
    if platform in ("cuda", "gpu"):
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of the memory; 0.75 by default


def keep_compiled(folder: str):
    """Programs compiled once are read from `folder` the next time; JAX_COMPILATION_CACHE_DIR, where set, wins over "auto"."""
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder != "auto" or not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvm-jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache if folder == "auto" else Path(folder).absolute()))
# ---------------------------------------------------------------------------------------------------- logs


@contextlib.contextmanager
def open_log(config: Config, first: int):
    """Yields a function that writes a line of numbers to metrics.jsonl and wherever --log says. Process 0 alone does."""
    if jax.process_index():
        yield lambda line: None
        return
    unwritten, sinks, ends = [], [], []
    settings, name = dataclasses.asdict(config), config.out.absolute().name
    for package in config.log:
        if package == "tensorboard":
            board = importlib.import_module("tensorboardX").SummaryWriter(str(config.out / "tensorboard"), purge_step=first + 1)
            sinks.append(lambda line: [board.add_scalar(k, v, line["step"]) for k, v in line.items() if k != "step" and v is not None])
            ends.append(board.close)
        else:
            service = importlib.import_module(package)
            service.init(project="lvm", name=name, config=settings, resume="allow", **({"id": name} if package == "wandb" else {}))
            sinks.append(lambda line, service=service: service.log(line, step=line["step"]))
            ends.append(service.finish)

    def write(line):
        unwritten.append(strict_json(line) + "\n")
        line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # the other logs, too, want no NaN
        if append(config.out / "metrics.jsonl", "".join(unwritten).encode()):
            unwritten.clear()
        for sink in sinks:
            sink(line)

    try:
        yield write
    finally:
        for end in ends:
            end()


def append(file: Path, content: bytes) -> bool:
    """Appends all of it or nothing: False, with a warning, where the disk takes no more."""
    try:
        with open(file, "ab", buffering=0) as log:
            size = log.tell()
            try:
                if log.write(content) == len(content):
                    return True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                log.truncate(size)
                raise
    except OSError as error:
        print(f"{file} could not be written ({error}); its lines wait for the next time", file=sys.stderr)
        return False


def check_health(config: Config, step: int, metrics, last_saved: int):
    """Stops a run that leaves out one step after another."""
    if metrics["in_a_row"] >= config.patience:
        raise RunStopped(
            f"{metrics['in_a_row']} steps in a row were left out, the last, {step}, for a loss of {metrics['loss']} and a gradient norm of "
            f"{metrics['grad_norm']}; the last checkpoint is that of step {last_saved}; try a lower --learning-rate, or look for bad data")


class Meter:
    """Turns metrics into lines of the log, with the speed, the MFU and where the time since the start went."""

    def __init__(self, first: int, tokens: int, flops: float, peaks: dict[str, float]):
        """`tokens` a step, `flops` a token, `peaks` of `peak_rates`; the run begins after the step `first`."""
        self.tokens, self.flops, self.peaks, self.spent = tokens, flops, peaks, collections.Counter()
        self.began = self.last_time = time.time()
        self.last_step, self.last_paused = first, 0.0

    @contextlib.contextmanager
    def clock(self, what: str):
        """The seconds of this block go to the share of `what`."""
        began = time.time()
        try:
            yield
        finally:
            self.spent[what] += time.time() - began

    def line(self, step: int, metrics) -> dict[str, float]:
        now, paused = time.time(), self.spent.total() - self.spent["input"]  # the speed is that of training alone
        rate = self.tokens * (step - self.last_step) / max(1e-6, now - self.last_time - paused + self.last_paused)
        self.last_step, self.last_time, self.last_paused = step, now, paused
        seconds = now - self.began
        shares = {"share_compute": 1 - self.spent.total() / seconds, **{f"share_{what}": spent / seconds for what, spent in self.spent.items()}}
        return {"step": step, **metrics, "tokens": step * self.tokens, "tokens_per_second": round(rate, 1), "seconds": round(seconds, 2),
                **{name: round(self.flops * rate / peak, 4) for name, peak in self.peaks.items()}, **{name: round(share, 4) for name, share in shares.items()}}


# Dense bfloat16 FLOP/s of a device, by the beginning of its device_kind.
NOMINAL = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
           "NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
           "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12}


def peak_rates(dtype) -> dict[str, float]:
    """FLOP/s of all devices that 100% stands for: {"mfu": nominal, for known kinds and bfloat16; "mfu_measured": of a large matrix product}."""
    devices, n = jax.local_devices(), 1024 if jax.default_backend() == "cpu" else 8192
    product = jax.jit(lambda x: x @ x)
    x_DNN = [jax.device_put(jnp.full((n, n), 1 / n, dtype), device) for device in devices]
    x_DNN = jax.block_until_ready([product(x_NN) for x_NN in x_DNN])
    began, rounds = time.time(), 0
    while time.time() - began < 0.2:
        for _ in range(4):
            x_DNN = [product(x_NN) for x_NN in x_DNN]
        rounds += 4
        jax.block_until_ready(x_DNN)
    rates = {"mfu_measured": 2 * n**3 * rounds * jax.device_count() / (time.time() - began)}
    known = [rate for kind, rate in NOMINAL.items() if devices[0].device_kind.startswith(kind)]
    return ({"mfu": known[0] * jax.device_count()} if known and dtype == jnp.bfloat16 else {}) | rates


def main():
    # An orderly exit would first wait minutes for the other processes, which wait for this one.
    leave = lambda status: os._exit(status) if jax.distributed.is_initialized() else sys.exit(status)
    run_command(main_of, tyro.cli(Config, description=__doc__, default=preset(sys.argv[1:])), leave=leave)


def main_of(config: Config):
    if config.compile_only:
        jax.config.update("jax_platforms", "cpu")
        sys.exit(0 if compile_only(config)["fits"] else 1)
    tell_xla()
    keep_compiled(config.compilation_cache)
    train(config)


if __name__ == "__main__":
    main()
