"""The page as a browser shows it: Chromium without a window."""

import json
import shutil

import pytest

from cmd_jax.report import page

webdriver = pytest.importorskip('selenium.webdriver', reason='no selenium')
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import (  # noqa: E402
  ActionChains,
)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

_BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
_FLAGS = (
  '--headless=new',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-dev-shm-usage',
  '--disable-sync',
  '--force-prefers-reduced-motion',
  '--no-first-run',
  '--window-size=1280,900',
)
_MAX_BYTES = 60e6


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
  driver = shutil.which('chromedriver')
  if not binary or not driver:
    pytest.skip('needs Chromium: apt-get install chromium chromium-driver')
  options = webdriver.ChromeOptions()
  options.binary_location = binary
  profile = tmp_path_factory.mktemp('profile')
  for flag in (*_FLAGS, f'--user-data-dir={profile}'):
    options.add_argument(flag)
  logged = {'browser': 'ALL', 'performance': 'ALL'}
  options.set_capability('goog:loggingPrefs', logged)
  browser = webdriver.Chrome(options=options, service=Service(driver))
  yield browser
  browser.quit()


@pytest.fixture
def show(browser, tmp_path):
  """Opens a page of some data; at the end it must have been quiet."""

  def show(data, name='report'):
    path = tmp_path / 'report.html'
    path.write_text(page.render(data, name), encoding='utf-8')
    for kind in ('browser', 'performance'):
      browser.get_log(kind)
    browser.get(path.as_uri())
    return path

  yield show
  assert browser.get_log('browser') == []
  events = [
    json.loads(entry['message'])['message']
    for entry in browser.get_log('performance')
  ]
  requested = [
    event['params']['request']['url']
    for event in events
    if event['method'] == 'Network.requestWillBeSent'
  ]
  # The browser's own first tab is not the page's.
  inner = ('data:', 'chrome')
  files = [url for url in requested if not url.startswith(inner)]
  assert files == [(tmp_path / 'report.html').as_uri()]


def _all(browser, selector):
  return browser.find_elements(By.CSS_SELECTOR, selector)


def _one(browser, selector):
  return browser.find_element(By.CSS_SELECTOR, selector)


def _choose(browser, selector, text):
  Select(_one(browser, selector)).select_by_visible_text(text)


def _shown(browser):
  """Photographs in the grid, by number."""
  tiles = _all(browser, '#grid .tile')
  return [int(tile.get_attribute('data-photo')) for tile in tiles]


def test_scores_curves_and_config_are_there(browser, show, make_data):
  data = make_data(parts=True)
  data['results'].append({'name': 'a/mAP', 'init': 0.5, 'final': 0.5004})
  show(data)
  assert browser.title == 'cmd on birds'
  rows = [row.text for row in _all(browser, '#results tbody tr')]
  assert rows == [
    'knn/20/top1 25.0 50.0 +25.0',
    'new/rank1 – 75.0 –',
    'a/mAP 50.0 50.0 ±0.0',
  ]
  assert 'Neighbours vote.' in _one(browser, '#results').text
  assert len(_all(browser, '.chart svg[role=img]')) == 2
  path = '#terms path.smooth'
  before = _all(browser, path)[1].get_attribute('d')
  _one(browser, '#smoothing').send_keys(Keys.HOME)
  assert _one(browser, '#smoothing-value').text == '0.00'
  assert _all(browser, path)[1].get_attribute('d') != before
  assert '2 of 4 robin' in _one(browser, '#pairs').text
  assert len(_all(browser, '#parts-grid .mask')) == 4
  field = _one(browser, '#field-search')
  field.send_keys('OPTIM')
  assert _one(browser, '#fields').text == 'optim.name "adamw"'


