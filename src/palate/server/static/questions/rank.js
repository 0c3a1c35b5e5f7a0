// All responses in tiers, best first; several in a tier are a tie. By dragging, by buttons, and by keys.

import { announce, fill, h, kbd } from "../dom.js";
import { digit } from "../keys.js";

export function make({ question, responses, changed, t }) {
  const shown = responses.map((response) => [response.id]);
  const byId = new Map(responses.map((response) => [response.id, response]));
  let tiers = shown.map((tier) => [...tier]);
  let at = responses[0].id;
  let touched = false;
  const list = h("div", { class: "tiers", role: "listbox", "aria-label": question.text || t("ask_rank"), "aria-orientation": "vertical" });
  const element = h("div", {}, list);

  const place = (id) => tiers.findIndex((tier) => tier.includes(id));
  const take = (id) => { tiers = tiers.map((tier) => tier.filter((each) => each !== id)).filter((tier) => tier.length); };
  const order = () => tiers.flat();

  function draw(focus = false) {
    fill(list, tiers.map((tier, i) => h("div", { class: `tier${tier.length > 1 ? " tie" : ""}`, role: "group", "aria-label": t("place", { n: i + 1 }) },
      h("span", { class: "number", "aria-hidden": "true" }, String(i + 1)),
      h("div", { class: "chips" }, tier.map((id) => chip(id, i))))));
    if (focus) list.querySelector('[aria-selected="true"]')?.focus({ preventScroll: true });
  }

  function chip(id, i) {
    const { letter, text } = byId.get(id);
    const button = (label, title, action, disabled = false) => h("button", {
      type: "button", class: "tiny", title, "aria-label": `${letter}: ${title}`, tabindex: -1, disabled, onclick: (event) => { event.stopPropagation(); at = id; action(); },
    }, label);
    const element = h("div", {
      class: "chip", role: "option", tabindex: id === at ? 0 : -1, "aria-selected": id === at ? "true" : "false", "data-id": id,
      "aria-label": sayPlace(id), onclick: () => { at = id; draw(true); }, onpointerdown: (event) => drag(event, id),
    },
      h("span", { class: "grip", "aria-hidden": "true" }, "⠿"),
      h("span", { class: "letter" }, letter),
      h("span", { class: "gist", dir: "auto" }, text.slice(0, 90).replace(/\s+/g, " ")),
      h("span", { class: "moves" },
        button("↑", t("move_up"), () => move(-1), i === 0 && tiers[i].length === 1),
        button("↓", t("move_down"), () => move(1), i === tiers.length - 1 && tiers[i].length === 1),
        question.ties ? button("=", t(tiers[i].length > 1 ? "untie" : "tie_above"), () => tieAbove(), i === 0 && tiers[i].length === 1) : null));
    return element;
  }

  const sayPlace = (id) => {
    const i = place(id);
    const others = tiers[i].filter((each) => each !== id).map((each) => byId.get(each).letter);
    const where = t("place_of", { letter: byId.get(id).letter, n: i + 1, all: tiers.length });
    return others.length ? `${where}, ${t("tied_with", { letters: others.join(", ") })}` : where;
  };
  function after(focus = true) {
    touched = true;
    draw(focus && list.contains(document.activeElement));
    announce(sayPlace(at));
    changed();
    return true;
  }

  // One step up or down: out of a tie into a place of its own, or else into the neighbour's tie (where there are ties).
  function move(by) {
    const i = place(at);
    if (tiers[i].length > 1) {
      tiers[i] = tiers[i].filter((id) => id !== at);
      tiers.splice(by < 0 ? i : i + 1, 0, [at]);
    } else if (tiers[i + by]) {
      if (question.ties) {
        tiers[i + by].push(at);
        tiers.splice(i, 1);
      } else [tiers[i], tiers[i + by]] = [tiers[i + by], tiers[i]];
    } else return true;
    return after();
  }
  // A place of its own: the n-th.
  function put(n) {
    take(at);
    tiers.splice(Math.min(n - 1, tiers.length), 0, [at]);
    return after();
  }
  function tieAbove() {
    if (!question.ties) return false;
    const i = place(at);
    if (tiers[i].length > 1) return move(1);
    if (i === 0) return true;
    tiers[i - 1].push(at);
    tiers.splice(i, 1);
    return after();
  }
  function select(id) {
    at = id;
    draw(list.contains(document.activeElement));
    announce(sayPlace(id));
    return true;
  }

  // Where a pointer at height y would put it: {tier} = into that tie, {gap} = before that tier.
  function targetAt(y) {
    const rows = [...list.querySelectorAll(".tier")];
    for (const [i, row] of rows.entries()) {
      const box = row.getBoundingClientRect();
      const edge = question.ties ? box.height * 0.28 : box.height / 2;
      if (y < box.top + edge) return { gap: i };
      if (y < box.bottom - edge) return { tier: i };
    }
    return { gap: rows.length };
  }
  function drag(event, id) {
    if (event.button !== 0 || event.target.closest("button")) return;
    if (event.pointerType === "touch" && !event.target.closest(".grip")) return; // touching elsewhere scrolls
    const start = event.clientY;
    let moving = false;
    const mark = (target) => {
      for (const [i, row] of list.querySelectorAll(".tier").entries()) {
        row.classList.toggle("into", target?.tier === i);
        row.classList.toggle("above", target?.gap === i);
        row.classList.toggle("below", target?.gap === i + 1 && i === tiers.length - 1);
      }
    };
    const onmove = (each) => {
      if (!moving && Math.abs(each.clientY - start) < 6) return;
      if (!moving) {
        moving = true;
        at = id;
        list.querySelector(`[data-id="${CSS.escape(id)}"]`).classList.add("dragged");
        list.classList.add("dragging");
      }
      each.preventDefault();
      mark(targetAt(each.clientY));
    };
    const end = (each, drop) => {
      removeEventListener("pointermove", onmove);
      removeEventListener("pointerup", onup);
      removeEventListener("pointercancel", oncancel);
      list.classList.remove("dragging");
      mark(null);
      if (!moving) return;
      if (!drop) { draw(); return; }
      const target = targetAt(each.clientY);
      const anchorTier = target.tier !== undefined ? tiers[target.tier] : tiers[target.gap];
      const beyond = anchorTier && anchorTier.length === 1 && anchorTier[0] === id;
      if (beyond) { draw(); return; } // onto itself
      const landmark = anchorTier?.find((each) => each !== id);
      take(id);
      const i = landmark === undefined ? tiers.length : place(landmark);
      if (target.tier !== undefined) tiers[i].push(id);
      else tiers.splice(i, 0, [id]);
      after(false);
    };
    const onup = (each) => end(each, true);
    const oncancel = (each) => end(each, false);
    addEventListener("pointermove", onmove, { passive: false });
    addEventListener("pointerup", onup);
    addEventListener("pointercancel", oncancel);
  }

  draw();
  return {
    element,
    focus: (options) => list.querySelector('[aria-selected="true"]')?.focus(options),
    answered: () => true,
    touched: () => touched,
    changed: () => JSON.stringify(tiers) !== JSON.stringify(shown),
    value: () => tiers.map((tier) => [...tier]),
    set(value) {
      if (value.flat().length !== responses.length || !value.flat().every((id) => byId.has(id))) return;
      tiers = value.map((tier) => [...tier]);
      draw();
      changed();
    },
    key(event) {
      const letter = responses.find((response) => response.letter.toLowerCase() === event.key.toLowerCase());
      if (letter) return select(letter.id);
      const n = digit(event);
      if (n !== null && n <= responses.length) return put(n);
      if (event.key === "=") return tieAbove();
      const by = { ArrowUp: -1, ArrowDown: 1, "[": -1, "]": 1 }[event.key];
      if (!by) return false;
      if (event.shiftKey || event.key === "[" || event.key === "]") return move(by);
      const all = order();
      return select(all[Math.min(all.length - 1, Math.max(0, all.indexOf(at) + by))]);
    },
  };
}

export const describe = (question, value, letters) => value.map((tier) => tier.map(letters).join(" = ")).join(" > ");
