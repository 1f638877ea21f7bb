"""How commands start and end, and what a run folder is.

A run folder belongs to one training at a time (`own_run_folder`). It holds the settings (`begin_run`),
`metrics.jsonl` (`open_log`), `checkpoints/<step>` with digests (`Checkpoints`) and whatever else the
training puts there. Both trainings, of the LVM and of the tokenizer, use the functions here; other
commands only read."""

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
    """Work that cannot go on though its input was right, such as a diverged training or a dead worker: one
    line, status 1."""


def run_command(command, *arguments, leave=sys.exit):
    """Runs `command(*arguments)` as the whole of a script, and ends with `leave(status)` where it fails.

    One line on stderr and status 2: a `UserError`, or the operating system's refusal about a path (no
    space, no permission). One line and status 1: `RunStopped`; and 130: Ctrl-C. Anything else is a bug of
    ours: its traceback and status 1."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if callable(signal.getsignal(number)):  # that of the first seconds
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names can hold bytes that are no text
    message, status, before = None, 0, len(UNFINISHED)
    try:
        command(*arguments)
    except UserError as error:
        message, status = str(error), 2
    except RunStopped as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = "stopped by Ctrl-C", 130
    except OSError as error:
        named = error.errno is not None and error.filename is not None
        message, status = (f"{error.filename}: {error.strerror}", 2) if named else (None, 1)
        if not named:
            traceback.print_exc()
    except Exception:
        status = 1
        traceback.print_exc()
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


UNFINISHED = []  # what libraries' threads may still be at: a logger that does not answer, a save that failed


def warn(text: str):
    """One line on stderr, beside a progress bar too."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def side_work(what: str):
    """Work that a training can do without: where it fails, one warning tells it, and the training goes on."""
    try:
        yield
    except Exception as error:  # the cause may be a disk, a device, or a library that we do not know
        warn(f"{what} failed ({in_one_line(error)}); the run goes on without it")


