"""Models: found, loaded, given adapters, saved."""
