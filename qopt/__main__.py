"""`python -m qopt`."""

from qopt.cli import main

main()
