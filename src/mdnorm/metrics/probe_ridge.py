"""Ridge regression of many targets on the same features: representations, strengths, classes.

How it is computed. In every fold the features are transformed without looking at the target (standardised;
for the non-linear probe followed by functions of them), and one eigendecomposition of their Gram matrix then
serves the target and all of its permutations at once. With the transformed training features Z,
``ZᵀZ = V Λ Vᵀ`` and ``P = Z V``, ridge regression of the strength α fits ``ȳ + P (Λ + α)⁻¹ Pᵀ (Y − ȳ)``, and
what it predicts for rows it has not seen follows from its residuals r in closed form: where the rows b of one
subject are left out, they are wrong by ``(I − H_bb)⁻¹ r_b``. These left-out predictions choose between
representations and strengths for each target, and place the thresholds of classes.

Classes. Ridge regression on class indicators gives the direction of a regularised linear discriminant
(Hastie, Buja & Tibshirani 1995). Its thresholds for uniform priors need the class means of the scores; taken
from the training fit they are worthless where there are more features than rows (the fit is perfect there),
so they are taken from the left-out predictions. With class shares π and the left-out scores `s` of the class
indicators, ``R_kl = Σ_{i in l} s_ik / (n √(π_k π_l))`` estimates the between-class part of the total
covariance; the discriminant of the class k with the *within*-class covariance is

    δ_k(x) = [s(x) Π^-½ (I − R)⁻¹ Π^-½]_k − ½ [Π^-½ R (I − R)⁻¹ Π^-½]_kk.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mdnorm.metrics.probe_folds import CHUNK_ELEMENTS, LEAST_VARIATION, Settings

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Strengths of the ridge, relative to the mean eigenvalue. The strongest predicts almost a constant; the
# weakest hardly shrinks, which a class that is coded in a component of small variance needs.
_STRENGTHS = np.logspace(3, -8, 12)

# Strengths that leave fewer degrees of freedom (or fewer than half of the rows) are not tried: a fit through
# nearly every row says nothing about other rows.
_LEAST_FREEDOM = 20

# A weaker ridge is preferred to a stronger one only if its left-out errors are smaller by more than this many
# degrees of freedom explain, since the smallest of several noisy errors is too optimistic.
_CLEARLY = 10

# Widths of the kernels of the non-linear probe: γ times the number of columns.
_WIDTHS = (0.1, 1.0)

# Columns of the additive features of the non-linear probe, as long as that leaves two waves for each feature.
# Of more features than this the principal components are taken.
_MAX_ADDITIVE = 600
_MAX_WAVES = 6
_MAX_QUANTILES = 1000

# Eigenvalues below this share of the largest are rounding.
_LEAST_EIGENVALUE = 1e-12

# Least share of the variance that is within classes.
_MIN_WITHIN = 1e-6


# -- features ---------------------------------------------------------------------------------------------


def representations(train: Floats, test: Floats, settings: Settings) -> Iterator[tuple[Floats, Floats]]:
    """Yield transformed training and test features: the standardised ones, and those that are not linear."""
    from sklearn.preprocessing import StandardScaler

    # Columns are at most 1 in absolute value: what varies less than this in training is a constant.
    varying = np.ptp(train, axis=0) > LEAST_VARIATION
    if not varying.any():
        yield np.zeros((train.shape[0], 1)), np.zeros((test.shape[0], 1))
        return
    if not varying.all():
        # Standardised, a constant would be a rounding error that can be fitted.
        train, test = train[:, varying], test[:, varying]
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    yield train, test
    if settings.model == "linear":
        return
    for expand in (_additive, _kernels):
        yield expand(train, test, settings)


def _additive(train: Floats, test: Floats, settings: Settings) -> tuple[Floats, Floats]:
    """Functions of single columns: cosines of the ranks, monotone, U-shaped and so on."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import QuantileTransformer

    if train.shape[1] > _MAX_ADDITIVE:
        num_axes = min(_MAX_ADDITIVE // 2, train.shape[0] - 1)
        axes = PCA(num_axes, random_state=settings.seed).fit(train)
        train, test = axes.transform(train), axes.transform(test)

    num_quantiles = min(_MAX_QUANTILES, train.shape[0])
    ranks = QuantileTransformer(n_quantiles=num_quantiles, subsample=None).fit(train)
    num_waves = int(np.clip(_MAX_ADDITIVE // train.shape[1], 2, _MAX_WAVES))
    waves = np.pi * np.arange(1, num_waves + 1)

    expanded = (
        np.cos(ranks.transform(rows)[:, :, None] * waves).reshape(rows.shape[0], -1) for rows in (train, test)
    )
    return _centred(*expanded)


def _kernels(train: Floats, test: Floats, settings: Settings) -> tuple[Floats, Floats]:
    """Nyström features of Gaussian kernels of two widths, beside the columns."""
    from sklearn.kernel_approximation import Nystroem

    num_rows, num_columns = train.shape
    trains, tests = [train / np.sqrt(num_columns)], [test / np.sqrt(num_columns)]
    num_landmarks = max(1, min(settings.num_landmarks, num_rows // 2))
    for width in _WIDTHS:
        kernel = Nystroem(
            kernel="rbf", gamma=width / num_columns, n_components=num_landmarks, random_state=settings.seed
        ).fit(train)
        block, other = _centred(kernel.transform(train), kernel.transform(test))
        size = np.sqrt(np.square(block).sum() / num_rows)
        trains.append(block / size)
        tests.append(other / size)
    return np.hstack(trains), np.hstack(tests)


def _centred(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    mean = train.mean(axis=0)
    return train - mean, test - mean


# -- ridge regression -------------------------------------------------------------------------------------


class _LeftOut:
    """Residuals of rows left out of the fit, one row or subject at a time; intercept included."""

    def __init__(self, components: Floats, subjects: Integers | None) -> None:
        num_rows = components.shape[0]
        # The intercept is one more component, of the weight 1.
        self.components = np.column_stack([components, np.full(num_rows, 1 / np.sqrt(num_rows))])
        # Rows that are left out together, (number of such sets, size), by size.
        self.blocks = [np.arange(num_rows)[:, None]]
        if subjects is not None:
            sizes = np.unique(subjects, return_counts=True)[1]
            members = np.split(np.argsort(subjects, kind="stable"), np.cumsum(sizes)[:-1])
            self.blocks = [np.stack([rows for rows in members if rows.size == n]) for n in np.unique(sizes)]

    def residuals(self, residuals: Floats, weights: Floats) -> Floats:
        """Return the left-out residuals (n, T) of a fit with ``H = P diag(weights) Pᵀ``."""
        weights = np.append(weights, 1.0)
        out = np.empty_like(residuals)
        for rows in self.blocks:
            num_blocks, size = rows.shape
            if size == 1:
                single = rows[:, 0]
                leverage = np.square(self.components[single]) @ weights
                out[single] = residuals[single] / (1 - leverage)[:, None]
                continue
            step = max(1, CHUNK_ELEMENTS // (size * max(weights.size, residuals.shape[1])))
            for start in range(0, num_blocks, step):
                chosen = rows[start : start + step]
                part, right = self.components[chosen], residuals[chosen]
                if size <= weights.size:
                    hat = np.einsum("gik,k,gjk->gij", part, weights, part, optimize=True)
                    out[chosen] = np.linalg.solve(np.eye(size) - hat, right)
                else:
                    # The same by Woodbury's identity, in the size of the components.
                    inner = np.diag(1 / weights) - np.swapaxes(part, 1, 2) @ part
                    out[chosen] = right + part @ np.linalg.solve(inner, np.swapaxes(part, 1, 2) @ right)
        return out

    def means(self, targets: Floats) -> Floats:
        """Return the mean of the targets (n, T) over the rows that are trained on when a row is left out."""
        out, total = np.empty_like(targets), targets.sum(axis=0)
        for rows in self.blocks:
            rest = total - targets[rows].sum(axis=1, keepdims=True)
            out[rows] = rest / (len(targets) - rows.shape[1])
        return out


class Basis:
    """``P = Z V`` of the transformed features of training and test rows, and ridge regressions on it."""

    def __init__(self, train: Floats, test: Floats, subjects: Integers | None) -> None:
        from scipy.linalg import eigh

        narrow = train.shape[1] <= train.shape[0]
        eigenvalues, vectors = eigh(train.T @ train if narrow else train @ train.T)
        kept = eigenvalues > _LEAST_EIGENVALUE * eigenvalues[-1]
        eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
        if narrow:
            self.train, self.test = train @ vectors, test @ vectors
        else:
            roots = np.sqrt(eigenvalues)
            self.train, self.test = vectors * roots, (test @ train.T) @ vectors / roots
        self.eigenvalues: Floats = eigenvalues
        mean_eigenvalue = float(self.eigenvalues.sum() / train.shape[1])
        weights = 1 / (self.eigenvalues + _STRENGTHS[:, None] * (mean_eigenvalue or 1.0))
        freedom = train.shape[0] - 1 - weights @ self.eigenvalues
        usable = freedom >= min(_LEAST_FREEDOM, train.shape[0] / 2)
        usable[0] = True
        # Of each strength, the strongest first.
        self.weights: Floats = weights[usable]
        self.freedom: Floats = freedom[usable]
        # A smaller share of the error than this is clearly less.
        self.clearly = 1 - min(0.5, _CLEARLY / train.shape[0])
        self.grouped = subjects is not None
        self.left_out = _LeftOut(self.train, subjects)

    def fit(self, targets: Floats) -> tuple[Floats, Floats, Floats]:
        """Fit ridge regressions, and choose their strength by left-out residuals.

        The columns of each of the T `targets` (n, T, C) share their strength. Returns the sums of squared
        left-out residuals (T,), what is predicted less the mean of the training rows (rows to test, T, C),
        and the left-out scores s, of which the left-out mean is taken away (n, T, C).
        """
        num_rows, num_targets, width = targets.shape
        flat = targets.reshape(num_rows, -1)
        centred = flat - flat.mean(axis=0)
        products = self.train.T @ centred
        left_out_targets = flat - self.left_out.means(flat)
        best = np.full(num_targets, np.inf)
        coefficients = np.zeros((self.train.shape[1], num_targets, width))
        scores = np.zeros_like(targets)
        # One subject left out at a time has to be tried for every strength; for single rows, generalised
        # cross-validation tells the best one from the products alone.
        chosen = None if self.grouped else self._generalised(centred, products, width)
        for index, weights in enumerate(self.weights):
            tried = np.arange(num_targets) if chosen is None else (chosen == index).nonzero()[0]
            if tried.size == 0:
                continue
            columns: slice | Integers = slice(None)
            if tried.size < num_targets:
                columns = (tried[:, None] * width + np.arange(width)).reshape(-1)
            fitted = weights[:, None] * products[:, columns]
            residuals = self.left_out.residuals(centred[:, columns] - self.train @ fitted, weights)
            shape = (num_rows, tried.size, width)
            errors = _squared_sums(residuals.reshape(shape))
            better = (errors < self.clearly * best[tried]).nonzero()[0]
            best[tried[better]] = errors[better]
            coefficients[:, tried[better]] = fitted.reshape(-1, tried.size, width)[:, better]
            left_out_scores = (left_out_targets[:, columns] - residuals).reshape(shape)
            scores[:, tried[better]] = left_out_scores[:, better]
        predicted = self.test @ coefficients.reshape(-1, num_targets * width)
        return best, predicted.reshape(-1, num_targets, width), scores

    def _generalised(self, centred: Floats, products: Floats, width: int) -> Integers:
        """Return the position (T,) of the strongest ridge of nearly the best generalised cross-validation."""
        num_rows, rank = centred.shape[0], self.eigenvalues.size
        # Sums over the columns of one target: of its squares, and of those of its part along each component.
        total = _squared_sums(centred.reshape(num_rows, -1, width), axis=(0, 2))
        lengths = _squared_sums(products.reshape(rank, total.size, width), axis=2)
        lengths /= self.eigenvalues[:, None]
        # Components that span everything leave nothing outside but rounding.
        outside = np.maximum(total - lengths.sum(axis=0), 0) if rank < num_rows - 1 else np.zeros_like(total)
        errors = outside + np.square(1 - self.weights * self.eigenvalues) @ lengths
        errors /= np.square(self.freedom)[:, None]
        best: Integers = (self.clearly * errors <= errors.min(axis=0)).argmax(axis=0)
        return best


def _squared_sums(columns: Floats, axis: int | tuple[int, int] = (0, 2)) -> Floats:
    """Return sums of squares of (n, T, C), those of the last class (what the others leave) included."""
    sums: Floats = np.square(columns).sum(axis=axis)
    if columns.shape[2] > 1:
        last = np.square(columns.sum(axis=2))
        sums += last if axis == 2 else last.sum(axis=0)
    return sums


def decisions(scores: Floats, codes: Integers, left_out: Floats) -> Integers:
    """Return the class (n, T) of scores (n, T, C) by the discriminant of the module's docstring.

    It takes the classes of the training rows (rows, T) and their left-out scores (rows, T, C - 1), those of
    the last class being what the others leave.
    """
    from scipy.sparse import csr_array

    (num_rows, num_targets), num_classes = codes.shape, scores.shape[2]
    of_targets = codes + num_classes * np.arange(num_targets)
    entries = np.ones(codes.size), (of_targets.reshape(-1), np.arange(codes.size))
    members = csr_array(entries, shape=(num_targets * num_classes, codes.size))
    shares = np.diff(members.indptr).reshape(num_targets, num_classes) / num_rows
    # Σ_i s_ik y_il, (T, C, C): of every class the sum of the left-out scores of its rows.
    sums = (members @ left_out.reshape(codes.size, -1)).reshape(num_targets, num_classes, -1)
    agreement = np.swapaxes(np.concatenate([sums, -sums.sum(axis=2, keepdims=True)], axis=2), 1, 2)
    # A permutation that exchanges subjects may leave a fold without a class.
    absent = shares < 0.5 / num_rows
    roots = 1 / np.sqrt(np.where(absent, np.inf, shares))
    between = agreement / num_rows * roots[:, :, None] * roots[:, None, :]
    eigenvalues, vectors = np.linalg.eigh((between + np.swapaxes(between, 1, 2)) / 2)
    # Left-out estimates of a share of the variance: no signal may give less than 0, a perfect one 1.
    eigenvalues = np.clip(eigenvalues, 0, 1 - _MIN_WITHIN)
    vectors = roots[:, :, None] * vectors
    scaled = vectors / (1 - eigenvalues)[:, None, :]
    offsets = 0.5 * np.einsum("tkm,tkm->tk", scaled * eigenvalues[:, None, :], vectors)
    discriminants = np.einsum("itk,tkl->itl", scores, scaled @ np.swapaxes(vectors, 1, 2), optimize=True)
    discriminants = np.where(absent, -np.inf, discriminants - offsets)
    decided: Integers = discriminants.argmax(axis=2)
    return decided
