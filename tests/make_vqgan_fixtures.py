"""Makes the tokenizer's fixtures by PyTorch, so that the tests themselves need none.

    pip install torch diffusers numpy
    python tests/make_vqgan_fixtures.py                            # vqgan.npz and small.bin

    pip install torch einops numpy
    git clone https://github.com/CompVis/taming-transformers https://github.com/FoundationVision/LlamaGen ...
    python tests/make_vqgan_fixtures.py peers FOLDER               # peers.npz

peers.npz comes from the published modules themselves, run out of their checkouts in FOLDER: taming-transformers (commit
3ba01b2), LlamaGen (ce98ec4) and open-muse (64e1afe). Their weights follow from weights_rule.py under their own names.

    pip install torch numpy scipy lpips==0.1.4 efficientnet-lite-pytorch==0.1.0 scikit-image==0.26.0
    python tests/make_vqgan_fixtures.py measures                   # measures.npz: losses and measures by those packages

The reference of vqgan.npz is diffusers' VQModel: the published tokenizer's network under other names. Its weights follow from
tests/weights_rule.py under the published (open-muse) names, so vqgan.npz holds outputs only. About a minute on two
cores. The files here were made with torch 2.13.0 and diffusers 0.42.1.
"""

import json
import pathlib
import sys
import types
import zlib

import numpy as np
import torch
from weights_rule import (
    VQGAN_CONFIGS,
    VQGAN_TINY,
    efficientnet_weights,
    lpips_weights,
    measured_pictures,
    picture,
    tensor,
    vqgan_shapes,
    vqgan_weights,
)

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
SEEDS = {"small": "#4", "single": "#5", "defaults": "#10", "released": "#10"}
"""Suffixes of the names, from the first dozen tried: many codes, each winning by more than MARGIN of its distance."""
BATCH = {"small": 2, "single": 2, "defaults": 1, "released": 1}
MARGIN = 1e-4


def main():
    arrays = {}
    for name, config in VQGAN_CONFIGS.items():
        shapes = vqgan_shapes(config)
        weights = vqgan_weights(shapes, SEEDS[name])
        model = reference(config, weights)
        images = picture(config["resolution"], BATCH[name])
        codes_BS, margin, raw_BHWC = run(model, images)
        parameters = sum(p.numel() for p in model.parameters())
        assert name != "released" or parameters == 146_244_675, parameters
        print(
            f"{name}: {parameters:,} parameters, {len(np.unique(codes_BS))} distinct of {codes_BS.size} codes, "
            f"smallest margin {margin:.2e}, output {raw_BHWC.mean():.3f} +- {raw_BHWC.std():.3f}",
            flush=True,
        )
        assert margin > MARGIN, f"two codes nearly tie at {name}: choose another suffix in SEEDS"
        arrays |= {
            f"{name}/{key}": value
            for key, value in {
                "suffix": np.array(SEEDS[name]),
                "codes_BS": codes_BS.astype(np.int16),
                "picture_crc": zlib.crc32(images),
                "codebook_crc": zlib.crc32(weights["quantize.embedding.weight"]),
                "mean": raw_BHWC.mean(dtype=np.float64),
                "std": raw_BHWC.std(dtype=np.float64),
            }.items()
        }
        arrays |= {f"{name}/{key}": value for key, value in samples(raw_BHWC).items()}
    config = VQGAN_CONFIGS["small"]
    model, names = to_diffusers(config, vqgan_weights(vqgan_shapes(config)))
    arrays["diffusers"] = np.array(json.dumps({"config": json.loads(model.to_json_string()), "names": names}))
    np.savez_compressed(FIXTURES / "vqgan.npz", **arrays)
    torch.save(shared_storage_state(), FIXTURES / "small.bin")
    for path in sorted(FIXTURES.glob("*")):
        print(f"{path.name}: {path.stat().st_size / 1e3:.1f} kB")


