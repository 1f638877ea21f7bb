"""Measures: how far two pictures, masks, edge maps or sets of features are apart, and how sure a mean of such values is.

Dimension key: N examples or features of as many pictures, B pictures at a time, H W C a picture, D features, R resamples,
M sizes of a ladder.
"""

import math

import numpy as np
from scipy import linalg, ndimage, optimize
from scipy.cluster import vq

from common.images import UserError

# ---------------------------------------------------------------------------------------------------- two pictures


def psnr(a_BHWC, b_BHWC) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture, float64 [B], values in [0, 1]; identical pictures give infinity."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(np.asarray(a_BHWC, np.float64) - b_BHWC).mean((1, 2, 3)))


SSIM_SIDE = 11  # pixels of its window


def ssim(a_BHWC, b_BHWC) -> np.ndarray:
    """Mean structural similarity of each picture, float64 [B] (Wang et al. 2004: 11x11 Gaussian of sigma 1.5, K = .01, .03,
    values in [0, 1]); windows lie wholly inside. Raises UserError for pictures smaller than the window."""
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
    small = min(pixels_BHWC.shape[1:3]) < SSIM_SIDE
    values = []
    for b, decibels in enumerate(psnr(pixels_BHWC, output_BHWC)):
        similarity = None if small else float(ssim(pixels_BHWC[b : b + 1], output_BHWC[b : b + 1])[0])
        reasons = ["psnr: the pictures are identical"] * bool(np.isposinf(decibels))
        reasons += [f"ssim: pictures are smaller than its window of {SSIM_SIDE} pixels"] * small
        values.append({"psnr": None if np.isposinf(decibels) else float(decibels), "ssim": similarity})
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
    """Drawn inverse depth, of unknown scale and shift, against true depth (0: unknown).

    Scale and shift are fitted by least squares in inverse depth; depth is at most the largest true one. Absolute relative
    error, and the share of known pixels under a factor 1.25."""
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


# ---------------------------------------------------------------------------------------------------- two masks


def is_white(pixels_HWC) -> np.ndarray:
    """Nearer to white than to black by squared distance in 8-bit RGB, where it is a tie too."""
    return 2 * np.floor(np.asarray(pixels_HWC) * 255 + 0.5).sum(-1) >= 3 * 255


def two_colours(pictures_THWC) -> tuple[np.ndarray, np.ndarray]:
    """The two colours that the pictures are made of, the rarer first: 2-means, begun along the direction of most variance."""
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
    """True in the box around the largest component of True pixels (8 neighbours); all False where there is none."""
    labels_HW, count = ndimage.label(mask_HW, structure=np.ones((3, 3)))
    box_HW = np.zeros_like(mask_HW, bool)
    if count:
        largest = np.bincount(labels_HW.ravel())[1:].argmax()
        box_HW[ndimage.find_objects(labels_HW)[largest]] = True
    return box_HW


EDGE_TOLERANCE = 0.0075  # of the diagonal, as in the Berkeley benchmark


def edge_scores(drawn_HW, true_HW) -> dict[str, float]:
    """Precision and recall of edge pixels within `EDGE_TOLERANCE` of the diagonal of one of the other picture, and F."""
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


# ---------------------------------------------------------------------------------------------------- two sets of features


def frechet(a_ND, b_ND) -> float:
    """The squared Frechet distance of the normal distributions with the two sets' means and covariances, in float64."""
    return frechet_with_influences(a_ND, b_ND)[0]


def frechet_interval(a_ND, b_ND) -> dict[str, float]:
    """The squared Frechet distance with its 95% interval over pictures, of N pictures of each set.

    The interval is that of the distance's normal limit (Rippl, Munk and Sturm 2016, theorem 2.3): the derivative of the
    distance with respect to each picture's weight is known in closed form, so its standard error costs no resamples. Like the
    bootstrap it tells how much the distance of other pictures of the same numbers would differ, and not by how much too few
    pictures raise it; where both distributions are the same, it has no normal limit, and low is 0."""
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
    # The transport map of a onto b is A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2, and that of b onto a its inverse; in directions in
    # which a set does not vary there is nothing to move.
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
    """Mean over disjoint blocks, ten of them or as many as hold 1,000 pictures each, which are independent."""
    rng = np.random.default_rng(seed)
    blocks = max(10, math.ceil(min(len(a_ND), len(b_ND)) / 1000))
    parts = [np.array_split(rng.permutation(len(x_ND)), blocks) for x_ND in (a_ND, b_ND)]
    return bootstrap([kernel_distance(a_ND[i], b_ND[j]) for i, j in zip(*parts)], seed)


# ---------------------------------------------------------------------------------------------------- many values


def bootstrap(values, seed, weights=None, rounds=2000) -> dict:
    """The (weighted) mean of N values, and the 2.5th and 97.5th percentiles of the means of `rounds` resamples.

    Each is None, and `reason` says why, where it does not exist: the mean where a value is None, NaN or infinite, the
    interval where there is but one value."""
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
    """Least squares of loss = E + A / N^a, E and A not negative: both are linear once a is given, and a is searched for."""
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
