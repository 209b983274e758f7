"use strict";
// Draws which tokens each step recomputed.  What is shown is kept in the address: #step=7&layer=2.
(() => {
  const scene = JSON.parse(document.getElementById("trace").textContent);
  const $ = (id) => document.getElementById(id);
  const ORANGE = [232, 119, 24], BLUE = [47, 111, 178];
  const AGES = [ORANGE, [185, 227, 198], [134, 205, 185], [86, 180, 180], [58, 151, 174],
    [58, 121, 168], [69, 92, 157], [87, 69, 140], [107, 47, 114]];
  const HEAT = [[42, 31, 77], [75, 63, 158], [31, 127, 139], [87, 183, 112], [244, 224, 77]];
  const MOST_THUMBS = 64;
  const state = { step: 0, part: 0, module: "", layer: -1, row: 0, frame: 0, beneath: "" };
  const decoded = new Map();
  const aged = new Map();
  const pictures = new Map();
  let timer = 0;

  // --- tokens ------------------------------------------------------------------------------

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const part = () => scene.parts[state.part];
  const masks = () => part().modules.find((one) => one.module === state.module);

  function arrays(module) {
    if (!decoded.has(module)) {
      decoded.set(module, { counts: bytes(module.counts), bits: bytes(module.bits) });
    }
    return decoded.get(module);
  }

  // For each token the share of the chosen layers that recomputed it in a step of the run.
  function shares(step) {
    const module = masks(), at = step - part().first, N = module.tokens;
    if (at < 0 || at >= part().steps) return null;
    const { counts, bits } = arrays(module);
    const found = new Float32Array(N), rows = module.rows.length, layers = module.layers.length;
    const start = state.layer < 0
      ? (at * rows + state.row) * N
      : ((at * layers + state.layer) * rows + state.row) * N;
    for (let n = 0; n < N; n++) {
      const i = start + n;
      found[n] = state.layer < 0 ? counts[i] / layers : (bits[i >> 3] >> (7 - (i & 7))) & 1;
    }
    return found;
  }

  // For each step of the part and each token its age after the step, mean of the chosen layers.
  function ages() {
    const module = masks(), key = [state.part, state.module, state.layer, state.row].join();
    if (aged.has(key)) return aged.get(key);
    const { bits } = arrays(module);
    const N = module.tokens, rows = module.rows.length, layers = module.layers.length;
    const chosen = state.layer < 0 ? module.layers.map((_, at) => at) : [state.layer];
    const found = Array.from({ length: part().steps }, () => new Float32Array(N));
    for (const layer of chosen) {
      const age = new Int32Array(N);
      for (let at = 0; at < part().steps; at++) {
        const start = ((at * layers + layer) * rows + state.row) * N;
        for (let n = 0; n < N; n++) {
          const i = start + n;
          age[n] = (bits[i >> 3] >> (7 - (i & 7))) & 1 ? 0 : age[n] + 1;
          found[at][n] += age[n] / chosen.length;
        }
      }
    }
    aged.clear();  // of a video they are large
    aged.set(key, found);
    return found;
  }

  function isFull(step) {
    const rows = masks().full[step - part().first];
    return state.layer < 0 ? rows.every(Boolean) : rows[state.layer];
  }

  // [frames, rows, columns]; tokens of a text stand in lines.
  function grid() {
    const { grid: known, tokens } = masks();
    if (!known) {
      const columns = Math.min(tokens, 32);
      return [1, Math.ceil(tokens / columns), columns];
    }
    return known.length === 3 ? known : [1, ...known];
  }

  const onPicture = () => masks().grid !== null;

  // --- pictures ----------------------------------------------------------------------------

  function imageFrame(count) {
    const [frames] = grid();
    return frames > 1 ? Math.round((state.frame * (count - 1)) / (frames - 1)) : 0;
  }

  function beneath(step) {
    if (!onPicture() || state.beneath === "none") return null;
    const sample = masks().rows[state.row].sample;
    if (state.beneath === "step") {
      const known = Object.keys(scene.samples).map(Number).sort((a, b) => a - b);
      const at = known.filter((one) => one < step).pop() ?? known[0];
      const list = scene.samples[at]?.[sample];
      if (list) return load(list[imageFrame(list.length)]);
    }
    const all = document.querySelectorAll(`img[data-column="ToCa"][data-sample="${sample}"]`);
    return all.length ? all[imageFrame(all.length)] : null;
  }

  function load(source) {
    if (!pictures.has(source)) {
      const image = new Image();
      image.onload = () => draw();
      image.src = source;
      pictures.set(source, image);
    }
    return pictures.get(source);
  }

  function size(canvas, width) {
    const [, rows, columns] = grid();
    const height = Math.max(1, Math.round((width * rows) / columns));
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    return canvas.getContext("2d");
  }

  // Fills every cell of the frame with a colour [r, g, b, a], or leaves it out.
  function cells(context, colour) {
    const [, rows, columns] = grid(), { width, height } = context.canvas;
    const first = onPicture() ? state.frame * rows * columns : 0;
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++) {
        const n = first + y * columns + x;
        if (n >= masks().tokens) return;
        const [r, g, b, a] = colour(n);
        if (a <= 0) continue;
        const left = Math.round((x * width) / columns), top = Math.round((y * height) / rows);
        const right = Math.round(((x + 1) * width) / columns);
        const bottom = Math.round(((y + 1) * height) / rows);
        context.fillStyle = `rgba(${r},${g},${b},${a})`;
        context.fillRect(left, top, right - left, bottom - top);
      }
    }
  }

  function paint(canvas, width, step) {
    const context = size(canvas, width);
    context.fillStyle = "#30343b";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const image = beneath(step);
    if (image && image.complete && image.naturalWidth) {
      context.imageSmoothingEnabled = image.naturalWidth >= 128;
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
    }
    const share = shares(step);
    if (!share) return;
    if (isFull(step)) {
      context.fillStyle = `rgba(${BLUE.join()},0.28)`;
      context.fillRect(0, 0, canvas.width, canvas.height);
    } else {
      cells(context, (n) => [...ORANGE, 0.8 * share[n]]);
    }
  }

  // The colour at a place in a palette, 0 to its length - 1.
  function between(palette, place) {
    const at = Math.min(place, palette.length - 1), low = Math.min(Math.floor(at), palette.length - 2);
    return palette[low].map((one, i) => Math.round(one + (at - low) * (palette[low + 1][i] - one)));
  }

  // --- the page ----------------------------------------------------------------------------

  const number = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(1));

  function describe(step) {
    const share = shares(step);
    if (!share) return { short: "not run", long: `Step ${step}: this model did not run.`, full: false };
    const N = masks().tokens, count = share.reduce((a, b) => a + b, 0);
    const percent = ((100 * count) / N).toFixed(1);
    const full = isFull(step);
    const where = state.layer < 0 ? `mean of ${masks().layers.length} layers`
      : `layer ${masks().layers[state.layer]}`;
    const rounded = number(Math.round(10 * count) / 10);
    return {
      full,
      short: full ? "full" : `${percent} %`,
      long: `Step ${step} (0 to ${scene.steps - 1}), ${full ? "full" : "cached"}: ${rounded} of ` +
        `${N} tokens of ${state.module} recomputed (${percent} %), ${where}.`,
    };
  }

  function drawHeat() {
    const total = new Float32Array(masks().tokens);
    let cached = 0;
    for (let step = 0; step < scene.steps; step++) {
      const share = shares(step);
      if (!share || isFull(step)) continue;
      cached++;
      share.forEach((one, n) => { total[n] += one; });
    }
    const most = total.reduce((a, b) => Math.max(a, b), 0);
    const least = total.reduce((a, b) => Math.min(a, b), Infinity);
    const context = size($("heat"), 640);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    const scale = most > least ? (HEAT.length - 1) / (most - least) : 0;
    cells(context, (n) => [...between(HEAT, (total[n] - least) * scale), 1]);
    const mean = total.reduce((a, b) => a + b, 0) / total.length;
    $("heat-state").textContent = cached === 0 ? "No step of it was cached."
      : `How often each token was recomputed in ${cached} cached steps: ${number(
        Math.round(10 * least) / 10)} to ${number(Math.round(10 * most) / 10)} times, ` +
        `${mean.toFixed(1)} on average.`;
  }

  function drawAge() {
    const found = ages()[state.step - part().first];
    const context = size($("age"), 640);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    if (!found) {
      $("age-state").textContent = "";
      return;
    }
    cells(context, (n) => [...between(AGES, found[n]), 1]);
    const mean = found.reduce((a, b) => a + b, 0) / found.length;
    const oldest = found.reduce((a, b) => Math.max(a, b), 0);
    $("age-state").textContent = `Ages after step ${state.step}: ${mean.toFixed(2)} steps on ` +
      `average, ${number(Math.round(10 * oldest) / 10)} at most.`;
  }

  function drawStrip() {
    for (const button of $("strip").children) {
      const step = Number(button.dataset.step), said = describe(step);
      paint(button.querySelector("canvas"), 72, step);
      button.querySelector("span").textContent = `${step}: ${said.short}`;
      button.classList.toggle("is-full", said.full);
      button.setAttribute("aria-label", said.long);
    }
  }

  function drawStep() {
    paint($("overlay"), 640, state.step);
    drawAge();
    const said = describe(state.step);
    $("state").textContent = said.long;
    $("overlay").setAttribute("aria-label", `Tokens recomputed in step ${state.step}`);
    $("step").value = state.step;
    $("step").setAttribute("aria-valuetext", said.long);
    for (const button of $("strip").children) {
      if (Number(button.dataset.step) === state.step) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
    }
  }

  function draw() {
    for (const image of document.querySelectorAll("img.frame")) {
      const all = image.parentElement.children.length;
      image.hidden = Number(image.dataset.frame) !== imageFrame(all);
    }
    for (const figure of document.querySelectorAll("figure.ages")) {
      const { part: at, module } = figure.dataset;
      figure.hidden = Number(at) !== state.part || module !== state.module;
    }
    drawStrip();
    drawHeat();
    drawStep();
  }

  // --- choices -----------------------------------------------------------------------------

  function options(id, entries, value) {
    const select = $(id);
    select.replaceChildren(...entries.map(([key, text]) => new Option(text, key)));
    select.value = String(value);
    select.parentElement.hidden = entries.length < 2;
  }

  function rowName({ sample, half }) {
    const text = scene.captions[sample] ?? `sample ${sample}`;
    const name = text.length > 40 ? `${text.slice(0, 39)}…` : text;
    return half ? `${name} (half ${half} of the batch)` : name;
  }

  // Choices that exist, whatever the address or another choice asked for.
  function settle() {
    const within = (value, count) => Math.min(Math.max(Math.trunc(value) || 0, 0), count - 1);
    state.part = within(state.part, scene.parts.length);
    const modules = part().modules;
    if (!masks()) state.module = modules[0].module;
    const module = masks();
    state.layer = state.layer < 0 ? -1 : within(state.layer, module.layers.length);
    state.row = within(state.row, module.rows.length);
    state.step = within(state.step, scene.steps);
    state.frame = within(state.frame, grid()[0]);
    if (![...$("beneath").options].some((one) => one.value === state.beneath)) {
      state.beneath = $("beneath").options[0].value;
    }
    options("part", scene.parts.map((one, at) => [at, one.name]), state.part);
    options("module", modules.map((one) => [one.module, one.module]), state.module);
    const some = module.layers.length < module.all ? `, mean of ${module.layers.length}` : ", mean";
    options("layer", [[-1, `all layers${some}`], ...module.layers.map((one, at) => [at, `layer ${one}`])],
      state.layer);
    options("row", module.rows.map((one, at) => [at, rowName(one)]), state.row);
    $("beneath").value = state.beneath;
    $("frame-label").hidden = grid()[0] < 2;
    $("frame").max = grid()[0] - 1;
    $("frame").value = state.frame;
  }

  function fromAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const numbered = ["part", "step", "row", "frame"].filter((key) => asked.has(key));
    for (const key of numbered) state[key] = Number(asked.get(key));
    for (const key of ["module", "beneath"].filter((one) => asked.has(one))) state[key] = asked.get(key);
    settle();
    if (asked.has("layer")) {  // an address names a layer by its number in the model
      state.layer = masks().layers.indexOf(Number(asked.get("layer")));
      settle();
    }
  }

  function toAddress() {
    const said = new URLSearchParams({
      step: state.step, part: state.part, module: state.module, row: state.row, frame: state.frame,
      layer: state.layer < 0 ? -1 : masks().layers[state.layer], beneath: state.beneath,
    });
    history.replaceState(null, "", `#${said}`);
  }

  function go(step) {
    state.step = step;
    drawStep();
  }

  function play(on) {
    clearInterval(timer);
    timer = on ? setInterval(() => go((state.step + 1) % scene.steps), 300) : 0;
    $("play").textContent = on ? "Pause" : "Play";
    if (!on) toAddress();
  }

  function choose(key, value) {
    state[key] = value;
    settle();
    if (!shares(state.step)) state.step = part().first;  // of a model that has not run yet
    draw();
    toAddress();
  }

  const every = Math.ceil(scene.steps / MOST_THUMBS);
  for (let step = 0; step < scene.steps; step += every) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.step = step;
    button.append(document.createElement("canvas"), document.createElement("span"));
    button.addEventListener("click", () => { play(false); go(step); toAddress(); });
    $("strip").append(button);
  }
  for (const id of ["part", "layer", "row"]) {
    $(id).addEventListener("change", (event) => choose(id, Number(event.target.value)));
  }
  for (const id of ["module", "beneath"]) {
    $(id).addEventListener("change", (event) => choose(id, event.target.value));
  }
  $("frame").addEventListener("input", (event) => choose("frame", Number(event.target.value)));
  $("step").addEventListener("input", (event) => {
    play(false);
    go(Number(event.target.value));
    toAddress();
  });
  $("play").addEventListener("click", () => play(!timer));
  addEventListener("hashchange", () => { fromAddress(); draw(); });

  settle();
  // A cached step in the middle says more than the first, which is full.
  const middle = Math.floor(scene.steps / 2);
  const later = Array.from({ length: scene.steps - middle }, (_, at) => middle + at);
  state.step = later.find((step) => shares(step) && !isFull(step)) ?? middle;
  fromAddress();
  draw();
  addEventListener("load", draw);
})();
