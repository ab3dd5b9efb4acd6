"""`python -m export.convert`: the command of `export.conversion.convert`."""

from export.conversion.convert import main
from runtime.errors import run_command

if __name__ == "__main__":
    run_command(main)
