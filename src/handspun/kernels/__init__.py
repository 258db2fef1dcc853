"""Everything that a port to another CPU touches."""
