"""Sample weights under which labels and metadata are independent in the training data."""

from mdnorm.balance.weights import BalancingWeights, ColumnBalance, balancing_weights

__all__ = ["BalancingWeights", "ColumnBalance", "balancing_weights"]
