"""The page that `python sample.py --serve` opens: one model in a browser on this machine.

    pip install "gradio>=6.20,<7"
    python sample.py --serve                                     # http://127.0.0.1:7860, nowhere else

Dimension key: as in sample.py."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

import lvm
import sample
import vqgan
from common.images import FORMATS, MAX_PIXELS, UserError, encode_image, frames_in, read_pictures, to_image
from common.weights import strict_json

MOST_UPLOAD = 16 << 20  # bytes of one request that brings pictures
MOST_MESSAGE = 1 << 19  # of any other request
MOST_SCRATCH = 256 << 20  # of all uploads and drawn pictures on disk; the oldest go first
OLDEST = 3600  # seconds that they are kept at most
MOST_REQUESTS = 64  # at once; more are answered with 503
MOST_CONNECTIONS = 256  # with those that ask nothing
PATIENCE = 10  # seconds for a request to come, for its next bytes, and for a reader to read on
MOST_SECONDS = 1800  # of one request, with its time in the queue
MOST_MEMORY = 200 << 20  # bytes that reading one picture may take
MOST_WORK = 1_000_000_000  # pixels that one request may have decoded
LARGE = 4_000_000  # pixels; larger pictures are made smaller as they are read
FILES = "/playground-files"  # what answers call the folder of uploads and drawn pictures
PAGES = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon(/\d+)?|(assets|static|svelte)/.*|"
    r"gradio_api/(info|startup-events|app_id|theme\.css|upload|upload_progress|queue/(join|data)|file=.*|"
    r"cancel|reset))?/?",
    re.DOTALL,
)
CSS = """#prompt .grid-container {grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 4px}
#picture {min-height: 320px} #picture img {width: 100%}"""


def play(config: sample.Config, model, tokenizer):
    """Yields (picture so far, its candidates' likelihoods as text) after every row of codes that is drawn."""
    sample.check_config(config)
    [prompt] = sample.read_prompts(config, None)
    prompt_THWC = sample.show(config, model, tokenizer, prompt)
    captions = sample.prompt_captions(len(prompt_THWC), sample.is_analogy(config, prompt.pictures))
    N, M, S = sample.count_candidates(config), config.frames, tokenizer.config.codes_per_image
    side, size = math.isqrt(S), tokenizer.config.resolution
    codes_NT, nats_NT = np.zeros((N, 0), np.int32), np.zeros((N, 0))
    pixels_NMHWC, nats_NM = np.full((N, M, size, size, 3), 0.9, np.float32), np.zeros((N, M))
    keys_N = sample.candidate_keys(jax.random.key(config.seed), N)
    for piece in sample.draw_after(config, model, tokenizer, [prompt_THWC], keys_N, piece=side):
        codes_NT = np.concatenate([codes_NT, piece.codes_NC], axis=1)
        nats_NT = np.concatenate([nats_NT, piece.nats_NC], axis=1)
        sample.check_finite(nats_NT)
        m = (codes_NT.shape[1] - 1) // S
        here_NS = codes_NT[:, m * S :]
        left, rows = S - here_NS.shape[1], here_NS.shape[1] * size // S
        pixels_NHWC = vqgan.decode(tokenizer, np.pad(here_NS, ((0, 0), (0, left)), mode="edge"))
        pixels_NMHWC[:, m, :rows] = pixels_NHWC[:, :rows]
        nats_NM[:, m] = nats_NT[:, m * S :].mean(1)
        order = np.argsort(-nats_NT.mean(1)).tolist()
        mine = order[:1] if config.best and codes_NT.shape[1] == M * S else list(range(N))
        drawn = sample.captioned(sample.Answer(mine, pixels_NMHWC[mine], nats_NM[mine]))
        ranked = (
            f"{k}. candidate {n + 1}: {nats_NT[n].mean():.3f} nats a code" for k, n in enumerate(order, 1)
        )
        yield sample.sheet_of(list(zip(prompt_THWC, captions)), drawn, config.captions), "\n".join(ranked)


