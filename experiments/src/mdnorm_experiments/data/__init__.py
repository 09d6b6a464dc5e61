"""Data sets of the experiments: generated here, or read in their published layout."""
