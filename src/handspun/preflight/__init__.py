"""What can be known of a run before its first step: what is odd in its rows, what it will cost."""
