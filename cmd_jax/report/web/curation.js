const PHOTOS = DATA.photos;
const COUNTS = DATA.counts;
const MAX_ASPECT = 4;

const whole = (number) => number.toLocaleString('en');
const some = (count, one, many) =>
  `${whole(count)} ${count === 1 ? one : many}`;
const baseName = (i) => PHOTOS.names[i].split('/').pop();
const describe = (i) =>
  [PHOTOS.names[i], PHOTOS.classes[i], PHOTOS.sizes[i].join(' x ')]
    .filter(Boolean)
    .join(', ');

// A photograph in a square.
function picture(i) {
  const [height, width] = PHOTOS.sizes[i];
  const aspect = Math.min(Math.max(width / height, 1 / MAX_ASPECT), MAX_ASPECT);
  const frame = el('span', { class: 'picture' });
  frame.style.width = `${100 * Math.min(aspect, 1)}%`;
  frame.style.height = `${100 * Math.min(1 / aspect, 1)}%`;
  if (PHOTOS.thumbnails[i]) {
    frame.append(
      el('img', {
        src: `data:image/webp;base64,${PHOTOS.thumbnails[i]}`,
        alt: describe(i),
        loading: 'lazy',
        decoding: 'async',
        draggable: 'false',
      }),
    );
  }
  return el('span', { class: 'square' }, frame);
}

const MARKED = new Set();

function mark(i, isMarked) {
  if (isMarked) MARKED.add(i);
  else MARKED.delete(i);
  for (const button of document.querySelectorAll(`[data-photo="${i}"]`)) {
    button.setAttribute('aria-pressed', String(isMarked));
  }
}

function showMarked() {
  byId('marked').hidden = !MARKED.size;
  byId('marked-title').textContent = `${whole(MARKED.size)} marked`;
  byId('marked-names').value = [...MARKED].map((i) => PHOTOS.names[i]).join('\n');
}

function sign(kind) {
  if (kind === null) return null;
  const [symbol, meaning] = kind
    ? ['✓', 'of the suggested class']
    : ['✗', 'of another class'];
  return el(
    'span',
    { class: 'mark', title: meaning },
    el('span', { text: symbol, 'aria-hidden': 'true' }),
    el('span', { class: 'quiet', text: meaning }),
  );
}

// A photograph as a button that marks it; `kind`: right, wrong or nothing.
function tile(i, { captions = [], kind = '', agrees = null } = {}) {
  return el(
    'button',
    {
      type: 'button',
      class: `tile ${kind}`,
      title: describe(i),
      'aria-pressed': 'false',
      'data-photo': i,
      onclick: () => {
        mark(i, !MARKED.has(i));
        showMarked();
      },
    },
    picture(i),
    sign(agrees),
    ...captions.map((text) => el('span', { class: 'caption', text })),
  );
}

// An entry that is shown while one of its photographs is searched for.
const ENTRIES = [];

function entry(node, photos) {
  const words = photos.map(describe).join(' ').toLowerCase();
  ENTRIES.push({ node, words });
  return node;
}

function showCards() {
  const cards = [
    ['images', COUNTS.images, some(COUNTS.classes, 'class', 'classes')],
    ['unreadable', COUNTS.unreadable, ''],
    ['labels that look wrong', COUNTS.suspects, ''],
    ['one photograph, two labels', COUNTS.conflicts, 'images'],
    ['duplicates', COUNTS.spare, `in ${some(COUNTS.groups, 'group', 'groups')}`],
    ['outliers', COUNTS.outliers, ''],
    ['to label first', COUNTS.selected, `of ${whole(COUNTS.pool)}`],
  ];
  byId('cards').append(
    ...cards.map(([label, value, extra]) =>
      el(
        'div',
        { class: 'card' },
        el('div', { class: 'label', text: label }),
        el('div', { class: 'value', text: whole(value) }),
        el('div', { class: 'extra', text: extra }),
      ),
    ),
  );
}

function empty(text) {
  return el('p', { class: 'hint', text });
}

