// A turn, as the server sends it: server-sent events in the answer to a POST.

import { Refused, Unreachable } from "./api.js";

const AGAIN = new Set([408, 425, 429, 500, 502, 503, 504]);

// Calls `take(name, data)` for every event; resolves to the kept turn. Throws Unreachable when it broke off before that (to
// be sent again with the same key), Refused when it will not be answered, and AbortError after signal.abort().
export async function takeTurn(body, take, signal) {
  let response;
  try {
    response = await fetch("/api/arena/turn", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    throw signal.aborted ? error : new Unreachable();
  }
  if (!response.ok) {
    if (response.status === 401) location.assign("/login");
    if (AGAIN.has(response.status)) throw new Unreachable(Number(response.headers.get("retry-after")) || 0);
    throw new Refused(response.status, await response.json().catch(() => ({})));
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw signal.aborted ? error : new Unreachable();
    }
    if (part.done) throw new Unreachable();
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = /^event: (\w+)\ndata: (.*)$/s.exec(block);
      if (!found) continue; // a sign of life
      const data = JSON.parse(found[2]);
      if (found[1] === "done") return data;
      if (found[1] === "error") throw new Refused(200, data);
      take(found[1], data);
    }
  }
}
