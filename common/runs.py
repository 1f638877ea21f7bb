"""How commands start and end, and what a run folder is.

A run folder belongs to one training at a time (`own_run_folder`). It holds the settings (`begin_run`),
`metrics.jsonl` (`open_log`), `checkpoints/<step>` with digests (`Checkpoints`) and whatever else the training
puts there. Both trainings, of the LVM and of the tokenizer, use the functions here; others only read."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib
import json
import math
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import typing
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from common import end_at_signals, end_now
from common.images import UserError
from common.weights import naming, no_room, parse_json, read_json, strict_json, write_whole


class RunStopped(Exception):
    """Work that cannot go on though its input was right, such as a diverged training or a dead worker."""


def run_command(command, *arguments, leave=sys.exit):
    """Runs `command(*arguments)` as the whole of a script, and ends with `leave(status)` where it fails.

    One line and status 2: a `UserError`, or the operating system's refusal about a path (no space, no
    permission). One line and status 1: `RunStopped`; and 130: Ctrl-C. Else a traceback and status 1."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if callable(signal.getsignal(number)):  # that of the first seconds
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names can hold bytes that are no text
    message, status, before = None, 0, len(UNFINISHED)
    try:
        command(*arguments)
    except (UserError, RunStopped) as error:
        message, status = str(error), 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        message, status = "stopped by Ctrl-C", 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            message, status = in_one_line(error), 2
        else:
            traceback.print_exc()
            status = 1
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if len(UNFINISHED) > before:  # an orderly exit would wait for them
        if not status and jax.distributed.is_initialized():  # others end together with us
            with contextlib.suppress(Exception):
                jax.distributed.shutdown()
        os._exit(status)
    if status:
        leave(status)


UNFINISHED = []  # what libraries' threads may still be at: a logger that does not answer, a failed save


def warn(text: str):
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def side_work(what: str):
    """Work that a training can do without: where it fails, one warning says so, and the training goes on."""
    try:
        yield
    except Exception as error:  # the cause may be a disk, a device, or a library that we do not know
        warn(f"{what} failed ({in_one_line(error)}); the run goes on without it")


def in_one_line(error: Exception) -> str:
    """Path and reason of an error of the disk; kind and words of another one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check_numbers(config, intervals: dict[str, str], called=lambda field: "--" + field.replace("_", "-")):
    """Raises UserError, naming the flag, where a number of the dataclass `config` makes no sense.

    `intervals` holds the names of all its fields of numbers, by the interval in which they must lie: {"[1,
    inf)": "steps batch", "[0, 1)": "ema"}. Without an upper end integers lie below 2**31, and floats in the
    range of float32; None passes where the field may be None; every entry of a tuple is checked."""
    interval_of = {field: interval for interval, fields in intervals.items() for field in fields.split()}
    for field in dataclasses.fields(config):
        kinds, value = (field.type, *typing.get_args(field.type)), getattr(config, field.name)
        if int not in kinds and float not in kinds or value is None and type(None) in kinds:
            continue
        interval = interval_of[field.name]
        low, high = map(float, interval[1:-1].split(","))
        most = 2**31 - 1 if float not in kinds and high == math.inf else 3.4e38
        for number in value if isinstance(value, tuple) else [value]:
            fits = type(number) in (int, *kinds) and abs(number) <= most and low <= number <= high
            if not fits or (number == low and interval[0] == "(") or (number == high and interval[-1] == ")"):
                kind = "an integer" if float not in kinds else "a number"
                raise UserError(f"{called(field.name)} must be {kind} in {interval}, got {number!r}")


def compute_dtype(name: str):
    """A dtype by its name; auto: float32 on CPU, bfloat16 on TPU and GPU."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if name == "auto" else name)


# ---------------------------------------------------------------- processes


