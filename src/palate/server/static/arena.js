// Talking to models: two of unknown name side by side with a vote after each turn, or one with thumbs.

import { Unreachable, call, newKey } from "./api.js";
import { word } from "./arena_words.js";
import { takeTurn } from "./arena_stream.js";
import { Clock } from "./clock.js";
import { announce, fill, h, kbd, put, visible } from "./dom.js";
import { digit, isField } from "./keys.js";
import { enter, topBar } from "./shell.js";
import { forget, load, save } from "./store.js";

const CHOICES = ["left", "right", "tie", "both_bad"];
const withKeys = matchMedia("not ((hover: none) and (pointer: coarse))");
const LETTERS = { left: "A", right: "B", one: "" };
const main = document.getElementById("main");
const clock = new Clock();
const turns = h("ol", { class: "talk", id: "talk" });
// Neither can be used before ``settle`` knows what the talk waits for.
const field = h("textarea", { id: "field", rows: 2, dir: "auto", autocomplete: "off", disabled: true });
const sendButton = h("button", { type: "submit", class: "primary", id: "send", disabled: true });
const stopButton = h("button", { type: "button", id: "stop", hidden: true });
let me;
let offer; // what the server offers
let now = null; // the conversation as the server knows it: {conversation, turns, closed, models?}
let running = null; // the AbortController of the turn that is being written
let looked = null; // the answer whose time is being taken: {turn, version}
let outbox;
let line;
let state;

begin();

async function begin() {
  let language;
  ({ me, language, state, line, outbox } = await enter((pseudonym) => `arena:${pseudonym}`));
  try {
    offer = await line.until(() => call("arena"));
  } catch {
    fill(main, h("section", { class: "card nothing" }, h("h2", {}, word("none_title")), h("p", {}, word("none_text"))));
    document.getElementById("top").replaceWith(topBar({ me, title: word("none_title"), language }));
    document.getElementById("composer").hidden = true;
    return;
  }
  frame(language);
  await sendKept();
  show();
  const pending = load(pendingName());
  if (pending && pending.conversation === now?.conversation) run(pending);
  else forget(pendingName());
}

const draftName = () => `arena-draft:${me.pseudonym}`;
const pendingName = () => `arena-turn:${me.pseudonym}`;
const battle = () => offer.mode === "battle";

function frame(language) {
  const title = word(battle() ? "title_battle" : "title_chat");
  document.title = title;
  const fresh = h("button", { type: "button", class: "small", id: "fresh", onclick: startAnew }, word(battle() ? "fresh_battle" : "fresh_chat"));
  document.getElementById("top").replaceWith(topBar({ me, title, middle: fresh, language }));
  put(sendButton, h("span", {}, word("send")), kbd("Enter"));
  put(stopButton, h("span", {}, word("stop")), kbd("Esc"));
  field.placeholder = word("write");
  field.setAttribute("aria-label", word("write"));
  field.maxLength = offer.longest;
  field.value = load(draftName(), "");
  field.addEventListener("input", () => { save(draftName(), field.value); fit(); });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !running && !battle()) { main.focus({ preventScroll: true }); return; } // the keys of the thumbs are free
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
  stopButton.addEventListener("click", () => running?.abort());
  fill(document.getElementById("composer"), h("form", { class: "compose", onsubmit: (event) => { event.preventDefault(); send(); } }, field, stopButton, sendButton));
  fill(main, h("p", { class: "welcome", id: "welcome" }, word(battle() ? "welcome_battle" : "welcome_chat")), turns);
  document.addEventListener("keydown", onKey);
  document.addEventListener("copy", onCopy);
  addEventListener("pagehide", dwelt);
  document.addEventListener("visibilitychange", () => { if (document.hidden) dwelt({ on: true }); });
}

async function sendKept() {
  await outbox.resume();
  now = offer.current || null;
  if (outbox.waiting().length === 0) {
    offer = await line.until(() => call("arena"));
    now = offer.current || null;
  }
}

// --- what is shown -----------------------------------------------------------------------------------------------------

function show() {
  fill(turns, (now?.turns || []).map((turn) => drawTurn(turn)));
  document.getElementById("welcome").hidden = Boolean(now?.turns.length);
  settle();
  follow(true);
}

const last = () => now?.turns.at(-1) ?? null;
const toVote = () => battle() && last() && !last().vote;

// Which controls may be used, and where the next key goes.
function settle() {
  const closed = Boolean(now?.closed);
  field.disabled = Boolean(running) || toVote() || closed;
  sendButton.disabled = field.disabled;
  sendButton.hidden = Boolean(running);
  stopButton.hidden = !running;
  fit();
  if (running) return;
  if (toVote()) {
    state.show("info", word("first_vote"));
    turns.querySelector(".votes")?.focus({ preventScroll: true });
  } else if (closed) {
    state.show("info", word("over"));
    document.getElementById("fresh").focus({ preventScroll: true });
  } else {
    if (last() && !battle() && withKeys.matches) state.show("info", word("keys_chat"));
    field.focus({ preventScroll: true });
  }
  const newest = last();
  if (newest && (toVote() || !battle())) {
    looked = { turn: newest.turn, version: newest.version };
    clock.start();
  }
}

