"""Which experts will be needed next, how much of the disk that may take, and whether it pays."""
