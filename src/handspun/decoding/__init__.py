"""Decoding, written by hand: engine -> processors -> token selection -> decode loop. Start at `generate.py`."""