def in_one_line(error: Exception) -> str:
    """What went wrong: path and reason of an error of the disk; kind and words of another one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check_numbers(config, intervals: dict[str, str], called=lambda field: "--" + field.replace("_", "-")):
    """Raises UserError, naming the flag, where a number of the dataclass `config` makes no sense.

    `intervals` holds the names of all its fields of numbers, by the interval in which they must lie: {"[1,
    inf)": "steps batch", "[0, 1)": "ema"}. Without an upper end integers lie below 2**31, and floats in
    the range of float32; None passes where the field may be None; every entry of a tuple is checked. A
    message calls a field `called(field)`. Raises KeyError for a field of numbers that has no interval."""
    interval_of = {field: interval for interval, fields in intervals.items() for field in fields.split()}
    for field in dataclasses.fields(config):
        kinds = (field.type, *typing.get_args(field.type))
        value = getattr(config, field.name)
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


# ------------------------------------------------------------------------------------------ processes


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
    text_PN = multihost_utils.process_allgather(
        np.frombuffer(json.dumps(facts).encode().ljust(1 << 15), np.uint8)
    )
    return [json.loads(text_N.tobytes()) for text_N in text_PN]


def check_hosts_agree(facts: dict[str, str]):
    """Raises UserError, on all processes, where their facts differ, naming which."""
    digest = lambda text: hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    short = {name: value if len(value) < 200 else digest(value) for name, value in facts.items()}
    first, *others = gather_facts(short)
    differ = [
        f"{name} ({first.get(name)} on process 0, {other.get(name)} on process {i})"
        for i, other in enumerate(others, 1)
        for name in first | other
        if first.get(name) != other.get(name)
    ]
    if differ:
        raise UserError(
            f"the hosts differ in {'; '.join(differ[:4])}: start the same command with the same code and data"
            " on all of them"
        )


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


# ------------------------------------------------------------------------------------------ owner


@contextlib.contextmanager
def own_run_folder(out: Path, wait: float = 20):
    """Makes the folder `out` and keeps it for this training, until the block ends or the process dies.

    Process 0 locks `out/lock`, in which its pid, host and a random token stand; the others read that token
    there, within `wait` seconds, which shows that all write to one disk. Raises UserError on every process
    where the folder cannot be written, another training has it, or it is not one for all. Until there is
    something to save, signals end the process."""
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
        check_together(
            None
            if lock is not None or _sees(out / "lock", leader["token"], wait)
            else (
                f"process {jax.process_index()} on {mine['host']} does not see in --out {out} what process 0"
                f" on {leader['host']} wrote there: give a folder on a disk that all hosts share"
            )
        )
        if lock is not None:
            for leftover in out.glob(".*.partial"):  # of a process that was killed while it wrote
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
            holder = _holder(file)
            raise UserError(
                f"{out} is in use: process {holder.get('pid', '(unknown)')} on"
                f" {holder.get('host', 'an unknown host')} trains in it; wait for its end, stop it, or choose"
                " another --out"
            ) from None
        except OSError as error:  # some network disks have no locks
            warn(
                f"{file} cannot be locked ({error.strerror}); take care that no other training uses this"
                " folder"
            )
        os.ftruncate(lock, 0)
        os.write(lock, strict_json(mine).encode())
        os.fsync(lock)
        return lock
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written to ({no_room(error, file, 4096).strerror}); choose another folder"
        ) from None


def _holder(file: Path) -> dict:
    """What stands in a lock; it may have been taken just now, and be empty yet."""
    for _ in range(20):
        with contextlib.suppress(OSError, UserError):
            return parse_json(file.read_bytes(), file)
        time.sleep(0.05)
    return {}


def _sees(file: Path, token: str, wait: float) -> bool:
    """Does `token` stand in the lock, now or within `wait` seconds? Network disks show what others write a
    little later."""
    until = time.monotonic() + wait
    while _token(file) != token:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _token(file: Path):
    with contextlib.suppress(OSError, UserError):
        return parse_json(file.read_bytes(), file).get("token")


# ------------------------------------------------------------------------------------------ signals


@contextlib.contextmanager
def asked_to_stop():
    """Yields a function of the step: shall the run stop after it, because SIGTERM, SIGHUP or Ctrl-C reached
    one of its processes?

    The second Ctrl-C does not wait for the step, but for a save that has begun. A signal that is ignored
    from the start, as nohup does with SIGHUP, stays so."""
    asked, several = [], count_processes() > 1

    def note(number, frame):
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if several:  # JAX's own handler of SIGTERM finds a step that no process has passed yet
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGHUP, *([] if several else [signal.SIGTERM]))
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            if handler is not end_now:  # what there is now is saved: one more signal does no harm
                signal.signal(number, handler)


# ------------------------------------------------------------------------------------------ settings


def begin_run(
    file: Path, flags: dict, defaults: dict, may_change: set[str], about: dict = {}, noted: dict = {}
):
    """Writes a run's flags to its settings file, or refuses to resume a run whose flags are others, naming
    them.

    `flags` and `defaults` are {field: value}; a flag that is newer than the run had its default in it.
    `about` says what else must be the same; what is `noted` may differ. With `about` the file holds
    {**about, **noted, "train": flags}, without it the flags alone. All are JSON."""
    if steps := steps_of(file.parent / "checkpoints"):  # before the first there is nothing to resume
        newest = max(int(step.name) for step in steps)
        if not file.exists():
            warn(
                f"{file} is missing: that this command's settings are those of the checkpoint of step"
                f" {newest} is not checked"
            )
        else:
            try:
                before = read_json(file)
                was = before.get("train") if about else before
                if not isinstance(was, dict):
                    raise UserError(f"{file}: 'train' is no JSON object")
            except UserError as error:
                raise UserError(
                    f"{error}: the settings of this run are damaged; put a copy of the file back, or delete"
                    f" it and give the same flags as before to go on from step {newest}, or begin again with"
                    " another --out"
                ) from None
            was = {k: was.get(k, defaults[k]) for k in flags}
            changed = [
                f"{k}: {was[k]} -> {v}" for k, v in flags.items() if was[k] != v and k not in may_change
            ]
            changed += [
                f"{k} is another one" for k in about if not _same(before.get(k), about[k]) and not changed
            ]
            if changed:
                raise UserError(
                    f"{file.parent} holds a run with other settings ({'; '.join(changed)}); choose another"
                    " --out, or repeat its settings"
                )
    if leads():
        write_whole(
            file, strict_json({**about, **noted, "train": flags} if about else flags, indent=1) + "\n"
        )


def _same(before, now) -> bool:
    """Fields that `before` lacks are newer than the run."""
    return (
        {k: before.get(k, v) for k, v in now.items()} == now
        if isinstance(before, dict) and isinstance(now, dict)
        else before == now
    )


# ------------------------------------------------------------------------------------------ log


def keep_log_until(log: Path, step: int):
    """Drops the lines of metrics.jsonl after `step`, which a resumed run writes again, and a last line that a
    kill cut short.

    Other lines that are damaged (no JSON, NUL bytes, no step) are left out with a warning, and the file as
    it was is kept."""
    if not log.exists():
        return
    content = log.read_bytes()
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
        warn(
            f"{log}: line {some} is damaged and left out; the file as it was is {copy}: look there for what"
            " is missing, or delete it"
        )
    if (new := "".join(kept.values()).encode()) != content:
        write_whole(log, new)


@contextlib.contextmanager
def open_log(out: Path, packages=(), settings={}, first: int = 0):
    """Yields a function that appends lines ({name: number}) to out/metrics.jsonl and hands them to each of
    `packages`.

    The run began after the step `first`. Lines that the disk has no room for wait for the next call.
    Process 0 alone writes."""
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
                warn(f"{error.filename}: {error.strerror}; its lines wait until they can be written")
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
                board = importlib.import_module("tensorboardX").SummaryWriter(
                    str(out / "tensorboard"), purge_step=first + 1
                )
                log = lambda line: [
                    board.add_scalar(k, v, line["step"])
                    for k, v in line.items()
                    if k not in ("step", "reason") and v is not None
                ]
                end = board.close
            else:
                service = importlib.import_module(self.package)
                service.init(
                    project="lvm",
                    name=out.name,
                    config=settings,
                    resume="allow",
                    **({"id": out.name} if self.package == "wandb" else {}),
                )
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
    one in the user's cache; "off": none. A folder that cannot be written costs a warning, and programs are
    compiled anew."""
    try:
        if folder == "auto" and not (folder := jax.config.jax_compilation_cache_dir or ""):
            folder = str(
                Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvm-jax" / "compiled"
            )
        if folder == "off" or "://" in folder:
            usable = folder != "off"
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(1 << 16))
            folder, usable = os.path.abspath(folder), True
    except (OSError, RuntimeError) as error:  # no room, no permission; no home
        warn(
            f"compiled programs are not kept: {error}; name a folder with --compilation-cache or"
            " XDG_CACHE_HOME"
        )
        usable = False
    jax.config.update("jax_enable_compilation_cache", usable)
    if usable:
        jax.config.update("jax_compilation_cache_dir", folder)


