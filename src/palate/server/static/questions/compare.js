// Which of two is better, by how much, or neither: one scale from "A is much better" to "B is much better".

import { announce, h } from "../dom.js";
import { row } from "./choices.js";

export function make({ question, responses, changed, t }) {
  const [left, right] = responses;
  const steps = [];
  for (let strength = question.strengths; strength >= 1; strength -= 1) steps.push({ response: left, strength });
  if (question.tie) steps.push({ neither: "tie" });
  for (let strength = 1; strength <= question.strengths; strength += 1) steps.push({ response: right, strength });
  if (question.both_bad) steps.push({ neither: "both_bad" });
  const nameOf = (step) => step.neither || `${step.response.id}:${step.strength}`;
  const saidOf = (step) => step.neither ? t(step.neither) : strengthText(step.response.letter, step.strength, question.strengths, t);
  const byName = new Map(steps.map((step) => [nameOf(step), step]));
  const scale = row("radio", steps.map((step) => ({
    value: nameOf(step),
    label: step.neither ? t(step.neither) : shortText(step, question, t),
    title: saidOf(step),
    key: keyOf(step, question, left),
    tone: step.neither ? `neither ${step.neither}` : `side ${step.response === left ? "left" : "right"} s${step.strength}`,
  })), { label: question.text || t("ask_compare"), onchange: () => show(), className: `scale of-${steps.length}` });
  const hint = h("p", { class: "quiet said", "aria-live": "off" });
  const element = h("div", {},
    question.strengths > 1 ? h("div", { class: "ends", "aria-hidden": "true" }, h("span", {}, t("better_end", { letter: left.letter })), h("span", {}, t("better_end", { letter: right.letter }))) : null,
    scale.element, hint);
  let side = null; // chosen by its letter, its strength still missing

  function show(aloud = false) {
    const step = byName.get(scale.chosen()[0]);
    hint.textContent = step ? saidOf(step) : side ? t("how_much", { letter: side.letter }) : "";
    if (aloud) announce(hint.textContent);
    changed();
  }
  function choose(step) {
    side = step.response || null;
    scale.choose([nameOf(step)]);
    show(true);
    return true;
  }
  function chooseSide(response) {
    const before = byName.get(scale.chosen()[0]);
    if (question.strengths === 1) return choose({ response, strength: 1 });
    if (before?.response) return choose({ response, strength: before.strength });
    side = response;
    scale.choose([]);
    show(true);
    return true;
  }
  function move(by) {
    const at = steps.findIndex((step) => nameOf(step) === scale.chosen()[0]);
    const middle = by > 0 ? question.strengths + (question.tie ? 1 : 0) : question.strengths - 1;
    return choose(steps[at < 0 ? middle : Math.min(steps.length - 1, Math.max(0, at + by))]);
  }

  return {
    element,
    focus: scale.focus,
    answered: () => scale.chosen().length === 1,
    value() {
      const step = byName.get(scale.chosen()[0]);
      if (!step) return undefined;
      return step.neither ? { choice: step.neither } : { choice: step.response.id, strength: step.strength };
    },
    set(value) {
      const step = steps.find((each) => each.neither ? each.neither === value.choice
        : each.response.id === value.choice && each.strength === (value.strength || 1));
      if (step) choose(step);
    },
    key(event) {
      const key = event.key.toLowerCase();
      if (key === "a") return chooseSide(left);
      if (key === "b") return chooseSide(right);
      if ((key === "t" || key === "0" || key === "=") && question.tie) return choose({ neither: "tie" });
      if (key === "x" && question.both_bad) return choose({ neither: "both_bad" });
      if (key === "arrowleft") return move(-1);
      if (key === "arrowright") return move(1);
      if (side && /^[1-9]$/.test(key) && Number(key) <= question.strengths) return choose({ response: side, strength: Number(key) });
      return false;
    },
  };
}

const keyOf = (step, question, left) => {
  if (step.neither) return step.neither === "tie" ? "T" : "X";
  const letter = step.response === left ? "A" : "B";
  return question.strengths === 1 ? letter : `${letter}${step.strength}`;
};

function shortText(step, question, t) {
  return question.strengths === 1 ? t("better_end", { letter: step.response.letter }) : t(`short_${question.strengths}_${step.strength}`);
}

const strengthText = (letter, strength, strengths, t) =>
  strengths === 1 ? t("better_end", { letter }) : t(`strength_${strengths}_${strength}`, { letter });

export function describe(question, value, letters, t) {
  if (value.choice === "tie" || value.choice === "both_bad") return t(value.choice);
  return strengthText(letters(value.choice), value.strength || 1, question.strengths, t);
}
