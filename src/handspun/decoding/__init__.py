"""Decoding: processors -> choose -> step -> loop, by hand."""
