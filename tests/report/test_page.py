import json
import re

import pytest

from cmd_jax.report import page

_DATA = re.compile(
  r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL
)


def test_the_page_holds_its_data_and_nothing_of_them_is_markup():
  data = {
    'name': '</script><!--<script>alert(1)</script> @@script@@ \udcff \u2028',
    'number': 0.5,
  }
  html = page.render(data)
  held = _DATA.search(html).group(1)
  assert json.loads(held) == data
  assert '<' not in held and held.isascii()
  assert html.count('<script') == html.count('</script>') == 2
  # Only the data's own word is left of the placeholders.
  assert re.findall('@@[a-z]+@@', html.replace(held, '')) == []


def test_the_page_asks_for_nothing_and_allows_only_itself():
  html = page.render({})
  assert not re.findall(r'(?:src|href)\s*=\s*"(?!#)', html)
  assert '@import' not in html and 'url(' not in html
  policy = re.search('Security-Policy" content="([^"]*)"', html).group(1)
  assert policy.startswith("default-src 'none'; img-src data:;")
  assert policy.count("'sha256-") == 2
  assert 'unsafe' not in policy


def test_numbers_that_json_lacks_are_refused():
  with pytest.raises(ValueError, match='JSON'):
    page.render({'loss': float('nan')})
