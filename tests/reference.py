"""Independent references in numpy float64: least squares on the design matrix, row by row as in the paper."""

import numpy as np


def design_matrix(metadata, labels=None):
    """[m, y, 1]."""
    blocks = [np.asarray(metadata, float)]
    if labels is not None:
        blocks.append(np.asarray(labels, float))
    return np.column_stack([*blocks, np.ones(len(blocks[0]))])


def residual(features, metadata, labels=None, center=False, weights=None, share=0.0):
    """Least squares in the batch; the metadata part removed (the intercept too with `center`)."""
    metadata = np.asarray(metadata, float)
    matrix = np.asarray(features, float).reshape(len(metadata), -1)
    weights = np.ones(len(metadata)) if weights is None else np.asarray(weights, float)
    coefficients = weighted_least_squares(matrix, metadata, labels, weights, share)
    return remove(features, metadata, coefficients, np.average(metadata, 0, weights), center)


def dataset_residual(features, metadata, labels, all_metadata, all_labels, center=False):
    """The paper's form: β = G⁻¹ · mean over the batch of x fᵀ."""
    full = design_matrix(all_metadata, all_labels)
    batch = design_matrix(metadata, labels)
    matrix = np.asarray(features, float).reshape(len(batch), -1)
    coefficients = np.linalg.solve(full.T @ full / len(full), batch.T @ matrix / len(batch))
    return remove(
        features, np.asarray(metadata, float), coefficients, np.asarray(all_metadata).mean(0), center
    )


def remove(features, metadata, coefficients, mean, center):
    features = np.asarray(features, float)
    columns = metadata.shape[1]
    effect = (
        metadata @ coefficients[:columns] + coefficients[-1]
        if center
        else (metadata - mean) @ coefficients[:columns]
    )
    return features - effect.reshape(features.shape)


def weighted_least_squares(features, metadata, labels, weights, share=0.0):
    """Coefficients of [m, y, 1] for features (N, D), each sample with its weight.

    With `share`, ridge regression: each metadata column is penalised by that share of its variance, as a row.
    """
    features, metadata, weights = (np.asarray(values, float) for values in (features, metadata, weights))
    design, root = design_matrix(metadata, labels), np.sqrt(weights)[:, None]
    # About the mean, where lstsq loses no digits; the intercept is put right in the end.
    centre = np.average(design, 0, weights)
    centre[-1] = 0
    design = design - centre
    columns = metadata.shape[1]
    penalty = np.zeros((columns, design.shape[1]))
    penalty[:, :columns] = np.diag(np.sqrt(share * (weights @ design[:, :columns] ** 2)))
    rows = np.vstack([design * root, penalty])
    values = np.vstack([features * root, np.zeros((columns, features.shape[1]))])
    coefficients = np.linalg.lstsq(rows, values, rcond=None)[0]
    coefficients[-1] -= centre @ coefficients
    return coefficients


