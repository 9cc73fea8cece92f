"""The one exception that a user of the program is meant to read."""


class UserError(Exception):
  """A mistake that the user can mend.

  The message is one line: what is wrong, where, and what to do about it.
  `main.py` prints it without a traceback and exits with code 2.
  """


def missing_extra(needs: str, extra: str) -> UserError:
  """The error of a package that is not installed.

  Args:
    needs: what needs which package, 'Parquet needs pyarrow'.
    extra: of setup.cfg, that brings it.
  """
  return UserError(f"{needs}: pip install 'cmd_jax[{extra}]'")
