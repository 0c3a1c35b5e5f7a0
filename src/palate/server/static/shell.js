// What all pages have: the bar at the top, colours, language, the line that says whether the work is saved.

import { h, fill } from "./dom.js";
import { LANGUAGES, chooseLanguage, t, useLanguage } from "./i18n.js";
import { Line, Outbox, call } from "./api.js";
import { forget, load, save } from "./store.js";

// How every page begins: who is here, in which language, and the line to the server with what waits to be sent on it.
// `box` names the outbox of somebody.
export async function enter(box = (pseudonym) => pseudonym) {
  useLanguage(navigator.language.startsWith("zh") ? "zh" : "en");
  let outbox = null;
  const state = new StateLine(document.getElementById("state"), () => Boolean(outbox?.waiting().length));
  const line = new Line((what, seconds) => state.say(what, seconds, () => line.wake()));
  const me = await line.until(() => call("me"));
  const language = useLanguage(me.task.language);
  outbox = new Outbox(box(me.pseudonym), line);
  return { me, language, state, line, outbox };
}

export function topBar({ me, title, middle = [], language, links = [] }) {
  return h("header", { class: "top" },
    h("a", { class: "skiplink", href: "#main" }, t("skip_link")),
    h("a", { class: "brand", href: "/", "aria-label": t("app") }, h("img", { src: "/static/icon.svg", alt: "", width: 22, height: 22 }), h("span", {}, "palate")),
    h("h1", {}, title), middle,
    h("nav", {}, links,
      h("details", { class: "menu" },
        h("summary", {}, h("span", { class: "who", dir: "auto" }, me.name)),
        h("div", { class: "sheet" },
          select(t("theme"), { auto: t("theme_auto"), light: t("theme_light"), dark: t("theme_dark") }, load("colours", "auto"), useTheme),
          select(t("language"), LANGUAGES, language, (name) => { chooseLanguage(name); location.reload(); }),
          h("button", { type: "button", onclick: () => logOut(me) }, t("logout"))))));
}

function select(label, options, chosen, onchange) {
  const element = h("select", { onchange: () => onchange(element.value) },
    Object.entries(options).map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
  element.value = chosen;
  return h("label", { class: "row" }, h("span", {}, label), element);
}

export function useTheme(name) {
  save("colours", name);
  try {
    if (name === "auto") localStorage.removeItem("palate:theme");
    else localStorage.setItem("palate:theme", name);
  } catch { /* off: until the page is closed */ }
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
}

async function logOut(me) {
  forget(`draft:${me.pseudonym}`);
  forget(`done:${me.pseudonym}`);
  await call("logout", {});
  location.replace("/login");
}

// The line of state. `kept` = a write is waiting, and is safe in this browser.
export class StateLine {
  constructor(element, kept) {
    this.element = element;
    this.kept = kept;
    this.wasDown = false;
    this.show("", "");
  }

  show(kind, text, action = null) {
    clearInterval(this.ticking);
    this.element.className = `state ${kind}`;
    fill(this.element, h("span", { class: "dot", "aria-hidden": "true" }), h("span", {}, text), action);
  }

  // For api.Line: what is going on.
  say(state, seconds, wake) {
    if (state === "sending") {
      if (!this.wasDown && this.kept()) this.show("busy", t("state_sending"));
    } else if (state === "waiting") {
      this.wasDown = true;
      let left = Math.ceil(seconds);
      const text = h("span");
      const tell = () => { text.textContent = t(this.kept() ? "state_waiting" : "state_waiting_read", { seconds: left }); };
      tell();
      this.show("down", text, h("button", { type: "button", class: "small", onclick: wake }, t("try_now")));
      this.ticking = setInterval(() => { left = Math.max(0, left - 1); tell(); }, 1000);
    } else if (state === "sent" || state === "up") {
      this.show("good", t(state === "up" ? "state_up" : this.wasDown ? "state_back" : "state_sent"));
      this.wasDown = false;
    }
  }
}