class Fit:
    """Weighted least squares of features on rows z = [y, 1, m] by an SVD of the rows, without a Gram matrix.

    With `share` each metadata column has a penalty of that share of its variance, as a row below the others;
    a `prior` gives the mean square of a penalty of every column, the intercept too (R-MDN). What is collinear
    within the tolerance is left out: first of the labels, then of what they leave of the metadata.
    """

    def __init__(self, rows, weights, num_protected, share=0.0, tolerance=1e-10, prior=0.0):
        p = num_protected
        self.p, self.root = p, np.sqrt(weights / weights.sum())[:, None]
        stacked = np.vstack([rows * self.root, np.sqrt(prior) * np.eye(rows.shape[1])])
        one = stacked[:, p - 1 : p]
        squares = (stacked**2).sum(0)
        self.mean = (one.T @ stacked)[0] / squares[p - 1]
        self.length = np.sqrt(squares[p - 1])
        self.one = one / self.length
        centred = np.delete(stacked - one * self.mean, p - 1, 1)
        squares, variance = np.delete(squares, p - 1), (centred**2).sum(0)
        size = np.clip(squares, 1e-24 / tolerance, 1) + 0.01 * squares
        varies = variance > tolerance * size
        self.unit = np.where(varies, np.sqrt(variance), np.inf)
        columns, variance = centred / self.unit, np.where(varies, variance, np.inf)
        rounding, far = 100 * np.finfo(float).eps, max((squares / variance).max(initial=0), 1e-30)
        self.with_share = share > 0
        if self.with_share:
            ridge = tolerance * (1 + size / variance)
            ridge = np.where(np.arange(len(ridge)) < p - 1, 0.01 * ridge, np.maximum(share, ridge))
            self.all = np.linalg.svd(np.vstack([columns, np.diag(np.sqrt(ridge))]), full_matrices=False)
            return
        limit = tolerance * np.sqrt(far)
        self.labels = _above(columns[:, : p - 1], max(limit, 1e-9) + rounding * far)
        least = min((self.labels[1] ** 2).min(initial=1), 1)
        left = columns[:, p - 1 :]
        # Twice, as once leaves what rounding left.
        for _ in range(2):
            left = left - self.labels[0] @ (self.labels[0].T @ left)
        self.columns = columns
        self.left = _above(left, limit / np.sqrt(least) + rounding * far / least)

    def coefficients(self, features):
        """Rows [β_y, β_0, β_m] for the features (N, D) of the rows."""
        p, features = self.p, np.asarray(features, float)
        values = features * self.root
        values = np.vstack([values, np.zeros((len(self.one) - len(values), values.shape[1]))])
        average = self.one.T @ values
        values = values - self.one @ average
        if self.with_share:
            left, singular, right = self.all
            slopes = (right.T / singular) @ (left[: len(values)].T @ values)
        else:
            beside = values - self.labels[0] @ (self.labels[0].T @ values)
            metadata = _solve(self.left, beside)
            labels = _solve(self.labels, values - self.columns[:, p - 1 :] @ metadata)
            slopes = np.vstack([labels, metadata])
        slopes = slopes / self.unit[:, None]
        intercept = average / self.length - np.delete(self.mean, p - 1) @ slopes
        return np.vstack([slopes[: p - 1], intercept, slopes[p - 1 :]])

    def of_batch(self, rows, weights, features):
        """β_m of the cross moments of other rows (the paper's form)."""
        p = self.p
        columns = np.delete(rows - self.mean, p - 1, 1) / self.unit
        shares = (weights / weights.sum())[:, None]
        if self.with_share:
            _, singular, right = self.all
            slopes = ((right.T / singular**2) @ (right @ ((columns * shares).T @ features)))[p - 1 :]
        else:
            through = _solve(self.labels, self.columns[:, p - 1 :])
            left = columns[:, p - 1 :] - columns[:, : p - 1] @ through
            _, singular, right = self.left
            slopes = (right.T / singular**2) @ (right @ ((left * shares).T @ features))
        return slopes / self.unit[p - 1 :, None]

    def leverage(self):
        """How much each row pulls the fit to itself."""
        parts = self.one, self.labels[0], self.left[0]
        return sum((part**2).sum(1) for part in parts)[: len(self.root)]


def _above(matrix, least):
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    kept = singular**2 > least
    return left[:, kept], singular[kept], right[kept]


def _solve(decomposed, values):
    left, singular, right = decomposed
    return (right.T / singular) @ (left.T @ values)


