// The annotators' page: one item after the other, answered with keys or mouse.

import { call } from "./api.js";
import { Clock } from "./clock.js";
import { announce, ask, fill, h, kbd, sanitised } from "./dom.js";
import { makeForm } from "./form.js";
import { showHelp } from "./help.js";
import { t } from "./i18n.js";
import { isField, listen } from "./keys.js";
import { enter, topBar } from "./shell.js";
import { forget, load, save } from "./store.js";

const MOST_UNDO = 20;
const main = document.getElementById("main");
const clock = new Clock();
let me;
let item = null; // what is shown, or null
let form = null;
let outbox;
let busy = false;
let state;
let line;
let saving = null;

start();

async function start() {
  let language;
  ({ me, language, state, line, outbox } = await enter());
  document.title = me.task.title;
  frame(language);
  listen({
    first: (event) => Boolean(form && !busy && (event.key === "Enter" ? advance() : form.key(event))),
    page: {
      "?": () => showHelp(me.task), j: () => form?.step(1), k: () => form?.step(-1), u: undo, s: skip, p: flag, v: toggleInstructions,
    },
    submit,
    leave: () => (form ? form.leave() : document.activeElement.blur()),
  });
  addEventListener("pagehide", keep);
  document.addEventListener("visibilitychange", () => { if (document.hidden) keep(); });
  await sendKept();
  await next();
}

// --- the frame around the item -------------------------------------------------------------------------------------

function frame(language) {
  const links = me.role === "annotator" ? [] : [h("a", { href: "/admin" }, t(me.role === "admin" ? "admin" : "adjudicate"))];
  const progress = h("div", { class: "progress" },
    h("div", { class: "track", role: "progressbar", id: "progress", "aria-label": t("progress_label") }, h("div", { class: "bar" })), h("span", { id: "count", class: "quiet" }));
  document.getElementById("top").replaceWith(topBar({ me, title: me.task.title, middle: progress, language, links }));
  fill(document.getElementById("aside"), instructions());
  fill(document.getElementById("actions"),
    button("undo", "U", undo), button("skip", "S", skip), button("flag", "P", flag), button("keys", "?", () => showHelp(me.task)),
    h("button", { type: "button", id: "submit", class: "primary", onclick: submit }, t("submit"), kbd("Enter")));
  showProgress(me.progress);
}

const button = (name, key, action) => h("button", { type: "button", id: name, class: "quietly", onclick: action }, h("span", {}, t(name)), kbd(key));

function instructions() {
  const open = load("instructions", innerWidth >= 1000);
  const element = h("details", { class: "card instructions", id: "instructions", ontoggle: () => save("instructions", element.open) },
    h("summary", {}, h("h2", {}, t("instructions")), kbd("V")),
    me.task.instructions_html ? sanitised(me.task.instructions_html) : h("p", { class: "quiet" }, t("no_instructions")));
  element.open = open;
  return element;
}

function toggleInstructions() {
  const element = document.getElementById("instructions");
  element.open = !element.open;
  save("instructions", element.open); // now: the browser tells of it later, and a page that is left never hears it
}

function showProgress({ done, wanted }) {
  const bar = document.getElementById("progress");
  bar.setAttribute("aria-valuenow", done);
  bar.setAttribute("aria-valuemin", 0);
  bar.setAttribute("aria-valuemax", wanted);
  bar.firstElementChild.style.inlineSize = `${wanted ? (100 * done) / wanted : 0}%`;
  document.getElementById("count").textContent = t("progress", { done, wanted });
}

// --- items -----------------------------------------------------------------------------------------------------------

async function next(said = "") {
  setBusy(true);
  let found;
  try {
    found = await line.until(() => call("next", {}));
  } catch (error) {
    state.show("bad", t("refused", { error: `${error.message} ${error.todo || ""}` }));
    setBusy(false);
    return;
  }
  if (state.wasDown) state.say("up");
  if (found.done) showNothing(found.why);
  else showItem(found, said);
  setBusy(false);
  main.focus({ preventScroll: true }); // not before: what is inert cannot have the focus
}