# ------------------------------------------------------------------------------------------ checkpoints


DIGESTS = "digests.sha256"


class Checkpoints:
    """The steps of a run. `folder/<step>` bears that name once orbax has written everything and process 0 the
    digests; until then, and while it is removed, `.partial` follows. The training waits only for the copy
    off the devices.

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
                self._open()
        self.newest = agreed(self.newest)
        if self.newest < 0:
            raise UserError(
                f"{self.folder} has no checkpoint that is whole; restore one from a copy, or begin again with"
                " another --out"
            )

    def _open(self):
        """Finds the newest whole step, and removes what a kill has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in {*self.folder.glob("*.partial*"), *self.folder.glob("*.orbax-checkpoint-tmp*")}:
            shutil.rmtree(leftover)
        steps, whole = steps_of(self.folder), next(whole_steps(self.folder), None)
        # An older tokenizer's training named a step before its digests, and was perhaps killed between.
        first_was_killed = (
            len(steps) == 1 and not (steps[0] / DIGESTS).exists() and (steps[0] / "default").is_dir()
        )
        self.newest = int(whole.name) if whole else 0 if first_was_killed or not steps else -1
        for path in steps if self.newest >= 0 else ():
            if int(path.name) > self.newest:  # out of the way of the steps to come
                path.rename(path.with_name(f"{path.name}.damaged-{time.time():.0f}"))

    def restore(self, state: dict):
        """The state of the newest step, on the devices of the given one, whose memory it takes over. Raises
        UserError for a step of another version of this code, whose state has other parts."""
        args, step = self.ocp.args, self.folder / str(self.newest)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)
        try:
            if (step / "default").is_dir():  # of the tokenizer's training before runs.py
                return self.writer.restore(step, args=args.Composite(default=args.StandardRestore(like)))[
                    "default"
                ]
            restored = self.writer.restore(
                step, args=args.Composite(**{k: args.StandardRestore(_item(v)) for k, v in like.items()})
            )
            return {k: restored[k] if _item(v) is v else restored[k]["array"] for k, v in like.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{step} is whole, but does not hold the state of this training, perhaps because another"
                f" version of the code wrote it ({in_one_line(error)}); begin again with another --out"
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
        items = self.ocp.args.Composite(**{k: self.ocp.args.StandardSave(_item(v)) for k, v in state.items()})
        if not agreed(self._free() > needed):
            self._give_up(step, needed, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return
        try:
            self.writer.save(self.folder / f"{step}.partial", args=items, force=True)
            self.commit = self.thread.submit(self._commit, step, needed)
        except Exception as error:  # orbax fails in as many ways as disks do
            self._give_up(step, needed, error)

    def _commit(self, step: int, needed: int):
        try:
            self.writer.wait_until_finished()
        except Exception as error:  # as above
            self._give_up(step, needed, error)
            return
        try:
            if leads():
                write_digests(self.folder / f"{step}.partial")
                (self.folder / f"{step}.partial").rename(self.folder / str(step))
        except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no thread can be started
            self._give_up(step, needed, error)
            return
        self.newest = step
        if leads():
            with side_work("the removal of older checkpoints"):
                self._remove_old()

    def _remove_old(self):
        steps = sorted(int(path.name) for path in steps_of(self.folder))
        for old in steps[: -self.keep]:
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
        self.failure = (
            f"{self.folder / str(step)} could not be saved ({in_one_line(error)}): it needs {needed:,} bytes,"
            f" and {self._free():,} are free there"
        )
        if not self.told:
            warn(
                f"{self.failure}; the last checkpoint is that of step {self.newest}, and the next save tries"
                " again"
            )

    def wait(self):
        if self.commit:
            self.commit.result()

    def finish(self, step: int, state: dict, patience: float):
        """Waits for the last save. One that failed is tried again until it is done, or for `patience`
        seconds: then RunStopped."""
        self.wait()
        until, pause = time.monotonic() + patience, 0.5
        while any(facts["failed"] for facts in gather_facts({"failed": bool(self.failure)})) and not agreed(
            time.monotonic() > until
        ):
            if not self.told:
                warn(
                    f"the last step is not saved yet: trying again for {patience:.0f} seconds; make room in"
                    f" {self.folder}"
                )
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
        """A run that fails lets the save that it has begun come to its end; one of several processes might
        wait in vain."""
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
    """Does `work()`, again and again for `patience` seconds while the disk refuses it; then raises its
    OSError."""
    until, pause, told = time.monotonic() + patience, 0.5, False
    while True:
        try:
            return work()
        except OSError as error:
            if time.monotonic() > until:
                raise
            if not told:
                warn(f"{in_one_line(error)}: trying again for {patience:.0f} seconds")
            told = True
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
    """Lists every file of a step with its SHA-256, as `sha256sum -c` reads it, and at last the digest of that
    list."""
    files = sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())
    listing = "".join(f"{digest}  {file}\n" for file, digest in zip(files, _digests(step, files))).encode()
    with open(step / DIGESTS, "wb") as file:
        file.write(listing + b"# " + hashlib.sha256(listing).hexdigest().encode() + b"\n")
        os.fsync(file.fileno())


def check_digests(step: Path):
    """Raises UserError (or OSError), naming the file, unless a step holds the files that were saved, to the
    bit, and no others."""
    try:
        content = (step / DIGESTS).read_bytes()
    except OSError as error:
        raise UserError(
            f"{step / DIGESTS} cannot be read ({error.strerror}): the step was not saved to its end"
        ) from None
    listing = content[: content.rfind(b"# ")]
    if b"# " not in content and re.fullmatch(rb"([0-9a-f]{64}  [^\n]+\n)+", content):
        listing = content  # of an older tokenizer's training: without the digest of the list
    elif content != listing + b"# " + hashlib.sha256(listing).hexdigest().encode() + b"\n":
        raise UserError(f"{step / DIGESTS} is damaged")
    saved = {line[66:]: line[:64] for line in listing.decode().splitlines()}
    there = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()} - {DIGESTS}
    for file in sorted(saved.keys() ^ there):
        raise UserError(
            f"{step / file} " + ("is missing" if file in saved else "was not saved there by the training")
        )
    for file, digest in zip(saved, _digests(step, saved)):
        if digest != saved[file]:
            raise UserError(f"{step / file} is damaged: its SHA-256 is not that of what was saved")