class Replay:
    """What an estimator of least squares does, from all samples so far and their weights.

    Rows are z = [y, 1, m] in the units of the estimator. `tolerance` is that of the dtype of its cross
    moments; `training` are the rows of the training set.
    """

    def __init__(self, estimator, tolerance=1e-10, training=None):
        self.source, self.p = estimator.gram_source, estimator.num_protected
        self.window, self.prior, self.averaging = estimator.window, estimator.prior, estimator.averaging
        self.fading = self.prior if estimator.prior_on_all else 0.0
        self.share = 0.0 if estimator.prior_on_all else self.prior
        self.tolerance, self.seen = tolerance, []
        self.evaluated, self.evaluated_mean, self.behind = 0.0, 0.0, 0.0
        if training is not None:
            self.training = self.fit(training, np.ones(len(training)))
            self.training_mean = training.mean(0)[self.p :]

    def fit(self, rows, weights, prior=0.0):
        share = self.share / (self.share + weights.sum())
        return Fit(rows, weights, self.p, share, self.tolerance, prior / weights.sum())

    def step(self, rows, features, weights=None):
        """Return what training removes from the features (N, D) of a batch."""
        p, weights = self.p, np.ones(len(rows)) if weights is None else weights
        count = weights.sum()
        kept = max(1 - count / self.window, 0.0)
        self.fading *= kept
        self.seen = [(r, f, w * kept) for r, f, w in self.seen if kept * w.max(initial=0) > 1e-40]
        self.seen.append((rows, features, weights))
        if self.source == "dataset":
            now = later = self.training.of_batch(rows, weights, features), self.training_mean
        else:
            now = later = self._solve(self.seen, self.fading)
        if self.source == "batch":
            now = self._solve(self.seen[-1:], 0.0)
        is_latest = not self.averaging or (self.window == np.inf and self.source != "dataset")
        self.behind = (0.0 if is_latest else self.behind * kept ** (1 / self.averaging)) + count
        share = count / self.behind
        self.evaluated = self.evaluated + share * (later[0] - self.evaluated)
        self.evaluated_mean = self.evaluated_mean + share * (later[1] - self.evaluated_mean)
        return (rows[:, p:] - now[1]) @ now[0]

    def _solve(self, seen, prior):
        rows, features, weights = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        coefficients = self.fit(rows, weights, prior).coefficients(features)
        return coefficients[self.p :], np.average(rows, 0, weights)[self.p :]

    def evaluate(self, rows):
        """Return what evaluation removes."""
        return (rows[:, self.p :] - self.evaluated_mean) @ self.evaluated


class SpreadReplay:
    """The fit of the log-variance, from all samples so far, their weights and the log r² that each had."""

    def __init__(self, spread):
        self.p, self.window = spread.num_protected, spread.window
        self.seen, self.logs = [], []

    def step(self, rows, features, weights=None):
        """Take in a batch with features (N, D) or (N, C, positions)."""
        p, weights = self.p, np.ones(len(rows)) if weights is None else weights
        flat = features.reshape(*features.shape[:2], -1)
        kept = max(1 - weights.sum() / self.window, 0.0)
        before = self.logs or [(rows, flat.mean(2), 0 * weights)]
        self.seen, self.logs = ([(*part, w * kept) for *part, w in parts] for parts in (self.seen, self.logs))
        self.seen.append((rows, flat.mean(2), (flat**2).mean(2), weights))
        z, f, squares, w = (np.concatenate(parts) for parts in zip(*self.seen, strict=True))
        self.mean, self.centre = np.average(z, 0, w)[p:], np.average(f, 0, w)
        fit = Fit(z, w, p)
        squared = (flat - (rows @ fit.coefficients(f))[:, :, None]) ** 2
        left = 1 - fit.leverage()[-len(rows) :] / np.where(weights > 0, weights, 1)
        left = np.where(left > 1e-3, left, 0.0)
        floor = 1e-8 * (np.average(squares, 0, w) - 0.99 * self.centre**2)[:, None] + np.finfo(float).tiny
        log = np.log(squared + floor) - np.log(np.maximum(left, 1e-3))[:, None, None]
        self.logs.append((rows, log.mean(2), left * weights))
        if not any(w.any() for _, _, w in self.logs):
            self.logs = before
        z, log, w = (np.concatenate(parts) for parts in zip(*self.logs, strict=True))
        self.gamma = np.zeros((rows.shape[1] - p, f.shape[1]))
        if w.sum() > 0:
            share = np.pi**2 / 2 / max(w.sum(), 1e-3)
            prior = 1e-3 * np.minimum(np.average(z**2, 0, w), 1)
            prior[p - 1] = 0
            self.gamma = Fit(z, w, p, share, prior=prior).coefficients(log)[p:]

    def evaluate(self, rows, features):
        """Return the scaled features."""
        effect = np.clip((rows[:, self.p :] - self.mean) @ self.gamma, -2 * np.log(10), 2 * np.log(10))
        flat = features.reshape(*features.shape[:2], -1)
        centre = self.centre[:, None]
        return (centre + (flat - centre) * np.exp(-effect / 2)[:, :, None]).reshape(features.shape)
