const STEPS = DATA.curves.step;
const SERIES = DATA.curves.series;
const ABOUT = new Map(Object.entries(DATA.curves.about));
// Scored now and then: the lines between have no value.
const isScore = (name) => name.startsWith('eval/');
// The start of these is what training has to beat.
const GOALS = new Set(['eval/knn', 'eval/rank1', 'eval/rankme']);
// Planned rather than measured: smoothing would only blunt them.
const PLANNED = new Set([
  'learning_rate',
  'weight_decay',
  'teacher_momentum',
  'teacher_temperature',
]);
const DASHES = ['', '7 3', '2 3', '9 3 2 3', '12 4', '4 2 1 2'];
const MARGIN = { left: 52, right: 10, top: 8, bottom: 20 };

// An exponential mean without the pull of its start.
function smooth(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function short(value) {
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((x) => x * power >= rough) * power;
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + 1e-12; k++) {
    found.push(k * step);
  }
  return found;
}

const lineColour = (k) => `oklch(0.63 0.16 ${(k * 137.508 + 120) % 360})`;

// Whether a line of metrics is one of training, not of scores alone.
const LOGGED = STEPS.map((_, k) =>
  Object.entries(SERIES).some(
    ([name, values]) => !isScore(name) && values[k] !== null));

// A gap is where a value was not finite, not where there is none by design.
function pathOf({ name, values }, x, y) {
  let pen = 'M';
  let path = '';
  values.forEach((value, k) => {
    if (value === null) {
      if (LOGGED[k] && !isScore(name)) pen = 'M';
      return;
    }
    path += `${pen}${x(STEPS[k]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = 'L';
  });
  return path;
}

function scales(lines, width, height) {
  const values = lines
    .flatMap((line) => line.values)
    .filter((value) => value !== null);
  let low = Math.min(...values);
  let high = Math.max(...values);
  const slack = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
  low -= slack;
  high += slack;
  const first = STEPS[0];
  const span = STEPS[STEPS.length - 1] - first || 1;
  const inner = width - MARGIN.left - MARGIN.right;
  const rise = height - MARGIN.top - MARGIN.bottom;
  return {
    low,
    high,
    x: (step) => MARGIN.left + (inner * (step - first)) / span,
    y: (value) => MARGIN.top + (rise * (high - value)) / (high - low),
    step: (x) => first + ((x - MARGIN.left) / inner) * span,
  };
}

function drawAxes(picture, scale, width, height) {
  for (const value of ticks(scale.low, scale.high, height > 200 ? 6 : 4)) {
    const y = scale.y(value);
    picture.append(
      svg('line', {
        class: 'axis', x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y,
      }),
      svg('text', {
        x: MARGIN.left - 6, y: y + 4, 'text-anchor': 'end', text: short(value),
      }),
    );
  }
  const last = STEPS[STEPS.length - 1];
  for (const step of ticks(STEPS[0], last, width > 500 ? 8 : 4)) {
    picture.append(
      svg('text', {
        x: scale.x(step), y: height - 5,
        'text-anchor': scale.x(step) > width - 30 ? 'end' : 'middle',
        text: grouped(step),
      }),
    );
  }
}

// The step with values that is closest to a place of the pointer.
function closestLine(step, lines) {
  const distance = (k) => Math.abs(STEPS[k] - step);
  let best = -1;
  STEPS.forEach((_, k) => {
    if (lines.every((line) => line.values[k] === null)) return;
    if (best < 0 || distance(k) < distance(best)) best = k;
  });
  return best;
}

function followPointer(picture, lines, scale, height, readout) {
  const cursor = svg('line', {
    class: 'cursor', y1: MARGIN.top, y2: height - MARGIN.bottom,
    visibility: 'hidden',
  });
  picture.append(cursor);
  picture.addEventListener('pointermove', (event) => {
    const x = event.clientX - picture.getBoundingClientRect().left;
    const k = closestLine(scale.step(x), lines);
    cursor.setAttribute('x1', scale.x(STEPS[k]));
    cursor.setAttribute('x2', scale.x(STEPS[k]));
    cursor.setAttribute('visibility', 'visible');
    const values = lines
      .filter((line) => line.values[k] !== null)
      .map((line) => `${line.name} ${short(line.values[k])}`);
    readout.textContent = `step ${grouped(STEPS[k])}: ${values.join(', ')}`;
  });
  picture.addEventListener('pointerleave', () => {
    cursor.setAttribute('visibility', 'hidden');
    readout.textContent = '';
  });
}

function legendOf(lines) {
  const entries = lines.map((line) =>
    el(
      'span',
      {},
      svg('svg', { 'aria-hidden': 'true' },
        svg('line', {
          x1: 0, x2: 26, y1: 4, y2: 4, stroke: line.colour, 'stroke-width': 2.5,
          'stroke-dasharray': line.dash,
        })),
      line.name,
    ),
  );
  return el('div', { class: 'legend' }, ...entries);
}

// The score of the start, which is the first one where it is of step 0.
function startOf(line) {
  return GOALS.has(line.name) && STEPS[0] === 0 ? line.values[0] : null;
}

function drawStart(picture, line, scale, width) {
  const start = startOf(line);
  if (start === null) return;
  const y = scale.y(start);
  picture.append(
    svg('line', {
      class: 'start', x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y,
    }),
    svg('text', {
      x: width - MARGIN.right, y: y - 4, 'text-anchor': 'end',
      text: `start ${short(start)}`,
    }),
  );
}

// A figure of some series, and the function that draws it.
function makeChart(title, lines, height, about = null) {
  const readout = el('div', { class: 'readout' });
  const holder = el('div');
  const figure = el(
    'figure',
    { class: 'chart' },
    el('figcaption', {}, el('span', { text: title }), readout),
    lines.length > 1 ? legendOf(lines) : null,
    holder,
    about ? el('p', { class: 'about', text: about }) : null,
  );

  function draw(weight) {
    const width = Math.max(holder.clientWidth, 200);
    const scale = scales(lines, width, height);
    const ends = lines.map((line) => {
      const logged = line.values.filter((value) => value !== null);
      return `${line.name} from ${short(logged[0])} to ${short(logged.at(-1))}`;
    });
    const picture = svg('svg', {
      viewBox: `0 0 ${width} ${height}`, height, role: 'img',
      'aria-label': `${title}: ${ends.join(', ')}`,
    });
    drawAxes(picture, scale, width, height);
    for (const line of lines) {
      const plain = PLANNED.has(line.name) || isScore(line.name);
      // A single point has no line to draw.
      const single = line.values.filter((value) => value !== null).length === 1;
      const style = {
        class: single ? 'smooth dot' : 'smooth', stroke: line.colour,
        'stroke-dasharray': single ? '' : line.dash,
      };
      drawStart(picture, line, scale, width);
      if (!plain && weight > 0) {
        const d = pathOf(line, scale.x, scale.y);
        picture.append(svg('path', { class: 'raw', d, stroke: line.colour }));
      }
      const shown = plain ? line.values : smooth(line.values, weight);
      const path = pathOf({ ...line, values: shown }, scale.x, scale.y);
      const d = path + (single ? 'h0.1' : '');
      picture.append(svg('path', { ...style, d }));
    }
    followPointer(picture, lines, scale, height, readout);
    holder.replaceChildren(picture);
  }

  return { figure, draw };
}

function showCurves() {
  const names = Object.keys(SERIES);
  const slider = byId('smoothing');
  if (!names.length) {
    slider.closest('.controls').hidden = true;
    const text = 'No curves: metrics.jsonl is missing or empty.';
    byId('terms').append(el('p', { class: 'hint', text }));
    return;
  }
  const terms = names.filter((name) => name.startsWith('loss'));
  const lines = terms.map((name, k) => ({
    name: name === 'loss' ? 'loss, weighted sum' : name.slice('loss/'.length),
    values: SERIES[name],
    colour: name === 'loss' ? 'currentColor' : lineColour(k),
    dash: DASHES[k % DASHES.length],
  }));
  const charts = [];
  if (lines.length) {
    charts.push(makeChart('Loss by term', lines, 300, ABOUT.get('loss')));
    byId('terms').append(charts[0].figure);
  }
  for (const name of names.filter((other) => !terms.includes(other))) {
    const values = SERIES[name];
    const line = { name, values, colour: 'var(--accent)', dash: '' };
    const title = name.replaceAll('_', ' ');
    charts.push(makeChart(title, [line], 150, ABOUT.get(name)));
    byId('curves').append(charts.at(-1).figure);
  }
  function drawAll() {
    const weight = Number(slider.value);
    byId('smoothing-value').textContent = weight.toFixed(2);
    for (const chart of charts) chart.draw(weight);
  }
  slider.addEventListener('input', drawAll);
  let width = 0;
  new ResizeObserver(() => {
    const now = byId('terms').clientWidth;
    if (now !== width) drawAll();
    width = now;
  }).observe(byId('terms'));
}
