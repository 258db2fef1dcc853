"""CPU-specific code: everything that a port to another CPU touches."""
