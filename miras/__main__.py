"""`python -m miras` is `miras`."""

from miras.cli import main

main(prog_name="miras")
