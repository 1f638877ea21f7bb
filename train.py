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

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
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
from common.images import UserError, encode_image, sheet
from common.runs import (
    Checkpoints,
    asked_to_stop,
    begin_run,
    check_health,
    check_hosts_agree,
    check_numbers,
    keep_compiled,
    keep_log_until,
    leads,
    new_guard,
    open_log,
    own_run_folder,
    run_command,
    side_work,
    skip_bad_step,
    steps_of,
    warn,
)
from common.weights import read_json, write_whole
from flash_attention import zigzag

AXES = ("data", "fsdp", "tensor", "seq")
ROWS = P(("data", "fsdp"))  # a batch is split over both
ROW_KEYS = (
    "ids_BT",
    "mask_BT",
    "segment_ids_BT",
)  # of a batch; the last only where a row holds several sentences


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["none", "lvm-7b"] = "none"
    """Other defaults for all flags that are not given (`PRESETS`). lvm-7b: the published recipe of the 7b."""
    size: Literal[tuple(lvm.SIZES)] = "mini"
    """Width and depth of the model; `python lvm.py sizes` prints the table."""
    data: tuple[str, ...] = ()
    """Dataset folders or LVM's `.jsonl` files (also .jsonl.gz, .jsonl.zst), each `DIR` or `DIR:weight`; files are imported
    once into the run folder. Without any, demo sentences are made in the run folder."""
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
    """Dataset folder or `.jsonl` file for the held-out loss and the sample pictures; sentences that the
    training data hold too are left out of it."""
    heldout_fraction: float = 0.0
    """Keep this fraction of the sentences of every --data, chosen by the hash of their tokens, out of the
    training. Where --heldout is not given, the held-out loss and the sample pictures come from them; with
    neither there is no such loss."""
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
    """adamw, as published; palm, the published alternative (Adafactor without factors; with --schedule rsqrt
    --b2 0.99 --weight-decay 1 --learning-rate 0.01 --warmup 10000 it is that of PaLM); or muon for the
    blocks' matrices (scaled to AdamW's step, so that the same learning rate serves both) with adamw, its
    momentum Nesterov's, for the rest."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    schedule: Literal["cosine", "wsd", "rsqrt"] = "cosine"
    """After the warm-up: cosine, as published, down to the final rate at the last step; wsd, the peak, then a line down over
    the last --decay-fraction, so that a run can be lengthened before it; rsqrt, PaLM's, with no final rate."""
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
    """Stored dtype of the optimizer's moments; bfloat16 saves four bytes a weight (palm's second moment stays
    float32: two)."""
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
    """Steps between checkpoints; they are written while the training goes on. One that fails is tried again
    at the next."""
    save_patience: int = 300
    """Seconds for which a failed save of the last step is tried again before the run gives up."""
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
        check_numbers(self, {
            "[1, inf)": "steps batch accumulate save_every log_every demo_sentences keep patience heartbeat "
                        "milestone_every processes",
            "[0, inf)": "warmup evaluate_every save_patience process seed weight_decay z_loss",
            "[2, inf)": "context", "(0, inf)": "learning_rate clip",
            "[0, 1)": "b1 b2 heldout_fraction", "[0, 1]": "final_learning_rate", "(0, 1]": "decay_fraction"})  # fmt: skip
        if (
            (self.processes is None) != (self.process is None)
            or self.processes
            and not (self.coordinator and 0 <= self.process < self.processes)
        ):
            raise UserError(
                f"wanted --coordinator HOST:PORT --processes N --process I with I from 0 to N - 1, got {self.coordinator}, {self.processes}, {self.process}"
            )
        for package in self.log:
            module = {"tensorboard": "tensorboardX"}.get(package, package)
            if importlib.util.find_spec(module) is None:
                raise UserError(
                    f"--log {package} needs a package that is not installed here; type: pip install {module}"
                )
        if self.batch % self.accumulate:
            raise UserError(f"--batch {self.batch} is not a multiple of --accumulate {self.accumulate}")
        if (warmup := warmup_of(self)) >= self.steps:
            raise UserError(f"--warmup {warmup} must be less than --steps {self.steps}")
        if self.schedule == "wsd" and warmup + self.decay_fraction * self.steps > self.steps:
            raise UserError(
                f"--decay-fraction {self.decay_fraction} of {self.steps} steps and a warm-up (--warmup) of "
                f"{warmup} do not fit one after the other"
            )
        if self.moments == "bfloat16" and self.optimizer != "palm" and self.b2 > 0.99:
            raise UserError(
                f"--moments bfloat16 has 8 bits, and a second moment that falls by {1 - self.b2:.1g} of itself "
                "a step rounds back to what it was: take --b2 0.99 or less, or --moments float32"
            )
        if self.fields and not any(
            tokenize_data.is_lines(tokenize_data.split_weight(path)[0]) for path in self.data
        ):
            raise UserError(f"--fields {self.fields!r} is for .jsonl files, and --data names none")
        if self.compile_only != bool(self.topology):
            raise UserError(
                "--compile-only and --topology NAME go together, such as --compile-only --topology v5p:4x4x8"
            )
        try:
            sizes = [1] * 4 if self.mesh == "auto" else [int(n) for n in self.mesh.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
            raise UserError(
                f"--mesh {self.mesh}: wanted auto or four numbers data,fsdp,tensor,seq, one of which may be -1, such as 1,-1,1,1"
            )


# An update of the published 7b is 32 sentences x 4 micro-batches = 524,288 targets; its schedule counts updates. 4097 ids are
# 4096 inputs and targets.
PRESETS = {
    "none": {},
    "lvm-7b": dict(
        size="7b", packing="concat", context=4097, batch=128, accumulate=4, steps=288_000, learning_rate=1.5e-4, final_learning_rate=0.2,
        b1=0.9, b2=0.95, clip=1.0, weight_decay=0.1, decay_norms=True, dtype="bfloat16", remat="full", save_every=2_000, log_every=50, out=Path("runs/lvm-7b")),
}  # fmt: skip


def preset(arguments) -> Config:
    """The defaults that `--preset NAME` or `--preset=NAME` among the arguments asks for."""
    words = " ".join(map(str, arguments)).replace("=", " ").split()
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else "none"
    return Config(preset=name, **PRESETS.get(name, {}))


# These may differ when a run is resumed; everything else must be as it was.
MAY_CHANGE = {
    "preset",
    "out",
    "steps",
    "save_every",
    "keep",
    "milestone_every",
    "evaluate_every",
    "log_every",
    "log",
    "profile",
    "patience",
    "save_patience",
    "mesh",
    "remat",
    "compile_only",
    "topology",
    "compilation_cache",
    "learning_rate",
    "final_learning_rate",
    "warmup",
    "tokenizer",
    "heldout",
    "coordinator",
    "processes",
    "process",
    "heartbeat",
    "accept_new_data",
}


def warmup_of(config: Config) -> int:
    """Steps from 0 to the peak: those asked for, or else a tenth of all, at most the 8,000 of the published
    recipe."""
    return min(config.steps // 10, 8_000) if config.warmup is None else config.warmup


def with_warmup(config: Config) -> Config:
    """The config with its number of warm-up steps. A run that is resumed keeps the one it began with, also
    where --steps has grown: it would fall back into a longer warm-up."""
    before = None
    if config.warmup is None and steps_of(config.out / "checkpoints"):
        with contextlib.suppress(UserError):  # `begin_run` says what is wrong with a file of settings
            before = read_json(config.out / "config.json").get("train")
    before = before.get("warmup") if isinstance(before, dict) else None
    keeps = type(before) is int and 0 <= before < config.steps
    return dataclasses.replace(config, warmup=before if keeps else warmup_of(config))


def train(config: Config) -> lvm.LVM:
    """Trains until `config.steps`, or until a signal asks to stop, resuming where the run folder holds a
    checkpoint; returns the model."""
    config = with_warmup(config)
    start_processes(config)
    with own_run_folder(config.out):
        return train_in_own_folder(config)


def train_in_own_folder(config: Config) -> lvm.LVM:
    """`train`, once no other training can use the run folder."""
    check_hosts_agree(facts_of(config))
    say = print if leads() else lambda text: None

    # The data: what the model reads follows from --data, --seed and the step alone, so a checkpoint need not hold its place.
    data, asked = (config.data, config.heldout) if config.data else make_demo(config)
    paths, weights = zip(*map(tokenize_data.split_weight, data))
    folders = {path: tokenize_data.open_sentences(path) for path in paths if not tokenize_data.is_lines(path)}
    codes = next((part.codes for part in folders.values()), lvm.SIZES[config.size].codes)
    model_config = model_config_for(config, codes)
    mesh = make_mesh(config, model_config)
    check_batch(config, mesh)
    if config.remat == "offload" and "pinned_host" not in (
        kinds := [memory.kind for memory in jax.devices()[0].addressable_memories()]
    ):
        raise UserError(
            f"--remat offload wants pinned host memory; {jax.devices()[0].device_kind} has {', '.join(kinds)}: take --remat full"
        )
    specials = (model_config.bos, model_config.eos, model_config.pad)
    open_sentences = functools.partial(
        tokenize_data.open_sentences,
        codes=codes,
        specials=specials,
        fields=config.fields,
        vocabulary=model_config.vocab_size,
        beside=config.out / "data",
    )
    for path in filter(tokenize_data.is_lines, (*paths, asked) if leads() else ()):
        open_sentences(path)  # imports it, before all look for its shards
    multihost_utils.sync_global_devices("imported")
    shards = [folders.get(path) or open_sentences(path) for path in paths]
    trained = [
        Sentences(*about, np.arange(len(about[1])), weight) for *about, weight in zip(paths, shards, weights)
    ]
    asked = (str(asked), open_sentences(str(asked))) if asked else None
    opened = [*zip(paths, shards), *([asked] if asked else [])]
    check_hosts_agree({f"data {path}": part.digest for path, part in opened})
    heldout = find_heldout(trained, asked, config.heldout_fraction, say)
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if config.dtype == "auto" else config.dtype)
    context = config.context or model_config.context
    if config.init:
        check_init(config.init, shards[0].about["tokenizer"])
    flags, defaults = (json.loads(json.dumps(dataclasses.asdict(c), default=str)) for c in (config, Config()))
    check_same_data(
        config,
        facts := [
            {
                "path": path,
                "digest": part.digest,
                **{k: part.about[k] for k in ("tokenizer", "sentences", "tokens", "kinds")},
            }
            for path, part in zip(paths, shards)
        ],
    )
    begin_run(
        config.out / "config.json",
        flags,
        defaults,
        MAY_CHANGE,
        about={"model": dataclasses.asdict(model_config), "tokenizer": shards[0].about["tokenizer"]},
        noted={"data": facts, "format": tokenize_data.FORMAT},
    )

    # The state: the newest whole checkpoint, or else random weights or those of --init. What is wrong with the data is said before.
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep, config.milestone_every)
    first = checkpoints.newest
    part, parts = rows_of_process(mesh, config.batch, jax.process_index())
    batches = on_devices(
        mesh,
        tokenize_data.open_dataset(
            list(zip(shards, weights)),
            context=context,
            specials=specials,
            packing=config.packing,
            batch=config.batch,
            seed=config.seed,
            start=first,
            process=part,
            processes=parts,
            heldout_fraction=config.heldout_fraction,
        ),
        config.batch,
    )
    optimizer, schedule = make_optimizer(config)
    state, shardings = make_state(
        dataclasses.replace(config, init=None) if first else config, model_config, optimizer, mesh
    )
    if first:
        state = checkpoints.restore(state)
        say(f"resuming {config.out} at step {first}")
    if leads():
        keep_log_until(config.out / "metrics.jsonl", first)

    kinds = heldout_kinds(heldout, context, specials, rows=mesh.shape["data"] * mesh.shape["fsdp"])
    for kind, (_, members, count, _) in kinds.items():
        say(f"held-out loss of {kind}: of {count} of {members:,} sentences")
    if not kinds:
        say(
            "no held-out loss: no sentence is withheld from the training; --heldout-fraction 0.01 or --heldout DIR "
            "would. The sample pictures are of training sentences"
        )

    say(
        f"{config.size}: {lvm.parameter_count(model_config):,} parameters, {dtype.name} on {mesh.size} {jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}"
    )
    entropy = unigram_entropy(shards, weights)
    say(
        f"baseline: the entropy of the unigram distribution is {entropy:.3f} nats a code; a loss below it means that the model uses context"
    )
    loss_fn = make_loss(mesh, lvm.partition_specs(state["model"]), dtype, config.remat, config.z_loss)
    eval_fn = jax.jit(make_loss(mesh, lvm.partition_specs(state["model"]), dtype))
    evaluate_every = config.save_every if config.evaluate_every is None else config.evaluate_every
    counted = tokens_until(config.out / "metrics.jsonl", first) if leads() else 0
    meter = Meter(counted, lvm.training_flops(model_config, context), peak_rates(dtype))
    pending, stopping, step = collections.deque(), False, first

    if first < config.steps:
        batch = next(batches)
        with meter.clock("compile"):
            step_fn = (
                make_train_step(loss_fn, optimizer, config.accumulate, shardings)
                .lower(state, batch)
                .compile()
            )
    with (
        asked_to_stop() as stop,
        checkpoints,
        open_log(config.out, config.log, flags, first) as write,
        tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True, disable=not leads()) as bar,
    ):
        for step in range(first + 1, config.steps + 1):
            if config.profile and step == first + 2:
                with side_work(f"--profile {config.profile}"):
                    jax.profiler.start_trace(config.profile)
            state, metrics = step_fn(state, batch)  # returns at once, while the devices work
            pending.append((step, metrics))
            bar.update()
            with meter.clock("input"):
                batch = next(batches)
            stopping = stop(step) and step < config.steps
            saving = step % config.save_every == 0 or step == config.steps or stopping
            evaluating = bool(evaluate_every) and (step % evaluate_every == 0 or step == config.steps)
            while len(pending) > (
                0 if saving or evaluating else 1
            ):  # metrics are fetched one step late: no device waits for us
                done, metrics = pending.popleft()
                metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
                meter.tokens += metrics.pop("targets")
                check_health(done, metrics, config.patience, checkpoints.newest)
                if done % config.log_every == 0 or done == step and (saving or evaluating):
                    line = meter.line(done, metrics) | {
                        "learning_rate": float(schedule(done - 1 - metrics["skipped"]))
                    }
                    bar.set_postfix(loss=f"{line['loss']:.3f}", tokens=f"{line['tokens_per_second']:,.0f}/s")
                    if done == step and evaluating and kinds:
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
                    model = on_host(state["model"])
                    with side_work("the sample picture"):
                        if leads():
                            sample_picture(
                                config, model, heldout or trained, config.out / "samples" / f"{step}.png"
                            )
            if stopping:
                break
        checkpoints.finish(step, state, config.save_patience)
    if stopping:
        say(
            f"stopped at step {step} of {config.steps}, as a signal asked; the same command goes on from there"
        )
    elif leads():
        come_to = last_loss(config.out / "metrics.jsonl")
        picture = config.out / "samples" / f"{config.steps}.png"
        look = f"look at {picture}, then type" if picture.exists() else "now type"
        say(f"""done: {config.out} ({come_to}, unigram entropy {entropy:.3f}); {look}
    python sample.py --model {config.out}
    python evaluate.py shots --model {config.out}""")
    return state["model"]


