"""The settings of the paper, each with its data, networks, baselines, table and figures."""
