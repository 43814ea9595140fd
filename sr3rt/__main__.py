"""The command `sr3rt`, and `python -m sr3rt`."""

import sys


def main() -> None:
    """As `sr3rt.cli.main`, which takes longest to import: an interruption meanwhile ends it like any other."""
    try:
        from sr3rt.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