def count_processes() -> int:
    """How many processes train together; one alone is counted without starting its devices."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def leads() -> bool:
    """Is this the process that writes the files of the run?"""
    return count_processes() == 1 or jax.process_index() == 0


def gather_facts(facts: dict) -> list[dict]:
    """The `facts` (JSON, at most 32 kB) of every process, on all of them."""
    if count_processes() == 1:
        return [facts]
    content = np.frombuffer(json.dumps(facts).encode().ljust(1 << 15), np.uint8)
    return [json.loads(text_N.tobytes()) for text_N in multihost_utils.process_allgather(content)]


def check_hosts_agree(facts: dict[str, str]):
    """Raises UserError, on all processes, where their facts differ, naming which."""
    digest = lambda text: hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    first, *others = gather_facts({name: v if len(v) < 200 else digest(v) for name, v in facts.items()})
    differ = [
        f"{name} ({first.get(name)} on process 0, {other.get(name)} on process {i})"
        for i, other in enumerate(others, 1)
        for name in first | other
        if first.get(name) != other.get(name)
    ]
    if differ:
        start = "start the same command with the same code and data on all of them"
        raise UserError(f"the hosts differ in {'; '.join(differ[:4])}: {start}")


def check_together(problem: str | None):
    """Raises UserError on all processes, with the first problem that one of them has."""
    if found := [facts["problem"] for facts in gather_facts({"problem": problem}) if facts["problem"]]:
        raise UserError(found[0])


@contextlib.contextmanager
def together():
    """Raises what one process finds wrong in this block, which must not compute together, as UserError on
    all. The others would else wait for it until they take it for dead."""
    problem = None
    try:
        yield
    except (UserError, OSError) as error:
        if count_processes() == 1:
            raise
        problem = str(error) if isinstance(error, UserError) else in_one_line(error)
    check_together(problem)


def agreed(value: int) -> int:
    """Process 0's value, on all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if count_processes() > 1 else value


# ---------------------------------------------------------------- owner


@contextlib.contextmanager
def own_run_folder(out: Path, wait: float = 20):
    """Makes the folder `out` and keeps it for this training, until the block ends or the process dies.

    Process 0 locks `out/lock` and writes its pid, host and a random token there; the others must read that
    token within `wait` seconds: so all write to one disk. Raises UserError on every process where the folder
    cannot be written, another training has it, or it is not one for all. Until there is something to save,
    signals end the process."""
    out, lock, problem = Path(out), None, None
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "token": secrets.token_hex(8)}
    if count_processes() == 1:
        end_at_signals()
    try:
        if leads():
            try:
                lock = _take_lock(out, mine)
            except UserError as error:
                problem = str(error)
        leader = gather_facts(mine | {"problem": problem})[0]
        check_together(leader["problem"])
        if lock is None and not _read_lock(out / "lock", wait, leader["token"]):
            problem = (
                f"process {jax.process_index()} on {mine['host']} does not see in --out {out} what process 0 "
                f"on {leader['host']} wrote there: give a folder on a disk that all hosts share"
            )
        check_together(problem)
        for leftover in out.glob(".*.partial") if lock is not None else ():  # of a killed process
            if leftover.is_file():
                leftover.unlink()
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _take_lock(out: Path, mine: dict) -> int:
    file = out / "lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            holder = _read_lock(file, wait=1)  # it may have been taken just now, and be empty yet
            who = f"process {holder.get('pid', '(unknown)')} on {holder.get('host', 'an unknown host')}"
            end = "wait for its end, stop it, or choose another --out"
            raise UserError(f"{out} is in use: {who} trains in it; {end}") from None
        except OSError as error:  # some network disks have no locks
            warn(f"{file} cannot be locked ({error.strerror}); no other training may use this folder")
        os.ftruncate(lock, 0)
        os.write(lock, strict_json(mine).encode())
        os.fsync(lock)
        return lock
    except OSError as error:
        reason = no_room(error, file, 4096).strerror
        raise UserError(f"--out {out} cannot be written to ({reason}); choose another folder") from None


def _read_lock(file: Path, wait: float, token: str | None = None) -> dict:
    """What stands in a lock, with this token if one is given, now or within `wait` seconds, as network disks
    show a little later what others write; else nothing."""
    until = time.monotonic() + wait
    while True:
        with contextlib.suppress(OSError, UserError):
            content = parse_json(file.read_bytes(), file)
            if token in (None, content.get("token")):
                return content
        if time.monotonic() > until:
            return {}
        time.sleep(0.05)


# ---------------------------------------------------------------- signals


