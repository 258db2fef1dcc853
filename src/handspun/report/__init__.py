"""What a run, its rows and its examples look like to a person."""
