"""The program: `cmd-jax COMMAND`, and `python main.py --mode=COMMAND`."""
