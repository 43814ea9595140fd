"""How fast, how good: `pytest benchmarks/` writes benchmarks/report/."""
