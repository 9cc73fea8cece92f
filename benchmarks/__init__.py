"""What was measured, and the commands: `python -m benchmarks.<name>`."""
