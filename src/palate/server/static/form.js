// An item with its questions: prompt and pictures, a card for each response, and a cell for each thing to answer.

import { ask, fill, h, kbd, put, sanitised } from "./dom.js";
import { ALWAYS_SENT, PER_RESPONSE, TYPES } from "./questions/index.js";

const LETTERS = "ABCDEFGHI";

// item: what /api/next gives; task: of /api/me. Returns {element, ...}; see the methods at the end.
export function makeForm(item, task, t, onchange = () => {}) {
  const responses = item.responses.map((response, i) => ({ ...response, letter: LETTERS[i] }));
  const letters = (id) => responses.find((response) => response.id === id)?.letter || "?";
  const cells = []; // in the order of the screen
  let active = 0;
  let quiet = true;
  const changed = () => { if (!quiet) { mark(); onchange(); } };

  const each = task.questions.filter((question) => PER_RESPONSE.has(question.type));
  const whole = task.questions.filter((question) => !PER_RESPONSE.has(question.type));
  const cards = responses.map((response) => card(response));
  const element = h("div", { class: "item" },
    promptView(item, task, t),
    h("div", { class: `responses of-${Math.min(responses.length, 4)}` }, cards),
    whole.length ? h("div", { class: "whole" }, whole.map((question) => cell(question, null, null))) : null);

  function card(response) {
    let body = bodyOf(response, task);
    const holder = h("div", { class: "body" }, body);
    const place = {
      taken: false,
      take(view) { // a question shows the response in its own way; one question can, and only where the text is plain
        if (place.taken || (task.render === "markdown" && !view.classList.contains("spans"))) return false;
        place.taken = true;
        fill(holder, view);
        return true;
      },
    };
    return h("section", { class: "card response", "aria-label": t("response", { letter: response.letter }) },
      h("header", {}, responses.length > 1 ? h("span", { class: "letter", "aria-hidden": "true" }, response.letter) : null,
        h("span", { class: "quiet" }, responses.length > 1 ? t("response", { letter: response.letter }) : t("the_response"))),
      holder, each.map((question) => cell(question, response, place)));
  }

  function cell(question, response, place) {
    const index = cells.length;
    const taken = place?.taken;
    const made = TYPES[question.type].make({ question, responses, response, card: place, changed, next: () => forward(), t });
    const title = question.text || t(`ask_${question.type}`);
    const box = h("div", { class: `cell ${question.type}`, role: "group", tabindex: -1, "aria-label": response ? `${title}, ${response.letter}` : title },
      h("div", { class: "asked" },
        h("h3", {}, title, question.required || ALWAYS_SENT.has(question.type) || /[)）]$/.test(title) ? null : h("span", { class: "quiet" }, ` ${t("optional")}`)),
        h("span", { class: "hints", "aria-hidden": "true" }, hintsOf(question, t))),
      question.help ? h("p", { class: "quiet help" }, question.help) : null, made.element);
    const own = { question, response, box, ...made, activate: () => { active = index; mark(); } };
    box.addEventListener("focusin", own.activate);
    box.addEventListener("pointerdown", own.activate);
    if (place?.taken && !taken) {
      // the text to mark stands in the card's body: being there is being at this question
      queueMicrotask(() => {
        const body = box.parentElement.querySelector(".body");
        body.addEventListener("focusin", own.activate);
        body.addEventListener("pointerdown", own.activate);
      });
    }
    cells.push(own);
    return box;
  }

  function mark() {
    for (const [i, each] of cells.entries()) {
      each.box.classList.toggle("active", i === active);
      each.box.classList.toggle("answered", each.question.required && each.answered());
    }
  }
  const missing = () => cells.filter((each) => each.question.required && !each.answered());

  function go(index, focus = true) {
    active = index;
    mark();
    const { box } = cells[index];
    for (const other of cells) other.box.classList.remove("missing");
    if (focus) {
      cells[index].focus({ preventScroll: true });
      box.scrollIntoView({ block: "nearest" });
    }
  }
  // To the next question; false at the end (a text that need not be written is no stop on the way).
  function forward() {
    const stops = (each) => each.question.required || !["text", "rewrite"].includes(each.question.type);
    const found = cells.findIndex((each, i) => i > active && stops(each));
    if (found < 0) return false;
    go(found);
    return true;
  }

  function values() {
    const found = {};
    for (const question of task.questions) {
      const own = cells.filter((each) => each.question === question);
      if (!PER_RESPONSE.has(question.type)) {
        const value = own[0].value();
        if (value !== undefined) found[question.id] = value;
        continue;
      }
      const given = own.map((each) => [each.response.id, each.value()]).filter(([, value]) => value !== undefined);
      if (given.length || ALWAYS_SENT.has(question.type)) found[question.id] = Object.fromEntries(given);
    }
    return found;
  }
  function set(given) {
    quiet = true;
    for (const each of cells) {
      const value = given[each.question.id];
      const own = each.response ? value?.[each.response.id] : value;
      if (own !== undefined && own !== null) each.set(own);
    }
    quiet = false;
    mark();
  }

  if (item.previous) set(item.previous);
  quiet = false;
  mark();
  return {
    element,
    cells,
    letters,
    values,
    set,
    missing,
    forward,
    key: (event) => cells[active].key(event),
    step(by) { go(Math.min(cells.length - 1, Math.max(0, active + by))); },
    leave() { cells[active].box.focus({ preventScroll: true }); },
    unordered: () => cells.filter((each) => each.question.type === "rank" && !each.changed()),
    showMissing() {
      const first = missing()[0];
      go(cells.indexOf(first));
      first.box.classList.add("missing");
      return first;
    },
  };
}