def test_curves_are_explained_and_have_a_start_to_beat(
  browser, show, make_data
):
  data = make_data()
  data['verdict'] = [{'kind': 'wrong', 'text': 'Collapse: <b>all alike</b>.'}]
  data['run']['best'] = {'score': 'knn', 'step': 200, 'value': 0.5}
  data['curves'] = {
    'step': [0, 100, 150, 200, 300],
    'series': {
      'loss': [None, 3.0, None, None, 1.0],
      'eval/knn': [0.25, None, 0.75, None, 0.5],
      'grad_norm': [None, 1.0, None, 2.0, 3.0],
    },
    'about': {'loss': 'It may rise.', 'eval/knn': 'The line to beat.'},
  }
  show(data)
  [verdict] = _all(browser, '#verdict-list li')
  assert verdict.text == 'Collapse: <b>all alike</b>.'
  assert verdict.get_attribute('class') == 'wrong'
  assert 'best step\n200' in _one(browser, '#cards').text
  assert _one(browser, '#terms .about').text == 'It may rise.'
  knn, norm = _all(browser, '#curves .chart')
  assert _one(knn, '.about').text == 'The line to beat.'
  assert not _all(norm, '.about') and not _all(norm, '.start')
  assert len(_all(knn, '.start')) == 1 and 'start 0.25' in knn.text
  # A score is a line through its points, and not smoothed.
  [path] = _all(knn, 'path')
  assert path.get_attribute('d').count('M') == 1
  assert path.get_attribute('d').count('L') == 2
  # Step 200 was logged without a finite loss, step 150 only scored.
  assert _all(browser, '#terms path')[-1].get_attribute('d').count('M') == 2
  assert _all(norm, 'path')[-1].get_attribute('d').count('M') == 1


def test_a_click_shows_neighbours_and_where_the_network_looks(
  browser, show, make_data
):
  show(make_data(parts=True))
  _one(browser, '#grid [data-photo="3"]').click()
  near = _all(browser, '#neighbours .tile')
  found = [int(tile.get_attribute('data-photo')) for tile in near]
  assert found == [4, 5, 6, 7, 8]
  marks = [(_all(tile, '.mark') or [None])[0] for tile in near]
  assert [mark.text[0] for mark in marks] == ['✗', '✗', '✓', '✗', '✗']
  kinds = [tile.get_attribute('class') for tile in near]
  assert [('right' in kind) for kind in kinds] == [False, False, True, 0, 0]
  assert '1 of 5 of the same class' in _one(browser, '#detail').text
  assert [f'{k}: 0.' in tile.text for k, tile in enumerate(near, 1)] == [1] * 5
  assert 'as cmd-jax search tells photographs' in _one(browser, '#detail').text
  # The overlay dims some pixels and leaves the brightest.
  alphas = browser.execute_script(
    "const c = document.querySelector('.views canvas');"
    "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
    'return Array.from(d).filter((_, k) => k % 4 === 3);'
  )
  assert min(alphas) < 20 < 150 < max(alphas)
  assert len(set(alphas)) > 50
  assert len(_all(browser, '.views .mask')) == 1

  assert not _all(browser, '#neighbours canvas')
  browser.execute_script("document.querySelector('input[value=looks]').click()")
  assert len(_all(browser, '#neighbours canvas')) == 5
  _one(browser, '#neighbours .tile').click()
  assert '00004.jpg' in _one(browser, '#detail h3').text
  back = _one(browser, '#detail .row button')
  browser.execute_script('arguments[0].click()', back)
  assert '00003.jpg' in _one(browser, '#detail h3').text


def test_photographs_are_searched_filtered_and_ordered(
  browser, show, make_data
):
  show(make_data())
  assert _shown(browser) == list(range(12))
  search = _one(browser, '#search')
  search.send_keys('WREN birds')
  assert _shown(browser) == [2, 5, 8, 11]
  assert _one(browser, '#found').text == '4 photographs'
  search.send_keys(Keys.CONTROL, 'a', Keys.NULL, Keys.DELETE)
  _choose(browser, '#split', 'test')
  assert _shown(browser) == [0, 4, 8]
  _choose(browser, '#verdict', 'of the same class')
  assert _shown(browser) == []
  _choose(browser, '#verdict', 'of another class')
  _choose(browser, '#order', 'loneliest first')
  assert _shown(browser) == [8, 4, 0]