function showSuspects() {
  const place = byId('suspects');
  if (!DATA.suspects.length) {
    place.append(
      empty(
        COUNTS.classes
          ? 'No label is contradicted by the images around it.'
          : 'The folder gives no labels.',
      ),
    );
  }
  for (const { photo, suggested, margin, neighbours } of DATA.suspects) {
    const heading = el(
      'h3',
      {},
      `${PHOTOS.classes[photo]} → ${suggested} `,
      el('span', { class: 'readout', text: margin.toFixed(2) }),
    );
    const tiles = neighbours.map((i) =>
      tile(i, {
        captions: [PHOTOS.classes[i] || 'no label'],
        agrees: PHOTOS.classes[i] === suggested,
        kind: PHOTOS.classes[i] === suggested ? 'right' : '',
      }),
    );
    const first = tile(photo, { captions: [baseName(photo)], kind: 'wrong' });
    place.append(
      entry(
        el(
          'div',
          { class: 'pair' },
          heading,
          el('div', { class: 'grid' }, first, ...tiles),
        ),
        [photo],
      ),
    );
  }
}

function showGroups() {
  const kinds = Object.entries(DATA.kinds).map(
    ([name, count]) => `${whole(count)} ${name}`,
  );
  byId('duplicates-hint').textContent = kinds.length
    ? `Pairs by kind: ${kinds.join(', ')}. The first of a group has the most ` +
      'pixels. "alike" says the embedding alone. Groups with different labels ' +
      'come first, then those that reach over splits.'
    : 'No two images show the same.';
  for (const group of DATA.groups) {
    const more = group.size - group.photos.length;
    const words = [
      some(group.size, 'image', 'images'),
      group.differs ? 'different labels' : '',
      group.splits ? 'different splits' : '',
      more ? `${whole(more)} not shown` : '',
    ];
    const tiles = group.photos.map((i, k) =>
      tile(i, {
        captions: [group.kinds[k] || 'largest', PHOTOS.classes[i] || baseName(i)],
        kind: group.differs ? 'wrong' : '',
      }),
    );
    byId('groups').append(
      entry(
        el(
          'div',
          { class: group.photos.length > 3 ? 'pair wide' : 'pair' },
          el('h3', { text: words.filter(Boolean).join(', ') }),
          el('div', { class: 'grid' }, ...tiles),
        ),
        group.photos,
      ),
    );
  }
}

function showGrids() {
  for (const { photo, typicality, is_outlier: isOutlier } of DATA.outliers) {
    const captions = [typicality.toFixed(2), PHOTOS.classes[photo]];
    const kind = isOutlier ? 'wrong' : '';
    const node = tile(photo, { captions: captions.filter(Boolean), kind });
    byId('outlier-grid').append(entry(node, [photo]));
  }
  const [coverage, byChance] = DATA.coverage;
  byId('first-hint').textContent = DATA.selected.length
    ? 'Typical images that together are like all others, in the order in which ' +
      'they add most. The mean similarity of an image to the nearest of them ' +
      `is ${coverage.toFixed(2)}; with as many chosen by chance it is ` +
      `${byChance.toFixed(2)}.`
    : 'None was asked for, or all have labels.';
  DATA.selected.forEach((photo, k) => {
    const captions = [`${k + 1}`, PHOTOS.classes[photo] || baseName(photo)];
    byId('first-grid').append(entry(tile(photo, { captions }), [photo]));
  });
}

function search() {
  const wanted = byId('search').value.trim().toLowerCase();
  let shown = 0;
  for (const { node, words } of ENTRIES) {
    node.hidden = !words.includes(wanted);
    shown += node.hidden ? 0 : 1;
  }
  byId('found').textContent = wanted ? `${whole(shown)} found` : '';
}

document.title = `Curation of ${DATA.folder}`;
byId('title').textContent = document.title;
byId('subtitle').textContent = `seen by ${DATA.encoder}`;
byId('notes').append(...DATA.notes.map((text) => el('li', { text })));
byId('notes').hidden = !DATA.notes.length;
showCards();
showSuspects();
showGroups();
showGrids();
byId('search').addEventListener('input', search);
byId('search').form.addEventListener('submit', (event) => event.preventDefault());
byId('unmark').addEventListener('click', () => {
  for (const i of [...MARKED]) mark(i, false);
  showMarked();
});
document.documentElement.dataset.ready = 'true';
