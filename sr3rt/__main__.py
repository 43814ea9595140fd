"""`python -m sr3rt` is `sr3rt`."""

from sr3rt.cli import main

main()