def command_line(config: sample.Config) -> str:
    """What to type for `config`: every flag that is not at its default."""
    words = ["python", "sample.py"]
    for field in dataclasses.fields(sample.Config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def save_replay(config: sample.Config, size: int, path: Path) -> str:
    """Writes a ZIP of the prompt as the model saw it, a prompts.jsonl that names it, and the command that
    draws the same codes again, which is returned."""
    pictures = sample.list_prompt(config.prompt, config.stride)
    new = dict(prompt=(sample.PROMPT,), prompts=Path("prompts.jsonl"), out=Path("answers"), stride=1)
    new["kind"] = "analogy" if sample.is_analogy(config, pictures) else "sequence"
    line = command_line(dataclasses.replace(config, **new, serve=False, port=sample.Config.port))
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"prompt/{t:03}.png" for t in range(len(pictures))]
        for name, pixels_HWC in zip(names, read_pictures(pictures, size, config.fit)):
            archive.writestr(name, encode_image(to_image(pixels_HWC), name))
        archive.writestr("prompts.jsonl", strict_json({"input": names, "output": "answer.png"}) + "\n")
        archive.writestr("command.txt", line + "\n")
    return line


def serve(config: sample.Config):
    """`--serve`: the page on this machine alone, one drawing at a time, a short queue before it.

    Ends the process, at Ctrl-C or SIGTERM with status 0."""
    # A request can name files of gradio's working and temporary directories, so both are this one.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        temporary_files_in(scratch := os.path.realpath(scratch)),
    ):
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": scratch}
        try:
            import fastapi
            import gradio
            import uvicorn
        except ImportError:
            raise UserError(
                'the playground wants gradio, which is not installed: pip install "gradio>=6.20,<7"'
            ) from None
        try:
            listener = socket.create_server(("127.0.0.1", config.port))  # found out before the model is read
        except OSError as error:
            raise UserError(f"--port {config.port}: {error.strerror}; name another one") from None
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then too
        model_path, _ = sample.find_models(config.model, config.tokenizer)
        config = dataclasses.replace(config, model=model_path)  # a later run does not change the replay
        tokenizer, model, _ = sample.open_all(config, [])
        named = config.tokenizer and Path(shown_path(config.tokenizer))
        config = dataclasses.replace(config, model=shown_path(config.model), tokenizer=named)
        # Named fonts would be fetched.
        theme = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        with contextlib.chdir(scratch):
            files = Scratch(Path(scratch))
            page = build_page(config, model, tokenizer, files)
            page.queue(max_size=16, default_concurrency_limit=1, api_open=False)
            outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
            look = dict(theme=theme, css=CSS, footer_links=[], ssr_mode=False, show_error=False)
            place = dict(server_name="127.0.0.1", server_port=config.port, max_file_size=MOST_UPLOAD)
            app = gradio.mount_gradio_app(outer, page, "/", **place, **look)
            # Without, gradio lets a request name any file at all: it skips that check in mounted pages.
            page.has_launched = True
            files.keep_present()
            print(f"playground http://127.0.0.1:{config.port}   (Ctrl-C ends it)", flush=True)
            limits = dict(limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=1)
            how = dict(http=impatient_protocol(), ws="none", log_level="warning")
            server = uvicorn.Server(uvicorn.Config(Guard(app, config.port, files), **how, **limits))
            thread, status = threading.Thread(target=server.run, args=([listener],), daemon=True), 1
            thread.start()
            try:
                while thread.is_alive():
                    thread.join(60)
                    files.sweep()
            except KeyboardInterrupt:
                server.should_exit, status = True, 0
                with contextlib.suppress(KeyboardInterrupt):
                    thread.join(2)
    sys.stdout.flush()
    os._exit(status)  # a drawing that is under way or being compiled cannot be interrupted


def shown_path(path) -> str:
    """A path as a replay may show it: relative to this folder or the code's, else the name alone."""
    path = Path(path)
    for folder in (Path.cwd(), vqgan.HERE):
        if path.is_absolute() and path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return path.name if path.is_absolute() else str(path)


