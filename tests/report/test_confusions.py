import numpy as np

from cmd_jax.report import confusions


def test_confusions_are_counted_and_the_worst_pairs_come_first():
  labels = np.array([0, 0, 0, 1, 1, 2, 2, -1])
  votes = np.array([0, 1, 1, 0, 1, 2, 1, 0])
  counts = confusions.count_confusions(labels, votes, 4)
  assert counts.tolist() == [
    [1, 2, 0, 0],
    [1, 1, 0, 0],
    [0, 1, 1, 0],
    [0, 0, 0, 0],
  ]
  pairs = confusions.most_confused(counts, 5)
  assert pairs == [confusions.Pair(0, 1, 2, 1), confusions.Pair(1, 2, 0, 1)]
  assert confusions.most_confused(counts, 1) == pairs[:1]