def _digests(folder, files):
    def digest(file):
        with open(folder / file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(digest, files)


# -------------------------------------------------------------------------------- records of finished work


class Record:
    """JSON lines beside the results of a command, one for each piece of work that is finished; the first
    holds the settings.

    `lines` are those of an earlier call, which a kill or a full disk may have stopped at any point; what
    stands after a damaged line does not count. Raises UserError, naming what differs, where the file is of
    other settings, unless such a file is `replaced`."""

    def __init__(self, file: Path, settings: dict, replaced: bool = False):
        self.file, self.lines = file, []
        self.head = strict_json({"settings": settings}, default=str) + "\n"
        content = file.read_bytes() if file.exists() else b""
        head, *lines = content.splitlines(keepends=True) or [b""]
        if head and head != self.head.encode():
            if not replaced:
                before = parse_json(head, f"{file} line 1").get("settings")
                now = json.loads(self.head)["settings"]
                before = before if isinstance(before, dict) else {}
                differ = [k for k in before | now if before.get(k) != now.get(k)]
                changed = [f"{k}: {str(before.get(k))[:60]} -> {str(now.get(k))[:60]}" for k in differ]
                raise UserError(
                    f"{file} is of work with other settings ({'; '.join(changed)}); repeat them, delete it,"
                    " or choose another --out"
                )
            lines = []
        for line in lines:
            try:
                self.lines.append(parse_json(line if line.endswith(b"\n") else b"", file))
            except UserError:
                break

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
    files = sorted([*root.glob("*.py"), *root.glob("common/*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ bad steps


def new_guard() -> dict:
    """What a step is judged by: running means of the loss and the gradient norm, and counts of steps."""
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "norm")} | {
        name: jnp.zeros((), jnp.int32) for name in ("taken", "skipped", "in_a_row")
    }


def skip_bad_step(new: dict, old: dict, loss, norm) -> dict:
    """The state after a step: the parts of `new`, or those of the state `old` where the step is bad; and the
    guard after it.

    A step is bad if its loss or gradient norm is no finite number, or, once twenty steps have been taken,
    if one is a hundred times its running mean."""
    guard = old["guard"]
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    good &= (guard["taken"] < 20) | (loss <= 100 * guard["loss"]) & (norm <= 100 * guard["norm"])
    mean = lambda old, value: jnp.where(
        good, jnp.where(guard["taken"] > 0, 0.95 * old + 0.05 * value, value), old
    )
    state = {k: jax.tree.map(lambda a, b: jnp.where(good, a, b), new[k], old[k]) for k in new}
    return state | {
        "guard": {
            "loss": mean(guard["loss"], loss),
            "norm": mean(guard["norm"], norm),
            "taken": guard["taken"] + good,
            "skipped": guard["skipped"] + ~good,
            "in_a_row": jnp.where(good, 0, guard["in_a_row"] + 1),
        }
    }


def check_health(step: int, metrics: dict, patience: int, last_saved: int):
    """Stops a run that leaves out one step after another."""
    if metrics["in_a_row"] >= patience:
        raise RunStopped(
            f"{metrics['in_a_row']:.0f} steps in a row were left out, the last, {step}, for a loss of"
            f" {metrics['loss']} and a gradient norm of {metrics['grad_norm']}; the last checkpoint is that"
            f" of step {last_saved}; try a lower --learning-rate, or look for bad data"
        )
