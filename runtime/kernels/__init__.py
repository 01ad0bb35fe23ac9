"""CPU kernels over the packed layout."""
