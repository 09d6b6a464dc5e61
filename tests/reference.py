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