@torch.no_grad()
def run(model, images):
    """Returns codes_BS, the smallest relative margin by which a code wins, and the reconstruction before clamping."""
    pixels_BCHW = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
    z_BDhw = model.encode(pixels_BCHW).latents
    codes = model.quantize(z_BDhw)[2][2]
    quantized_BDhw = model.quantize.embedding(codes.reshape(len(images), *z_BDhw.shape[2:])).permute(0, 3, 1, 2)
    raw_BHWC = model.decode(quantized_BDhw, force_not_quantize=True).sample.permute(0, 2, 3, 1).numpy()
    z_ND = z_BDhw.permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1]).double()
    nearest_N2 = (
        torch.cdist(z_ND, model.quantize.embedding.weight.double(), compute_mode="donot_use_mm_for_euclid_dist")
        .square()
        .topk(2, largest=False)
    )
    assert (nearest_N2.indices[:, 0] == codes.reshape(-1)).all(), "float32 and float64 choose different codes: near tie"
    first_N, second_N = nearest_N2.values.T
    return codes.reshape(len(images), -1).numpy(), ((second_N - first_N) / first_N).min().item(), raw_BHWC


def samples(raw_BHWC):
    """Returns what of a raw reconstruction is kept: all of a small one; of a large one two grids and the border."""
    if raw_BHWC.shape[1] <= 32:
        return {"raw_BHWC": raw_BHWC}
    return {
        "grid_BHWC": raw_BHWC[:, ::8, ::8],
        "off_grid_BHWC": raw_BHWC[:, 3::16, 5::16],
        "rows_BHWC": raw_BHWC[:, [0, -1]],
        "columns_BHWC": raw_BHWC[:, :, [0, -1]],
    }


def reference(config, weights):
    model, names = to_diffusers(config, weights)
    shapes = {theirs: parameter.shape for theirs, parameter in model.state_dict().items()}
    # reshape: the published 1x1 convolutions of the attention are linear layers there
    model.load_state_dict(
        {theirs: torch.from_numpy(weights[ours]).reshape(shapes[theirs]) for theirs, ours in names.items()}
    )
    return model.eval()


def to_diffusers(config, weights):
    """Returns an empty VQModel of the published `config`, and {diffusers' name: the published name}."""
    from diffusers import VQModel

    levels = len(config["channel_mult"])
    attends = [config["resolution"] >> i in config["attn_resolutions"] for i in range(levels)]
    # the published loop reads `if len(self.attn) > 1`: a level with a single attention block skips it
    encoder_attends = [a and config["num_res_blocks"] > 1 for a in attends]
    model = VQModel(
        in_channels=config["num_channels"],
        out_channels=config["num_channels"],
        block_out_channels=tuple(config["hidden_channels"] * m for m in config["channel_mult"]),
        layers_per_block=config["num_res_blocks"],
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in encoder_attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        latent_channels=config["z_channels"],
        sample_size=config["resolution"],
        num_vq_embeddings=config["num_embeddings"],
        vq_embed_dim=config["quantized_embed_dim"],
        mid_block_add_attention=not config["no_attn_mid_block"],
    )
    names = {}
    for ours in weights:
        if ".down." in ours and ".attn." in ours and not encoder_attends[int(ours.split(".")[2])]:
            continue
        part = ours.split(".")
        if part[1] in ("down", "up"):
            part[2] = str(levels - 1 - int(part[2])) if part[1] == "up" else part[2]
            part[1] += "_blocks"
            part[3] = {
                "block": "resnets",
                "attn": "attentions",
                "downsample": "downsamplers.0",
                "upsample": "upsamplers.0",
            }[part[3]]
        elif part[1] == "mid":
            part[1:3] = [
                "mid_block",
                {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}[part[2]],
            ]
        part[-2] = {
            "nin_shortcut": "conv_shortcut",
            "norm_out": "conv_norm_out",
            "norm": "group_norm",
            "q": "to_q",
            "k": "to_k",
            "v": "to_v",
            "proj_out": "to_out.0",
        }.get(part[-2], part[-2])
        names[".".join(part)] = ours
    assert set(names) == set(model.state_dict()), set(names) ^ set(model.state_dict())
    return model, names


def shared_storage_state():
    """Returns a state dict whose tensors are views of one storage at many offsets, so that the file stays small.

    The last tensor's strides are not those of its shape, as torch keeps them for a transposed weight.
    """
    shapes, views = vqgan_shapes(VQGAN_TINY), {}
    base = torch.from_numpy(tensor("base", 9216 + len(shapes), 0.05))
    for offset, (name, shape) in enumerate(shapes.items()):
        views[name] = base[offset : offset + int(np.prod(shape))].view(shape)
    views["post_quant_conv.weight"] = views["post_quant_conv.weight"].reshape(8, 16).t()[:, :, None, None]
    return views


# ---------------------------------------------------------------------------- other projects' own modules