def test_the_grid_is_walked_by_keys(browser, show, make_data):
  show(make_data())
  first = _one(browser, '#grid [data-photo="0"]')
  browser.execute_script('arguments[0].focus()', first)
  keys = ActionChains(browser)
  keys.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER).perform()
  assert '00002.jpg' in _one(browser, '#detail h3').text
  pressed = _one(browser, '#grid [aria-pressed="true"]')
  assert pressed.get_attribute('data-photo') == '2'


def test_names_that_carry_html_stay_text(browser, show, make_data):
  data = make_data()
  show(data)
  _one(browser, '#grid [data-photo="0"]').click()
  assert _one(browser, '#detail h3').text == data['photos']['names'][0]
  assert data['classes'][1] in _one(browser, '#neighbours').text
  assert not _all(browser, 'img[src="x"]')
  assert browser.execute_script('return typeof hacked') == 'undefined'
  # Even markup that a mistake let through would not run.
  browser.execute_script(
    "document.body.insertAdjacentHTML('beforeend',"
    ' \'<img src="data:," onerror="window.hacked = 1">\')'
  )
  blocked = browser.get_log('browser')
  assert blocked and all('Content Security' in x['message'] for x in blocked)
  assert browser.execute_script('return typeof hacked') == 'undefined'


def test_markup_in_every_text_of_a_page_stays_text(browser, show, make_data):
  markup = (
    '</script><script>hacked=1</script><img src=x onerror="hacked=1">'
    '\u2028\u2029"\'`${hacked=1}<svg onload=hacked=1>'
  )
  data = make_data(parts=True)
  count = len(data['photos']['names'])
  data['photos']['names'] = [f'{i}{markup}' for i in range(count)]
  data['classes'] = [f'{i}{markup}' for i in range(len(data['classes']))]
  data['notes'] = [markup]
  data['attention_name'] = data['parts']['name'] = markup
  data['protocols'] = {markup: markup}
  data['results'].append({'name': markup, 'init': 0.1, 'final': 0.2})
  values = list(data['curves']['series'].values())
  data['curves']['series'] |= {markup: values[0], '__proto__': values[0]}
  texts = ('dataset', 'method', 'network', 'encoder', 'hardware')
  data['run'] |= dict.fromkeys((*texts, 'init_from', 'data_sha256'), markup)
  data['run']['versions'] = data['run']['config'] = {markup: markup}
  show(data)
  _one(browser, '#grid [data-photo="3"]').click()
  browser.execute_script("document.querySelector('input[value=looks]').click()")
  assert '<svg onload' in _one(browser, '#detail h3').text
  assert markup[:9] in _one(browser, '#notes').text
  assert '<svg onload' in _one(browser, '#pairs').text
  assert '<svg onload' in _one(browser, '#fields').text
  assert not _all(browser, 'img[src="x"], img[onerror], svg[onload]')
  assert len(_all(browser, 'script')) == 2
  assert browser.execute_script('return typeof hacked') == 'undefined'


def test_the_map_shows_the_photograph_under_the_pointer(
  browser, show, make_data
):
  show(make_data())
  canvas = _one(browser, '#map-canvas')
  browser.execute_script('arguments[0].scrollIntoView()', canvas)
  card = _one(browser, '#map-card')
  assert not card.is_displayed()
  x, y = browser.execute_script(
    'const f = frame(); const [x, y] = place(7, f);'
    'return [Math.round(x - f.width / 2), Math.round(y - f.height / 2)];'
  )
  pointer = ActionChains(browser)
  pointer.move_to_element_with_offset(canvas, x, y).perform()
  assert card.is_displayed()
  assert '00007.jpg' in card.text
  # Zooming keeps what is under the pointer there.
  browser.execute_script(
    'const f = frame(); const [x, y] = place(7, f); zoomBy(3, x, y);'
  )
  after = browser.execute_script(
    'const f = frame(); const [x, y] = place(7, f);'
    'return [Math.round(x - f.width / 2), Math.round(y - f.height / 2)];'
  )
  assert after == pytest.approx([x, y], abs=1)
  pointer.click().perform()
  assert '00007.jpg' in _one(browser, '#detail h3').text