@contextlib.contextmanager
def temporary_files_in(folder: str):
    tempfile.tempdir, before = folder, tempfile.tempdir
    try:
        yield
    finally:
        tempfile.tempdir = before


def build_page(config: sample.Config, model, tokenizer, files: "Scratch"):
    """The page, a gradio.Blocks. Downloads are written to the folder of `files`, the last 64 of them."""
    import gradio as gr

    bundled = {
        folder.name: [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
        for folder in sorted(sample.BOOK.iterdir())
        if folder.is_dir()
    }
    first = sample.PROMPT.name if sample.PROMPT.name in bundled else next(iter(bundled))
    drawn, controls = itertools.count(), {}

    def slider(name, low, high, step, label):
        controls[name] = gr.Slider(low, high, getattr(config, name), step=step, label=label)

    def dropdown(name, choices, label):
        controls[name] = gr.Dropdown(choices, value=getattr(config, name), label=label)

    with gr.Blocks(title="LVM playground", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# LVM playground\nShow pairs of picture and answer, then a query, and the model draws its "
            f"answer; or show frames, and it goes on. `{Path(config.model).name}`, "
            f"{lvm.parameter_count(model.config):,} parameters."
        )
        with gr.Row():
            with gr.Column(scale=4):
                choice = gr.Dropdown(list(bundled), value=first, label="A bundled prompt")
                gr.Markdown("or your own: clear this and drop pictures on it, in reading order")
                look = dict(columns=8, height=230, object_fit="contain", buttons=[], show_label=False)
                kind = dict(type="filepath", file_types=["image"], format="png", interactive=True)
                prompt = gr.Gallery(bundled[first], elem_id="prompt", **look, **kind)
                with gr.Row():
                    slider("candidates", 1, 8, 1, "Candidates")
                    slider("frames", 1, 8, 1, "New pictures of each")
                with gr.Row():
                    slider("temperature", 0, 2, 0.05, "Temperature")
                    seed = dict(label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
                    controls["seed"] = gr.Number(config.seed, **seed)
                with gr.Accordion("More", open=False):
                    with gr.Row():
                        slider("top_p", 0.05, 1, 0.05, "Top-p")
                        slider("top_k", 0, model.config.codes, 1, "Top-k (0: all)")
                    with gr.Row():
                        slider("min_p", 0, 1, 0.01, "Min-p")
                        slider("guidance", 0, 8, 0.25, "Guidance by the examples (1: none)")
                    with gr.Row():
                        slider("jacobi", 0, 32, 1, "Draft this many codes (Jacobi)")
                        dropdown("kind", ["auto", "analogy", "sequence"], "Kind")
                    with gr.Row():
                        dropdown("fit", ["stretch", "crop"], "Other than square pictures")
                        controls["best"] = gr.Checkbox(config.best, label="Keep the likeliest only")
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    another = gr.Button("Another seed")
            with gr.Column(scale=5):
                gr.Markdown("The prompt, then the candidates, each with the mean log-likelihood of its codes")
                look = dict(show_label=False, buttons=["fullscreen"], min_width=400)
                picture = gr.Image(format="png", interactive=False, elem_id="picture", **look)
                with gr.Row():
                    ranking = gr.Textbox(label="Mean log-likelihood, likeliest first", lines=4, scale=2)
                    with gr.Column(scale=1):
                        png = gr.DownloadButton("Picture (PNG)", interactive=False)
                        replay = gr.DownloadButton("Replay (JSONL, command)", interactive=False)
                look = dict(label="The command in the replay", lines=2, buttons=["copy"])
                command = gr.Textbox(elem_id="command", **look)

        def draw(pictures, *values):
            try:
                if not pictures:
                    raise UserError("the prompt is empty: drop pictures, or pick a bundled prompt")
                kinds = [type(getattr(sample.Config, name)) for name in controls]
                changes = {name: kind(value) for name, kind, value in zip(controls, kinds, values)}
                most = {"candidates": 8, "frames": 8, "jacobi": 32}
                if any(changes[name] > most[name] for name in most):
                    raise UserError("at most 8 candidates of 8 new pictures, and a draft of 32 codes")
                prompt = make_smaller([Path(file) for file, _ in pictures])
                mine = dataclasses.replace(config, serve=False, prompt=prompt, **changes)
                waiting = gr.DownloadButton(interactive=False)
                for image, likelihoods in play(mine, model, tokenizer):
                    files.sweep()
                    yield image, likelihoods, waiting, waiting, ""
                place = files.folder / str(next(drawn) % 64)
                image.save(f"{place}.png")
                again = save_replay(mine, tokenizer.config.resolution, Path(f"{place}.zip"))
                ready = [
                    gr.DownloadButton(value=f"{place}{end}", interactive=True) for end in (".png", ".zip")
                ]
                yield image, likelihoods, *ready, again
            except (ValueError, TypeError) as error:  # of a file it says the name, not where the file lies
                said = re.sub(rf"{re.escape(str(files.folder))}\S*/", "", str(error))
            except OSError as error:
                said = error.strerror or "a picture is no longer here; drop it again"
            else:
                return
            raise gr.Error(said, print_exception=False)

        on_device = dict(concurrency_id="device", concurrency_limit=1)
        inputs, outputs = [prompt, *controls.values()], [picture, ranking, png, replay, command]
        choice.input(lambda name: bundled[name], choice, prompt, queue=False)
        start.click(draw, inputs, outputs, **on_device)
        next_seed = lambda seed: (int(seed or 0) + 1) % 2**31
        another.click(next_seed, controls["seed"], controls["seed"], queue=False).then(
            draw, inputs, outputs, **on_device
        )
    return page


def make_smaller(paths: list[Path]) -> tuple[Path, ...]:
    """Replaces pictures of more than `LARGE` pixels by smaller copies beside them.

    Raises UserError for a picture whose reading takes more than `MOST_MEMORY`, and where all together have
    more than `MOST_WORK` pixels. What is no picture is left to `read_pictures`, which says so."""
    work, smaller = 0, []
    for path in paths:
        try:
            image = Image.open(path, formats=FORMATS)
        except Exception:
            smaller.append(path)
            continue
        with image:
            try:
                pixels, frames = image.width * image.height, frames_in(image)
                work += pixels * frames * (frames + 1) // 2  # a later frame is made of those before it
                if work > MOST_WORK:
                    raise UserError("with this picture they have too many pixels or frames; scale them down")
                smaller.append(path if pixels <= LARGE else smaller_copy(image, path))
            except Exception as error:  # Pillow raises many kinds
                raise UserError(f"{path.name}: {error}") from None
    return tuple(smaller)


def smaller_copy(image: Image.Image, path: Path) -> Path:
    pixels, said = image.width * image.height, f"{image.width}x{image.height} pixels"
    if pixels > MAX_PIXELS:
        raise UserError(f"{said} are over the limit of {MAX_PIXELS:,}")
    if memory_for(image, path) > MOST_MEMORY:
        raise UserError(f"{said} take too much memory as {image.format}; scale it down")
    if frames_in(image) > 1:
        raise UserError(f"{said} are too many for an animation; scale it down")
    if image.mode.startswith("I") or image.mode == "F":
        return path
    image.draft(None, (1024, 1024))  # a JPEG is decoded at an eighth of its size or more
    image.load()  # which turns a TIFF
    turned = image.getexif().get(0x0112, 1)
    plain = lambda image: image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode not in ("L", "RGB", "RGBA", "CMYK") or "transparency" in image.info:
        image = plain(image)
    image = image.reduce(max(1, min(image.size) // 1024, math.isqrt(image.width * image.height // LARGE)))
    image.getexif()[0x0112] = turned
    copy = path.with_name(f"{path.stem}.smaller.png")
    plain(ImageOps.exif_transpose(image)).save(copy, compress_level=1)
    return copy


def memory_for(image: Image.Image, path: Path) -> int:
    """Bytes that decoding a picture takes, about."""
    pixels = image.width * image.height
    if image.format == "JPEG":  # one that comes in several scans is held whole, as 2 bytes a value
        several = path.read_bytes().count(b"\xff\xda") > 1
        scale = next((by for by in (8, 4, 2) if min(image.size) // 1024 >= by), 1)
        return pixels * 4 // scale**2 + pixels * 2 * len(image.getbands()) * several
    if image.mode.startswith("I") or image.mode == "F" or image.format == "WEBP":
        return pixels * 24
    kept = image.format in ("PNG", "BMP") and image.mode in ("L", "RGB") and "transparency" not in image.info
    return pixels * (4 if kept else 8)


class Scratch:
    """The folder of uploads, of the pictures that gradio keeps and of downloads."""

    def __init__(self, folder: Path):
        self.folder, self.kept, self.coming = folder, set(), 0

    def keep_present(self):
        """The bundled prompts are shown as long as the page is."""
        self.kept = {file for file, *_ in self.list()}

    def list(self):
        """(file, when written, bytes on disk) of each."""
        found = []
        for folder, _, names in os.walk(self.folder):
            for file in (os.path.join(folder, name) for name in names):
                with contextlib.suppress(OSError):  # gone meanwhile
                    stat = os.lstat(file)
                    found.append((file, stat.st_ctime, max(stat.st_size, 4096)))
        return found

    def sweep(self, room: int = 0):
        """Removes what is older than OLDEST, then the oldest until `room` bytes of MOST_SCRATCH are free."""
        found = sorted((file for file in self.list() if file[0] not in self.kept), key=lambda file: file[1])
        used = sum(size for *_, size in found)
        for file, written, size in found:
            if used + room <= MOST_SCRATCH and written > time.time() - OLDEST:
                break
            with contextlib.suppress(OSError):
                os.unlink(file)
                used -= size
                if (folder := os.path.dirname(file)) != str(self.folder):
                    os.rmdir(folder)


class Guard:
    """The ASGI application around gradio's, which lets through what our own page sends: to the paths that it
    uses, from this origin, to this host's name (not another that was bound to it), of limited size, in time.

    It hides where files lie: answers and requests call the folder of `files` FILES."""

    def __init__(self, app, port: int, files: Scratch):
        self.app, self.files, self.running = app, files, 0
        self.ours = {f"127.0.0.1:{port}", f"localhost:{port}"}
        folder = str(files.folder)
        spellings = {folder, json.dumps(folder)[1:-1], urllib.parse.quote(folder)}
        self.spellings = sorted((text.encode() for text in spellings), key=len, reverse=True)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        upload, length = scope["path"] == "/gradio_api/upload", headers.get(b"content-length", "0")
        host = headers.get(b"host")
        origin = headers.get(b"origin", f"http://{host}").removeprefix("http://")
        if host not in self.ours or origin not in self.ours:
            return await answer(send, 403, "this playground answers its own page only")
        if not PAGES.fullmatch(scope["path"]):
            return await answer(send, 404, "no such page")
        most = MOST_UPLOAD if upload else MOST_MESSAGE
        sized = length.isascii() and length.isdigit() and b"transfer-encoding" not in headers
        if not sized or int(length[:20]) > most:
            return await answer(send, 413, f"more than {most >> 10} KiB in one request")
        if not upload and (receive := await self.read_request(receive)) is None:
            return await answer(send, 408, "the request did not come to its end")
        if self.running >= MOST_REQUESTS or upload and self.files.coming + int(length) > MOST_SCRATCH // 2:
            return await answer(send, 503, "busy; try again")
        self.running += 1
        self.files.coming += int(length) * upload
        try:
            async with asyncio.timeout(MOST_SECONDS):
                if upload:
                    await asyncio.to_thread(self.files.sweep, 2 * self.files.coming)  # gradio copies them
                    receive = in_time(receive)
                kept = [
                    (name, self.shown_to_real(value))
                    for name, value in scope["headers"]
                    if name != b"accept-encoding"
                ]  # in compressed answers no path could be hidden
                scope = scope | {
                    "headers": kept,
                    "path": self.shown_to_real(scope["path"].encode()).decode(),
                    "raw_path": self.shown_to_real(scope.get("raw_path", b"")),
                }
                await self.app(scope, receive, self.hiding(send))
        except TimeoutError:
            pass  # uvicorn closes what has no whole answer
        finally:
            self.running -= 1
            self.files.coming -= int(length) * upload

    def shown_to_real(self, text: bytes) -> bytes:
        return text.replace(FILES.encode(), str(self.files.folder).encode())

    def real_to_shown(self, text: bytes) -> bytes:
        for spelling in self.spellings:
            text = text.replace(spelling, FILES.encode())
        return text

    async def read_request(self, receive):
        """Reads the body -> a `receive` that hands it on in one piece; None where it does not come."""
        parts, message = [], {"more_body": True}
        while message.get("more_body"):
            message = await in_time(receive)()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
        whole = [{"type": "http.request", "body": self.shown_to_real(b"".join(parts)), "more_body": False}]

        async def receive_read():
            return whole.pop() if whole else await receive()

        return receive_read

    def hiding(self, send):
        """A `send` that writes FILES for the folder's path: in whole texts, in each piece of a stream."""
        held, parts, stream = None, [], False

        async def send_hidden(message):
            nonlocal held, stream
            if message["type"] == "http.response.start":
                headers = [(name, self.real_to_shown(value)) for name, value in message.get("headers", [])]
                kind, message = dict(headers).get(b"content-type", b""), message | {"headers": headers}
                stream = kind.startswith(b"text/event-stream")
                if kind.startswith((b"text/html", b"text/plain", b"application/json")):
                    held = message
                    return
            elif held is not None:
                parts.append(message.get("body", b""))
                if message.get("more_body"):
                    return
                body = self.real_to_shown(b"".join(parts))
                length = str(len(body)).encode()  # none in an answer to HEAD
                headers = [
                    (name, length if name == b"content-length" and body else value)
                    for name, value in held["headers"]
                ]
                await send(held | {"headers": headers})
                held, message = None, {"type": "http.response.body", "body": body}
            elif stream:
                message = message | {"body": self.real_to_shown(message.get("body", b""))}
            await send(message)

        return send_hidden


async def answer(send, status: int, text: str):
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def in_time(receive):
    """A `receive` for which a client is gone that stops in its request for PATIENCE seconds."""
    whole = False

    async def receive_in_time():
        nonlocal whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), PATIENCE)
        except TimeoutError:
            message = {"type": "http.disconnect"}
        whole = not message.get("more_body")
        return message

    return receive_in_time


def impatient_protocol():
    """uvicorn's HTTP protocol for clients that do nothing for PATIENCE seconds: it cuts a connection without
    a whole request, or whose answer is not read. (uvicorn itself waits for ever in both cases.)"""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            self.request, self.unread, self.drained, self.lost, self.idle = None, 0, False, False, 0
            self.watch()

        def watch(self):
            unread = self.transport.get_write_buffer_size()
            answering = self.cycle is not None and not self.cycle.response_complete
            stuck = unread > 0 and unread >= self.unread and not self.drained
            silent = unread == 0 and not answering and self.cycle is self.request
            self.idle = self.idle + 1 if stuck or silent else 0
            self.request, self.unread, self.drained = self.cycle, unread, False
            if self.idle > PATIENCE:
                self.transport.abort()
            elif not self.lost:
                self.loop.call_later(1, self.watch)

        def resume_writing(self):
            self.drained = True
            super().resume_writing()

        def connection_lost(self, error):
            self.lost = True
            super().connection_lost(error)

    return Impatient
