"use strict";

// The first panel: a date, the adapters that are on, and what the model answers.

{
  const page = window.livePage;
  const LIKELIEST = 5;
  const MONTH = 6; // where its first digit stands, the space and the year before it

  const daysTaken = {}; // how many dates of each language the reader has taken
  let place = MONTH; // the token of the answer that the bars are about
  const showAnswer = page.oncePerFrame(drawAnswer);

  page.startAnswer = () => {
    for (const language of Object.keys(page.names)) {
      const button = page.element("button", { type: "button" }, page.names[language]);
      button.addEventListener("click", () => takeDate(language));
      page.byId("dates").append(button);
    }
    for (const language of Object.keys(page.data.adapters)) {
      const box = page.element("input", { type: "checkbox", value: language });
      box.addEventListener("change", showAnswer);
      const label = page.element("label", {}, box, page.names[language]);
      page.byId("adapters").append(label);
    }
    for (const id of ["date", "rank", "strength"]) {
      page.byId(id).addEventListener("input", showAnswer);
    }
    document.querySelectorAll("[data-setting]").forEach((button) => {
      button.addEventListener("click", () => {
        setUp(JSON.parse(button.dataset.setting));
      });
    });
    takeDate("fi");
  };

  // --- What the reader sets --------------------------------------------------------------

  // Write the next date of a language into the field.
  function takeDate(language) {
    const day = daysTaken[language] ?? page.firstDay;
    daysTaken[language] = (day + 1) % page.data.dates.days.length;
    page.byId("date").value = page.data.dates[language][day];
    showAnswer();
  }

  // What a button in the list of things to try asks for.
  function setUp({ language, adapters, rank = 8, strength = 1 }) {
    page.byId("date").value = page.data.dates[language][page.firstDay];
    page.byId("rank").value = rank;
    page.byId("strength").value = strength;
    for (const box of page.byId("adapters").querySelectorAll("input")) {
      box.checked = adapters.includes(box.value);
    }
    place = MONTH;
    showAnswer();

    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    page.byId("model").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    page.byId("date").focus({ preventScroll: true });
  }

  function setting() {
    const on = page.byId("adapters").querySelectorAll("input:checked");
    return {
      adapters: Array.from(on, (box) => box.value),
      rank: Number(page.byId("rank").value),
      strength: Number(page.byId("strength").value),
    };
  }

  // The right answer, where the date is one of ours; of a typed one nobody knows it.
  function rightAnswer(date) {
    for (const language of Object.keys(page.names)) {
      const day = page.data.dates[language].indexOf(date.trim());
      if (day >= 0) {
        return page.data.dates.days[day];
      }
    }
    return null;
  }

  // --- What the model answers ------------------------------------------------------------

  function drawAnswer() {
    const chosen = setting();
    const adapted = chosen.adapters.length > 0;
    const date = page.byId("date").value;
    const prompt = page.promptIds(date);

    const steps = page.decoder.answer(prompt, chosen);
    const ids = steps.map((step) => step.id);
    // What the frozen model would say at each place of this answer, and on its own.
    const frozenPlaces = page.decoder.follow(prompt, ids, {});
    const frozenAnswer = page.decoder.answer(prompt, {}).map((step) => step.id);

    page.byId("rank-value").textContent = chosen.rank;
    page.byId("strength-value").textContent = chosen.strength.toFixed(2);
    page.showVerdict(page.byId("answer"), page.answerText(ids), rightAnswer(date));
    page.byId("frozen").hidden = !adapted;
    page.byId("frozen-answer").textContent = page.answerText(frozenAnswer);
    page.byId("adapted-head").hidden = !adapted;
    drawTokens(steps, frozenPlaces, adapted);
  }

  // The answer's tokens, one to be chosen: radio buttons, so that arrow keys move on.
  function drawTokens(steps, frozenPlaces, adapted) {
    const last = steps.length - 1;
    const showPlace = () => {
      drawBars(steps, frozenPlaces, Math.min(place, last), adapted);
    };

    const labels = steps.map((step, i) => {
      const radio = page.element("input", { type: "radio", name: "live-place" });
      radio.checked = i === Math.min(place, last);
      radio.addEventListener("change", () => {
        place = i;
        showPlace();
      });
      const text = page.element("span", {}, page.tokenText(step.id));
      return page.element("label", {}, radio, text);
    });
    page.byId("tokens").replaceChildren(...labels);
    showPlace();
  }

  // The likeliest tokens at one place, and beside each what the frozen model gives it.
  function drawBars(steps, frozenPlaces, at, adapted) {
    const { probabilities } = steps[at];
    const before = steps.slice(0, at).map((step) => step.id);
    const written = page.answerText(before);
    page.byId("place").textContent =
      written === "nothing" ? "at the start" : `after ${written}`;

    const likeliest = Array.from(probabilities.keys());
    likeliest.sort((a, b) => probabilities[b] - probabilities[a]);
    const rows = likeliest.slice(0, LIKELIEST).map((id) => {
      const adaptedTo = adapted ? probabilities[id] : null;
      return barRow(id, adaptedTo, frozenPlaces[at][id]);
    });
    page.byId("rows").replaceChildren(...rows);
  }

  function barRow(id, adapted, frozen) {
    const text = page.element("code", {}, page.tokenText(id));
    const row = page.element("tr", {}, page.element("th", { scope: "row" }, text));
    const bars = page.element("td", { className: "live-bars" });
    row.append(bars);
    if (adapted !== null) {
      bars.append(bar(adapted, "live-bar live-trained"));
      row.append(page.element("td", {}, percent(adapted)));
    }
    bars.append(bar(frozen, "live-bar"));
    row.append(page.element("td", {}, percent(frozen)));
    return row;
  }

  function bar(probability, className) {
    const made = page.element("div", { className });
    made.style.width = `${100 * probability}%`;
    return made;
  }

  function percent(probability) {
    return `${(100 * probability).toFixed(1)}%`;
  }
}