def make_loss(mesh, specs, dtype, remat="none", z_loss=0.0, implementation=None):
    """loss(model, ids_BT, mask_BT[, segment_ids_BT]): the mean over the whole batch, computed shard by shard.

    Differentiate it outside the shard_map: the transpose of each gather below is then the reduce-scatter of its gradient.
    `implementation` is `flash_attention`'s; None picks for the mesh's devices."""
    ranks = mesh.shape["seq"]
    ring = "seq" if ranks > 1 else None

    def gather(weights):
        def whole(path, w):
            name = path[-1].name
            axes = lvm.SHARDING[name]
            w = own_columns(w) if name == "head_DV" else w
            w = lax.pcast(
                w, ("data", "seq"), to="varying"
            )  # so that the sum over them runs on shards, not on whole gradients
            if w.ndim > 1 and name != "embedding_VD":  # `LVM.embed` casts what it has looked up
                w = w.astype(dtype)
            return (
                lax.all_gather(w, "fsdp", axis=axes.index("fsdp"), tiled=True)
                if "fsdp" in axes
                else lax.pcast(w, "fsdp", to="varying")
            )

        return jax.tree_util.tree_map_with_path(whole, weights)

    def own_columns(head_DV):
        """The columns of the head for this device along "tensor", after padding it to whole lanes of 128 for each."""
        V, parts = head_DV.shape[1], mesh.shape["tensor"]
        width = -(-V // (128 * parts)) * 128
        head_DV = jnp.pad(head_DV, ((0, 0), (0, width * parts - V)))
        return lax.dynamic_slice_in_dim(head_DV, lax.axis_index("tensor") * width, width, axis=1)

    def shard_loss(model, ids_BT, targets_BT, mask_BT, segment_ids_BT=None):
        losses_BT = model.losses(
            ids_BT,
            targets_BT,
            segment_ids_BT,
            gather=gather,
            reduce=lambda x: lax.psum(x, "tensor"),
            dtype=dtype,
            remat=remat,
            ring=ring,
            vocabulary="tensor",
            z_loss=z_loss,
            implementation=implementation,
        )
        loss, _ = lvm.mean_of_rows(losses_BT, mask_BT, whole_row=lambda sum_B: lax.psum(sum_B, "seq"))
        return lax.pmean(loss, ("data", "fsdp"))

    def loss(model, ids_BT, mask_BT, *segment_ids_BT):
        rows = [ids_BT, *lvm.next_tokens(ids_BT, mask_BT), *segment_ids_BT]
        if ring:  # whole chunks for all, in the order that gives each device as much work
            rows = [jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % (2 * ranks)))) for x_BT in rows]
            rows = [x_BT[:, zigzag(x_BT.shape[1], ranks)] for x_BT in rows]
        split = P(*ROWS, "seq")
        return jax.shard_map(shard_loss, mesh=mesh, in_specs=(specs, *[split] * len(rows)), out_specs=P())(
            model, *rows
        )

    return loss


