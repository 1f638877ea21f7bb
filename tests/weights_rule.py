"""The weights of every fixture, by rule: a tensor follows from its name, so that fixtures hold inputs and outputs only."""

import pickle
import zipfile
import zlib

import numpy as np


def tensor(name: str, shape, scale: float = 1.0) -> np.ndarray:
    """Returns float32 `scale` * N(0, 1) of `shape`; the same name always gives the same numbers."""
    numbers = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return np.float32(scale) * numbers.standard_normal(shape, dtype=np.float32)


# Two Hugging Face LLaMA configs: the usual kind of head, and the 3b's head_dim of 100.
LLAMAS = {
    "head32": dict(hidden_size=128, intermediate_size=176, num_attention_heads=4),
    "head100": dict(hidden_size=200, intermediate_size=264, num_attention_heads=2),
}
for config in LLAMAS.values():  # eps and theta are not the defaults: whoever ignores them is found out
    config |= dict(model_type="llama", num_hidden_layers=2, max_position_embeddings=96, tie_word_embeddings=False)
    config |= dict(rms_norm_eps=1e-4, rope_theta=500.0, vocab_size=160, codes=60, specials=100)
    config |= dict(bos_token_id=60, eos_token_id=61, pad_token_id=62)


def llama(config: dict) -> dict[str, np.ndarray]:
    """The state dict of a LlamaForCausalLM: products keep the variance, norm scales are 1 + 0.1 N(0, 1)."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    weights = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        block = {f"self_attn.{x}_proj": (D, D) for x in "qkvo"}
        block |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        block |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        weights |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {
        name: tensor(name, shape, shape[1] ** -0.5) if len(shape) == 2 else 1 + tensor(name, shape, 0.1)
        for name, shape in weights.items()
    }


VQGAN_DEFAULTS = dict(
    resolution=256, num_channels=3, hidden_channels=128, channel_mult=(1, 1, 2, 2, 4), num_res_blocks=2,
    attn_resolutions=(16,), no_attn_mid_block=False, z_channels=256, num_embeddings=1024, quantized_embed_dim=256,
    dropout=0.0, resample_with_conv=True, commitment_cost=0.25,
)  # fmt: skip
_SMALL = dict(
    resolution=32, hidden_channels=32, channel_mult=(1, 2), attn_resolutions=(16,), z_channels=16, num_embeddings=64,
    quantized_embed_dim=8,
)  # fmt: skip
_RELEASED = dict(
    channel_mult=(1, 2, 2, 4, 6), attn_resolutions=(), no_attn_mid_block=True, z_channels=64, num_embeddings=8192,
    quantized_embed_dim=64,
)  # fmt: skip
# The published tokenizer's keyword arguments, by the names in its config.json. `single` has one residual block a level:
# the encoder's only attention block of its level is in the file, and by the published code not run.
VQGAN_CONFIGS = {
    "small": VQGAN_DEFAULTS | _SMALL,
    "single": VQGAN_DEFAULTS | _SMALL | dict(num_res_blocks=1),
    "defaults": VQGAN_DEFAULTS,
    "released": VQGAN_DEFAULTS | _RELEASED,
}
# The network of fixtures/small.bin.
VQGAN_TINY = VQGAN_CONFIGS["single"] | dict(channel_mult=(1, 1), attn_resolutions=(), no_attn_mid_block=True)


def vqgan_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor under its open-muse name, in that module's own order."""
    shapes = {}

    def conv(name, out, in_, size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, in_, size, size), (out,)

    def norm(name, channels):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def residual(name, in_, out):
        norm(f"{name}.norm1", in_)
        conv(f"{name}.conv1", out, in_, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if in_ != out:
            conv(f"{name}.nin_shortcut", out, in_, 1)

    def attention(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def level(name, in_, out, blocks, resolution):
        for j in range(blocks):
            residual(f"{name}.block.{j}", out if j else in_, out)
        if resolution in config["attn_resolutions"]:
            for j in range(blocks):
                attention(f"{name}.attn.{j}", out)

    def middle(name, channels):
        residual(f"{name}.block_1", channels, channels)
        if not config["no_attn_mid_block"]:
            attention(f"{name}.attn_1", channels)
        residual(f"{name}.block_2", channels, channels)

    first, widths = config["hidden_channels"], [config["hidden_channels"] * m for m in config["channel_mult"]]
    last, z, embed = len(widths) - 1, config["z_channels"], config["quantized_embed_dim"]
    conv("encoder.conv_in", first, config["num_channels"], 3)
    for i, width in enumerate(widths):
        in_ = widths[i - 1] if i else first
        level(f"encoder.down.{i}", in_, width, config["num_res_blocks"], config["resolution"] >> i)
        if i != last:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", z, widths[-1], 3)
    conv("decoder.conv_in", widths[-1], z, 3)
    middle("decoder.mid", widths[-1])
    for i, width in enumerate(widths):
        in_ = widths[min(i + 1, last)]
        level(f"decoder.up.{i}", in_, width, config["num_res_blocks"] + 1, config["resolution"] >> i)
        if i:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", config["num_channels"], widths[0], 3)
    shapes["quantize.embedding.weight"] = (config["num_embeddings"], embed)
    conv("quant_conv", embed, z, 1)
    conv("post_quant_conv", z, embed, 1)
    return shapes


def vqgan_weights(shapes: dict[str, tuple[int, ...]], suffix: str = "") -> dict[str, np.ndarray]:
    """Returns every tensor of `vqgan_shapes` at a scale that keeps activations near 1 and calls on many codes.

    `suffix` joins each name before the draw: a seed, by which a fixture avoids two codes at nearly the same distance.
    """
    weights = {}
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            weights[name] = tensor(name + suffix, shape, 0.02)
        elif len(shape) == 1:
            weights[name] = 1 + tensor(name + suffix, shape, 0.1)
        elif name == "quantize.embedding.weight":
            weights[name] = tensor(name + suffix, shape, 0.25)
        else:
            weights[name] = tensor(name + suffix, shape, np.prod(shape[1:]) ** -0.5)
    return weights


def picture(size: int, batch: int = 1) -> np.ndarray:
    """Returns uint8 [batch, size, size, 3]: a patchwork of flat colours, ramps, stripes and rings.

    In integers throughout, so the same on every machine.
    """
    y, x = np.mgrid[:size, :size].astype(np.int64)
    row, column = y * 16 // size, x * 16 // size
    rings = 255 * ((2 * y - size) ** 2 + (2 * x - size) ** 2) // size**2
    frames = []
    for n in range(batch):
        cell = row * 16 + column + 7 * n
        stripes = 96 * (x * (1 + cell % 3) // 2 % 2)
        pattern = np.choose((cell * 5 + row * 3) % 4, [0, 1024 * x // size, stripes, rings])
        colours = [cell * (73, 151, 199)[c] + pattern * (1 + (cell + c) % 3) + 60 * y // size for c in range(3)]
        frames.append(np.stack(colours, -1) % 256)
    return np.stack(frames).astype(np.uint8)


def lpips_weights() -> dict[str, np.ndarray]:
    """VGG16's convolutions under torchvision's names and the five heads of LPIPS under the lpips package's."""
    weights, last = {}, 3
    for place, width in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64, 64, 128, 128, *[256] * 3, *[512] * 6)):
        weights[f"features.{place}.weight"] = tensor(f"features.{place}.weight", (width, last, 3, 3), (2 / (9 * last)) ** 0.5)
        weights[f"features.{place}.bias"] = tensor(f"features.{place}.bias", (width,), 0.05)
        last = width
    heads = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    return weights | {name: np.abs(tensor(name, shape, 0.1)) for name, shape in heads.items()}


def efficientnet_weights(shapes) -> dict[str, np.ndarray]:
    """The tensors of EfficientNet-Lite0: norms near the identity, kernels that keep the variance."""
    kinds = {"bias": lambda n, s: tensor(n, s, 0.1), "running_mean": lambda n, s: tensor(n, s, 0.1), "running_var": lambda n, s: 1 + np.abs(tensor(n, s, 0.2))}
    kernel = lambda n, s: tensor(n, s, (2 / np.prod(s[1:])) ** 0.5) if len(s) > 1 else 1 + tensor(n, s, 0.1)
    return {name: kinds.get(name.split(".")[-1], kernel)(name, tuple(shape)).astype(np.float32) for name, shape in shapes.items()}


def measured_pictures() -> tuple[np.ndarray, np.ndarray]:
    """Two float32 [2, 64, 64, 3] in [0, 1]: pictures, and what a bad tokenizer would make of them."""
    a = picture(64, 2).astype(np.float32) / 255
    return a, np.clip(0.8 * a + 0.1 + tensor("measured", a.shape, 0.05), 0, 1)


def write_pickle(file, tensors: dict[str, np.ndarray], key: str | None = None):
    """Writes float32 `tensors`, or {key: tensors}, as torch.save would, without PyTorch: its words are put together by hand."""
    word = lambda value: pickle.dumps(value, 2)[2:-1]  # without the frame of a whole pickle
    entries = b""
    for i, (name, array) in enumerate(tensors.items()):
        storage = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word(str(i)) + word("cpu") + word(array.size) + b"tQ"
        view = storage + word(0) + word(array.shape) + word(tuple(s // array.itemsize for s in array.strides))
        entries += word(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"\x89ccollections\nOrderedDict\n)RtR"
    content = b"}(" + entries + b"u"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + (content if key is None else b"}" + word(key) + content + b"s") + b".")
        for i, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/version", "3\n")
