import pytest

from cmd_jax.compile_ahead import search


def _search(needs, *, start, unit, limit, says_more=True):
  def attempt(size):
    needed = needs(size)
    fits = needed <= limit
    return search.Try(size, needed if fits or says_more else None, fits)

  return search.find_largest(attempt, start=start, unit=unit, limit=limit)


@pytest.mark.parametrize('start', [8, 64, 1024])
@pytest.mark.parametrize('says_more', [True, False])
def test_the_largest_batch_is_found_from_below_and_above(start, says_more):
  tries = _search(
    lambda size: 1000 + 30 * size,
    start=start,
    unit=8,
    limit=5000,
    says_more=says_more,
  )
  assert search.largest(tries) == 128
  assert search.is_settled(tries, 8)
  assert len({x.batch_size for x in tries}) == len(tries)
  assert all(x.batch_size % 8 == 0 and x.batch_size for x in tries)


def test_needs_that_jump_are_found_within_the_tries():
  tries = _search(
    lambda size: 100 * size + 3000 * (size > 20), start=4, unit=4, limit=4500
  )
  assert search.largest(tries) == 20
  assert len(tries) <= search.MAX_TRIES


def test_nothing_fits():
  tries = _search(lambda size: 9000, start=64, unit=8, limit=5000)
  assert search.largest(tries) is None
  assert tries[-1].batch_size == 8


def test_a_search_that_ran_out_of_tries_is_not_settled():
  tries = _search(lambda size: 1, start=8, unit=8, limit=5000)
  assert len(tries) == search.MAX_TRIES
  assert search.largest(tries) == tries[-1].batch_size
  assert not search.is_settled(tries, 8)