def make_train_step(loss_fn, optimizer, accumulate, shardings):
    """train_step(state, batch) -> (state, metrics): pure, jitted, its state donated."""

    def train_step(state, batch):
        loss_and_grads = lambda rows: jax.value_and_grad(loss_fn)(
            state["model"], *(rows[k] for k in ROW_KEYS if k in rows)
        )
        if accumulate == 1:
            loss, grads = loss_and_grads(batch)
        else:  # micro-batch a takes rows a, a + A, ... so that no row changes its device
            micro = jax.tree.map(
                lambda x_BT: x_BT.reshape(-1, accumulate, x_BT.shape[1]).swapaxes(0, 1), batch
            )
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["model"]))
            total, _ = lax.scan(
                lambda total, rows: (jax.tree.map(jnp.add, total, loss_and_grads(rows)), None), zero, micro
            )
            loss, grads = jax.tree.map(lambda x: x / accumulate, total)
        updates, moments = optimizer.update(grads, state["optimizer"], state["model"])
        norm = optax.global_norm(grads)
        new = skip_bad_step(
            {"model": optax.apply_updates(state["model"], updates), "optimizer": moments},
            state,
            loss,
            {"loss": loss, "norm": norm},
        )
        counts = {name: new["guard"][name] for name in ("skipped", "in_a_row")}
        targets = jnp.count_nonzero(batch["mask_BT"][:, 1:])  # the first of a row is nobody's target
        return new, {"loss": loss, "grad_norm": norm, **counts, "targets": targets}

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_optimizer(config: Config):
    """(clipping by the global norm and the update, the learning rate at an update); both count updates, not micro-batches."""
    schedule = make_schedule(config)
    decayed = lambda model: jax.tree_util.tree_map_with_path(
        lambda path, _: config.decay_norms or "norm" not in path[-1].name, model
    )
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed)
    elif config.optimizer == "palm":
        update = palm(schedule, config.b1, config.b2, config.weight_decay, decayed, jnp.dtype(config.moments))
    else:
        # Which axes of a weight are summed over and which it makes; the stacked layers before them are a batch.
        ends = {
            "q_DNK": (1, 2),
            "k_DNK": (1, 2),
            "v_DNK": (1, 2),
            "o_NKD": (2, 1),
            "gate_DF": (1, 1),
            "up_DF": (1, 1),
            "down_FD": (1, 1),
        }

        def axes(path, w):
            if (name := path[-1].name) not in ends:
                return None
            taken, made = ends[name]
            return optax.contrib.MuonDimensionNumbers(
                tuple(range(1, 1 + taken)), tuple(range(1 + taken, 1 + taken + made))
            )

        muon = optax.contrib.muon(
            schedule,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda model: jax.tree_util.tree_map_with_path(axes, model),
        )
        # Its own decay knows no mask for the weights that are left to Adam.
        decay = optax.add_decayed_weights(lambda count: -config.weight_decay * schedule(count), decayed)
        update = optax.chain(muon, decay)
    if config.moments != "float32" and config.optimizer != "palm":
        update = with_narrow_moments(update, jnp.dtype(config.moments))
    return optax.chain(optax.clip_by_global_norm(config.clip), update), schedule


