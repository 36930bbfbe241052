"use strict";

// Quantizes the weights that are chosen, and draws what comes of it. `fround` stands
// wherever nf4.py computes in float32, so that every code and every absmax is the same.

{
  const { fround } = Math;
  const TINY = fround(1e-38);
  const LEFT = 14, RIGHT = 346, TOP = 16, AXIS = 122, BOTTOM = 194; // of the levels
  const BINS = 64;

  // The sixteen values, and the midpoint above each but the last, from small to large.
  function sorted(code) {
    const order = [...code.keys()].sort((a, b) => code[a] - code[b]);
    const values = order.map((at) => code[at]);
    const midpoints = values.slice(1).map((v, i) => fround(v + values[i]) / 2);
    return { order, midpoints };
  }

  // What nf4.quantize makes of the weights, before it packs two indices into a byte.
  function quantize(weights, size, code) {
    const { order, midpoints } = sorted(code);
    const absmax = new Float32Array(Math.ceil(weights.length / size));
    const divided = new Float32Array(weights.length);
    const indices = new Uint8Array(weights.length);

    for (let block = 0; block < absmax.length; block++) {
      const start = block * size, end = Math.min(start + size, weights.length);
      let largest = 0;
      for (let i = start; i < end; i++) {
        largest = Math.max(largest, Math.abs(weights[i]));
      }
      const divisor = Math.max(largest, TINY), factor = fround(1 / divisor);
      const isWhole = end - start === size; // a partial block is divided, as in nf4.py
      absmax[block] = isWhole ? largest : divisor;

      for (let i = start; i < end; i++) {
        divided[i] = isWhole ? weights[i] * factor : weights[i] / divisor;
        let rank = 0;
        while (divided[i] > midpoints[rank]) { // above the last there is none: false
          rank++;
        }
        indices[i] = order[rank];
      }
    }
    return { indices, absmax, divided };
  }

  // The errors over the root mean square (RMS) of the weights, and each index's count.
  function measure(weights, size, code) {
    const { indices, absmax, divided } = quantize(weights, size, code);
    const counts = new Array(code.length).fill(0);
    let squares = 0, lost = 0, largest = 0;
    weights.forEach((weight, i) => {
      const stored = fround(code[indices[i]] * absmax[Math.floor(i / size)]);
      const error = Math.abs(stored - weight);
      squares += weight * weight;
      lost += error * error;
      largest = Math.max(largest, error);
      counts[indices[i]]++;
    });
    largest /= Math.sqrt(squares / weights.length);
    return { rms: Math.sqrt(lost / squares), largest, counts, divided };
  }

  // Lloyd's algorithm from `start`: each weight to the nearest value, each value to the
  // mean of its weights, which count by the square of their absmax. Sorted weights with
  // the sums in front of each place make a round quick.
  function lloyd(weights, size, start, rounds) {
    const { absmax, divided } = quantize(weights, size, start);
    const order = Uint32Array.from(divided.keys());
    order.sort((a, b) => divided[a] - divided[b] || a - b);
    const line = Float32Array.from(order, (at) => divided[at]);
    const mass = new Float64Array(line.length + 1), moment = mass.slice();
    order.forEach((at, i) => {
      const scale = absmax[Math.floor(at / size)], counts = scale * scale;
      mass[i + 1] = mass[i] + counts;
      moment[i + 1] = moment[i] + counts * line[i];
    });

    let values = Float64Array.from(start);
    for (let round = 0; round < rounds; round++) {
      const ends = [0];
      for (let i = 1; i < values.length; i++) {
        ends.push(countUpTo(line, (values[i] + values[i - 1]) / 2));
      }
      ends.push(line.length);
      values = values.map((value, i) => {
        const own = mass[ends[i + 1]] - mass[ends[i]];
        return own > 0 ? (moment[ends[i + 1]] - moment[ends[i]]) / own : value;
      });
    }
    return Float32Array.from(values);
  }

  // How many of the sorted numbers are at most `limit`.
  function countUpTo(line, limit) {
    let low = 0, high = line.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (line[middle] <= limit) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // The sets of weights. Numbers at random come from Lehmer's generator.
  function draw(name, outlier, { count, seeds, layer }) {
    if (name === "minilm") { // bfloat16 is the upper half of a float32
      const bytes = Uint8Array.from(atob(layer), (letter) => letter.charCodeAt(0));
      const halves = new Uint16Array(bytes.buffer);
      return new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer);
    }
    const [u, v] = seeds.map((state) => Float64Array.from({ length: count }, () => {
      state = (state * 48271) % 2147483647;
      return state / 2147483647;
    }));
    if (name === "uniform") return Float32Array.from(u, (a) => 2 * a - 1);

    const normal = Float32Array.from(
      u, (a, i) => Math.sqrt(-2 * Math.log(a)) * Math.cos(2 * Math.PI * v[i]));
    if (name === "outlier") normal[Math.floor(count / 3)] = outlier;
    return normal;
  }

  function add(svg, name, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) {
      made.setAttribute(key, value);
    }
    made.textContent = text;
    svg.append(made);
  }

  const percent = (share) => `${(100 * share).toFixed(1)}%`;

  // Above the axis the weights over their absmax, below it each level's share of them.
  function drawLevels(svg, { divided, counts }, code) {
    const x = (value) => LEFT + ((value + 1) * (RIGHT - LEFT)) / 2;
    const bins = new Array(BINS).fill(0);
    for (const value of divided) {
      bins[Math.min(BINS - 1, Math.floor(((value + 1) * BINS) / 2))]++;
    }
    const shares = new Map(); // two indices may stand for the same level
    [...code].forEach((value, i) => {
      shares.set(value, (shares.get(value) ?? 0) + counts[i] / divided.length);
    });
    const levels = [...shares].sort(([a], [b]) => a - b);

    svg.replaceChildren();
    const list = levels.map(([at, share]) => `${at.toFixed(3)}: ${percent(share)}`);
    const label = `Share of the weights that each level gets. ${list.join(", ")}.`;
    svg.setAttribute("aria-label", label);

    const wide = (RIGHT - LEFT) / BINS, tall = (AXIS - TOP) / Math.max(...bins);
    bins.forEach((bin, i) => {
      const y = AXIS - bin * tall;
      const place = { x: LEFT + i * wide, y, width: wide - 0.5, height: bin * tall };
      add(svg, "rect", { ...place, class: "weights" });
    });

    const scale = (BOTTOM - AXIS - 4) / Math.max(0.2, ...shares.values());
    for (const [level, share] of levels) {
      const place = { x: x(level) - 2, y: AXIS - 4, rx: 1, width: 4 };
      add(svg, "rect", { ...place, height: 4 + share * scale, class: "hue" });
    }
    const equal = AXIS + scale / 16;
    add(svg, "line", { x1: LEFT, x2: RIGHT, y1: equal, y2: equal, class: "equal" });
    const low = { x: LEFT - 8, y: BOTTOM - 6 }, right = { x: RIGHT + 8, y: BOTTOM - 6 };
    add(svg, "text", { x: LEFT - 8, y: 11 }, "the weights");
    add(svg, "text", { ...low, class: "hue" }, "what each level gets");
    add(svg, "text", { ...right, "text-anchor": "end" }, "dashed: 1/16 each");
    for (const value of [-1, -0.5, 0, 0.5, 1]) {
      const place = { x: x(value), y: BOTTOM + 14, "text-anchor": "middle" };
      add(svg, "text", place, String(value).replace("-", "−"));
    }
    const middle = { x: (LEFT + RIGHT) / 2, y: BOTTOM + 31, "text-anchor": "middle" };
    add(svg, "text", middle, "weight / absmax of its block");
  }

  // The error at every block size, a curve for each type: {NF4: [0.08, ...], ...}.
  function drawErrors(svg, curves, type, at, sizes) {
    const left = 34, right = 268, top = 20, bottom = 192;
    const highest = Math.max(...Object.values(curves).flat());
    const step = highest > 0.25 ? 0.1 : 0.05, most = Math.ceil(highest / step) * step;
    const x = (i) => left + 6 + (i * (right - left - 12)) / (sizes.length - 1);
    const y = (error) => bottom - (error / most) * (bottom - top);

    svg.replaceChildren();
    const list = sizes.map((size, i) => `${curves[type][i].toFixed(4)} at ${size}`);
    svg.setAttribute("aria-label", `Relative RMS error, ${type}: ${list.join(", ")}.`);
    add(svg, "text", { x: 4, y: 11 }, "relative RMS error");
    for (let error = 0; error < most + step / 2; error += step) {
      add(svg, "line", { x1: left, x2: right, y1: y(error), y2: y(error) });
      const place = { x: left - 5, y: y(error) + 4, "text-anchor": "end" };
      add(svg, "text", place, error ? error.toFixed(step < 0.1 ? 2 : 1) : 0);
    }
    sizes.forEach((size, i) => {
      if (i % 2) return;
      const place = { x: x(i), "text-anchor": "middle" };
      add(svg, "text", { ...place, y: bottom + 16 }, size);
      add(svg, "text", { ...place, y: bottom + 32 }, (4 + 32 / size).toFixed(2));
    });
    add(svg, "text", { x: right + 14, y: bottom + 16 }, "block size");
    add(svg, "text", { x: right + 14, y: bottom + 32 }, "bits a weight");

    add(svg, "line", { x1: x(at), x2: x(at), y1: top, y2: bottom, class: "here" });
    const end = (name) => y(curves[name].at(-1));
    let lowest = 0; // a name stands beside its curve's end, and not on another
    for (const name of Object.keys(curves).sort((a, b) => end(a) - end(b))) {
      lowest = Math.max(lowest + 13, end(name) + 4);
      const place = { x: right, y: lowest, class: name === type ? "hue" : "other" };
      add(svg, "text", place, name);
    }
    for (const name of [...Object.keys(curves).filter((n) => n !== type), type]) {
      const points = curves[name].map((error, i) => `${x(i)},${y(error)}`).join(" ");
      add(svg, "polyline", { points, class: name === type ? "chosen" : "other" });
    }
    add(svg, "circle", { cx: x(at), cy: y(curves[type][at]), r: 6, class: "hue" });
  }

  function start(box) {
    const data = JSON.parse(box.querySelector("script").textContent);
    const { sizes, outliers, rounds } = data;
    const [distribution, type, size, outlier] = box.querySelectorAll("select, input");
    const [sizeSaid, outlierSaid] = box.querySelectorAll("label span");
    const [levels, curve] = box.querySelectorAll("svg");
    const said = box.querySelector("[role=status]");
    const codes = {};
    for (const [name, code] of Object.entries(data.codes)) {
      codes[name] = Float32Array.from(code);
    }
    const known = new Map(); // what was computed for a set of weights

    // The weights, and for each type a code and an error at every block size.
    function explore(name, large) {
      const weights = draw(name, large, data), used = {}, curves = {};
      for (const kind of [...Object.keys(codes), data.best]) {
        used[kind] = sizes.map(
          (each) => codes[kind] ?? lloyd(weights, each, codes.NF4, rounds));
        curves[kind] = sizes.map(
          (each, i) => measure(weights, each, used[kind][i]).rms);
      }
      return { weights, used, curves };
    }

    function show() {
      const at = Number(size.value), large = outliers[outlier.value];
      const each = sizes[at], isOutlier = distribution.value === "outlier";
      const key = distribution.value + (isOutlier ? large : "");
      if (!known.has(key)) known.set(key, explore(distribution.value, large));
      const { weights, used, curves } = known.get(key);
      const code = used[type.value][at], measured = measure(weights, each, code);

      box.dataset.type = type.value;
      outlier.parentElement.hidden = !isOutlier;
      sizeSaid.textContent = each;
      outlierSaid.textContent = `${large} std`;
      size.setAttribute("aria-valuetext", `${each} weights`);
      outlier.setAttribute("aria-valuetext", `${large} standard deviations`);
      said.textContent =
        `${type.value}, blocks of ${each}: relative RMS error ` +
        `${measured.rms.toFixed(4)}, largest error ${measured.largest.toFixed(2)} of ` +
        `the weights' RMS. ${(4 + 32 / each).toFixed(3)} bits a weight; ` +
        `${(4 + 8 / each + 32 / (256 * each)).toFixed(3)} with double quantization.`;
      drawLevels(levels, measured, code);
      drawErrors(curve, curves, type.value, at, sizes);
    }

    for (const control of [distribution, type, size, outlier]) {
      control.addEventListener("input", show);
    }
    show();
    box.querySelector(".nf4-live").hidden = false;
    box.querySelector("details").open = false;
    box.nf4 = { data, quantize, measure, lloyd, draw }; // for tests and the curious
    box.dataset.ready = "yes";
  }

  document.querySelectorAll(".nf4-explorer:not([data-ready])").forEach(start);
}