@contextlib.contextmanager
def asked_to_stop():
    """Yields a function of the step: shall the run stop after it, as SIGTERM, SIGHUP or Ctrl-C reached one of
    its processes?

    The second Ctrl-C does not wait for the step, but for a save that has begun. A signal that is ignored from
    the start, as nohup does with SIGHUP, stays so."""
    asked, several = [], count_processes() > 1

    def note(number, frame):
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if several:  # JAX's own handler of SIGTERM finds a step that no process has passed yet
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = [signal.SIGINT, signal.SIGHUP, *([] if several else [signal.SIGTERM])]
    before = {n: signal.signal(n, note) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            if handler is not end_now:  # what there is now is saved: one more signal does no harm
                signal.signal(number, handler)


# ---------------------------------------------------------------- settings


def begin_run(file: Path, flags: dict, defaults: dict, may_change: set[str], about={}, noted={}):
    """Writes a run's flags to its settings file, or refuses to resume a run whose flags differ, naming them.

    `flags` and `defaults` are {field: value}; a flag that is newer than the run had its default in it.
    `about` says what else must be the same; what is `noted` may differ. With `about` the file holds {**about,
    **noted, "train": flags}, without it the flags alone. All are JSON."""
    steps = [int(step.name) for step in steps_of(file.parent / "checkpoints")]
    if steps and not file.exists():
        warn(f"{file} is missing: that step {max(steps)} was made with these settings is not checked")
    elif steps:  # before the first there is nothing to resume
        try:
            before = read_json(file)
            was = before.get("train") if about else before
            if not isinstance(was, dict):
                raise UserError(f"{file}: 'train' is no JSON object")
        except UserError as error:
            raise UserError(
                f"{error}: this run's settings are damaged; put a copy of the file back, or delete it and"
                f" give the flags of before to go on from step {max(steps)}, or choose another --out"
            ) from None
        was = defaults | was
        changed = [f"{k}: {was[k]} -> {v}" for k, v in flags.items() if was[k] != v and k not in may_change]
        changed = changed or [f"{k} is another one" for k in about if not _same(before.get(k), about[k])]
        if changed:
            choose = "choose another --out, or repeat its settings"
            raise UserError(f"{file.parent} holds a run with other settings ({'; '.join(changed)}); {choose}")
    if leads():
        content = {**about, **noted, "train": flags} if about else flags
        write_whole(file, strict_json(content, indent=1) + "\n")


def _same(before, now) -> bool:
    """Fields that `before` lacks are newer than the run."""
    if isinstance(before, dict) and isinstance(now, dict):
        return {k: before.get(k, v) for k, v in now.items()} == now
    return before == now


# ---------------------------------------------------------------- log


def keep_log_until(log: Path, step: int):
    """Drops the lines of metrics.jsonl after `step`, which a resumed run writes again, and a last line that a
    kill cut short.

    Other damaged lines are left out with a warning, and the file as it was is kept."""
    content = log.read_bytes() if log.exists() else b""
    kept, damaged, lines = {}, [], content.splitlines(keepends=True)
    for n, line in enumerate(lines, 1):
        try:
            fields = json.loads(line, parse_constant=lambda name: None)  # older runs wrote NaN
            whole = isinstance(fields, dict) and type(fields.get("step")) is int and line.endswith(b"\n")
        except (ValueError, RecursionError):
            whole = False
        if whole and fields["step"] <= step:
            kept[fields["step"]] = strict_json(fields) + "\n"
        elif not whole and n < len(lines):
            damaged.append(n)
    if damaged:
        copy = log.with_name(f"{log.name}.damaged-{time.time():.0f}")
        write_whole(copy, content)
        some = ", ".join(map(str, damaged[:5])) + (" and more" if damaged[5:] else "")
        warn(f"{log}: line {some} is damaged and left out; the file as it was is {copy}")
    if (new := "".join(kept.values()).encode()) != content:
        write_whole(log, new)


@contextlib.contextmanager
def open_log(out: Path, packages=(), settings={}, first: int = 0):
    """Yields a function that appends lines ({name: number}) to out/metrics.jsonl and hands them to each of
    `packages`; on other processes than 0 it does nothing.

    The run began after the step `first`. Lines that the disk has no room for wait for the next call."""
    if not leads():
        yield lambda *lines: None
        return
    file, unwritten = out / "metrics.jsonl", []
    loggers = [Logger(package, out, settings, first) for package in packages]

    def write(*lines):
        failed_before = bool(unwritten)
        unwritten.extend(strict_json(line) + "\n" for line in lines)
        try:
            _append(file, "".join(unwritten).encode())
            unwritten.clear()
        except OSError as error:
            if not failed_before:
                warn(f"{in_one_line(error)}; its lines wait until they can be written")
        for logger in loggers:
            for line in lines:
                logger.lines.put(line)

    try:
        yield write
    finally:
        if unwritten:
            write()
        if unwritten:
            warn(f"{file}: its last {len(unwritten)} lines could not be written")
        Logger.close(loggers)


def _append(file: Path, content: bytes):
    """Appends all of it or nothing. Raises OSError, naming the file and the bytes."""
    try:
        with open(file, "ab", buffering=0) as log:
            size = log.tell()
            try:
                if log.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                log.truncate(size)
                raise
    except OSError as error:
        raise no_room(error, file, len(content)) from None


class Logger:
    """Hands lines to an experiment logger in a thread of its own: one that raises, or hangs, costs a warning
    and not the run."""

    def __init__(self, package: str, out: Path, settings: dict, first: int):
        self.package, self.lines = package, queue.Queue()
        self.thread = threading.Thread(target=self._work, args=(out.absolute(), settings, first), daemon=True)
        self.thread.start()

    def _work(self, out: Path, settings: dict, first: int):
        try:
            if self.package == "tensorboard":
                writer = importlib.import_module("tensorboardX").SummaryWriter
                board = writer(str(out / "tensorboard"), purge_step=first + 1)
                end = board.close

                def log(line):
                    for name, value in line.items():
                        if name not in ("step", "reason") and value is not None:
                            board.add_scalar(name, value, line["step"])
            else:
                service = importlib.import_module(self.package)
                named = {"id": out.name} if self.package == "wandb" else {}
                service.init(project="lvm", name=out.name, config=settings, resume="allow", **named)
                log, end = lambda line: service.log(line, step=line["step"]), service.finish
            while (line := self.lines.get()) is not None:
                log(json.loads(strict_json(line)))
            end()
        except BaseException as error:  # a library may even ask to exit
            warn(f"--log {self.package} failed ({type(error).__name__}: {error}); the run goes on without it")

    @staticmethod
    def close(loggers: list, seconds: float = 20):
        """Lets them finish, for so many seconds in all."""
        until = time.monotonic() + seconds
        for logger in loggers:
            logger.lines.put(None)
        for logger in loggers:
            logger.thread.join(max(0, until - time.monotonic()))
            if logger.thread.is_alive():
                UNFINISHED.append(logger.package)
                warn(f"--log {logger.package} does not answer; the run ends without it")


def keep_compiled(folder: str):
    """Programs compiled once are read from `folder` the next time. "auto": JAX_COMPILATION_CACHE_DIR, or else
    one in the user's cache; "off": none. A folder that cannot be written costs a warning."""
    usable = folder != "off"
    try:
        if folder == "auto" and not (folder := jax.config.jax_compilation_cache_dir or ""):
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = str(Path(cache) / "lvm-jax" / "compiled")
        if usable and "://" not in folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(1 << 16))
            folder = os.path.abspath(folder)
    except (OSError, RuntimeError) as error:  # no room, no permission; no home
        usable, where = False, "name a folder with --compilation-cache or XDG_CACHE_HOME"
        warn(f"compiled programs are not kept: {error}; {where}")
    jax.config.update("jax_enable_compilation_cache", usable)
    if usable:
        jax.config.update("jax_compilation_cache_dir", folder)


