// Talking to the server. A write is kept in this browser, with its idempotency key, until the server has acknowledged it:
// a retry is harmless, and neither a stopped server nor a closed page loses an answer.

import { load, save } from "./store.js";

const LONGEST_WAIT = 15; // seconds between tries
const AGAIN = new Set([408, 425, 429, 500, 502, 503, 504]);

export class Refused extends Error {
  constructor(status, body) {
    super(body.error || `HTTP ${status}`);
    this.status = status;
    this.todo = body.do || "";
    this.body = body;
  }
}

export class Unreachable extends Error {
  constructor(wait = 0) {
    super("unreachable");
    this.wait = wait;
  }
}

export async function call(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  let found;
  try {
    response = await fetch(`/api/${path}`, options);
    found = await response.json();
  } catch {
    throw new Unreachable();
  }
  if (response.ok) return found;
  if (response.status === 401) {
    save("left", true);
    location.assign("/login");
    return new Promise(() => {}); // what waits for this is on the way to the login page; what is kept stays
  }
  if (AGAIN.has(response.status)) throw new Unreachable(Number(response.headers.get("retry-after")) || 0);
  throw new Refused(response.status, found);
}

export const newKey = () => {
  if (crypto.randomUUID) return crypto.randomUUID(); // not there over plain http from another machine
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
};

// Tries again until the server can be reached. `say(state, seconds)`: "sending" | "waiting" | "sent".
export class Line {
  constructor(say) {
    this.say = say;
    this.wake = () => {};
    addEventListener("online", () => this.wake());
  }

  async until(action) {
    for (let tries = 0; ; tries += 1) {
      this.say("sending");
      try {
        return await action();
      } catch (error) {
        if (!(error instanceof Unreachable)) throw error;
        const wait = Math.max(error.wait, Math.min(LONGEST_WAIT, 2 ** tries));
        this.say("waiting", wait);
        await new Promise((resolve) => {
          const timer = setTimeout(resolve, wait * 1000);
          this.wake = () => { clearTimeout(timer); resolve(); };
        });
      }
    }
  }
}

// Writes in order. Each is in the browser's storage before it is sent, and leaves it when the server has answered.
export class Outbox {
  constructor(name, line) {
    this.name = `outbox:${name}`;
    this.line = line;
    this.tail = Promise.resolve();
  }

  waiting() {
    return load(this.name, []);
  }

  // Resolves to {body} or {refused}: what the server said in the end.
  send(path, body) {
    const entry = { path, body: { key: newKey(), ...body } };
    save(this.name, [...this.waiting(), entry]);
    return this.#deliver(entry);
  }

  // What an earlier visit could not send.
  async resume() {
    const outcomes = [];
    for (const entry of this.waiting()) outcomes.push({ entry, ...(await this.#deliver(entry)) });
    return outcomes;
  }

  #deliver(entry) {
    const sent = this.tail.then(async () => {
      let outcome;
      try {
        outcome = { body: await this.line.until(() => call(entry.path, entry.body)) };
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        outcome = { refused: error };
      }
      save(this.name, this.waiting().filter((each) => each.body.key !== entry.body.key));
      this.line.say(outcome.body ? "sent" : "refused");
      return outcome;
    });
    this.tail = sent.catch(() => {});
    return sent;
  }
}