function showItem(found, said) {
  item = found;
  form = makeForm(item, me.task, t, changed);
  const draft = load(draftName());
  const back = draft?.presentation === item.presentation ? draft : null;
  if (back) form.set(back.values);
  else forget(draftName());
  fill(main, form.element);
  document.body.classList.remove("idle");
  clock.start(back?.seconds || 0);
  scrollTo(0, 0);
  if (back?.touched) state.show("info", t("state_restored"));
  else if (item.previous) state.show("info", t("undo_again"));
  announce(`${said} ${t("state_new", { n: form.cells.length })}`);
}

function showNothing(why) {
  item = form = null;
  forget(draftName());
  document.body.classList.add("idle");
  fill(main, h("section", { class: "card nothing" }, h("h2", {}, t("done_title")), h("p", {}, why),
    h("p", { class: "buttons" },
      h("button", { type: "button", class: "primary", onclick: () => next() }, t("look_again")),
      undoable().length ? h("button", { type: "button", onclick: undo }, t("undo_last"), kbd("U")) : null)));
  announce(`${t("done_title")}. ${why}`);
}

function setBusy(now) {
  busy = now;
  main.classList.toggle("busy", now);
  main.inert = now;
  main.setAttribute("aria-busy", now ? "true" : "false");
  for (const element of document.querySelectorAll("#actions button:not(#keys)")) element.disabled = now || (!item && element.id !== "undo");
  const last = document.getElementById("undo");
  if (last) last.disabled = now || !undoable().length;
}

// --- what is kept while it is not sent --------------------------------------------------------------------------------

const draftName = () => `draft:${me.pseudonym}`;
const undoable = () => load(`done:${me.pseudonym}`, []);

function changed() {
  clearTimeout(saving);
  saving = setTimeout(keep, 250);
  if (state.element.classList.contains("bad") || state.element.classList.contains("warn")) state.show("", "");
  item.touched = true;
}

function keep() {
  clearTimeout(saving);
  if (!item || busy) return;
  save(draftName(), { presentation: item.presentation, values: form.values(), seconds: clock.seconds(), touched: Boolean(item.touched) });
}

async function sendKept() {
  if (!outbox.waiting().length) return;
  state.show("busy", t("state_kept"));
  for (const { entry, body, refused } of await outbox.resume()) {
    if (body?.progress) showProgress(body.progress);
    if (body && ["answer", "skip"].includes(entry.path)) remember(entry.body.presentation);
    if (refused) state.show(refused.body.recorded ? "warn" : "bad", refused.body.recorded ? t("late") : t("refused", { error: refused.message }));
  }
}

function remember(presentation) {
  save(`done:${me.pseudonym}`, [...undoable().filter((each) => each !== presentation), presentation].slice(-MOST_UNDO));
}

// --- actions ----------------------------------------------------------------------------------------------------------

function advance() {
  if (!form.forward()) submit();
  return true;
}

async function submit() {
  if (!form || busy) return;
  const missing = form.missing();
  if (missing.length) {
    const first = form.showMissing();
    const what = first.question.text || t(`ask_${first.question.type}`);
    const text = t("missing", { what: first.response ? `${what}, ${first.response.letter}` : what });
    state.show("warn", text);
    announce(text);
    return;
  }
  const same = form.unordered().length > 0;
  if (same && !(await confirmSame())) return;
  const body = { presentation: item.presentation, values: form.values(), seconds: clock.seconds(), changed: !same };
  await write("answer", body, t("state_sent"), () => remember(body.presentation));
}

const confirmSame = () => ask(t("same_title"), (answer) => [
  h("p", {}, t("same_text")),
  h("p", { class: "buttons" },
    h("button", { type: "button", onclick: () => answer(false) }, t("same_no"), kbd("Esc")),
    h("button", { type: "button", class: "primary", autofocus: true, onclick: () => answer(true) }, t("same_yes"), kbd("Enter"))),
]);

