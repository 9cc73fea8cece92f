const RUN = DATA.run;
const percent = (value) => (100 * value).toFixed(1);
const grouped = (value) => value.toLocaleString('en');

function duration(seconds) {
  if (seconds < 90) return `${seconds.toFixed(0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function card(label, value, extra = null, words = false) {
  return el(
    'div',
    { class: 'card' },
    el('div', { class: 'label', text: label }),
    el('div', { class: words ? 'value words' : 'value', text: value }),
    extra === null ? null : el('div', { class: 'extra', text: extra }),
  );
}

function gainText({ init, final }) {
  if (init === null || final === null) return null;
  const gain = 100 * (final - init);
  const size = Math.abs(gain).toFixed(1);
  // What is shown as nothing is neither up nor down.
  if (size === '0.0') return '±0.0';
  return `${gain < 0 ? '−' : '+'}${size}`;
}

// The first metric of each protocol stands for it.
function headlines() {
  const seen = new Set();
  return DATA.results.filter((row) => {
    const protocol = row.name.split('/').slice(0, -1).join('/');
    if (row.final === null || seen.has(protocol)) return false;
    return seen.add(protocol);
  });
}

function showCards() {
  const cards = headlines().map((row) => {
    const gain = gainText(row);
    const extra = gain && `${gain} from ${percent(row.init)}\u00a0%`;
    return card(row.name, `${percent(row.final)}\u00a0%`, extra);
  });
  for (const [name, count] of Object.entries(RUN.counts)) {
    cards.push(card(name, grouped(count)));
  }
  if (DATA.classes.length) cards.push(card('classes', DATA.classes.length));
  const size = `${(RUN.parameters / 1e6).toFixed(1)} M parameters`;
  cards.push(card('encoder', RUN.encoder || 'encoder', size, true));
  const steps = `of ${grouped(RUN.total_steps)} steps`;
  cards.push(card('trained', grouped(RUN.step), steps));
  if (RUN.best) {
    const value = `${RUN.best.value.toPrecision(4)} by ${RUN.best.score}`;
    cards.push(card('best step', grouped(RUN.best.step), value));
  }
  if (RUN.seconds) {
    const speed = RUN.images_per_second;
    const rate = speed ? `${grouped(Math.round(speed))} images/s` : null;
    cards.push(card('training time', duration(RUN.seconds), rate));
  }
  byId('cards').append(...cards);
}

function resultRow(row) {
  const value = (x) => (x === null ? '–' : percent(x));
  const gain = gainText(row);
  const direction = { '+': 'up', '−': 'down' }[gain?.[0]] ?? '';
  const track = el('div', { class: 'track', 'aria-hidden': 'true' });
  if (row.final !== null) {
    const fill = el('div', { class: 'fill' });
    fill.style.width = `${100 * row.final}%`;
    track.append(fill);
  }
  if (row.init !== null) {
    const tick = el('div', { class: 'tick' });
    tick.style.left = `calc(${100 * row.init}% - 1.5px)`;
    track.append(tick);
  }
  return el(
    'tr',
    {},
    el('th', { scope: 'row' }, el('code', { text: row.name })),
    el('td', { class: 'number', text: value(row.init) }),
    el('td', { class: 'number', text: value(row.final) }),
    el('td', { class: `number ${direction}`, text: gain ?? '–' }),
    el('td', { class: 'bar' }, track),
  );
}

function showResults() {
  if (!DATA.results.length) {
    const text = 'No scores were recorded for this run.';
    byId('results').append(el('p', { class: 'hint', text }));
    return;
  }
  const heads = [
    ['Protocol and metric, %', ''],
    ['initial', 'number'],
    ['trained', 'number'],
    ['gain', 'number'],
    ['trained (bar), initial (line)', 'bar'],
  ].map(([text, kind]) => el('th', { scope: 'col', class: kind, text }));
  byId('results').append(
    el(
      'table',
      {},
      el('thead', {}, el('tr', {}, ...heads)),
      el('tbody', {}, ...DATA.results.map(resultRow)),
    ),
    factList(Object.entries(DATA.protocols)),
  );
}

function showOrigin() {
  const start = RUN.init_from;
  const versions = Object.entries(RUN.versions);
  byId('facts').append(
    factList([
      ['data set', RUN.dataset],
      ['data SHA-256', RUN.data_sha256],
      ['method', RUN.method],
      ['network shown', `${RUN.network} after ${grouped(RUN.step)} steps`],
      ['started from', start ? `${start.path} (${start.family})` : 'random'],
      ['hardware', RUN.hardware],
      ['versions', versions.map(([k, v]) => `${k} ${v}`).join(', ')],
    ]),
  );
  const rows = Object.entries(RUN.config).map(([name, value]) =>
    el(
      'tr',
      {},
      el('th', { scope: 'row' }, el('code', { text: name })),
      el('td', {}, el('code', { text: value })),
    ),
  );
  byId('fields').append(el('table', {}, el('tbody', {}, ...rows)));
  byId('field-search').addEventListener('input', (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
    }
  });
}

function showOverview() {
  document.title = `${RUN.method} on ${RUN.dataset}`;
  byId('title').textContent = document.title;
  byId('subtitle').textContent = RUN.hardware
    ? `${grouped(RUN.step)} steps, ${RUN.hardware}`
    : `${grouped(RUN.step)} steps`;
  byId('verdict-list').append(
    ...DATA.verdict.map(({ kind, text }) => el('li', { class: kind, text })));
  byId('notes').append(...DATA.notes.map((text) => el('li', { text })));
  byId('notes').hidden = !DATA.notes.length;
  showCards();
  showResults();
  showOrigin();
}
