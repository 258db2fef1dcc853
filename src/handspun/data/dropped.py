"""A row that is not trained on, and why."""


class DroppedRow(Exception):  # noqa: N818
    """A row that teaches nothing, or not what it seems to; str() is the reason, short and for people."""