// Send, and go on to the next item when the server has acknowledged it.
async function write(path, body, said, then = () => {}) {
  clock.stop();
  keep();
  setBusy(true);
  const { body: found, refused } = await outbox.send(path, body);
  if (refused && ![404, 409].includes(refused.status)) { // to be corrected here
    state.show("bad", t("refused", { error: `${refused.message} ${refused.todo}` }));
    announce(state.element.textContent);
    setBusy(false);
    clock.start(clock.spent);
    return;
  }
  forget(draftName());
  if (refused) {
    state.show(refused.body.recorded ? "warn" : "bad", refused.body.recorded ? t("late") : t("refused", { error: refused.message }));
  } else {
    then();
    if (found.progress) showProgress(found.progress);
    if (path !== "answer") state.show("good", said);
  }
  await next(state.element.textContent);
}

async function undo() {
  if (busy) return;
  const presentation = undoable().at(-1);
  if (!presentation) {
    state.show("warn", t("nothing_to_undo"));
    return;
  }
  save(`done:${me.pseudonym}`, undoable().slice(0, -1));
  await write("undo", { presentation }, t("saved_undo"));
}

async function skip() {
  if (!form || busy) return;
  const reasons = ["skip_unsure", "skip_broken", "skip_language", "skip_upset", "skip_other"];
  const reason = await ask(t("skip_title"), (answer, dialog) => {
    const own = h("input", { type: "text", "aria-label": t("reason"), placeholder: t("reason"), maxlength: 1500 });
    const give = (i) => answer([t(reasons[i]), own.value.trim()].filter(Boolean).join(": "));
    const buttons = reasons.map((name, i) => h("button", { type: "button", class: "choice face wide", autofocus: i === 0, onclick: () => give(i) }, kbd(String(i + 1)), t(name)));
    dialog.addEventListener("keydown", (event) => {
      if (isField(event.target) || event.ctrlKey || event.metaKey) {
        if (event.key === "Enter") { event.preventDefault(); give(4); }
        return;
      }
      const i = Number(event.key) - 1;
      const at = buttons.indexOf(document.activeElement);
      const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (buttons[i]) { event.preventDefault(); give(i); }
      else if (by && at >= 0) { event.preventDefault(); buttons[(at + by + buttons.length) % buttons.length].focus(); }
    });
    return [h("p", { class: "quiet" }, t("skip_why")), own, h("div", { class: "stack" }, buttons),
      h("p", { class: "buttons" }, h("button", { type: "button", onclick: () => answer(null) }, t("cancel"), kbd("Esc")))];
  });
  if (reason === null) return;
  const { presentation } = item;
  await write("skip", { presentation, reason }, t("saved_skip"), () => remember(presentation));
}

async function flag() {
  if (!form || busy) return;
  const text = await ask(t("flag_title"), (answer) => {
    const box = h("textarea", { rows: 4, autofocus: true, "aria-label": t("flag_title"), maxlength: 2000 });
    const send = () => (box.value.trim() ? answer(box.value) : box.focus());
    box.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key === "Enter") { event.preventDefault(); event.stopPropagation(); send(); }
    });
    return [h("p", { class: "quiet" }, t("flag_why")), box,
      h("p", { class: "buttons" }, h("button", { type: "button", onclick: () => answer(null) }, t("cancel"), kbd("Esc")),
        h("button", { type: "button", class: "primary", onclick: send }, t("send"), kbd("Ctrl", "Enter")))];
  });
  if (text === null) return;
  const { refused } = await outbox.send("flag", { presentation: item.presentation, text });
  if (refused) state.show("bad", t("refused", { error: refused.message }));
  else state.show("good", t("saved_flag"));
  announce(state.element.textContent);
}
