// The page "Try it": shows what `genrobust try-it` computed (try_it.json and a sheet of images for each model).
'use strict';
(() => {
  const SIDE = 28;
  const AMPLIFY = [1, 2, 5, 10, 20, 50, 100];
  const MODELS = {
    gfz: 'GFZ, generative', dfz: 'DFZ, discriminative with a generative part',
    cnn: 'CNN, discriminative', cnn_at: 'CNN_AT, adversarially trained',
  };
  const NORMS = {l2: 'l2', linf: 'l-infinity'};
  const LATENTS = {attacker: "the attacker's, fixed", fresh: 'resampled by the defender, 20 draws'};
  const DETECTORS = {logit: 'Logit detector', marginal: 'Marginal detector', kl: 'KL detector'};
  // One colour a class, light enough for black text
  const COLOURS = ['#9ec9f0', '#f5b971', '#a8d8a0', '#f2a3a3', '#c9b6ea',
    '#d8b79c', '#f5b8dc', '#c4c4c4', '#dfe07a', '#8fdde0'].map(c => [1, 3, 5].map(k => parseInt(c.slice(k, k + 2), 16)));

  const root = document.getElementById('try-it');
  const byId = id => document.getElementById(`try-${id}`);
  const sheets = {};
  let data, state;

  // ---- small tools
  const range = n => [...Array(n).keys()];
  const argmax = values => values.indexOf(Math.max(...values));
  const percent = p => `${(100 * p).toFixed(1)} %`;
  const number = (value, digits) => value.toFixed(digits).replace('-', '\u2212');
  const make = (tag, attributes = {}, ...children) => {
    const e = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
    e.append(...children);
    return e;
  };
  const softmax = logits => {
    const top = Math.max(...logits), e = logits.map(v => Math.exp(v - top)), sum = e.reduce((a, b) => a + b);
    return e.map(v => v / sum);
  };
  // Margin: the label's logit less the largest other one
  const margin = (logits, label) => logits[label] - Math.max(...logits.filter((_, c) => c !== label));

  // ---- what is chosen, in the controls and in the address
  const defaults = () => ({image: Math.min(9, data.images.length - 1), model: 'gfz', norm: 'l2', size: 6, latents: 'attacker', a: 24, b: 16});
  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1)), s = defaults(), shown = data.settings.shown - 1;
    const whole = {image: data.images.length - 1, size: data.settings.l2.length - 1, a: shown, b: shown};
    for (const [name, most] of Object.entries(whole)) {
      const value = given.get(name);
      if (/^\d+$/.test(value) && Number(value) <= most) s[name] = Number(value);
    }
    for (const [name, known] of Object.entries({model: data.models, norm: NORMS, latents: LATENTS})) {
      if (Object.hasOwn(known, given.get(name) ?? '')) s[name] = given.get(name);
    }
    return s;
  }
  // Safari throws where the address is written a hundred times within seconds, as by a slider: then once more, later
  let later;
  function writeAddress() {
    clearTimeout(later);
    try {
      history.replaceState(history.state, '', `#${new URLSearchParams(state)}`);
    } catch {
      later = setTimeout(writeAddress, 1000);
    }
  }

  // ---- what the data say of a view
  const model = () => data.models[state.model];
  const isRandom = () => 'wrong' in model();
  const isFresh = () => isRandom() && state.latents === 'fresh';
  const label = () => data.labels[state.image];
  const radii = () => state.norm === 'l2' ? data.settings.l2 : data.settings.linf.map(k => k / 255);
  const radius = k => state.norm === 'l2' ? `${radii()[k]}` : `${data.settings.linf[k]}/255`;
  function at(size) {
    const m = model(), n = radii().length, k = (2 * state.image + (state.norm === 'l2' ? 0 : 1)) * n + size;
    const ten = (values, unit) => values.slice(10 * k, 10 * k + 10).map(v => v * unit);
    const logits = ten(isFresh() ? m.fresh_logits : m.logits, 1e-3);
    const probabilities = isFresh() ? ten(m.fresh_probabilities, 1e-4) : softmax(logits);
    return {k, logits, probabilities, predicted: argmax(probabilities), margin: margin(logits, label()),
      norm: state.norm === 'l2' ? m.l2[k] / 1000 : m.linf[k] / 255};
  }

  // ---- images
  function loadSheet(name) {
    sheets[name] ??= new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => {
        const canvas = make('canvas', {width: image.width, height: image.height});
        const context = canvas.getContext('2d', {willReadFrequently: true});
        context.drawImage(image, 0, 0);
        resolve(context);
      };
      image.onerror = () => reject(new Error(`try_it.${name}.png cannot be read`));
      image.src = `try_it.${name}.png`;
    });
    return sheets[name];
  }
  // Grey levels of a tile of the sheet, 0 to 255
  function tile(sheet, row, column) {
    const pixels = sheet.getImageData(SIDE * column, SIDE * row, SIDE, SIDE).data;
    return range(SIDE * SIDE).map(n => pixels[4 * n]);
  }
  function paint(canvas, grey, text) {
    const context = canvas.getContext('2d'), pixels = context.createImageData(SIDE, SIDE);
    grey.forEach((v, n) => pixels.data.set([v, v, v, 255], 4 * n));
    context.putImageData(pixels, 0, 0);
    if (text) canvas.setAttribute('aria-label', text);
  }

  // ---- first panel
  function showImages(sheet, now) {
    const n = radii().length, clean = tile(sheet, state.image, 0);
    const adversarial = tile(sheet, state.image, (state.norm === 'l2' ? 0 : n) + state.size);
    const delta = adversarial.map((v, k) => v - clean[k]), largest = Math.max(...delta.map(Math.abs));
    const factor = Math.max(1, ...AMPLIFY.filter(f => f * largest <= 127));
    const [is, says] = [label(), now.predicted].map(c => data.classes[c]);
    paint(byId('clean'), clean, `The image: ${is}`);
    paint(byId('delta'), delta.map(v => 127.5 + factor * v), `The perturbation, amplified by ${factor}; grey is no change`);
    paint(byId('adversarial'), adversarial, `The image with the perturbation, classified as ${says}`);
    byId('factor').textContent = `perturbation × ${factor}`;
    const verdict = now.predicted === label() ? `${state.size ? 'still ' : ''}classified correctly` : `misclassified as ${says}`;
    byId('example').textContent = largest === 0 && state.size === 0
      ? `${is}, without a perturbation: ${verdict} by ${state.model.toUpperCase()}. Move the slider to attack it.`
      : `${is}, with a perturbation of ${NORMS[state.norm]} norm ${now.norm.toFixed(3)} (at most ${radius(state.size)} is allowed): ${verdict} by ${state.model.toUpperCase()}.`;
  }
  function showProbabilities(now) {
    const rows = now.probabilities.map((p, c) => {
      const mark = c === label() ? ' (label)' : '', row = make('tr', {class: c === label() ? 'try-label' : c === now.predicted ? 'try-wrong' : ''});
      const bar = make('span', {class: 'try-bar', style: `width:${(100 * p).toFixed(2)}%`});
      row.append(make('th', {scope: 'row'}, data.classes[c] + mark), make('td', {class: 'try-track'}, bar), make('td', {class: 'try-number'}, percent(p)));
      return row;
    });
    byId('bars').replaceChildren(...rows);
    const whose = isFresh() ? 'the mean over 20 draws of latents' : isRandom() ? "on the attacker's latents" : 'this model has no latents';
    byId('bars-text').textContent = `The label, ${data.classes[label()]}, has ${percent(now.probabilities[label()])} of the probability (${whose}).`;
  }
  const word = (text, kind) => make('strong', {class: `try-${kind}`}, text);
  function showFacts(now) {
    const m = model(), draws = data.settings.draws, rows = [];
    const add = (name, ...value) => rows.push(make('tr', {}, make('th', {scope: 'row'}, name), make('td', {}, ...value)));
    for (const c of m.density ? new Set([label(), now.predicted]) : []) add(`log p(x, ${data.classes[c]})`, `${number(now.logits[c], 1)} nats${isFresh() ? `, mean of ${draws} draws` : ''}`);
    if (!m.density) add('log p(x, y)', 'none: this model has no density of images');
    let n_rejected = 0;
    for (const [name, d] of Object.entries(m.detectors)) {
      const rejected = d.rejected[now.k], isRejected = isFresh() ? rejected > draws / 2 : d.scores[now.k] / 1000 > d.threshold;
      n_rejected += isRejected;
      const detail = isFresh() ? ` in ${isRejected ? rejected : draws - rejected} of ${draws} draws`
        : `, score ${number(d.scores[now.k] / 1000, 2)}, threshold ${number(d.threshold, 2)}`;
      add(DETECTORS[name], word(isRejected ? 'rejected' : 'accepted', isRejected ? 'bad' : 'good'), detail);
    }
    const wrong = isRandom() ? m.wrong[now.k] : null;
    add('Resampled latents', isRandom() ? `${wrong} of ${draws} draws misclassify this image` : 'none: this model is deterministic');
    byId('facts').replaceChildren(...rows);
    const total = Object.keys(m.detectors).length;
    byId('facts-text').textContent = (total > 1 ? `${n_rejected} of ${total} detectors ${n_rejected === 1 ? 'rejects' : 'reject'} the image` : `Its detector ${n_rejected ? 'rejects' : 'accepts'} the image`)
      + (isRandom() ? `; when the defender draws its latents anew, ${wrong} of ${draws} draws misclassify it.` : '.');
  }
  function showCurve() {
    const sizes = radii(), margins = sizes.map((_, k) => at(k).margin), [W, H, left, low, right, top] = [600, 260, 88, 56, 16, 36];
    const [least, most] = [Math.min(0, ...margins), Math.max(0, ...margins)], pad = 0.08 * (most - least) || 1;
    const X = v => left + (W - left - right) * v / sizes.at(-1);
    const Y = v => top + (H - top - low) * (most + pad - v) / (most - least + 2 * pad);
    const svg = (tag, attributes, text) => {
      const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
      for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
      if (text !== undefined) e.textContent = text;
      return e;
    };
    const parts = [svg('line', {x1: left, x2: W - right, y1: Y(0), y2: Y(0), class: 'try-zero'}),
      svg('polyline', {points: margins.map((m, k) => `${X(sizes[k])},${Y(m)}`).join(' '), class: 'try-line'})];
    margins.forEach((m, k) => parts.push(svg('circle', {cx: X(sizes[k]), cy: Y(m), r: k === state.size ? 8 : 3.5, class: m < 0 ? 'try-below' : 'try-above'})));
    const isLegible = v => v === 0 || Math.abs(Y(v) - Y(0)) > 18;
    for (const v of new Set([most, 0, least].filter(isLegible))) parts.push(svg('text', {x: left - 8, y: Y(v) + 5, 'text-anchor': 'end'}, number(v, 1)));
    for (const k of [0, 5, 8, 10].filter(k => k < sizes.length)) parts.push(svg('text', {x: X(sizes[k]), y: H - low + 22, 'text-anchor': 'middle'}, radius(k)));
    parts.push(svg('text', {x: (left + W - right) / 2, y: H - 4, 'text-anchor': 'middle'}, `largest ${NORMS[state.norm]} norm allowed`));
    parts.push(svg('text', {x: 4, y: 20}, 'margin (nats)'));
    const first = margins.findIndex(m => m < 0);
    const [fails, succeeds] = isFresh() ? ['', ''] : [': this attack did not succeed', ': there the image is misclassified'];
    const what = first < 0 ? `stays above 0 up to ${radius(sizes.length - 1)}${fails}`
      : first === 0 ? 'is below 0 before any attack' : `first falls below 0 between ${radius(first - 1)} and ${radius(first)}${succeeds}`;
    byId('curve').replaceChildren(...parts);
    byId('curve').setAttribute('aria-label', `Margin against the size of the perturbation: ${margins.map((m, k) => `${radius(k)}: ${number(m, 1)}`).join('; ')}`);
    const whose = isFresh() ? ' (of the mean over 20 draws)' : '';
    byId('curve-text').textContent = `The margin of ${state.model.toUpperCase()}${whose} ${what}. At the chosen size it is ${number(margins[state.size], 1)} nats.`;
  }

  // ---- second panel
  function drawRegions(regions, point) {
    const n = data.settings.shown, scale = 10, canvas = byId('plane');
    canvas.width = canvas.height = n * scale;
    const context = canvas.getContext('2d');
    const boundary = (draw, x, y) => x + 1 < n && draw[n * y + x] !== draw[n * y + x + 1] || y + 1 < n && draw[n * y + x] !== draw[n * (y + 1) + x];
    for (const y of range(n)) for (const x of range(n)) {
      const mean = [0, 1, 2].map(k => regions.reduce((sum, draw) => sum + COLOURS[draw[n * y + x]][k], 0) / regions.length);
      context.fillStyle = `rgb(${mean.map(Math.round)})`;
      context.fillRect(x * scale, (n - 1 - y) * scale, scale, scale);
    }
    context.strokeStyle = '#000';
    context.lineWidth = 2;
    context.beginPath();
    const first = regions[0];
    for (const y of range(n)) for (const x of range(n)) {
      if (!boundary(first, x, y)) continue;
      const [px, py] = [x * scale, (n - 1 - y) * scale];
      if (x + 1 < n && first[n * y + x] !== first[n * y + x + 1]) { context.moveTo(px + scale, py); context.lineTo(px + scale, py + scale); }
      if (y + 1 < n && first[n * y + x] !== first[n * (y + 1) + x]) { context.moveTo(px, py); context.lineTo(px + scale, py); }
    }
    context.stroke();
    const spot = (x, y, fill, r) => {
      context.beginPath();
      context.arc((x + 0.5) * scale, (n - y - 0.5) * scale, r, 0, 7);
      context.fillStyle = fill;
      context.fill();
      context.stroke();
    };
    spot((n - 1) / 4, (n - 1) / 2, '#fff', 6);
    spot(point.a, point.b, '#d00', 9);
  }
  function showPlane(sheet) {
    const n = data.settings.shown, plane = model().plane, regions = plane.regions[state.image], last = data.settings.l2.length * 2;
    const length = (k, low, high) => low + (high - low) * k / (n - 1), a = length(state.a, -1, 3), b = length(state.b, -2, 2);
    const clean = tile(sheet, state.image, 0), u = tile(sheet, state.image, last), v = tile(sheet, 0, last + 1);
    const step = 255 * a * plane.unit[state.image], aside = 255 * b * plane.random_unit;
    const there = clean.map((x, k) => Math.min(255, Math.max(0, x + step * (u[k] - 128) + aside * (v[k] - 128))));
    const says = regions.map(draw => Number(draw[n * state.b + state.a])), fresh = says.slice(1);
    drawRegions(regions, state);
    paint(byId('there'), there, `The image at the chosen point, classified as ${data.classes[says[0]]}`);
    const present = [...new Set(regions.join(''))].map(Number).sort();
    byId('legend').replaceChildren(...present.map(c => make('li', {}, make('span', {class: 'try-swatch', style: `background:rgb(${COLOURS[c]})`, 'aria-hidden': 'true'}), data.classes[c])));
    byId('a-value').textContent = `${number(a, 2)} of l2 norm`;
    byId('b-value').textContent = `${number(b, 2)} of l2 norm`;
    byId('a').setAttribute('aria-valuetext', byId('a-value').textContent);
    byId('b').setAttribute('aria-valuetext', byId('b-value').textContent);
    const names = [...new Set(fresh)].map(c => {
      const k = fresh.filter(s => s === c).length;
      return `${k} ${k === 1 ? 'says' : 'say'} ${data.classes[c]}`;
    }).join(', ');
    const text = `${number(a, 2)} towards the boundary and ${number(b, 2)} at random: ${state.model.toUpperCase()} says ${data.classes[says[0]]}`
      + (fresh.length ? ` on the attacker's latents; of ${fresh.length} other draws ${names}.` : '.');
    byId('plane-text').textContent = `${text} The nearest boundary is at ${number(plane.distance[state.image] / 1000, 2)}.`;
    byId('plane').setAttribute('aria-label', `Decision regions in a plane through the image: ${present.map(c => data.classes[c]).join(', ')}`);
  }

  // ---- everything
  function showControls() {
    for (const name of ['image', 'model', 'norm', 'latents']) {
      for (const input of root.querySelectorAll(`input[name=try-${name}]`)) input.checked = input.value === String(state[name]);
    }
    for (const input of root.querySelectorAll('input[name=try-latents]')) input.disabled = !isRandom();
    for (const name of ['size', 'a', 'b']) byId(name).value = state[name];
    const text = `${NORMS[state.norm]} norm of at most ${radius(state.size)}` + (state.norm === 'linf' && state.size ? ` = ${radii()[state.size].toFixed(3)}` : '');
    byId('size-value').textContent = text;
    byId('size').setAttribute('aria-valuetext', text);
  }
  async function show() {
    const wanted = state.model;
    showControls();
    const sheet = await loadSheet(wanted);
    if (state.model !== wanted) return;
    const now = at(state.size);
    showImages(sheet, now);
    showProbabilities(now);
    showFacts(now);
    showCurve();
    showPlane(sheet);
  }
  function change(what) {
    Object.assign(state, what);
    writeAddress();
    show().catch(fail);
  }
  function fail(error) {
    byId('wait').hidden = false;
    byId('wait').textContent = `The data of this page cannot be shown: ${error.message}.`;
  }
  function radios(name, known, where) {
    for (const [value, text] of Object.entries(known)) {
      const input = make('input', {type: 'radio', name: `try-${name}`, value, id: `try-${name}-${value}`});
      where.append(make('span', {class: 'try-choice'}, input, make('label', {for: input.id}, text)));
    }
    where.addEventListener('change', event => change({[name]: name === 'image' ? Number(event.target.value) : event.target.value}));
  }
  function thumbnails(sheet) {
    for (const k of data.images.keys()) {
      const name = `${data.classes[data.labels[k]]}, test image ${data.images[k]}`;
      const canvas = make('canvas', {width: SIDE, height: SIDE, 'aria-hidden': 'true'});
      const box = byId('images').querySelector(`label[for=try-image-${k}]`);
      paint(canvas, tile(sheet, k, 0));
      box.replaceChildren(canvas, make('span', {class: 'visually-hidden try-hidden'}, name));
      box.title = name;
    }
  }
  async function start() {
    byId('wait').hidden = false;
    const answer = await fetch('try_it.json');
    if (!answer.ok) throw new Error(`try_it.json: ${answer.status}`);
    data = await answer.json();
    state = readAddress();
    radios('image', Object.fromEntries(data.images.map((_, k) => [k, ''])), byId('images'));
    radios('model', Object.fromEntries(Object.keys(data.models).map(m => [m, MODELS[m] ?? m])), byId('models'));
    radios('norm', NORMS, byId('norms'));
    radios('latents', LATENTS, byId('latents'));
    byId('size').max = data.settings.l2.length - 1;
    byId('a').max = byId('b').max = data.settings.shown - 1;
    for (const name of ['size', 'a', 'b']) byId(name).addEventListener('input', event => change({[name]: Number(event.target.value)}));
    byId('plane').addEventListener('click', event => {
      const box = event.target.getBoundingClientRect(), n = data.settings.shown;
      const cell = share => Math.min(n - 1, Math.max(0, Math.floor(n * share)));
      change({a: cell((event.clientX - box.left) / box.width), b: n - 1 - cell((event.clientY - box.top) / box.height)});
    });
    addEventListener('hashchange', () => {
      if (!location.hash.includes('=')) return;  // a heading of this page
      state = readAddress();
      show().catch(fail);
    });
    thumbnails(await loadSheet(state.model));
    for (const part of document.querySelectorAll('.try-it')) part.hidden = false;
    await show();
    byId('wait').hidden = true;
    root.dataset.ready = 'true';
    Object.keys(data.models).forEach(loadSheet);
  }
  start().catch(fail);
})();
