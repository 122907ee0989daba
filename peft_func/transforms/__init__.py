"""Methods: transforms, chains, binding, and one file for each method."""