function drawTurn(turn) {
  const many = turn.answers.length;
  return h("li", { class: "exchange", "data-turn": turn.turn },
    h("div", { class: "mine" }, h("span", { class: "unseen" }, word("you")), h("div", { class: "plain", dir: "auto" }, turn.text)),
    h("div", { class: `responses of-${many}` }, turn.answers.map((answer) => drawAnswer(turn, answer))),
    h("div", { class: "verdict" }, turn.answers.every((each) => each.state === undefined) ? verdict(turn) : null));
}

function drawAnswer(turn, answer) {
  const name = now.models?.[answer.side];
  const note = answer.state ? word(answer.state) : !answer.finished ? word("cut") : turn.version > 1 ? word("version", { n: turn.version }) : "";
  return h("section", { class: `card response ${turn.vote === answer.side ? "won" : ""}`, "data-side": answer.side, "aria-label": word(`side_${answer.side}`) },
    h("header", {}, LETTERS[answer.side] ? h("span", { class: "letter" }, LETTERS[answer.side]) : null,
      h("h2", { class: LETTERS[answer.side] ? "unseen" : "" }, word(`side_${answer.side}`)),
      name ? h("strong", {}, word("was", { name })) : null, h("span", { class: "quiet note" }, note)),
    h("div", { class: "body plain", dir: "auto" }, answer.text || (answer.state ? "" : word("empty"))));
}

function verdict(turn) {
  if (!battle()) return thumbs(turn);
  if (turn.vote) return h("p", { class: "quiet voted" }, word(`voted_${turn.vote}`));
  if (turn !== last()) return null;
  return h("div", { class: "votes", role: "group", tabindex: -1, "aria-label": word("ask_vote") },
    CHOICES.map((choice, i) => h("button", { type: "button", class: `vote ${choice}`, onclick: () => vote(choice) }, h("span", {}, word(`vote_${choice}`)), kbd(String(i + 1)))));
}

function thumbs(turn) {
  const newest = turn === last();
  const button = (id, mark, pressed, key, action) => h("button", {
    type: "button", class: `small ${id}`, "aria-pressed": pressed === null ? null : String(pressed), onclick: action,
  }, mark ? h("span", { "aria-hidden": "true" }, mark) : null, h("span", {}, word(id)), newest ? kbd(key) : null);
  return h("div", { class: "thumbs" },
    button("up", "✓", turn.thumb === true, "1", () => thumb(turn, true)), button("down", "✗", turn.thumb === false, "2", () => thumb(turn, false)),
    button("copy", "", null, "C", () => copy(turn)), newest ? button("again", "", null, "R", again) : null);
}

const elementOf = (turn) => turns.querySelector(`[data-turn="${turn.turn}"]`);

function redraw(turn) {
  const before = elementOf(turn);
  const focused = before.contains(document.activeElement) ? document.activeElement.className : "";
  const after = drawTurn(turn);
  before.replaceWith(after);
  if (focused) [...after.querySelectorAll("button")].find((each) => each.className === focused)?.focus({ preventScroll: true });
}

// The end stays in sight while somebody is there.
function follow(always = false) {
  const below = document.documentElement.scrollHeight - innerHeight - scrollY;
  if (always || below < 160) scrollTo({ top: document.documentElement.scrollHeight });
}

function fit() {
  field.style.blockSize = "auto";
  field.style.blockSize = `${Math.min(field.scrollHeight + 2, innerHeight * 0.3)}px`;
}

// --- a turn ------------------------------------------------------------------------------------------------------------

async function startAnew() {
  if (running) running.abort();
  dwelt();
  try {
    now = await line.until(() => call("arena/start", { key: newKey() }));
  } catch (error) {
    state.show("bad", word("problem", { error: error.message, todo: error.todo || "" }));
    return;
  }
  forget(pendingName());
  state.show("", "");
  show();
}

async function send() {
  const text = field.value.trim();
  if (!text || running || field.disabled) return;
  if (!now) await startAnew();
  if (!now) return;
  dwelt();
  field.value = "";
  forget(draftName());
  run({ key: newKey(), conversation: now.conversation, text });
}

function again() {
  if (running || battle() || !last()) return;
  dwelt();
  run({ key: newKey(), conversation: now.conversation, again: true });
}