# ---------------------------------------------------------------- checkpoints


DIGESTS = "digests.sha256"


class Checkpoints:
    """The steps of a run. `folder/<step>` bears that name once orbax has written everything and process 0 the
    digests; until then, and while it is removed, `.partial` follows. Training waits only for the copy off the
    devices.

    `newest` is the newest whole step on the disk, 0 for none, at the start the same on all processes."""

    def __init__(self, folder: Path, keep: int, milestone_every: int | None = None):
        import orbax.checkpoint as ocp  # takes seconds to import, and only runs need it

        self.ocp, self.folder, self.keep, self.milestone_every = ocp, folder.absolute(), keep, milestone_every
        self.writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self.thread, self.commit, self.newest = ThreadPoolExecutor(1), None, 0
        self.failure, self.failed, self.told = None, [], False
        # A save that fails for want of threads leaves some of orbax's steps undone: said once is enough.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        with together():
            if leads():
                self._find_newest()
        self.newest = agreed(self.newest)
        if self.newest < 0:
            again = "restore one from a copy, or begin again with another --out"
            raise UserError(f"{self.folder} has no checkpoint that is whole; {again}")

    def _find_newest(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in {*self.folder.glob("*.partial*"), *self.folder.glob("*.orbax-checkpoint-tmp*")}:
            shutil.rmtree(leftover)
        steps, whole = steps_of(self.folder), next(whole_steps(self.folder), None)
        # An older tokenizer's training named a step before its digests, and was perhaps killed between.
        killed = len(steps) == 1 and not (steps[0] / DIGESTS).exists() and (steps[0] / "default").is_dir()
        self.newest = int(whole.name) if whole else 0 if killed or not steps else -1
        for path in steps if self.newest >= 0 else ():
            if int(path.name) > self.newest:  # out of the way of the steps to come
                path.rename(path.with_name(f"{path.name}.damaged-{time.time():.0f}"))

    def restore(self, state: dict):
        """The state of the newest step, on the devices of the given one, whose memory it takes over. Raises
        UserError for a step of another version of this code, whose state has other parts."""
        args, step = self.ocp.args, self.folder / str(self.newest)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)
        load = lambda **items: self.writer.restore(step, args=args.Composite(**items))
        try:
            if (step / "default").is_dir():  # of the tokenizer's training before runs.py
                return load(default=args.StandardRestore(like))["default"]
            restored = load(**{k: args.StandardRestore(_item(v)) for k, v in like.items()})
            return {k: restored[k] if _item(v) is v else restored[k]["array"] for k, v in like.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{step} is whole, but does not hold the state of this training: another version of the code"
                f" may have written it ({in_one_line(error)}); begin again with another --out"
            ) from None

    def save(self, step: int, state: dict):
        """Begins to write a step. What disk or orbax refuse is reported, and the next save tries again."""
        self.wait()
        if not all_finite({name: part for name, part in state.items() if name != "guard"}):
            raise RunStopped(
                f"at step {step} weights or moments are no finite numbers, and are not saved; the last"
                f" checkpoint is that of step {self.newest}; try a lower --learning-rate"
            )
        needed, self.failure = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), None
        items = {k: self.ocp.args.StandardSave(_item(v)) for k, v in state.items()}
        room = agreed(self._free() > needed)
        try:
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.writer.save(
                self.folder / f"{step}.partial", args=self.ocp.args.Composite(**items), force=True
            )
            self.commit = self.thread.submit(self._commit, step, needed)
        except Exception as error:  # orbax fails in as many ways as disks do
            self._give_up(step, needed, error)

    def _commit(self, step: int, needed: int):
        partial = self.folder / f"{step}.partial"
        try:
            self.writer.wait_until_finished()
            if leads():
                write_digests(partial)
                partial.rename(self.folder / str(step))
        except Exception as error:  # as above; no memory and no thread, too
            self._give_up(step, needed, error)
            return
        self.newest = step
        if leads():
            with side_work("the removal of older checkpoints"):
                for old in sorted(int(path.name) for path in steps_of(self.folder))[: -self.keep]:
                    if not self.milestone_every or old % self.milestone_every:
                        shutil.rmtree((self.folder / str(old)).rename(self.folder / f"{old}.partial"))

    def _free(self) -> int:
        """Bytes, also where the folder itself is gone."""
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        return shutil.disk_usage(there).free

    def _give_up(self, step: int, needed: int, error: Exception):
        self.failed.append(step)
        UNFINISHED.append(step)  # some of orbax's threads wait for minutes for one that has failed
        self._clear_failed()
        room = f"it needs {needed:,} bytes, and {self._free():,} are free there"
        self.failure = f"{self.folder / str(step)} could not be saved ({in_one_line(error)}): {room}"
        if not self.told:
            last = f"the last checkpoint is that of step {self.newest}"
            warn(f"{self.failure}; {last}, and the next save tries again")

    def wait(self):
        if self.commit:
            self.commit.result()

    def finish(self, step: int, state: dict, patience: float):
        """Waits for the last save. One that failed is tried again until it is done, or for `patience`
        seconds: then RunStopped."""
        self.wait()
        until, pause = time.monotonic() + patience, 0.5
        failed = lambda: any(facts["failed"] for facts in gather_facts({"failed": bool(self.failure)}))
        while failed() and not agreed(time.monotonic() > until):
            if not self.told:
                again = f"trying again for {patience:.0f} seconds; make room in {self.folder}"
                warn(f"the last step is not saved yet: {again}")
            self.told = True
            time.sleep(pause := min(2 * pause, 10.0, patience))
            self.save(step, state)
            self.wait()
        self._clear_failed()  # once more: some of their threads may have written on
        if self.failure:
            raise RunStopped(f"{self.failure}; the last checkpoint is that of step {self.newest}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """A run that fails lets a save that has begun end; one of several processes might wait in vain."""
        if error is None or count_processes() == 1:
            self.wait()

    def _clear_failed(self):
        for step in self.failed if leads() else ():
            for partial in self.folder.glob(f"{step}.partial*"):
                shutil.rmtree(partial, ignore_errors=True)


def _item(part):
    """Orbax takes no array that is alone."""
    return {"array": part} if jax.tree_util.treedef_is_leaf(jax.tree.structure(part)) else part


@jax.jit
def all_finite(state):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


def with_patience(work, patience: float):
    """Does `work()`, again for `patience` seconds while the disk refuses it; then raises its OSError."""
    until, pause = time.monotonic() + patience, 0.5
    while True:
        try:
            return work()
        except OSError as error:
            if time.monotonic() > until:
                raise
            if pause == 0.5:
                warn(f"{in_one_line(error)}: trying again for {patience:.0f} seconds")
        time.sleep(pause := min(2 * pause, 10.0, patience))


def steps_of(folder: Path) -> list[Path]:
    """What has the name of a step in a run's checkpoints; names of steps that are not whole yet, or put
    aside, go on after the number."""
    return [path for path in folder.glob("*") if path.name.isascii() and path.name.isdigit()]


def whole_steps(folder: Path):
    """Yields the steps whose files are all as they were saved, the newest first, and says in one line why one
    is passed over."""
    for step in sorted(steps_of(folder), key=lambda path: int(path.name), reverse=True):
        try:
            check_digests(step)
        except (UserError, OSError) as error:
            print(f"checkpoint passed over: {error}", file=sys.stderr)
        else:
            yield step


def write_digests(step: Path):
    """Lists every file of a step with its SHA-256, as `sha256sum -c` reads it, and then the list's digest."""
    digests = _digests(step, sorted(_files_below(step)))
    listing = "".join(f"{digest}  {file}\n" for file, digest in digests.items()).encode()
    with open(step / DIGESTS, "wb") as file:
        file.write(listing + _digest_line(listing))
        os.fsync(file.fileno())


def check_digests(step: Path):
    """Raises UserError (or OSError), naming the file, unless a step holds the files that were saved, to the
    bit, and no others."""
    try:
        content = (step / DIGESTS).read_bytes()
    except OSError as error:
        reason = f"({error.strerror}): the step was not saved to its end"
        raise UserError(f"{step / DIGESTS} cannot be read {reason}") from None
    listing = content[: content.rfind(b"# ")]
    if b"# " not in content and re.fullmatch(rb"([0-9a-f]{64}  [^\n]+\n)+", content):
        listing = content  # of an older tokenizer's training: without the digest of the list
    elif content != listing + _digest_line(listing):
        raise UserError(f"{step / DIGESTS} is damaged")
    saved = {line[66:]: line[:64] for line in listing.decode().splitlines()}
    for file in sorted(saved.keys() ^ (_files_below(step) - {DIGESTS})):
        what = "is missing" if file in saved else "was not saved there by the training"
        raise UserError(f"{step / file} {what}")
    for file, digest in _digests(step, saved).items():
        if digest != saved[file]:
            raise UserError(f"{step / file} is damaged: its SHA-256 is not that of what was saved")


def _digest_line(listing: bytes) -> bytes:
    return b"# " + hashlib.sha256(listing).hexdigest().encode() + b"\n"


def _files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _digests(folder: Path, files) -> dict[str, str]:
    def digest(file):
        with open(folder / file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(digest, files)))