def make_schedule(config: Config):
    """Linear warm-up to the peak; then a cosine or, in wsd, the peak until the last `decay_fraction` of the steps and a line
    down to the final rate; rsqrt, PaLM's: the peak for `warmup` updates, then falling with the square root of the update."""
    peak, warmup = config.learning_rate, warmup_of(config)
    last = config.final_learning_rate * peak
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps, last)
    if config.schedule == "rsqrt":
        return lambda count: peak * jnp.sqrt(max(warmup, 1) / jnp.maximum(count, max(warmup, 1)))
    decay = max(1, round(config.decay_fraction * config.steps))
    rise, fall = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, last, decay)
    return optax.join_schedules((rise, optax.constant_schedule(peak), fall), [warmup, config.steps - decay])


def palm(schedule, b1, b2, weight_decay, decayed, moments):
    """Adafactor without factors, as in the PaLM paper (arXiv 2204.02311, section 5) and in EasyLM: steps in
    proportion to the RMS of each weight of each layer, a second moment whose decay 1 - t^-b2 grows with the
    update t, momentum of the steps, and weights that decay by `weight_decay` times the square of the learning
    rate (1 in the paper; EasyLM writes 1e-4).

    The momentum is kept in the dtype `moments`; the second moment in float32, as its late, small steps are
    lost in less."""

    def scale(updates, state, weights):
        def of_its_weight(path, u, w):
            stacked = any(
                getattr(key, "name", None) == "blocks" for key in path
            )  # the first axis is the layer
            rms = jnp.sqrt(jnp.mean(w**2, axis=tuple(range(stacked, w.ndim)), keepdims=True))
            return u * jnp.maximum(rms, 1e-3)

        return jax.tree_util.tree_map_with_path(of_its_weight, updates, weights), state

    by_weight = optax.GradientTransformation(lambda weights: optax.EmptyState(), scale)
    return optax.chain(
        optax.scale_by_factored_rms(factored=False, decay_rate=b2),
        optax.scale_by_schedule(schedule),
        by_weight,
        optax.ema(b1, debias=False, accumulator_dtype=moments),
        optax.scale(-1),
        optax.add_decayed_weights(lambda count: -weight_decay * schedule(count) ** 2, decayed),
    )


def with_narrow_moments(update, dtype):
    """The same update, with its moments kept in `dtype` between steps and float32 within one. Moments bear
    the names of their weights; what else a state holds, such as Muon's coefficients, stays as it is."""
    is_moment = lambda path: getattr(path[-1], "name", None) in lvm.SHARDING

    def cast(state, dtype):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(dtype) if is_moment(path) else x, state
        )

    narrow, wide = functools.partial(cast, dtype=dtype), functools.partial(cast, dtype=jnp.float32)

    def step(grads, state, weights):
        updates, state = update.update(grads, wide(state), weights)
        return updates, narrow(state)

    return optax.GradientTransformation(lambda weights: narrow(update.init(weights)), step)


def make_state(config: Config, model_config, optimizer, mesh):
    """({"model", "optimizer", "guard"}, their shardings): every leaf is born on the devices that keep it."""
    abstract, shardings = abstract_state(config, model_config, optimizer, mesh)
    if config.init is None:
        return jax.jit(
            lambda: new_state(lvm.LVM(model_config, key=jax.random.key(config.seed)), optimizer),
            out_shardings=shardings,
        )(), shardings
    with jax.default_device(
        jax.local_devices(backend="cpu")[0]
    ):  # the host's memory: a whole model may be too large for a device
        given = lvm.load(config.init)
    ours = {
        name: getattr(model_config, name) for name in ("context", "bos_id", "eos_id", "pad_id")
    }  # no weight's shape or meaning depends on these
    if dataclasses.replace(given.config, **ours) != model_config:
        raise UserError(
            f"--init {config.init} holds {given.config}, --size {config.size} and the data ask for {model_config}"
        )

    def place(weight, sharding):  # each device takes its part
        return jax.make_array_from_callback(weight.shape, sharding, lambda index: weight[index])

    weights = jax.tree.unflatten(
        jax.tree.structure(shardings["model"]), [np.asarray(weight) for weight in jax.tree.leaves(given)]
    )
    model = jax.tree.map(place, weights, shardings["model"])
    return jax.jit(lambda model: new_state(model, optimizer), out_shardings=shardings, donate_argnums=0)(
        model
    ), shardings


