"use strict";

// tiny-decoder's tokenizer: byte-level byte pair encoding, as GPT-2 has it, with every
// digit a token of its own. It gives the ids that the Python library gives.
//
// Unlike the library it never takes typed text for a special token: "<s>" is three
// characters here.

{
  // Runs of letters, of digits or of signs, each with the space before it. The classes
  // are Unicode's: JavaScript's own \s knows other spaces than the library does.
  const SPACE = "\\p{White_Space}";
  const WORDS = new RegExp(
    "'s|'t|'re|'ve|'m|'ll|'d" +
      "| ?\\p{L}+" +
      "| ?\\p{N}+" +
      `| ?[^${SPACE}\\p{L}\\p{N}]+` +
      `|${SPACE}+(?!\\P{White_Space})` +
      `|${SPACE}+`,
    "gu",
  );
  const DIGIT = /(\p{N})/u;

  // GPT-2 writes each of the 256 bytes as a character that can be seen: most bytes of
  // Latin-1 as themselves, the others (the space is one) as those from 256 on.
  function charactersOfBytes() {
    const characters = [];
    let next = 256;
    for (let byte = 0; byte < 256; byte++) {
      const visible =
        (byte >= 33 && byte <= 126) ||
        (byte >= 161 && byte <= 172) ||
        (byte >= 174 && byte <= 255);
      characters.push(String.fromCodePoint(visible ? byte : next++));
    }
    return characters;
  }

  const CHARACTER_OF = charactersOfBytes();
  const BYTE_OF = new Map(CHARACTER_OF.map((character, byte) => [character, byte]));

  // ["a", "b", "a", "b"] with the pair "a b" merged is ["ab", "ab"].
  function mergePair(parts, left, right) {
    const merged = [];
    let i = 0;
    while (i < parts.length) {
      if (parts[i] === left && parts[i + 1] === right) {
        merged.push(left + right);
        i += 2;
      } else {
        merged.push(parts[i]);
        i += 1;
      }
    }
    return merged;
  }

  window.TinyTokenizer = class {
    // tokens: the text of each id. merges: pairs such as "a b", the first learnt first.
    constructor(tokens, merges, startId) {
      this.tokens = tokens;
      this.ids = new Map(tokens.map((token, id) => [token, id]));
      this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
      this.startId = startId;
    }

    // Text to token ids, the start token first.
    encode(text) {
      const ids = [this.startId];
      for (const piece of text.split(DIGIT)) {
        for (const word of piece.match(WORDS) ?? []) {
          ids.push(...this.encodeWord(word));
        }
      }
      return ids;
    }

    encodeWord(word) {
      const bytes = new TextEncoder().encode(word);
      let parts = Array.from(bytes, (byte) => CHARACTER_OF[byte]);
      let pair = this.earliestPair(parts);
      while (pair) {
        parts = mergePair(parts, ...pair);
        pair = this.earliestPair(parts);
      }
      return parts.map((part) => this.ids.get(part));
    }

    // The neighbours that were merged first in training, or null.
    earliestPair(parts) {
      let best = Infinity;
      let pair = null;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank !== undefined && rank < best) {
          best = rank;
          pair = [parts[i], parts[i + 1]];
        }
      }
      return pair;
    }

    // Token ids to text. Bytes that are no whole character become the sign for that.
    decode(ids) {
      const bytes = [];
      for (const id of ids) {
        for (const character of this.tokens[id]) {
          bytes.push(BYTE_OF.get(character));
        }
      }
      return new TextDecoder().decode(Uint8Array.from(bytes));
    }
  };
}
