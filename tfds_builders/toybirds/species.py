"""The 24 species of Toybirds and the parts that tell them apart.

Every value of a part (a crown colour, a kind of beak, ...) occurs in at least
four species, so that no part alone names a species, and the species nearest to
any given one differ from it in one or two parts. Twenty of the species share
their colours with another one that wears them elsewhere or in another shape,
so that a count of colours doesn't name a species either.
"""

from __future__ import annotations

from typing import NamedTuple

# Hues in degrees, at least 50 apart: colour jitter of the usual strength turns
# hues by up to 36 degrees and must not turn most species into another.
HUES = {
  'red': 0,
  'yellow': 55,
  'green': 118,
  'cyan': 178,
  'blue': 232,
  'magenta': 300,
}


class Beak(NamedTuple):
  """Shape ('cone', 'dagger' or 'hook') and colour of a beak."""

  shape: str
  colour: str


class WingBars(NamedTuple):
  """Number of bars across the wing (0, 1 or 2) and their colour."""

  count: int
  colour: str | None


class BreastSpots(NamedTuple):
  """Density ('none', 'sparse' or 'dense') and colour of the breast spots."""

  density: str
  colour: str | None


class Species(NamedTuple):
  """What sets a species apart: its name and its five parts.

  Attributes:
    name: name of the species, unique.
    crown: colour of the crown.
    beak: shape and colour of the beak.
    wing_bars: number and colour of the wing bars.
    tail_band: colour of the band across the tail; None without one.
    breast_spots: density and colour of the breast spots.
  """

  name: str
  crown: str
  beak: Beak
  wing_bars: WingBars
  tail_band: str | None
  breast_spots: BreastSpots


def differing_parts(a: Species, b: Species) -> tuple[str, ...]:
  """Names of the parts (fields of `Species`) in which two species differ."""
  return tuple(
    part for part in Species._fields[1:] if getattr(a, part) != getattr(b, part)
  )


# The columns are: name, crown, shape and colour of the beak, number and colour
# of the wing bars, tail band, density and colour of the breast spots.
_TABLE = """
ember_finch       red      cone    yellow  0     -        yellow   none    -
reed_finch        cyan     cone    yellow  0     -        magenta  none    -
meadow_finch      yellow   cone    yellow  1     cyan     blue     dense   blue
moss_finch        green    cone    yellow  2     magenta  blue     dense   red
dusk_grosbeak     blue     cone    red     0     -        magenta  none    -
harbour_grosbeak  red      cone    red     1     magenta  green    sparse  blue
glacier_grosbeak  cyan     cone    red     2     cyan     green    sparse  blue
orchid_grosbeak   magenta  cone    red     2     yellow   green    sparse  blue
ember_warbler     red      dagger  yellow  0     -        yellow   none    -
lagoon_warbler    cyan     dagger  yellow  1     magenta  -        none    -
fern_warbler      green    dagger  yellow  2     magenta  -        none    -
moss_warbler      green    dagger  yellow  2     magenta  blue     dense   red
broom_creeper     yellow   dagger  blue    1     cyan     yellow   dense   blue
coral_creeper     red      dagger  blue    2     yellow   -        sparse  red
dusk_creeper      blue     dagger  blue    2     yellow   magenta  sparse  red
storm_creeper     blue     dagger  blue    2     yellow   magenta  dense   red
heather_shrike    magenta  hook    red     1     cyan     red      dense   blue
slate_shrike      blue     hook    red     1     magenta  -        none    -
pine_shrike       green    hook    red     1     magenta  red      none    -
orchid_shrike     magenta  hook    red     2     cyan     red      sparse  blue
broom_kestrel     yellow   hook    blue    1     cyan     yellow   dense   blue
velvet_kestrel    magenta  hook    blue    2     cyan     red      sparse  red
lagoon_kestrel    cyan     hook    blue    2     cyan     green    sparse  red
straw_kestrel     yellow   hook    blue    2     magenta  blue     dense   red
"""


def _species(row: str) -> Species:
  name, crown, beak, beak_colour, bars, bar_colour, tail, spots, spot_colour = (
    None if cell == '-' else cell for cell in row.split()
  )
  return Species(
    name,
    crown,
    Beak(beak, beak_colour),
    WingBars(int(bars), bar_colour),
    tail,
    BreastSpots(spots, spot_colour),
  )


SPECIES = tuple(_species(row) for row in _TABLE.strip().splitlines())