PEERS = {
    "taming-f16-1024": dict(entries=1024, suffix="#0"),
    "taming-f16-16384": dict(entries=16384, suffix="#0"),
    "llamagen-vq16": dict(entries=16384, suffix="#0"),
    "llamagen-vq8": dict(entries=16384, suffix="#0"),
    "maskgit": dict(entries=1024, suffix="#0"),
}
"""32 channels instead of 128 keep the tests short; nothing else is changed."""


def peers(folder: pathlib.Path):
    arrays = {}
    for name, choice in PEERS.items():
        model = peer(name, folder, channels=32, entries=choice["entries"])
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if "codebook_used" not in key}
        images = picture(64, 2)
        for suffix in (choice["suffix"], *(f"#{i}" for i in range(1, 30))):
            weights = vqgan_weights(shapes, suffix)
            model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=False)
            codes_BS, margin, raw_BHWC = run_peer(model.eval(), images, symmetric=name != "maskgit")
            print(f"{name} {suffix}: {len(np.unique(codes_BS))} distinct of {codes_BS.size} codes, margin {margin:.2e}")
            if margin > MARGIN:
                break
        else:
            raise SystemExit(f"two codes nearly tie at {name} whatever the suffix")
        whole = peer(name, folder, channels=128, entries=choice["entries"])
        arrays |= {
            f"{name}/{key}": value
            for key, value in {
                "suffix": np.array(suffix),
                "shapes": np.array(json.dumps(shapes)),
                "parameters": sum(p.numel() for key, p in whole.named_parameters()),
                "codes_BS": codes_BS.astype(np.int16),
                "raw_BHWC": raw_BHWC[:, ::2, 1::2],
                "edge_BHWC": raw_BHWC[:, [0, -1]],
                "weights_crc": zlib.crc32(weights["encoder.conv_in.weight"]),
            }.items()
        }
    np.savez_compressed(FIXTURES / "peers.npz", **arrays)
    print(f"peers.npz: {(FIXTURES / 'peers.npz').stat().st_size / 1e3:.1f} kB")


@torch.no_grad()
def run_peer(model, images, symmetric):
    """Returns codes_BS, the smallest relative margin by which a code wins, and the picture in [0, 1], not clamped."""
    pixels_BCHW = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    pixels_BCHW = 2 * pixels_BCHW - 1 if symmetric else pixels_BCHW
    z_BDhw = model.encoder(pixels_BCHW)
    z_BDhw = model.quant_conv(z_BDhw) if hasattr(model, "quant_conv") else z_BDhw
    quantized_BDhw, _, info = model.quantize(z_BDhw)
    if isinstance(info, tuple):  # taming, LlamaGen
        codes_BS = info[2].reshape(len(images), -1)
    else:  # open-muse returns (quantized, codes, loss)
        codes_BS = model.quantize(z_BDhw)[1]
    latents = quantized_BDhw if not hasattr(model, "post_quant_conv") else model.post_quant_conv(quantized_BDhw)
    raw_BHWC = model.decoder(latents).permute(0, 2, 3, 1)
    z_ND = z_BDhw.permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1]).double()
    codebook = model.quantize.embedding.weight.double()
    if getattr(model.quantize, "l2_norm", False):
        z_ND, codebook = torch.nn.functional.normalize(z_ND), torch.nn.functional.normalize(codebook)
    nearest_N2 = torch.cdist(z_ND, codebook, compute_mode="donot_use_mm_for_euclid_dist").square().topk(2, largest=False)
    assert (nearest_N2.indices[:, 0] == codes_BS.reshape(-1)).all(), "near tie"
    first_N, second_N = nearest_N2.values.T
    raw = raw_BHWC.numpy()
    return codes_BS.numpy(), ((second_N - first_N) / first_N).min().item(), (raw + 1) / 2 if symmetric else raw


