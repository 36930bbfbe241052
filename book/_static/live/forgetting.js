"use strict";

// The second panel: one day in two languages, as an adapter grows stronger.

{
  const page = window.livePage;
  const STRENGTHS = Array.from({ length: 16 }, (_, i) => i / 10); // 0 to 1.5

  let day = page.firstDay;
  let latest = null; // the curves being drawn: others, begun before, stop
  const showAnswers = page.oncePerFrame(drawAnswers);

  page.startForgetting = () => {
    const menu = page.byId("language");
    for (const language of Object.keys(page.data.adapters)) {
      const name = page.names[language];
      menu.append(page.element("option", { value: language }, name));
    }
    menu.value = "fi";
    menu.addEventListener("change", drawAll);
    page.byId("amount").addEventListener("input", showAnswers);
    page.byId("day").addEventListener("click", () => {
      day = (day + 1) % page.data.dates.days.length;
      drawAll();
    });
    drawAll();
  };

  function drawAll() {
    showAnswers();
    drawCurves();
  }

  // --- The two answers -------------------------------------------------------------------

  function drawAnswers() {
    const language = page.byId("language").value;
    const strength = Number(page.byId("amount").value);
    const setting = { adapters: [language], strength };

    page.byId("amount-value").textContent = strength.toFixed(2);
    page.byId("new-name").textContent = page.names[language];
    drawSide("new", language, setting);
    drawSide("english", "en", setting);

    page.byId("now").setAttribute("x1", strength);
    page.byId("now").setAttribute("x2", strength);
  }

  function drawSide(side, language, setting) {
    const date = page.data.dates[language][day];
    const steps = page.decoder.answer(page.promptIds(date), setting);
    const answer = page.answerText(steps.map((step) => step.id));
    page.byId(`${side}-date`).textContent = date;
    page.showVerdict(page.byId(`${side}-answer`), answer, page.data.dates.days[day]);
  }

  // --- The two curves --------------------------------------------------------------------

  // Point by point, with a pause after each, so that the page stays awake.
  async function drawCurves() {
    const language = page.byId("language").value;
    const curves = { new: [], english: [] };
    latest = curves;
    page.byId("curve-name").textContent = page.names[language];
    page.byId("chart").dataset.points = 0;

    for (const strength of STRENGTHS) {
      await new Promise((resume) => setTimeout(resume));
      if (latest !== curves) {
        return;
      }
      const setting = { adapters: [language], strength };
      curves.new.push(probabilityOfRight(language, setting));
      curves.english.push(probabilityOfRight("en", setting));
      drawCurve("new", curves.new);
      drawCurve("english", curves.english);
      page.byId("chart").dataset.points = curves.new.length;
    }
    describe(curves, language);
  }

  function probabilityOfRight(language, setting) {
    const prompt = page.promptIds(page.data.dates[language][day]);
    const answer = page.answerIds(page.data.dates.days[day]);
    return page.decoder.probability(prompt, answer, setting);
  }

  // The drawing's own coordinates are strength and probability.
  function drawCurve(side, probabilities) {
    const points = probabilities.map((p, i) => `${STRENGTHS[i]},${p}`);
    page.byId(`${side}-curve`).setAttribute("points", points.join(" "));
  }

  // The curves in words, for those who hear the page.
  function describe(curves, language) {
    const inWords = (probabilities) =>
      [0, 0.5, 1, 1.5]
        .map((strength) => {
          const p = probabilities[STRENGTHS.indexOf(strength)];
          return `${p.toFixed(2)} at strength ${strength}`;
        })
        .join(", ");
    page
      .byId("chart")
      .setAttribute(
        "aria-label",
        "Probability of the right answer. " +
          `${page.names[language]}: ${inWords(curves.new)}. ` +
          `English: ${inWords(curves.english)}.`,
      );
  }
}
