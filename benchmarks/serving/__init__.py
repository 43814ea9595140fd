"""How the server behaves: results under load, overload, cancelling. Runs in `.venv-serve`; `python -m benchmarks.serving --help`."""
