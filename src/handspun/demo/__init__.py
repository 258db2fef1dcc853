"""The demonstration: 330 training rows and 40 held-out ones, written for this project, and what it shows."""
