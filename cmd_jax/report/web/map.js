const map = {
  canvas: byId('map-canvas'),
  zoom: 1, x: 0.5, y: 0.5, hovered: -1, chosen: -1, drag: null, queued: false,
};
const DOT_PX = 3.5;
const REACH_PX = 14;
// Fewer photographs than this in view are drawn as such.
const MAX_DRAWN = 140;
const PHOTO_PX = 52;
const images = new Map();

function loadedImage(i) {
  if (!images.has(i)) {
    const image = new Image();
    image.addEventListener('load', redraw);
    image.src = thumbnail(i);
    images.set(i, image);
  }
  const image = images.get(i);
  return image.complete && image.naturalWidth ? image : null;
}

function redraw() {
  if (map.queued) return;
  map.queued = true;
  requestAnimationFrame(() => {
    map.queued = false;
    drawMap();
  });
}

function frame() {
  const width = map.canvas.clientWidth;
  const height = map.canvas.clientHeight;
  return { width, height, side: (Math.min(width, height) - 60) * map.zoom };
}

function place(i, { width, height, side }) {
  return [
    width / 2 + (POINTS[2 * i] / 65535 - map.x) * side,
    height / 2 + (map.y - POINTS[2 * i + 1] / 65535) * side,
  ];
}

function pointColour(i) {
  const by = byId('map-colour').value;
  if (by === 'split') {
    return PHOTOS.is_test[i] ? themeColour('wrong') : themeColour('accent');
  }
  if (by === 'verdict') return themeColour(nearestVerdict(i));
  return HAS_LABELS ? classColour(PHOTOS.labels[i]) : themeColour('accent');
}

function isFaded(i) {
  const only = Number(byId('map-class').value);
  return only >= 0 && PHOTOS.labels[i] !== only;
}

function drawLinks(context, view) {
  const [x, y] = place(map.chosen, view);
  context.strokeStyle = themeColour('muted');
  context.lineWidth = 1;
  for (const { photo } of neighboursOf(map.chosen)) {
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(...place(photo, view));
    context.stroke();
  }
}

function drawPhoto(context, i, x, y, colour) {
  const image = loadedImage(i);
  if (!image) return false;
  const aspect = aspectOf(i);
  const width = PHOTO_PX * Math.min(aspect, 1);
  const height = PHOTO_PX / Math.max(aspect, 1);
  context.fillStyle = colour;
  const [left, top] = [x - width / 2, y - height / 2];
  context.fillRect(left - 2, top - 2, width + 4, height + 4);
  context.drawImage(image, left, top, width, height);
  return true;
}

function drawDot(context, i, x, y, colour) {
  context.fillStyle = colour;
  context.beginPath();
  if (PHOTOS.is_test[i]) {
    context.rect(x - DOT_PX, y - DOT_PX, 2 * DOT_PX, 2 * DOT_PX);
  } else context.arc(x, y, DOT_PX, 0, 7);
  context.fill();
}

function ring(context, i, view, colour) {
  const [x, y] = place(i, view);
  context.strokeStyle = colour;
  context.lineWidth = 3;
  context.beginPath();
  context.arc(x, y, 3 * DOT_PX, 0, 7);
  context.stroke();
}

function drawMap() {
  const view = frame();
  const ratio = window.devicePixelRatio || 1;
  map.canvas.width = view.width * ratio;
  map.canvas.height = view.height * ratio;
  const context = map.canvas.getContext('2d');
  context.scale(ratio, ratio);
  const visible = [];
  for (let i = 0; i < COUNT; i++) {
    const [x, y] = place(i, view);
    const inside = x > -30 && y > -30;
    if (inside && x < view.width + 30 && y < view.height + 30) {
      visible.push([i, x, y]);
    }
  }
  const asPhotos = visible.length <= MAX_DRAWN;
  if (map.chosen >= 0) drawLinks(context, view);
  for (const [i, x, y] of visible) {
    context.globalAlpha = isFaded(i) ? 0.12 : asPhotos ? 1 : 0.85;
    const colour = pointColour(i);
    const drawn = asPhotos && drawPhoto(context, i, x, y, colour);
    if (!drawn) drawDot(context, i, x, y, colour);
  }
  context.globalAlpha = 1;
  if (map.chosen >= 0) ring(context, map.chosen, view, themeColour('text'));
  if (map.hovered >= 0) ring(context, map.hovered, view, themeColour('accent'));
}

function closestPhoto(event) {
  const box = map.canvas.getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  const view = frame();
  let best = -1;
  let distance = (map.zoom > 1 ? 2 : 1) * REACH_PX;
  for (let i = 0; i < COUNT; i++) {
    const [x, y] = place(i, view);
    const away = Math.hypot(x - px, y - py);
    if (away < distance && !isFaded(i)) [best, distance] = [i, away];
  }
  return best;
}

function hover(i) {
  if (i === map.hovered) return;
  map.hovered = i;
  const card = byId('map-card');
  card.hidden = i < 0;
  redraw();
  if (i < 0) return;
  card.replaceChildren(
    picture(i),
    el('span', { class: 'caption', text: baseName(i) }),
    el('span', {
      class: 'caption',
      text: HAS_LABELS
        ? `${className(PHOTOS.labels[i])}, ${splitName(i)}`
        : splitName(i),
    }),
  );
  const view = frame();
  const [x, y] = place(i, view);
  const fits = x + 16 + card.offsetWidth <= view.width;
  const left = fits ? x + 16 : x - 16 - card.offsetWidth;
  const top = Math.min(Math.max(y - 60, 0), view.height - card.offsetHeight);
  card.style.left = `${Math.max(left, 0)}px`;
  card.style.top = `${Math.max(top, 0)}px`;
}

