const PAGE = 120;
const SIMILARITY_HINT =
  'Rank: similarity as cmd-jax search tells photographs apart. It is the ' +
  'cosine of features in which what neighbours among the training ' +
  'photographs differ in counts less, and of which the mean is taken off.';

const browser = { found: [], shown: 0, chosen: -1, past: [], layer: 'photo' };

function isWanted(i, { words, split, wanted }) {
  if (split && splitName(i) !== split) return false;
  if (wanted && nearestVerdict(i) !== wanted) return false;
  const text = describe(i).toLowerCase();
  return words.every((word) => text.includes(word));
}

function closeness(i) {
  return NEIGHBOURS.count ? NEIGHBOURS.similarity[i * NEIGHBOURS.count] : 0;
}

function search() {
  const filters = {
    words: byId('search').value.toLowerCase().split(/\s+/).filter(Boolean),
    split: byId('split').value,
    wanted: byId('verdict').value,
  };
  browser.found = [];
  for (let i = 0; i < COUNT; i++) {
    if (isWanted(i, filters)) browser.found.push(i);
  }
  const order = byId('order').value;
  if (order) {
    const sign = order === 'closest' ? -1 : 1;
    browser.found.sort((a, b) => sign * (closeness(a) - closeness(b)));
  }
  browser.shown = 0;
  byId('grid').replaceChildren();
  byId('shelf').scrollTop = 0;
  showMore();
  const count = browser.found.length;
  const noun = count === 1 ? 'photograph' : 'photographs';
  byId('found').textContent = `${grouped(count)} ${noun}`;
}

function showMore() {
  const next = browser.found.slice(browser.shown, browser.shown + PAGE);
  byId('grid').append(
    ...next.map((i) => {
      const button = tile(i, { kind: nearestVerdict(i), caption: baseName(i) });
      button.setAttribute('aria-pressed', i === browser.chosen);
      return button;
    }),
  );
  browser.shown += next.length;
  byId('more').hidden = browser.shown >= browser.found.length;
}

// Arrow keys walk through the grid.
function walk(event) {
  const tiles = [...byId('grid').children];
  const at = tiles.indexOf(document.activeElement);
  if (at < 0) return;
  const top = tiles[0].offsetTop;
  const inRow = tiles.findIndex((other) => other.offsetTop !== top);
  const columns = inRow < 0 ? tiles.length : inRow;
  const moves = {
    ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
  };
  const next = tiles[at + moves[event.key]];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

function layerChoice() {
  const layers = [['photo', 'Photos'], ['looks', 'Where it looks']];
  if (DATA.parts) layers.push(['parts', 'Parts']);
  const group = el('div', {
    class: 'choice', role: 'radiogroup', 'aria-label': 'Show them as',
  });
  for (const [value, text] of layers) {
    const radio = el('input', {
      type: 'radio', name: 'layer', value, checked: value === browser.layer,
      onchange: () => {
        browser.layer = value;
        showDetail();
        byId('detail').querySelector('input:checked').focus();
      },
    });
    group.append(el('label', {}, radio, text));
  }
  return group;
}

function summaryOf(i, near) {
  if (!near.length) return 'No training photograph to compare with';
  const right = near.filter((x) => verdict(i, x.photo) === 'right').length;
  const known = near.filter((x) => verdict(i, x.photo) !== 'unknown').length;
  if (!known) return 'Nearest training images';
  return `Nearest training images: ${right} of ${known} of the same class`;
}

function photoFacts(i) {
  const voted = PHOTOS.predicted[i];
  let vote = null;
  if (voted >= 0) {
    const kind = PHOTOS.labels[i] < 0 ? '' : voted === PHOTOS.labels[i];
    const symbol = kind === '' ? '' : ` ${SYMBOLS[kind ? 'right' : 'wrong']}`;
    vote = className(voted) + symbol;
  }
  return factList([
    ['file', PHOTOS.names[i] === baseName(i) ? null : PHOTOS.names[i]],
    ['class', HAS_LABELS ? className(PHOTOS.labels[i]) : null],
    ['voted', vote],
    ['split', PHOTOS.is_test.includes(1) ? splitName(i) : null],
  ]);
}

function viewOf(i, layer, text) {
  return el('figure', {}, picture(i, layer),
    el('figcaption', { class: 'caption', text }));
}

function showDetail() {
  const i = browser.chosen;
  const near = neighboursOf(i);
  const back = el('button', {
    type: 'button', text: '← Back', hidden: !browser.past.length,
    onclick: () => {
      const previous = browser.past.pop();
      browser.chosen = -1;
      choose(previous);
    },
  });
  const views = [
    viewOf(i, 'photo', `${PHOTOS.sizes[i][1]} × ${PHOTOS.sizes[i][0]} pixels`),
    viewOf(i, 'looks', `where it looks: ${DATA.attention_name}`),
  ];
  if (hasMask(i)) views.push(viewOf(i, 'parts', 'its parts'));
  byId('detail').replaceChildren(
    el('div', { class: 'row' }, el('h3', { text: baseName(i) }), back),
    photoFacts(i),
    el('div', { class: 'views' }, ...views),
    el('div', { class: 'row' }, el('h3', { text: summaryOf(i, near) }),
      layerChoice()),
    el('p', { class: 'hint', hidden: !near.length, text: SIMILARITY_HINT }),
    el(
      'div',
      { class: 'grid', id: 'neighbours' },
      ...near.map(({ photo, similarity }, k) => {
        const label = PHOTOS.labels[photo];
        const name = label < 0 ? baseName(photo) : className(label);
        return tile(photo, {
          kind: verdict(i, photo),
          caption: name,
          note: `${k + 1}: ${similarity.toFixed(2)}`,
          layer: browser.layer,
        });
      }),
    ),
  );
}

function showChosen(i) {
  if (i === browser.chosen) return;
  if (browser.chosen >= 0) browser.past.push(browser.chosen);
  browser.chosen = i;
  for (const button of byId('grid').children) {
    button.setAttribute('aria-pressed', Number(button.dataset.photo) === i);
  }
  const focused = byId('detail').contains(document.activeElement);
  showDetail();
  byId('detail').scrollTop = 0;
  // The button that had the focus is gone.
  if (focused) byId('detail').focus({ preventScroll: true });
}

function showBrowser() {
  byId('verdict-label').hidden = !HAS_LABELS;
  byId('split').parentElement.hidden = !PHOTOS.is_test.includes(1);
  for (const id of ['search', 'split', 'verdict', 'order']) {
    byId(id).addEventListener(id === 'search' ? 'input' : 'change', search);
  }
  byId('filters').addEventListener('submit', (event) => event.preventDefault());
  byId('more').addEventListener('click', showMore);
  byId('grid').addEventListener('keydown', walk);
  new IntersectionObserver(
    (entries) => entries.some((entry) => entry.isIntersecting) && showMore(),
    { root: byId('shelf'), rootMargin: '400px' },
  ).observe(byId('more'));
  search();
  listeners.push(showChosen);
  // A test image that is wrong says most.
  const wrong = browser.found.find(
    (i) => PHOTOS.is_test[i] && nearestVerdict(i) === 'wrong',
  );
  choose(wrong ?? 0);
  browser.past = [];
}

function goToDetail(i) {
  choose(i);
  byId('looks').scrollIntoView();
  byId('detail').focus({ preventScroll: true });
}
