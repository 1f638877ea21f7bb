"""Makes tests/fixtures/vqgan.npz and tests/fixtures/small.bin by PyTorch, so that the tests themselves need none.

    pip install torch diffusers numpy
    python tests/make_vqgan_fixtures.py

The reference is diffusers' VQModel: the published tokenizer's network under other names. Its weights follow from
tests/weights_rule.py under the published (open-muse) names, so vqgan.npz holds outputs only. About a minute on two
cores. The files here were made with torch 2.13.0 and diffusers 0.42.1.
"""

import json
import pathlib
import zlib

import numpy as np
import torch
from diffusers import VQModel
from weights_rule import VQGAN_CONFIGS, VQGAN_TINY, picture, tensor, vqgan_shapes, vqgan_weights

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


if __name__ == "__main__":
    main()
