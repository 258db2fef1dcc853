"""`python -m handspun` is the same program as `handspun`."""

from handspun.cli import console_script

if __name__ == "__main__":
    console_script()