def new_state(model, optimizer):
    return {"model": model, "optimizer": optimizer.init(model), "guard": new_guard()}


def abstract_state(config: Config, model_config, optimizer, mesh):
    """(the state's shapes, its shardings); refuses a mesh that does not divide the model."""
    for axis, sizes in (
        ("fsdp", {"hidden": model_config.hidden}),
        ("tensor", {"heads": model_config.heads, "ffn": model_config.ffn}),
    ):
        for name, size in sizes.items():
            if size % (n := mesh.shape[axis]):
                fit = [m for m in range(1, size + 1) if all(other % m == 0 for other in sizes.values())]
                near = sorted({max(m for m in fit if m < n), min([m for m in fit if m > n], default=fit[-1])})
                raise UserError(
                    f"--mesh: {axis} {n} does not divide the {name} of {config.size}, {size}; the nearest that do: {' and '.join(map(str, near))}"
                )

    abstract = eqx.filter_eval_shape(
        lambda: new_state(lvm.LVM(model_config, key=jax.random.key(config.seed)), optimizer)
    )
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        lvm.partition_specs(abstract),
        is_leaf=lambda x: isinstance(x, P),
    )
    return abstract, shardings


def make_mesh(config: Config, model_config, devices=None, memory=None):
    """The mesh of --mesh over all devices: fsdp, tensor and seq next to each other within a node or slice, data across.

    `memory` is a device's in bytes; None asks it."""
    devices = jax.devices() if devices is None else devices
    slices = (
        len({getattr(device, "slice_index", None) for device in devices})
        if devices[0].platform == "tpu"
        else 1
    )
    if config.mesh == "auto":
        memory = memory or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        group = len(devices) // slices if devices[0].platform == "tpu" else min(8, len(devices))
        sizes, reason = choose_mesh(config, model_config, len(devices), group, memory, slices)
    else:
        sizes, reason = [int(n) for n in config.mesh.split(",")], "as asked for"
        known = math.prod(n for n in sizes if n != -1)
        sizes = [len(devices) // known if n == -1 else n for n in sizes]
        if math.prod(sizes) != len(devices):
            raise UserError(
                f"--mesh {config.mesh} does not make use of exactly the {len(devices)} devices that are here"
            )
    if sizes[0] % slices:
        raise UserError(
            f"--mesh: data {sizes[0]} is no multiple of the {slices} slices; fsdp, tensor and seq stay within one"
        )
    print(f"mesh {','.join(map(str, sizes))} ({','.join(AXES)}): {reason}")
    if slices > 1:
        array = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:  # in the order of their processes: neighbours share a node
        array = np.array(devices).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(config: Config, mesh):
    share = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch % (config.accumulate * share):
        raise UserError(
            f"--batch {config.batch} over {config.accumulate} micro-batches does not divide by the {share} devices of data x fsdp"
        )


def choose_mesh(config: Config, model_config, devices: int, group: int, memory, slices=1):
    """(sizes, reason) of --mesh auto. A `group` is a node of GPUs or a slice of TPUs, where gathers are quick; `memory` in
    bytes a device, None where devices share it. Between `slices` goes data alone."""
    rows, D, N, F = (
        config.batch // config.accumulate,
        model_config.hidden,
        model_config.heads,
        model_config.ffn,
    )
    moment = jnp.dtype(config.moments).itemsize
    state = lvm.parameter_count(model_config) * (8 + moment + (4 if config.optimizer == "palm" else moment))
    told = f"weights, gradients and moments take {state / 1e9:.1f} GB"
    if devices == 1:
        return (1, 1, 1, 1), "one device"
    if memory is None:
        shards, reason = 1, "these devices share one memory, so nothing is gained by splitting weights"
    elif state <= memory / 2:
        shards, reason = (
            1,
            f"{told}, at most half of a device's {memory / 1e9:.0f} GB: every device holds them all",
        )
    else:
        shards = group if state / group <= memory / 2 or slices > 1 else devices
        where = "all devices" if shards == devices else f"the {group} of a node or slice, which then do alike"
        reason = f"{told}, more than half of a device's {memory / 1e9:.0f} GB: split over {where}"
    # Each group of devices that work on one row does so by tensor, or else by seq.
    for tensor, seq in [
        (1, 1),
        (2, 1),
        (4, 1),
        (8, 1),
        (1, 2),
        (2, 2),
        (4, 2),
        (8, 2),
        (1, 4),
        (4, 4),
        (8, 4),
        (1, 8),
        (8, 8),
        (1, devices),
    ]:  # the last always does
        workers = devices // (tensor * seq)
        if devices % (tensor * seq) == 0 and rows % workers == 0 and N % tensor == 0 and F % tensor == 0:
            fsdp = max(n for n in range(1, workers + 1) if workers % n == 0 and D % n == 0 and n <= shards)
            reason += (
                f"; {rows} rows a micro-batch are fewer than devices or do not divide by them: {tensor * seq} devices a row"
                if tensor * seq > 1
                else ""
            )
            return (workers // fsdp, fsdp, tensor, seq), reason


def model_config_for(config: Config, codes: int):
    """The size's config, with the codebook of the data, and the context and special ids that were asked for."""
    model_config = dataclasses.replace(lvm.SIZES[config.size], codes=codes)
    if config.special_ids:
        try:
            ids = dict(zip(("bos_id", "eos_id", "pad_id"), config.special_ids))
            model_config = dataclasses.replace(model_config, **ids)
        except UserError as error:
            raise UserError(f"--special-ids {' '.join(map(str, config.special_ids))}: {error}") from None
    return dataclasses.replace(model_config, context=config.context or model_config.context)


# ---------------------------------------------------------------------------------------------------- processes


def start_processes(config: Config):
    """Joins the processes of a run on several hosts, before JAX looks for devices. JAX reads their number and addresses
    from the environment of SLURM's srun, of Open MPI's mpirun (from version 5 on with --coordinator) and of TPU pods."""
    if jax.distributed.is_initialized():
        return
    found, processes, process = os.environ.get, config.processes, config.process
    srun, mpirun = (
        int(found("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ,
        int(found("OMPI_COMM_WORLD_SIZE", 1)) > 1,
    )
    on_tpu = found("JAX_PLATFORMS", "tpu") == "tpu" and (
        any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    )
    if config.coordinator and processes is None and mpirun:
        processes, process = int(found("OMPI_COMM_WORLD_SIZE")), int(found("OMPI_COMM_WORLD_RANK"))
    if config.coordinator or srun or mpirun or on_tpu:
        jax.distributed.initialize(
            config.coordinator, processes, process, heartbeat_timeout_seconds=config.heartbeat
        )


def facts_of(config: Config) -> dict[str, str]:
    """What all hosts must have alike before they compute together: flags, program, libraries, devices."""
    flags = {
        f"--{k.replace('_', '-')}": str(v)
        for k, v in dataclasses.asdict(config).items()
        if k not in ("process", "profile")
    }
    here = Path(__file__).resolve().parent
    sources = sorted(
        [
            Path(__file__),
            *here.glob("common/*.py"),
            *(here / f"{name}.py" for name in ("lvm", "flash_attention", "tokenize_data", "vqgan")),
        ]
    )
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return flags | {
        "code": code,
        "versions": f"jax {jax.__version__}, numpy {np.__version__}",
        "devices of a host": str(jax.local_device_count()),
    }


def check_same_data(config: Config, data: list[dict]):
    """Raises UserError where a dataset of a run that goes on is not what it was, with the difference, or where an older
    program, which read the rows in another order, began it."""
    before = {}
    if not config.accept_new_data and steps_of(config.out / "checkpoints"):
        with contextlib.suppress(UserError):  # `begin_run` says what is wrong with this file
            before = read_json(config.out / "config.json")
    if before and before.get("format") != tokenize_data.FORMAT:
        raise UserError(
            f"{config.out} is a run of format {before.get('format', 'below 3')}, this program's is "
            f"{tokenize_data.FORMAT}: it read the data in another order. Start from its weights with --init "
            f"{config.out} and another --out, or go on in the new order by --accept-new-data"
        )
    before = before.get("data") if isinstance(before.get("data"), list) else []
    differ = [
        f"{new['path']}: " + ", ".join(f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v)
        for old, new in zip(before, data)
        if isinstance(old, dict) and old.get("path") == new["path"] and old != new
    ]
    if differ:
        raise UserError(
            f"the data were changed since this run began ({'; '.join(differ)}): put them back, or go on with the "
            "new ones by --accept-new-data"
        )


def on_host(model):
    """The whole model where one process shall use it alone."""
    return multihost_utils.process_allgather(model, tiled=True) if jax.process_count() > 1 else model


# ---------------------------------------------------------------------------------------------------- the run folder


def make_demo(config: Config):
    """Composes the embedded demo sentences where they are not there yet -> (training folders, held-out folder)."""
    folder = config.out / "data"
    for split, sentences in (("train", config.demo_sentences), ("heldout", 64)):
        if leads() and not (folder / split).exists():
            print(f"composing {sentences} demo sentences ({split}) in {folder / split}")
            tokenize_data.demo(
                tokenize_data.Demo(
                    out=folder / split, sentences=sentences, split=split, tokenizer=config.tokenizer
                )
            )
    multihost_utils.sync_global_devices("demo")
    return (str(folder / "train"),), config.heldout or folder / "heldout"


def check_init(init: Path, fingerprint: str | None):
    """Refuses weights that were trained on another tokenizer's codes, where both they and the data say whose those are."""
    file = init / "config.json"
    known = read_json(file).get("tokenizer") if file.is_file() else None
    if None not in (known, fingerprint) and known != fingerprint:
        raise UserError(
            f"--init {init} was trained on the codes of tokenizer {known}, and the data are codes of {fingerprint}: tokenize them with the first one"
        )


def last_loss(log: Path) -> str:
    """What a run has come to by its metrics.jsonl: the last held-out loss, or, where it has none, the loss of
    the last batch."""
    lines = read_log(log)
    number = lambda loss: "no finite number" if loss is None else f"{loss:.3f}"
    for line in reversed(lines):
        if "heldout_loss" in line:
            return f"held-out loss {number(line['heldout_loss'])} at step {line['step']}"
    if not lines:
        return "no loss was logged"
    return f"training loss {number(lines[-1]['loss'])} of the last batch, none held out"


def tokens_until(log: Path, step: int) -> int:
    """The targets counted until `step`, by its line of the log, or by the newest before it where a full disk
    has swallowed it."""
    counted = {0: 0} | {line["step"]: line.get("tokens", 0) for line in read_log(log)}
    newest = max(n for n in counted if n <= step)
    if newest < step:
        warn(f"{log} has no line of step {step}: its tokens are counted on from step {newest}")
    return counted[newest]


def read_log(log: Path) -> list[dict]:
    """The lines of a metrics.jsonl; `keep_log_until` has mended it."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def rows_of_process(mesh, batch: int, process: int) -> tuple[int, int]:
    """(part, parts): a process feeds its devices the part-th of so many equal parts of a batch's rows, in
    order.

    The rows of its devices need not be neighbours: a host of TPUs is a block of the torus. Processes that
    split a sentence or a matrix between them hold, and read, the same rows. Where the sets of rows of two
    processes differ and yet have rows in common, (0, 1): all read the whole batch."""
    rows_of = collections.defaultdict(set)
    for device, (rows,) in NamedSharding(mesh, ROWS).devices_indices_map((batch,)).items():
        rows_of[device.process_index].add(rows.start or 0)
    sets = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if len({len(rows) for rows in sets}) > 1 or sum(map(len, sets)) > len(set().union(*sets)):
        return 0, 1
    return sets.index(tuple(sorted(rows_of[process]))), len(sets)


def on_devices(mesh, batches, batch: int, ahead=2):
    """Yields batches of so many rows in all that are already on their way to the devices, two steps before
    they are wanted."""
    coming, sharding = collections.deque(), NamedSharding(mesh, ROWS)
    for rows in batches:
        place = lambda x_BT: jax.make_array_from_process_local_data(sharding, x_BT, (batch, *x_BT.shape[1:]))
        coming.append(jax.tree.map(place, rows))
        if len(coming) > ahead:
            yield coming.popleft()


class Sentences(NamedTuple):
    """Some sentences of a dataset."""

    name: str
    """its path"""
    part: tokenize_data.Shards
    """all of it"""
    chosen_N: np.ndarray
    """numbers of the sentences that are meant"""
    weight: float
    """of the dataset in the mixture"""


def find_heldout(trained: list[Sentences], asked, fraction: float, say) -> list[Sentences]:
    """Sentences that are never trained on, none where none are withheld: those of `asked`, a (path, dataset)
    or None, that the training data do not hold too; or else, of each of these, the `fraction` that
    `open_dataset` leaves out."""
    withheld = lambda part: (
        tokenize_data.is_heldout(part, fraction) if fraction else np.zeros(len(part), bool)
    )
    if asked is None:
        found = [rows._replace(chosen_N=np.flatnonzero(withheld(rows.part))) for rows in trained]
        for rows in found if fraction else ():
            say(
                f"{rows.name}: {len(rows.chosen_N):,} of {len(rows.part):,} sentences are withheld from the training"
            )
        return [rows for rows in found if len(rows.chosen_N)]
    name, part = asked
    for rows in trained:
        if (
            part.codes != rows.part.codes
            or len({part.about["tokenizer"], rows.part.about["tokenizer"], None}) > 2
        ):
            raise UserError(f"--heldout {name} was made by another tokenizer than {rows.name}")
    seen_N = also_in(part, [rows.part for rows in trained]) & ~withheld(part)
    if seen_N.all():
        raise UserError(
            f"--heldout {name}: all of its {len(part):,} sentences are among those of --data; name data that "
            "the model is not trained on, or use --heldout-fraction 0.01"
        )
    if seen_N.any():
        say(
            f"--heldout {name}: {seen_N.sum():,} of its {len(part):,} sentences are trained on, and left out of the "
            "held-out loss"
        )
    return [Sentences(name, part, np.flatnonzero(~seen_N), 1.0)]


def also_in(part, others) -> np.ndarray:
    """For each sentence of a dataset: do the others hold one of the same tokens? By the hashes first; 32 bits
    alone would err."""
    found_N = np.zeros(len(part), bool)
    for other in others:
        twins = collections.defaultdict(list)
        for i in np.flatnonzero(np.isin(other.hashes_N, part.hashes_N[~found_N])).tolist():
            twins[int(other.hashes_N[i])].append(i)
        for n in np.flatnonzero(~found_N & np.isin(part.hashes_N, list(twins))):
            found_N[n] = any(np.array_equal(part[n][1], other[i][1]) for i in twins[int(part.hashes_N[n])])
    return found_N


def heldout_kinds(heldout: list[Sentences], context: int, specials, rows: int, most=32):
    """Held-out sentences -> {kind: (its share of the loss, how many there are, how many are taken, batches of
    `rows` rows of ids and masks)}; kinds of several datasets are named "dataset/kind".

    The share is that of the dataset's weight times that of the kind within it, as the training mixes them. Of
    every kind about as many are taken, evenly spaced, `most` in all; each is a row of its own, cut to the
    context. Rows that are left empty count for nothing."""
    stems = [Path(held.name).stem for held in heldout]
    names, groups, taken = stems if len(set(stems)) == len(stems) else [held.name for held in heldout], {}, {}
    for name, (_, part, chosen_N, weight) in zip(names, heldout):
        kinds_N = part.kinds_N
        for kind in np.unique(kinds_N[chosen_N]):
            members_N = chosen_N[kinds_N[chosen_N] == kind]
            share = weight / sum(held.weight for held in heldout) * len(members_N) / len(chosen_N)
            label = part.kinds[kind] if len(heldout) == 1 else f"{name}/{part.kinds[kind]}"
            groups[label] = share, part, members_N
    for kind, (share, part, members_N) in groups.items():
        count = min(len(members_N), -(-most // len(groups) // rows) * rows)
        ids_NT = np.full((-(-count // rows) * rows, context), specials[2], np.int32)
        mask_NT = np.zeros(ids_NT.shape, np.float32)
        for n, i in enumerate(members_N[np.linspace(0, len(members_N) - 1, count).astype(int)]):
            ids_T, counts_T = part.row(i, specials)
            T = min(len(ids_T), context)
            ids_NT[n, :T], mask_NT[n, 1:T] = ids_T[:T], 1 if counts_T is None else counts_T[1:T]
        batches = [(ids_NT[n : n + rows], mask_NT[n : n + rows]) for n in range(0, len(ids_NT), rows)]
        taken[kind] = share, len(members_N), count, batches
    return taken


def heldout_losses(eval_fn, model, kinds, mesh) -> dict[str, float]:
    """The held-out loss of every kind, and their mean by its share."""
    place = lambda x_BT: jax.make_array_from_callback(
        x_BT.shape, NamedSharding(mesh, ROWS), lambda index: x_BT[index]
    )
    of_rows = lambda batch: float(eval_fn(model, *map(place, batch))) * len(batch[0])
    losses = {kind: sum(map(of_rows, batches)) / count for kind, (_, _, count, batches) in kinds.items()}
    loss = sum(kinds[kind][0] * losses[kind] for kind in kinds)
    return {
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(min(loss, 700)),
        **{f"heldout_loss/{kind}": losses[kind] for kind in kinds if len(kinds) > 1},
    }


def unigram_entropy(shards, weights=None) -> float:
    """Entropy in nats of the codes' frequencies in the mixture: the loss of a model that knows these and
    nothing else."""
    weights = weights or [1.0] * len(shards)
    counts_V = sum(weight * part.code_counts() / len(part) for part, weight in zip(shards, weights))
    p_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(p_V * np.log(p_V)).sum())


def sample_picture(config: Config, model, chosen: list[Sentences], path: Path, rows=6):
    """Rows of some sentences: all but the last picture, the true last one, and the model's likeliest one."""
    tokenizer = vqgan.load(config.tokenizer)
    known = [
        (part, chosen_N)
        for _, part, chosen_N, _ in chosen
        if part.about["tokenizer"] == vqgan.fingerprint(tokenizer)
    ]
    pool = [(part, i) for part, chosen_N in known for i in chosen_N]
    if not pool:
        print(
            f"no sample pictures: the sentences were not made by {config.tokenizer}, or do not say so as a .jsonl does; "
            "name their tokenizer with --tokenizer, or turn the .jsonl into shards with: python tokenize_data.py import-jsonl",
            file=sys.stderr,
        )
        return
    S = pool[0][0].about["codes_per_image"]
    sentences = [pool[n][0][pool[n][1]][1] for n in np.linspace(0, len(pool) - 1, rows).astype(int)]
    if (most := (model.config.context - 1) // S * S) < 2 * S:
        print(
            f"no sample pictures: a context of {model.config.context} holds no two pictures of {S} codes after BOS",
            file=sys.stderr,
        )
        return
    sentences = np.stack([s[-most:] for s in sentences if len(s) == len(sentences[0])]).astype(np.int32)
    prompt_BT = np.concatenate([np.full((len(sentences), 1), model.config.bos), sentences[:, :-S]], axis=1)
    answer_BS = likeliest_picture(
        jax.device_put(model, jax.local_devices()[0]), jnp.asarray(prompt_BT, jnp.int32), S
    )
    codes_BNS = np.concatenate([sentences, answer_BS], axis=1).reshape(len(sentences), -1, S)
    pixels = vqgan.decode(tokenizer, codes_BNS.reshape(-1, S)).reshape(
        *codes_BNS.shape[:2], *[tokenizer.config.resolution] * 2, 3
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encode_image(sheet(list(np.asarray(pixels)), captions=False), path))


@functools.partial(jax.jit, static_argnums=2)
def likeliest_picture(model, prompt_BT, S):
    """Greedy decoding of the next S image codes -> int32 [B, S]."""
    logits_BV, cache = lvm.prefill(model, prompt_BT, prompt_BT.shape[1] + S)

    def step(carry, _):
        logits_BV, cache = carry
        code_B = jnp.argmax(logits_BV[:, : model.config.codes], axis=-1).astype(jnp.int32)
        return lvm.decode_step(model, code_B, cache), code_B

    _, codes_SB = lax.scan(step, (logits_BV, cache), length=S)
    return codes_SB.T


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
    if new := [
        flag
        for flag in XLA_FLAGS.get({"gpu": "cuda"}.get(platform, platform), ())
        if flag.split("=")[0] not in names
    ]:
        os.environ["XLA_FLAGS"] = " ".join([given, *new]).strip()
        print(f"XLA_FLAGS += {' '.join(new)}")
    if platform in ("cuda", "gpu"):
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of the memory; 0.75 by default


# ---------------------------------------------------------------------------------------------------- the log's numbers


class Meter:
    """Turns metrics into lines of the log, with the speed, the MFU and where the time since the start went."""

    def __init__(self, tokens: int, flops: float, peaks: dict[str, float]):
        """`tokens` before the first step of this start: targets that the loss counts, so neither padding nor
        what --fields leaves out; whoever has the metrics adds those of each step. `flops` a token, `peaks` of
        `peak_rates`."""
        self.tokens, self.flops, self.peaks, self.spent = tokens, flops, peaks, collections.Counter()
        self.began = self.last_time = time.monotonic()
        self.last_tokens, self.last_paused = tokens, 0.0

    @contextlib.contextmanager
    def clock(self, what: str):
        """The seconds of this block go to the share of `what`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] += time.monotonic() - began

    def line(self, step: int, metrics) -> dict[str, float]:
        now, paused = (
            time.monotonic(),
            self.spent.total() - self.spent["input"],
        )  # the speed is that of training alone
        rate = (self.tokens - self.last_tokens) / max(1e-6, now - self.last_time - paused + self.last_paused)
        self.last_tokens, self.last_time, self.last_paused = self.tokens, now, paused
        seconds = now - self.began
        shares = {
            "share_compute": 1 - self.spent.total() / seconds,
            **{f"share_{what}": spent / seconds for what, spent in self.spent.items()},
        }
        return {
            "step": step,
            **metrics,
            "tokens": self.tokens,
            "tokens_per_second": round(rate, 1),
            "seconds": round(seconds, 2),
            **{name: round(self.flops * rate / peak, 4) for name, peak in self.peaks.items()},
            **{name: round(share, 4) for name, share in shares.items()},
        }


# Dense bfloat16 FLOP/s of a device, by the beginning of its device_kind.
NOMINAL = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_rates(dtype) -> dict[str, float]:
    """FLOP/s of all devices that 100% stands for: {"mfu": nominal, for known kinds and bfloat16;
    "mfu_measured": of a large product of random matrices}. GPUs multiply constant ones faster, as fewer bits
    flip and less power is drawn."""
    devices, n = jax.local_devices(), 1024 if jax.default_backend() == "cpu" else 8192
    product = jax.jit(jnp.matmul)
    random = [jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2)]
    pairs = [[jax.device_put(x_NN, device) for x_NN in random] for device in devices]
    jax.block_until_ready([product(*pair) for pair in pairs])
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        rounds += 4
        jax.block_until_ready([product(*pair) for pair in pairs for _ in range(4)])
    rates = {"mfu_measured": 2 * n**3 * rounds * jax.device_count() / (time.perf_counter() - began)}
    known = [rate for kind, rate in NOMINAL.items() if devices[0].device_kind.startswith(kind)]
    return ({"mfu": known[0] * jax.device_count()} if known and dtype == jnp.bfloat16 else {}) | rates


def main():
    # An orderly exit would first wait minutes for the other processes, which wait for this one.
    leave = lambda status: os._exit(status) if jax.distributed.is_initialized() else sys.exit(status)
    run_command(main_of, tyro.cli(Config, description=__doc__, default=preset(sys.argv[1:])), leave=leave)


def compile_step(config: Config, devices, memory):
    """(compiled training step, mesh, model config) for devices with so many bytes each, which need not be here."""
    model_config = model_config_for(config, lvm.SIZES[config.size].codes)
    mesh = make_mesh(config, model_config, devices, memory)
    check_batch(config, mesh)
    optimizer, _ = make_optimizer(config)
    state, shardings = abstract_state(config, model_config, optimizer, mesh)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    row = lambda dtype: jax.ShapeDtypeStruct(
        (config.batch, model_config.context), dtype, sharding=NamedSharding(mesh, ROWS)
    )
    dtype = jnp.dtype("bfloat16" if config.dtype == "auto" else config.dtype)
    loss_fn = make_loss(
        mesh, lvm.partition_specs(state["model"]), dtype, config.remat, config.z_loss, implementation="pallas"
    )
    step = make_train_step(loss_fn, optimizer, config.accumulate, shardings)
    batch = {"ids_BT": row(jnp.int32), "mask_BT": row(jnp.float32)}
    return step.trace(jax.tree.map(place, state, shardings), batch).lower().compile(), mesh, model_config


def compile_only(config: Config) -> dict:
    """Compiles the step for --topology, prints what it takes, and returns that; `fits` says whether it does."""
    from benchmarks import pods

    tell_xla("cuda" if config.topology.startswith("h200") else "tpu")
    return pods.compile_only(config, compile_step)


def main_of(config: Config):
    if config.compile_only:
        jax.config.update("jax_platforms", "cpu")
        sys.exit(0 if compile_only(config)["fits"] else 1)
    tell_xla()
    keep_compiled(config.compilation_cache)
    train(config)


if __name__ == "__main__":
    main()