def test_photographs_without_labels_have_no_marks(browser, show, make_data):
  show(make_data(labelled=False))
  assert _one(browser, '#notes').text == 'No labels <here>.'
  assert not _all(browser, '.mark')
  assert not _one(browser, '#verdict').is_displayed()
  assert 'no labels' in _one(browser, '#confusion-hint').text
  assert len(_all(browser, '#neighbours .tile')) == 5
  assert _one(browser, '.views canvas').is_displayed()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_fits_a_telephone_in_both_colour_schemes(
  browser, show, make_data, scheme
):
  feature = {'name': 'prefers-color-scheme', 'value': scheme}
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [feature]})
  size = dict(width=360, height=740, deviceScaleFactor=1, mobile=True)
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  try:
    show(make_data(parts=True))
    width = 'return document.documentElement.scrollWidth'
    assert browser.execute_script(width) <= 360
    colour = _one(browser, 'body').value_of_css_property('background-color')
    red = int(colour.partition('(')[2].partition(',')[0])
    assert (red > 128) == (scheme == 'light')
  finally:
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})


def test_what_curation_found_is_summed_up(browser, show, make_data):
  show(make_data())
  section = browser.find_element(By.ID, 'curation')
  assert '12' in section.find_element(By.ID, 'curation-cards').text
  row = section.find_element(By.CSS_SELECTOR, '#suspects tbody tr')
  assert row.text.split() == ['a/<1>.png', 'a', 'b']
  link = section.find_element(By.CSS_SELECTOR, '#curation-hint a')
  assert link.get_attribute('href').endswith('/curated/curate.html')
  show(make_data(labelled=False))
  section = browser.find_element(By.ID, 'curation')
  assert 'cmd-jax curate' in section.text
  assert not section.find_elements(By.CSS_SELECTOR, 'tr')


def test_curation_shows_marks_and_searches(browser, show, make_curation):
  data = make_curation()
  show(data, 'curation')
  assert browser.title == 'Curation of /birds'
  assert _one(browser, '#notes').text == data['notes'][0]
  assert [x.text for x in _all(browser, '.pair h3')] == [
    'robin → wren 0.75',
    '3 images, different labels, 1 not shown',
  ]
  assert len(_all(browser, '#suspects .mark')) == 2
  names = data['photos']['names']
  # A photograph that is there twice is marked in both places.
  _one(browser, '#first [data-photo="0"]').click()
  pressed = _all(browser, '[aria-pressed="true"]')
  assert len(pressed) == 2
  area = _one(browser, '#marked-names')
  assert area.get_attribute('value') == names[0] and names[0].startswith('<')
  _one(browser, '#search').send_keys('00002')
  assert _one(browser, '#found').text == '1 found'
  assert not _one(browser, '#suspects .pair').is_displayed()
  browser.execute_script("document.getElementById('unmark').click()")
  assert not area.is_displayed()


@pytest.mark.slow
def test_five_thousand_photographs_stay_light(
  browser, show, make_data, record_property
):
  path = show(make_data(5000, k=20, grid=14))
  size = path.stat().st_size
  seconds = browser.execute_script(
    "return performance.getEntriesByType('navigation')[0].loadEventEnd / 1e3"
  )
  record_property(
    'counted',
    f'5,000 photographs: {size / 1e6:.1f} MB, open in {seconds:.2f} s',
  )
  assert size < _MAX_BYTES
  assert _one(browser, '#found').text == '5,000 photographs'
  _one(browser, '#grid [data-photo="100"]').click()
  assert len(_all(browser, '#neighbours .tile')) == 20
