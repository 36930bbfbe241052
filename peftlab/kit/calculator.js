"use strict";

// The memory calculator. It reads peftlab/memory/table.json, which the page holds, and
// counts as peftlab/memory/table.py does: whole numbers, so the same to the byte.

{
  const PARTS = ["weights", "gradients", "optimizer", "activations"];
  const LORAS = ["lora", "lora8bit", "qlora"], PACKED = ["lora8bit", "qlora"];

  function share(bytes, gpus) {
    return (bytes + ((gpus - (bytes % gpus)) % gpus)) / gpus; // rounded up, exactly
  }

  function wayOf(table, { model, method, checkpointing, kbit }) {
    const entry = table.models[table.models[model].same ?? model];
    const more = (checkpointing ? ".checkpointing" : "") + (kbit ? ".kbit_prepared" : "");
    return entry.ways[method + more];
  }

  // {part: bytes}: of each part's rows the highest at that batch, length and rank.
  function evaluate(way, letters) {
    const terms = way.terms.map((term) =>
      term.split(" ").reduce((n, letter) => n * (letters[letter] ?? 1), 1));
    const value = (row) => row.reduce((sum, n, i) => sum + n * terms[i], 0);
    const parts = Object.keys(way).filter((part) => !["terms", "trained"].includes(part));
    return Object.fromEntries(
      parts.map((part) => [part, Math.max(...way[part].map(value))]));
  }

  // Bytes of the state, and the most that the optimizer's step makes.
  function optimizerBytes(rule, trained, r) {
    let optimizer = 0, update = 0;
    for (const [count, n, m] of trained) {
      const size = n + m * r;
      if (size < (rule.least ?? 0)) {
        optimizer += count * rule.short * size;
        update = Math.max(update, rule.update.short * size);
        continue;
      }
      optimizer += count * (rule.number * size + (rule.tensor ?? 0));
      if (!rule.update) continue;
      const blocks = Math.ceil(size / rule.blocksize);
      const filling = blocks * rule.blocksize - size;
      const { number, filling: filled, block } = rule.update;
      optimizer += count * rule.block * blocks;
      update = Math.max(update, number * size + filled * filling + block * blocks);
    }
    return { optimizer, update };
  }

  // What a step takes on each GPU, in bytes, and the smallest card that holds it.
  function count(table, settings) {
    const { batch, seq, r, gpus, zero } = settings, way = wayOf(table, settings);
    const found = evaluate(way, { b: batch, s: seq, r });
    const rule = table.optimizers[settings.optimizer];
    const { optimizer, update } = optimizerBytes(rule, way.trained, r);

    // While gradients add up over batches, all of them are there from the start.
    const alone = zero >= 2 || settings.accumulate;
    const step = found.inputs + (zero >= 1 ? share(update, gpus) : update);
    const sizes = {
      weights: zero >= 3 ? share(found.weights, gpus) : found.weights,
      gradients: zero >= 2 ? share(found.gradients, gpus) : found.gradients,
      optimizer: zero >= 1 ? share(optimizer, gpus) : optimizer,
      activations: Math.max(alone ? found.alone : found.whole, step),
    };
    if (zero === 3) sizes.activations += found.block;
    sizes.total = PARTS.reduce((sum, part) => sum + sizes[part], 0);
    sizes.gpu = fits(table, sizes.total, settings.method !== "full");
    return sizes;
  }

  function fits(table, total, bfloat16) {
    const { GiB, context, holes } = table.room;
    for (const [card, size] of Object.entries(table.cards)) {
      if (total > (size * GiB - context) / (1 + holes)) continue;
      const lacks = bfloat16 && table.no_bfloat16.includes(card);
      return lacks ? `${card.slice(0, -1)}, no bfloat16: use float16)` : card;
    }
    return null;
  }

  // One change each: [what, the settings with it], where it can be made.
  function levers(now) {
    const trains = now.method !== "inference", found = [];
    const add = (can, what, change) => can && found.push([what, { ...now, ...change }]);
    const half = { batch: Math.ceil(now.batch / 2), accumulate: trains };
    const next = ["the optimizer's state", "the gradients too", "the weights too"];

    add(trains && !now.checkpointing, "activation checkpointing", { checkpointing: true });
    add(trains && now.optimizer === "adamw", "8-bit Adam", { optimizer: "adamw8bit" });
    add(now.method === "full", "LoRA instead of training all weights", { method: "lora" });
    add(["lora", "lora8bit"].includes(now.method), "a base in 4 bits", { method: "qlora" });
    add(now.batch > 1,
      trains ? "half the batch, with gradients added up over two" : "half the batch", half);
    add(now.gpus > 1 && now.zero < (now.method === "lora8bit" ? 2 : 3),
      `ZeRO ${now.zero + 1}, which divides ${next[now.zero]}`, { zero: now.zero + 1 });
    return found;
  }

  // The lever with the lowest total, as [what, sizes]; undefined where none saves.
  function best(table, now) {
    const total = count(table, now).total;
    const tried = levers(now).map(([what, then]) => [what, count(table, then)]);
    const saves = tried.filter(([, sizes]) => sizes.total < total);
    return saves.sort(([, a], [, b]) => a.total - b.total)[0];
  }

  function gigabytes(bytes) {
    return `${(bytes / 1e9).toFixed(2)} GB`;
  }

  // In the page

  function start(box) {
    const table = JSON.parse(box.querySelector("script[type='application/json']").text);
    const control = Object.fromEntries(
      [...box.querySelectorAll("[name]")].map((each) => [each.name, each]));
    const said = box.querySelector("[role=status]");

    function settings() {
      const method = control.method.value, trains = method !== "inference";
      const gpus = Number(control.gpus.value);
      return {
        model: control.model.value,
        method,
        r: Number(control.r.value), // of the way to train, if it has one
        seq: Number(control.seq.value),
        batch: Number(control.batch.value),
        optimizer: control.optimizer.value,
        checkpointing: trains && control.checkpointing.checked,
        kbit: PACKED.includes(method) && control.kbit.checked,
        gpus,
        zero: gpus > 1 ? Number(control.zero.value) : 0,
      };
    }

    // Turn off what the choices rule out.
    function limit() {
      const method = control.method.value, trains = method !== "inference";
      const most = table.models[control.model.value].positions;
      for (const option of control.seq.options) option.disabled = option.value > most;
      if (control.seq.selectedOptions[0].disabled) {
        const possible = [...control.seq.options].filter((option) => !option.disabled);
        control.seq.value = possible.at(-1).value;
      }
      control.r.disabled = !LORAS.includes(method);
      control.checkpointing.disabled = control.optimizer.disabled = !trains;
      control.kbit.disabled = !PACKED.includes(method);
      control.zero.disabled = control.gpus.value === "1";
      const whole = control.zero.options[3];
      whole.disabled = method === "lora8bit";
      if (whole.disabled && whole.selected) control.zero.value = "2";
    }

    function show() {
      limit();
      const now = settings(), sizes = count(table, now), lever = best(table, now);
      const where = now.gpus > 1 ? `each of ${now.gpus} GPUs` : "one GPU";
      const card = sizes.gpu
        ? `The smallest common card that holds it: ${sizes.gpu}.`
        : `No common card holds it; the largest is the ${Object.keys(table.cards).at(-1)}.`;
      const next = lever
        ? `What helps most next: ${lever[0]}. It leaves ${gigabytes(lever[1].total)}.`
        : "Nothing here saves more.";
      said.textContent = `${gigabytes(sizes.total)} on ${where}. ${card} ${next}`;

      const name = sizes.gpu?.replace(", no bfloat16: use float16", "");
      const room = name ? table.cards[name] * table.room.GiB : sizes.total;
      for (const part of PARTS) {
        const percent = `${(100 * sizes[part]) / room}%`;
        box.querySelector(`.bar .${part}`).style.width = percent;
        box.querySelector(`td.${part}`).textContent = gigabytes(sizes[part]);
      }
      box.querySelector(".scale").textContent =
        name ? `The whole bar is the ${name}.` : "The whole bar is the total.";
      box.dataset.total = sizes.total;
    }

    for (const each of Object.values(control)) each.addEventListener("input", show);
    show();
    box.querySelector(".calculator-live").hidden = false;
    box.querySelector("details").open = false;
    box.dataset.ready = "yes";
  }

  window.memoryCalculator = { count, best, levers };
  document.querySelectorAll(".calculator:not([data-ready])").forEach(start);
}
