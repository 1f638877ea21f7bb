"""The page that `python sample.py --serve` opens: one model in a browser on this machine.

    pip install "gradio>=6.20"
    python sample.py --serve                                     # http://127.0.0.1:7860, nowhere else

Dimension key: as in sample.py.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import socket
import tempfile
import zipfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import lvm
import sample
import vqgan
from common.images import UserError, read_pictures

MOST_UPLOAD = 16 << 20  # bytes of one request to the playground
CSS = "#prompt .grid-container {grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 4px} #picture {min-height: 320px} #picture img {width: 100%}"


def play(config: sample.Config, model, tokenizer):
    """The playground's drawing: yields (picture so far, its candidates' likelihoods as text) after every row of codes."""
    sample.check_config(config)
    pictures = sample.list_prompt(config.prompt, config.stride)
    prompt_THWC = read_pictures(pictures, tokenizer.config.resolution, config.fit)
    analogy, kept = sample.fit_context(config, model, tokenizer, pictures)
    prompt_THWC = prompt_THWC[-kept:]
    shown = list(zip(prompt_THWC, sample.prompt_captions(kept, analogy)))
    N, M, S = sample.count_candidates(config), config.frames, tokenizer.config.codes_per_image
    side, size = math.isqrt(S), tokenizer.config.resolution
    codes_NT, nats_NT = np.zeros((N, 0), np.int32), np.zeros((N, 0))
    pixels_NMHWC = np.full((N, M, size, size, 3), 0.9, np.float32)
    for piece in sample.stream_sentences(
        model, sample.encode_all(tokenizer, [prompt_THWC]), sample.candidate_keys(jax.random.key(config.seed), N), sample.drawing_of(config), frames=M,
        bos=config.bos, piece=side, jacobi=config.jacobi, cache_dtype=sample.cache_dtype_of(config), most=config.context_frames,
    ):
        codes_NT, nats_NT = (np.concatenate([old, new], axis=1) for old, new in zip((codes_NT, nats_NT), piece))
        if not np.isfinite(nats_NT).all():
            raise UserError("the model gives NaN; its weights are damaged or overflow in this dtype")
        m = (codes_NT.shape[1] - 1) // S
        here_NS = codes_NT[:, m * S:]
        rows = here_NS.shape[1] * size // S
        pixels_NHWC = vqgan.decode(tokenizer, np.pad(here_NS, ((0, 0), (0, S - here_NS.shape[1])), mode="edge"))
        pixels_NMHWC[:, m, :rows] = pixels_NHWC[:, :rows]
        nats_NM = np.stack([nats_NT[:, i:i + S].mean(1) for i in range(0, nats_NT.shape[1], S)], axis=1)
        nats_NM = np.pad(nats_NM, ((0, 0), (0, M - nats_NM.shape[1])))
        order = np.argsort(-nats_NT.mean(1)).tolist()
        last = codes_NT.shape[1] == M * S
        mine = order[:1] if config.best and last else range(N)
        new = sample.captioned(sample.Answer(list(mine), pixels_NMHWC[list(mine)], nats_NM[list(mine)]))
        new = new if M > 1 else [[row[0] for row in new]]
        likelihoods = "\n".join(f"{rank}. candidate {n + 1}: {nats_NT[n].mean():.3f} nats a code" for rank, n in enumerate(order, 1))
        yield sample.sheet([shown, *new], config.captions), likelihoods


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
    """Writes a ZIP of the prompt as the model saw it, a prompts.jsonl that names it, and the command that draws the same codes again,
    which is returned."""
    pictures = sample.list_prompt(config.prompt, config.stride)
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"prompt/{t:03}.png" for t in range(len(pictures))]
        for name, pixels_HWC in zip(names, read_pictures(pictures, size, config.fit)):
            with archive.open(name, "w") as file:
                sample.to_image(pixels_HWC).save(file, format="PNG")
        again = dataclasses.replace(config, prompt=(sample.PROMPT,), prompts=Path("prompts.jsonl"), out=Path("answers"), serve=False, stride=1,
                                    port=sample.Config.port, kind="analogy" if sample.is_analogy(config, pictures) else "sequence")
        archive.writestr("prompts.jsonl", json.dumps({"input": names, "output": "answer.png"}) + "\n")
        archive.writestr("command.txt", command_line(again) + "\n")
    return command_line(again)


def serve(config: sample.Config):
    """`--serve`: the page on this machine alone, one drawing at a time, a short queue before it."""
    # A request can name files of gradio's working and temporary directories, so both are this one.
    with tempfile.TemporaryDirectory() as scratch, temporary_files_in(scratch):
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": scratch}
        try:
            import fastapi
            import gradio
            import uvicorn
        except ImportError:
            raise UserError('the playground wants gradio, which is not installed: pip install "gradio>=6.20"') from None
        try:
            listener = socket.create_server(("127.0.0.1", config.port))  # found out before the model is read
        except OSError as error:
            raise UserError(f"--port {config.port}: {error.strerror}; name another one") from None
        config = dataclasses.replace(config, model=sample.find_models(config.model, config.tokenizer)[0])  # a later run does not change the replay
        tokenizer, _, model = sample.open_all(config, lambda size: None)
        theme = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # named fonts would be fetched
        with contextlib.chdir(scratch), contextlib.suppress(KeyboardInterrupt):
            page = build_page(config, model, tokenizer, Path(scratch)).queue(max_size=16, default_concurrency_limit=1, api_open=False)
            app = gradio.mount_gradio_app(fastapi.FastAPI(), page, "/", server_name="127.0.0.1", server_port=config.port, theme=theme, css=CSS,
                                          max_file_size=MOST_UPLOAD, footer_links=[], ssr_mode=False)
            page.has_launched = True  # without, gradio lets a request name any file at all: it skips that check in mounted pages
            print(f"playground http://127.0.0.1:{config.port}   (Ctrl-C ends it)", flush=True)
            uvicorn.Server(uvicorn.Config(guarded(app, config.port), log_level="warning", limit_concurrency=64)).run([listener])


@contextlib.contextmanager
def temporary_files_in(folder: str):
    tempfile.tempdir, before = folder, tempfile.tempdir
    try:
        yield
    finally:
        tempfile.tempdir = before


def build_page(config: sample.Config, model, tokenizer, scratch: Path):
    """The page, a gradio.Blocks. Downloads are written to `scratch`, the last 64 of them."""
    import gradio as gr

    bundled = {folder.name: [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))] for folder in sorted(sample.BOOK.iterdir()) if folder.is_dir()}
    first = sample.PROMPT.name if sample.PROMPT.name in bundled else next(iter(bundled))
    drawn = itertools.count()
    with gr.Blocks(title="LVM playground", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        gr.Markdown(f"# LVM playground\nShow pairs of picture and answer, then a query, and the model draws its answer; or show frames, and it goes on. "
                    f"`{Path(config.model).name}`, {lvm.parameter_count(model.config):,} parameters.")
        with gr.Row():
            with gr.Column(scale=4):
                choice = gr.Dropdown(list(bundled), value=first, label="A bundled prompt")
                gr.Markdown("or your own: clear this and drop pictures on it, in reading order")
                prompt = gr.Gallery(bundled[first], show_label=False, type="filepath", file_types=["image"], interactive=True, columns=8, height=230,
                                    object_fit="contain", format="png", buttons=[], elem_id="prompt")
                with gr.Row():
                    controls = {"candidates": gr.Slider(1, 8, config.candidates, step=1, label="Candidates"),
                                "frames": gr.Slider(1, 8, config.frames, step=1, label="New pictures of each")}
                with gr.Row():
                    controls["temperature"] = gr.Slider(0, 2, config.temperature, step=0.05, label="Temperature")
                    controls["seed"] = gr.Number(config.seed, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
                with gr.Accordion("More", open=False):
                    with gr.Row():
                        controls["top_p"] = gr.Slider(0.05, 1, config.top_p, step=0.05, label="Top-p")
                        controls["top_k"] = gr.Slider(0, model.config.codes, config.top_k, step=1, label="Top-k (0: all)")
                    with gr.Row():
                        controls["min_p"] = gr.Slider(0, 1, config.min_p, step=0.01, label="Min-p")
                        controls["guidance"] = gr.Slider(0, 8, config.guidance, step=0.25, label="Guidance by the examples (1: none)")
                    with gr.Row():
                        controls["jacobi"] = gr.Slider(0, 32, config.jacobi, step=1, label="Draft this many codes (Jacobi)")
                        controls["kind"] = gr.Dropdown(["auto", "analogy", "sequence"], value=config.kind, label="Kind")
                    with gr.Row():
                        controls["fit"] = gr.Dropdown(["stretch", "crop"], value=config.fit, label="Other than square pictures")
                        controls["best"] = gr.Checkbox(config.best, label="Keep the likeliest only")
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    another = gr.Button("Another seed")
            with gr.Column(scale=5):
                gr.Markdown("The prompt, then the candidates, each with the mean log-likelihood of its codes")
                picture = gr.Image(show_label=False, format="png", interactive=False, buttons=["fullscreen"], elem_id="picture", min_width=400)
                with gr.Row():
                    ranking = gr.Textbox(label="Mean log-likelihood, likeliest first", lines=4, scale=2)
                    with gr.Column(scale=1):
                        png = gr.DownloadButton("Picture (PNG)", interactive=False)
                        replay = gr.DownloadButton("Replay (JSONL, command)", interactive=False)
                command = gr.Textbox(label="The command in the replay", lines=2, buttons=["copy"], elem_id="command")

        def draw(files, *values):
            try:
                if not files:
                    raise UserError("the prompt is empty: drop pictures, or pick a bundled prompt")
                changes = {name: type(getattr(sample.Config(), name))(value) for name, value in zip(controls, values)}
                if not (1 <= changes["candidates"] <= 8 and 1 <= changes["frames"] <= 8 and 0 <= changes["jacobi"] <= 32):
                    raise UserError("at most 8 candidates of 8 new pictures, and a draft of 32 codes")
                mine = dataclasses.replace(config, prompt=tuple(Path(file[0]) for file in files), **changes)
                for image, likelihoods in play(mine, model, tokenizer):
                    yield image, likelihoods, gr.DownloadButton(interactive=False), gr.DownloadButton(interactive=False), ""
                place = scratch / str(next(drawn) % 64)
                image.save(f"{place}.png")
                again = save_replay(mine, tokenizer.config.resolution, Path(f"{place}.zip"))
                yield image, likelihoods, *(gr.DownloadButton(value=f"{place}{end}", interactive=True) for end in (".png", ".zip")), again
            except (ValueError, OSError, TypeError) as error:
                raise gr.Error(str(error), print_exception=False) from None

        choice.input(lambda name: bundled[name], choice, prompt, queue=False)
        outputs = [picture, ranking, png, replay, command]
        start.click(draw, [prompt, *controls.values()], outputs, concurrency_id="device", concurrency_limit=1)
        another.click(lambda seed: (int(seed or 0) + 1) % 2**31, controls["seed"], controls["seed"], queue=False).then(
            draw, [prompt, *controls.values()], outputs, concurrency_id="device", concurrency_limit=1)
    return page


def guarded(app, port: int):
    """Refuses what our own page never sends: foreign origins, other names for this host (a rebound DNS name), bodies that are large or
    do not say their length."""
    ours = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def guard(scope, receive, send):
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        length, status = headers.get("content-length", "0"), None
        if headers.get("host") not in ours or headers.get("origin", "http://" + headers["host"]).removeprefix("http://") not in ours:
            status, reason = 403, "this playground answers its own page only"
        elif "transfer-encoding" in headers or not length.isdigit() or int(length) > MOST_UPLOAD:
            status, reason = 413, f"more than {MOST_UPLOAD >> 20} MiB in one request"
        if status is None:
            return await app(scope, receive, send)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain"), (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": reason.encode()})

    return guard
