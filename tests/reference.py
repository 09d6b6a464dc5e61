"""Independent references in numpy float64: least squares on the design matrix, row by row as in the paper."""

import numpy as np


def design_matrix(metadata, labels=None):
    """[m, y, 1]."""
    blocks = [np.asarray(metadata, float)]
    if labels is not None:
        blocks.append(np.asarray(labels, float))
    return np.column_stack([*blocks, np.ones(len(blocks[0]))])


def residual(features, metadata, labels=None, center=False):
    """Least squares in the batch; the metadata part removed (the intercept too with `center`)."""
    metadata = np.asarray(metadata, float)
    matrix = np.asarray(features, float).reshape(len(metadata), -1)
    coefficients = np.linalg.lstsq(design_matrix(metadata, labels), matrix, rcond=None)[0]
    return remove(features, metadata, coefficients, metadata.mean(0), center)


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


def weighted_least_squares(features, metadata, labels, weights):
    """Coefficients of [m, y, 1] for features (N, D), each sample with its weight."""
    root = np.sqrt(np.asarray(weights, float))[:, None]
    return np.linalg.lstsq(design_matrix(metadata, labels) * root, features * root, rcond=None)[0]
