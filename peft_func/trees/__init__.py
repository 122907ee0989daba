"""Trees of tensors: paths, selectors, partitions, keys, stacks."""
