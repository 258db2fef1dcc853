"""The demonstration, with its 330 training rows and 40 held-out rows, written for this project."""
