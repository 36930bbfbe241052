"use strict";

// tiny-decoder, a Llama of 0.92 million parameters: what happens between a token and
// the next one, with LoRA adapters beside every linear layer.
//
//     const decoder = new TinyDecoder(data);
//     decoder.answer(ids, { adapters: ["fi"], rank: 8, strength: 1 });
//
// A matrix W is {rows, columns, values}, its values row after row.

{
  // --- Six bits a weight -----------------------------------------------------------
  //
  // A letter of base64's alphabet is a number from 0 to 63, and here it is a weight:
  // (letter - 32) / 31, times the scale of its block of 64 weights.

  const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const BLOCK = 64;
  const MIDDLE = 32;
  const STEPS = 31;

  const STEP_OF = new Int8Array(128);
  for (let i = 0; i < LETTERS.length; i++) {
    STEP_OF[LETTERS.charCodeAt(i)] = i - MIDDLE;
  }

  function unpackMatrix({ shape, scales, codes }) {
    const [rows, columns] = shape;
    const scaleOf = unpackHalves(scales);
    const values = new Float32Array(rows * columns);
    for (let i = 0; i < values.length; i++) {
      const scale = scaleOf[Math.floor(i / BLOCK)];
      values[i] = (STEP_OF[codes.charCodeAt(i)] / STEPS) * scale;
    }
    return { rows, columns, values };
  }

  function unpackHalves(base64) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const halves = [];
    for (let at = 0; at < bytes.length; at += 2) {
      halves.push(halfToNumber(view.getUint16(at, true)));
    }
    return halves;
  }

  // A 16-bit float: sign, five bits of exponent, ten of fraction.
  function halfToNumber(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = (bits & 1023) / 1024;
    if (exponent === 0) {
      return sign * fraction * 2 ** -14;
    }
    return sign * (1 + fraction) * 2 ** (exponent - 15);
  }

  function unpackAll(packed) {
    const matrices = {};
    for (const [name, matrix] of Object.entries(packed)) {
      matrices[name] = unpackMatrix(matrix);
    }
    return matrices;
  }

  // --- Vectors -----------------------------------------------------------------------

  function dot(a, b) {
    let sum = 0;
    for (let i = 0; i < a.length; i++) {
      sum += a[i] * b[i];
    }
    return sum;
  }

  // y = W x. Four rows at a time: the processor adds up four sums as fast as one.
  function multiply(W, x) {
    const { rows, columns, values } = W;
    const y = new Float32Array(rows);
    for (let i = 0; i < rows; i += 4) {
      const first = i * columns;
      const second = first + columns;
      const third = second + columns;
      const fourth = third + columns;
      let a = 0;
      let b = 0;
      let c = 0;
      let d = 0;
      for (let j = 0; j < columns; j++) {
        const value = x[j];
        a += values[first + j] * value;
        b += values[second + j] * value;
        c += values[third + j] * value;
        d += values[fourth + j] * value;
      }
      y[i] = a;
      y[i + 1] = b;
      y[i + 2] = c;
      y[i + 3] = d;
    }
    return y;
  }

  // The same of one row alone.
  function dotRow(W, i, x) {
    const start = i * W.columns;
    let sum = 0;
    for (let j = 0; j < W.columns; j++) {
      sum += W.values[start + j] * x[j];
    }
    return sum;
  }

  // y += factor * row i of W, in place.
  function addRow(y, W, i, factor = 1) {
    const start = i * W.columns;
    for (let j = 0; j < W.columns; j++) {
      y[j] += factor * W.values[start + j];
    }
  }

  // y += factor * x, in place.
  function addTo(y, x, factor = 1) {
    for (let i = 0; i < y.length; i++) {
      y[i] += factor * x[i];
    }
  }

  // Scores to probabilities. The largest is subtracted first, or exp would overflow.
  function softmax(scores) {
    const largest = Math.max(...scores);
    const powers = Array.from(scores, (score) => Math.exp(score - largest));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((power) => power / sum);
  }

  function silu(x) {
    return x / (1 + Math.exp(-x));
  }

  function likeliest(logits) {
    let best = 0;
    for (let id = 1; id < logits.length; id++) {
      if (logits[id] > logits[best]) {
        best = id;
      }
    }
    return best;
  }

  // --- The model -----------------------------------------------------------------------

  class TinyDecoder {
    constructor(data) {
      this.config = data.config;
      this.norms = {};
      for (const [name, gains] of Object.entries(data.norms)) {
        this.norms[name] = unpackHalves(gains);
      }
      this.matrices = unpackAll(data.matrices);
      this.adapters = {};
      for (const [language, adapter] of Object.entries(data.adapters)) {
        this.adapters[language] = {
          scaling: adapter.scaling, // alpha / r
          matrices: unpackAll(adapter.tensors),
        };
      }
    }

    // One sequence, from its first token on.
    //
    // setting: the adapters that are on, a list of languages; how many directions of
    // each are used, its rank; and the strength that multiplies alpha / r.
    begin(setting) {
      return new Sequence(this, setting);
    }

    // The scores of what comes after the tokens.
    logits(ids, setting) {
      const sequence = this.begin(setting);
      let logits;
      for (const id of ids) {
        logits = sequence.next(id);
      }
      return logits;
    }

    // The greedy answer: [{id, probabilities}, ...]. The end token comes last, unless
    // the answer has no end.
    answer(ids, setting, longest = 24) {
      const sequence = this.begin(setting);
      const steps = [];
      let logits;
      for (const id of ids) {
        logits = sequence.next(id);
      }
      while (steps.length < longest) {
        const id = likeliest(logits);
        steps.push({ id, probabilities: softmax(logits) });
        if (id === this.config.eos_token_id) {
          break;
        }
        logits = sequence.next(id);
      }
      return steps;
    }

    // What the model would say at each place of an answer that is given: a list of
    // probabilities of every token, one list for each token of the answer.
    follow(ids, answerIds, setting) {
      const sequence = this.begin(setting);
      let logits;
      for (const id of ids) {
        logits = sequence.next(id);
      }
      const places = [];
      for (const id of answerIds) {
        places.push(softmax(logits));
        logits = sequence.next(id);
      }
      return places;
    }

    // The probability of an answer: the product of those of its tokens.
    probability(ids, answerIds, setting) {
      const places = this.follow(ids, answerIds, setting);
      return places.reduce((product, place, i) => product * place[answerIds[i]], 1);
    }
  }

  // The tokens so far: of each layer the keys and values, which need no second pass.
  class Sequence {
    constructor(decoder, { adapters = [], rank = 8, strength = 1 }) {
      this.decoder = decoder;
      this.adapters = adapters.map((language) => decoder.adapters[language]);
      this.rank = rank;
      this.strength = strength;
      this.length = 0;
      this.layers = [];
      for (let i = 0; i < decoder.config.num_hidden_layers; i++) {
        this.layers.push({ keys: [], values: [] });
      }
    }

    // One token in, the scores of the next out.
    next(id) {
      const embedding = this.decoder.matrices["model.embed_tokens"];
      const x = new Float32Array(embedding.columns);
      addRow(x, embedding, id);
      this.layers.forEach((layer, i) => {
        const path = `model.layers.${i}`;
        addTo(x, this.attention(path, layer, this.norm(`${path}.input_layernorm`, x)));
        addTo(x, this.mlp(path, this.norm(`${path}.post_attention_layernorm`, x)));
      });
      this.length += 1;
      return multiply(embedding, this.norm("model.norm", x)); // the head is tied to it
    }

    // y = W x + strength * (alpha / r) * B A x, of B and A the first `rank` directions.
    linear(name, x) {
      const y = multiply(this.decoder.matrices[name], x);
      for (const { scaling, matrices } of this.adapters) {
        const A = matrices[`${name}.A`]; // (r, in)
        const Bt = matrices[`${name}.Bt`]; // (r, out): B, transposed
        for (let k = 0; k < this.rank; k++) {
          const low = dotRow(A, k, x);
          addRow(y, Bt, k, this.strength * scaling * low);
        }
      }
      return y;
    }

    // RMSNorm.
    norm(name, x) {
      const gains = this.decoder.norms[name];
      const meanSquare = dot(x, x) / x.length;
      const factor = 1 / Math.sqrt(meanSquare + this.decoder.config.rms_norm_eps);
      return x.map((value, i) => value * factor * gains[i]);
    }

    attention(path, layer, x) {
      const { num_attention_heads, num_key_value_heads, head_dim } = this.decoder.config;
      const queries = this.rotate(this.linear(`${path}.self_attn.q_proj`, x));
      layer.keys.push(this.rotate(this.linear(`${path}.self_attn.k_proj`, x)));
      layer.values.push(this.linear(`${path}.self_attn.v_proj`, x));

      // Grouped queries: several query heads look at one head of keys and values.
      const group = num_attention_heads / num_key_value_heads;
      const y = new Float32Array(num_attention_heads * head_dim);
      for (let head = 0; head < num_attention_heads; head++) {
        const from = head * head_dim;
        const shared = Math.floor(head / group) * head_dim;
        const query = queries.subarray(from, from + head_dim);
        const scores = layer.keys.map(
          (key) =>
            dot(query, key.subarray(shared, shared + head_dim)) / Math.sqrt(head_dim),
        );
        const mixed = y.subarray(from, from + head_dim);
        softmax(scores).forEach((weight, place) => {
          const value = layer.values[place].subarray(shared, shared + head_dim);
          addTo(mixed, value, weight);
        });
      }
      return this.linear(`${path}.self_attn.o_proj`, y);
    }

    // Rotary positions: in each head the pair (i, i + half) is turned by an angle that
    // grows with the place in the sequence, the slower the larger i.
    rotate(heads) {
      const { head_dim, rope_theta } = this.decoder.config;
      const half = head_dim / 2;
      for (let i = 0; i < half; i++) {
        const angle = this.length / rope_theta ** (i / half);
        const cos = Math.cos(angle);
        const sin = Math.sin(angle);
        for (let at = i; at < heads.length; at += head_dim) {
          const a = heads[at];
          const b = heads[at + half];
          heads[at] = a * cos - b * sin;
          heads[at + half] = b * cos + a * sin;
        }
      }
      return heads;
    }

    mlp(path, x) {
      const gate = this.linear(`${path}.mlp.gate_proj`, x);
      const up = this.linear(`${path}.mlp.up_proj`, x);
      const hidden = gate.map((value, i) => silu(value) * up[i]);
      return this.linear(`${path}.mlp.down_proj`, hidden);
    }
  }

  window.TinyDecoder = TinyDecoder;
}
