const CONFUSION = DATA.confusion;

function shade(share, colour) {
  const strength = Math.round(12 + 60 * Math.sqrt(share));
  return `color-mix(in srgb, var(--${colour}) ${strength}%, var(--card))`;
}

function matrixRow(row, k) {
  const { classes, totals } = CONFUSION;
  const cells = row.map((count, other) => {
    const cell = el('td', {
      text: count || '',
      title: `${count} of ${totals[k]} ${className(classes[k])} voted into `
        + className(classes[other]),
    });
    if (count) {
      const colour = k === other ? 'right' : 'wrong';
      cell.style.backgroundColor = shade(count / totals[k], colour);
    }
    return cell;
  });
  const name = className(classes[k]);
  return el('tr', {}, el('th', { scope: 'row', text: name, title: name }),
    ...cells);
}

function showMatrix() {
  const heads = CONFUSION.classes.map((label) =>
    el('th', { scope: 'col', title: className(label) },
      el('div', { class: 'tilt', text: className(label) })));
  byId('matrix').append(
    el(
      'table',
      { class: 'matrix' },
      el('thead', {}, el('tr', {},
        el('th', { text: 'true ↓ voted →' }), ...heads)),
      el('tbody', {}, ...CONFUSION.matrix.map(matrixRow)),
    ),
  );
}

function pairSide(from, to, count, total, examples) {
  const tiles = examples.map((i) => {
    const button = tile(i, { kind: 'wrong' });
    button.addEventListener('click', () => goToDetail(i));
    return button;
  });
  const text = `${count} of ${total} ${className(from)} voted into `
    + className(to);
  return el('div', {}, el('p', { class: 'caption', text, title: text }),
    el('div', { class: 'grid' }, ...tiles));
}

function pairCard({ first, second, counts, totals, examples }) {
  return el(
    'div',
    { class: 'pair' },
    el('h3', { text: `${className(first)} ↔ ${className(second)}` }),
    pairSide(first, second, counts[0], totals[0], examples[0]),
    pairSide(second, first, counts[1], totals[1], examples[1]),
  );
}

function showConfusion() {
  const hint = byId('confusion-hint');
  if (!CONFUSION) {
    hint.textContent =
      'There are no labels on both splits, so that nothing can be confused.';
    return;
  }
  const { judge, total, right, pairs } = CONFUSION;
  hint.textContent =
    `${judge} is right for `
    + `${grouped(right)} of ${grouped(total)} test images. `
    + (pairs.length
      ? 'Below are the classes it takes for each other most often.'
      : 'It takes no class for another.');
  if (!pairs.length) return;
  showMatrix();
  byId('pairs').append(...pairs.map(pairCard));
}

const MAX_PARTS = 24;

function showParts() {
  const section = byId('parts');
  section.hidden = !DATA.parts;
  document.querySelector('nav a[href="#parts"]').hidden = !DATA.parts;
  if (!DATA.parts) return;
  byId('parts-hint').textContent =
    `Part masks of ${DATA.parts.name}: a colour is a part. The browser shows `
    + 'those of every training image under “Parts”.';
  const count = Math.min(MAX_PARTS, DATA.parts.masks.length);
  for (let k = 0; k < count; k++) {
    const i = Math.floor((k * DATA.parts.masks.length) / count);
    const button = tile(i, { layer: 'parts', caption: baseName(i) });
    button.addEventListener('click', () => goToDetail(i));
    byId('parts-grid').append(button);
  }
}
