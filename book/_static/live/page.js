"use strict";

// The live page: the button that loads the model, and what its two panels share. The
// panels themselves are answer.js and forgetting.js.

{
  const page = {
    data: null, // data.js, once it is loaded
    decoder: null,
    tokenizer: null,
    names: { en: "English" },
    firstDay: 10, // one whose month the frozen model does not know in Finnish

    byId(id) {
      return document.getElementById(`live-${id}`);
    },

    element(tag, properties = {}, ...children) {
      const made = Object.assign(document.createElement(tag), properties);
      made.append(...children);
      return made;
    },

    // The ids of what the model is given for a date.
    promptIds(date) {
      return page.tokenizer.encode(`${date.trim()} =`);
    },

    // The ids of an answer, its end token included.
    answerIds(answer) {
      const [, ...ids] = page.tokenizer.encode(` ${answer}`); // no start token
      return [...ids, page.data.config.eos_token_id];
    },

    // The text of an answer, without its end token.
    answerText(ids) {
      const shown = ids.filter((id) => id !== page.data.config.eos_token_id);
      return page.tokenizer.decode(shown).trim() || "nothing";
    },

    // What a token looks like: a space can be seen, and the end has a name.
    tokenText(id) {
      if (id === page.data.config.eos_token_id) {
        return "end";
      }
      return page.tokenizer.decode([id]).replaceAll(" ", "␣");
    },

    // An answer, and whether it is right. right: null where nobody knows.
    showVerdict(where, answer, right) {
      const verdict = page.element("span", { className: "live-verdict" });
      if (right !== null) {
        const correct = answer === right;
        verdict.classList.add(correct ? "live-right" : "live-wrong");
        verdict.textContent = correct ? "right" : `wrong: it is ${right}`;
      }
      where.replaceChildren(page.element("code", {}, answer), " ", verdict);
    },

    // A function that calls `draw` at most once a frame, however fast a slider moves.
    oncePerFrame(draw) {
      let waiting = false;
      return () => {
        if (waiting) {
          return;
        }
        waiting = true;
        requestAnimationFrame(() => {
          waiting = false;
          draw();
        });
      };
    },
  };

  // A page opened from a folder may not read files, but it may run scripts: so the data
  // is a script that sets one variable.
  function load() {
    page.byId("load").disabled = true;
    page.byId("status").textContent = "Loading …";
    const script = document.createElement("script");
    script.src = page.byId("load").dataset.file;
    script.addEventListener("load", start);
    script.addEventListener("error", () => {
      page.byId("load").disabled = false;
      page.byId("status").textContent = "The model did not load. Try once more.";
    });
    document.head.append(script);
  }

  function start() {
    const data = window.tinyDecoderData;
    page.data = data;
    page.decoder = new window.TinyDecoder(data);
    page.tokenizer = new window.TinyTokenizer(
      data.tokens,
      data.merges,
      data.config.bos_token_id,
    );
    for (const [language, adapter] of Object.entries(data.adapters)) {
      page.names[language] = adapter.name;
    }

    document.querySelectorAll(".live-needs-model").forEach((part) => {
      part.hidden = false;
    });
    document.querySelectorAll(".live-before-model").forEach((part) => {
      part.hidden = true;
    });
    page.byId("start").hidden = true;
    page.byId("status").textContent = "";
    page.startAnswer();
    page.startForgetting();
    page.byId("date").focus({ preventScroll: true }); // the button is gone
  }

  document.addEventListener("DOMContentLoaded", () => {
    page.byId("start").hidden = false;
    page.byId("load").addEventListener("click", load);
  });

  window.livePage = page;
}
