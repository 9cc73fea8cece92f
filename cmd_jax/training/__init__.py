"""An experiment built and run: state, step, loop, metrics, scores."""