// Until it is kept, a turn stands in this browser's storage; a broken connection sends it again with the same key.
async function run(pending) {
  save(pendingName(), pending);
  running = new AbortController();
  const signal = running.signal;
  const { turns: before } = now;
  const old = pending.again ? last() : null;
  const sides = battle() ? ["left", "right"] : ["one"];
  let draft;
  let waiting = false;
  const renew = () => {
    draft = {
      turn: old ? old.turn : before.length + 1, version: old ? old.version + 1 : 1, text: pending.text ?? old.text,
      answers: sides.map((side) => ({ side, text: "", finished: true, state: "waiting" })),
    };
    now = { ...now, turns: [...(old ? before.slice(0, -1) : before), draft] };
    show();
  };
  const paint = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (now.turns.at(-1) !== draft) return;
      for (const answer of draft.answers) {
        const card = elementOf(draft).querySelector(`[data-side="${answer.side}"]`);
        card.querySelector(".body").textContent = visible(answer.text);
        card.querySelector(".note").textContent = answer.state ? word(answer.state) : "";
      }
      follow();
    });
  };
  const take = (name, data) => {
    const answer = draft.answers.find((each) => each.side === data.side);
    answer.state = name === "side" ? "" : "writing";
    if (name === "piece") answer.text += data.text;
    paint();
  };
  state.show("", "");
  let kept = null;
  for (let tries = 0; kept === null; tries += 1) {
    renew();
    try {
      kept = await takeTurn(pending, take, signal);
    } catch (error) {
      if (error instanceof Unreachable && !signal.aborted) {
        await pause(Math.max(error.wait, Math.min(15, 2 ** tries)), signal);
        if (!signal.aborted) continue;
      }
      giveUp(pending, before, signal.aborted ? null : error);
      return;
    }
  }
  if (now.turns.at(-1) !== draft) return; // another conversation was begun
  running = null;
  forget(pendingName());
  now.turns[now.turns.length - 1] = kept;
  state.show("", "");
  show();
  announce(word(battle() ? "vote_now" : "ready"));
}

function giveUp(pending, before, error) {
  running = null;
  forget(pendingName());
  now = { ...now, turns: before };
  if (pending.text) {
    field.value = pending.text;
    save(draftName(), pending.text);
  }
  show();
  state.show(error ? "bad" : "info", error ? word("problem", { error: error.message, todo: error.todo || "" }) : word("stopped"));
}

async function pause(seconds, signal) {
  let left = Math.ceil(seconds);
  while (left > 0 && !signal.aborted) {
    let skip = false;
    state.show("down", word("lost", { seconds: left }), h("button", { type: "button", class: "small", onclick: () => { skip = true; } }, word("try_again")));
    const end = Date.now() + 1000;
    while (Date.now() < end && !signal.aborted && !skip) await new Promise((resolve) => setTimeout(resolve, 50));
    left = skip ? 0 : left - 1;
  }
  state.show("", "");
}

// --- what is said of an answer -------------------------------------------------------------------------------------------

async function vote(choice) {
  const turn = last();
  if (!toVote() || running) return;
  const seconds = clock.seconds();
  turn.vote = choice; // shown at once; the outbox keeps it until the server has it
  redraw(turn);
  settle();
  const outcome = await outbox.send("arena/vote", { conversation: now.conversation, turn: turn.turn, choice, seconds });
  if (outcome.refused) {
    state.show("bad", word("not_kept", { error: outcome.refused.message }));
    return;
  }
  if (outcome.body.conversation !== now.conversation || running) return;
  now = { ...outcome.body };
  if (now.models || now.closed) show();
  if (!now.closed) state.show("good", word("after_vote"));
  announce(word(`voted_${choice}`));
}

async function thumb(turn, up) {
  turn.thumb = turn.thumb === up ? null : up; // the same again takes it back
  redraw(turn);
  const about = { conversation: now.conversation, turn: turn.turn, version: turn.version, up: turn.thumb };
  const outcome = await outbox.send("arena/thumb", about);
  state.show(outcome.refused ? "bad" : "good", outcome.refused ? word("not_kept", { error: outcome.refused.message }) : word("kept"));
}

const signalled = (turn, signal, more = {}) =>
  outbox.send("arena/signal", { conversation: now.conversation, turn: turn.turn, version: turn.version, signal, ...more });

async function copy(turn) {
  try {
    await navigator.clipboard.writeText(turn.answers[0].text);
    state.show("good", word("copied"));
  } catch { /* not allowed here: the selection can still be copied */ return; }
  signalled(turn, "copy");
}

function onCopy(event) {
  const selected = getSelection();
  const at = selected.anchorNode?.parentElement?.closest("[data-turn]");
  if (battle() || running || !at || !selected.anchorNode.parentElement.closest(".response") || isField(event.target)) return;
  const turn = now.turns.find((each) => String(each.turn) === at.dataset.turn);
  if (turn) signalled(turn, "copy");
}

// For how long the newest answer was looked at; sent when something else begins, or the page is left.
function dwelt({ on = false } = {}) {
  if (!looked || battle()) return;
  const seconds = clock.seconds();
  const about = looked;
  if (!on) looked = null;
  if (seconds >= 0.5) signalled(about, "dwell", { seconds });
}

function onKey(event) {
  if (event.defaultPrevented || event.isComposing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && running) { event.preventDefault(); running.abort(); return; }
  if (isField(event.target) || running) return;
  const number = digit(event);
  const turn = last();
  const done = (action) => { event.preventDefault(); action(); };
  if (battle()) {
    if (number >= 1 && number <= 4 && toVote()) done(() => vote(CHOICES[number - 1]));
  } else if (turn) {
    const key = event.key.toLowerCase();
    if (number === 1 || number === 2) done(() => thumb(turn, number === 1));
    else if (key === "c") done(() => copy(turn));
    else if (key === "r") done(again);
  }
  if (event.key === "/" && !field.disabled) done(() => field.focus());
}