// Zooms so that what lies at a place of the canvas stays there.
function zoomBy(factor, x = null, y = null) {
  const before = frame();
  const zoom = Math.min(Math.max(map.zoom * factor, 1), 60);
  const change = 1 / before.side - map.zoom / (zoom * before.side);
  if (x !== null) {
    map.x += (x - before.width / 2) * change;
    map.y -= (y - before.height / 2) * change;
  }
  map.zoom = zoom;
  if (zoom === 1) map.x = map.y = 0.5;
  hover(-1);
  redraw();
}

function panBy(dx, dy) {
  const { side } = frame();
  map.x = Math.min(Math.max(map.x - dx / side, 0), 1);
  map.y = Math.min(Math.max(map.y + dy / side, 0), 1);
  redraw();
}

function onPointerMove(event) {
  if (!map.drag) {
    hover(closestPhoto(event));
    return;
  }
  const [dx, dy] = [event.clientX - map.drag.x, event.clientY - map.drag.y];
  map.drag = {
    x: event.clientX, y: event.clientY,
    moved: map.drag.moved + Math.hypot(dx, dy),
  };
  if (map.drag.moved > 4) panBy(dx, dy);
}

function onPointerUp(event) {
  const clicked = map.drag && map.drag.moved <= 4;
  map.drag = null;
  if (!clicked) return;
  const i = closestPhoto(event);
  if (i < 0) return;
  hover(i);
  goToDetail(i);
}

function onKey(event) {
  const actions = {
    ArrowLeft: () => panBy(60, 0), ArrowRight: () => panBy(-60, 0),
    ArrowUp: () => panBy(0, 60), ArrowDown: () => panBy(0, -60),
    '+': () => zoomBy(1.4), '=': () => zoomBy(1.4), '-': () => zoomBy(1 / 1.4),
    0: () => zoomBy(0), Escape: () => hover(-1),
  };
  if (!(event.key in actions) || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  actions[event.key]();
}

function onWheel(event) {
  // Elsewhere the wheel scrolls the page.
  if (document.activeElement !== map.canvas && !event.ctrlKey) return;
  event.preventDefault();
  const box = map.canvas.getBoundingClientRect();
  const factor = Math.exp(-event.deltaY / 400);
  zoomBy(factor, event.clientX - box.left, event.clientY - box.top);
}

function showLegend() {
  const by = byId('map-colour').value;
  let entries = [];
  if (by === 'verdict') {
    entries = Object.entries(MEANINGS).map(([k, v]) => [`var(--${k})`, v]);
  } else if (by === 'split') {
    entries = [['var(--accent)', 'training'], ['var(--wrong)', 'test']];
  } else {
    entries = DATA.classes.map((name, k) => [classColour(k), name]);
  }
  byId('map-legend').replaceChildren(
    ...entries.map(([colour, text]) => {
      const swatch = el('span', { class: 'swatch' });
      swatch.style.background = colour;
      return el('span', {}, swatch, text);
    }),
  );
}

function listenToMap() {
  const { canvas } = map;
  canvas.addEventListener('pointermove', onPointerMove);
  canvas.addEventListener('pointerleave', () => hover(-1));
  canvas.addEventListener('pointerdown', (event) => {
    map.drag = { x: event.clientX, y: event.clientY, moved: 0 };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointerup', onPointerUp);
  canvas.addEventListener('pointercancel', () => (map.drag = null));
  canvas.addEventListener('keydown', onKey);
  canvas.addEventListener('wheel', onWheel, { passive: false });
  byId('zoom-in').addEventListener('click', () => zoomBy(1.6));
  byId('zoom-out').addEventListener('click', () => zoomBy(1 / 1.6));
  byId('zoom-reset').addEventListener('click', () => zoomBy(0));
  byId('map-class').addEventListener('change', redraw);
  byId('map-colour').addEventListener('change', () => {
    showLegend();
    redraw();
  });
  new ResizeObserver(redraw).observe(canvas);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
}

function showMap() {
  const shapes = PHOTOS.is_test.includes(1)
    ? ' Dots are training images, squares test images.' : '';
  byId('map-hint').textContent =
    `${PHOTOS.map.method} of the features: photographs that lie together look `
    + `alike to the network.${shapes} Point at one to see it, click for its `
    + 'look-alikes. Drag to move; the wheel zooms once the map is clicked, '
    + 'as do + and −.';
  map.canvas.setAttribute(
    'aria-label', `Map of ${COUNT} photographs by ${PHOTOS.map.method}`,
  );
  const options = DATA.classes.map((name, k) =>
    el('option', { value: k, text: name }));
  byId('map-class').append(...options);
  byId('map-class-label').hidden = !HAS_LABELS;
  if (!HAS_LABELS) {
    byId('map-colour').value = 'split';
    byId('map-colour').parentElement.hidden = true;
  }
  listeners.push((i) => {
    map.chosen = i;
    redraw();
  });
  map.chosen = browser.chosen;
  listenToMap();
  showLegend();
}