# ---------------------------------------------------------------- records of finished work


class Record:
    """JSON lines beside the results of a command, one for each piece of work that is finished; the first
    holds the settings.

    `lines` are those of an earlier call, which a kill or a full disk may have stopped at any point; what
    stands after a damaged line does not count. Raises UserError, naming what differs, where the file is of
    other settings, unless such a file is `replaced`."""

    def __init__(self, file: Path, settings: dict, replaced: bool = False):
        self.file, self.lines = file, []
        self.head = strict_json({"settings": settings}, default=str) + "\n"
        head, *lines = (file.read_bytes() if file.exists() else b"").splitlines(keepends=True) or [b""]
        if head and head != self.head.encode():
            lines = []
            if not replaced:
                before, now = (parse_json(x, f"{file} line 1").get("settings") for x in (head, self.head))
                before = before if isinstance(before, dict) else {}
                differ = [k for k in before | now if before.get(k) != now.get(k)]
                changed = [f"{k}: {str(before.get(k))[:60]} -> {str(now.get(k))[:60]}" for k in differ]
                choose = "repeat them, delete it, or choose another --out"
                raise UserError(f"{file} is of work with other settings ({'; '.join(changed)}); {choose}")
        with contextlib.suppress(UserError):
            for line in lines:
                self.lines.append(parse_json(line if line.endswith(b"\n") else b"", file))

    def write(self, lines: list[dict]):
        """Replaces all lines, whole or not at all."""
        write_whole(self.file, self.head + "".join(strict_json(line) + "\n" for line in lines))

    def append(self, lines: list[dict]):
        with naming(self.file), open(self.file, "a") as out:
            out.write("".join(strict_json(line) + "\n" for line in lines))


