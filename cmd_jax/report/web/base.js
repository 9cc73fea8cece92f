const PHOTOS = DATA.photos;
const COUNT = PHOTOS.names.length;

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const HEAT = bytesOf(PHOTOS.attention.heat);
const GRID = PHOTOS.attention.grid;
const NEIGHBOURS = {
  count: PHOTOS.neighbours.count,
  index: new Uint32Array(bytesOf(PHOTOS.neighbours.index).buffer),
  similarity: new Float32Array(bytesOf(PHOTOS.neighbours.similarity).buffer),
};
const POINTS = new Uint16Array(bytesOf(PHOTOS.map.points).buffer);
const HAS_LABELS = PHOTOS.labels.some((label) => label >= 0);

const thumbnail = (i) => `data:image/webp;base64,${PHOTOS.thumbnails[i]}`;
const className = (label) => (label < 0 ? 'no label' : DATA.classes[label]);
const splitName = (i) => (PHOTOS.is_test[i] ? 'test' : 'training');
const baseName = (i) => PHOTOS.names[i].split('/').pop();
const describe = (i) =>
  PHOTOS.labels[i] < 0
    ? PHOTOS.names[i]
    : `${PHOTOS.names[i]}, ${className(PHOTOS.labels[i])}`;

function neighboursOf(i) {
  const { count, index, similarity } = NEIGHBOURS;
  return Array.from({ length: count }, (_, k) => ({
    photo: index[i * count + k],
    similarity: similarity[i * count + k],
  }));
}

// Whether two photographs are of one class: 'right', 'wrong' or 'unknown'.
function verdict(i, other) {
  const [a, b] = [PHOTOS.labels[i], PHOTOS.labels[other]];
  if (a < 0 || b < 0) return 'unknown';
  return a === b ? 'right' : 'wrong';
}

function nearestVerdict(i) {
  if (!NEIGHBOURS.count) return 'unknown';
  return verdict(i, NEIGHBOURS.index[i * NEIGHBOURS.count]);
}

const SYMBOLS = { right: '✓', wrong: '✗' };
const MEANINGS = { right: 'same class', wrong: 'another class' };

function mark(kind) {
  if (kind === 'unknown') return null;
  return el(
    'span',
    { class: 'mark', title: MEANINGS[kind] },
    el('span', { text: SYMBOLS[kind], 'aria-hidden': 'true' }),
    el('span', { class: 'quiet', text: MEANINGS[kind] }),
  );
}

// Neighbouring labels far apart in hue, however many there are.
function classColour(label) {
  if (label < 0) return 'hsl(0 0% 55%)';
  const hue = ((label * 137.508) % 360).toFixed(0);
  return `oklch(${label % 2 ? 0.56 : 0.7} 0.15 ${hue})`;
}

function themeColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(
    `--${name}`,
  );
}

// The part of a photograph that the network sees, as fractions.
function seenBox(i) {
  const [height, width] = PHOTOS.sizes[i];
  if (!DATA.crop_fraction) return { left: 0, top: 0, width: 1, height: 1 };
  const side = DATA.crop_fraction * Math.min(height, width);
  const box = { width: side / width, height: side / height };
  return { left: (1 - box.width) / 2, top: (1 - box.height) / 2, ...box };
}

const MAX_ASPECT = 4;

function aspectOf(i) {
  const [height, width] = PHOTOS.sizes[i];
  return Math.min(Math.max(width / height, 1 / MAX_ASPECT), MAX_ASPECT);
}

const DIMMEST = 185;

// Dims what counts little: a canvas to lie over the photograph.
function heatLayer(i) {
  const small = el('canvas', { width: GRID, height: GRID });
  const pixels = small.getContext('2d').createImageData(GRID, GRID);
  for (let k = 0; k < GRID * GRID; k++) {
    const heat = HEAT[i * GRID * GRID + k];
    pixels.data[4 * k + 3] = (DIMMEST * (255 - heat)) / 255;
  }
  small.getContext('2d').putImageData(pixels, 0, 0);
  const aspect = aspectOf(i);
  const width = Math.round(240 * Math.min(aspect, 1));
  const height = Math.round(240 / Math.max(aspect, 1));
  const layer = el('canvas', { class: 'heat', width, height });
  const box = seenBox(i);
  const where = [
    box.left * width,
    box.top * height,
    box.width * width,
    box.height * height,
  ];
  const context = layer.getContext('2d');
  context.fillStyle = `rgb(0 0 0 / ${DIMMEST / 255})`;
  context.fillRect(0, 0, width, height);
  context.clearRect(...where);
  context.drawImage(small, ...where);
  return layer;
}

const hasMask = (i) => DATA.parts !== null && i < DATA.parts.masks.length;

// A photograph in a square, under what `layer` names: photo, looks, parts.
function picture(i, layer = 'photo') {
  const aspect = aspectOf(i);
  const image = el('img', {
    src: thumbnail(i),
    alt: describe(i),
    loading: 'lazy',
    decoding: 'async',
    draggable: 'false',
  });
  const frame = el('span', { class: 'picture' }, image);
  frame.style.width = `${100 * Math.min(aspect, 1)}%`;
  frame.style.height = `${100 * Math.min(1 / aspect, 1)}%`;
  if (layer === 'looks') frame.append(heatLayer(i));
  if (layer === 'parts' && hasMask(i)) {
    const src = `data:image/png;base64,${DATA.parts.masks[i]}`;
    frame.append(el('img', { class: 'mask', src, alt: '' }));
  }
  return el('span', { class: 'square' }, frame);
}

// A photograph as a button that chooses it.
function tile(
  i,
  { kind = 'unknown', caption = null, note = null, layer = 'photo' } = {},
) {
  return el(
    'button',
    {
      type: 'button',
      class: `tile ${kind}`,
      title: describe(i),
      'data-photo': i,
      onclick: () => choose(i),
    },
    picture(i, layer),
    mark(kind),
    caption === null ? null : el('span', { class: 'caption', text: caption }),
    note === null ? null : el('span', { class: 'caption', text: note }),
  );
}

// Everything that wants to know which photograph is chosen.
const listeners = [];

function choose(i) {
  for (const listener of listeners) listener(i);
}