def peer(name, folder, channels, entries):
    """The published network of that name, from the checkout in `folder`."""
    model = torch.nn.Module()
    if name.startswith("taming"):
        sys.path.insert(0, str(folder / "taming-transformers"))
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.vqvae.quantize import VectorQuantizer2

        shape = dict(ch=channels, out_ch=3, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=[16], in_channels=3)
        shape |= dict(resolution=256, z_channels=2 * channels, double_z=False)  # configs/imagenet_vqgan.yaml
        model.encoder, model.decoder = Encoder(**shape), Decoder(**shape)
        model.quantize = VectorQuantizer2(entries, 2 * channels, beta=0.25)
        model.quant_conv = torch.nn.Conv2d(2 * channels, 2 * channels, 1)
        model.post_quant_conv = torch.nn.Conv2d(2 * channels, 2 * channels, 1)
    elif name.startswith("llamagen"):
        sys.path.insert(0, str(folder / "LlamaGen"))
        from tokenizer.tokenizer_image import vq_model

        model = {"vq16": vq_model.VQ_16, "vq8": vq_model.VQ_8}[name.split("-")[1]](codebook_size=entries)
        if channels != 128:
            shape = dict(ch=channels, ch_mult=model.config.encoder_ch_mult)
            model.encoder, model.decoder = vq_model.Encoder(**shape), vq_model.Decoder(**shape)
    else:
        if "muse" not in sys.modules:  # its modeling_utils wants accelerate and a hub: only its config decorator is needed
            sys.modules["muse"] = types.ModuleType("muse")
            sys.modules["muse"].__path__ = [str(folder / "open-muse" / "muse")]
            sys.modules["muse.modeling_utils"] = types.ModuleType("muse.modeling_utils")
            sys.modules["muse.modeling_utils"].__dict__.update(
                ConfigMixin=object, ModelMixin=torch.nn.Module, register_to_config=register_to_config
            )
        from muse.modeling_maskgit_vqgan import MaskGitVQGAN

        model = MaskGitVQGAN(hidden_channels=channels, num_embeddings=entries, z_channels=2 * channels, quantized_embed_dim=2 * channels)
    return model


def measures():
    """LPIPS and EfficientNet-Lite0 by their PyTorch packages on rule-made weights; PSNR and SSIM by scikit-image."""
    models = types.ModuleType("torchvision.models")  # lpips wants torchvision for the layers of VGG16, and for nothing else
    sys.modules["torchvision"], sys.modules["torchvision.models"] = types.ModuleType("torchvision"), models
    sys.modules["torchvision"].models = models
    models.vgg16 = lambda pretrained=False: types.SimpleNamespace(features=vgg16_features())
    import lpips
    from efficientnet_lite_pytorch import EfficientNet
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = measured_pictures()
    as_torch = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)
    network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    weights = lpips_weights()
    for place, layer in enumerate(vgg16_features()):
        if isinstance(layer, torch.nn.Conv2d):
            ours = next(getattr(network.net, f"slice{i}")._modules[str(place)] for i in range(1, 6) if str(place) in getattr(network.net, f"slice{i}")._modules)
            ours.weight.data, ours.bias.data = (torch.from_numpy(weights[f"features.{place}.{part}"]) for part in ("weight", "bias"))
    network.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items() if k.startswith("lin")}, strict=False)
    classifier = EfficientNet.from_name("efficientnet-lite0").eval()
    shapes = {k: tuple(v.shape) for k, v in classifier.state_dict().items() if "num_batches" not in k}
    classifier.load_state_dict({k: torch.from_numpy(v) for k, v in efficientnet_weights(shapes).items()}, strict=False)
    with torch.no_grad():
        distance_B = network(as_torch(a), as_torch(b), normalize=True).reshape(-1).numpy()
        logits_BK = classifier((as_torch(a) * 255 - 127) / 128).numpy()
    print("LPIPS", distance_B, "logits", logits_BK.std())
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=2)
    np.savez_compressed(
        FIXTURES / "measures.npz",
        lpips_B=distance_B,
        logits_BK=logits_BK[:, ::4],
        efficientnet_shapes=np.array(json.dumps(shapes)),
        psnr_B=[peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(a, b)],
        ssim_B=[structural_similarity(x, y, **window) for x, y in zip(a.astype(np.float64), b.astype(np.float64))],
    )


def vgg16_features():
    """The convolutional layers of VGG16 (Simonyan and Zisserman 2014, configuration D), at torchvision's places."""
    layers, last = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [torch.nn.Conv2d(last, width, 3, padding=1), torch.nn.ReLU()] if width else [torch.nn.MaxPool2d(2)]
        last = width or last
    return torch.nn.Sequential(*layers)


def register_to_config(init):
    def wrapped(self, **given):
        import inspect

        fields = {k: p.default for k, p in inspect.signature(init).parameters.items() if k != "self"} | given
        object.__setattr__(self, "config", types.SimpleNamespace(**fields))
        init(self, **given)

    return wrapped


if __name__ == "__main__":
    if sys.argv[1:2] == ["peers"]:
        peers(pathlib.Path(sys.argv[2]))
    elif sys.argv[1:2] == ["measures"]:
        measures()
    else:
        main()