@functools.cache
def code_digest() -> str:
    """Tells apart versions of this program."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(file for name in ("*.py", "common/*.py", "assets/scenes.py") for file in root.glob(name))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# ---------------------------------------------------------------- bad steps


def new_guard(watched=("loss", "norm"), accepted="accepted") -> dict:
    """What a step is judged by: running means of the numbers `watched`, and counts of steps. Checkpoints of
    the LVM call that of `accepted` steps "taken"."""
    counts = {name: jnp.zeros((), jnp.int32) for name in (accepted, "skipped", "in_a_row")}
    return {name: jnp.zeros((), jnp.float32) for name in watched} | counts


def skip_bad_step(new: dict, old: dict, loss, watched: dict) -> dict:
    """The state after a step: the parts of `new`, or those of the state `old` where the step is bad; and the
    guard after it.

    A step is bad if its loss or one of the `watched` numbers, none of them negative, is not finite, or, once
    twenty steps have been accepted, if one of those is a hundred times its running mean. A mean of 0 has not
    begun."""
    guard, good = old["guard"], jnp.isfinite(loss)
    accepted = "taken" if "taken" in guard else "accepted"
    for name, value in watched.items():
        begun = (guard[accepted] >= 20) & (guard[name] > 0)
        good &= jnp.isfinite(value) & ~(begun & (value > 100 * guard[name]))
    mean = lambda mean, value: jnp.where(mean > 0, 0.95 * mean + 0.05 * value, value)
    after = {k: jnp.where(good, mean(guard[k], value), guard[k]) for k, value in watched.items()}
    after[accepted], after["skipped"] = guard[accepted] + good, guard["skipped"] + ~good
    after["in_a_row"] = jnp.where(good, 0, guard["in_a_row"] + 1)
    kept = {k: jax.tree.map(lambda a, b: jnp.where(good, a, b), new[k], old[k]) for k in new}
    return kept | {"guard": guard | after}


ADVICE = "try a lower --learning-rate, or look for bad data"


def check_health(step: int, metrics: dict, patience: int, last_saved: int, advice=ADVICE):
    """Raises RunStopped where `patience` steps in a row were skipped."""
    if metrics["in_a_row"] >= patience:
        last = f"the last at step {step} with loss {metrics['loss']} and gradient norm {metrics['grad_norm']}"
        saved = f"the last checkpoint is that of step {last_saved}"
        raise RunStopped(f"{metrics['in_a_row']:.0f} steps in a row were skipped, {last}; {saved}; {advice}")