function bodyOf(response, task) {
  return task.render === "markdown" ? sanitised(response.html) : h("div", { class: "plain", dir: "auto" }, response.text);
}

function promptView(item, task, t) {
  const turns = item.prompt.map((turn, i) => h("div", { class: `turn ${turn.role === "assistant" ? "assistant" : turn.role === "system" ? "system" : "user"}` },
    item.prompt.length > 1 || turn.role !== "user" ? h("span", { class: "role" }, ["user", "assistant", "system"].includes(turn.role) ? t(`role_${turn.role}`) : turn.role) : null,
    task.render === "markdown" ? sanitised(turn.html) : h("div", { class: "plain", dir: "auto" }, turn.text)));
  return h("section", { class: "card prompt", "aria-label": t("prompt") },
    h("header", {}, h("span", { class: "quiet" }, t(item.prompt.length > 1 ? "conversation" : "prompt"))),
    h("div", { class: item.images.length ? "withimages" : "" },
      item.images.length ? h("div", { class: "images" }, item.images.map((source, i) => picture(source, i, t))) : null,
      h("div", { class: "turns" }, turns)));
}

function picture(source, i, t) {
  if (!/^\/api\/image\/[0-9a-f]{64}$/.test(source)) return null;
  const name = t("picture", { n: i + 1 });
  return h("button", {
    type: "button", class: "picture", "aria-label": `${name}: ${t("enlarge")}`,
    onclick: () => ask(name, (answer) => h("div", {}, h("img", { src: source, alt: name, class: "large" }),
      h("p", { class: "buttons" }, h("button", { type: "button", autofocus: true, onclick: () => answer(null) }, t("close")))), { wide: true }),
  }, h("img", { src: source, alt: name, loading: "eager" }));
}

// The keys of a question, in its corner.
function hintsOf(question, t) {
  const say = (keys, what) => [kbd(...keys), what ? h("span", {}, what) : null];
  switch (question.type) {
    case "compare": return say(["←", "→"]);
    case "rating": return say(["1", "–", String(question.scale % 10)]);
    case "rank": return [say(["⇧↑", "⇧↓"], t("moves")), question.ties ? say(["="], t("ties")) : null];
    case "spans": return [say(["←", "→"], t("word")), say(["⇧→"], t("more"))];
    case "rewrite": case "text": return say(["Esc"], t("leave"));
    default: return [];
  }
}

export function describeAnswer(values, task, letters, t) {
  return task.questions.filter((question) => values[question.id] !== undefined && values[question.id] !== null).map((question) => {
    const { describe } = TYPES[question.type];
    const value = values[question.id];
    const said = PER_RESPONSE.has(question.type)
      ? Object.entries(value).filter(([, own]) => own !== null).map(([id, own]) => [h("b", {}, letters(Array.isArray(value) ? Number(id) : id)), " ", describe(question, own, letters, t)]).map((parts) => h("div", {}, parts))
      : describe(question, value, letters, t);
    return put(h("div", { class: "given" }), h("span", { class: "quiet" }, question.text || question.id), h("div", {}, said));
  });
}
